"""How many samples are bad, as far as the anomaly scores alone can prove it.

The scores of clean data are skewed: squared errors, distances to neighbours and likelihoods all
have a longer upper tail. So a long tail proves nothing. What no skewed population of one kind has
is a tail that, further up, thins out *more slowly* than before: a shoulder or a second mode. The
test:

1. Measure the scores from their lower end in units of their spread and take the logarithm. This
   turns the tails of lognormal and of power-law populations into exponential ones.
2. Cut three neighbouring regions from m upwards: [m, a), [a, b) of equal width, and [b, inf), with
   n1, n2 and n3 samples.
3. Of the samples that reach m, the share that reaches a is r1 = (n2 + n3) / (n1 + n2 + n3); of
   those that reach a, the share that reaches b is r2 = n3 / (n2 + n3). A population with a
   non-decreasing hazard rate, as every log-concave density has it, has r2 <= r1.
4. Where r2 exceeds r1 by four standard errors (signed root of the likelihood ratio), there are more
   samples above b than one population has. As many of them as can be taken away before the excess
   falls below four standard errors are a lower bound of the number of bad samples; as many as can
   be taken away before r2 = r1 are the estimate.
5. Scan m and b over quantiles of the scores and keep the largest lower bound.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EXACT_SAMPLES = 2**14
"""Up to this many scores are counted themselves, more by their histogram."""

_BINS = 2**13
_STANDARD_ERRORS = 4.0
_STARTS = torch.linspace(0.3, 0.7, 5, dtype=torch.float64)  # quantiles for m
_ENDS = torch.linspace(0.6, 0.99, 24, dtype=torch.float64)  # quantiles for b
_HALVINGS = 30


class Contamination(NamedTuple):
    """The share of bad samples, with an interval.

    Attributes:
        estimate: In [0, 1); 0 without evidence.
        low: A lower bound that holds as long as the scores of good samples have a non-decreasing
            hazard rate; 0 without evidence.
        high: The share of all samples in the region that holds too many; NaN without evidence,
            since bad samples that score like good ones leave no trace in the scores.
    """

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        """The estimate in words."""
        if self.low == 0:
            return "no evidence of bad samples"
        low, high = (f"{100 * value:.0f}" for value in (self.low, self.high))
        return f"about {100 * self.estimate:.0f} % ({low} to {high} %) of the samples look bad"


NO_EVIDENCE = Contamination(0.0, 0.0, float("nan"))


def proven_contamination(values: Tensor, counts: Tensor) -> Contamination:
    """The share of bad samples that the scores prove.

    Args:
        values: Ascending scores without offset and scale, shape (M,), in double precision
            (:func:`count_values`).
        counts: How often each occurs, shape (M,).

    Returns:
        The estimate; without evidence where the scores have fewer than three values.

    Example:
        >>> normal, bad = torch.linspace(-2, 2, 360), torch.linspace(6, 7, 40)
        >>> str(proven_contamination(*count_values(torch.cat([normal, bad]))))
        'about 9 % (8 to 9 %) of the samples look bad'
        >>> str(proven_contamination(*count_values(torch.linspace(-0.99, 0.99, 400).erfinv())))
        'no evidence of bad samples'
    """
    if len(values) < 3:
        return NO_EVIDENCE
    rounded = bool((counts > 1).sum() > 0.1 * len(counts))
    if not rounded:
        # Many copies of one sample are one sample that was taken often, and no second mode.
        counts = counts.clamp_max(max(1.0, 0.01 * float(counts.sum())))
    total = counts.sum()
    # Equal scores are spread over their cell, up to half the way to the next values: rounded scores
    # then have the distribution that they were rounded from.
    inner = (values[1:] + values[:-1]) / 2
    edges = torch.cat([2 * values[:1] - inner[:1], inner, 2 * values[-1:] - inner[-1:]])
    reached = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    # 1) The scale: a low quantile, and the distance between the lower quartile and the median.
    shares = torch.tensor([0.05, 0.25, 0.5], dtype=torch.float64)
    low, quarter, middle = _interpolated(shares.to(edges) * total, reached, edges)
    unit = middle - quarter
    edges = ((edges - low) / unit + 1).clamp_min(0.5).log()
    # 2) All pairs of m and b.
    starts = _interpolated(_STARTS.to(edges) * total, reached, edges)
    ends = _interpolated(_ENDS.to(edges) * total, reached, edges)
    widest = _widest_cells(edges, counts, starts) if rounded else torch.zeros_like(starts)
    m, b = (grid.flatten() for grid in torch.meshgrid(starts, ends, indexing="ij"))
    wide = (b - m) / 2 > 4 * widest.repeat_interleave(len(ends))
    m, b = m[wide], b[wide]
    if not len(m):
        return NO_EVIDENCE
    at_m, at_a, at_b = (_interpolated(x, edges, reached) for x in (m, (m + b) / 2, b))
    n1, n2, n3 = at_a - at_m, at_b - at_a, total - at_b
    # 3) to 5)
    lower = _removable(n1, n2, n3, _STANDARD_ERRORS)
    best = lower.argmax()
    if not bool(lower[best] > 0):
        return NO_EVIDENCE
    estimate = _removable(n1[best], n2[best], n3[best], 0.0)
    return Contamination(*(float(x / total) for x in (estimate, lower[best], n3[best])))


def _widest_cells(edges: Tensor, counts: Tensor, starts: Tensor) -> Tensor:
    """The widest cell above each start, (K,), of the values that many samples share; 0 for none.

    Where the samples of a cell really lie is unknown, so regions must be wide against it.
    """
    widths = (edges[1:] - edges[:-1]).where(counts > 1, 0)
    above = edges[1:].unsqueeze(0) > starts.unsqueeze(1)
    # The last cells of rounded scores hold single samples and are as wide as they are far apart.
    middle = (counts.cumsum(0) <= 0.95 * counts.sum()).unsqueeze(0)
    return widths.where(above & middle, 0).amax(dim=1)


def _removable(n1: Tensor, n2: Tensor, n3: Tensor, errors: float) -> Tensor:
    """How many of n3 can go while r2 exceeds r1 by so many standard errors; 0 where it doesn't."""
    low, high = torch.zeros_like(n3), n3.clone()
    exceeds = excess(n1, n2, n3) > errors
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        still = excess(n1, n2, n3 - middle) > errors
        low, high = torch.where(still, middle, low), torch.where(still, high, middle)
    return torch.where(exceeds, low, 0.0)


