"""Patch features of any number of pictures on a grid, kept on disk as they come."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from comet_meta.vision.features import FeatureExtractor, features_key
from comet_meta.vision.files import replacing
from comet_meta.vision.images import Transform, load_values
from comet_meta.vision.picture_prior import patches_on_grid
from comet_meta.vision.samples import DatasetError

_PICTURES = 128  # in a file


class PatchGrids:
    """Patch features on a grid, in files of 128 pictures each.

    A file is written when its pictures are done, and found again by what they were computed from:
    extractor, size, grid, and each picture's path, size and time of change. A picture that couldn't
    be read before and now can be is computed, too. So a run that was
    stopped goes on from there, and after a change only the files concerned are computed again. At
    most one file's pictures are in memory.

    Args:
        extractor: Computes features.
        transform: Brings the pictures to one size, (height, width).
        side: Patches along either side of a picture.
        folder: Where the files go.
        device: Where to compute.
        batch_size: Pictures at a time.

    Raises:
        DatasetError: If the backbone can't take pictures of that size.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        transform: Transform,
        side: int,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
    ) -> None:
        self.extractor = extractor.to(device).eval()
        self.transform = transform
        self.side = side
        self.folder = folder
        self.device = torch.device(device)
        self.batch_size = batch_size
        try:
            blank = torch.zeros(1, 3, *_height_and_width(transform))
            self._shape = tuple(self._features(blank).shape[1:])
        except RuntimeError as error:
            raise DatasetError(
                f"{extractor.backbone.name} has no features of pictures of this size "
                f"({transform.resize}): {error}; take larger pictures"
            ) from error

    def compute(self, paths: Sequence[Path]) -> list[Path]:
        """Compute what isn't there yet.

        Args:
            paths: The pictures' files.

        Returns:
            The files that hold the features, for :meth:`read`.

        Raises:
            OSError: If a picture has vanished, or a file can't be written.
        """
        groups = [paths[i : i + _PICTURES] for i in range(0, len(paths), _PICTURES)]
        setting = f"{self.transform} {self.side}"
        keys = [features_key(self.extractor, group, setting) for group in groups]
        files = [self.folder / f"{key}.npy" for key in keys]
        missing = [
            (group, file)
            for group, file in zip(groups, files, strict=True)
            if not self._is_done(group, file)
        ]
        done = len(paths) - sum(len(group) for group, _ in missing)
        workers = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        try:
            with tqdm(
                total=len(paths), initial=done, desc="features", unit="picture", disable=None
            ) as progress:
                for group, file in missing:
                    patches = self._patches(group, workers, progress)
                    with replacing(file) as aside, aside.open("wb") as stream:
                        np.save(stream, patches)
        finally:
            workers.shutdown(cancel_futures=True)
        return files

    def why_unreadable(self, path: Path) -> str | None:
        """Why a picture can't be read.

        Args:
            path: Its file.

        Returns:
            A sentence; None if it can be read.
        """
        found = self._load(path)
        return found if isinstance(found, str) else None

    @staticmethod
    def read(files: Sequence[Path]) -> Iterator[Tensor]:
        """The features.

        Args:
            files: From :meth:`compute`.

        Yields:
            Of each file the patches of its pictures, float32 (b, C, h, w), NaN for a picture that
            can't be read.
        """
        for file in files:
            yield torch.from_numpy(np.load(file))

    def _is_done(self, paths: Sequence[Path], file: Path) -> bool:
        """Whether a file is there and whole, and the pictures that it lacks still can't be read."""
        try:
            patches = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return False
        if patches.shape != (len(paths), *self._shape):
            return False
        lacking = np.isnan(patches[:, 0, 0, 0])
        return all(
            self.why_unreadable(path) for path, lacks in zip(paths, lacking, strict=True) if lacks
        )

    def _patches(
        self, paths: Sequence[Path], workers: ThreadPoolExecutor, progress: Any
    ) -> npt.NDArray[np.float32]:
        """Patches (b, C, h, w) of some pictures, NaN where one can't be read."""
        result = np.full((len(paths), *self._shape), np.nan, np.float32)
        loaded = workers.map(self._load, paths)
        for start in range(0, len(paths), self.batch_size):
            some = paths[start : start + self.batch_size]
            found = list(islice(loaded, len(some)))
            images = {start + i: x for i, x in enumerate(found) if isinstance(x, Tensor)}
            if images:
                try:
                    patches = self._features(torch.stack(list(images.values())))
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    raise RuntimeError(
                        f"the features of {some[0]} to {some[-1]} can't be computed: {error}"
                    ) from error
                result[list(images)] = patches.numpy()
            progress.update(len(some))
        return result

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        """Patches (b, C, h, w) on the CPU of pictures (b, 3, H, W)."""
        return patches_on_grid(self.extractor(images.to(self.device)), self.side).float().cpu()

    def _load(self, path: Path) -> Tensor | str:
        """The picture (3, H, W), or why it can't be read."""
        try:
            return load_values(path, self.transform).float()
        except DatasetError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001  a decoder may fail in any way
            return f"can't read the picture {path}: {type(error).__name__}: {error}"


def _height_and_width(transform: Transform) -> tuple[int, int]:
    if isinstance(transform.resize, int) or transform.crop is not None:
        raise ValueError(f"{transform} may give several sizes; expected resize=(height, width)")
    return transform.resize
