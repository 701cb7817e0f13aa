"""The order of the samples, the most suspect first."""

from numbers import Integral

import torch
from torch import Tensor

from comet_meta.weights.rules import standardize


def join_scores(scores: Tensor, prior: Tensor | None) -> Tensor:
    """Mean of the model's scores and a prior, whose errors differ.

    Args:
        scores: The model's scores, NaN for a sample without one, shape (N,).
        prior: Scores from another source, shape (N,); None for none.

    Returns:
        The mean of both, each standardised; the prior alone for samples without a score. Without a
        prior the scores as they are. Shape (N,).
    """
    if prior is None:
        return scores
    prior = standardize(prior)
    known = ~scores.isnan()
    own = torch.full_like(prior, torch.nan)
    own[known] = standardize(scores[known])
    return torch.where(known, (prior + own) / 2, prior)


def rank_samples(scores: Tensor, k: int | None = None) -> Tensor:
    """The samples with the highest scores.

    Args:
        scores: Shape (N,), NaN for a sample without a score.
        k: Number of samples to return; None for all.

    Returns:
        Sample indices, shape (min(k, N),), the highest score first, equal scores in their order,
        samples without a score last.

    Raises:
        ValueError: If ``k`` is negative or no integer.

    Example:
        >>> rank_samples(torch.tensor([1.0, 3.0, torch.nan, 2.0]))
        tensor([1, 3, 0, 2])
    """
    if k is not None and (not isinstance(k, Integral) or k < 0):
        raise ValueError(f"k is {k!r}; expected a number of samples, >= 0, or None for all")
    scores = scores.nan_to_num(nan=-torch.inf)
    if k is None or k >= len(scores):
        return scores.argsort(descending=True, stable=True)
    # Sort only the samples that can be among the first k.
    kth = scores.kthvalue(len(scores) - max(k, 1) + 1).values
    candidates = (scores >= kth).nonzero().flatten()
    return candidates[scores[candidates].argsort(descending=True, stable=True)][:k]
