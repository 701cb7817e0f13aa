"""What a user would pick instead of training: a memory of patches, and distances to it.

*PatchCore* (Roth, Pemula, Zepeda, Schoelkopf, Brox, Gehler: Towards total recall in industrial
anomaly detection, CVPR 2022) keeps a tenth of all patches, here drawn at random. *SoftPatch* (Jiang
et al.: SoftPatch, unsupervised anomaly detection with noisy data, NeurIPS 2022) first drops the
patches with the highest local outlier factors, keeps a tenth of the rest by a greedy k-center
choice, and weights distances by their factors. The features are the detector's own: standardised,
levels on the finest grid, averaged as the detector's preset averages them. A picture's score is the
mean of its five most distant patches, as the detectors have it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import LocalOutlierFactor
from torch import Tensor

from comet_examples.bank import nearest_in
from comet_examples.detectors.maps import image_scores, smooth_maps
from comet_examples.training import FeatureRows
from comet_meta.vision.statistics import FeatureScaler
from grid import Trial, Variant, curation_figures
from runs import Figures

_SHARE = 0.1
_PROJECTED = 128
_TOP = 5
_BLUR = 4.0


class Memory(NamedTuple):
    """Patches to compare with.

    Attributes:
        patches: Shape (M, C).
        weights: Factors on the distances to each of them, shape (M,).
        outlier_factors: Those of all training patches where they were computed, (N, P).
        kept: Which of them were not dropped, bool of shape (N, P).
    """

    patches: Tensor
    weights: Tensor
    outlier_factors: Tensor | None = None
    kept: Tensor | None = None


Choice = Callable[[Tensor, int], Memory]
"""Makes a memory of training patches (N, P, C) and a seed."""


class Patches:
    """Standardised patches of feature levels.

    Args:
        batches: The training set's features, levels (B, C, h, w) each.
        channels: Number of each level's channels.
        pool: Positions, in either direction, that are averaged to a patch.
    """

    def __init__(
        self, batches: Iterable[Sequence[Tensor]], channels: Sequence[int], pool: int
    ) -> None:
        self.scaler = FeatureScaler(channels)
        self.scaler.fit(batches)
        self.pool = pool

    @torch.no_grad()
    def __call__(self, levels: Sequence[Tensor]) -> Tensor:
        """Patches (B, h, w, C) of levels (B, C, h, w)."""
        scaled = self.scaler(levels)
        grid = scaled[0].shape[-2:]
        resized = [scaled[0], *(F.interpolate(x, grid, mode="bilinear") for x in scaled[1:])]
        return F.avg_pool2d(torch.cat(resized, dim=1), self.pool).permute(0, 2, 3, 1)


def memory_bank(choose: Choice) -> Variant:
    """A memory of the training set's patches.

    Args:
        choose: Makes it.
    """

    def run(trial: Trial) -> Figures:
        experiment, split = trial.experiment, trial.split
        device = experiment.device
        train, test = experiment.rows(split.train), experiment.rows(split.test)
        channels = [level.shape[1] for level in train.features]
        pool = experiment.preset.detector.get("pool", 1)
        patches = Patches(train.batches(), channels, pool)
        patches.scaler.to(device)
        found = torch.cat([patches(levels) for levels in train.batches(device)])
        memory = choose(found.flatten(1, 2), trial.settings.seed)
        scores, maps = _scored(test, patches, memory, experiment.map_size, device)
        figures = experiment.judge(split, scores, maps)
        if memory.kept is not None and memory.outlier_factors is not None:
            figures |= curation_figures(
                memory.kept.float().mean(dim=1).cpu().numpy(),
                trial.bad,
                memory.outlier_factors.amax(dim=1).cpu().numpy(),
            )
        return figures

    return run


def random_memory(patches: Tensor, seed: int) -> Memory:
    """A tenth of all patches, drawn at random."""
    points = patches.flatten(0, 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(points), generator=generator)[: _size(len(points))]
    chosen = points[drawn.to(points.device)]
    return Memory(chosen, torch.ones(len(chosen), device=points.device))


def soft_patch(patches: Tensor, seed: int, *, share: float = 0.15) -> Memory:
    """SoftPatch: no patches of high outlier factor, and distances weighted by the factors.

    Args:
        patches: Shape (N, P, C); position p of all pictures is compared with itself.
        seed: Decides the coreset.
        share: Part of all patches that is dropped.
    """
    factors = outlier_factors(patches)
    threshold = torch.from_numpy(np.quantile(factors.cpu(), 1 - share, keepdims=True)).flatten()
    kept = factors <= threshold.to(factors)
    points, weights = patches[kept], factors[kept]
    chosen = greedy_coreset(points, _size(len(points)), seed)
    return Memory(points[chosen], weights[chosen], factors, kept)


def outlier_factors(patches: Tensor, neighbours: int = 6) -> Tensor:
    """Local outlier factors among the patches of the same position, about 1 for an inlier.

    Args:
        patches: Shape (N, P, C).
        neighbours: That a patch is compared with; the paper's 6.

    Returns:
        Shape (N, P).
    """
    neighbours = min(neighbours, len(patches) - 1)
    columns = []
    for position in patches.cpu().numpy().transpose(1, 0, 2):
        factor = LocalOutlierFactor(n_neighbors=neighbours).fit(position)
        columns.append(torch.from_numpy(-factor.negative_outlier_factor_))
    return torch.stack(columns, dim=1).to(patches)


def greedy_coreset(points: Tensor, size: int, seed: int) -> Tensor:
    """Points that are each the farthest from all chosen before, from a random one on.

    Args:
        points: Shape (N, C); above 128 channels their distances are those of a random projection
            to 128, as published.
        size: How many to choose, <= N.
        seed: Decides the first one and the projection.

    Returns:
        Their indices, shape (size,).
    """
    generator = torch.Generator().manual_seed(seed)
    if points.shape[1] > _PROJECTED:
        matrix = torch.randn(points.shape[1], _PROJECTED, generator=generator)
        points = points @ (matrix / _PROJECTED**0.5).to(points)
    squares = points.square().sum(dim=1)
    nearest = torch.full_like(squares, torch.inf)
    chosen = torch.empty(size, dtype=torch.int64, device=points.device)
    chosen[0] = torch.randint(len(points), (1,), generator=generator)
    for i in range(size):
        if i > 0:
            chosen[i] = nearest.argmax()
        row = points[chosen[i]]
        nearest = torch.minimum(nearest, squares + row.square().sum() - 2 * (points @ row))
        nearest[chosen[i]] = -torch.inf
    return chosen


@torch.no_grad()
def _scored(
    data: FeatureRows,
    patches: Patches,
    memory: Memory,
    map_size: tuple[int, int],
    device: str,
) -> tuple[Tensor, Tensor]:
    """Scores (N,) and maps (N, H, W) of pictures."""
    scores, maps = [], []
    for levels in data.batches(device):
        found = patches(levels)
        grid = found.shape[:3]
        plain, nearest = nearest_in(memory.patches, found.flatten(0, 2))
        distances = (plain * memory.weights[nearest]).reshape(grid)
        scores.append(image_scores(distances, _TOP))
        maps.append(smooth_maps(distances, map_size, _BLUR))
    return torch.cat(scores).cpu(), torch.cat(maps).cpu()


def _size(points: int) -> int:
    return max(1, round(_SHARE * points))
