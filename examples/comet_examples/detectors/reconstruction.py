"""Feature reconstruction: what a narrow network can't rebuild of frozen features is anomalous.

In the spirit of Deng, Li: Anomaly detection via reverse distillation from one-class embedding, CVPR
2022, and Guo, Lu, Zhang, Chen, Li, Liao: Dinomaly, the less is more philosophy in multi-class
unsupervised anomaly detection, CVPR 2025.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from comet_examples.detectors.maps import at_grid, image_scores, on_finest_grid, smooth_maps
from comet_examples.detectors.positions import PositionScaler
from comet_meta.vision.features import PyramidFeatures
from comet_meta.vision.statistics import FeatureScaler


class Block(nn.Module):
    """A 3 x 3 neighbourhood mixed into each position, as a residual.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, width, 1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, width, h, w) to the same."""
        changed: Tensor = self.out(F.gelu(self.mix(x)))
        return x + changed


class Reconstruction(nn.Module):
    """A bottleneck and a decoder that rebuild the levels of a frozen backbone.

    All levels are brought to the coarsest grid and squeezed to ``width`` channels, of which dropout
    hides some; a small convolutional decoder rebuilds each level on its own grid. Trained on normal
    pictures it can rebuild these alone. A position's score is the cosine distance between its
    features and what was rebuilt. The fine levels are hard to rebuild in any picture, so once
    training is over, :meth:`fit_scores` learns what is usual at each position of each level, and
    scores are standardised by it (:class:`~comet_examples.detectors.positions.PositionScaler`)
    before the mean over the levels is taken. A picture's score is the mean of its highest.

    It asks nothing of the levels but that the first has the finest grid: those of a ViT, all of one
    grid, will do.

    Features are brought to mean 0 and standard deviation 1 by channel over the training set.

    Args:
        channels: Number of each level's channels, finest first.
        map_size: Height and width of the anomaly maps, in pixels of the pictures.
        width: Channels of bottleneck and decoder.
        blocks: Depth of the decoder.
        dropout: Share of the bottleneck's values that training hides, in [0, 1).
        learning_rate: AdamW's.
        top: Positions that a picture's score is the mean of, >= 1.
        blur_sigma: Width of the Gaussian that smooths the maps, in pixels, >= 0.
    """

    extractor = PyramidFeatures

    def __init__(
        self,
        channels: Sequence[int],
        map_size: tuple[int, int],
        *,
        width: int = 64,
        blocks: int = 2,
        dropout: float = 0.2,
        learning_rate: float = 2e-3,
        top: int = 5,
        blur_sigma: float = 4.0,
    ) -> None:
        super().__init__()
        self.map_size = map_size
        self.learning_rate = learning_rate
        self.top = top
        self.blur_sigma = blur_sigma
        self.scaler = FeatureScaler(channels)
        self.usual = PositionScaler()
        self.bottleneck = nn.Sequential(
            nn.Conv2d(sum(channels), width, 1), nn.GELU(), nn.Dropout(dropout)
        )
        self.decoder = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.heads = nn.ModuleList(nn.Conv2d(width, count, 1) for count in channels)

    def fit_statistics(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Learn mean and standard deviation of each channel of each level.

        Args:
            batches: The training set's features, levels (B, C, h, w) each.
        """
        self.scaler.fit(batches)

    def losses(self, features: Sequence[Tensor], part_weights: Tensor | None = None) -> Tensor:
        """Mean cosine distance of each picture, over levels and positions.

        Args:
            features: Levels (B, C, h, w), finest first.
            part_weights: Weights of the pictures' patches, on any grid, (B, rows, columns); None
                where all count alike.

        Returns:
            Losses, shape (B,), in [0, 2].
        """
        distances = self.distances(features)
        if part_weights is not None:
            distances = [d * at_grid(part_weights, d.shape[-2:]).to(d) for d in distances]
        return torch.stack([d.mean(dim=(1, 2)) for d in distances]).mean(dim=0)

    def distances(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Cosine distances between the features and their reconstruction, by position.

        Args:
            features: Levels (B, C, h, w), finest first.

        Returns:
            Levels (B, h, w), in [0, 2].
        """
        scaled = self.scaler(features)
        return [
            1 - F.cosine_similarity(level, rebuilt, dim=1)
            for level, rebuilt in zip(scaled, self._rebuilt(scaled), strict=True)
        ]

    def fit_scores(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Learn which distances are usual at each position.

        Args:
            batches: The training set's features, levels (B, C, h, w) each.
        """
        self.usual.fit(on_finest_grid(self.distances(levels)) for levels in batches)

    def patch_scores(self, features: Sequence[Tensor]) -> Tensor:
        """The levels' standardised distances averaged on the finest grid, shape (B, h, w)."""
        scores: Tensor = self.usual(on_finest_grid(self.distances(features)))
        return scores.mean(dim=1)

    def scores(self, features: Sequence[Tensor]) -> Tensor:
        """Anomaly scores of the pictures: the mean of their highest, shape (B,)."""
        return image_scores(self.patch_scores(features), self.top)

    def maps(self, features: Sequence[Tensor]) -> Tensor:
        """Anomaly maps: the positions' scores, resized and smoothed, shape (B, H, W)."""
        return smooth_maps(self.patch_scores(features), self.map_size, self.blur_sigma)

    def optimizers(self) -> list[Optimizer]:
        """AdamW."""
        trained = [*self.bottleneck.parameters(), *self.decoder.parameters()]
        trained += self.heads.parameters()
        return [AdamW(trained, lr=self.learning_rate)]

    def _rebuilt(self, scaled: Sequence[Tensor]) -> list[Tensor]:
        """The levels, rebuilt from the coarsest grid."""
        height, width = scaled[-1].shape[-2:]
        together = torch.cat([F.adaptive_avg_pool2d(level, (height, width)) for level in scaled], 1)
        hidden = self.decoder(self.bottleneck(together))
        return [
            F.interpolate(head(hidden), size=level.shape[-2:], mode="bilinear")
            for head, level in zip(self.heads, scaled, strict=True)
        ]
