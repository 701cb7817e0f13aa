"""Rules: pure functions from anomaly scores to weights."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from comet_meta.weights.mixture import EXACT_SAMPLES, Mixture, summary

RuleName = Literal["posterior", "hard", "ratio"]
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
    return Weighting(weights, half_point(scores, weights), anomalous)


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


def _exceeded_by(share: float, scores: Tensor) -> Tensor:
    """The smallest score that no more than a share of all exceed: a quantile's lower rank, ()."""
    return scores.kthvalue(1 + int((1 - share) * (len(scores) - 1))).values


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


RULES: dict[RuleName, Callable[[Tensor, float, float], Weighting]] = {
    "posterior": lambda scores, _kappa, spare: posterior_weights(scores, spare),
    "hard": lambda scores, kappa, _spare: hard_weights(scores, kappa),
    "ratio": lambda scores, kappa, _spare: ratio_weights(scores, kappa),
}
"""The rules by name: (scores (N,), kappa, spare) -> weighting."""
