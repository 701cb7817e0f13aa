"""Picture size, epochs and detector settings that go with a detector, a backbone and a data set."""

from dataclasses import dataclass, field, replace
from typing import Any

from comet_examples.datasets import Transform
from comet_examples.training import Method, Schedule, TrainingSettings
from comet_meta.vision.backbones import DEFAULT_BACKBONE, PAPER_BACKBONE


@dataclass(frozen=True)
class Preset:
    """Settings that belong together.

    Attributes:
        transform: Size of the pictures.
        epochs: Passes over the training set; None where ``steps`` says the length.
        detector: Keyword arguments of the detector that differ from its own defaults.
        steps: Optimizer steps, in place of ``epochs``.
        schedule: How the learning rates change.
    """

    transform: Transform
    epochs: int | None = None
    detector: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    schedule: Schedule = "constant"

    def training(self, method: Method, **options: Any) -> TrainingSettings:
        """Settings of a training of this length and schedule.

        Args:
            method: What is trained.
            options: Other settings, such as ``seed``.

        Example:
            >>> Preset(Transform(256), steps=1000).training("plain", seed=1).steps
            1000
        """
        return TrainingSettings(
            method, self.epochs, steps=self.steps, schedule=self.schedule, **options
        )

    def lasting(self, *, epochs: int | None = None, steps: int | None = None) -> "Preset":
        """The same of another length, where one is given.

        Args:
            epochs: Passes over the training set.
            steps: Optimizer steps, in place of ``epochs``.
        """
        if epochs is None and steps is None:
            return self
        return replace(self, epochs=epochs, steps=steps)


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
    "fastflow": {"steps": 8, "hidden_ratio": 1.0, "top": 1, "standardize_scores": False},
    "simplenet": {
        "adaptor": True,
        "learning_rate": 2e-4,
        "standardize": False,
        "noise_std": 0.015,
        "hidden": 1024,
        "patches": None,
        "top": 1,
    },
}
# Half a flow in every direction, for two CPU cores.
_DEFAULT_DETECTORS: dict[str, dict[str, Any]] = {
    "fastflow": {"steps": 4, "hidden_ratio": 0.5},
}
# Optimizer steps at the detectors' own learning rates and batches of 8; the same for any number of
# pictures, so that a small set isn't trained less than a large one.
_STEPS = {"fastflow": 400, "reconstruction": 500, "simplenet": 2000}
_STEPS_OF_OTHERS = 1000
# Sizes follow the pictures' shape: nothing else is chosen by data set.
_DEFAULT_TRANSFORM = Transform(256, 256)
_DEFAULT_TRANSFORMS = {
    "elpv": Transform(176),  # square already, and the demo ends within minutes on two CPU cores
    "folder": _whole(256, 256),
    "ksdd2": _whole(352, 128),
    "viaduct": Transform(256),  # the pictures of a class have one size
}


def preset_for(detector: str, backbone: str, dataset: str) -> Preset:
    """The settings for a detector, a backbone and a data set.

    ``wide_resnet50_2`` gets the paper's: 329 / 288 pixels (KSDD2: 480 x 176), 160 epochs at
    constant learning rates, SimpleNet with noise 0.015 on raw features, FastFlow with 8 steps of
    hidden ratio 1. Any other backbone gets moderate sizes and a number of optimizer steps, over
    which the learning rates fall to 0 (cosine), and SimpleNet its own defaults; FastFlow is half
    the size (4 steps, hidden ratio 0.5).

    Args:
        detector: Name in ``DETECTORS``.
        backbone: timm name.
        dataset: Name in ``DATASETS``; only the pictures' size follows from it.

    Returns:
        The settings. A detector or data set that isn't known here gets the general ones.

    Example:
        >>> preset_for("fastflow", "wide_resnet50_2", "mvtec").detector
        {'steps': 8, 'hidden_ratio': 1.0, 'top': 1, 'standardize_scores': False}
        >>> preset_for("simplenet", "resnet18", "viaduct").steps
        2000
    """
    if backbone != PAPER_BACKBONE:
        return Preset(
            _DEFAULT_TRANSFORMS.get(dataset, _DEFAULT_TRANSFORM),
            detector=_DEFAULT_DETECTORS.get(detector, {}),
            steps=_STEPS.get(detector, _STEPS_OF_OTHERS),
            schedule="cosine",
        )
    transform = _PAPER_TRANSFORMS.get(dataset, _PAPER_TRANSFORM)
    return Preset(transform, epochs=160, detector=_PAPER_DETECTORS.get(detector, {}))
