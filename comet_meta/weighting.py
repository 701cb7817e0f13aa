"""Soft confident learning: how far each training sample can be trusted, from its anomaly score."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from comet_meta import distributed
from comet_meta.checks import as_index
from comet_meta.mixture import EXACT_SAMPLES, Mixture, summary

RuleName = Literal["posterior", "hard", "ratio"]
Rule = Callable[[Tensor], Tensor]
"""A custom rule: finite scores (N,) -> weights (N,) in [0, 1]."""

_MIN_SAMPLES = 8


class Weighting(NamedTuple):
    """What a rule makes of the scores.

    Attributes:
        weights: Confidence in each sample, shape (N,), in [0, 1].
        threshold: The score above which a sample is suspect, shape ().
        anomalous: Probability that a sample is bad, shape (N,), at most 1 - weights.
    """

    weights: Tensor
    threshold: Tensor
    anomalous: Tensor


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
        Weights (N,), tau and what the weights lack to 1.

    Example:
        >>> ratio_weights(torch.tensor([1.0, 2.0, 3.0, 4.0, 14.0])).weights
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 0.5000])
    """
    tau = iqr_threshold(scores, kappa)
    lower_fence = -iqr_threshold(-scores, kappa)
    origin = torch.maximum(scores.min(), lower_fence).clamp_max(0)
    above, bound = scores - origin, tau - origin
    weights = torch.where(above > bound, bound / above, 1.0)
    return Weighting(weights, tau, 1 - weights)


def hard_weights(scores: Tensor, kappa: float = 1.5) -> Weighting:
    """A hard cut: w = 1 up to tau and 0 above it.

    Args:
        scores: Anomaly scores, shape (N,).
        kappa: Width of the fence, >= 0.

    Returns:
        Weights (N,), tau and what the weights lack to 1.

    Example:
        >>> hard_weights(torch.tensor([1.0, 2.0, 3.0, 4.0, 14.0])).weights
        tensor([1., 1., 1., 1., 0.])
    """
    tau = iqr_threshold(scores, kappa)
    weights = (scores <= tau).to(scores.dtype)
    return Weighting(weights, tau, 1 - weights)


def posterior_weights(scores: Tensor, spare: float = 0.5) -> Weighting:
    """Posterior of being normal, w = P(normal | s), in a mixture of a normal and a uniform density.

    Normal samples' scores are taken as normally distributed, bad samples' as uniform between median
    and maximum: nothing is assumed of them but that they score high. The mixture is fitted by
    expectation-maximisation from a fixed start to scores measured from their median in units of
    their mean absolute deviation, so equal scores give equal weights in any order and on any scale.
    Up to the centre of the normal density all samples have the posterior of the centre; above it
    the posterior falls with the score.

    Scores of normal samples alone are never quite normally distributed either, least of all where
    there are several kinds of them, and a mixture always fits better. So the posterior is averaged
    over both answers to whether there are bad samples at all: the mixture counts by the odds that
    its likelihood gives it over a single normal density, after a handicap of 5 nats. Where it gains
    less than that, all weights are nearly 1.

    Where bad samples score much like normal ones, no fit can tell how many there are, and it finds
    too few. Training loses little by some normal samples less, but much by bad ones. So by the
    fit's own doubt, the share of normal samples that it expects among those it takes for bad, the
    highest scores get weight 0, and the upper half of them is taken for bad, if there are bad
    samples at all. Where bad samples stand apart there is little doubt, and few are spared.

    More than 16,384 scores are fitted by their histogram of 8,192 bins, which changes no weight by
    more than 0.001 (0.005 where the odds are even), but of a sample or two at the bounds of the
    spared ones; time and memory stay linear in N.

    Args:
        scores: Anomaly scores, shape (N,), not all equal.
        spare: Share of the samples that training can do without where the fit is in full doubt, in
            [0, 1); in proportion where it is in less.

    Returns:
        Weights (N,), the largest score whose weight is at least 1/2, and P(anomalous | s).

    Example:
        >>> scores = torch.cat([torch.linspace(0, 1, 90), torch.linspace(4, 6, 10)])
        >>> weights = posterior_weights(scores).weights
        >>> bool(weights[:90].min() > 0.9), bool(weights[90:].max() < 0.01)
        (True, True)
    """
    x = standardized(scores)
    top = x.max()
    if top == 0:  # nothing lies above the median
        return Weighting(torch.ones_like(scores), scores.max(), torch.zeros_like(scores))
    values, counts = summary(x)
    mixture = Mixture.fitted(values, counts, top.double())
    there_are_bad = mixture.evidence(values, counts).to(x)
    share = spare * float(mixture.doubt(values, counts))
    spared, taken_for_bad = _exceeded_by(share, scores), _exceeded_by(share / 2, scores)
    anomalous = mixture.posterior(x.clamp_min_(mixture.mean)).neg_().add_(1)
    anomalous.mul_(there_are_bad)
    weights = torch.sub(1, anomalous, out=x)  # in memory that has served its turn
    weights.masked_fill_(scores > spared, 1 - there_are_bad)
    anomalous.masked_fill_(scores > taken_for_bad, there_are_bad)
    return Weighting(weights, _half_point(scores, weights), anomalous)


