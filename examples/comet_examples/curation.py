"""Who is bad? A first guess from frozen features, before any training."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from comet_examples.detectors.statistics import FeatureScaler
from comet_meta import MemoryScorer, contrast_scores
from comet_meta.weighting import standardized

_GRID = 6


def memory_prior(batches: Iterable[Sequence[Tensor]]) -> Tensor:
    """Anomaly scores of a training set by :class:`~comet_meta.MemoryScorer` and contrast.

    The mean of the distances to memories and of what
    :func:`~comet_meta.contrast_scores` makes of them, each standardised.

    Every channel is standardised over the training set; levels are averaged down to 6 x 6 patches,
    which takes a fraction of the time of finer ones.

    Args:
        batches: The training set's features in order, levels (B, C, h, w) each.

    Returns:
        Scores, higher = more anomalous, shape (N,). A picture whose features are not all finite
        gets the highest score.
    """
    patches = torch.cat([_patches(levels) for levels in batches])
    whole = patches.isfinite().flatten(1).all(dim=1)
    scores = torch.full((len(patches),), torch.nan)
    scores[whole] = _scores(patches[whole])
    return scores.nan_to_num(nan=float(scores[whole].max()))


def _scores(patches: Tensor) -> Tensor:
    """Memory scores (N,) of patches (N, C, h, w)."""
    scaler = FeatureScaler([patches.shape[1]])
    scaler.fit([[patches]])
    (scaled,) = scaler([patches])
    features = scaled.flatten(2).transpose(1, 2)
    first = MemoryScorer()(features)
    return (standardized(first.clone()) + standardized(contrast_scores(features, first))) / 2


def _patches(levels: Sequence[Tensor]) -> Tensor:
    """All levels on one coarse grid, shape (B, C, 6, 6), or less where the levels are smaller."""
    height, width = (min(_GRID, side) for side in levels[-1].shape[-2:])
    return torch.cat([F.adaptive_avg_pool2d(level, (height, width)) for level in levels], dim=1)
