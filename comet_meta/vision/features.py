"""Features of a frozen backbone, computed once and kept."""

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

from comet_meta.vision.backbones import Backbone

_LOGGER = logging.getLogger(__name__)
_MAX_DIM = 1536
_LARGEST_HALF = torch.finfo(torch.float16).max


class FeatureExtractor(nn.Module):
    """Frozen features of pictures, as levels (B, C, h, w), finest first.

    Args:
        backbone: The frozen backbone.
        channels: Number of each level's channels.
        kind: Names what is made of the backbone's levels.

    Attributes:
        channels: Number of each level's channels.
        fingerprint: Names backbone, weights and kind; part of the cache's key.
    """

    def __init__(self, backbone: Backbone, channels: Sequence[int], kind: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = list(channels)
        self.fingerprint = f"{backbone.fingerprint}-{kind}"


class PyramidFeatures(FeatureExtractor):
    """The backbone's levels as they are.

    Args:
        backbone: The frozen backbone.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, backbone.channels, "pyramid")

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """The levels.

        Args:
            images: RGB pictures with values in [0, 255], shape (B, 3, H, W).

        Returns:
            Levels (B, C, h, w), finest first.
        """
        levels: list[Tensor] = self.backbone(images)
        return levels


def patch_features(levels: Sequence[Tensor]) -> Tensor:
    """Neighbourhood-aggregated features, as in PatchCore and SimpleNet.

    Each position of a level is described by its 3 x 3 neighbourhood (C * 9 numbers), averaged
    down to ``dim``; the coarser level is resized to the finer grid; both are averaged down to
    ``dim`` together.

    Args:
        levels: Features of a backbone, (B, C, h, w), finest first.

    Returns:
        Features on the finest level's grid, shape (B, dim, h, w), where dim = min(1536, sum of the
        levels' channels): 1536 for WRN50-2, as in the papers.

    Source: Roth et al.: Towards total recall in industrial anomaly detection, CVPR 2022; Liu et
    al.: SimpleNet, CVPR 2023.
    """
    dim = _patch_dim([level.shape[1] for level in levels])
    grid = levels[0].shape[-2:]
    described = [
        _pooled(F.unfold(level, 3, padding=1), dim).unflatten(2, level.shape[-2:])
        for level in levels
    ]
    # Averaging channels commutes with resizing the grid; this way round it's far cheaper.
    resized = [F.interpolate(x, size=grid, mode="bilinear") for x in described]
    return _pooled(torch.cat(resized, dim=1).flatten(2), dim).unflatten(2, grid)


def _patch_dim(channels: Sequence[int]) -> int:
    return min(_MAX_DIM, sum(channels))


def _pooled(x: Tensor, dim: int) -> Tensor:
    """(B, C, L) to (B, dim, L)."""
    return F.adaptive_avg_pool1d(x.transpose(1, 2), dim).transpose(1, 2)


class PatchFeatures(FeatureExtractor):
    """The backbone's levels as one level of patch features: :func:`patch_features`.

    Args:
        backbone: The frozen backbone.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.dim = _patch_dim(backbone.channels)
        super().__init__(backbone, [self.dim], f"patch3-dim{self.dim}")

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Patch features.

        Args:
            images: RGB pictures with values in [0, 255], shape (B, 3, H, W).

        Returns:
            One level, on the finer level's grid, shape (B, dim, h, w).
        """
        return [patch_features(self.backbone(images))]


class FeatureStore:
    """Keeps features by what they were computed from, so none is stale or computed twice.

    The key covers the extractor with its weights, the transform, and each file's path, size and
    time of change. Features that fit the budget are kept in memory for the life of the store,
    larger ones in a memory-mapped file that later runs use again. Several processes may share the
    folder.

    Args:
        directory: Where files go; by default ``comet-meta`` in the user's cache folder.
        memory_budget: Most bytes of features to keep in memory, over all requests.
        half: Keep float16 instead of float32: half the space, 11 significant bits. On CUDA the
            backbone then runs in float16 too.
    """

    def __init__(
        self,
        directory: Path | None = None,
        memory_budget: int = 4 * 2**30,
        *,
        half: bool = False,
    ) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.directory = directory or cache / "comet-meta"
        self.memory_budget = memory_budget
        self.half = half
        self._in_memory: dict[str, tuple[Tensor, ...]] = {}

    def get(
        self,
        extractor: FeatureExtractor,
        paths: Sequence[Path],
        load: Callable[[Path], Tensor],
        *,
        transform_key: str,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> tuple[Tensor, ...]:
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
            Levels on the CPU, each (N, C, h, w), row i for ``paths[i]``; float32, or float16 with
            ``half``. Treat them as read-only.

        Raises:
            ValueError: If there are no pictures, they differ in size, or features are too large for
                float16.
            OSError: If a file is missing.
        """
        if not paths:
            raise ValueError("there are no pictures to compute features of")
        key = features_key(
            extractor, paths, f"{transform_key} half" if self.half else transform_key
        )
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
        batches = _extract(extractor, pictures, paths, torch.device(device), self.half)
        first = next(batches)
        # One record a picture, so that the levels' shapes are kept in the file.
        kind = np.float16 if self.half else np.float32
        record = np.dtype([(str(i), kind, x.shape[1:]) for i, x in enumerate(first)])
        size = len(paths) * record.itemsize
        if size <= self.memory_budget - self._held():
            _LOGGER.info("features of %d pictures: %.0f MB in memory", len(paths), size / 1e6)
            levels = _levels(np.empty(len(paths), record))
            _fill(levels, first, batches)
            self._in_memory[key] = levels
            return levels
        _LOGGER.info("features of %d pictures: %.0f MB in %s", len(paths), size / 1e6, file)
        self.directory.mkdir(parents=True, exist_ok=True)
        # Written aside and moved into place: a reader never sees a part, and of two writers of the
        # same features the later wins.
        partial = file.with_suffix(f".{uuid4().hex}.partial")
        try:
            mapped = np.lib.format.open_memmap(
                partial, mode="w+", dtype=record, shape=(len(paths),)
            )
            _fill(_levels(mapped), first, batches)
            mapped.flush()
            # Opened before it is moved: another process may clear the folder or write the same.
            stored = _levels(np.load(partial, mmap_mode="c"))
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
        return stored

    def _held(self) -> int:
        return sum(level.nbytes for levels in self._in_memory.values() for level in levels)


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
    extractor: FeatureExtractor,
    pictures: DataLoader[list[Tensor]],
    paths: Sequence[Path],
    device: torch.device,
    half: bool,
) -> Iterator[list[Tensor]]:
    """Features of each batch, levels (b, C, h, w), on the CPU."""
    done, shape = 0, None
    # Channels last suits convolutions on CPUs and GPUs alike; the values stay the same.
    layout = torch.channels_last
    extractor.to(device).to(memory_format=layout).eval()
    autocast = torch.autocast(device.type, torch.float16, enabled=half and device.type == "cuda")
    with tqdm(total=len(paths), desc="features", unit="picture", leave=False) as progress:
        for batch in pictures:
            shape = shape or batch[0].shape
            for offset, picture in enumerate(batch):
                if picture.shape != shape:
                    raise ValueError(
                        f"{paths[done + offset]} is {tuple(picture.shape)} after resizing, the "
                        f"pictures before it {tuple(shape)}; give a crop or a fixed (height, width)"
                    )
            images = torch.stack(batch).to(device).contiguous(memory_format=layout)
            with autocast:
                levels = [level.cpu() for level in extractor(images)]
            if half and not all(bool((x.abs() < _LARGEST_HALF).all()) for x in levels):
                raise ValueError(
                    f"features of pictures behind {paths[done]} are too large for float16; keep "
                    "float32 (half=False)"
                )
            yield levels
            done += len(batch)
            progress.update(len(batch))


