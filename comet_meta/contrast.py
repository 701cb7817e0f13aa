"""What the suspects have in common: a second guess from frozen features, given a first one."""

import torch
from torch import Tensor

from comet_meta.weighting import standardized

_FOLDS = 5
_SUSPECT = 0.2
_TRUSTED = 0.5
_RIDGE = 1.0
_CHUNK_VALUES = 2**24
MIN_SAMPLES = 2 * _FOLDS


@torch.no_grad()
def contrast_scores(features: Tensor, scores: Tensor, top: int = 5) -> Tensor:
    """Scores by a linear discriminant between the patches of suspects and of trusted samples.

    Where bad samples are many, they stand near each other, and distances lose sight of them; but
    they then have in common what sets them apart from the others. The fifth of the samples with the
    highest first scores is contrasted with the lower half, by ridge regression on patches. That is
    done five times, each time without the fifth of the samples that it scores, so no sample
    confirms its own first score.

    Use the mean with the first scores, each :func:`~comet_meta.weighting.standardized`.

    Args:
        features: Frozen features of all samples' patches, shape (N, P, C), or of the samples,
            (N, C). Give all channels a comparable scale.
        scores: First anomaly scores, finite, shape (N,), for instance of
            :class:`~comet_meta.MemoryScorer`.
        top: Patch scores that are averaged to a sample's, >= 1; all where it has fewer.

    Returns:
        Anomaly scores, higher = more anomalous, float32, shape (N,). With fewer than 10 samples the
        first scores, standardised.

    Raises:
        ValueError: If there's not one score for each sample.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> features = torch.randn(60, 4, 8, generator=generator)
        >>> features[:12, 0, 0] += 6  # what the bad samples have in common
        >>> first = features[:, :, 0].amax(dim=1)
        >>> first[3] = 0  # a first guess that misses one
        >>> int((contrast_scores(features, first).argsort(descending=True)[:12] < 12).sum())
        12
    """
    if len(features) != len(scores):
        raise ValueError(f"got {len(scores)} scores for {len(features)} samples; expected as many")
    features = features.unsqueeze(1) if features.dim() == 2 else features
    count, patches, channels = features.shape
    if count < MIN_SAMPLES:
        return standardized(scores.float())
    order = scores.argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(count, device=order.device)
    # Samples of every rank in every fold, and the same ones in any order of the set.
    fold = place % _FOLDS
    suspect, trusted = place >= (1 - _SUSPECT) * count, place < _TRUSTED * count
    centre = features.float().mean(dim=(0, 1))

    sums = torch.zeros(_FOLDS, 2, channels, device=features.device)
    products = torch.zeros(_FOLDS, 2, channels, channels, device=features.device)
    sizes = torch.zeros(_FOLDS, 2, device=features.device)
    chunk = max(1, _CHUNK_VALUES // (patches * channels))
    for part in range(_FOLDS):
        for group, members in enumerate((suspect, trusted)):
            for rows in torch.split((members & (fold == part)).nonzero().flatten(), chunk):
                x = features[rows].flatten(0, 1).float() - centre
                sums[part, group] += x.sum(dim=0)
                products[part, group].addmm_(x.T, x)
                sizes[part, group] += len(x)

    result = torch.empty(count, device=features.device)
    for part in range(_FOLDS):
        others = torch.arange(_FOLDS, device=features.device) != part
        total = sizes[others].sum(dim=0)
        means = sums[others].sum(dim=0) / total[:, None]
        scatter = (products[others].sum(dim=0) / total[:, None, None]).sum(dim=0)
        ridge = _RIDGE * scatter.diagonal().mean() / 2 + torch.finfo(torch.float32).tiny
        scatter.diagonal().add_(ridge)
        direction = torch.linalg.solve(scatter, means[0] - means[1])
        for rows in torch.split((fold == part).nonzero().flatten(), chunk):
            projected = (features[rows].float() - centre) @ direction
            result[rows] = projected.topk(min(top, patches), dim=1).values.mean(dim=1)
    return result
