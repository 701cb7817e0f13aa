"""Communication between processes; without a process group nothing is sent.

Every function that sends uses the default group, and all its processes must call it.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET_BYTES = 25 * 2**20


def world_size() -> int:
    """Number of processes in the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the default group; 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor (a DTensor, as FSDP2 makes them)."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, on the same memory; other tensors unchanged."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def shard_like(part: Tensor, tensor: Tensor) -> Tensor:
    """The inverse of :func:`local_part`: make a part a tensor sharded like another one."""
    if not is_sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    whole = cast("DTensor", tensor)
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, shape=whole.shape, stride=whole.stride()
    )


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements of some tensors, plain or sharded; differentiable.

    Args:
        tensors: Tensors of any shapes on one device; the sharded ones on one mesh.

    Returns:
        The sum, shape (), the same on every process.
    """
    # Squares rather than norms: a norm has no second derivative at 0, which MAML would need.
    plain = [tensor.square().sum() for tensor in tensors if not is_sharded(tensor)]
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    if sharded:
        from torch.distributed.tensor import DTensor, Partial, Replicate

        first = cast("DTensor", sharded[0])
        placements = [Partial() if p.is_shard() else Replicate() for p in first.placements]
        part = torch.stack([local_part(tensor).square().sum() for tensor in sharded]).sum()
        plain.append(DTensor.from_local(part, first.device_mesh, placements).full_tensor())
    return torch.stack(plain).sum()


def seed_of_first_process(seed: int) -> int:
    """Send the first process's seed to every process."""
    if world_size() == 1:
        return seed
    seeds = [seed]
    dist.broadcast_object_list(seeds, src=0)
    return seeds[0]


def process_generator(shared: torch.Generator) -> torch.Generator:
    """A generator for this process alone, seeded from one that is equal on all processes.

    The shared generator advances by one draw, however many numbers a process draws from its own.
    So the shared state stays equal on all processes, and one process can save it for all.

    Args:
        shared: A generator in the same state on every process.

    Returns:
        A generator that differs by process; ``shared`` itself without a process group.
    """
    if world_size() == 1:
        return shared
    seed = int(torch.randint(2**62, (), generator=shared))
    return torch.Generator().manual_seed(seed + rank())


def batch_size_ratio(batch_size: Tensor | int, device: torch.device) -> Tensor | float:
    """This process's batch size over the mean batch size of all processes.

    Frameworks average gradients over processes. If the batches differ in size, each process
    multiplies its mean loss by this ratio: the average over processes then is the mean over all
    samples.

    Args:
        batch_size: Number of samples of this process, >= 0, shape ().
        device: The device of the result.

    Returns:
        The ratio, shape (); 1 without a process group.
    """
    if world_size() == 1:
        return 1.0
    total = torch.as_tensor(batch_size, dtype=torch.float32, device=device).clone()
    dist.all_reduce(total)
    return batch_size * world_size() / total.clamp_min(1)


def average(tensor: Tensor) -> Tensor:
    """Mean of a tensor over all processes.

    Args:
        tensor: A tensor of the same shape on every process.

    Returns:
        The mean, the same on every process; the tensor itself without a process group.
    """
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def all_agree(flag: bool, device: torch.device) -> bool:
    """Whether a flag is true on every process, so that all processes decide alike.

    Args:
        flag: This process's flag.
        device: The device that messages between the processes use.
    """
    if world_size() == 1:
        return flag
    return bool(average(torch.tensor(float(flag), device=device)) == 1)


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor], ratio: Tensor | float = 1.0) -> None:
    """Replace every ``.grad`` by its mean over all processes.

    Needed for meta-gradients, where the hooks of DistributedDataParallel don't run.

    Args:
        parameters: The same parameters on every process. A parameter without a gradient on all
            processes keeps none. Sharded parameters are left alone: FSDP2 averages their gradients.
        ratio: :func:`batch_size_ratio` of this process.
    """
    parameters = [parameter for parameter in parameters if not is_sharded(parameter)]
    if world_size() == 1 or not parameters:
        return
    missing = [parameter.grad is None for parameter in parameters]
    used = torch.tensor([not gone for gone in missing], dtype=torch.int32)
    used = used.to(parameters[0].device)
    dist.all_reduce(used)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    torch._foreach_mul_(gradients, ratio / world_size())
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        shaped = [part.view_as(gradient) for part, gradient in zip(parts, bucket, strict=True)]
        torch._foreach_copy_(bucket, shaped)
    if any(missing):  # reading `used` waits for the device
        found = zip(parameters, gradients, used.tolist(), strict=True)
        for parameter, gradient, count in found:
            parameter.grad = gradient if count else None


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors by dtype and device, in buckets of about 25 MB."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for kind in kinds.values():
        bucket: list[Tensor] = []
        filled = 0
        for tensor in kind:
            if bucket and filled + tensor.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, filled = [], 0
            bucket.append(tensor)
            filled += tensor.nbytes
        yield bucket


def merge_by_index(values: Tensor) -> Tensor:
    """Fill each process's missing values with those of the other processes.

    Args:
        values: One value per sample, shape (N,), NaN where this process has none.

    Returns:
        The values (N,), the same on every process; the mean where several had one.
    """
    if world_size() == 1:
        return values
    known = ~values.isnan()
    both = torch.stack([torch.where(known, values, 0.0), known.to(values.dtype)])
    both = both.to(_wire(values.device))
    dist.all_reduce(both)
    total, count = both.to(values.device)
    return torch.where(count > 0, total / count, torch.nan)


def gather_batches(index: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Join the batches of all processes.

    Args:
        index: Positions of this process's samples in the data set, int64, shape (B,); B may
            differ by process.
        scores: Scores of these samples, shape (B,).

    Returns:
        Positions and scores of the joined batch, the same on every process.
    """
    if world_size() == 1:
        return index, scores
    # Positions up to 2^53 and single-precision scores are exact in double precision.
    batch = torch.stack([index.double().to(scores.device), scores.detach().double()])
    batch = batch.to(_wire(scores.device))
    sizes = [torch.zeros((), dtype=torch.int64, device=batch.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.full_like(sizes[0], len(index)))
    counts = [int(size) for size in sizes]
    padded = torch.nn.functional.pad(batch, (0, max(counts) - len(index)))
    batches = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(batches, padded)
    joined = torch.cat([part[:, :size] for part, size in zip(batches, counts, strict=True)], dim=1)
    positions, values = joined.to(scores.device)
    return positions.to(index), values.to(scores.dtype)


def _wire(device: torch.device) -> torch.device:
    """The device from which a tensor can be sent: NCCL can't send from the CPU."""
    return torch.device("cuda") if dist.get_backend() == "nccl" else device
