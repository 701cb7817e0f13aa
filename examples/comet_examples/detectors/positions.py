"""Scores of positions, compared with what is usual there."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

_FEWEST = 20  # pictures: a quartile of fewer rests on less than five of them


class PositionScaler(nn.Module):
    """Standardises a trained detector's scores by what is usual at their position.

    A seam, a print or the finest level of a backbone is hard to model in every picture: its scores
    are high in all of them, and hide smaller ones that are rare where they are. The steps, over the
    training pictures:

    1. Take the median of the scores at each position of each level.
    2. Take the interquartile range at each position, and add the level's mean of it: a position
       that never changes then doesn't drown all others.
    3. A score becomes (score - median) / range.

    Medians and quartiles stay where they are when less than a quarter of the pictures are bad at
    the same position. Before :meth:`fit`, and after a fit to fewer than 20 pictures, scores are
    returned as they are.

    Example:
        >>> train = torch.arange(21.0).reshape(21, 1, 1, 1)
        >>> scaler = PositionScaler()
        >>> scaler.fit([train[:16], train[16:]])  # median 10, range 10 there and 10 in the mean
        >>> scaler(torch.tensor([10.0, 50.0]).reshape(2, 1, 1, 1)).squeeze().tolist()
        [0.0, 2.0]
    """

    median: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("median", torch.empty(0))
        self.register_buffer("spread", torch.empty(0))

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Learn median and spread at each position.

        Args:
            batches: Scores of the training pictures, (B, L, h, w). One that isn't finite is left
                out; a position without a finite one has median 0 and the spread of its level.
        """
        scores = torch.cat([batch.float().cpu() for batch in batches])
        if len(scores) < _FEWEST:
            self.median, self.spread = self.median.new_empty(0), self.spread.new_empty(0)
            return
        scores = scores.where(scores.isfinite(), torch.nan)
        at = torch.tensor([0.25, 0.5, 0.75])
        # By rows of the grid, because torch's quantiles take so many values at a time.
        rows = [torch.nanquantile(row, at, dim=0) for row in scores.flatten(1, 2).unbind(dim=1)]
        low, middle, high = torch.stack(rows, dim=1).unflatten(1, scores.shape[1:3])
        there = (high - low).nan_to_num(0)
        spread = there + there.mean(dim=(1, 2), keepdim=True)
        self.median = middle.nan_to_num(0).to(self.median)
        self.spread = spread.where(spread > 0, 1).to(self.spread)

    @override
    def forward(self, scores: Tensor) -> Tensor:
        """Standardised scores, of any sign.

        Args:
            scores: Shape (B, L, h, w).

        Returns:
            Shape (B, L, h, w).
        """
        if self.median.numel() == 0:
            return scores
        return (scores - self.median) / self.spread

    @override
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        # The saved shape is that of the pictures that the detector was trained on.
        for name in ("median", "spread"):
            if (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)
