"""A normal and a uniform density: which scores are normal, and is it a mixture at all?"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

EXACT_SAMPLES = 2**14
"""Up to this many scores are fitted themselves, more by their histogram."""

_BINS = 2**13
_EM_STEPS = 100
_MIN_VARIANCE = 1e-3  # keeps the normal density from collapsing onto one sample
_HANDICAP = 5.0  # nats


class Mixture(NamedTuple):
    """A normal density with its share, and a uniform one on [0, top].

    Attributes:
        share: Of the normal density, in [0, 1], shape ().
        mean: Of the normal density, shape ().
        variance: Of the normal density, > 0, shape ().
        top: Where the uniform density ends, > 0, shape ().
    """

    share: Tensor
    mean: Tensor
    variance: Tensor
    top: Tensor

    @classmethod
    def fitted(cls, values: Tensor, counts: Tensor, top: Tensor) -> "Mixture":
        """Expectation-maximisation from a fixed start.

        Args:
            values: Ascending, shape (M,), in double precision.
            counts: How often each occurs, shape (M,).
            top: The largest value, > 0, shape ().
        """
        total = counts.sum()
        lower_part = counts.cumsum(0) <= 0.8 * total
        responsibility = 0.05 + 0.9 * lower_part.double()
        for _ in range(_EM_STEPS):
            normal = counts * responsibility
            size = normal.sum()
            mean = (normal * values).sum() / size
            variance = (normal * (values - mean).square()).sum() / size + _MIN_VARIANCE
            mixture = cls(size / total, mean, variance, top)
            responsibility = mixture.posterior(values)
        return mixture

    def posterior(self, x: Tensor) -> Tensor:
        """P(normal | x), shape of x."""
        normal, anomalous = self._densities(x)
        return normal.div_(anomalous.add_(normal).clamp_min_(torch.finfo(x.dtype).tiny))

    def evidence(self, values: Tensor, counts: Tensor) -> Tensor:
        """Probability that the values come from a mixture, and not from a normal density alone.

        Values of one population are never quite normal, and two densities always fit better than
        one: hence the handicap.

        Args:
            values: Those that the mixture was fitted to, shape (M,).
            counts: How often each occurs, shape (M,).

        Returns:
            Shape ().
        """
        return (self.gain(values, counts) - _HANDICAP).sigmoid()

    def gain(self, values: Tensor, counts: Tensor) -> Tensor:
        """Log-likelihood of the mixture less that of a normal density alone, in nats, shape ()."""
        total = counts.sum()
        mean = (counts * values).sum() / total
        variance = (counts * (values - mean).square()).sum() / total + _MIN_VARIANCE
        alone = -((values - mean).square() / variance + (math.tau * variance).log()) / 2
        normal, anomalous = self._densities(values)
        together = (normal + anomalous).clamp_min(torch.finfo(values.dtype).tiny).log()
        return (counts * (together - alone)).sum()

    def doubt(self, values: Tensor, counts: Tensor) -> Tensor:
        """Share of normal samples that the mixture expects among those it takes for bad.

        Args:
            values: Those that the mixture was fitted to, shape (M,).
            counts: How often each occurs, shape (M,).

        Returns:
            In [0, 1], shape ().
        """
        normal = self.posterior(values.clamp_min(self.mean))
        bad = counts * (1 - normal)
        return (bad * normal).sum() / bad.sum().clamp_min(torch.finfo(bad.dtype).tiny)

    def _densities(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normal and the uniform density by their shares, both of the shape of x."""
        share, mean, variance, top = (value.to(x) for value in self)
        normal = (x - mean).square_().div_(-2 * variance).exp_()
        normal.mul_(share / (math.tau * variance).sqrt())
        return normal, (x >= 0).to(x).mul_((1 - share) / top)


def summary(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a mixture is fitted to.

    Args:
        x: Standardised scores, shape (N,).

    Returns:
        Ascending values (M,) and how often they occur, (M,), in double precision.
    """
    if len(x) <= EXACT_SAMPLES:
        # In order, so that a permutation of the samples doesn't change the sums' rounding.
        values = x.double().sort().values
        return values, torch.ones_like(values)
    # Bins that grow with the distance from the median: no outlier makes all others share one.
    counts = torch.histc(x.abs().add_(1).reciprocal_().mul_(x), _BINS, min=-1, max=1).double()
    edges = torch.linspace(-1, 1, _BINS + 1, dtype=torch.float64, device=x.device)
    centres = (edges[1:] + edges[:-1]) / 2
    filled = counts > 0
    return (centres / (1 - centres.abs()))[filled], counts[filled]
