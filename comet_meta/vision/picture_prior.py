"""Who is bad? A first guess from frozen features, before any training."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from comet_meta import MemoryScorer
from comet_meta.vision.features import patch_features
from comet_meta.vision.statistics import FeatureScaler

_SIDE = 6
_PATCHES = 20_000


def memory_prior(
    batches: Iterable[Sequence[Tensor]], count: int, scorer: MemoryScorer | None = None
) -> Tensor:
    """Anomaly scores of a training set by :class:`~comet_meta.MemoryScorer`.

    Whatever levels a detector looks at, the prior sees the same: several are first made into patch
    features. Every channel is standardised over the training set. Time grows with the square of the
    number of patches, so features are averaged down to at most 20,000 of them over the set, but no
    coarser than 6 x 6 in a picture: small sets, where each picture counts, get finer ones.

    Args:
        batches: The training set's features in order, patch features as their only level
            (B, C, h, w), or the levels of a backbone.
        count: Of the pictures, >= 2.
        scorer: With settings of one's own.

    Returns:
        Scores, higher = more anomalous, shape (N,). A picture whose features are not all finite
        gets the highest score.
    """
    side = max(_SIDE, math.isqrt(_PATCHES // count))
    patches = torch.cat([_patches(levels, side) for levels in batches])
    whole = patches.isfinite().flatten(1).all(dim=1)
    scores = torch.full((len(patches),), torch.nan)
    scores[whole] = _scores(patches[whole], scorer or MemoryScorer())
    return scores.nan_to_num(nan=float(scores[whole].max()))


def _scores(patches: Tensor, scorer: MemoryScorer) -> Tensor:
    """Memory scores (N,) of patches (N, C, h, w)."""
    scaler = FeatureScaler([patches.shape[1]])
    scaler.fit([[patches]])
    (scaled,) = scaler([patches])
    return scorer(scaled.flatten(2).transpose(1, 2))


def _patches(levels: Sequence[Tensor], side: int) -> Tensor:
    """Patch features on a coarse grid, (B, C, side, side), or less where the level is smaller."""
    level = levels[0] if len(levels) == 1 else patch_features(levels)
    height, width = (min(side, length) for length in level.shape[-2:])
    return F.adaptive_avg_pool2d(level, (height, width))
