"""What a user would pick instead of training: a memory of patches, and distances to it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from comet_examples.detectors.maps import image_scores, smooth_maps
from comet_examples.training import FeatureRows
from comet_meta.vision.features import patch_features
from comet_meta.vision.statistics import FeatureScaler

_SHARE = 0.1
_LARGEST = 30_000
_CHUNK = 1024


class MemoryBank(nn.Module):
    """PatchCore with a memory that is drawn at random: nothing is trained.

    A patch's score is its distance to the nearest of the training set's patches in the memory, a
    picture's the mean of its highest. Whatever levels a detector looks at, the memory sees patch
    features, standardised by channel over the training set.

    A greedy choice of the memory (k-center) takes minutes where this takes none.

    Args:
        map_size: Height and width of the anomaly maps, in pixels of the pictures.
        top: Patch scores that a picture's score is the mean of, >= 1.
        blur_sigma: Width of the Gaussian that smooths the maps, in pixels, >= 0.

    Example:
        >>> features = [torch.arange(8.0).reshape(2, 1, 2, 2)]
        >>> bank = MemoryBank((4, 4))
        >>> bank.fit(FeatureRows(features, torch.tensor([0])), share=1.0)
        >>> scores, _ = bank.predict(FeatureRows(features, torch.tensor([0, 1])))
        >>> [round(score, 2) for score in scores.tolist()]
        [0.0, 3.58]

    Source: Roth, Pemula, Zepeda, Schoelkopf, Brox, Gehler: Towards total recall in industrial
    anomaly detection, CVPR 2022.
    """

    patches: Tensor

    def __init__(self, map_size: tuple[int, int], *, top: int = 1, blur_sigma: float = 4.0) -> None:
        super().__init__()
        self.map_size = map_size
        self.top = top
        self.blur_sigma = blur_sigma
        self.scaler = FeatureScaler([0])
        self.register_buffer("patches", torch.empty(0, 0))

    @torch.no_grad()
    def fit(self, data: FeatureRows, *, seed: int = 0, share: float = _SHARE) -> None:
        """Draw the memory.

        Args:
            data: Features of the training set.
            seed: Decides the draw.
            share: Part of all patches that is kept, in (0, 1]; at most 30,000.
        """
        (first,) = patched(next(data.batches()))
        self.scaler = FeatureScaler([first.shape[1]])
        self.scaler.fit(patched(levels) for levels in data.batches())
        generator = torch.Generator().manual_seed(seed)
        positions = first.shape[2] * first.shape[3]
        count = max(1, min(_LARGEST, round(share * len(data) * positions)))
        drawn = torch.zeros(len(data) * positions, dtype=torch.bool)
        drawn[torch.randperm(len(drawn), generator=generator)[:count]] = True
        kept, done = [], 0
        for levels in data.batches():
            found = self._scaled(levels).flatten(0, 2)
            kept.append(found[drawn[done : done + len(found)]])
            done += len(found)
        self.patches = torch.cat(kept)

    def patch_scores(self, features: Sequence[Tensor]) -> Tensor:
        """Distances of patches to the nearest in the memory, shape (B, h, w).

        Args:
            features: Levels (B, C, h, w), finest first.
        """
        found = self._scaled(features)
        distances, _ = nearest_in(self.patches, found.flatten(0, 2))
        return distances.reshape(found.shape[:3])

    @torch.no_grad()
    def predict(self, data: FeatureRows) -> tuple[Tensor, Tensor]:
        """Scores and maps of some pictures.

        Args:
            data: Their features.

        Returns:
            Scores (N,) and maps (N, H, W), on the CPU.
        """
        scores, maps = [], []
        for levels in data.batches(self.patches.device):
            found = self.patch_scores(levels)
            scores.append(image_scores(found, self.top).cpu())
            maps.append(smooth_maps(found, self.map_size, self.blur_sigma).cpu())
        return torch.cat(scores), torch.cat(maps)

    def _scaled(self, levels: Sequence[Tensor]) -> Tensor:
        """Patches (B, h, w, C)."""
        (scaled,) = self.scaler(patched(levels))
        return scaled.permute(0, 2, 3, 1)


def patched(levels: Sequence[Tensor]) -> list[Tensor]:
    """Levels (B, C, h, w) as a single one of patch features; a single one is left as it is."""
    return [levels[0] if len(levels) == 1 else patch_features(levels)]


def nearest_in(memory: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of each query (Q, C) to its nearest in the memory (M, C), and its position, (Q,)."""
    found = [torch.cdist(part, memory).min(dim=1) for part in torch.split(queries, _CHUNK)]
    return torch.cat([x.values for x in found]), torch.cat([x.indices for x in found])
