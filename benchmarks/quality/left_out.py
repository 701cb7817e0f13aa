"""The frontier: how much is left out without evidence, and of what.

``samples-0.1`` leaves out a tenth of the samples by the prior, ``parts-0.1`` a tenth of their parts
(patches of pictures, values of rows), ``both-0.1`` a twentieth of the samples and then a twentieth
of the parts of the others. What the scores prove to be bad goes besides, as in the default.
:class:`RejectedAlone` leaves out nothing besides the held-out suspects that the model rejects.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from comet_meta import SoftConfidentWeighter
from comet_meta.arrays import ArrayLike
from comet_meta.weights.held_out import judge
from comet_meta.weights.rules import trimmed_parts

FRACTIONS = (0.025, 0.05, 0.1, 0.2)
KINDS = ("samples", "parts", "both")


def names(kinds: Sequence[str] = KINDS) -> list[str]:
    """Names of all points of the frontier."""
    return [f"{kind}-{fraction:g}" for kind in kinds for fraction in FRACTIONS]


class LeftOut(SoftConfidentWeighter):
    """The default with other fractions.

    Args:
        name: Of a point of the frontier.
        scores: Prior of the samples, shape (N,).
        part_scores: Prior of their parts, shape (N, ...); None where losses aren't by part.
    """

    of_parts: Tensor | None = None

    def __init__(self, name: str, scores: Tensor, part_scores: Tensor | None) -> None:
        kind, _, number = name.partition("-")
        fraction = float(number)
        if part_scores is None and kind != "samples":
            raise ValueError(f"{name} needs losses by part")
        samples = {"samples": fraction, "both": fraction / 2, "parts": 0.0}[kind]
        super().__init__(prior=scores, precaution=samples)
        if part_scores is not None and kind != "samples":
            flat = trimmed_parts(part_scores.flatten(1), self.weights, fraction - samples)
            self.of_parts = flat.reshape(part_scores.shape)

    @property
    @override
    def has_parts(self) -> bool:
        """Whether parts are left out."""
        return self.of_parts is not None

    @override
    def part_weights(self, index: Tensor | Sequence[int] | None = None) -> Tensor:
        """Weights of the parts of some samples, or of all."""
        if self.of_parts is None:
            raise ValueError("no parts are left out")
        return self.of_parts if index is None else self.of_parts[torch.as_tensor(index)]

    @override
    def mean_weights(self) -> Tensor:
        """How much each sample counts in training, its parts included, shape (N,)."""
        if self.of_parts is None:
            return self.weights.clone()
        return self.weights * self.of_parts.flatten(1).mean(dim=1)


class RejectedAlone(SoftConfidentWeighter):
    """Holds out as the default does, but leaves out the rejected suspects alone."""

    @override
    def fit(self, scores: ArrayLike | None = None) -> None:
        """Set the weights, without what the default leaves out besides."""
        held_out = self._held_out
        roles = None if held_out is None or not held_out.waits else held_out.roles.clone()
        super().fit(scores)
        if held_out is not None and roles is not None and not held_out.waits:
            held_out.weights.copy_(judge(roles, self.scores, self.kappa))
            super().fit()
