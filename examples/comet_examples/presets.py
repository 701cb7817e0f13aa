"""Picture size, epochs and detector settings that go with a detector and a backbone."""

from dataclasses import dataclass, field, replace
from typing import Any

from comet_examples.datasets import Transform
from comet_examples.training import Method, Schedule, TrainingSettings
from comet_meta.vision.backbones import DEFAULT_BACKBONE, PAPER_BACKBONE
from comet_meta.vision.images import SQUARE


@dataclass(frozen=True)
class Preset:
    """Settings that belong together.

    Attributes:
        transform: Size of square pictures.
        fits: Whether other pictures get as many pixels in their own shape; if not, ``transform``
            is for pictures of any shape.
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
    fits: bool = True

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

    def sized(self, transform: Transform) -> "Preset":
        """The same with a size for pictures of any shape.

        Args:
            transform: The size.
        """
        return replace(self, transform=transform, fits=False)


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


_PAPER_TRANSFORM = Transform(329, 288)
_PAPER_DETECTORS: dict[str, dict[str, Any]] = {
    "fastflow": {"steps": 8, "hidden_ratio": 1.0, "top": 1, "standardize_scores": False},
    "simplenet": {
        "adaptor": True,
        "learning_rate": 2e-4,
        "standardize": False,
        "noise_std": 0.015,
        "own_noise": 0.0,
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


def preset_for(detector: str, backbone: str) -> Preset:
    """The settings for a detector and a backbone, the same for every data set.

    ``wide_resnet50_2`` gets the paper's: 329 / 288 pixels, 160 epochs at constant learning rates,
    SimpleNet with noise 0.015 on raw features, FastFlow with 8 steps of hidden ratio 1. Any other
    backbone gets 256 x 256 pixels and a number of optimizer steps, over which the learning rates
    fall to 0 (cosine), and SimpleNet its own defaults; FastFlow is half the size (4 steps, hidden
    ratio 0.5). Pictures that aren't square get as many pixels in their own shape.

    Args:
        detector: Name in ``DETECTORS``.
        backbone: timm name.

    Returns:
        The settings. A detector that isn't known here gets the general ones.

    Example:
        >>> preset_for("fastflow", "wide_resnet50_2").detector
        {'steps': 8, 'hidden_ratio': 1.0, 'top': 1, 'standardize_scores': False}
        >>> preset_for("simplenet", "resnet18").steps
        2000
    """
    if backbone != PAPER_BACKBONE:
        return Preset(
            SQUARE,
            detector=_DEFAULT_DETECTORS.get(detector, {}),
            steps=_STEPS.get(detector, _STEPS_OF_OTHERS),
            schedule="cosine",
        )
    return Preset(_PAPER_TRANSFORM, epochs=160, detector=_PAPER_DETECTORS.get(detector, {}))
