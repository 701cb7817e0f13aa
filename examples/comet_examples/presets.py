"""Picture size, epochs and detector settings that go with a backbone and a data set."""

from dataclasses import dataclass, field
from typing import Any

from comet_examples.backbones import PAPER_BACKBONE
from comet_examples.datasets import Transform


@dataclass(frozen=True)
class Preset:
    """Settings that belong together.

    Attributes:
        transform: Size of the pictures.
        epochs: Passes over the training set.
        detector: Keyword arguments of the detector.
    """

    transform: Transform
    epochs: int
    detector: dict[str, Any] = field(default_factory=dict)


def preset_for(backbone: str, dataset: str) -> Preset:
    """The settings for a backbone and a data set.

    ``wide_resnet50_2`` gets SimpleNet's published ones (329 / 288 pixels, 160 epochs, noise 0.015
    on raw features). Features of other backbones have other scales: they are standardised, with a
    noise of a quarter of a standard deviation. The solar cells are shown smaller and for fewer
    epochs, so that the demo ends within minutes on two CPU cores.

    Args:
        backbone: timm name.
        dataset: Name in ``DATASETS``.

    Returns:
        The settings. None of them was chosen by a test figure of the data set it is for.
    """
    if backbone == PAPER_BACKBONE:
        return Preset(Transform(329, 288), epochs=160)
    standardized = {"standardize": True, "noise_std": 0.25}
    if dataset == "elpv":
        return Preset(Transform(176), epochs=15, detector=standardized)
    return Preset(Transform(256, 256), epochs=40, detector=standardized)
