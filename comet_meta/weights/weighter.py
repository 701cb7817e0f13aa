"""The weights of the training samples, refreshed from their anomaly scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comet_meta import distributed
from comet_meta.data import as_index
from comet_meta.weights.rules import RULES, Rule, RuleName, Weighting, half_point, standardized

_MIN_SAMPLES = 8


class SoftConfidentWeighter(nn.Module):
    """Confidence weights of the training samples, refreshed from their anomaly scores.

    The state (scores and weights by sample) lives in buffers: it moves with ``.to(device)`` and is
    saved by ``state_dict``. On the CPU it serves losses on any device without synchronising it.

    Args:
        num_samples: Size N of the training set. None: as many as the first ``fit`` brings or the
            largest index that ``update`` sees.
        rule: ``"posterior"`` (default), ``"hard"``, ``"ratio"`` (the paper's), see
            :mod:`comet_meta.weights.rules`, or a function from finite scores (N,) to weights (N,)
            in [0, 1].
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
        if not callable(rule) and rule not in RULES:
            names = ", ".join(map(repr, RULES))
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
        if isinstance(self.rule, str):
            return RULES[self.rule](scores, self.kappa, self.spare)
        weights = self.rule(scores)
        if weights.shape != scores.shape or not bool(((weights >= 0) & (weights <= 1)).all()):
            raise ValueError(
                f"the rule returned shape {tuple(weights.shape)} for {len(scores)} scores, or "
                "values outside [0, 1]; expected one weight in [0, 1] for each score"
            )
        return Weighting(weights, half_point(scores, weights), 1 - weights)

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
