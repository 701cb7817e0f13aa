"""FastFlow: a 2-D normalizing flow on each level of a frozen feature pyramid.

Yu, Zheng, Wang, Li, Wu, Zhao, Wu: FastFlow, unsupervised anomaly detection and localization via 2D
normalizing flows, arXiv 2111.07677, 2021.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from typing_extensions import override

from comet_examples.detectors.maps import at_grid, image_scores, on_finest_grid, smooth_maps
from comet_examples.detectors.positions import PositionScaler
from comet_meta.vision.features import PyramidFeatures
from comet_meta.vision.statistics import FeatureScaler

_EXPOSED_SCORE = 2.0  # asked of an anomalous picture's strange positions


class Coupling(nn.Module):
    """An invertible step: shuffle the channels, then scale and shift half of them.

    The half that stays decides scale and shift of the other by a small convolutional network, so
    the Jacobian is triangular and the inverse exact. Log scales are bounded by ``clamp`` through a
    tanh. The network starts at 0, the step therefore as a mere shuffle.

    Args:
        channels: Number of channels of the features, >= 2.
        kernel_size: Side of the network's two convolutions, odd.
        hidden_ratio: Width of the network, as a multiple of its input's channels.
        clamp: Bound on the absolute log scale.

    Raises:
        ValueError: If there are fewer than two channels, so that no half can stay.
    """

    order: Tensor

    def __init__(
        self, channels: int, kernel_size: int, *, hidden_ratio: float = 1.0, clamp: float = 2.0
    ) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(
                f"a coupling splits its channels, so it needs 2 or more, not {channels}"
            )
        self.kept = channels // 2
        self.clamp = clamp
        hidden = max(1, round(hidden_ratio * self.kept))
        last = nn.Conv2d(hidden, 2 * (channels - self.kept), kernel_size, padding="same")
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)
        self.network = nn.Sequential(
            nn.Conv2d(self.kept, hidden, kernel_size, padding="same"), nn.ReLU(), last
        )
        self.register_buffer("order", torch.randperm(channels))

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features to latents.

        Args:
            x: Shape (B, C, h, w).

        Returns:
            Latents (B, C, h, w), and the log-determinant of the step by position, (B, h, w): their
            sum is that of the whole Jacobian.
        """
        kept, changed = x[:, self.order].split([self.kept, x.shape[1] - self.kept], dim=1)
        log_scale, shift = self._scale_and_shift(kept)
        return torch.cat([kept, changed * log_scale.exp() + shift], dim=1), log_scale.sum(dim=1)

    def inverse(self, z: Tensor) -> Tensor:
        """Latents to features: the exact inverse of ``forward``."""
        kept, changed = z.split([self.kept, z.shape[1] - self.kept], dim=1)
        log_scale, shift = self._scale_and_shift(kept)
        x = torch.cat([kept, (changed - shift) * (-log_scale).exp()], dim=1)
        return x[:, self.order.argsort()]

    def _scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.network(kept).chunk(2, dim=1)
        return self.clamp * (raw / self.clamp).tanh(), shift


