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
from comet_meta.weights.prior import mean_in_medians

PRECAUTION = 0.1
"""Fraction of pictures that is left out without proof where no model can judge them.

Twice the weighter's default: no ranking finds all bad pictures, and the evidence over sets is in
``docs/results/frontier.md``.
"""

HOLD_OUT = 0.2
"""Fraction of pictures, the most suspect, that are held out until the model can judge them."""

COARSE = 6
"""Patches along either side of a picture on the coarse grid."""

_FINE = 20
_PATCHES = 100_000
_STRANGEST = 5  # patches, as many as MemoryScorer averages


def memory_prior(
    batches: Iterable[Sequence[Tensor]], count: int, scorer: MemoryScorer | None = None
) -> Tensor:
    """Anomaly scores of a training set by :class:`~comet_meta.MemoryScorer`, on two grids.

    A small defect is lost in coarse patches, and a large one is not strange in any fine patch. So:

    1. Features are averaged down to the patches of a fine grid (:func:`grid_side`), and these to
       those of a coarse one, 6 x 6.
    2. On either grid, every channel is standardised over the training set, and the scorer gives
       each picture a score.
    3. A picture's score is the mean of both, each divided by its median.

    The prior is the same for every detector: several levels are first combined into patch features.

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
    """:func:`memory_prior`, and the scores of the patches of the fine grid.

    Args:
        batches: As for :func:`memory_prior`.
        count: Number of pictures, >= 2.
        scorer: A scorer with other settings than the default's.

    Returns:
        Scores of the pictures, shape (N,), and of their patches, shape (N, rows, columns). A
        picture whose features are not all finite gets the highest scores.
    """
    scorer = scorer or MemoryScorer()
    side = grid_side(count)
    patches = torch.cat([patches_on_grid(levels, side) for levels in batches])  # 1)
    finite = _is_finite(patches)
    fine = patches[finite]
    # 2)
    found, patch_found = scorer.score_parts(standardised(fine))
    by_grid = [found]
    if _has_coarse_grid(fine):
        by_grid.append(scorer(standardised(_coarser(fine))))
    found = mean_in_medians(torch.stack(by_grid))  # 3)
    scores = torch.full((len(patches),), float(found.max()))
    patch_scores = torch.full((len(patches), *patches.shape[2:]), float(patch_found.max()))
    scores[finite] = found
    patch_scores[finite] = patch_found.unflatten(1, patches.shape[2:])
    return scores, patch_scores


def strangest_features(batches: Iterable[Sequence[Tensor]], patch_scores: Tensor) -> Tensor:
    """What is strange about each picture, for :func:`~comet_meta.learn_from_review`.

    Pictures resemble each other in most of their patches, whether they have a defect or not. So it
    is the five patches with the highest scores that say of which kind a picture is.

    Args:
        batches: The training set's features in order, as for :func:`memory_prior`.
        patch_scores: Scores of the patches, from :func:`memory_part_prior`, shape
            (N, rows, columns).

    Returns:
        The mean features of these patches, shape (N, C); of a picture whose features are not all
        finite, the mean over the others.

    Example:
        >>> features = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> features[7, :, 2, 2] += 9  # one strange patch
        >>> _, patch_scores = memory_part_prior([[features]], 40)
        >>> strange = strangest_features([[features]], patch_scores)
        >>> strange.shape, int(strange.norm(dim=1).argmax())
        (torch.Size([40, 3]), 7)
    """
    side = grid_side(len(patch_scores))
    found: list[Tensor] = []
    start = 0
    for levels in batches:
        patches = patches_on_grid(levels, side)
        finite = _is_finite(patches)
        patches = patches.flatten(2)  # (B, C, P)
        scores = patch_scores[start : start + len(patches)].flatten(1)
        start += len(patches)
        highest = scores.topk(min(_STRANGEST, scores.shape[1]), dim=1).indices.unsqueeze(1)
        strangest = patches.gather(2, highest.expand(-1, patches.shape[1], -1)).mean(dim=2)
        found.append(strangest.where(finite.unsqueeze(1), torch.nan))
    strange = torch.cat(found)
    return strange.where(strange.isfinite(), strange.nanmean(dim=0))


def streamed_part_prior(
    parts: Callable[[], Iterator[Tensor]],
    scratch: Path,
    scorer: MemoryScorer | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """:func:`memory_part_prior` of more patches than should be in memory at a time.

    Args:
        parts: Yields the pictures' patches on the fine grid in order, (b, C, h, w); it is called
            several times.
        scratch: A folder with room for all patches; what is written there goes again.
        scorer: A scorer with other settings than the default's.
        device: Where the pictures are compared. On the CPU, memory holds no more than a part.

    Returns:
        Scores of the pictures, shape (N,), and of their patches, shape (N, rows, columns). NaN for
        a picture whose patches are not all finite.

    Raises:
        DatasetError: If fewer than two pictures have finite patches.
    """
    scorer = scorer or MemoryScorer()
    finite = torch.cat([_is_finite(part) for part in parts()])
    if int(finite.sum()) < 2:
        raise DatasetError(
            f"{int(finite.sum())} of {len(finite)} pictures have finite features; it takes 2"
        )

    def fine() -> Iterator[Tensor]:
        return (part[_is_finite(part)] for part in parts())

    # 2)
    first = next(parts())
    found, patch_found = _streamed_scores(fine, scratch, scorer, device)
    by_grid = [found]
    if _has_coarse_grid(first):
        by_grid.append(_streamed_scores(lambda: map(_coarser, fine()), scratch, scorer, device)[0])
    scores = torch.full((len(finite),), torch.nan)
    patch_scores = torch.full((len(finite), *first.shape[2:]), torch.nan)
    scores[finite] = mean_in_medians(torch.stack(by_grid))  # 3)
    patch_scores[finite] = patch_found.unflatten(1, first.shape[2:])
    return scores, patch_scores


def grid_side(count: int) -> int:
    """Patches along either side of a picture on the fine grid: the more pictures, the fewer.

    The time to score a set grows with the number of its patches. So there are at most 100,000 over
    the set, but no fewer than 6 x 6 in a picture.

    Args:
        count: Number of pictures, >= 1.

    Returns:
        From 6 to 20.

    Example:
        >>> grid_side(50), grid_side(1000), grid_side(50_000)
        (20, 10, 6)
    """
    return max(COARSE, min(_FINE, math.isqrt(_PATCHES // count)))


def patches_on_grid(levels: Sequence[Tensor], side: int) -> Tensor:
    """Patch features averaged down to a grid.

    Args:
        levels: Patch features as the only level (B, C, h, w), or the levels of a backbone.
        side: Patches along either side; fewer where the level is smaller.

    Returns:
        Shape (B, C, side, side).
    """
    level = levels[0] if len(levels) == 1 else patch_features(levels)
    height, width = (min(side, length) for length in level.shape[-2:])
    return F.adaptive_avg_pool2d(level, (height, width))


def standardised(patches: Tensor) -> Tensor:
    """What a scorer takes: patches whose channels are standardised over the training set.

    Args:
        patches: Patch features of all pictures, shape (N, C, h, w).

    Returns:
        Shape (N, h * w, C).
    """
    scaler = FeatureScaler([patches.shape[1]])
    scaler.fit([[patches]])
    return _rows(scaler, patches)


def _has_coarse_grid(patches: Tensor) -> bool:
    """Whether patches (N, C, h, w) are finer than the coarse grid."""
    return max(patches.shape[2:]) > COARSE


def _coarser(patches: Tensor) -> Tensor:
    """The coarse grid of patches (N, C, h, w)."""
    return patches_on_grid([patches], COARSE)


def _streamed_scores(
    parts: Callable[[], Iterator[Tensor]],
    scratch: Path,
    scorer: MemoryScorer,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Scores (N,) and patch scores (N, P) of standardised patches that lie in a file.

    The patches come in parts (b, C, h, w).
    """
    scaler = FeatureScaler([next(parts()).shape[1]])
    scaler.fit([part] for part in parts())
    count = 0
    with TemporaryFile(dir=scratch) as file:
        for part in parts():
            rows = _rows(scaler, part)
            count += len(rows)
            file.write(rows.contiguous().numpy().tobytes())
        file.flush()  # written, not mapped for writing: a full disk is an error and no crash
        features = np.memmap(file, np.float32, "c", shape=(count, *rows.shape[1:]))
        scores, patch_scores = scorer.score_parts(torch.from_numpy(features).to(device))
        return scores.cpu(), patch_scores.cpu()


def _rows(scaler: FeatureScaler, patches: Tensor) -> Tensor:
    """Scaled patches (N, C, h, w) as (N, h * w, C)."""
    (scaled,) = scaler([patches])
    return scaled.flatten(2).transpose(1, 2)


def _is_finite(patches: Tensor) -> Tensor:
    """Which pictures have finite patches only, (B, C, h, w) -> (B,)."""
    return patches.isfinite().flatten(1).all(dim=1)
