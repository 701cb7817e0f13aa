"""Split a batch into tasks, and each task into support and query."""

from typing import NamedTuple

import torch
from torch import Tensor

from comet_meta import distributed


class Task(NamedTuple):
    """Two disjoint sets of rows of one batch.

    Attributes:
        support: Rows of the samples for the inner steps, shape (S,), S >= 1.
        query: Rows of the samples for the loss after the inner steps, shape (Q,), Q >= 1.
    """

    support: Tensor
    query: Tensor


def split_tasks(
    batch_size: int,
    tasks: int,
    query_fraction: float,
    generator: torch.Generator | None = None,
) -> list[Task]:
    """Split the rows of a batch at random into tasks with support and query.

    Args:
        batch_size: Number of samples B >= 2.
        tasks: Number of tasks >= 1; fewer if there would be fewer than two samples per task.
        query_fraction: Fraction of a task's samples in its query, in (0, 1). Support and query get
            at least one sample each.
        generator: Source of the random order.

    Returns:
        The tasks. Every row is in exactly one part of one task.

    Raises:
        ValueError: If there are fewer than two samples.

    Example:
        >>> [(len(task.support), len(task.query)) for task in split_tasks(10, 2, 0.3)]
        [(3, 2), (3, 2)]
    """
    if batch_size < 2:
        raise ValueError(
            "a batch of one sample can't be split into support and query: use drop_last=True in "
            "the DataLoader, a larger batch, or meta='none'"
        )
    order = torch.randperm(batch_size, generator=generator)
    split = []
    for rows in order.tensor_split(min(tasks, batch_size // 2)):
        queries = min(max(round(query_fraction * len(rows)), 1), len(rows) - 1)
        split.append(Task(support=rows[queries:], query=rows[:queries]))
    return split


def can_split(batch_size: int) -> bool:
    """Whether the batch, joined over all processes, has samples for support and query.

    Args:
        batch_size: Number of samples of this process.
    """
    return batch_size > 1 or distributed.world_size() > 1


def support_query_losses(
    losses: Tensor, query_fraction: float, generator: torch.Generator
) -> Tensor:
    """Mean losses of a random support and query.

    Args:
        losses: Per-sample losses, shape (B,).
        query_fraction: Fraction of the samples in the query, in (0, 1).
        generator: Source of the random order, in the same state on every process.

    Returns:
        Support and query loss, shape (2,); the same loss twice if B is 1.
    """
    generator = distributed.process_generator(generator)
    if len(losses) == 1:
        return losses.expand(2)
    ((support, query),) = split_tasks(len(losses), 1, query_fraction, generator)
    return torch.stack([losses[support].mean(), losses[query].mean()])
