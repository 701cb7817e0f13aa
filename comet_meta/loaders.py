"""DataLoaders made from other DataLoaders: one that notes its positions, one that scores."""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from comet_meta import distributed


class RecordingLoader:
    """Yields a DataLoader's own batches, each with the positions of its samples.

    The positions are noted where the batches are drawn, so data set, collation and workers stay
    what they are.

    Args:
        loader: A DataLoader over a map-style data set, which may be endless.

    Raises:
        TypeError: If it is something else, whose positions can't be known.

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
        batches = iter(self._loader)
        drawn = self._recorder.drawn
        for batch in batches:
            yield torch.tensor(drawn.popleft()), batch


class _Recorder(Sampler[list[int]]):
    """A batch sampler that notes what it draws, for each pass by itself."""

    def __init__(self, batches: Iterable[Sequence[int]]) -> None:
        self.batches = batches
        self.drawn: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        drawn = self.drawn = deque()
        return self._noted(drawn)

    def _noted(self, drawn: deque[list[int]]) -> Iterator[list[int]]:
        for batch in self.batches:
            drawn.append(list(batch))
            yield list(batch)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def with_batches(
    loader: DataLoader[Any], batches: Sampler[list[int]], **attributes: Any
) -> DataLoader[Any]:
    """A copy of a DataLoader that draws other batches; all else, subclass and workers, is kept.

    Args:
        loader: Makes batches; it stays as it is.
        batches: Lists of positions.
        **attributes: Further ones that differ, such as ``generator``.

    Returns:
        The copy, which shares the data set.
    """
    other = copy.copy(loader)
    # DataLoader refuses to have these set, because its sampler would no longer fit them.
    vars(other).update(batch_sampler=batches, _iterator=None, **attributes)
    return other


def scoring_loader(loader: DataLoader[Any]) -> RecordingLoader:
    """A loader that reaches every sample once, in order; each process its part.

    Args:
        loader: The training loader: whatever it shuffles or leaves out.

    Returns:
        Pairs of positions and batch, as large as the training loader's.
    """
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32
    rank, world = distributed.rank(), distributed.world_size()
    mine = range(rank, len(loader.dataset), world)  # type: ignore[arg-type]
    batches = BatchSampler(mine, size, drop_last=False)
    # Its own generator: worker seeds must not be drawn from the training loader's.
    return RecordingLoader(with_batches(loader, batches, generator=torch.Generator()))
