"""A person who looks at sixty training samples, played by the known labels."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from comet_meta import choose_for_review, share_from_review

_LARGEST = 0.49  # what contamination= takes


def reviewed_share(prior: Tensor, bad: npt.NDArray[np.bool_]) -> float:
    """The share of bad samples that a look at sixty suggests.

    Args:
        prior: What ranks the samples, shape (N,).
        bad: Which of them are bad, shape (N,). Only those of the sixty are read.

    Returns:
        The estimate, in [0, 0.49].
    """
    look_at = choose_for_review(prior)
    return min(share_from_review(prior, look_at, bad[look_at.numpy()]).estimate, _LARGEST)
