"""Detectors by name. A new one is a module that fulfils :class:`Detector`, and a line here."""

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from comet_examples.detectors.simplenet import SimpleNet


class Detector(Protocol):
    """What training and evaluation need of a detector on frozen features (B, dim, h, w)."""

    def fit_statistics(self, batches: Iterable[Tensor]) -> None:
        """Learn what must be known of the training set before training."""
        ...

    def losses(self, features: Tensor) -> Tensor:
        """Per-sample training losses, shape (B,)."""
        ...

    def scores(self, features: Tensor) -> Tensor:
        """Anomaly scores of the pictures, higher = more anomalous, shape (B,)."""
        ...

    def maps(self, features: Tensor) -> Tensor:
        """Anomaly maps in the pictures' size, shape (B, H, W)."""
        ...

    def optimizers(self) -> list[Optimizer]:
        """The optimizers of all trained parameters; they step together."""
        ...


DETECTORS: dict[str, Callable[..., Detector]] = {
    "simplenet": SimpleNet,
}

__all__ = ["DETECTORS", "Detector", "SimpleNet"]
