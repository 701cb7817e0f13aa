"""Per-sample losses: reduce, check and weigh them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Closure = Callable[[Tensor], Tensor]
"""Losses of some rows of the batch: rows (R,) -> losses (R,), or pairs (2, R)."""


def per_sample(losses: Tensor | Mapping[str, Tensor], batch_size: int) -> Tensor:
    """Reduce losses to one per sample.

    The losses of a sample's parts (patches, pixels) are averaged. The terms of a dictionary are
    summed.

    Args:
        losses: Losses with one of these shapes: (B,); (B, ...), as for patches (B, P) or pixels
            (B, H, W); (B * P,), with the patches of a sample side by side, as
            ``features.flatten(0, 1)`` leaves them. Or a dictionary of terms with such shapes.
        batch_size: Number of samples B.

    Returns:
        Losses of shape (B,), with their graph.

    Raises:
        TypeError: If losses aren't floating-point tensors.
        ValueError: If the dictionary is empty, or a term is a scalar or doesn't divide into B
            samples.

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


def check_losses(losses: Tensor, size: int | None = None) -> None:
    """Check that there is one loss per sample, or a pair per sample.

    Args:
        losses: Per-sample losses, shape (B,), or pairs (2, B): the samples taken as normal, and
            taken as anomalous.
        size: Number of samples in the batch, where known.

    Raises:
        TypeError: If losses aren't a floating-point tensor.
        ValueError: If they have another shape, are empty, or B differs from ``size``.
    """
    _check_floats(losses, "losses", "of shape (B,)")
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


def finite_mask(losses: Tensor) -> Tensor:
    """Mask of the samples whose losses, (B,) or (2, B), are finite, bool, shape (B,)."""
    finite = torch.isfinite(losses)
    return finite if losses.dim() == 1 else finite.all(dim=0)


def weigh_losses(losses: Tensor, weights: Tensor) -> Tensor:
    """Multiply losses by their weights, sample by sample.

    Args:
        losses: L_i of the samples, shape (R,); or pairs (2, R) of L_i and A_i: the samples taken as
            normal, and taken as anomalous.
        weights: Weights of L_i in the first row and of A_i in the second, shape (2, R).

    Returns:
        w_i L_i, or w_i L_i + a_i A_i for pairs, shape (R,).

    Example:
        >>> weights = torch.tensor([[1.0, 0.5], [0.0, 0.1]])
        >>> weigh_losses(torch.tensor([2.0, 4.0]), weights)
        tensor([2., 2.])
        >>> weigh_losses(torch.tensor([[2.0, 4.0], [3.0, 3.0]]), weights)
        tensor([2.0000, 2.3000])

    Source: w_i L_i is soft confident learning. a_i A_i is outlier exposure (Hendrycks, Mazeika,
    Dietterich, ICLR 2019), here for the samples whose scores say that they are bad, as in Qiu, Li,
    Kloft, Rudolph, Mandt: Latent outlier exposure, ICML 2022.
    """
    if losses.dim() == 1:
        return weights[0].to(losses) * losses
    return (weights.to(losses) * losses).sum(dim=0)


def _reduced(losses: Tensor, batch_size: int, name: str) -> Tensor:
    """Losses of shape (B,). ``name`` is their name in errors."""
    _check_floats(losses, name, "or a dictionary of them")
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


def _check_floats(losses: object, name: str, expected: str) -> None:
    if isinstance(losses, Tensor):
        if not losses.is_floating_point():
            kind = losses.dtype
            raise TypeError(f"{name} is {kind}; expected a floating-point tensor {expected}")
        return
    raise TypeError(
        f"{name} is {type(losses).__name__}; expected a floating-point tensor {expected}. Arrays, "
        "lists and numbers carry no gradient; torch.stack makes a tensor of a list of tensors"
    )
