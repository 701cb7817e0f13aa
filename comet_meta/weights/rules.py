"""Rules: pure functions from anomaly scores to weights."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from comet_meta.weights.contamination import EXACT_SAMPLES, Contamination, summary
from comet_meta.weights.contamination import contamination as proven_contamination

TRIMMED = 0.05
"""The share of the samples that is left out without evidence that they are bad."""
MOST = 0.5
"""The largest share of the samples that is ever left out."""

RuleName = Literal["trimmed", "hard", "ratio"]
Rule = Callable[[Tensor], Tensor]
"""A custom rule: finite scores (N,) -> weights (N,) in [0, 1]."""


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


def trimmed_weights(scores: Tensor, contamination: float | Literal["auto"] = "auto") -> Weighting:
    """Leave out the samples of the highest scores: as many as are known to be bad, and a twentieth.

    1. How many are bad: the share that the caller gives, or with ``"auto"`` the lower bound that
       the scores prove (:mod:`comet_meta.weights.contamination`), often 0.
    2. A twentieth of all samples is left out on top. No ranking is perfect, and the scores seldom
       prove how many samples are bad; leaving out so few costs next to nothing on clean data.
       A contamination of 0 leaves nobody out: training is then plain training, bit for bit.
    3. By rank from the top, weights rise from 0 to 1 between 3/4 and 5/4 of that share. Samples of
       equal scores share the mean of the weights that their ranks have.
    4. P(bad) falls likewise about the share of step 1 alone.

    Args:
        scores: Anomaly scores, shape (N,), not all equal.
        contamination: The share of bad samples, in [0, 0.5), or ``"auto"``.

    Returns:
        Weights (N,), the largest score whose weight is at least 1/2, and P(bad).

    Example:
        >>> scores = torch.cat([torch.linspace(0, 1, 90), torch.linspace(4, 6, 10)])
        >>> weights = trimmed_weights(scores, contamination=0.1).weights
        >>> int((weights == 0).sum()), int((weights == 1).sum())
        (11, 81)
        >>> bool(trimmed_weights(scores, contamination=0.0).weights.min() == 1)
        True
    """
    found = estimate(scores) if contamination == "auto" else None
    bad = found.low if found is not None else float(contamination)
    share = min(bad + TRIMMED, MOST) if found is not None or bad > 0 else 0.0
    # One after the other: selecting a rank takes three times the memory of the scores.
    weights = _removed(scores, share).neg_().add_(1) if share > 0 else torch.ones_like(scores)
    anomalous = _removed(scores, bad) if bad > 0 else torch.zeros_like(scores)
    return Weighting(weights, half_point(scores, weights), anomalous)


def estimate(scores: Tensor) -> Contamination:
    """The share of bad samples that the scores prove.

    Args:
        scores: Anomaly scores, shape (N,), not all equal.

    Returns:
        Estimate and interval; 0 without evidence.
    """
    return proven_contamination(*summary(standardized(scores)))


def _removed(scores: Tensor, share: float) -> Tensor:
    """By how much a share in (0, 1/2] of the weight falls, the highest scores first, shape (N,)."""
    count = len(scores)
    first = max(1, count - math.ceil(1.25 * share * count))
    lowest = scores.kthvalue(first).values
    high = (scores >= lowest).nonzero().flatten()
    _values, group, sizes = scores[high].unique(  # type: ignore[no-untyped-call]
        return_inverse=True, return_counts=True
    )
    # Ranks from the top as shares: a group of equal scores reaches from `above` to `below`.
    below = sizes.double().flip(0).cumsum(0).flip(0) / count
    above = below - sizes.double() / count
    mean = (_area(below, share) - _area(above, share)) / (below - above)
    removed = torch.zeros_like(scores)
    removed[high] = mean.clamp(0, 1).to(scores)[group]
    return removed


def _area(rank: Tensor, share: float) -> Tensor:
    """Integral from 0 to a rank of the ramp from 1 at 3/4 share down to 0 at 5/4 share."""
    on_ramp = (rank - 0.75 * share).clamp(0, 0.5 * share)
    return rank.clamp_max(0.75 * share) + on_ramp - on_ramp.square() / share


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
    return centred.div_(deviation.where(deviation > 0, 1))


def half_point(scores: Tensor, weights: Tensor) -> Tensor:
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


RULES: dict[RuleName, Callable[[Tensor, float, float | Literal["auto"]], Weighting]] = {
    "trimmed": lambda scores, _kappa, contamination: trimmed_weights(scores, contamination),
    "hard": lambda scores, kappa, _contamination: hard_weights(scores, kappa),
    "ratio": lambda scores, kappa, _contamination: ratio_weights(scores, kappa),
}
"""The rules by name: (scores (N,), kappa, contamination) -> weighting."""
