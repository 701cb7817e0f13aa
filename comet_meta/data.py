"""Helpers for loaders: positions of the samples in a batch, and scores of a whole data set."""

import logging
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from comet_meta import distributed
from comet_meta.arrays import as_tensor

T = TypeVar("T")
_LOGGER = logging.getLogger(__name__)


def as_index(index: Tensor | Sequence[int], num_samples: int | None = None) -> Tensor:
    """Check sample indices and return them as a tensor.

    Args:
        index: Positions of the samples in the data set, shape (B,), integers in [0, num_samples).
        num_samples: Size of the data set, or None if it isn't known. The range is checked only on
            the CPU, because elsewhere the check would wait for the device.

    Returns:
        The indices (B,) as int64, on the device they came on.

    Raises:
        TypeError: If the index isn't made of integers.
        ValueError: If it isn't one-dimensional or is empty.
        IndexError: If a position lies outside the data set.
    """
    try:
        index = as_tensor(index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"index is a {type(index).__name__} that is no list of integers; expected data-set "
            "positions, for instance those that comet_meta.IndexedDataset yields"
        ) from error
    if index.dim() != 1:
        raise ValueError(
            f"index has shape {tuple(index.shape)}; expected (B,), one data-set position per sample"
        )
    if index.numel() == 0:
        raise ValueError("the batch is empty: index has no entries; skip empty batches")
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise TypeError(
            f"index has dtype {index.dtype}; expected integer data-set positions, "
            "for instance those that comet_meta.IndexedDataset yields"
        )
    index = index.to(torch.int64)  # first, because torch compares no unsigned integers
    if num_samples is not None and index.device.type == "cpu":
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= num_samples:
            outside = low if low < 0 else high
            raise IndexError(
                f"index {outside} is out of range for {num_samples} samples; "
                "expected positions in the data set that num_samples counts"
            )
    return index


def as_batch_index(
    index: Tensor | Sequence[int] | None, batch_size: int, num_samples: int | None, *, needed: bool
) -> Tensor | None:
    """Check the indices of a batch of losses and return them as a tensor.

    Args:
        index: Positions of the samples in the data set, shape (B,); None where not given.
        batch_size: Number of losses B.
        num_samples: Size of the data set, or None if it isn't known.
        needed: Whether weights are looked up by the index.

    Returns:
        The indices (B,), or None.

    Raises:
        TypeError: As for :func:`as_index`.
        ValueError: If the index is needed and missing, or there isn't one for each loss.
        IndexError: If a position lies outside the data set.
    """
    if index is None:
        if needed:
            raise ValueError(
                "weights belong to samples: pass objective(losses, index) the samples' "
                "positions in the data set; comet_meta.IndexedDataset adds them to a loader"
            )
        return None
    index = as_index(index, num_samples)
    if len(index) != batch_size:
        raise ValueError(
            f"got {batch_size} losses and {len(index)} indices; expected one each. Losses of "
            "shape (2, B) are a pair, as normal and as anomalous; of parts, take "
            "comet_meta.per_sample(losses, batch_size)"
        )
    return index


class IndexedDataset(Dataset[tuple[int, T]], Generic[T]):
    """A data set that adds its position to each item.

    Every batch of a DataLoader over it, shuffled or not, is ``(index, item)``, so that weights can
    be looked up by sample. Other attributes are the data set's own.

    Index the whole, not its parts: in a ``ConcatDataset`` of two of these the positions of the
    parts collide, in a ``Subset`` they are not its own. What knows the data set refuses both
    (:func:`collect_scores`, :class:`~comet_meta.CoMet`, the integrations); so does
    ``weighter.identify(dataset)``, one line before a loop that uses none of them. A loop of
    ``objective`` and ``fit`` alone can't notice.

    What takes the first part of a batch, as ``torch.optim.swa_utils.update_bn`` does, takes the
    positions: hand it ``(batch for _, batch in loader)``.

    Args:
        dataset: A map-style data set (with ``__len__`` and ``__getitem__``).

    Raises:
        TypeError: If the data set has no length or is an IterableDataset.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> pictures = IndexedDataset(torch.arange(6.0) * 10)
        >>> for index, batch in DataLoader(pictures, batch_size=3):
        ...     print(index.tolist(), batch.tolist())
        [0, 1, 2] [0.0, 10.0, 20.0]
        [3, 4, 5] [30.0, 40.0, 50.0]
    """

    def __init__(self, dataset: Dataset[T]) -> None:
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            raise TypeError(
                f"{type(dataset).__name__} has no positions to index; expected a map-style data "
                "set with __len__ and __getitem__"
            )
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        """The data set's attributes, except those with which loaders bypass ``__getitem__``."""
        if name.startswith("__") or name == "dataset":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __add__(self, other: Any) -> "IndexedDataset[Any]":  # type: ignore[override]
        """Both data sets as one, with the positions of the whole."""
        if not isinstance(other, IndexedDataset):
            raise TypeError(
                "only one of the two data sets has positions; join them first and index the "
                "whole: IndexedDataset(first + second)"
            )
        return IndexedDataset(ConcatDataset([self.dataset, other.dataset]))

    def __getitem__(self, index: int) -> tuple[int, T]:
        """The position and the item at it."""
        return index, self.dataset[index]


