"""Checks of what users pass in, each ending in a sentence that says how to put it right."""

from collections.abc import Sequence

import torch
from torch import Tensor


def as_index(index: Tensor | Sequence[int], num_samples: int | None = None) -> Tensor:
    """Check sample indices and return them as a tensor.

    Args:
        index: Positions of the samples in the data set, shape (B,), integers in [0, num_samples).
        num_samples: Size of the data set, or None where it isn't known. The range is checked only
            for an index on the CPU, where looking at it costs no device synchronisation.

    Returns:
        The indices (B,) as int64, on the device they came on.

    Raises:
        TypeError: If the index isn't made of integers.
        ValueError: If it isn't one-dimensional or is empty.
        IndexError: If a position lies outside the data set.
    """
    index = torch.as_tensor(index)
    if index.dim() != 1:
        raise ValueError(
            f"index has shape {tuple(index.shape)}; expected (B,), one data-set position per sample"
        )
    if index.numel() == 0:
        raise ValueError("the batch is empty: index has no entries; skip empty batches")
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise TypeError(
            f"index has dtype {index.dtype}; expected integer data-set positions, "
            "for instance those that comet_meta.IndexedDataset yields"
        )
    if num_samples is not None and index.device.type == "cpu":
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= num_samples:
            outside = low if low < 0 else high
            raise IndexError(
                f"index {outside} is out of range for {num_samples} samples; "
                "expected positions in the data set that num_samples counts"
            )
    return index.to(torch.int64)


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
            "losses is a scalar; expected (B,), one loss per sample: a mean over the batch "
            "can't be weighted. Take the losses with reduction='none', or leave the loop as it is "
            "and draw its samples with comet_meta.ConfidenceSampler"
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
