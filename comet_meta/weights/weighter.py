"""The weights of the training samples: state by sample, set from anomaly scores by a rule."""

import logging
from collections.abc import Mapping, Sequence, Sized
from typing import Any, Literal

import torch
from torch import Tensor, nn

from comet_meta import distributed
from comet_meta.arrays import ArrayLike
from comet_meta.data import as_index
from comet_meta.weights.checks import (
    as_scores,
    check_hold_out,
    check_review,
    check_settings,
    too_few_or_equal,
)
from comet_meta.weights.contamination import NO_EVIDENCE, Contamination
from comet_meta.weights.held_out import HeldOut, check_saved_held_out
from comet_meta.weights.own_samples import OwnSamples
from comet_meta.weights.parts import as_part_scores, check_saved_parts, weigh_parts
from comet_meta.weights.ranking import join_scores, rank_samples
from comet_meta.weights.review import GOOD, Review
from comet_meta.weights.reviewed import Reviewed, check_saved_review
from comet_meta.weights.rules import MAX_LEFT_OUT, Rule, RuleName, estimate_contamination
from comet_meta.weights.weigh import weigh

_LOGGER = logging.getLogger(__name__)


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
        precaution: The fraction of the samples that ``"trimmed"`` leaves out besides, without proof
            that they are bad, in [0, 0.5]. None: a twentieth with ``"auto"``, a tenth beside a
            given share. It is for samples that no model judges: none is left out where
            ``hold_out`` holds samples out.
        kappa: Width of the fence of ``"hard"``, ``"ratio"`` and ``hold_out``, >= 0 (paper: 1.5).
        momentum: How much of a sample's earlier score stays when a new one comes, in [0, 1).
        prior: Anomaly scores of the training set from another source, shape (N,), for instance of
            a :class:`~comet_meta.MemoryScorer`. The weights then come from the prior alone and stay
            as they are (but see ``hold_out``), because a model tends to confirm the weights that it
            was trained with. The ranking uses the mean of prior and model scores, whose errors
            differ.
        part_prior: Anomaly scores of the samples' parts (patches of a picture, time steps of a
            window, columns of a row) from the same source, shape (N, ...); see
            :meth:`part_weights` and
            :meth:`MemoryScorer.score_parts <comet_meta.MemoryScorer.score_parts>`.
            The precaution is then a fraction of the parts, in place of the samples.
        hold_out: Fraction of the samples, the most suspect by the prior, that training does without
            until the model can judge them, in (0, 0.5]. Until the first ``fit`` they have weight 0,
            and so has a reference, at least a tenth of the others. That ``fit`` compares the
            model's scores of both, none of which it has been trained on: suspects up to the fence
            Q3 + kappa * IQR of the reference come back, those beyond Q3 + 2 kappa * IQR stay out.
            The more of them stay out, the more of the ranking is left out besides
            (:func:`~comet_meta.weights.held_out.leave_out_more`). Call it after about a quarter of
            the training. In place of the precaution, for ``"trimmed"`` with ``"auto"``. Of fewer
            than 100 samples nothing is held out.
        review: What a person saw who looked at some of the samples
            (:func:`~comet_meta.choose_for_review`): their indices, shape (K,), and whether each is
            bad, shape (K,). Those that are good have weight 1 and those that are bad weight 0. With
            ``contamination="auto"`` they tell the share of bad samples too
            (:func:`~comet_meta.share_from_review`). Needs the prior that they were chosen by, or
            comes from :func:`comet_meta.report.read_review`, or with a prior that has learned from
            it from :func:`~comet_meta.learn_from_review`.

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
        hold_out: The fraction that is held out; None where nothing is, also for too few samples.

    Weights are in [0, 1]. With the named rules and without a review they never rise with the score,
    follow a permutation of the samples, and (except ``"ratio"``) don't depend on the scores' offset
    and scale. They are all 1 if all scores are equal or fewer than 8 samples have a score. A sample
    without a score has weight 1.

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
    _held_out: HeldOut | None
    _reviewed: Reviewed | None

    def __init__(
        self,
        num_samples: int | None = None,
        *,
        rule: RuleName | Rule = "trimmed",
        kappa: float = 1.5,
        contamination: float | Literal["auto"] = "auto",
        precaution: float | None = None,
        momentum: float = 0.0,
        prior: ArrayLike | None = None,
        part_prior: ArrayLike | None = None,
        hold_out: float | None = None,
        review: Review | tuple[Tensor | Sequence[int], ArrayLike | Sequence[bool]] | None = None,
    ) -> None:
        super().__init__()
        if prior is not None:
            prior = as_scores(prior, "prior")
            if num_samples not in (None, len(prior)):
                raise ValueError(f"the prior has {len(prior)} scores for {num_samples} samples")
            num_samples = len(prior)
        check_settings(num_samples, rule, kappa, contamination, precaution, momentum)
        part_scores = None if part_prior is None else as_part_scores(part_prior, prior, rule)
        if hold_out is not None:
            check_hold_out(hold_out, prior, rule, contamination, part_prior)
        check_review(review, prior, hold_out)
        self.num_samples = num_samples
        self.rule = rule
        self.kappa = kappa
        self.contamination: float | Literal["auto"] = contamination
        self.precaution = precaution
        self.hold_out: float | None = None
        self.momentum = momentum
        self._updates = 0
        self._passed_once = num_samples is not None  # whether a whole pass told the size
        self._samples = OwnSamples()
        self._in_use = False  # whether a fit was begun with it
        self._end_told = False  # whether a warning said that the set's end never came
        size = num_samples or 0
        self.register_buffer("scores", torch.full((size,), torch.nan))
        self.register_buffer("weights", torch.ones(size))
        self.register_buffer("p_bad", torch.zeros(size))
        self.register_buffer("threshold", torch.tensor(torch.inf))
        self.register_buffer("prior", None if prior is None else prior.detach().cpu())
        self.register_buffer("_part_weights", None)
        self._held_out, self._reviewed = None, None
        if part_scores is not None:
            self._part_weights = torch.ones(part_scores.shape)
        if prior is not None:
            if review is not None:
                estimates = contamination == "auto"
                self._reviewed = Reviewed(prior, Review(*review), estimates=estimates)
            if hold_out is not None and (held_out := HeldOut(prior, hold_out)).waits:
                self._held_out, self.hold_out, self.precaution = held_out, hold_out, 0.0
            self.fit()
        if part_scores is not None:
            self._part_weights = weigh_parts(part_scores, self.weights, self._told(), precaution)
            if self._reviewed is not None:
                self._part_weights[self._reviewed.labels == GOOD] = 1

    @torch.no_grad()
    def fit(self, scores: ArrayLike | None = None) -> None:
        """Set the weights from the scores of all samples. Call it once an epoch.

        Args:
            scores: Anomaly scores of the whole training set, higher = more anomalous, any sign,
                shape (N,), sample i at position i (:func:`comet_meta.collect_scores`): a tensor, an
                array or a list. None: refit on the scores that ``update`` has gathered.

        Raises:
            TypeError: If the scores aren't floating-point.
            ValueError: If they are not (N,) or not finite.
        """
        if scores is not None:
            scores = as_scores(scores)
            if self.num_samples is None:
                self._grow(len(scores))
                self._passed_once = True
            if len(scores) != len(self.scores):
                raise ValueError(f"got {len(scores)} scores for {len(self.scores)} samples")
            self._store(slice(None), scores)
        self._updates = 0
        weights, threshold, p_bad = weigh(
            self._weighted_scores(),
            self.rule,
            self.kappa,
            self._told(),
            0.0 if self.has_parts else self.precaution,  # with parts, it is one of these
        )
        if self._held_out is not None:
            if self._held_out.waits:
                self._held_out.judge(self.scores, self.ranking_scores(), self.kappa)
            weights = weights * self._held_out.weights
        if self._reviewed is not None:
            weights, p_bad = self._reviewed.settle(weights, p_bad)
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
        return join_scores(self.scores, self.prior)

    def update(self, index: Tensor | Sequence[int], scores: ArrayLike) -> None:
        """Add the scores of a batch; for loops that don't score the whole set.

        The weights are refitted when as many scores were added as there are samples (about once an
        epoch), or by ``fit()``. Where the number of samples isn't known, the first sample that
        comes again ends the first epoch. With several processes, all of them get the scores of all.

        Args:
            index: Positions of the samples, shape (B,).
            scores: Their anomaly scores, shape (B,).

        Raises:
            TypeError: If index or scores have a wrong dtype.
            ValueError: If shapes differ or scores are not finite.
            IndexError: If a position lies outside the training set.
        """
        self._update(index, as_scores(scores))

    def update_finite(self, index: Tensor | Sequence[int], losses: Tensor) -> None:
        """As :meth:`update`, with losses in the place of scores: those that aren't finite are left.

        Args:
            index: Positions of the samples, shape (B,).
            losses: Their losses, shape (B,).
        """
        self._update(index, losses.detach().float().cpu())

    def _update(self, index: Tensor | Sequence[int], scores: Tensor) -> None:
        index = as_index(index, self.num_samples)
        if len(scores) != len(index):
            raise ValueError(f"got {len(scores)} scores and {len(index)} indices; expected as many")
        index, scores = distributed.gather_batches(index, scores)
        finite = scores.isfinite()
        index, scores = index[finite.to(index.device)].to(self.scores.device), scores[finite]
        if not len(index):
            return
        if self.num_samples is None:
            self._grow(int(index.max()) + 1)
        if not self._passed_once and not bool(self.scores[index].isnan().all()):
            self._passed_once = True
            self.fit()
        self._store(index, scores)
        self._updates += len(index)
        if self._passed_once and self._updates >= len(self.scores):
            self._tell_missing_end(len(index))
            self.fit()

    def _tell_missing_end(self, batch_size: int) -> None:
        """Warn once if a pass as long as the set left out its whole end, more than a batch."""
        count = len(self.scores)
        reached = int((~self.scores.isnan()).sum())
        if self._end_told or count - reached < batch_size or self.scores[:reached].isnan().any():
            return
        self._end_told = True
        _LOGGER.warning(
            "%d scores came for %d samples, and none for the samples from %d on. If the data set "
            "joins several that are indexed, index the whole instead, "
            "IndexedDataset(ConcatDataset([first, second])): the positions of its parts collide",
            *(self._updates, count, reached),
        )

    def identify(self, dataset: Sized) -> None:
        """Note which samples the positions stand for. Saved weights are refused for others.

        :class:`~comet_meta.CoMet` and the integrations do this by themselves.

        Args:
            dataset: The training set, as it is given to the DataLoader.

        Raises:
            TypeError: If its items carry positions in parts of it.
            ValueError: If it has another size, or isn't the set that the weights belong to.

        Example:
            >>> weighter = SoftConfidentWeighter(2)
            >>> weighter.identify(["a.png", "b.png"])
            >>> weighter.identify(["a.png", "c.png"])
            Traceback (most recent call last):
            ValueError: the weights belong to other samples: ...
        """
        self._samples.identify(dataset, self.num_samples)

    def begin_fit(self, dataset: Sized | None = None) -> None:
        """Start a training from the beginning, with the scores of no earlier one.

        The first training keeps what was set before it: loaded state, or weights that were fitted.

        Args:
            dataset: The training set, where known.

        Raises:
            TypeError: As for :meth:`identify`.
            ValueError: As for :meth:`identify`. Or if the weighter has a prior, which belongs to
                the samples of an earlier training.
        """
        if self._in_use:
            self.reset()
        if dataset is not None:
            self.identify(dataset)
        self._in_use = True

    def reset(self) -> None:
        """Forget all scores, and which samples they belong to. A prior and its weights stay."""
        self._updates = 0
        self.scores.fill_(torch.nan)
        if self.prior is not None:
            if self._held_out is not None:
                self._held_out.begin(self.prior)
            self.fit()
            return
        self._samples.identity = None
        if self.num_samples is None:
            self.scores, self.weights, self.p_bad = (
                kept[:0].clone() for kept in (self.scores, self.weights, self.p_bad)
            )
            self._passed_once = False
        self.weights.fill_(1)
        self.p_bad.fill_(0)
        self.threshold.fill_(torch.inf)

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a saved state fits, before anything is loaded.

        Args:
            state_dict: The saved state.

        Raises:
            ValueError: If it is of another number of samples or parts, of other samples, or only
                one of the two has samples held out.
        """
        self._samples.check_saved(state_dict, self.num_samples, self.prior)
        check_saved_parts(state_dict.get("_part_weights"), self._part_weights)
        check_saved_held_out(state_dict, self._held_out)
        labels = None if self._reviewed is None else self._reviewed.labels
        check_saved_review(state_dict.get("_reviewed.labels"), labels)

    @property
    def contamination_(self) -> Contamination:
        """The share of bad samples that the review tells or the scores prove, with an interval.

        Without a review, it comes from the scores that the weights follow (the prior, where there
        is one), whatever rule and contamination are set. ``str()`` of it is a sentence.
        """
        if self._reviewed is not None and self._reviewed.share is not None:
            return self._reviewed.share
        basis = self._weighted_scores()
        known = basis[~basis.isnan()]
        return NO_EVIDENCE if too_few_or_equal(known) else estimate_contamination(known)

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
    def needs_scores(self) -> bool:
        """Whether scores of the model can change the weights.

        So it is without a prior, and as long as samples are held out that the model is to judge.
        Otherwise ``fit`` changes the ranking alone.
        """
        return self.prior is None if self._held_out is None else self._held_out.waits

    @property
    def rejected(self) -> int:
        """How many held-out suspects the model has rejected: those that got a weight below 1/2."""
        return 0 if self._held_out is None else int(self._held_out.rejected)

    @property
    def reviewed(self) -> tuple[int, int]:
        """How many samples a person has looked at, and how many of them are bad."""
        return (0, 0) if self._reviewed is None else (self._reviewed.looks, self._reviewed.bad)

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
        """The samples in the order of :meth:`ranking_scores`, the most suspect first.

        Args:
            k: Number of samples to return, >= 0; None for all.

        Returns:
            Sample indices, shape (min(k, N),); samples without score and prior come last.

        Raises:
            ValueError: If ``k`` is negative or no integer.
        """
        return rank_samples(self.ranking_scores(), k)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        rule = self.rule if isinstance(self.rule, str) else getattr(self.rule, "__name__", "custom")
        return f"num_samples={self.num_samples}, rule={rule!r}, momentum={self.momentum}"

    def _told(self) -> float | Literal["auto"]:
        """The share of bad samples as it is given, or as the review tells it."""
        if self._reviewed is None or self._reviewed.share is None:
            return self.contamination
        return min(self._reviewed.share.estimate, MAX_LEFT_OUT)

    def _weighted_scores(self) -> Tensor:
        """The scores (N,) that the weights follow: the prior's, or else the model's."""
        return self.scores if self.prior is None else self.prior

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

    def get_extra_state(self) -> dict[str, Any]:
        """The number of scores since the last fit, for an exact resume, and whose they are."""
        return {
            "updates": self._updates,
            "passed_once": self._passed_once,
            "samples": self._samples.identity,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`get_extra_state`."""
        self._updates = state["updates"]
        self._passed_once = state["passed_once"]
        self._samples.identity = state["samples"] or self._samples.identity

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        self.check_state_dict(own)
        # A weighter of unknown size gets the size of the saved one.
        saved = state_dict.get(f"{prefix}scores")
        if self.num_samples is None and saved is not None:
            self._grow(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
