"""Cutting a batch into tasks of support and query rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from comet_meta import distributed


class Task(NamedTuple):
    """Disjoint rows of one batch.

    Attributes:
        support: Rows that the inner steps learn from, shape (S,), S >= 1.
        query: Rows that judge the adapted parameters, shape (Q,), Q >= 1.
    """

    support: Tensor
    query: Tensor


def split_tasks(
    batch_size: int,
    tasks: int,
    query_fraction: float,
    generator: torch.Generator | None = None,
) -> list[Task]:
    """Deal the rows of a batch into tasks and cut each into support and query.

    Args:
        batch_size: Number of rows B >= 2.
        tasks: Number of tasks >= 1; a batch of fewer than two rows a task is dealt into fewer.
        query_fraction: Share of a task's rows that goes to the query, in (0, 1); both parts get at
            least one row.
        generator: Source of the random order.

    Returns:
        The tasks. Every row is in exactly one part of one task.

    Raises:
        ValueError: If there are fewer than two rows.

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
    dealt = []
    for rows in order.tensor_split(min(tasks, batch_size // 2)):
        queries = min(max(round(query_fraction * len(rows)), 1), len(rows) - 1)
        dealt.append(Task(support=rows[queries:], query=rows[:queries]))
    return dealt


def splits(batch_size: int) -> bool:
    """Whether a batch, joined over all processes, has rows for support and query.

    Args:
        batch_size: Number of rows of this process.
    """
    return batch_size > 1 or distributed.world_size() > 1


def support_query(losses: Tensor, query_fraction: float, generator: torch.Generator) -> Tensor:
    """Mean loss of a random support and query part.

    Args:
        losses: Shape (B,).
        query_fraction: Share of the rows that goes to the query, in (0, 1).
        generator: Source of the random order, in the same state on every process.

    Returns:
        The two means, shape (2,); twice the loss if there's only one.
    """
    generator = distributed.own_generator(generator)
    if len(losses) == 1:
        return losses.expand(2)
    ((support, query),) = split_tasks(len(losses), 1, query_fraction, generator)
    return torch.stack([losses[support].mean(), losses[query].mean()])
