"""DataLoaders made from other DataLoaders: to record positions, and to score a whole set."""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from comet_meta import distributed


class RecordingLoader:
    """Yields a DataLoader's batches together with the positions of their samples.

    The positions are recorded in the batch sampler, so data set, collation and workers don't
    change.

    Args:
        loader: A DataLoader over a map-style data set; it may be endless.

    Raises:
        TypeError: If the positions can't be known, because it is another kind of loader.

    Example:
        >>> loader = DataLoader(torch.arange(4.0) * 10, batch_size=2)
        >>> [(index.tolist(), batch.tolist()) for index, batch in RecordingLoader(loader)]
        [([0, 1], [0.0, 10.0]), ([2, 3], [20.0, 30.0])]
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            kind = type(loader).__name__
            raise TypeError(
                f"the positions of what a {kind} yields aren't known; expected a DataLoader that "
                "makes batches of a map-style data set, or index=, a function from a batch to the "
                "positions of its samples"
            )
        if isinstance(loader.dataset, IterableDataset) or not getattr(loader, "in_order", True):
            raise TypeError(
                "an IterableDataset, or a loader with in_order=False, has no positions to note; "
                "pass index=, a function from a batch to the positions of its samples"
            )
        self._recorder = _Recorder(loader.batch_sampler)
        self._loader = with_batches(loader, self._recorder)
        self.dataset = loader.dataset

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        """Pairs of positions (B,), on the CPU, and batch."""
        earlier = self._recorder.drawn
        batches = iter(self._loader)
        drawn = self._recorder.drawn
        for batch in batches:
            if drawn is earlier:  # the loader's __iter__ is a generator, which has started only now
                drawn = self._recorder.drawn
            if self._loader.num_workers == 0:
                # A loader that resumes within an epoch draws batches that it doesn't yield.
                while len(drawn) > 1:
                    drawn.popleft()
            yield _positions(drawn.popleft()), batch
        if drawn:
            raise RuntimeError(
                f"the loader, a {type(self._loader).__name__}, left out {len(drawn)} of the "
                "batches that its sampler drew, so the positions of the others can't be known; use "
                "num_workers=0, or pass index=, a function from a batch to its samples' positions"
            )


def _positions(drawn: list[int]) -> Tensor:
    try:
        return torch.tensor(drawn)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"the sampler draws {drawn[0]!r} and the like; expected positions, integers from 0 on: "
            "for samples with keys, pass index=, a function from a batch to positions"
        ) from None


class _Recorder(Sampler[list[int]]):
    """A batch sampler that records the positions it draws, separately for each pass."""

    def __init__(self, batches: Iterable[Sequence[int]]) -> None:
        self.batches = batches
        self.drawn: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        drawn = self.drawn = deque()
        return self._record(drawn)

    def _record(self, drawn: deque[list[int]]) -> Iterator[list[int]]:
        for batch in self.batches:
            drawn.append(list(batch))
            yield list(batch)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def with_batches(
    loader: DataLoader[Any], batches: Sampler[list[int]], **attributes: Any
) -> DataLoader[Any]:
    """A copy of a DataLoader that draws other batches; everything else is kept.

    Args:
        loader: The DataLoader; it isn't changed.
        batches: A batch sampler: lists of positions.
        **attributes: Other attributes to change, such as ``generator``.

    Returns:
        The copy, which shares the data set.
    """
    other = copy.copy(loader)
    # DataLoader.__setattr__ refuses these, because its sampler would no longer fit.
    vars(other).update(batch_sampler=batches, _iterator=None, **attributes)
    return other


def scoring_loader(loader: DataLoader[Any]) -> RecordingLoader:
    """A loader that reads every sample once, in order; each process reads its part.

    Args:
        loader: The training loader. It may shuffle and drop samples.

    Returns:
        A loader of positions and batches, with the training loader's batch size.
    """
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32
    rank, world = distributed.rank(), distributed.world_size()
    mine = range(rank, len(loader.dataset), world)  # type: ignore[arg-type]
    batches = BatchSampler(mine, size, drop_last=False)
    # A new generator, so that worker seeds aren't drawn from the training loader's.
    return RecordingLoader(with_batches(loader, batches, generator=torch.Generator()))
