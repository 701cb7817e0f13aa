"""Compute gradients, add them up in ``.grad`` without copies, and tell whether they are finite."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from comet_meta.distributed import is_sharded

Gradients = list[Tensor]


class MetaGradient(NamedTuple):
    """The gradient of a batch with its support and query loss, averaged over tasks.

    Attributes:
        gradients: One per parameter, in its shape; None for a parameter that no loss used.
        support_loss: Objective of the support samples before the inner steps, shape ().
        query_loss: Objective of the query samples after the inner steps, shape ().
    """

    gradients: list[Tensor | None]
    support_loss: Tensor
    query_loss: Tensor


def compute_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of a loss; ``.grad`` stays as it is.

    Unlike the gradients of ``torch.autograd.grad``, these can be changed in place: no two of them
    share memory, and none has a stride of 0.

    Args:
        loss: Shape ().
        parameters: Leaf tensors that require grad.

    Returns:
        One gradient per parameter; None for a parameter that the loss doesn't use.
    """
    with set_gradients_aside(parameters):
        backward(loss, parameters)
        return [parameter.grad for parameter in parameters]


def backward(loss: Tensor, parameters: Sequence[Tensor]) -> None:
    """Add the gradients of a loss to ``.grad`` of these parameters."""
    # FSDP2 computes with gathered copies of the parameters; its hooks scatter their gradients.
    gathered = is_sharded(parameters[0])
    torch.autograd.backward(loss, inputs=None if gathered else list(parameters))


@torch.no_grad()
def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to ``.grad``.

    Args:
        parameters: Leaf tensors.
        gradients: One gradient per parameter, or None. Where there is no ``.grad``, the gradient
            becomes it, without a copy.
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
def set_gradients_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Remove ``.grad`` inside the body, and put it back on leaving."""
    held = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, held, strict=True):
            parameter.grad = gradient


def zeros_for_none(found: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Gradients:
    """Replace None, the gradient of an unused parameter, by zeros."""
    if any(gradient is not None and gradient.is_sparse for gradient in found):
        raise TypeError(
            "a parameter has a sparse gradient, which inner steps can't take; use meta='none', or "
            "sparse=False in the embedding"
        )
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, found, strict=True)
    ]


def unscale(gradients: Gradients, scale: Tensor) -> tuple[Gradients, Tensor]:
    """Divide gradients by ``scale``; zeros if one isn't finite. Also returns whether all are."""
    divided = torch._foreach_div(gradients, scale)
    finite = torch.stack(torch._foreach_norm(divided)).isfinite().all()
    return [gradient.masked_fill(~finite, 0) for gradient in divided], finite


def as_real(tensors: Sequence[Tensor]) -> list[Tensor]:
    """View complex tensors as pairs of real numbers, on the same memory; others unchanged."""
    return [torch.view_as_real(x) if x.is_complex() else x for x in tensors]


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor has an entry that is NaN or infinite; waits for their device.

    Args:
        tensors: Any shapes, floating-point or complex dtypes, also sparse or distributed (then the
            part on this process is checked).

    Example:
        >>> all_finite([torch.tensor([1e30])]), all_finite([torch.tensor([torch.nan])])
        (True, False)
    """
    parts = [_stored_values(tensor.detach()) for tensor in tensors]
    if not parts:
        return True
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(parts)])
    if bool(norms.isfinite().all()):
        return True
    # The squares in a norm can overflow although the entries are finite.
    return all(bool(part.isfinite().all()) for part in parts)


def _stored_values(tensor: Tensor) -> Tensor:
    """The values that this process holds of a sparse or distributed tensor."""
    if tensor.layout != torch.strided:
        return tensor.coalesce().values()
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
