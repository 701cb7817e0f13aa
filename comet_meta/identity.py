"""Which samples a data set holds: an identity that can be saved beside their weights."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

_NAMES = ("samples", "imgs", "image_paths", "paths", "files", "filenames", "file_names", "names")
_NAME_COLUMNS = ("image_path", "path", "file", "name")
_TABLES = ("data", "X", "x", "features")
_VALUES = 4096


def sample_identity(dataset: Any) -> str:
    """A short text that differs where data sets hold other samples, or the same in other order.

    It comes from the names of the files where the data set lists them, below the folder that holds
    them all, so a folder may move. For tensors and arrays it comes from up to 4096 of their values,
    for other data sets from the number of samples alone. No sample is read.

    Args:
        dataset: A data set with a length. ``Subset``, ``ConcatDataset`` and wrappers with an
            attribute ``dataset`` are looked into.

    Returns:
        The number of samples and a hash.

    Example:
        >>> first, second = sample_identity(["a.png", "b.png"]), sample_identity(["a.png", "c.png"])
        >>> first.split(":")[0], first == second
        ('2 samples', False)
    """
    digest = hashlib.sha256()
    for part in _parts(dataset):
        digest.update(part)
        digest.update(b"\0")
    return f"{len(dataset)} samples:{digest.hexdigest()[:32]}"


def _parts(dataset: Any) -> Iterator[bytes]:
    """What tells the samples apart."""
    if isinstance(dataset, Subset):
        yield np.asarray(dataset.indices, dtype=np.int64).tobytes()
        yield from _parts(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _parts(part)
    elif isinstance(dataset, TensorDataset):
        for tensor in dataset.tensors:
            yield _some_values(tensor)
    elif isinstance(dataset, (Tensor, np.ndarray)):
        yield _some_values(torch.as_tensor(dataset))
    else:
        names, values = _names(dataset), _values(dataset)
        inner = getattr(dataset, "dataset", None)
        if names is not None:
            yield from names
        elif values is not None:
            yield _some_values(values)
        elif isinstance(inner, Sized) and inner is not dataset:
            yield from _parts(inner)
        yield str(len(dataset)).encode()


def _values(dataset: Any) -> Tensor | None:
    """The table of a data set that is one, as those of torchvision and skorch."""
    for name in _TABLES:
        table = getattr(dataset, name, None)
        if isinstance(table, np.ndarray) and table.dtype.kind in "biuf":
            table = torch.as_tensor(table)
        if isinstance(table, Tensor) and table.dim() and len(table) == len(dataset):
            return table
    return None


def _some_values(tensor: Tensor) -> bytes:
    """Shape and some values of a tensor, spread evenly."""
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), _VALUES)).long()
    values: list[Any] = flat[places.to(flat.device)].tolist()
    return repr((tuple(tensor.shape), values)).encode()


def _names(dataset: Any) -> list[bytes] | None:
    """The samples' names below the folder that holds them all; None where there are none."""
    listed: list[Any] = [dataset] if isinstance(dataset, (list, tuple)) else []
    listed += [getattr(dataset, name, None) for name in _NAMES]
    for names in listed:
        texts = _texts(names, len(dataset))
        if texts is not None:
            return _below_common_folder(texts)
    return None


def _texts(names: Any, count: int) -> list[str] | None:
    """Names from a list of them, of tuples that begin with them, or from a table's column."""
    for column in _NAME_COLUMNS:
        if column in getattr(names, "columns", ()):
            names = list(names[column])
    if isinstance(names, (str, bytes)) or not isinstance(names, (Sequence, np.ndarray)):
        return None
    firsts = [each[0] if isinstance(each, tuple) and each else each for each in names]
    if len(firsts) != count or not all(isinstance(each, (str, PurePath)) for each in firsts):
        return None
    return [unicodedata.normalize("NFC", str(each)).replace(os.sep, "/") for each in firsts]


def _below_common_folder(names: Iterable[str]) -> list[bytes]:
    split = [name.split("/") for name in names]
    first, last = min(split), max(split)
    shared = 0
    while shared < min(len(first), len(last)) - 1 and first[shared] == last[shared]:
        shared += 1
    return ["/".join(parts[shared:]).encode("utf-8", "surrogateescape") for parts in split]
