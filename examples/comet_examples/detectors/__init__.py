"""Detectors by name. A new one is a module that fulfils :class:`Detector`, and a line here."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

from comet_examples.detectors.fastflow import FastFlow
from comet_examples.detectors.reconstruction import Reconstruction
from comet_examples.detectors.simplenet import SimpleNet
from comet_meta.vision.backbones import Backbone
from comet_meta.vision.features import FeatureExtractor


class Detector(Protocol):
    """What training and evaluation need of a detector, an ``nn.Module`` on frozen features.

    Features come as levels (B, C, h, w), finest first.
    """

    def fit_statistics(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Learn what must be known of the training set before training."""
        ...

    def losses(self, features: Sequence[Tensor], part_weights: Tensor | None = None) -> Tensor:
        """Per-sample training losses, shape (B,).

        ``part_weights`` (B, rows, columns), on any grid, multiply the losses of the pictures'
        patches before they are averaged; None where all count alike.
        """
        ...

    def scores(self, features: Sequence[Tensor]) -> Tensor:
        """Anomaly scores of the pictures, higher = more anomalous, shape (B,)."""
        ...

    def maps(self, features: Sequence[Tensor]) -> Tensor:
        """Anomaly maps in the pictures' size, shape (B, H, W)."""
        ...

    def optimizers(self) -> list[Optimizer]:
        """The optimizers of all trained parameters; they step together."""
        ...


@runtime_checkable
class Exposable(Protocol):
    """A detector that also learns from samples that are taken to be bad. Being one is optional."""

    def loss_pairs(self, features: Sequence[Tensor], part_weights: Tensor | None = None) -> Tensor:
        """Losses of the samples taken as normal, and taken as anomalous, shape (2, B)."""
        ...


@runtime_checkable
class ScoresFittable(Protocol):
    """A detector whose scores need the training set once more after training. Optional."""

    def fit_scores(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Learn from the trained detector's scores of the training set, given its features."""
        ...


class DetectorClass(Protocol):
    """Builds a detector: ``(channels, map_size, **options)``.

    ``channels`` are those of the levels, ``map_size`` is height and width of the anomaly maps in
    pixels.
    """

    @property
    def extractor(self) -> Callable[[Backbone], FeatureExtractor]:
        """Makes the detector's features from a backbone."""
        ...

    def __call__(self, *args: Any, **options: Any) -> Detector:
        """The untrained detector."""
        ...


DETECTORS: dict[str, DetectorClass] = {
    "fastflow": FastFlow,
    "reconstruction": Reconstruction,
    "simplenet": SimpleNet,
}

__all__ = [
    "DETECTORS",
    "Detector",
    "DetectorClass",
    "Exposable",
    "FastFlow",
    "Reconstruction",
    "ScoresFittable",
    "SimpleNet",
]
