"""Standardisation of frozen features, learned once from the training set."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override


class FeatureScaler(nn.Module):
    """Brings every channel to mean 0 and standard deviation 1 over the training set.

    A channel that is constant over the training set comes to 0 and keeps its unit, so that a test
    picture in which it moves doesn't drown all other channels.

    Args:
        channels: Number of each level's channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = list(channels)
        self.register_buffer("mean", torch.zeros(sum(channels)))
        self.register_buffer("std", torch.ones(sum(channels)))

    @torch.no_grad()
    def fit(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Learn mean and standard deviation of each channel.

        Args:
            batches: The training set's features, levels (B, C, h, w).

        Raises:
            ValueError: If the features have other channels.
        """
        positions, total, squares = torch.zeros(3, sum(self.channels), dtype=torch.float64)
        for levels in batches:
            self._check(levels)
            wide = [level.cpu().double() for level in levels]
            positions += torch.cat(
                [x.new_full((x.shape[1],), x.numel() / x.shape[1]) for x in wide]
            )
            total += torch.cat([x.sum(dim=(0, 2, 3)) for x in wide])
            squares += torch.cat([x.square().sum(dim=(0, 2, 3)) for x in wide])
        mean, power = total / positions, squares / positions
        variance = power - mean.square()
        # A smaller spread is rounding of the mean, not of the features.
        self.std.copy_(variance.sqrt().where(variance > 1e-12 * power, 1))
        self.mean.copy_(mean)

    @override
    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Scaled features, levels (B, C, h, w).

        Args:
            features: Levels (B, C, h, w).

        Raises:
            ValueError: If the features have other channels.
        """
        self._check(features)
        means, stds = self.mean.split(self.channels), self.std.split(self.channels)
        return [
            (level - mean[:, None, None]) / std[:, None, None]
            for level, mean, std in zip(features, means, stds, strict=True)
        ]

    def _check(self, features: Sequence[Tensor]) -> None:
        found = [level.shape[1] if level.dim() == 4 else None for level in features]
        if found != self.channels:
            raise ValueError(
                f"the features are levels of shape {[tuple(x.shape) for x in features]}; expected "
                f"(B, C, h, w) with C = {self.channels}"
            )
