"""A person who looks at sixty training samples, played by the known labels."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from comet_meta import choose_for_review


def review_of(
    prior: Tensor,
    bad: npt.NDArray[np.bool_],
    mistakes: float = 0.0,
    seed: int = 0,
    looks: int = 60,
) -> tuple[Tensor, Tensor]:
    """What a person says who looks at some samples, as ``review=`` takes it.

    Args:
        prior: What ranks the samples, shape (N,).
        bad: Which of them are bad, shape (N,). Only those that are looked at are read.
        mistakes: Share of wrong answers, in [0, 1].
        seed: Decides which answers are wrong.
        looks: How many samples are looked at.

    Returns:
        Indices of these samples (all, if there are fewer), and whether each is said to be bad.
    """
    look_at = choose_for_review(prior, looks)
    said = torch.from_numpy(bad)[look_at]
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(look_at), generator=generator)[: round(mistakes * len(look_at))]
    said[wrong] = ~said[wrong]
    return look_at, said
