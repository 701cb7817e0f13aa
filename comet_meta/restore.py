"""Values of tensors set aside and brought back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Give the tensors their values back on leaving, also by an exception.

    Args:
        tensors: Tensors that the body changes in place.

    Yields:
        Copies of the values on entry.
    """
    saved = copies(tensors)
    try:
        yield saved
    finally:
        copy_values(tensors, saved)


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of some tensors, without a graph."""
    new = [torch.empty_like(tensor, requires_grad=False) for tensor in tensors]
    copy_values(new, tensors)
    return new


@torch.no_grad()
def copy_values(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Give each target the values of its source, in place."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
        # Inside autocast, torch keeps low-precision copies of the weights: they are stale now.
        torch.clear_autocast_cache()
