"""Anomaly scores of the training pictures from frozen features, before any training."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from comet_meta import MemoryScorer
from comet_meta.vision.features import patch_features
from comet_meta.vision.samples import DatasetError
from comet_meta.vision.statistics import FeatureScaler

PRECAUTION = 0.1
"""Fraction of pictures that is left out without proof where no model can judge them.

Twice the weighter's default: on pictures a tenth gives back more than a twentieth where some are
bad. Where all are good it costs about as much in the mean, and up to half a point more on a set.
"""

HOLD_OUT = 0.2
"""Fraction of pictures, the most suspect, that are held out until the model can judge them."""

_SIDE = 6
_PATCHES = 20_000


def memory_prior(
    batches: Iterable[Sequence[Tensor]], count: int, scorer: MemoryScorer | None = None
) -> Tensor:
    """Anomaly scores of a training set by :class:`~comet_meta.MemoryScorer`.

    The prior is the same for every detector: several levels are first combined into patch
    features. Every channel is standardised over the training set. Time grows with the square of the
    number of patches, so features are averaged down to at most 20,000 of them over the set, but no
    coarser than 6 x 6 in a picture: small sets, where each picture counts, get finer ones.

    Args:
        batches: The training set's features in order, patch features as their only level
            (B, C, h, w), or the levels of a backbone.
        count: Number of pictures, >= 2.
        scorer: A scorer with other settings than the default's.

    Returns:
        Scores, higher = more anomalous, shape (N,). A picture whose features are not all finite
        gets the highest score.
    """
    return memory_part_prior(batches, count, scorer)[0]


def memory_part_prior(
    batches: Iterable[Sequence[Tensor]], count: int, scorer: MemoryScorer | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`memory_prior`, and the scores of the patches that it is made of.

    Args:
        batches: As for :func:`memory_prior`.
        count: Number of pictures, >= 2.
        scorer: A scorer with other settings than the default's.

    Returns:
        Scores of the pictures, shape (N,), and of their patches, shape (N, rows, columns). A
        picture whose features are not all finite gets the highest scores.
    """
    side = grid_side(count)
    patches = torch.cat([coarse_patches(levels, side) for levels in batches])
    finite = _is_finite(patches)
    scaler = FeatureScaler([patches.shape[1]])
    scaler.fit([[patches[finite]]])
    (scaled,) = scaler([patches[finite]])
    found = (scorer or MemoryScorer()).score_parts(scaled.flatten(2).transpose(1, 2))
    scores = torch.full((len(patches),), float(found[0].max()))
    patch_scores = torch.full((len(patches), *patches.shape[2:]), float(found[1].max()))
    scores[finite] = found[0]
    patch_scores[finite] = found[1].unflatten(1, patches.shape[2:])
    return scores, patch_scores


def streamed_prior(
    parts: Callable[[], Iterator[Tensor]],
    scratch: Path,
    scorer: MemoryScorer | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """:func:`memory_prior` of more patches than should be in memory at a time.

    Args:
        parts: Yields the pictures' patches in order, (b, C, h, w); it is called three times.
        scratch: A folder with room for all patches; what is written there goes again.
        scorer: A scorer with other settings than the default's.
        device: Where the pictures are compared. On the CPU, memory holds no more than a part.

    Returns:
        Scores, shape (N,), NaN for a picture whose patches are not all finite.

    Raises:
        DatasetError: If fewer than two pictures have finite patches.
    """
    finite = torch.cat([_is_finite(part) for part in parts()])
    scaler = FeatureScaler([next(parts()).shape[1]])
    scaler.fit([part[_is_finite(part)]] for part in parts())
    with TemporaryFile(dir=scratch) as file:
        for part in parts():
            (scaled,) = scaler([part[_is_finite(part)]])
            rows = scaled.flatten(2).transpose(1, 2).contiguous()
            file.write(rows.numpy().tobytes())
        file.flush()  # written, not mapped for writing: a full disk is an error and no crash
        shape = (int(finite.sum()), *rows.shape[1:])
        if shape[0] < 2:
            raise DatasetError(
                f"{shape[0]} of {len(finite)} pictures have finite features; it takes 2"
            )
        features = torch.from_numpy(np.memmap(file, np.float32, "c", shape=shape))
        scores = torch.full((len(finite),), torch.nan)
        scores[finite] = (scorer or MemoryScorer())(features.to(device)).cpu()
    return scores


def grid_side(count: int) -> int:
    """Patches along either side of a picture: the more pictures, the fewer.

    Args:
        count: Number of pictures, >= 1.

    Returns:
        At least 6.

    Example:
        >>> grid_side(50), grid_side(50_000)
        (20, 6)
    """
    return max(_SIDE, math.isqrt(_PATCHES // count))


def coarse_patches(levels: Sequence[Tensor], side: int) -> Tensor:
    """Patch features averaged down to a coarse grid.

    Args:
        levels: Patch features as the only level (B, C, h, w), or the levels of a backbone.
        side: Patches along either side; fewer where the level is smaller.

    Returns:
        Shape (B, C, side, side).
    """
    level = levels[0] if len(levels) == 1 else patch_features(levels)
    height, width = (min(side, length) for length in level.shape[-2:])
    return F.adaptive_avg_pool2d(level, (height, width))


def _is_finite(patches: Tensor) -> Tensor:
    """Which pictures have finite patches only, (B, C, h, w) -> (B,)."""
    return patches.isfinite().flatten(1).all(dim=1)
