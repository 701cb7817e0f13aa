"""Weights of given scores, and scores with one outlier."""

import torch

from comet_meta import SoftConfidentWeighter

NAMED = ("trimmed", "hard", "ratio")
OUTLIER = torch.tensor([1.0, 2.0, 1.5, 1.2, 9.0, 1.1, 1.7, 1.3, 1.6, 1.4])


def fitted(scores: torch.Tensor, rule: str = "trimmed", **settings: float) -> torch.Tensor:
    weighter = SoftConfidentWeighter(len(scores), rule=rule, **settings)
    weighter.fit(scores)
    return weighter()