def excess(n1: Tensor, n2: Tensor, n3: Tensor) -> Tensor:
    """By how many standard errors r2 exceeds r1.

    Args:
        n1: Numbers of samples in [m, a), >= 0, any shape.
        n2: In [a, b).
        n3: In [b, inf).

    Returns:
        Root of twice the log-likelihood ratio of two shares against a common one; 0 where r2 <= r1.

    Example:
        >>> bool(excess(torch.tensor(50.0), torch.tensor(10.0), torch.tensor(2.0)) == 0)
        True
        >>> bool(excess(torch.tensor(50.0), torch.tensor(10.0), torch.tensor(30.0)) > 3)
        True
    """
    first, second = n2 + n3, n3  # reach a, reach b
    r1 = first / (n1 + first).clamp_min(1e-9)
    r2 = second / first.clamp_min(1e-9)
    common = (first + second) / (n1 + first + first).clamp_min(1e-9)

    def likelihood(reach: Tensor, stay: Tensor, share: Tensor) -> Tensor:
        return torch.xlogy(reach, share) + torch.xlogy(stay, 1 - share)

    ratio = (
        likelihood(first, n1, r1)
        + likelihood(second, n2, r2)
        - likelihood(first, n1, common)
        - likelihood(second, n2, common)
    )
    return torch.where(r2 > r1, (2 * ratio).clamp_min(0).sqrt(), 0.0)


def _interpolated(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """The piecewise linear function through ascending (xs, ys), (K,), at x, (Q,)."""
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    x0, x1, y0, y1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    position = ((x - x0) / (x1 - x0).clamp_min(torch.finfo(x.dtype).tiny)).clamp(0, 1)
    return torch.lerp(y0, y1, position)


def count_values(x: Tensor) -> tuple[Tensor, Tensor]:
    """The values among some scores and how often they occur.

    Args:
        x: Scores measured from their median in units of their mean absolute deviation, shape (N,).

    Returns:
        Ascending values (M,) and counts (M,), in double precision. More than 16,384 scores are
        counted in 8,192 bins that grow with the distance from the median, so that no outlier makes
        all others share one.
    """
    if len(x) <= EXACT_SAMPLES:
        values, counts = x.double().unique(return_counts=True)  # type: ignore[no-untyped-call]
        return values, counts.double()
    counts = torch.histc(x.abs().add_(1).reciprocal_().mul_(x), _BINS, min=-1, max=1).double()
    edges = torch.linspace(-1, 1, _BINS + 1, dtype=torch.float64, device=x.device)
    centres = (edges[1:] + edges[:-1]) / 2
    found = counts > 0
    return (centres / (1 - centres.abs()))[found], counts[found]
