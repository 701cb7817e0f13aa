"""Loaders and batches, as the Lightning and the anomalib callback need them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader


def training_loader(trainer: Any) -> DataLoader[Any]:
    """The trainer's one training loader.

    Raises:
        TypeError: If the training data comes from something else.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"the training data comes from a {type(loader).__name__}; expected one DataLoader"
        )
    return loader


def take_rows(batch: Any, rows: Tensor, size: int) -> Any:
    """Some rows of a batch: of all tensors and lists in it that have one entry for each sample."""
    if isinstance(batch, Tensor):
        return batch[rows.to(batch.device)] if batch.dim() and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {name: take_rows(value, rows, size) for name, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **take_rows(fields, rows, size))
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        if len(batch) == size and not any(isinstance(part, Tensor) for part in batch):
            return [batch[row] for row in rows.tolist()]
        parts = [take_rows(part, rows, size) for part in batch]
        return tuple(parts) if isinstance(batch, tuple) else parts
    return batch
