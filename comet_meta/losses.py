"""Per-sample losses: their check, their weights, and which of them are finite."""

from collections.abc import Callable

import torch
from torch import Tensor

Closure = Callable[[Tensor], Tensor]
"""Losses of some rows of the batch: rows (R,) -> losses (R,), or pairs of them (2, R)."""


def check_losses(losses: Tensor, size: int | None = None) -> None:
    """Check that losses come one per sample, or a pair per sample.

    Args:
        losses: What should be per-sample losses, shape (B,), or with those of the samples taken as
            anomalous in a second row, (2, B).
        size: The number of samples they belong to, where known.

    Raises:
        TypeError: If it isn't a floating-point tensor.
        ValueError: If it has another shape, is empty, or B differs from ``size``.
    """
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"losses is {kind}; expected a floating-point tensor of shape (B,)")
    if losses.dim() == 0:
        raise ValueError(
            "losses is a scalar; expected (B,), one loss per sample: a mean over the batch can't "
            "be weighted. Take the losses with reduction='none', or leave the loop as it is and "
            "draw its samples with comet_meta.ConfidenceSampler"
        )
    if losses.dim() != 1 and not (losses.dim() == 2 and len(losses) == 2):
        raise ValueError(
            f"losses has shape {tuple(losses.shape)}; expected (B,), one loss per sample: use "
            "reduction='none' and average over all dimensions but the first. (2, B) is for losses "
            "of the samples taken as normal, and taken as anomalous"
        )
    if losses.numel() == 0:
        raise ValueError("the batch is empty: losses has no entries; skip empty batches")
    if size is not None and losses.shape[-1] != size:
        raise ValueError(f"got {losses.shape[-1]} losses for {size} samples; expected one for each")


def finite_samples(losses: Tensor) -> Tensor:
    """Which samples' losses (B,) or (2, B) are finite, bool of shape (B,)."""
    finite = torch.isfinite(losses)
    return finite if losses.dim() == 1 else finite.all(dim=0)


def weighted_losses(losses: Tensor, weights: Tensor) -> Tensor:
    """What each sample adds to the loss.

    Args:
        losses: Of the samples, shape (R,); or (2, R), of the samples taken as normal and taken as
            anomalous.
        weights: Of either loss, shape (2, R).

    Returns:
        The weighted losses, or the sums of both, shape (R,).

    Example:
        >>> weights = torch.tensor([[1.0, 0.5], [0.0, 0.1]])
        >>> weighted_losses(torch.tensor([2.0, 4.0]), weights)
        tensor([2., 2.])
        >>> weighted_losses(torch.tensor([[2.0, 4.0], [3.0, 3.0]]), weights)
        tensor([2.0000, 2.3000])

    Source: the first row is soft confident learning; the second, outlier exposure (Hendrycks,
    Mazeika, Dietterich, ICLR 2019) of samples that are taken as bad by their scores, as in Qiu, Li,
    Kloft, Rudolph, Mandt: Latent outlier exposure, ICML 2022.
    """
    if losses.dim() == 1:
        return weights[0].to(losses) * losses
    return (weights.to(losses) * losses).sum(dim=0)
