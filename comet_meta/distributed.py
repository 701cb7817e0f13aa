"""The few collectives that the method needs; without a process group they do nothing."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes in the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average(tensor: Tensor) -> Tensor:
    """Mean of a tensor over all processes.

    Args:
        tensor: Of one shape on every process.

    Returns:
        The mean, the same on every process; the tensor itself without a process group.
    """
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace every ``.grad`` by its mean over all processes.

    The hooks of DistributedDataParallel don't fire under ``torch.autograd.grad``, with which
    meta-gradients are computed.

    Args:
        parameters: The same on every process. One that has no gradient on any of them keeps none.
    """
    if world_size() == 1:
        return
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    used = used.to(parameters[0].device)
    dist.all_reduce(used)
    for parameter, count in zip(parameters, used.tolist(), strict=True):
        if not count:
            continue
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)
        parameter.grad = gradient.div_(world_size())


def merge_by_index(values: Tensor) -> Tensor:
    """Fill each process's gaps with the values that the others have.

    Args:
        values: One for each sample, shape (N,), NaN where this process has none.

    Returns:
        The values (N,), the same on every process; the mean where several had one.
    """
    if world_size() == 1:
        return values
    known = ~values.isnan()
    both = torch.stack([torch.where(known, values, 0.0), known.to(values.dtype)])
    dist.all_reduce(both)
    total, count = both
    return torch.where(count > 0, total / count, torch.nan)
