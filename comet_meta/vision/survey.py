"""Check all pictures before the first is used: damage, depth, number of pages."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from comet_meta.vision.images import Transform, check_mask, common_shape
from comet_meta.vision.pixels import (
    Deep,
    Extremes,
    extremes,
    has_more_than_8_bits,
    joint_range,
    keeps_upper_bits_only,
    pages,
    read_picture,
    upright_shape,
)
from comet_meta.vision.samples import DatasetError, Sample, Split

_LOGGER = logging.getLogger(__name__)
_MOST_NAMED = 20


class _Found(NamedTuple):
    fault: str | None
    depth: Extremes | None = None
    pages: int = 1
    halved: bool = False
    shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class Survey:
    """What is known of a split's pictures.

    Attributes:
        faults: Sentences by the path of the picture that can't be used.
        values: Range of values of the training pictures of more than 8 bits; None without any.
        shapes: Height and width of each training picture that can be read.
    """

    faults: dict[Path, str]
    values: tuple[float, float] | None
    shapes: tuple[tuple[int, int], ...] = ()

    def fitted(self, square: Transform) -> Transform:
        """The transform for the pictures' shape.

        Args:
            square: What square pictures get, with a ``resize`` and perhaps a crop.

        Returns:
            ``square`` where all pictures are about square. Others come whole, with about as many
            pixels, in the median of their shapes (:func:`~comet_meta.vision.images.common_shape`).
        """
        side = square.crop or square.resize
        height, width = (side, side) if isinstance(side, int) else side
        pixels = height * width
        if all(len({*common_shape([shape], pixels)}) == 1 for shape in self.shapes):
            return square
        return Transform(common_shape(self.shapes, pixels), keep_aspect=True, values=square.values)

    def scaled(self, transform: Transform) -> Transform:
        """The transform with the range of the pictures."""
        return transform if self.values is None else replace(transform, values=self.values)

    def without_faults(self, split: Split) -> Split:
        """The split without the pictures that can't be used."""
        return replace(
            split,
            train=tuple(s for s in split.train if s.path not in self.faults),
            test=tuple(s for s in split.test if s.path not in self.faults),
        )

    def raise_faults(self) -> None:
        """Name all pictures that can't be used.

        Raises:
            DatasetError: If there are any.
        """
        sentences = list(self.faults.values())
        if len(sentences) == 1:
            raise DatasetError(f"{sentences[0]}, or go on without it by --keep-going")
        if sentences:
            lines = [f"  {sentence}" for sentence in sentences[:_MOST_NAMED]]
            if len(sentences) > _MOST_NAMED:
                lines.append(f"  and {len(sentences) - _MOST_NAMED} more")
            raise DatasetError(
                "\n".join([f"{len(sentences)} pictures can't be used:", *lines])
                + "\n--keep-going goes on without them"
            )


def survey(split: Split) -> Survey:
    """Read every picture and mask once.

    What is found is said in the log: the range of values that pictures of more than 8 bits
    get, files of several pages, of which the first is read, and colours of 16 bits of which 8 are
    read.

    Args:
        split: The pictures.

    Returns:
        What was found. Only training pictures decide on the range.
    """
    return _summarise(split, _inspect_all(_inspect, split))


def survey_depth(split: Split) -> Survey:
    """Find the range of values of the pictures of more than 8 bits a channel.

    Only these are read in full, of others the head alone. So it is much quicker than
    :func:`survey`. It says the same in the log, but finds no damaged pictures.

    Args:
        split: The pictures.

    Returns:
        The range of the values; no faults.
    """
    return _summarise(split, _inspect_all(_inspect_head, split))


def _inspect_all(inspect: Callable[[Sample], _Found], split: Split) -> dict[Sample, _Found]:
    samples = (*split.train, *split.test)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(samples, threads.map(inspect, samples), strict=True))


def _summarise(split: Split, found: dict[Sample, _Found]) -> Survey:
    """What was found, and the log of it."""
    depths = [each.depth for s in split.train if (each := found[s]).depth is not None]
    deep = sum(each.depth is not None for each in found.values())
    values = joint_range([depth for depth in depths if depth is not None])
    if values is None:
        values = joint_range([each.depth for each in found.values() if each.depth is not None])
    if values is not None:
        _LOGGER.info(
            "%s: %d of %d pictures have more than 8 bits; %g to %g becomes black to white in all",
            *(split.category, deep, len(found), *values),
        )
    many = [(s.path, each.pages) for s, each in found.items() if each.pages > 1]
    if many:
        _LOGGER.warning(
            "%s: %d files hold several pictures, of which only the first is read (%s: %d)",
            *(split.category, len(many), *many[0]),
        )
    halved = [s.path for s, each in found.items() if each.halved]
    if halved:
        _LOGGER.warning(
            "%s: %d pictures have colours of 16 bits, of which the upper 8 are read (%s); PNG is "
            "read in full depth",
            *(split.category, len(halved), halved[0]),
        )
    faults = {s.path: each.fault for s, each in found.items() if each.fault is not None}
    shapes = tuple(each.shape for s in split.train if (each := found[s]).shape is not None)
    return Survey(faults, values, shapes)


def _inspect(sample: Sample) -> _Found:
    try:
        picture = read_picture(sample.path)
        check_mask(sample, picture.size)
        return _found(sample.path, picture)
    except (DatasetError, OSError, MemoryError) as error:
        return _Found(str(error) or f"{sample.path}: {type(error).__name__}")


def _inspect_head(sample: Sample) -> _Found:
    try:
        picture = read_picture(sample.path) if has_more_than_8_bits(sample.path) else None
        return _found(sample.path, picture)
    except Exception:  # noqa: BLE001  whoever reads the picture will say what is wrong with it
        return _Found(None)


def _found(path: Path, picture: Image.Image | Deep | None) -> _Found:
    with Image.open(path) as file:
        count = pages(file)
    depth = extremes(picture) if isinstance(picture, Deep) else None
    return _Found(None, depth, count, keeps_upper_bits_only(path), upright_shape(path))
