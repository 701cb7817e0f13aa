"""A weighter that chooses when to refit, and what to."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import override

from comet_meta import SoftConfidentWeighter


class TimedWeighter(SoftConfidentWeighter):
    """Takes in an epoch's scores only when they are due.

    Until then the weights stay what they were: those of the prior, or 1 without one.

    Args:
        num_samples: Size N of the training set.
        start: Epoch of the first fit, >= 1; ``math.inf`` for never.
        every: Epochs from one fit to the next, >= 1.
        source: Makes the scores (N,) that take the place of those of the training loop.
        **options: Of :class:`~comet_meta.SoftConfidentWeighter`.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        start: float = 1,
        every: int = 1,
        source: Callable[[], Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_samples, **options)
        self.start = start
        self.every = every
        self.source = source
        self.epoch = 0

    @override
    def fit(self, scores: Tensor | None = None) -> None:
        """Fit to the scores (N,) of an epoch if they are due; to the prior without any."""
        if scores is None:
            super().fit()
            return
        self.epoch += 1
        if self.epoch >= self.start and (self.epoch - self.start) % self.every == 0:
            super().fit(scores if self.source is None else self.source())
