"""A weighter that waits for its first fit, and may take its scores from elsewhere."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import override

from comet_meta import SoftConfidentWeighter
from comet_meta.arrays import ArrayLike


class TimedWeighter(SoftConfidentWeighter):
    """Keeps its weights until the epoch of its first fit.

    Args:
        num_samples: Size N of the training set.
        start: Epoch of the first fit, >= 1; ``math.inf`` for never.
        source: Makes the scores (N,) that take the place of those of the training loop.
        **options: Those of :class:`~comet_meta.SoftConfidentWeighter`.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        start: float = 1,
        source: Callable[[], Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_samples, **options)
        self.start = start
        self.source = source
        self.epoch = 0

    @override
    def fit(self, scores: ArrayLike | None = None) -> None:
        """Fit to the scores (N,) of an epoch, from epoch ``start`` on."""
        self.epoch += 1
        if self.epoch >= self.start:
            super().fit(scores if self.source is None else self.source())