def standardized(scores: Tensor) -> Tensor:
    """Scores measured from their median in units of their mean absolute deviation from it.

    Args:
        scores: Shape (N,), N >= 1.

    Returns:
        Shape (N,), without offset and scale; zeros where all are equal.

    Example:
        >>> standardized(torch.tensor([1.0, 2.0, 6.0]))
        tensor([-0.6000,  0.0000,  2.4000])
    """
    centred = scores - scores.median()
    # In double precision, so that a permutation of the samples doesn't change the rounding; among
    # very many samples that isn't worth the memory.
    precise = torch.float64 if len(scores) <= EXACT_SAMPLES else None
    deviation = centred.abs().mean(dtype=precise)
    # Spread of less than the smallest normal float is none: division by it would overflow.
    spread = deviation >= torch.finfo(scores.dtype).tiny
    return centred.div_(deviation.where(spread, torch.inf))


def _exceeded_by(share: float, scores: Tensor) -> Tensor:
    """The smallest score that no more than a share of all exceed: a quantile's lower rank, ()."""
    return scores.kthvalue(1 + int((1 - share) * (len(scores) - 1))).values


def _half_point(scores: Tensor, weights: Tensor) -> Tensor:
    """The largest score of a sample with weight >= 1/2, shape ()."""
    return scores.masked_fill(weights < 0.5, -torch.inf).max()


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
    # The value of the next rank: two passes over the values, where selecting it takes many.
    upper = values > low
    tied = len(values) - upper.sum() >= min(lower + 2, len(values))
    high = torch.where(tied, low, values.where(upper, torch.inf).min())
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
        spare: Share of the samples, those of the highest scores, that training can do without
            where ``"posterior"`` is in full doubt about which are bad, in [0, 1).
        momentum: Share of a sample's earlier score that stays when a new one comes, in [0, 1).
        prior: Anomaly scores of the training set from elsewhere, shape (N,), for instance of a
            :class:`~comet_meta.MemoryScorer`. Weights then come from them alone and stay as they
            are: a model is inclined to confirm the weights that it was trained with. Its own
            scores count for the ranking, where the errors of the two, being of different origin,
            make up for each other.

    Without a prior, let the model learn something before the first fit: weights from an untrained
    one can lock in.

    Attributes:
        scores: The model's anomaly scores, shape (N,); NaN for a sample without one.
        weights: Confidence in each sample, shape (N,).
        anomalous: Probability that a sample is bad, shape (N,); 0 for one never seen. With
            ``"posterior"`` a spared sample has weight 0 and yet may not be likely bad.
        threshold: The score (with a prior: of the prior) above which a sample is suspect, shape ().
        prior: As given, or None.

    Weights are in [0, 1]. Those of the named rules are non-increasing in the score, follow a
    permutation of the samples, and (except ``"ratio"``) don't depend on the scores' offset and
    scale. They are all 1 where scores are all equal or fewer than 8 samples have one; a sample
    never seen has weight 1.

    Raises:
        TypeError: If the prior isn't a floating-point tensor.
        ValueError: If an argument is out of range, or the prior not (N,) or not finite.

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
    anomalous: Tensor
    threshold: Tensor
    prior: Tensor | None

    def __init__(
        self,
        num_samples: int | None = None,
        *,
        rule: RuleName | Rule = "posterior",
        kappa: float = 1.5,
        spare: float = 0.5,
        momentum: float = 0.0,
        prior: Tensor | None = None,
    ) -> None:
        super().__init__()
        if prior is not None:
            _check_scores(prior, "prior")
            if num_samples not in (None, len(prior)):
                raise ValueError(f"the prior has {len(prior)} scores for {num_samples} samples")
            num_samples = len(prior)
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; expected the set's size, >= 1")
        if not callable(rule) and rule not in get_args(RuleName):
            names = ", ".join(map(repr, get_args(RuleName)))
            raise ValueError(f"rule is {rule!r}; expected one of {names}, or a function")
        if not kappa >= 0:
            raise ValueError(f"kappa is {kappa}; expected >= 0")
        if not 0 <= spare < 1:
            raise ValueError(f"spare is {spare}; expected a share in [0, 1)")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; expected a share in [0, 1)")
        self.num_samples = num_samples
        self.rule = rule
        self.kappa = kappa
        self.spare = spare
        self.momentum = momentum
        self._updates = 0
        size = num_samples or 0
        self.register_buffer("scores", torch.full((size,), torch.nan))
        self.register_buffer("weights", torch.ones(size))
        self.register_buffer("anomalous", torch.zeros(size))
        self.register_buffer("threshold", torch.tensor(torch.inf))
        self.register_buffer("prior", None if prior is None else prior.detach().cpu().float())
        if prior is not None:
            self.fit()

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
            _check_scores(scores)
            if self.num_samples is None:
                self._grow(len(scores))
            if len(scores) != len(self.scores):
                raise ValueError(f"got {len(scores)} scores for {len(self.scores)} samples")
            self._store(slice(None), scores)
        self._updates = 0
        basis = self.scores if self.prior is None else self.prior
        # A sum is NaN if one of its terms is: no pass over all samples for a mask.
        if basis.sum().isnan():
            known = ~basis.isnan()
            weights, anomalous = torch.ones_like(basis), torch.zeros_like(basis)
            weights[known], threshold, anomalous[known] = self._fitted(basis[known])
        else:
            weights, threshold, anomalous = self._fitted(basis)
        # Each in one piece: who reads meanwhile in another thread finds no half-made weights.
        self.threshold.copy_(threshold)
        self.weights.copy_(weights)
        self.anomalous.copy_(anomalous)

    def suspicion(self) -> Tensor:
        """What the ranking goes by.

        Returns:
            The scores, or with a prior the mean of scores and prior, each standardised; the prior
            alone for samples without a score. NaN for samples of which nothing is known. Shape
            (N,).
        """
        if self.prior is None:
            return self.scores
        prior = standardized(self.prior)
        known = ~self.scores.isnan()
        own = torch.full_like(prior, torch.nan)
        own[known] = standardized(self.scores[known])
        return torch.where(known, (prior + own) / 2, prior)

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
        _check_scores(scores)
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
        """The samples that fit in least, by :meth:`suspicion`.

        Args:
            k: How many; None for all.

        Returns:
            Sample indices, most suspicious first; samples of which nothing is known last. Shape
            (min(k, N),).
        """
        suspicion = self.suspicion().nan_to_num(nan=-torch.inf)
        if k is None or k >= len(suspicion):
            return suspicion.argsort(descending=True, stable=True)
        # No more than these can be among the first k.
        kth = suspicion.kthvalue(len(suspicion) - max(k, 1) + 1).values
        candidates = (suspicion >= kth).nonzero().flatten()
        return candidates[suspicion[candidates].argsort(descending=True, stable=True)][:k]

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        rule = self.rule if isinstance(self.rule, str) else getattr(self.rule, "__name__", "custom")
        return f"num_samples={self.num_samples}, rule={rule!r}, momentum={self.momentum}"

    def _fitted(self, known: Tensor) -> Weighting:
        """The weighting of the samples (M,) of which something is known."""
        low, high = known.aminmax() if len(known) else (torch.zeros(()), torch.zeros(()))
        if len(known) < _MIN_SAMPLES or low == high:
            no_bound = torch.tensor(torch.inf)
            return Weighting(torch.ones_like(known), no_bound, torch.zeros_like(known))
        return self._apply_rule(known)

    def _apply_rule(self, scores: Tensor) -> Weighting:
        if self.rule == "posterior":
            return posterior_weights(scores, self.spare)
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
        return Weighting(weights, _half_point(scores, weights), 1 - weights)

    def _store(self, where: Tensor | slice, scores: Tensor) -> None:
        new = scores.detach().to(self.scores)
        if self.momentum == 0:
            self.scores[where] = new
            return
        old = self.scores[where]
        self.scores[where] = torch.where(old.isnan(), new, torch.lerp(new, old, self.momentum))

    def _grow(self, size: int) -> None:
        missing = size - len(self.scores)
        if missing > 0:
            self.scores = torch.cat([self.scores, self.scores.new_full((missing,), torch.nan)])
            self.weights = torch.cat([self.weights, self.weights.new_ones(missing)])
            self.anomalous = torch.cat([self.anomalous, self.anomalous.new_zeros(missing)])

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


def _check_scores(scores: Tensor, name: str = "scores") -> None:
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{name} is {kind}; expected a floating-point tensor")
    if scores.dim() != 1:
        raise ValueError(
            f"{name} has shape {tuple(scores.shape)}; expected one anomaly score per sample: "
            "reduce patch scores to image scores first, for instance with .amax(dim=(1, 2))"
        )
    # One pass in the common case: the sum is finite only if all terms are.
    if scores.sum(dtype=torch.float64).isfinite():
        return
    bad = (~torch.isfinite(scores)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(scores)} {name} are NaN or infinite (first at positions "
            f"{bad[:8].tolist()}); expected finite anomaly scores"
        )
