"""SimpleNet: a discriminator between adapted features and the same features with noise.

Liu, Zhou, Xu, Wang: SimpleNet, a simple network for image anomaly detection and localization,
CVPR 2023.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from comet_examples.detectors.maps import at_grid, image_scores, smooth_maps
from comet_meta.vision.features import PatchFeatures
from comet_meta.vision.statistics import FeatureScaler


class SimpleNet(nn.Module):
    """The trained part of SimpleNet, on frozen patch features.

    Gaussian noise on the features stands in for anomalies; a discriminator with a hinge loss learns
    D > margin on the features and D < -margin on the noisy ones. The anomaly score of a patch is
    -D, of a picture the mean of the highest of its patches. Score pictures in eval mode (batch
    norm).

    The noise must fit the scale of the features. By default every channel is brought to mean 0 and
    standard deviation 1 over the training set (:meth:`fit_statistics`), so that a noise of 1 is a
    standard deviation whatever the backbone. It must fit their directions too: channels go
    together, and noise that is independent in each of them leaves the features' own directions,
    where it is easily told and says little of anomalies. So by default most of the noise is a
    difference of two other patches, which varies as the features do, and a little of it is
    independent. In the paper all of it is.

    In the paper a linear adaptor maps the features first. It is trained with the discriminator and
    can scale the features up against the noise; scores on a texture were worse with it, so there is
    none by default. The defaults suit small backbones and CPUs; the paper, with raw WRN50 features,
    has ``adaptor=True, learning_rate=2e-4, standardize=False, noise_std=0.015, own_noise=0.0,
    hidden=1024, patches=None, top=1``.

    Args:
        channels: Width of the features, a single level: ``[dim]``.
        map_size: Height and width of the anomaly maps, in pixels of the pictures.
        hidden: Width of the discriminator.
        noise_std: Standard deviation of the independent noise on the (adapted) features, > 0.
        own_noise: How large the noise is that varies as the features do, in their own standard
            deviations, >= 0: the difference of two patches of the batch, drawn at random, times
            this and divided by the root of 2. So a picture's loss depends on the others of its
            batch, also on those of weight 0.
        adaptor: Whether a trained linear map comes first.
        learning_rate: The discriminator's; the adaptor has half of it, as in the paper.
        margin: The hinge loss's, > 0.
        standardize: Whether features are standardised first.
        pool: Positions of the features, in either direction, that are averaged to a patch, >= 1.
            More than 1 suits defects that are large against the features' stride.
        patches: Patches of a picture that a loss looks at, drawn anew each time; None for all.
        exposed: Share of an anomalous picture's patches that show it, in (0, 1]; see
            :meth:`loss_pairs`.
        top: Patch scores that a picture's score is the mean of, >= 1.
        blur_sigma: Width of the Gaussian that smooths the maps, in pixels, >= 0.
    """

    extractor = PatchFeatures

    def __init__(
        self,
        channels: Sequence[int],
        map_size: tuple[int, int],
        *,
        hidden: int = 256,
        noise_std: float = 0.3,
        own_noise: float = 0.7,
        adaptor: bool = False,
        learning_rate: float = 1e-3,
        margin: float = 0.5,
        standardize: bool = True,
        pool: int = 1,
        patches: int | None = 96,
        exposed: float = 0.1,
        top: int = 5,
        blur_sigma: float = 4.0,
    ) -> None:
        super().__init__()
        (dim,) = channels
        self.map_size = map_size
        self.noise_std = noise_std
        self.own_noise = own_noise
        self.margin = margin
        self.standardize = standardize
        self.pool = pool
        self.patches = patches
        self.exposed = exposed
        self.top = top
        self.blur_sigma = blur_sigma
        self.scaler = FeatureScaler([dim])
        self.learning_rate = learning_rate
        self.adaptor = nn.Linear(dim, dim) if adaptor else nn.Identity()
        self.discriminator = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(hidden, 1, bias=False),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)

    def fit_statistics(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Learn mean and standard deviation of each channel; no effect without ``standardize``.

        Args:
            batches: The training set's features, one level (B, dim, h, w).
        """
        if self.standardize:
            self.scaler.fit(batches)

    def losses(self, features: Sequence[Tensor], part_weights: Tensor | None = None) -> Tensor:
        """Mean hinge loss over patches of each picture.

        Args:
            features: Patch features, one level (B, dim, h, w).
            part_weights: Weights of the pictures' patches, on any grid, (B, rows, columns); None
                where all count alike.

        Returns:
            Losses, shape (B,), >= 0.
        """
        real, fake, weights = self._confidence(features, part_weights)
        return self._hinge(real, fake, weights)

    def loss_pairs(self, features: Sequence[Tensor], part_weights: Tensor | None = None) -> Tensor:
        """Losses of pictures taken as normal, and taken as anomalous.

        Of an anomalous picture only a part shows it: the loss asks for D < -margin on the
        most anomalous of its patches, as if they were noise.

        Args:
            features: Patch features, one level (B, dim, h, w).
            part_weights: As in :meth:`losses`, for the pictures taken as normal.

        Returns:
            Losses, shape (2, B), >= 0.
        """
        real, fake, weights = self._confidence(features, part_weights)
        worst = real.topk(max(1, round(self.exposed * real.shape[1])), dim=1, largest=False).values
        anomalous = F.relu(self.margin + worst).mean(dim=1)
        return torch.stack([self._hinge(real, fake, weights), anomalous])

    def patch_scores(self, features: Sequence[Tensor]) -> Tensor:
        """Anomaly scores of the patches.

        Args:
            features: Patch features, one level (B, dim, h, w).

        Returns:
            Scores, higher = more anomalous, any sign, shape (B, h, w).
        """
        confidence = self.discriminator(self._adapted(features))
        height, width = (side // self.pool for side in features[0].shape[-2:])
        return -confidence.reshape(-1, height, width)

    def scores(self, features: Sequence[Tensor]) -> Tensor:
        """Anomaly scores of the pictures: the mean of their highest patch scores.

        Args:
            features: Patch features, one level (B, dim, h, w).

        Returns:
            Scores, shape (B,).
        """
        return image_scores(self.patch_scores(features), self.top)

    def maps(self, features: Sequence[Tensor]) -> Tensor:
        """Anomaly maps: the patches' scores, resized bilinearly and smoothed.

        Args:
            features: Patch features, one level (B, dim, h, w).

        Returns:
            Maps, shape (B, H, W).
        """
        return smooth_maps(self.patch_scores(features), self.map_size, self.blur_sigma)

    def optimizers(self) -> list[Optimizer]:
        """Adam for the discriminator and, where there is one, AdamW for the adaptor."""
        adam = Adam(self.discriminator.parameters(), lr=self.learning_rate, weight_decay=1e-5)
        if isinstance(self.adaptor, nn.Identity):
            return [adam]
        return [AdamW(self.adaptor.parameters(), lr=self.learning_rate / 2), adam]

    def _confidence(
        self, features: Sequence[Tensor], part_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """D of patches, of the same with noise, and the patches' weights, (B, patches) each."""
        (level,) = features
        grid = [side // self.pool for side in level.shape[-2:]]
        drawn = self._drawn(grid[0] * grid[1], level.device)
        adapted = self._adapted(features, drawn)
        noisy = adapted + self._noise(adapted)
        # Both halves in one batch, so that batch norm can't tell them apart by their statistics.
        confidence: Tensor = self.discriminator(torch.cat([adapted, noisy]))
        real, fake = confidence.reshape(2, len(level), -1)
        if part_weights is None:
            return real, fake, None
        weights = at_grid(part_weights, grid).flatten(1).to(real)
        return real, fake, weights if drawn is None else weights[:, drawn]

    def _noise(self, adapted: Tensor) -> Tensor:
        """Noise for adapted features (M, dim): independent, and as the features vary."""
        noise = self.noise_std * torch.randn_like(adapted)
        if self.own_noise == 0:
            return noise
        one, other = (torch.randperm(len(adapted), device=adapted.device) for _ in range(2))
        # A patch that isn't finite makes no other patch so.
        varied = adapted.detach().nan_to_num(0, 0, 0)
        # The difference of two has twice the variance of one.
        return noise + self.own_noise / math.sqrt(2) * (varied[one] - varied[other])

    def _drawn(self, count: int, device: torch.device) -> Tensor | None:
        """The positions that a loss looks at; None for all of ``count``."""
        if self.patches is None or self.patches >= count:
            return None
        return torch.randperm(count, device=device)[: self.patches]

    def _hinge(self, real: Tensor, fake: Tensor, weights: Tensor | None) -> Tensor:
        losses = F.relu(self.margin - real) + F.relu(self.margin + fake)
        return (losses if weights is None else weights * losses).mean(dim=1)

    def _adapted(self, features: Sequence[Tensor], drawn: Tensor | None = None) -> Tensor:
        """Adapted features of all patches, (B * h * w, dim), or of some positions."""
        (level,) = features
        # A window of 1 changes nothing, but would take more than a third of a step.
        pooled = level if self.pool == 1 else F.avg_pool2d(level, self.pool)
        positions = pooled.flatten(2)
        if drawn is not None:
            positions = positions[..., drawn]
        # Scaled last: only a few of the positions may be left. Without standardisation the scaler
        # is the identity that checks the shape.
        (scaled,) = self.scaler([positions.unsqueeze(-1)])
        positions = scaled.squeeze(-1)
        adapted: Tensor = self.adaptor(positions.transpose(1, 2).flatten(0, 1))
        return adapted
