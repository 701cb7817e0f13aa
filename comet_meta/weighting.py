"""Soft confident learning: how far each training sample can be trusted, from its anomaly score."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from comet_meta import distributed
from comet_meta.checks import as_index

RuleName = Literal["posterior", "hard", "ratio"]
Rule = Callable[[Tensor], Tensor]
"""A custom rule: finite scores (N,) -> weights (N,) in [0, 1]."""

_MIN_SAMPLES = 8
_EM_STEPS = 100
_MIN_VARIANCE = 1e-3  # keeps the normal density from collapsing onto one sample
_TINY = 1e-300


class Weighting(NamedTuple):
    """What a rule makes of the scores.

    Attributes:
        weights: Confidence in each sample, shape (N,), in [0, 1].
        threshold: The score above which a sample is suspect, shape ().
    """

    weights: Tensor
    threshold: Tensor


def iqr_threshold(scores: Tensor, kappa: float = 1.5) -> Tensor:
    """The upper fence of a box plot, tau = Q3 + kappa * IQR.

    Args:
        scores: Anomaly scores, shape (N,), N >= 1.
        kappa: Width of the fence, >= 0.

    Returns:
        tau, shape ().

    Example:
        >>> float(iqr_threshold(torch.arange(1.0, 6.0)))
        7.0
    """
    q1, q3 = quantile(scores, 0.25), quantile(scores, 0.75)
    return q3 + kappa * (q3 - q1)


def ratio_weights(scores: Tensor, kappa: float = 1.5) -> Weighting:
    """The paper's rule, w = min(1, tau / s).

    The ratio means something only for scores >= 0. Where some are negative, all are first measured
    from a robust lower end: the lower fence Q1 - kappa * IQR, or the minimum where that is higher.
    The weights depend on where the scores' zero lies, so they are not invariant to a shift.

    Args:
        scores: Anomaly scores, shape (N,).
        kappa: Width of the fence, >= 0.

    Returns:
        Weights (N,) and tau.

    Example:
        >>> ratio_weights(torch.tensor([1.0, 2.0, 3.0, 4.0, 14.0])).weights
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 0.5000])
    """
    tau = iqr_threshold(scores, kappa)
    lower_fence = -iqr_threshold(-scores, kappa)
    origin = torch.maximum(scores.min(), lower_fence).clamp_max(0)
    positive, bound = (scores - origin).clamp_min(0), tau - origin
    weights = torch.where(positive > bound, bound / positive, 1.0)
    return Weighting(weights, tau)


def hard_weights(scores: Tensor, kappa: float = 1.5) -> Weighting:
    """A hard cut: w = 1 up to tau and 0 above it.

    Args:
        scores: Anomaly scores, shape (N,).
        kappa: Width of the fence, >= 0.

    Returns:
        Weights (N,) and tau.

    Example:
        >>> hard_weights(torch.tensor([1.0, 2.0, 3.0, 4.0, 14.0])).weights
        tensor([1., 1., 1., 1., 0.])
    """
    tau = iqr_threshold(scores, kappa)
    return Weighting((scores <= tau).to(scores.dtype), tau)


def posterior_weights(scores: Tensor) -> Weighting:
    """Posterior of being normal, w = P(normal | s), in a mixture of a normal and a uniform density.

    Normal samples' scores are taken as normally distributed, bad samples' as uniform between median
    and maximum: nothing is assumed of them but that they score high. The mixture is fitted by
    expectation-maximisation from a fixed start to scores measured from their median in units of
    their mean absolute deviation, so equal scores give equal weights in any order and on any scale.
    Up to the centre of the normal density all samples have the highest posterior; above it the
    posterior falls with the score.

    Args:
        scores: Anomaly scores, shape (N,), not all equal.

    Returns:
        Weights (N,) and the largest score whose weight is at least 1/2.

    Example:
        >>> scores = torch.cat([torch.linspace(0, 1, 90), torch.linspace(4, 6, 10)])
        >>> weights = posterior_weights(scores).weights
        >>> bool(weights[:90].min() > 0.9), bool(weights[90:].max() < 0.01)
        (True, True)
    """
    centred = scores - quantile(scores, 0.5)
    # Double precision: EM sums over all samples, and the tails are where it matters.
    x = centred.double() / centred.abs().double().mean()
    # In order, so that a permutation of the samples doesn't change the sums' rounding.
    order = x.argsort(stable=True)
    ordered = x[order]
    if ordered[-1] == 0:  # nothing lies above the median
        return Weighting(torch.ones_like(scores), scores.max())
    anomalous_density = (ordered >= 0) / ordered[-1]
    normal = 0.05 + 0.9 * (ordered <= quantile(ordered, 0.8)).double()
    mean = ordered.new_zeros(())
    for _ in range(_EM_STEPS):
        share = normal.mean()
        mean = (normal * ordered).mean() / share
        variance = (normal * (ordered - mean).square()).mean() / share + _MIN_VARIANCE
        density = (
            torch.exp(-(ordered - mean).square() / (2 * variance)) / (math.tau * variance).sqrt()
        )
        joint = share * density
        normal = joint / (joint + (1 - share) * anomalous_density).clamp_min(_TINY)
    normal = torch.where(ordered <= mean, normal.amax(), normal)
    weights = torch.empty_like(normal)
    weights[order] = normal.cummin(dim=0).values
    weights = weights.to(scores.dtype)
    return Weighting(weights, _half_point(scores, weights))


def _half_point(scores: Tensor, weights: Tensor) -> Tensor:
    """The largest score of a sample with weight >= 1/2, shape ()."""
    return torch.where(weights >= 0.5, scores, -torch.inf).max()


def quantile(values: Tensor, q: float) -> Tensor:
    """Linearly interpolated quantile of any number of values (``torch.quantile`` stops at 16 M).

    Args:
        values: Shape (N,), N >= 1.
        q: In [0, 1].

    Returns:
        The quantile, shape ().

    Example:
        >>> float(quantile(torch.tensor([3.0, 1.0, 2.0, 4.0]), 0.5))
        2.5
    """
    position = q * (len(values) - 1)
    lower = int(position)
    low = values.kthvalue(lower + 1).values
    high = values.kthvalue(min(lower + 2, len(values))).values
    return torch.lerp(low, high, position - lower)


class SoftConfidentWeighter(nn.Module):
    """Confidence weights of the training samples, refreshed from their anomaly scores.

    The state (scores and weights by sample) lives in buffers: it moves with ``.to(device)`` and is
    saved by ``state_dict``. On the CPU it serves losses on any device without synchronising it.

    Args:
        num_samples: Size N of the training set. None: as many as the first ``fit`` brings or the
            largest index that ``update`` sees.
        rule: ``"posterior"`` (:func:`posterior_weights`, default), ``"hard"``
            (:func:`hard_weights`), ``"ratio"`` (:func:`ratio_weights`, the paper's), or a function
            from finite scores (N,) to weights (N,) in [0, 1].
        kappa: Width of the fence of ``"hard"`` and ``"ratio"``, >= 0 (paper: 1.5).
        momentum: Share of a sample's earlier score that stays when a new one comes, in [0, 1).

    Let the model learn something before the first fit: weights from an untrained one can lock in.

    Weights are in [0, 1]. Those of the named rules are non-increasing in the score, follow a
    permutation of the samples, and (except ``"ratio"``) don't depend on the scores' offset and
    scale. They are all 1 where scores are all equal or fewer than 8 samples have one; a sample
    never seen has weight 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> weighter = SoftConfidentWeighter(num_samples=10, rule="hard")
        >>> weighter.fit(torch.tensor([1.0, 2.0, 1.5, 1.2, 9.0, 1.1, 1.7, 1.3, 1.6, 1.4]))
        >>> weighter(torch.tensor([0, 4]))
        tensor([1., 0.])
        >>> weighter.ranking(k=2)
        tensor([4, 1])

    Source: Aqeel, Sharifi, Cristani, Setti: Towards Real Unsupervised Anomaly Detection Via
    Confident Meta-Learning, ICCV 2025 (soft confident learning) for ``"ratio"``.
    """

    scores: Tensor
    weights: Tensor
    threshold: Tensor

    def __init__(
        self,
        num_samples: int | None = None,
        *,
        rule: RuleName | Rule = "posterior",
        kappa: float = 1.5,
        momentum: float = 0.0,
    ) -> None:
        super().__init__()
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; expected the set's size, >= 1")
        if not callable(rule) and rule not in get_args(RuleName):
            names = ", ".join(map(repr, get_args(RuleName)))
            raise ValueError(f"rule is {rule!r}; expected one of {names}, or a function")
        if not kappa >= 0:
            raise ValueError(f"kappa is {kappa}; expected >= 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; expected a share in [0, 1)")
        self.num_samples = num_samples
        self.rule = rule
        self.kappa = kappa
        self.momentum = momentum
        self._updates = 0
        size = num_samples or 0
        self.register_buffer("scores", torch.full((size,), torch.nan))
        self.register_buffer("weights", torch.ones(size))
        self.register_buffer("threshold", torch.tensor(torch.inf))

    @torch.no_grad()
    def fit(self, scores: Tensor | None = None) -> None:
        """Set the weights from the scores of all samples. Call it once an epoch.

        Args:
            scores: Anomaly scores of the whole training set, higher = more anomalous, any sign,
                shape (N,), sample i at position i (:func:`comet_meta.collect_scores`). None: refit
                on the scores that ``update`` has gathered.

        Raises:
            TypeError: If the scores aren't floating-point.
            ValueError: If they are not (N,) or not finite.
        """
        if scores is not None:
            self._check_scores(scores)
            if self.num_samples is None:
                self._grow(len(scores))
            if len(scores) != len(self.scores):
                raise ValueError(f"got {len(scores)} scores for {len(self.scores)} samples")
            self._store(slice(None), scores)
        self._updates = 0
        seen = ~self.scores.isnan()
        known = self.scores[seen]
        if len(known) < _MIN_SAMPLES or known.min() == known.max():
            self.weights.fill_(1)
            self.threshold.fill_(torch.inf)
            return
        fitted, threshold = self._apply_rule(known)
        self.weights.fill_(1)
        self.weights[seen] = fitted
        self.threshold.copy_(threshold)

    @torch.no_grad()
    def update(self, index: Tensor | Sequence[int], scores: Tensor) -> None:
        """Take in the scores of a batch; for loops that don't score the whole set.

        The weights are refitted once as many scores have come in as there are samples (about once
        an epoch), or by ``fit()``. With several processes, all of them get the scores of all.

        Args:
            index: Positions of the samples, shape (B,).
            scores: Their anomaly scores, shape (B,).

        Raises:
            TypeError: If index or scores have a wrong dtype.
            ValueError: If shapes differ or scores are not finite.
            IndexError: If a position lies outside the training set.
        """
        index = as_index(index, self.num_samples)
        self._check_scores(scores)
        if len(scores) != len(index):
            raise ValueError(f"got {len(scores)} scores and {len(index)} indices; expected as many")
        index, scores = distributed.join_batches(index, scores)
        if self.num_samples is None:
            self._grow(int(index.max()) + 1)
        self._store(index.to(self.scores.device), scores)
        self._updates += len(index)
        if self._updates >= len(self.scores):
            self.fit()

    def forward(self, index: Tensor | Sequence[int] | None = None) -> Tensor:
        """Weights of some samples, or of all.

        Args:
            index: Positions of the samples, shape (B,); None for all.

        Returns:
            Weights, shape (B,) or (N,), in [0, 1], on the weighter's device.

        Raises:
            TypeError: If the index isn't made of integers.
            IndexError: If a position lies outside the training set.
        """
        if index is None:
            return self.weights.clone()
        index = as_index(index, self.num_samples).to(self.weights.device)
        if self.num_samples is None:
            self._grow(int(index.max()) + 1)
        return self.weights[index]

    def ranking(self, k: int | None = None) -> Tensor:
        """The samples that fit in least.

        Args:
            k: How many; None for all.

        Returns:
            Sample indices, least confident first, equal weights by higher score; samples without a
            score last. Shape (min(k, N),).
        """
        by_score = self.scores.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
        order = by_score[self.weights[by_score].argsort(stable=True)]
        return order if k is None else order[:k]

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        rule = self.rule if isinstance(self.rule, str) else getattr(self.rule, "__name__", "custom")
        return f"num_samples={self.num_samples}, rule={rule!r}, momentum={self.momentum}"

    def _apply_rule(self, scores: Tensor) -> Weighting:
        if self.rule == "posterior":
            return posterior_weights(scores)
        if self.rule == "hard":
            return hard_weights(scores, self.kappa)
        if self.rule == "ratio":
            return ratio_weights(scores, self.kappa)
        weights = self.rule(scores)
        if weights.shape != scores.shape or not bool(((weights >= 0) & (weights <= 1)).all()):
            raise ValueError(
                f"the rule returned shape {tuple(weights.shape)} for {len(scores)} scores, or "
                "values outside [0, 1]; expected one weight in [0, 1] for each score"
            )
        return Weighting(weights, _half_point(scores, weights))

    def _check_scores(self, scores: Tensor) -> None:
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(f"scores is {kind}; expected a floating-point tensor")
        if scores.dim() != 1:
            raise ValueError(
                f"scores has shape {tuple(scores.shape)}; expected one anomaly score per sample: "
                "reduce patch scores to image scores first, for instance with .amax(dim=(1, 2))"
            )
        bad = (~torch.isfinite(scores)).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"{len(bad)} of {len(scores)} scores are NaN or infinite (first at positions "
                f"{bad[:8].tolist()}); expected finite anomaly scores"
            )

    def _store(self, where: Tensor | slice, scores: Tensor) -> None:
        new = scores.detach().to(self.scores)
        old = self.scores[where]
        self.scores[where] = torch.where(old.isnan(), new, torch.lerp(new, old, self.momentum))

    def _grow(self, size: int) -> None:
        missing = size - len(self.scores)
        if missing > 0:
            self.scores = torch.cat([self.scores, self.scores.new_full((missing,), torch.nan)])
            self.weights = torch.cat([self.weights, self.weights.new_ones(missing)])

    def get_extra_state(self) -> Tensor:
        """The number of streamed scores since the last fit, for an exact resume."""
        return torch.tensor(self._updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore :meth:`get_extra_state`."""
        self._updates = int(state)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A weighter of unknown size takes on the size of the one that was saved.
        saved = state_dict.get(f"{prefix}scores")
        if self.num_samples is None and saved is not None:
            self._grow(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
