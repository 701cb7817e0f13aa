"""The weights of the training samples: state by sample, set from anomaly scores by a rule."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from comet_meta import distributed
from comet_meta.data import as_index
from comet_meta.weights.contamination import NO_EVIDENCE, Contamination
from comet_meta.weights.rules import (
    MAX_LEFT_OUT,
    RULES,
    Rule,
    RuleName,
    Weighting,
    estimate_contamination,
    score_threshold,
    standardize,
    trimmed_parts,
    trimmed_weights,
)

_MIN_SAMPLES = 8


class SoftConfidentWeighter(nn.Module):
    """Weights of the training samples, set from their anomaly scores.

    A weight says how far a sample is trusted: 1 means fully, 0 not at all. Scores and weights are
    buffers: they move with ``.to(device)`` and are saved by ``state_dict``. Leave the weighter on
    the CPU also where the losses are on another device: looking up weights then needs no
    synchronisation.

    Args:
        num_samples: Size N of the training set. None: as many as the first ``fit`` brings or the
            largest index that ``update`` sees.
        rule: ``"trimmed"`` (default), ``"hard"``, ``"ratio"`` (the paper's), see
            :mod:`comet_meta.weights.rules`, or a function from finite scores (N,) to a
            :class:`~comet_meta.weights.rules.Weighting` (weights, threshold, P(bad)), or to weights
            (N,) in [0, 1] alone. The threshold is then the largest score of a sample with weight
            >= 1/2, and P(bad) = 1 - w.
        contamination: The share of bad samples in the training set, for ``"trimmed"``: in [0, 0.5),
            or ``"auto"``: as many as the scores prove. Give the share if you know it, because
            scores alone seldom prove much. 0 makes all weights 1.
        kappa: Width of the fence of ``"hard"`` and ``"ratio"``, >= 0 (paper: 1.5).
        momentum: How much of a sample's earlier score stays when a new one comes, in [0, 1).
        prior: Anomaly scores of the training set from another source, shape (N,), for instance of
            a :class:`~comet_meta.MemoryScorer`. The weights then come from the prior alone and stay
            as they are, because a model tends to confirm the weights that it was trained with. The
            ranking uses the mean of prior and model scores, whose errors differ.
        part_prior: Anomaly scores of the samples' parts (patches of a picture, time steps of a
            window, columns of a row) from the same source, shape (N, ...); see
            :meth:`part_weights` and
            :meth:`MemoryScorer.score_parts <comet_meta.MemoryScorer.score_parts>`.
            ``"trimmed"`` then leaves out a twentieth of the parts in place of a twentieth of the
            samples.

    Without a prior, let the model learn something before the first fit: weights from an untrained
    model can lock in.

    Attributes:
        scores: The model's anomaly scores, shape (N,); NaN for a sample without one.
        weights: Weight of each sample, shape (N,).
        p_bad: P(bad) of each sample, shape (N,); 0 for a sample without a score. With
            ``"trimmed"`` a sample may have weight 0 and P(bad) 0.
        threshold: The score (with a prior: the prior's score) above which a sample is suspect,
            shape ().
        prior: The prior, or None.

    Weights are in [0, 1]. With the named rules they never rise with the score, follow a permutation
    of the samples, and (except ``"ratio"``) don't depend on the scores' offset and scale. They are
    all 1 if all scores are equal or fewer than 8 samples have a score. A sample without a score has
    weight 1.

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
    p_bad: Tensor
    threshold: Tensor
    prior: Tensor | None
    _part_weights: Tensor | None

    def __init__(
        self,
        num_samples: int | None = None,
        *,
        rule: RuleName | Rule = "trimmed",
        kappa: float = 1.5,
        contamination: float | Literal["auto"] = "auto",
        momentum: float = 0.0,
        prior: Tensor | None = None,
        part_prior: Tensor | None = None,
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
        if contamination != "auto" and (
            isinstance(contamination, str) or not 0 <= contamination < MAX_LEFT_OUT
        ):
            raise ValueError(
                f"contamination is {contamination!r}; expected a share in [0, 0.5), or 'auto'"
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; expected a share in [0, 1)")
        if part_prior is not None:
            if prior is None or rule != "trimmed":
                raise ValueError("part_prior goes with prior= and rule='trimmed'; give both")
            _check_scores(part_prior.flatten(), "part_prior")
            if len(part_prior) != len(prior) or part_prior.dim() < 2:
                raise ValueError(
                    f"part_prior has shape {tuple(part_prior.shape)} for {len(prior)} samples; "
                    "expected (N, ...): a score of each part of each sample"
                )
        self.num_samples = num_samples
        self.rule = rule
        self.kappa = kappa
        self.contamination: float | Literal["auto"] = contamination
        self.momentum = momentum
        self._updates = 0
        size = num_samples or 0
        self.register_buffer("scores", torch.full((size,), torch.nan))
        self.register_buffer("weights", torch.ones(size))
        self.register_buffer("p_bad", torch.zeros(size))
        self.register_buffer("threshold", torch.tensor(torch.inf))
        self.register_buffer("prior", None if prior is None else prior.detach().cpu().float())
        self.register_buffer("_part_weights", None)
        if part_prior is not None:
            self._part_weights = torch.ones(part_prior.shape)
        if prior is not None:
            self.fit()
        if part_prior is not None and contamination != 0:
            part_scores = part_prior.detach().cpu().float().flatten(1)
            if not _too_few_or_equal(part_scores.flatten()):
                fitted = trimmed_parts(part_scores, self.weights)
                self._part_weights = fitted.reshape(part_prior.shape)

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
        basis = self._weighted_scores()
        # The sum is NaN if one of its terms is, and takes less memory than a mask.
        if basis.sum().isnan():
            known = ~basis.isnan()
            weights, p_bad = torch.ones_like(basis), torch.zeros_like(basis)
            weights[known], threshold, p_bad[known] = self._weigh(basis[known])
        else:
            weights, threshold, p_bad = self._weigh(basis)
        # One copy each: another thread that reads during the fit gets old or new weights.
        self.threshold.copy_(threshold)
        self.weights.copy_(weights)
        self.p_bad.copy_(p_bad)

    def ranking_scores(self) -> Tensor:
        """The scores that :meth:`ranking` sorts by.

        Returns:
            Without a prior the model's scores. With one, the mean of scores and prior, each
            standardised; the prior alone for samples without a score. NaN for samples without
            either. Shape (N,).
        """
        if self.prior is None:
            return self.scores
        prior = standardize(self.prior)
        known = ~self.scores.isnan()
        own = torch.full_like(prior, torch.nan)
        own[known] = standardize(self.scores[known])
        return torch.where(known, (prior + own) / 2, prior)

    def update(self, index: Tensor | Sequence[int], scores: Tensor) -> None:
        """Add the scores of a batch; for loops that don't score the whole set.

        The weights are refitted when as many scores were added as there are samples (about once an
        epoch), or by ``fit()``. With several processes, all of them get the scores of all.

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
        index, scores = distributed.gather_batches(index, scores)
        if self.num_samples is None:
            self._grow(int(index.max()) + 1)
        self._store(index.to(self.scores.device), scores)
        self._updates += len(index)
        if self._updates >= len(self.scores):
            self.fit()

    @property
    def contamination_(self) -> Contamination:
        """The share of bad samples that the scores prove, with an interval.

        It comes from the scores that the weights follow (the prior, where there is one), whatever
        rule and contamination are set. ``str()`` of it is a sentence.
        """
        basis = self._weighted_scores()
        known = basis[~basis.isnan()]
        return NO_EVIDENCE if _too_few_or_equal(known) else estimate_contamination(known)

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

    @property
    def has_parts(self) -> bool:
        """Whether there are weights of parts."""
        return self._part_weights is not None

    def part_weights(self, index: Tensor | Sequence[int] | None = None) -> Tensor:
        """Weights of the parts of some samples, or of all.

        Multiply the losses of a sample's parts by them before you average:
        ``(weighter.part_weights(index) * model.patch_losses(images)).mean(dim=1)``. The weights
        of whole samples are applied by ``objective``, as always.

        Args:
            index: Positions of the samples, shape (B,); None for all.

        Returns:
            Weights in [0, 1], on the weighter's device, shape (B, ...) or (N, ...) as in
            ``part_prior``.

        Raises:
            ValueError: If the weighter has no ``part_prior``.
            TypeError: If the index isn't made of integers.
            IndexError: If a position lies outside the training set.

        Example:
            >>> part_scores = torch.rand(100, 4, generator=torch.Generator().manual_seed(0))
            >>> part_scores[7, 2] = 3.0  # one strange part
            >>> weighter = SoftConfidentWeighter(
            ...     prior=part_scores.amax(dim=1), part_prior=part_scores)
            >>> weighter.part_weights([7])[0, 2], weighter([7])
            (tensor(0.), tensor([1.]))
        """
        if self._part_weights is None:
            raise ValueError("there are no weights of parts: give the weighter a part_prior=")
        if index is None:
            return self._part_weights.clone()
        index = as_index(index, self.num_samples).to(self._part_weights.device)
        return self._part_weights[index]

    def mean_weights(self) -> Tensor:
        """How much each sample counts in training, its parts included.

        Returns:
            The samples' weights, with a ``part_prior`` times the mean weight of their parts,
            shape (N,), in [0, 1].
        """
        if self._part_weights is None:
            return self.weights.clone()
        return self.weights * self._part_weights.flatten(1).mean(dim=1).to(self.weights)

    def ranking(self, k: int | None = None) -> Tensor:
        """The samples in the order of :meth:`ranking_scores`, the most suspicious first.

        Args:
            k: Number of samples to return; None for all.

        Returns:
            Sample indices, shape (min(k, N),); samples without score and prior come last.
        """
        scores = self.ranking_scores().nan_to_num(nan=-torch.inf)
        if k is None or k >= len(scores):
            return scores.argsort(descending=True, stable=True)
        # Sort only the samples that can be among the first k.
        kth = scores.kthvalue(len(scores) - max(k, 1) + 1).values
        candidates = (scores >= kth).nonzero().flatten()
        return candidates[scores[candidates].argsort(descending=True, stable=True)][:k]

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        rule = self.rule if isinstance(self.rule, str) else getattr(self.rule, "__name__", "custom")
        return f"num_samples={self.num_samples}, rule={rule!r}, momentum={self.momentum}"

    def _weighted_scores(self) -> Tensor:
        """The scores (N,) that the weights follow: the prior's, or else the model's."""
        return self.scores if self.prior is None else self.prior

    def _weigh(self, scores: Tensor) -> Weighting:
        """Apply the rule to scores (M,) without NaN."""
        if _too_few_or_equal(scores):
            no_threshold = torch.tensor(torch.inf)
            return Weighting(torch.ones_like(scores), no_threshold, torch.zeros_like(scores))
        if self._part_weights is not None:  # the twentieth is one of the parts
            return trimmed_weights(scores, self.contamination, always=0.0)
        if isinstance(self.rule, str):
            return RULES[self.rule](scores, self.kappa, self.contamination)
        result = self.rule(scores)
        if isinstance(result, Weighting):
            _check_rule_values(result.weights, "weight", scores)
            _check_rule_values(result.p_bad, "P(bad)", scores)
            if result.threshold.numel() != 1 or bool(result.threshold.isnan()):
                raise ValueError(
                    f"the rule returned the threshold {result.threshold}; expected one score"
                )
            return result._replace(threshold=result.threshold.reshape(()))
        _check_rule_values(result, "weight", scores)
        return Weighting(result, score_threshold(scores, result), 1 - result)

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
            self.p_bad = torch.cat([self.p_bad, self.p_bad.new_zeros(missing)])

    def get_extra_state(self) -> Tensor:
        """The number of scores added by :meth:`update` since the last fit, for an exact resume."""
        return torch.tensor(self._updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore :meth:`get_extra_state`."""
        self._updates = int(state)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A weighter of unknown size gets the size of the saved one.
        saved = state_dict.get(f"{prefix}scores")
        if self.num_samples is None and saved is not None:
            self._grow(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _check_rule_values(values: Tensor, name: str, scores: Tensor) -> None:
    if values.shape != scores.shape or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"the rule returned shape {tuple(values.shape)} for {len(scores)} scores, or "
            f"values outside [0, 1]; expected one {name} in [0, 1] for each score"
        )


def _too_few_or_equal(scores: Tensor) -> bool:
    """Whether scores (N,) are too few to weigh, or equal up to rounding."""
    if len(scores) < _MIN_SAMPLES:
        return True
    low, high = scores.aminmax()
    rounding = 4 * torch.finfo(scores.dtype).eps * torch.maximum(low.abs(), high.abs())
    return bool(high - low <= rounding)


def _check_scores(scores: Tensor, name: str = "scores") -> None:
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{name} is {kind}; expected a floating-point tensor")
    if scores.dim() != 1:
        raise ValueError(
            f"{name} has shape {tuple(scores.shape)}; expected one anomaly score per sample: "
            "reduce patch scores to image scores first, for instance with .amax(dim=(1, 2))"
        )
    # One pass in the common case: the sum is finite only if all its terms are.
    if scores.sum(dtype=torch.float64).isfinite():
        return
    bad = (~torch.isfinite(scores)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(scores)} {name} are NaN or infinite (first at positions "
            f"{bad[:8].tolist()}); expected finite anomaly scores"
        )
