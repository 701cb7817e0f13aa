"""One category with its features, on which methods are trained and judged."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comet_examples.bank import MemoryBank
from comet_examples.datasets import (
    Sample,
    Split,
    Survey,
    bad_samples,
    contaminate,
    load_mask,
    load_values,
    oracle,
    survey,
)
from comet_examples.detectors import DETECTORS, Detector
from comet_examples.metrics import image_metrics, pixel_metrics
from comet_examples.presets import Preset
from comet_examples.training import (
    FeatureRows,
    Training,
    TrainingSettings,
    Wrap,
    predict,
    train,
    wrap,
)
from comet_meta.vision.backbones import Backbone
from comet_meta.vision.features import FeatureStore

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judged:
    """Scores, maps and figures of the test set.

    Attributes:
        figures: Image metrics, and pixel metrics where there are masks; none where
            :func:`can_be_judged` denies it.
        scores: Those of the test pictures, shape (N,).
        maps: Those of the test pictures, shape (N, H, W).
    """

    figures: dict[str, float]
    scores: Tensor
    maps: Tensor


@dataclass(frozen=True)
class Outcome(Judged):
    """A trained detector and its figures on the test set.

    Attributes:
        training: The detector and the state of its training.
    """

    training: Training


class Experiment:
    """Features of a category's pictures, computed once for any number of trainings.

    Args:
        clean: The category as it is on disk.
        detector: Name in ``DETECTORS``.
        preset: Picture size and detector settings.
        backbone: Makes the frozen features.
        store: Keeps them.
        device: Where to train.
        surveyed: What is known of the pictures; by default they are all looked at first.

    Raises:
        DatasetError: If some of them can't be used; all of them are named.
    """

    def __init__(
        self,
        clean: Split,
        detector: str,
        preset: Preset,
        backbone: Backbone,
        store: FeatureStore,
        device: str,
        surveyed: Survey | None = None,
    ) -> None:
        surveyed = surveyed or survey(clean)
        surveyed.raise_faults()
        self.clean = clean
        transform = surveyed.fitted(preset.transform) if preset.fits else preset.transform
        self.preset = preset.sized(surveyed.scaled(transform))
        self.device = device
        self._detector = detector
        self._extractor = DETECTORS[detector].extractor(backbone)
        paths = [sample.path for sample in (*clean.train, *clean.test)]
        self._row_of = {path: row for row, path in enumerate(paths)}
        self._features = store.get(
            self._extractor,
            paths,
            partial(load_values, transform=self.preset.transform),
            transform_key=str(self.preset.transform),
            device=device,
        )
        height, width = load_values(paths[0], self.preset.transform).shape[-2:]
        self.map_size = (height, width)

    def split(self, noise: float, seed: int, *, overlap: bool = False) -> Split:
        """The category under the contamination protocol."""
        return contaminate(self.clean, noise, seed=seed, overlap=overlap)

    def run(
        self,
        split: Split,
        settings: TrainingSettings,
        *,
        checkpoint: Path | None = None,
        resume: bool = False,
        on_epoch: Callable[[int, dict[str, float]], None] | None = None,
        wrap: Wrap = wrap,
    ) -> Outcome:
        """Train one method on a split and judge it on the split's test set.

        Args:
            split: From :meth:`split`.
            settings: How to train; ``"oracle"`` leaves the bad training pictures out.
            checkpoint: File to write after every epoch.
            resume: Continue from it.
            on_epoch: Called after every epoch with its number, from 1, and its values.
            wrap: Makes the optimizer; by default the method's.

        Returns:
            The outcome of the last epoch.
        """
        samples = oracle(split).train if settings.method == "oracle" else split.train
        content = f"{[sample.path for sample in samples]} {self.preset} {self._detector}"
        content += self._extractor.fingerprint
        digest = hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()[:12]
        training = train(
            self.build,
            self.rows(samples),
            settings,
            device=self.device,
            checkpoint=checkpoint,
            identity=f"{split.category} with pictures and settings {digest}",
            resume=resume,
            on_epoch=on_epoch,
            wrap=wrap,
        )
        scores, maps = self.predict(training, split.test)
        return Outcome(self.judge(split, scores, maps), scores, maps, training)

    def bank(self, split: Split, seed: int) -> Judged:
        """What training is to be compared with: a memory of the split's training pictures.

        Args:
            split: From :meth:`split`.
            seed: Decides the memory's draw.

        Returns:
            The test set, judged by :class:`~comet_examples.bank.MemoryBank` on the detector's
            features, with as many patches in a picture's score as the detector has.
        """
        bank = MemoryBank(self.map_size, top=getattr(self.build(), "top", 1))
        bank.fit(self.rows(split.train), seed=seed)
        scores, maps = torch.empty(0), torch.empty(0, *self.map_size)
        if split.test:
            scores, maps = bank.to(self.device).predict(self.rows(split.test))
        return Judged(self.judge(split, scores, maps), scores, maps)

    def predict(self, training: Training, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Scores and maps of some of the category's pictures.

        Args:
            training: From :meth:`run`.
            samples: The pictures; there may be none.

        Returns:
            Scores (N,) and maps (N, H, W), on the CPU.
        """
        if not samples:
            return torch.empty(0), torch.empty(0, *self.map_size)
        return predict(training.detector, self.rows(samples), self.device)

    def judge(self, split: Split, scores: Tensor, maps: Tensor) -> dict[str, float]:
        """Figures of scores (N,) and maps (N, H, W) of a split's test set.

        Returns:
            Image metrics, and pixel metrics where there are masks; none where
            :func:`can_be_judged` denies it.
        """
        if not can_be_judged(split):
            return {}
        figures = image_metrics(scores, bad_samples(split.test))
        if split.has_masks:
            masks = torch.stack([load_mask(s, self.preset.transform) for s in split.test])
            if not masks.any():
                _LOGGER.warning(
                    "%s: no mask outlives the resizing: no pixel metrics", split.category
                )
                return figures
            figures |= pixel_metrics(maps, masks)
        return figures

    def build(self) -> Detector:
        """The untrained detector."""
        options: dict[str, Any] = self.preset.detector
        return DETECTORS[self._detector](self._extractor.channels, self.map_size, **options)

    def rows(self, samples: Sequence[Sample]) -> FeatureRows:
        """Features of some of the category's pictures."""
        rows = torch.tensor([self._row_of[sample.path] for sample in samples])
        return FeatureRows(self._features, rows)


def can_be_judged(split: Split) -> bool:
    """Whether its test set has normal and anomalous pictures, and all of them are known."""
    return {sample.label for sample in split.test} == {0, 1}
