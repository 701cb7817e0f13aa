"""The trainings that the cost of a step is measured on."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from comet_examples.detectors import Detector
from comet_examples.detectors.fastflow import FastFlow
from comet_examples.detectors.simplenet import SimpleNet

BATCH = 8
NUM_SAMPLES = 64


@dataclass(frozen=True)
class Case:
    """A model with one batch to step on.

    Attributes:
        model: In training mode.
        optimizers: Its own.
        losses: Rows of the batch (R,) to losses (R,).
        index: Positions of the batch's samples in a data set of ``NUM_SAMPLES``, shape (B,).
    """

    model: nn.Module
    optimizers: list[Optimizer]
    losses: Callable[[Tensor], Tensor]
    index: Tensor


class ResNetAutoencoder(nn.Module):
    """ResNet-18 down to stride 32, and five upsampling convolutions back to the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm.create_model("resnet18", features_only=True, out_indices=(4,))
        widths = (512, 128, 64, 32, 16)
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(width, following, 3, padding=1, bias=False),
                nn.BatchNorm2d(following),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(widths[-1], 3, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions (B, 3, H, W) of pictures (B, 3, H, W)."""
        reconstructed: Tensor = self.decoder(self.encoder(images)[0])
        return reconstructed

    def losses(self, images: Tensor) -> Tensor:
        """Mean square error of each picture, shape (B,)."""
        return F.mse_loss(self(images), images, reduction="none").mean(dim=(1, 2, 3))


def simplenet(device: torch.device) -> Case:
    """SimpleNet's head at the paper's sizes, on 100 cached patch features a picture."""
    head = SimpleNet([1536], (288, 288), hidden=1024, patches=None, noise_std=0.5, own_noise=0.0)
    return _detector(head, [torch.randn(BATCH, 1536, 10, 10)], device)


def fastflow(device: torch.device) -> Case:
    """FastFlow, 8 steps of hidden ratio 1, on the levels of lite0 for pictures of 256 x 256."""
    flow = FastFlow([40, 112], (256, 256), steps=8, hidden_ratio=1.0)
    return _detector(
        flow, [torch.randn(BATCH, 40, 32, 32), torch.randn(BATCH, 112, 16, 16)], device
    )


def autoencoder(device: torch.device) -> Case:
    """A ResNet-18 autoencoder, trained end to end on pictures of 96 x 96."""
    model = ResNetAutoencoder().to(device)
    images = torch.randn(BATCH, 3, 96, 96, device=device)
    return Case(
        model,
        [AdamW(model.parameters(), lr=1e-4)],
        lambda rows: model.losses(images[rows]),
        torch.arange(BATCH, device=device),
    )


def tiny(device: torch.device) -> Case:
    """A network so small that a step is nothing but fixed cost."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).to(device)
    data = torch.randn(BATCH, 16, device=device)
    return Case(
        model,
        [AdamW(model.parameters(), lr=1e-4)],
        lambda rows: (model(data[rows]) - data[rows]).square().mean(dim=1),
        torch.arange(BATCH, device=device),
    )


CASES: dict[str, Callable[[torch.device], Case]] = {
    "simplenet": simplenet,
    "fastflow": fastflow,
    "autoencoder": autoencoder,
    "tiny": tiny,
}


def _detector(detector: Detector, features: list[Tensor], device: torch.device) -> Case:
    model = cast("nn.Module", detector).to(device)
    batch = [level.to(device) for level in features]
    return Case(
        model,
        detector.optimizers(),
        lambda rows: detector.losses([level[rows] for level in batch]),
        torch.arange(BATCH, device=device),
    )
