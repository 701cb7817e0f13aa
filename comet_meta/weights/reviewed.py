"""What a weighter knows of the samples that a person has looked at."""

import torch
from torch import Tensor, nn

from comet_meta.weights.contamination import Contamination
from comet_meta.weights.review import BAD, GOOD, UNSEEN, Review, known_labels, share_of_labels


class Reviewed(nn.Module):
    """What a weighter knows of its samples from a person who looked at some.

    Args:
        prior: Anomaly scores that the samples were chosen by, shape (N,).
        review: What the person saw.
        estimates: Whether to estimate the share of bad samples from it.

    Attributes:
        labels: ``UNSEEN``, ``GOOD`` or ``BAD`` for each sample, int8 (N,).
        share: The share of bad samples with its interval; None where it isn't estimated.

    Example:
        >>> review = Review([8, 9], [False, True])
        >>> reviewed = Reviewed(torch.arange(10.0), review, estimates=False)
        >>> weights, p_bad = reviewed.settle(torch.full((10,), 0.5), torch.full((10,), 0.5))
        >>> weights[7:], p_bad[7:]
        (tensor([0.5000, 1.0000, 0.0000]), tensor([0.5000, 0.0000, 1.0000]))
    """

    labels: Tensor

    def __init__(self, prior: Tensor, review: Review, *, estimates: bool) -> None:
        super().__init__()
        self.register_buffer("labels", known_labels(review, len(prior)))
        self.share: Contamination | None = None
        if estimates:
            self.share = review.share or share_of_labels(prior, self.labels)

    @property
    def looks(self) -> int:
        """How many samples were looked at."""
        return int((self.labels != UNSEEN).sum())

    @property
    def bad(self) -> int:
        """How many of them are bad."""
        return int((self.labels == BAD).sum())

    def settle(self, weights: Tensor, p_bad: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and P(bad) with those of the samples that were looked at: 1 and 0, or 0 and 1.

        Args:
            weights: Shape (N,).
            p_bad: Shape (N,).

        Returns:
            Both, changed where something is known.
        """
        good, bad = self.labels == GOOD, self.labels == BAD
        return (
            weights.masked_fill(good, 1).masked_fill(bad, 0),
            p_bad.masked_fill(good, 0).masked_fill(bad, 1),
        )


def check_saved_review(saved: Tensor | None, current: Tensor | None) -> None:
    """Check that a saved state is of the same review.

    Args:
        saved: Labels of the saved state, shape (N,); None without a review.
        current: Those of the weighter that is to load them.

    Raises:
        ValueError: If they differ.
    """
    if saved is None and current is None:
        return
    if saved is None or current is None or not torch.equal(saved.to(current), current):
        raise ValueError(
            "the saved weighter was told another review, or none; give it the review= that the "
            "saved one had"
        )
