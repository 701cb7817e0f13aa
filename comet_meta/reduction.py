"""One loss per sample from the shapes that losses come in."""

from collections.abc import Mapping

import torch
from torch import Tensor


def per_sample(losses: Tensor | Mapping[str, Tensor], batch_size: int) -> Tensor:
    """Reduce losses to one per sample.

    What belongs to a sample is averaged; terms of several names are summed, as a total loss sums
    them.

    Args:
        losses: Shape (B,); (B, ...), as of patches (B, P) or pixels (B, H, W); (B * P,), the
            patches of a sample side by side, as ``features.flatten(0, 1)`` leaves them; or a
            dictionary of terms, each of any of these shapes.
        batch_size: Number of samples B.

    Returns:
        Losses of shape (B,), with their graph.

    Raises:
        TypeError: If losses aren't floating-point tensors.
        ValueError: If there's no term, or a term is a scalar or doesn't divide into B samples.

    Example:
        >>> per_sample(torch.tensor([[1.0, 3.0], [5.0, 7.0], [0.0, 0.0]]), batch_size=3)
        tensor([2., 6., 0.])
        >>> per_sample(torch.arange(6.0), batch_size=3)
        tensor([0.5000, 2.5000, 4.5000])
        >>> per_sample({"rec": torch.ones(3, 4, 4), "kl": torch.arange(3.0)}, batch_size=3)
        tensor([1., 2., 3.])
    """
    if not isinstance(losses, Mapping):
        return _reduced(losses, batch_size, "losses")
    if not losses:
        raise ValueError("the dictionary of losses is empty; expected at least one term")
    terms = [_reduced(term, batch_size, f"losses[{name!r}]") for name, term in losses.items()]
    return torch.stack(terms).sum(dim=0)


def _reduced(losses: Tensor, batch_size: int, name: str) -> Tensor:
    """Losses of shape (B,); ``name`` is what an error calls them."""
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"{name} is {kind}; expected a floating-point tensor, or a dictionary")
    shape = tuple(losses.shape)
    if losses.dim() == 0:
        raise ValueError(
            f"{name} is a scalar; expected (B,), one loss per sample: a mean over the batch "
            "can't be weighted. Take the losses with reduction='none', or leave the loop as it is "
            "and draw its samples with comet_meta.ConfidenceSampler"
        )
    if losses.numel() == 0:
        raise ValueError("the batch is empty: losses has no entries; skip empty batches")
    if len(losses) == batch_size:
        return losses if losses.dim() == 1 else losses.flatten(1).mean(dim=1)
    if losses.dim() == 1 and len(losses) % batch_size == 0:
        return losses.view(batch_size, -1).mean(dim=1)
    if losses.dim() == 2 and len(losses) == 2:
        raise ValueError(
            f"{name} has shape {shape} for {batch_size} samples. If the rows are losses of the "
            "samples taken as normal and taken as anomalous, pass the second by itself, "
            "anomalous=losses[1]. If they are terms, add them up; if the samples are columns, "
            "transpose"
        )
    raise ValueError(
        f"{name} has shape {shape}; expected the batch's {batch_size} samples first: (B,), "
        "(B, ...) or (B * P,) with the parts of a sample side by side"
    )
