"""Rules: pure functions from anomaly scores to weights."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from comet_meta.weights.contamination import (
    EXACT_SAMPLES,
    Contamination,
    count_values,
    proven_contamination,
)

ALWAYS_LEFT_OUT = 0.05
"""Fraction of the samples that is left out without evidence that they are bad."""
LEFT_OUT_BESIDE_GIVEN = 0.1
"""Fraction that is left out beside a given share of bad samples: no ranking finds all of them."""
MAX_LEFT_OUT = 0.5
"""Largest fraction of the samples that is left out."""

RuleName = Literal["trimmed", "hard", "ratio"]


class Weighting(NamedTuple):
    """The result of a rule.

    Attributes:
        weights: Weight of each sample, shape (N,), in [0, 1].
        threshold: The score above which a sample is suspect, shape ().
        p_bad: P(bad) of each sample, shape (N,), in [0, 1]; with the named rules at most
            1 - weights.
    """

    weights: Tensor
    threshold: Tensor
    p_bad: Tensor


Rule = Callable[[Tensor], Tensor | Weighting]
"""A custom rule: finite scores (N,) -> a :class:`Weighting`, or weights (N,) in [0, 1] alone."""


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

    The ratio has a meaning only for scores >= 0. If some scores are negative, the lower fence
    Q1 - kappa * IQR is first subtracted from all of them, or the minimum where that is higher.
    The weights depend on the scores' zero, so they are not invariant to a shift.

    Args:
        scores: Anomaly scores, shape (N,).
        kappa: Width of the fence, >= 0.

    Returns:
        Weights (N,), tau, and P(bad) = 1 - w.

    Example:
        >>> ratio_weights(torch.tensor([1.0, 2.0, 3.0, 4.0, 14.0])).weights
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 0.5000])
    """
    tau = iqr_threshold(scores, kappa)
    lower_fence = -iqr_threshold(-scores, kappa)
    origin = torch.maximum(scores.min(), lower_fence).clamp_max(0)
    # w = min(1, tau / s), with s and tau measured from the origin
    shifted, bound = scores - origin, tau - origin
    weights = torch.where(shifted > bound, bound / shifted, 1.0)
    return Weighting(weights, tau, 1 - weights)


def hard_weights(scores: Tensor, kappa: float = 1.5) -> Weighting:
    """A hard cut: w = 1 if s <= tau, else 0.

    Args:
        scores: Anomaly scores, shape (N,).
        kappa: Width of the fence, >= 0.

    Returns:
        Weights (N,), tau, and P(bad) = 1 - w.

    Example:
        >>> hard_weights(torch.tensor([1.0, 2.0, 3.0, 4.0, 14.0])).weights
        tensor([1., 1., 1., 1., 0.])
    """
    tau = iqr_threshold(scores, kappa)
    weights = (scores <= tau).to(scores.dtype)
    return Weighting(weights, tau, 1 - weights)


def trimmed_weights(
    scores: Tensor,
    contamination: float | Literal["auto"] = "auto",
    precaution: float | None = None,
) -> Weighting:
    """Leave out the samples with the highest scores: the known bad ones and a few more.

    1. The contamination c is the share that the caller gives, or with ``"auto"`` the lower bound
       that the scores prove (:mod:`comet_meta.weights.contamination`), often 0.
    2. The fraction f = min(c + a, 0.5) of the samples is left out, where a is the precaution: for
       bad samples that the scores don't prove. By default a = 0.05 with ``"auto"``, which on clean
       data costs next to nothing. With a given c, a = 0.1: there are bad samples then, and some of
       them have no high score. A given contamination of 0 leaves out none: training is then plain
       training, bit for bit.
    3. Let r be a sample's rank from the highest score down, divided by N. Its weight is
       w = clip((r - 3f/4) / (f/2), 0, 1): it rises from 0 to 1 between 3/4 and 5/4 of f. Samples
       with equal scores get the mean of the weights of their ranks.
    4. P(bad) = 1 - clip((r - 3c/4) / (c/2), 0, 1): the same ramp, with c in place of f.

    Args:
        scores: Anomaly scores, shape (N,), not all equal.
        contamination: The share of bad samples, in [0, 0.5), or ``"auto"``.
        precaution: Fraction a, in [0, 0.5]; None for the default of step 2.

    Returns:
        Weights (N,), the largest score whose weight is at least 1/2, and P(bad).

    Example:
        >>> scores = torch.cat([torch.linspace(0, 1, 90), torch.linspace(4, 6, 10)])
        >>> weights = trimmed_weights(scores, contamination=0.1).weights
        >>> int((weights == 0).sum()), int((weights == 1).sum())
        (15, 75)
        >>> bool(trimmed_weights(scores, contamination=0.0).weights.min() == 1)
        True
    """
    # 1) contamination c
    auto = contamination == "auto"
    c = estimate_contamination(scores).low if auto else float(contamination)
    # 2) left-out fraction f
    a = default_precaution(contamination) if precaution is None else precaution
    f = min(c + a, MAX_LEFT_OUT) if auto or c > 0 else 0.0
    # 3) w = 1 - (left out at f). Before 4), because selecting a rank takes three times the memory
    #    of the scores.
    weights = left_out(scores, f).neg_().add_(1) if f > 0 else torch.ones_like(scores)
    # 4) P(bad) = (left out at c)
    p_bad = left_out(scores, c) if c > 0 else torch.zeros_like(scores)
    return Weighting(weights, score_threshold(scores, weights), p_bad)


