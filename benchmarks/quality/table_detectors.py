"""The detectors of ``breadth.py``: small networks with a loss for each row of a table."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class AutoEncoder(nn.Module):
    """Reconstruction of rows (B, C); the loss is the mean squared error."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        dim = rows.shape[1]
        self.layers = nn.Sequential(
            *(nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, 8), nn.ReLU()),
            *(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, dim)),
        )

    def part_losses(self, rows: Tensor) -> Tensor:
        """Squared error of each value, (B, C)."""
        error: Tensor = (self.layers(rows) - rows).square()
        return error

    def losses(self, rows: Tensor) -> Tensor:
        """Mean squared error of each row, (B,)."""
        return self.part_losses(rows).mean(dim=1)


class DeepSVDD(nn.Module):
    """Distance of rows (B, C) to a fixed centre, in a network without biases (Ruff et al. 2018)."""

    centre: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(rows.shape[1], 64, bias=False),
            nn.LeakyReLU(0.1),
            nn.Linear(64, 32, bias=False),
        )
        with torch.no_grad():
            centre = self.layers(rows).mean(dim=0)
        self.register_buffer("centre", torch.where(centre.abs() < 0.1, 0.1, centre))

    def losses(self, rows: Tensor) -> Tensor:
        """Mean squared distance of each row, (B,)."""
        distance: Tensor = (self.layers(rows) - self.centre).square().mean(dim=1)
        return distance


class VAE(nn.Module):
    """Variational autoencoder of rows (B, C) with unit variance (Kingma, Welling 2014)."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        dim = rows.shape[1]
        self.encoder = nn.Sequential(nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, 2 * 8))
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, dim))

    def losses(self, rows: Tensor) -> Tensor:
        """Negative evidence lower bound of each row per value, up to a constant, >= 0, (B,).

        In eval mode the code is the mean of its distribution.
        """
        mean, log_variance = self.encoder(rows).chunk(2, dim=1)
        code = mean
        if self.training:
            code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        error = (self.decoder(code) - rows).square().sum(dim=1)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)
        bound: Tensor = (error + divergence) / (2 * rows.shape[1])
        return bound


Model = AutoEncoder | DeepSVDD | VAE
DETECTORS: dict[str, Callable[[Tensor], Model]] = {
    "autoencoder": AutoEncoder,
    "svdd": DeepSVDD,
    "vae": VAE,
}


def is_by_value(detector: str) -> bool:
    """Whether a detector's loss is a mean over the values of a row."""
    return DETECTORS[detector] is AutoEncoder
