"""Suspects that training does without until the model, which hasn't seen them, can judge them."""

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from comet_meta.weights.rules import MAX_LEFT_OUT, iqr_threshold, left_out

_REFERENCE = 0.1
_LEAST_REFERENCE = 40
_FEWEST = 100  # of fewer samples, the quartiles of the reference vary too much for a fence

TRAINED, REFERENCE, SUSPECT = range(3)
"""What a sample is for: to train on, held out to compare with, or held out as a suspect."""


def choose_held_out(prior: Tensor, fraction: float) -> Tensor:
    """Choose the suspects and the reference that they are compared with.

    1. The suspects are the fraction of the samples with the highest prior. Samples whose prior is
       that of the highest one below are none: equal samples share their part.
    2. The reference is every k-th of the others in the order of the prior: a tenth of them, or 40
       if that is more, but no more than a third.
    3. Where there are no suspects, or fewer than 100 samples, nothing is held out.

    Args:
        prior: Anomaly scores from another source than the model, shape (N,).
        fraction: Fraction of the samples, in (0, 0.5].

    Returns:
        ``TRAINED``, ``REFERENCE`` or ``SUSPECT`` for each sample, int8 (N,).

    Example:
        >>> roles = choose_held_out(torch.arange(100.0), 0.2)
        >>> roles[:4].tolist(), roles[-4:].tolist(), roles.bincount().tolist()
        ([0, 1, 0, 0], [2, 2, 2, 2], [54, 26, 20])
        >>> choose_held_out(torch.arange(99.0), 0.2).bincount().tolist()
        [99]
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
    if len(prior) >= _FEWEST and len(trained) < len(order):
        roles[suspects] = SUSPECT
        every_kth = (torch.arange(count) + 0.5) * len(trained) / count
        roles[trained[every_kth.long()]] = REFERENCE
    return roles


def judge(roles: Tensor, scores: Tensor, kappa: float = 1.5) -> Tensor:
    """Let the model's scores decide how far the suspects come back.

    1. Q3 and IQR are those of the reference's scores. The model has been trained on neither
       reference nor suspects, so a good suspect should score much like the reference. One of a kind
       of its own doesn't, where all of its kind are suspects.
    2. A suspect's weight is 1 up to the inner fence Q3 + kappa * IQR and falls to 0 at the outer
       fence Q3 + 2 kappa * IQR, as Tukey has them with kappa = 1.5. All others have weight 1.

    Args:
        roles: From :func:`choose_held_out`.
        scores: The model's anomaly scores, finite for suspects and reference, shape (N,).
        kappa: Width of the fences, >= 0.

    Returns:
        Weights in [0, 1], shape (N,).

    Example:
        >>> roles = torch.tensor([0, 1, 1, 1, 1, 1, 2, 2, 2], dtype=torch.int8)
        >>> scores = torch.tensor([0.1, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0])
        >>> judge(roles, scores)[6:].tolist()  # the fences are 3 + 1.5 * 2 and 3 + 3 * 2
        [1.0, 0.5, 0.0]
    """
    # 1)
    reference = scores[roles == REFERENCE]
    inner, outer = iqr_threshold(reference, kappa), iqr_threshold(reference, 2 * kappa)
    # 2)
    falling = ((outer - scores) / (outer - inner)).clamp(0, 1)
    trusted = (roles != SUSPECT) | (scores <= inner)
    return torch.where(trusted, 1.0, falling.nan_to_num(0.0))


def leave_out_more(weights: Tensor, roles: Tensor, ranking: Tensor) -> Tensor:
    """Leave out samples besides the rejected suspects: the more, the more of these were rejected.

    The suspects aren't all bad samples: no prior finds all of them, and the model rejects only
    those that it finds far stranger than others. So further bad ones are left, most of them high in
    the ranking.

    1. r is the rejected part of the suspects: the mean of 1 - w.
    2. For each rejected one, r of another sample is left out besides: a fifth as many where the
       model rejects a fifth of the suspects, as many again where it rejects all of them. In all no
       more than half of the samples are left out.
    3. These are the samples with the highest ranking of those that were not rejected, with the ramp
       of step 3 of :func:`~comet_meta.weights.rules.trimmed_weights`.

    Args:
        weights: From :func:`judge`, shape (N,).
        roles: From :func:`choose_held_out`, shape (N,).
        ranking: Scores of prior and model together, finite, shape (N,).

    Returns:
        Weights in [0, 1], no larger than the given ones, shape (N,).

    Example:
        >>> roles = torch.tensor([TRAINED] * 16 + [SUSPECT] * 4)
        >>> weights = torch.tensor([1.0] * 18 + [0.0] * 2)  # r = 1/2: one more is left out
        >>> more = leave_out_more(weights, roles, torch.arange(20.0))
        >>> more[14:].tolist(), round(float((1 - more).sum()), 6)
        ([1.0, 1.0, 0.9375, 0.0625, 0.0, 0.0], 3.0)
    """
    more = weights.clone()
    # 1)
    suspects = int((roles == SUSPECT).sum())
    rejected = float((1 - weights[roles == SUSPECT]).sum())
    rate = rejected / max(suspects, 1)
    # 2)
    count = min(rate * rejected, MAX_LEFT_OUT * len(weights) - rejected)
    # 3)
    kept = weights > 0
    if count > 0:
        more[kept] *= 1 - left_out(ranking[kept], count / int(kept.sum()))
    return more


class HeldOut(nn.Module):
    """What is held out of a training, and what the model makes of it.

    1. Suspects and reference are chosen by the prior and have weight 0.
    2. The model judges once: the suspects that it doesn't reject come back, and so does the
       reference.
    3. The more suspects it rejects, the more of the ranking is left out besides.

    Args:
        prior: Anomaly scores from another source than the model, shape (N,).
        fraction: Fraction of the samples that are suspects, in (0, 0.5].

    Attributes:
        roles: ``TRAINED``, ``REFERENCE`` or ``SUSPECT`` for each sample, int8 (N,); all
            ``TRAINED`` after the judgement.
        weights: Factor of each sample's weight, shape (N,), in [0, 1].
        rejected: Number of suspects that the model has rejected, shape ().

    Example:
        >>> held_out = HeldOut(torch.arange(100.0), 0.2)
        >>> int((held_out.weights == 0).sum()), held_out.waits
        (46, True)
        >>> scores = torch.arange(100.0) % 10
        >>> held_out.judge(scores, ranking=scores)
        >>> int((held_out.weights == 0).sum()), held_out.waits
        (0, False)
    """

    roles: Tensor
    weights: Tensor
    rejected: Tensor

    def __init__(self, prior: Tensor, fraction: float) -> None:
        super().__init__()
        self.fraction = fraction
        self.register_buffer("roles", torch.zeros(prior.shape, dtype=torch.int8))
        self.register_buffer("weights", torch.ones(prior.shape))
        self.register_buffer("rejected", torch.tensor(0))
        self.begin(prior)

    def begin(self, prior: Tensor) -> None:
        """Hold out for a training from the beginning (step 1).

        Args:
            prior: As for the constructor.
        """
        # 1)
        self.roles.copy_(choose_held_out(prior, self.fraction))
        self.weights.copy_(self.roles == TRAINED)
        self.rejected.zero_()

    @property
    def waits(self) -> bool:
        """Whether samples are held out that the model has yet to judge."""
        return bool((self.roles == SUSPECT).any())

    def judge(self, scores: Tensor, ranking: Tensor, kappa: float = 1.5) -> None:
        """Let the model judge (steps 2 and 3), if it has scores of all that is held out.

        Args:
            scores: The model's anomaly scores, NaN for a sample without one, shape (N,).
            ranking: Scores of prior and model together, finite, shape (N,).
            kappa: Width of the fences, >= 0.
        """
        if not self.waits or bool(scores[self.roles != TRAINED].isnan().any()):
            return
        # 2)
        judged = judge(self.roles, scores, kappa)
        self.rejected.copy_((judged < 0.5).sum())
        # 3)
        self.weights.copy_(leave_out_more(judged, self.roles, ranking))
        self.roles.fill_(TRAINED)


def check_saved_held_out(saved: Collection[str], current: HeldOut | None) -> None:
    """Check that a saved state fits a weighter that holds samples out, or one that doesn't.

    Args:
        saved: Keys of the weighter's saved state.
        current: What is held out where it is to be loaded.

    Raises:
        ValueError: If only one of the two holds samples out.
    """
    held = any(key.startswith("_held_out.") for key in saved)
    if held != (current is not None):
        there, here = ("with" if one else "without" for one in (held, not held))
        raise ValueError(
            f"the saved weighter was made {there} hold_out=, this one {here}; make it as the saved "
            "one was"
        )