class Flow(nn.Module):
    """Coupling steps in a row, with kernels 3 x 3 and 1 x 1 in turn.

    Args:
        channels: Number of channels of the features, >= 2.
        steps: How many.
        hidden_ratio: See :class:`Coupling`.
    """

    def __init__(self, channels: int, steps: int, *, hidden_ratio: float = 1.0) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(
            Coupling(channels, 3 if i % 2 == 0 else 1, hidden_ratio=hidden_ratio)
            for i in range(steps)
        )

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C, h, w) to latents (B, C, h, w) and log-determinants (B, h, w)."""
        log_determinant = x.new_zeros(len(x), *x.shape[2:])
        for coupling in self.couplings:
            x, change = coupling(x)
            log_determinant = log_determinant + change
        return x, log_determinant

    def inverse(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) to features (B, C, h, w)."""
        for coupling in reversed(self.couplings):
            z = coupling.inverse(z)  # type: ignore[operator]
        return z

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Log-density by position, in nats; their sum is that of the whole feature map.

        Args:
            x: Features, shape (B, C, h, w).

        Returns:
            Shape (B, h, w).
        """
        return _log_likelihood(*self(x))


def _log_likelihood(z: Tensor, log_determinant: Tensor) -> Tensor:
    normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)
    return normal + log_determinant


def _energy(z: Tensor) -> Tensor:
    """Half the mean square over the channels, (B, C, h, w) -> (B, h, w)."""
    return 0.5 * z.square().mean(dim=1)


class FastFlow(nn.Module):
    """The trained part of FastFlow: one flow for each level of a frozen backbone.

    The loss is the negative log-likelihood of a picture's features, in nats per feature value (a
    mean over all levels, channels and positions, so that one learning rate serves any backbone and
    picture size). A position's anomaly score is the negative log-density of its latent vector under
    the standard normal distribution, up to a constant and per channel; the levels' maps are resized
    and averaged. A picture's score is the mean of its highest. Once training is over,
    :meth:`fit_scores` learns what is usual at each position of the training pictures, and scores
    are standardised by it (:class:`~comet_examples.detectors.positions.PositionScaler`).

    Features are brought to mean 0 and standard deviation 1 by channel over the training set and
    kept so. (The authors' code learns this scale with the flow but leaves it out of the
    determinant, so that the likelihood can be raised by shrinking the features.)

    Args:
        channels: Number of each level's channels, finest first.
        map_size: Height and width of the anomaly maps, in pixels of the pictures.
        steps: Coupling steps of each flow.
        hidden_ratio: Width of the couplings' networks; the paper's 1.0 for WRN50 and ResNet18.
        learning_rate: Adam's; 1e-3 in the paper.
        exposed: Share of an anomalous picture's positions that show it, in (0, 1]; see
            :meth:`loss_pairs`.
        top: Positions that a picture's score is the mean of, >= 1; the paper has 1.
        blur_sigma: Width of the Gaussian that smooths the maps, in pixels, >= 0; none in the
            paper.
        standardize_scores: Whether scores are compared with those of the training pictures at the
            same position; they are not in the paper.
        noise_std: Standard deviation of the Gaussian noise that training adds to the standardised
            features, anew in every step, >= 0; none in the paper. The flow is then fitted to what
            lies around the training features too.

    Raises:
        ValueError: If ``noise_std`` is negative.
    """

    extractor = PyramidFeatures

    def __init__(
        self,
        channels: Sequence[int],
        map_size: tuple[int, int],
        *,
        steps: int = 8,
        hidden_ratio: float = 1.0,
        learning_rate: float = 1e-3,
        exposed: float = 0.1,
        top: int = 5,
        blur_sigma: float = 0.0,
        standardize_scores: bool = True,
        noise_std: float = 0.0,
    ) -> None:
        super().__init__()
        if not noise_std >= 0:
            raise ValueError(f"noise_std is {noise_std}; expected 0 (no noise) or more")
        self.map_size = map_size
        self.noise_std = noise_std
        self.learning_rate = learning_rate
        self.exposed = exposed
        self.top = top
        self.blur_sigma = blur_sigma
        self.standardize_scores = standardize_scores
        self.scaler = FeatureScaler(channels)
        self.usual = PositionScaler()
        self.flows = nn.ModuleList(
            Flow(width, steps, hidden_ratio=hidden_ratio) for width in channels
        )

    def fit_statistics(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Learn mean and standard deviation of each channel of each level.

        Args:
            batches: The training set's features, levels (B, C, h, w) each.
        """
        self.scaler.fit(batches)

    def losses(self, features: Sequence[Tensor], part_weights: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of each picture, in nats per feature value.

        Args:
            features: Levels (B, C, h, w), finest first.
            part_weights: Weights of the pictures' patches, on any grid, (B, rows, columns); None
                where all count alike.

        Returns:
            Losses, shape (B,).
        """
        return self._nats(self._latents(features), part_weights)

    def loss_pairs(self, features: Sequence[Tensor], part_weights: Tensor | None = None) -> Tensor:
        """Losses of pictures taken as normal, and taken as anomalous.

        Of an anomalous picture only a part shows it: the loss asks for a score (half a mean square,
        about 1/2 in normal pictures) of 2 or more at the positions with the highest.

        Args:
            features: Levels (B, C, h, w), finest first.
            part_weights: As in :meth:`losses`, for the pictures taken as normal.

        Returns:
            Losses, shape (2, B).
        """
        latents = self._latents(features)
        short = [self._shortfall(_energy(z).flatten(1)) for z, _ in latents]
        return torch.stack([self._nats(latents, part_weights), torch.stack(short).mean(dim=0)])

    def level_scores(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Anomaly scores by position.

        Args:
            features: Levels (B, C, h, w), finest first.

        Returns:
            Half the mean square of the latents, levels (B, h, w), >= 0.
        """
        return [_energy(z) for z, _ in self._latents(features)]

    def fit_scores(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Learn which scores are usual at each position; no effect without ``standardize_scores``.

        Args:
            batches: The training set's features, levels (B, C, h, w) each.
        """
        if self.standardize_scores:
            self.usual.fit(on_finest_grid(self.level_scores(levels)) for levels in batches)

    def patch_scores(self, features: Sequence[Tensor]) -> Tensor:
        """The levels' scores averaged on the finest level's grid, shape (B, h, w)."""
        scores: Tensor = self.usual(on_finest_grid(self.level_scores(features)))
        return scores.mean(dim=1)

    def scores(self, features: Sequence[Tensor]) -> Tensor:
        """Anomaly scores of the pictures: the mean of their highest, shape (B,)."""
        return image_scores(self.patch_scores(features), self.top)

    def maps(self, features: Sequence[Tensor]) -> Tensor:
        """Anomaly maps: the positions' scores, resized bilinearly, shape (B, H, W)."""
        return smooth_maps(self.patch_scores(features), self.map_size, self.blur_sigma)

    def _latents(self, features: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Latents (B, C, h, w) and log-determinants (B, h, w) of each level."""
        levels = self.scaler(features)
        if self.training and self.noise_std > 0:
            levels = [x + self.noise_std * torch.randn_like(x) for x in levels]
        return [flow(x) for flow, x in zip(self.flows, levels, strict=True)]

    def _shortfall(self, energies: Tensor) -> Tensor:
        """What the highest of a level's scores (B, h * w) lack to be an anomaly's, shape (B,)."""
        highest = energies.topk(max(1, round(self.exposed * energies.shape[1])), dim=1).values
        return F.relu(_EXPOSED_SCORE - highest).mean(dim=1)

    @staticmethod
    def _nats(latents: Sequence[tuple[Tensor, Tensor]], part_weights: Tensor | None) -> Tensor:
        nats = []
        for z, log_determinant in latents:
            of_position = -_log_likelihood(z, log_determinant)
            if part_weights is not None:
                grid = of_position.shape[-2:]
                of_position = of_position * at_grid(part_weights, grid).to(of_position)
            nats.append(of_position.sum(dim=(1, 2)))
        return torch.stack(nats).sum(dim=0) / sum(z[0].numel() for z, _ in latents)

    def optimizers(self) -> list[Optimizer]:
        """The paper's: Adam with weight decay 1e-5."""
        return [Adam(self.flows.parameters(), lr=self.learning_rate, weight_decay=1e-5)]
