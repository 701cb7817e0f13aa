"""A person who looks at sixty training samples, played by the known labels."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from comet_meta import choose_for_review


def review_of(prior: Tensor, bad: npt.NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """What a person says who looks at sixty samples, as ``review=`` takes it.

    Args:
        prior: What ranks the samples, shape (N,).
        bad: Which of them are bad, shape (N,). Only those of the sixty are read.

    Returns:
        Indices of the sixty (all, if there are fewer), and whether each is bad.
    """
    look_at = choose_for_review(prior)
    return look_at, torch.from_numpy(bad)[look_at]
