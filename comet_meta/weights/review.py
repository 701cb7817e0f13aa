"""How many samples are bad, as far as a person tells who looks at a few of them.

Scores alone seldom prove how many samples are bad, but a look at some sixty of them tells. Drawn
from all samples alike, few of the sixty would be bad. The ranking makes the look worth more:

1. Split the samples by their rank into strata that end at 1/500, 1/100, 1/20, 1/10, 1/5, 2/5 and
   all of them. Most of the bad samples are in the first strata, which are small; the very first
   ones are for sets of which less than one in a hundred is bad.
2. Look at some samples of each, in proportion to the root of its size, spread evenly over its
   ranks. So a larger part of the first strata is looked at than of the last.
3. The share is the mean of the strata's shares, weighted by their sizes. It doesn't depend on how
   good the ranking is; its precision does.
4. The estimate varies as one from n looks at random would; n is the effective number of looks. The
   interval of 95 % is Wilson's for so many.
5. One more bad sample must not lower a bound. Step 4 alone would let it, where a few looks stand
   for half of the samples, because n rises with each bad one. So the same interval is taken of the
   reviews that found no bad sample in some of the strata, and the same in the others; the upper
   bound is the highest of these. The lower bound is the lowest with no good sample in some strata.
   For the samples of step 2 that changes nothing. Ours; it was searched for exceptions, not proven.

Source of step 4: Korn, Graubard: Confidence intervals for proportions with small expected number of
positive counts estimated from survey data, Survey Methodology 24, 1998; with Wilson's interval in
place of Clopper and Pearson's.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from comet_meta.arrays import ArrayLike
from comet_meta.data import as_index
from comet_meta.weights.checks import as_scores
from comet_meta.weights.contamination import Contamination
from comet_meta.weights.ranking import rank_samples

UNSEEN, GOOD, BAD = range(3)
"""What is known of a sample."""

_ENDS = (0.002, 0.01, 0.05, 0.1, 0.2, 0.4, 1.0)
_Z = 1.959964  # of 95 %


class Review(NamedTuple):
    """What a person saw who looked at some samples.

    Attributes:
        looked_at: Their indices, shape (K,).
        bad: Whether each of them is bad, shape (K,).
        share: The share of bad samples that was estimated from it; None: it is estimated with the
            scores of those who use the review, by which the samples must have been chosen then.
    """

    looked_at: Tensor | Sequence[int]
    bad: ArrayLike | Sequence[bool]
    share: Contamination | None = None


def strata(count: int) -> list[range]:
    """Split the ranks of the samples (step 1).

    Args:
        count: Number N of samples, >= 1.

    Returns:
        The ranks of each stratum that isn't empty, the most suspect first. Together they are
        0 to N - 1.

    Example:
        >>> strata(100)
        [range(0, 1), range(1, 5), range(5, 10), range(10, 20), range(20, 40), range(40, 100)]
    """
    ends = [math.ceil(end * count) for end in _ENDS]
    found = [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return [ranks for ranks in found if ranks]


def ranks_to_review(count: int, looks: int = 60) -> list[list[int]]:
    """Choose what to look at (step 2).

    Args:
        count: Number N of samples, >= 1.
        looks: About how many samples to look at, at least one of each stratum.

    Returns:
        Ranks, ascending, for each stratum of :func:`strata`.

    Raises:
        ValueError: If ``looks`` is smaller than the number of strata.

    Example:
        >>> ranks_to_review(100, looks=10)
        [[0], [3], [7], [15], [25, 35], [47, 62, 77, 92]]
    """
    parts = strata(count)
    if looks < len(parts):
        raise ValueError(
            f"looks is {looks}; expected at least {len(parts)}, one for each part of the ranking"
        )
    chosen = []
    roots = [math.sqrt(len(ranks)) for ranks in parts]
    for done, ranks in enumerate(parts):
        # What a small stratum doesn't need goes to the later ones.
        fair = round(looks * roots[done] / sum(roots[done:]))
        size = min(max(fair, 1), len(ranks))
        looks -= size
        chosen.append([ranks[int((k + 0.5) * len(ranks) / size)] for k in range(size)])
    return chosen


def choose_for_review(scores: ArrayLike, looks: int = 60) -> Tensor:
    """Choose samples for a person to look at, to learn how many of all are bad (steps 1 and 2).

    Args:
        scores: What ranks the samples, higher = more suspect: a prior, or
            :meth:`SoftConfidentWeighter.ranking_scores
            <comet_meta.SoftConfidentWeighter.ranking_scores>`, finite, shape (N,).
        looks: About how many samples to look at, >= 7.

    Returns:
        Indices of the samples, int64, at most ``looks`` of them, the most suspect first.

    Raises:
        TypeError: If the scores aren't floating-point.
        ValueError: If they are not (N,), finite and N >= 1, or ``looks`` is too small.

    Example:
        >>> choose_for_review(torch.arange(100.0), looks=10)
        tensor([99, 96, 92, 84, 74, 64, 52, 37, 22,  7])
    """
    order = rank_samples(_checked(scores))
    chosen = ranks_to_review(len(order), looks)
    return order[torch.tensor([rank for ranks in chosen for rank in ranks])]


def share_from_review(
    scores: ArrayLike, looked_at: Tensor | Sequence[int], bad: ArrayLike | Sequence[bool]
) -> Contamination:
    """Estimate how many of all samples are bad from a look at some of them (steps 3 to 5).

    Args:
        scores: The scores that the samples were chosen by, shape (N,).
        looked_at: Indices of the samples that were looked at, shape (K,): those of
            :func:`choose_for_review`.
        bad: Whether each of them is bad, shape (K,).

    Returns:
        The share with an interval of 95 %. Its estimate is what ``contamination=`` takes.

    Raises:
        TypeError: If the scores aren't floating-point.
        ValueError: If the arguments don't fit together, or a part of the ranking was not looked at.

    Example:
        >>> scores = torch.arange(100.0)
        >>> look_at = choose_for_review(scores, looks=30)
        >>> str(share_from_review(scores, look_at, look_at >= 92))
        'about 8 % (6 to 17 %) of the samples look bad'
        >>> share_from_review(scores, look_at, torch.zeros(len(look_at))).estimate
        0.0
    """
    scores = _checked(scores)
    return share_of_labels(scores, known_labels(Review(looked_at, bad), len(scores)))


def known_labels(review: Review, count: int) -> Tensor:
    """What is known of each sample after a look at some.

    Args:
        review: What the person saw.
        count: Number N of samples.

    Returns:
        ``UNSEEN``, ``GOOD`` or ``BAD`` for each sample, int8 (N,).

    Raises:
        ValueError: If there is no index, or not one answer for each, or one comes twice.
        IndexError: If an index lies outside the training set.

    Example:
        >>> known_labels(Review([3, 1], [True, False]), 4)
        tensor([0, 1, 0, 2], dtype=torch.int8)
    """
    if len(review.looked_at) == 0:
        raise ValueError("the review has no sample; look at those that choose_for_review names")
    index, found = as_index(review.looked_at, count), torch.as_tensor(review.bad).bool()
    if index.shape != found.shape:
        raise ValueError(
            f"bad has shape {tuple(found.shape)}; expected ({len(index)},), whether each of the "
            "samples that were looked at is bad"
        )
    if len(set(index.tolist())) != len(index):
        raise ValueError("the review has a sample twice; expected each once")
    labels = torch.full((count,), UNSEEN, dtype=torch.int8)
    labels[index] = torch.where(found, BAD, GOOD).to(labels)
    return labels


def share_of_labels(scores: Tensor, labels: Tensor) -> Contamination:
    """Estimate the share from what is known of each sample (steps 3 to 5).

    Args:
        scores: The scores that the samples were chosen by, shape (N,).
        labels: From :func:`known_labels`, shape (N,).

    Returns:
        The share with its interval.

    Raises:
        ValueError: If a part of the ranking was not looked at.
    """
    counts = count_by_stratum(scores, labels)
    for ranks, (_, looks, _) in zip(strata(len(scores)), counts, strict=True):
        if looks == 0:
            raise ValueError(
                f"no sample of the ranks {ranks.start} to {ranks.stop - 1} was looked at; take "
                "those that choose_for_review names, or give the share: contamination=, or the "
                "review's own"
            )
    return share_of_strata(counts)


def count_by_stratum(scores: Tensor, labels: Tensor) -> list[tuple[int, int, int]]:
    """Count what is known of the samples of each stratum.

    Args:
        scores: What ranks the samples, shape (N,).
        labels: From :func:`known_labels`, shape (N,).

    Returns:
        Size, number of samples looked at and number of bad ones among these, for each stratum of
        :func:`strata`.
    """
    ordered = labels[rank_samples(scores)]
    parts = [ordered[ranks.start : ranks.stop] for ranks in strata(len(scores))]
    return [(len(part), int((part != UNSEEN).sum()), int((part == BAD).sum())) for part in parts]


def share_of_strata(counts: Sequence[tuple[int, int, int]]) -> Contamination:
    """Steps 3 to 5.

    Args:
        counts: Size, number of samples looked at (>= 1) and number of bad ones among these, for
            each stratum.

    Returns:
        The share with its interval.

    Example:
        >>> found = share_of_strata([(10, 10, 9), (90, 30, 1)])
        >>> [round(value, 3) for value in found]
        [0.12, 0.1, 0.186]
    """
    total = sum(size for size, _, _ in counts)
    share = _share(counts)
    # 5)
    fewer = itertools.product(*({(n, looks, bad), (n, looks, 0)} for n, looks, bad in counts))
    more = itertools.product(*({(n, looks, bad), (n, looks, looks)} for n, looks, bad in counts))
    low = min(_interval(review)[0] for review in more)
    high = max(_interval(review)[1] for review in fewer)
    # What was seen is certain.
    seen_bad = sum(bad for _, _, bad in counts) / total
    seen_good = sum(looks - bad for _, looks, bad in counts) / total
    return Contamination(share, max(low, seen_bad), min(high, 1 - seen_good))


def _share(counts: Sequence[tuple[int, int, int]]) -> float:
    """Step 3."""
    total = sum(size for size, _, _ in counts)
    return sum(size / total * bad / looks for size, looks, bad in counts)


def _interval(counts: Sequence[tuple[int, int, int]]) -> tuple[float, float]:
    """Step 4."""
    total = sum(size for size, _, _ in counts)
    share = _share(counts)
    # Half a bad and half a good look more in each stratum, so that its share is never 0 or 1.
    # Where all of a stratum was looked at, nothing is open.
    centre = variance = 0.0
    for size, looks, bad in counts:
        part, found = size / total, (bad + 0.5) / (looks + 1)
        centre += part * found
        unseen = (size - looks) / max(size - 1, 1)
        variance += part**2 * found * (1 - found) / looks * unseen
    looks_at_random = centre * (1 - centre) / variance if variance > 0 else math.inf
    square = _Z**2 / looks_at_random
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return middle - half, middle + half


def _checked(scores: ArrayLike) -> Tensor:
    scores = as_scores(scores)
    if len(scores) == 0:
        raise ValueError("there are no scores; expected one for each sample")
    return scores