def trimmed_parts(
    part_scores: Tensor, weights: Tensor, fraction: float = ALWAYS_LEFT_OUT
) -> Tensor:
    """Leave out a fraction of all parts, those with the highest scores.

    A bad sample seldom shows it everywhere: a scratch covers a few of a picture's patches, a fault
    moves a few of a row's columns. So a twentieth of the parts holds what is bad about many more
    samples than a twentieth of the samples does.

    1. The parts of samples with weight 0 don't count: they are left out already.
    2. Of the other parts, the fraction a with the highest scores is left out, with the ramp of step
       3 of :func:`trimmed_weights`.

    Args:
        part_scores: Anomaly scores of the samples' parts, shape (N, P).
        weights: Weights of the samples, shape (N,).
        fraction: Fraction a, in (0, 0.5].

    Returns:
        Weights of the parts, shape (N, P), in [0, 1]; 1 where step 1 applies.

    Example:
        >>> part_scores = torch.arange(40.0).reshape(10, 4)
        >>> left_out = 1 - trimmed_parts(part_scores, torch.ones(10))
        >>> left_out[9].tolist(), float(left_out.sum())
        ([0.0, 0.125, 0.875, 1.0], 2.0)
    """
    part_weights = torch.ones_like(part_scores)
    # 1) samples that are still there
    counts = weights > 0
    # 2) w = 1 - (left out at a)
    kept = part_scores[counts]
    part_weights[counts] -= left_out(kept.flatten(), fraction).reshape(kept.shape)
    return part_weights


def default_precaution(contamination: float | Literal["auto"]) -> float:
    """The fraction that is left out beside the contamination, of the samples or of their parts.

    Args:
        contamination: A given share > 0, or ``"auto"``.

    Returns:
        0.05 or 0.1, see step 2 of :func:`trimmed_weights`.
    """
    return ALWAYS_LEFT_OUT if contamination == "auto" else LEFT_OUT_BESIDE_GIVEN


def estimate_contamination(scores: Tensor) -> Contamination:
    """The share of bad samples that the scores prove.

    Args:
        scores: Anomaly scores, shape (N,), not all equal.

    Returns:
        Estimate and interval; the estimate is 0 without evidence.
    """
    return proven_contamination(*count_values(standardize(scores)))


def left_out(scores: Tensor, fraction: float) -> Tensor:
    """The part of each sample's weight that is left out to leave out a fraction of them all.

    g(r) = 1 - clip((r - 3/4 f) / (f/2), 0, 1) for a fraction f and the rank r of a sample from the
    highest score down, divided by N; its mean over the ranks of equal scores.

    Args:
        scores: Shape (N,), N >= 1.
        fraction: Fraction f, in (0, 4/5].

    Returns:
        In [0, 1], shape (N,). The values add up to f * N.

    Example:
        >>> left_out(torch.arange(10.0), 0.2)[5:].tolist()
        [0.0, 0.0, 0.125, 0.875, 1.0]
    """
    count = len(scores)
    # Only scores of rank r <= 5/4 f lose weight: the others need no rank.
    lowest = scores.kthvalue(max(1, count - math.ceil(1.25 * fraction * count))).values
    high = (scores >= lowest).nonzero().flatten()
    _values, group, sizes = scores[high].unique(  # type: ignore[no-untyped-call]
        return_inverse=True, return_counts=True
    )
    # A group of equal scores has the ranks from `start` to `end`.
    end = sizes.double().flip(0).cumsum(0).flip(0) / count
    start = end - sizes.double() / count
    # mean of g = (integral of g from start to end) / (end - start)
    mean = (_integral(end, fraction) - _integral(start, fraction)) / (end - start)
    parts = torch.zeros_like(scores)
    parts[high] = mean.clamp(0, 1).to(scores)[group]
    return parts


def _integral(rank: Tensor, fraction: float) -> Tensor:
    """Integral of g from 0 to a rank."""
    on_ramp = (rank - 0.75 * fraction).clamp(0, 0.5 * fraction)
    return rank.clamp_max(0.75 * fraction) + on_ramp - on_ramp.square() / fraction


def standardize(scores: Tensor) -> Tensor:
    """Bring scores to median 0 and mean absolute deviation 1.

    Args:
        scores: Shape (N,), N >= 1.

    Returns:
        (s - median) / mean |s - median|, shape (N,); zeros where all scores are equal.

    Example:
        >>> standardize(torch.tensor([1.0, 2.0, 6.0]))
        tensor([-0.6000,  0.0000,  2.4000])
    """
    centred = scores - scores.median()
    # In double precision, so that a permutation of the samples doesn't change the rounding. For
    # very many samples this would take too much memory.
    precise = torch.float64 if len(scores) <= EXACT_SAMPLES else None
    deviation = centred.abs().mean(dtype=precise)
    # centred / deviation
    return centred.div_(deviation.where(deviation > 0, 1))


def score_threshold(scores: Tensor, weights: Tensor) -> Tensor:
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
    # The value of the next rank, in two passes over the values; kthvalue would take many.
    upper = values > low
    tied = len(values) - upper.sum() >= min(lower + 2, len(values))
    high = torch.where(tied, low, values.where(upper, torch.inf).min())
    return torch.lerp(low, high, position - lower)


FENCES: dict[RuleName, Callable[[Tensor, float], Weighting]] = {
    "hard": hard_weights,
    "ratio": ratio_weights,
}
"""The rules with a fence by name: (scores (N,), kappa) -> weighting."""
