"""From scores to weights, by any rule and with samples that have no score."""

from typing import Literal

import torch
from torch import Tensor

from comet_meta.weights.checks import check_rule_values, too_few_or_equal
from comet_meta.weights.rules import (
    FENCES,
    Rule,
    RuleName,
    Weighting,
    score_threshold,
    trimmed_weights,
)


def weigh(
    scores: Tensor,
    rule: RuleName | Rule,
    kappa: float,
    contamination: float | Literal["auto"],
    precaution: float | None = None,
) -> Weighting:
    """Apply a rule to the samples that have a score.

    Args:
        scores: Anomaly scores, NaN for a sample without one, shape (N,).
        rule: A rule's name, or a function.
        kappa: Width of the fence of ``"hard"`` and ``"ratio"``, >= 0.
        contamination: Share of bad samples for ``"trimmed"``, in [0, 0.5), or ``"auto"``.
        precaution: Fraction left out besides by ``"trimmed"``, in [0, 0.5]; None for its default.

    Returns:
        The rule's result. Samples without a score have weight 1 and P(bad) 0; so have all samples
        if scores are too few or equal.

    Raises:
        ValueError: If a custom rule returns something else than weights.

    Example:
        >>> scores = torch.tensor([1.0, 2.0, torch.nan, 1.5, 1.2, 9.0, 1.1, 1.7, 1.3, 1.6])
        >>> weigh(scores, "hard", 1.5, "auto").weights
        tensor([1., 1., 1., 1., 1., 0., 1., 1., 1., 1.])
    """
    # The sum is NaN if one of its terms is, and takes less memory than a mask.
    if not scores.sum().isnan():
        return _weigh_known(scores, rule, kappa, contamination, precaution)
    known = ~scores.isnan()
    weights, p_bad = torch.ones_like(scores), torch.zeros_like(scores)
    weights[known], threshold, p_bad[known] = _weigh_known(
        scores[known], rule, kappa, contamination, precaution
    )
    return Weighting(weights, threshold, p_bad)


def _weigh_known(
    scores: Tensor,
    rule: RuleName | Rule,
    kappa: float,
    contamination: float | Literal["auto"],
    precaution: float | None,
) -> Weighting:
    """Apply a rule to scores (M,) without NaN."""
    if too_few_or_equal(scores):
        no_threshold = torch.tensor(torch.inf)
        return Weighting(torch.ones_like(scores), no_threshold, torch.zeros_like(scores))
    if rule == "trimmed":
        return trimmed_weights(scores, contamination, precaution)
    if isinstance(rule, str):
        return FENCES[rule](scores, kappa)
    return _checked(rule(scores), scores)


def _checked(result: Tensor | Weighting, scores: Tensor) -> Weighting:
    """What a custom rule made of scores (M,), in full."""
    if not isinstance(result, Weighting):
        check_rule_values(result, "weight", scores)
        return Weighting(result, score_threshold(scores, result), 1 - result)
    check_rule_values(result.weights, "weight", scores)
    check_rule_values(result.p_bad, "P(bad)", scores)
    if result.threshold.numel() != 1 or bool(result.threshold.isnan()):
        raise ValueError(f"the rule returned the threshold {result.threshold}; expected one score")
    return result._replace(threshold=result.threshold.reshape(()))