def check_positions(dataset: Any) -> None:
    """Check that positions in a data set are those that its items carry.

    Args:
        dataset: Any data set.

    Raises:
        TypeError: If parts of it carry positions of their own, so that those of two samples
            collide or none is that of the whole.
    """
    inner = [dataset]
    while inner:
        current = inner.pop()
        if isinstance(current, ConcatDataset):
            parts = list(current.datasets)
            advice = "IndexedDataset(ConcatDataset([first, second]))"
        elif isinstance(current, Subset):
            parts = [current.dataset]
            advice = "IndexedDataset(Subset(data_set, indices))"
        else:
            continue
        if any(isinstance(part, IndexedDataset) for part in parts):
            raise TypeError(
                f"a {type(current).__name__} of an IndexedDataset has the positions of its parts, "
                f"which are not those of its own samples; index the whole instead: {advice}"
            )
        inner += parts


@torch.no_grad()
def collect_scores(
    score_fn: Callable[[Any], Tensor], loader: Iterable[tuple[Tensor, Any]]
) -> Tensor:
    """Anomaly scores of a whole data set, by sample.

    Set the model to eval mode first. With several processes, each scores the part that its loader
    yields, and all of them get all scores. A sample whose score is NaN or infinite gets the highest
    finite score, and a warning (logging) names it.

    Args:
        score_fn: Scores of a batch: batch without its index -> (B,).
        loader: Yields ``(index, batch)`` in any order, for instance a DataLoader over an
            :class:`IndexedDataset`. It must yield every sample.

    Returns:
        Scores on the CPU, float32, finite, shape (N,), sample i at position i.

    Raises:
        TypeError: If the loader has no data set with a length, or ``score_fn`` returns no numbers.
        ValueError: If ``score_fn`` doesn't return one score per sample, samples were left out, or
            no score is finite.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(IndexedDataset(torch.tensor([3.0, 1.0, 2.0])), shuffle=True)
        >>> collect_scores(lambda batch: -batch, loader)
        tensor([-3., -1., -2.])
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, Sized):
        raise TypeError(
            "the loader has no data set of known length; expected a DataLoader over "
            "comet_meta.IndexedDataset"
        )
    check_positions(dataset)
    scores = torch.full((len(dataset),), torch.nan)
    for index, batch in loader:
        positions = as_index(index, len(scores)).cpu()
        found = _scores_of(score_fn(batch))
        if found.shape != positions.shape:
            raise ValueError(
                f"score_fn returned shape {tuple(found.shape)} for {len(positions)} samples; "
                "expected (B,), one anomaly score per sample"
            )
        found = found.detach().to("cpu", torch.float32)
        scores[positions] = torch.where(found.isfinite(), found, torch.inf)  # NaN: no score yet
    scores = distributed.merge_by_index(scores)
    missing = scores.isnan().nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(scores)} samples have no score (first: {missing[:5]}): the "
            "loader left them out; use drop_last=False and a sampler that reaches all of them"
        )
    return finite_scores(scores)


def _scores_of(returned: Any) -> Tensor:
    try:
        found = as_tensor(returned)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.is_complex():
        kind = type(returned).__name__ if found is None else found.dtype
        raise TypeError(f"score_fn returned {kind}; expected (B,), one anomaly score per sample")
    return found


def finite_scores(scores: Tensor) -> Tensor:
    """Replace scores that are NaN or infinite by the highest finite score; a warning names them.

    Args:
        scores: Shape (N,).

    Returns:
        Finite scores, shape (N,).

    Raises:
        ValueError: If no score is finite.
    """
    finite = scores.isfinite()
    if finite.all():
        return scores
    bad = (~finite).nonzero().flatten().tolist()
    if not finite.any():
        raise ValueError(
            "no sample's score is finite: the model's parameters are NaN or infinite, or its batch "
            "norm's running statistics; go back to the last checkpoint"
        )
    _LOGGER.warning(
        "scores of %d of %d samples are NaN or infinite and set to the highest: samples %s",
        len(bad),
        len(scores),
        bad[:8],
    )
    return torch.where(finite, scores, scores[finite].max())
