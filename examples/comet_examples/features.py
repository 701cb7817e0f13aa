"""Patch features of a frozen backbone, computed once and kept."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from typing_extensions import override

from comet_examples.backbones import Backbone

_LOGGER = logging.getLogger(__name__)
_MAX_DIM = 1536


class PatchFeatures(nn.Module):
    """Neighbourhood-aggregated features of two levels, as in PatchCore and SimpleNet.

    Each position of a level is described by its 3 x 3 neighbourhood (C * 9 numbers), averaged
    down to ``dim``; the coarser level is resized to the finer grid; both are averaged down to
    ``dim`` together.

    Args:
        backbone: The frozen backbone.

    Attributes:
        dim: min(1536, sum of the levels' channels); 1536 for WRN50-2 as in the papers.
        fingerprint: The backbone's, and this aggregation's; part of the cache's key.

    Source: Roth et al.: Towards total recall in industrial anomaly detection, CVPR 2022; Liu et
    al.: SimpleNet, CVPR 2023.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.dim = min(_MAX_DIM, sum(backbone.channels))
        self.fingerprint = f"{backbone.fingerprint}-patch3-dim{self.dim}"

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Patch features.

        Args:
            images: RGB pictures with values in [0, 255], shape (B, 3, H, W).

        Returns:
            Features on the finer level's grid, shape (B, dim, h, w).
        """
        levels = [self._neighbourhoods(level) for level in self.backbone(images)]
        # Averaging channels commutes with resizing the grid; this way round it's far cheaper.
        grid = levels[0].shape[-2:]
        levels = [F.interpolate(x, size=grid, mode="bilinear") for x in levels]
        return self._pooled(torch.cat(levels, dim=1).flatten(2)).unflatten(2, grid)

    def _neighbourhoods(self, level: Tensor) -> Tensor:
        return self._pooled(F.unfold(level, 3, padding=1)).unflatten(2, level.shape[-2:])

    def _pooled(self, x: Tensor) -> Tensor:
        """(B, C, L) to (B, dim, L)."""
        return F.adaptive_avg_pool1d(x.transpose(1, 2), self.dim).transpose(1, 2)


class FeatureStore:
    """Keeps features by what they were computed from, so none is stale or computed twice.

    The key covers the extractor with its weights, the transform, and each file's path, size and
    time of change. Features that fit the budget are kept in memory for the life of the store,
    larger ones in a memory-mapped file that later runs use again.

    Args:
        directory: Where files go; by default ``comet-meta`` in the user's cache folder.
        memory_budget: Most bytes of features to keep in memory, over all requests.
    """

    def __init__(self, directory: Path | None = None, memory_budget: int = 4 * 2**30) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.directory = directory or cache / "comet-meta"
        self.memory_budget = memory_budget
        self._in_memory: dict[str, Tensor] = {}

    def get(
        self,
        extractor: PatchFeatures,
        paths: Sequence[Path],
        load: Callable[[Path], Tensor],
        *,
        transform_key: str,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> Tensor:
        """Features of some pictures.

        Args:
            extractor: Computes them.
            paths: The pictures' files.
            load: Reads one of them: file -> uint8 (3, H, W), of one size for all.
            transform_key: Names what ``load`` does to the picture.
            device: Where to compute.
            batch_size: Pictures at a time.
            num_workers: Processes that read pictures.

        Returns:
            Float32 features on the CPU, shape (N, dim, h, w), row i for ``paths[i]``. Treat them
            as read-only.

        Raises:
            ValueError: If there are no pictures, or they differ in size.
            OSError: If a file is missing.
        """
        if not paths:
            raise ValueError("there are no pictures to compute features of")
        key = _key(extractor, paths, transform_key)
        if key in self._in_memory:
            return self._in_memory[key]
        file = self.directory / f"{key}.npy"
        stored = _open(file)
        if stored is not None:
            _LOGGER.info("features of %d pictures: from %s", len(paths), file)
            return stored
        pictures: DataLoader[list[Tensor]] = DataLoader(
            _Pictures(paths, load), batch_size, num_workers=num_workers, collate_fn=list
        )
        batches = _extract(extractor.to(device).eval(), pictures, paths, device)
        first = next(batches)
        shape = (len(paths), *first.shape[1:])
        size = 4 * int(np.prod(shape))
        if size <= self.memory_budget - sum(x.nbytes for x in self._in_memory.values()):
            _LOGGER.info("features of %d pictures: %.0f MB in memory", len(paths), size / 1e6)
            features = torch.empty(shape)
            _fill(features, first, batches)
            self._in_memory[key] = features
            return features
        _LOGGER.info("features of %d pictures: %.0f MB in %s", len(paths), size / 1e6, file)
        self.directory.mkdir(parents=True, exist_ok=True)
        # Written aside and moved into place: a reader never sees a part, and of two writers of the
        # same features the later wins.
        partial = file.with_suffix(f".{uuid4().hex}.partial")
        try:
            mapped = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            _fill(torch.from_numpy(mapped), first, batches)
            mapped.flush()
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
        return torch.from_numpy(np.load(file, mmap_mode="c"))


class _Pictures(Dataset[Any]):
    def __init__(self, paths: Sequence[Path], load: Callable[[Path], Tensor]) -> None:
        self._paths = paths
        self._load = load

    def __len__(self) -> int:
        return len(self._paths)

    @override
    def __getitem__(self, index: int) -> Tensor:
        return self._load(self._paths[index])


def _extract(
    extractor: PatchFeatures,
    pictures: DataLoader[list[Tensor]],
    paths: Sequence[Path],
    device: torch.device | str,
) -> Iterator[Tensor]:
    """Features of each batch (b, dim, h, w), on the CPU."""
    done, shape = 0, None
    with tqdm(total=len(paths), desc="features", unit="picture", leave=False) as progress:
        for batch in pictures:
            shape = shape or batch[0].shape
            for offset, picture in enumerate(batch):
                if picture.shape != shape:
                    raise ValueError(
                        f"{paths[done + offset]} is {tuple(picture.shape)} after resizing, the "
                        f"pictures before it {tuple(shape)}; give a crop or a fixed (height, width)"
                    )
            yield extractor(torch.stack(batch).to(device)).cpu()
            done += len(batch)
            progress.update(len(batch))


def _fill(target: Tensor, first: Tensor, batches: Iterator[Tensor]) -> None:
    row = 0
    for batch in chain([first], batches):
        target[row : row + len(batch)] = batch
        row += len(batch)


def _open(file: Path) -> Tensor | None:
    """Stored features, mapped copy-on-write; None where there are none or they are damaged."""
    try:
        return torch.from_numpy(np.load(file, mmap_mode="c"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        _LOGGER.warning("%s is damaged (%s): computing its features again", file, error)
        return None


def _key(extractor: PatchFeatures, paths: Sequence[Path], transform_key: str) -> str:
    digest = hashlib.sha256(f"{extractor.fingerprint} {transform_key}".encode())
    for path in paths:
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]
