"""TensorBoard logs of a training: scalars of every epoch as it ends, figures and pictures last."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class TensorBoardLog:
    """Writes the log of one training. The package ``tensorboard`` must be installed.

    Args:
        folder: Where the log goes; TensorBoard names the run by it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._last = 0

    def epoch(self, number: int, values: Mapping[str, float]) -> None:
        """Log an epoch.

        Args:
            number: Its number, from 1. Where the folder has a log already, what that says from
                here on is discarded: it is of a training that was stopped.
            values: Scalars by name.
        """
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=number)
        self._last = number
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, number)
        self._writer.flush()

    def finish(
        self,
        figures: Mapping[str, float],
        histograms: Mapping[str, Tensor],
        pictures: Sequence[Path],
    ) -> None:
        """Log the outcome and close the log.

        Args:
            figures: Scalars by name.
            histograms: Values by name, of any shapes.
            pictures: Files; each is logged under its name.
        """
        if self._writer is None:  # nothing was left to train
            self._writer = SummaryWriter(str(self._folder))
        for name, value in figures.items():
            self._writer.add_scalar(f"outcome/{name}", value, self._last)
        for name, values in histograms.items():
            self._writer.add_histogram(name, values, self._last)
        for file in pictures:
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(file.stem, pixels, self._last, dataformats="HWC")
        self._writer.close()
