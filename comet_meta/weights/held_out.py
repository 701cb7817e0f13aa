"""Suspects that training does without until the model, which hasn't seen them, can judge them."""

import math

import torch
from torch import Tensor

from comet_meta.weights.rules import iqr_threshold

_REFERENCE = 0.1
_LEAST_REFERENCE = 20
_FEWEST = 4  # a fence needs that many

TRAINED, REFERENCE, SUSPECT, LEFT_OUT = range(4)
"""What is done with a sample: trained on, held out to compare with, held out as a suspect, or left
out for good."""


def choose_held_out(prior: Tensor, fraction: float) -> Tensor:
    """Choose the suspects and the reference that they are compared with.

    1. The suspects are the fraction of the samples with the highest prior. Samples whose prior is
       that of the highest one below are none: equal samples share their part.
    2. The reference is every k-th of the others in the order of the prior: a tenth of them, or 20
       if that is more, but no more than a third.
    3. Without suspects, or with fewer than 4 samples to compare with, nothing is held out.

    Args:
        prior: Anomaly scores from another source than the model, shape (N,).
        fraction: Of the samples, in (0, 0.5].

    Returns:
        ``TRAINED``, ``REFERENCE`` or ``SUSPECT`` for each sample, int8 (N,).

    Example:
        >>> choose_held_out(torch.arange(15.0), 0.2).tolist()
        [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 2, 2, 2]
    """
    roles = torch.full(prior.shape, TRAINED, dtype=torch.int8)
    # 1)
    order = prior.argsort(stable=True)
    others = len(prior) - math.ceil(fraction * len(prior))
    suspects = prior > prior[order[others - 1]]
    # 2)
    trained = order[: len(order) - int(suspects.sum())]
    count = min(max(round(_REFERENCE * len(trained)), _LEAST_REFERENCE), len(trained) // 3)
    # 3)
    if count >= _FEWEST and len(trained) < len(order):
        roles[suspects] = SUSPECT
        every_kth = (torch.arange(count) + 0.5) * len(trained) / count
        roles[trained[every_kth.long()]] = REFERENCE
    return roles


def judge(roles: Tensor, scores: Tensor, kappa: float = 1.5) -> Tensor:
    """Let the model's scores decide which of the suspects are left out.

    A suspect is left out if its score is above the fence Q3 + kappa * IQR of the reference's
    scores. The model has been trained on neither, so they differ in nothing but the prior: a good
    suspect, be it rare, scores about like other good samples that the model hasn't seen.

    Args:
        roles: From :func:`choose_held_out`.
        scores: The model's anomaly scores, finite for suspects and reference, shape (N,).
        kappa: Width of the fence, >= 0.

    Returns:
        ``TRAINED`` or ``LEFT_OUT`` for each sample, int8 (N,).

    Example:
        >>> roles = torch.tensor([0, 1, 0, 1, 1, 0, 1, 2, 2], dtype=torch.int8)
        >>> scores = torch.tensor([0.1, 1.0, 0.1, 2.0, 3.0, 0.1, 4.0, 9.0, 5.0])
        >>> judge(roles, scores).tolist()  # the fence is 3.25 + 1.5 * 1.5
        [0, 0, 0, 0, 0, 0, 0, 3, 0]
    """
    fence = iqr_threshold(scores[roles == REFERENCE], kappa)
    left_out = (roles == SUSPECT) & (scores > fence)
    return torch.where(left_out, LEFT_OUT, TRAINED).to(torch.int8)
