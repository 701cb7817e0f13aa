"""Gradients in and out of ``.grad``.

They add up there, as those of backward passes do: that takes no copy of them, neither in memory nor
in time. What ``.grad`` held before is set aside meanwhile.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from comet_meta.distributed import is_sharded

Gradients = list[Tensor]


class MetaGradient(NamedTuple):
    """The gradient of a batch and the losses on the way; of a meta-step, averaged over tasks.

    Attributes:
        gradients: One for each parameter, in its shape; None for a parameter that no loss used.
        support_loss: Objective of the support rows before the inner steps, shape ().
        query_loss: Objective of the query rows after them, shape ().
    """

    gradients: list[Tensor | None]
    support_loss: Tensor
    query_loss: Tensor


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of a loss, apart from what ``.grad`` holds.

    Other than those of ``torch.autograd.grad``, they can be added to in place: no two of them are
    one tensor, and none has a stride of 0.

    Args:
        loss: Shape ().
        parameters: Leaf tensors that require grad.

    Returns:
        One for each parameter; None for one that the loss doesn't use.
    """
    with empty_gradients(parameters):
        backward(loss, parameters)
        return [parameter.grad for parameter in parameters]


def backward(loss: Tensor, parameters: Sequence[Tensor]) -> None:
    """Add the gradients of a loss to ``.grad``, where possible of these parameters alone."""
    # FSDP2 computes with gathered copies; its hooks bring their gradients back to the shards.
    gathered = is_sharded(parameters[0])
    torch.autograd.backward(loss, inputs=None if gathered else list(parameters))


@torch.no_grad()
def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add to ``.grad``.

    Args:
        parameters: Leaf tensors.
        gradients: One for each, or None; they become ``.grad``, without a copy, where there's none.
    """
    held, more = [], []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            held.append(parameter.grad)
            more.append(gradient)
    if held:
        torch._foreach_add_(held, more)


@contextmanager
def empty_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Set ``.grad`` aside, and put it back on leaving."""
    held = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, held, strict=True):
            parameter.grad = gradient


def filled(found: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Gradients:
    """Gradients, 0 for what wasn't used."""
    if any(gradient is not None and gradient.is_sparse for gradient in found):
        raise TypeError(
            "a parameter has a sparse gradient, which inner steps can't take; use meta='none', or "
            "sparse=False in the embedding"
        )
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, found, strict=True)
    ]


def unscaled(gradients: Gradients, scale: Tensor) -> tuple[Gradients, Tensor]:
    """Gradients over ``scale``, and whether all are finite, shape (); 0 where not."""
    divided = torch._foreach_div(gradients, scale)
    finite = torch.stack(torch._foreach_norm(divided)).isfinite().all()
    return [gradient.masked_fill(~finite, 0) for gradient in divided], finite


def real(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Complex tensors as pairs of real ones, on the same memory; the others as they are."""
    return [torch.view_as_real(x) if x.is_complex() else x for x in tensors]