def _levels(records: np.ndarray[Any, Any]) -> tuple[Tensor, ...]:
    """The levels (N, C, h, w) of an array of records, without copying them."""
    if records.dtype.names is None:
        raise ValueError(f"it holds {records.dtype}, not levels of features")
    return tuple(torch.from_numpy(records[name]) for name in records.dtype.names)


def _fill(target: tuple[Tensor, ...], first: list[Tensor], batches: Iterator[list[Tensor]]) -> None:
    row = 0
    for batch in chain([first], batches):
        for level, part in zip(target, batch, strict=True):
            level[row : row + len(part)] = part
        row += len(batch[0])


def _open(file: Path) -> tuple[Tensor, ...] | None:
    """Stored features, mapped copy-on-write; None where there are none or they are damaged."""
    try:
        return _levels(np.load(file, mmap_mode="c"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        _LOGGER.warning("%s is damaged (%s): computing its features again", file, error)
        return None


def features_key(extractor: FeatureExtractor, paths: Sequence[Path], transform_key: str) -> str:
    """Names features by all that they were computed from.

    Args:
        extractor: Computes them.
        paths: The pictures' files; each counts with path, size and time of change.
        transform_key: Names what is done to a picture before.

    Returns:
        32 hexadecimal digits.

    Raises:
        OSError: If a file is missing.
    """
    digest = hashlib.sha256(f"{extractor.fingerprint} {transform_key}".encode())
    for path in paths:
        status = path.stat()
        digest.update(os.fsencode(path.resolve()))  # names needn't be valid UTF-8
        digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]
