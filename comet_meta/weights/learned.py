"""A prior that has learned from the samples that a person looked at.

A look at some sixty samples tells more than how many are bad: samples that resemble a bad one are
likely bad too, and those that resemble a good one are likely good, however suspect the prior finds
them.

1. P is the probability that a sample of this rank is bad: the shares of bad samples in the strata
   that the look was spread over, made to fall down the ranking, and interpolated between the
   strata's middles over the logarithm of the rank.
2. The residual of a sample that was looked at is 1 - P if it is bad and -P if it is good.
3. The other samples get their part of the residuals, the more, the more they resemble the samples
   that were looked at. It is the mean of a Gaussian process with the kernel exp(-d / h) and a noise
   of variance 1/10: d is the distance of two samples, h the median distance of those that were
   looked at. Distances are those of standardised features and those of whitened ones; the result is
   the mean of both.
4. The learned prior is P plus what step 3 says, plus a tenth of the place in the prior's own order
   (1 for the first sample, 0 for the last), which decides where the look says little.

Source of step 3: Rasmussen, Williams: Gaussian processes for machine learning, 2006, sections 2.2
and 2.7.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from comet_meta.arrays import ArrayLike, as_floats
from comet_meta.weights.checks import as_scores
from comet_meta.weights.prior import MAX_WHITENED_COLUMNS, standardise_columns, whiten
from comet_meta.weights.ranking import rank_samples
from comet_meta.weights.review import (
    BAD,
    UNSEEN,
    Review,
    count_by_stratum,
    known_labels,
    share_of_labels,
    strata,
)

Array = npt.NDArray[np.float64]

_NOISE = 0.1
_OF_PLACE = 0.1
_CHUNK_ROWS = 65_536


class Learned(NamedTuple):
    """What a weighter takes after a review: ``SoftConfidentWeighter(**learned._asdict())``.

    Attributes:
        prior: The prior that has learned from the review, shape (N,).
        review: The review, with the share of bad samples that it tells.
    """

    prior: Tensor
    review: Review


def learn_from_review(
    prior: ArrayLike,
    features: ArrayLike,
    review: Review | tuple[Tensor | Sequence[int], ArrayLike | Sequence[bool]],
) -> Learned:
    """Let a prior learn from the samples that a person looked at.

    Args:
        prior: The scores that the samples were chosen by, finite, shape (N,).
        features: What tells how much two samples resemble each other: the rows of a table, or
            embeddings, finite, shape (N, C).
        review: What the person saw, as a :class:`~comet_meta.SoftConfidentWeighter` takes it.

    Returns:
        The learned prior, and the review with the share of bad samples that it tells. The share is
        that of the strata of the first prior, by which the samples were chosen.

    Raises:
        TypeError: If prior or features aren't floating-point.
        ValueError: If the arguments don't fit together or aren't finite, or no sample was looked
            at, or none of a part of the ranking and the review brings no share.
        IndexError: If an index of the review lies outside the training set.

    Example:
        >>> from comet_meta import choose_for_review
        >>> generator = torch.Generator().manual_seed(0)
        >>> rows = torch.randn(200, 5, generator=generator)
        >>> rows[:20, 0] += 3  # bad samples resemble each other
        >>> prior, bad = torch.rand(200, generator=generator), torch.arange(200) < 20
        >>> look_at = choose_for_review(prior)
        >>> learned = learn_from_review(prior, rows, (look_at, bad[look_at]))
        >>> [int((rank_samples(scores, 20) < 20).sum()) for scores in (prior, learned.prior)]
        [2, 15]
    """
    prior = as_scores(prior, "prior").detach().cpu()
    features = _checked(features, len(prior))
    review = Review(*review)
    labels = known_labels(review, len(prior))
    seen = (labels != UNSEEN).nonzero().flatten()
    share = review.share or share_of_labels(prior, labels)
    # 1)
    by_rank = probability_by_rank(prior, labels)
    # 2)
    residuals = (labels[seen] == BAD).double() - by_rank[seen]
    # 3)
    views = _views(features)
    carried = torch.stack([carry_over(view, seen, residuals) for view in views]).mean(dim=0)
    # 4)
    places = torch.empty_like(by_rank)
    places[rank_samples(prior)] = torch.linspace(_OF_PLACE, 0, len(prior)).to(places)
    return Learned((by_rank + carried + places).float(), review._replace(share=share))


def probability_by_rank(scores: Tensor, labels: Tensor) -> Tensor:
    """How likely a sample of its rank is bad (step 1).

    Args:
        scores: What ranks the samples, shape (N,).
        labels: From :func:`~comet_meta.weights.review.known_labels`, not all ``UNSEEN``, shape
            (N,).

    Returns:
        Probabilities, double precision, shape (N,).

    Example:
        >>> labels = known_labels(Review(range(50), [False] * 40 + [True] * 10), 50)
        >>> found = probability_by_rank(torch.arange(50.0), labels)
        >>> found[[0, 35, 37, 42]].round(decimals=2).tolist()
        [0.0, 0.05, 0.27, 1.0]
    """
    counts = count_by_stratum(scores, labels)
    known = [
        ((ranks.start + ranks.stop + 1) / 2, bad / looks, looks)
        for ranks, (_, looks, bad) in zip(strata(len(scores)), counts, strict=True)
        if looks
    ]
    middles, shares, looks = (np.array(values) for values in zip(*known, strict=True))
    of_rank = np.interp(
        np.log(np.arange(1, len(scores) + 1)), np.log(middles), falling(shares, looks)
    )
    probabilities = torch.empty(len(scores), dtype=torch.float64)
    probabilities[rank_samples(scores)] = torch.from_numpy(of_rank)
    return probabilities


def falling(values: Array, counts: Array) -> Array:
    """The falling sequence that is nearest to some values: neighbours that rise are pooled.

    Args:
        values: Shape (K,).
        counts: How many observations each is the mean of, shape (K,).

    Returns:
        Shape (K,).

    Example:
        >>> falling(np.array([0.5, 0.8, 0.1, 0.2]), np.array([2, 1, 1, 1])).round(2).tolist()
        [0.6, 0.6, 0.15, 0.15]
    """
    blocks: list[tuple[float, int, int]] = []  # mean, observations, values
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        block = (value, count, 1)
        while blocks and blocks[-1][0] < block[0]:
            mean, observations, width = blocks.pop()
            total = observations + block[1]
            pooled = (mean * observations + block[0] * block[1]) / total
            block = (pooled, total, width + block[2])
        blocks.append(block)
    return np.repeat([mean for mean, _, _ in blocks], [width for _, _, width in blocks])


def carry_over(view: Tensor, seen: Tensor, residuals: Tensor) -> Tensor:
    """Give all samples their part of the residuals of those that were looked at (step 3).

    Args:
        view: Features, double precision, shape (N, C).
        seen: Indices of the samples that were looked at, shape (K,).
        residuals: Shape (K,).

    Returns:
        Shape (N,).

    Example:
        >>> view = torch.tensor([[0.0], [0.1], [5.0], [5.1]]).double()
        >>> carried = carry_over(view, torch.tensor([0, 2]), torch.tensor([1.0, -1.0]).double())
        >>> carried.round(decimals=2).tolist()
        [0.86, 0.83, -0.86, -0.85]
    """
    known = view[seen]
    # Exactly 0 between equal samples.
    between = torch.cdist(known, known, compute_mode="donot_use_mm_for_euclid_dist")
    apart = between[between > 0]
    h = apart.median() if len(apart) else torch.ones_like(residuals[0])
    noise = _NOISE * torch.eye(len(seen), dtype=view.dtype)
    parts = torch.linalg.solve((-between / h).exp() + noise, residuals)
    return torch.cat(
        [(-torch.cdist(some, known) / h).exp() @ parts for some in torch.split(view, _CHUNK_ROWS)]
    )


def _views(features: Tensor) -> list[Tensor]:
    """Standardised features (N, V), and whitened ones where they aren't too many."""
    scaled, _ = standardise_columns(features)
    return [scaled, whiten(scaled)] if scaled.shape[1] <= MAX_WHITENED_COLUMNS else [scaled]


def _checked(features: ArrayLike, count: int) -> Tensor:
    features = as_floats(features, "features").detach().cpu()
    if features.dim() != 2 or len(features) != count:
        raise ValueError(
            f"features has shape {tuple(features.shape)} for {count} samples; expected ({count}, C)"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("features has values that are NaN or infinite; fill them in first")
    return features
