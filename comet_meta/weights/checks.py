"""Checks of a weighter's settings, of scores, and of what a rule returns."""

from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor

from comet_meta.arrays import ArrayLike, as_floats
from comet_meta.weights.rules import MAX_LEFT_OUT, Rule, RuleName

MIN_SAMPLES = 8
"""Fewer scores tell nothing."""


def check_settings(
    num_samples: int | None,
    rule: RuleName | Rule,
    kappa: float,
    contamination: float | Literal["auto"],
    precaution: float | None,
    momentum: float,
) -> None:
    """Check the settings of a :class:`~comet_meta.SoftConfidentWeighter`.

    Args:
        num_samples: Expected >= 1, or None.
        rule: Expected a name or a function.
        kappa: Expected >= 0.
        contamination: Expected in [0, 0.5), or ``"auto"``.
        precaution: Expected in [0, 0.5] beside the rule ``"trimmed"``, or None.
        momentum: Expected in [0, 1).

    Raises:
        ValueError: If one is out of range.
    """
    if num_samples is not None and not (isinstance(num_samples, Integral) and num_samples >= 1):
        raise ValueError(f"num_samples is {num_samples!r}; expected the set's size, >= 1")
    if not callable(rule) and rule not in get_args(RuleName):
        names = ", ".join(map(repr, get_args(RuleName)))
        raise ValueError(f"rule is {rule!r}; expected one of {names}, or a function")
    if not kappa >= 0:
        raise ValueError(f"kappa is {kappa}; expected >= 0")
    if contamination != "auto" and (
        isinstance(contamination, str) or not 0 <= contamination < MAX_LEFT_OUT
    ):
        raise ValueError(
            f"contamination is {contamination!r}; expected a share in [0, 0.5), or 'auto'"
        )
    if precaution is not None:
        if isinstance(precaution, str) or not 0 <= precaution <= MAX_LEFT_OUT:
            raise ValueError(
                f"precaution is {precaution!r}; expected a fraction in [0, 0.5], or None"
            )
        if rule != "trimmed":
            raise ValueError("precaution goes with rule='trimmed'; leave it out, or the other rule")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; expected a share in [0, 1)")


def check_hold_out(
    hold_out: float,
    prior: Tensor | None,
    rule: RuleName | Rule,
    contamination: float | Literal["auto"],
    part_prior: ArrayLike | None,
) -> None:
    """Check the fraction of the samples that a model is to judge before it is trained on them.

    Args:
        hold_out: Expected in (0, 0.5].
        prior: Expected scores, which name the suspects.
        rule: Expected ``"trimmed"``.
        contamination: Expected ``"auto"``.
        part_prior: Expected None.

    Raises:
        ValueError: If it is out of range, or goes with other arguments.
    """
    if isinstance(hold_out, str) or not 0 < hold_out <= MAX_LEFT_OUT:
        raise ValueError(f"hold_out is {hold_out!r}; expected a fraction in (0, 0.5], or None")
    if prior is None:
        raise ValueError("hold_out needs a prior= that says which samples are suspect; give one")
    if rule != "trimmed" or contamination != "auto":
        raise ValueError(
            "hold_out goes with rule='trimmed' and contamination='auto': with a given share, the "
            "prior alone decides; leave one of them out"
        )
    if part_prior is not None:
        raise ValueError("hold_out is for whole samples; leave out either hold_out or part_prior")


def check_review(review: object, prior: Tensor | None, hold_out: float | None) -> None:
    """Check that a review goes with a weighter's other arguments.

    Args:
        review: Expected a pair: indices of samples, and whether each is bad; or None.
        prior: Expected scores where there is a review.
        hold_out: Expected None where there is one.

    Raises:
        ValueError: If it doesn't.
    """
    if review is None:
        return
    if not (isinstance(review, tuple | list) and len(review) in (2, 3)):
        raise ValueError(
            f"review is a {type(review).__name__}; expected a pair: indices of the samples, and "
            "whether each of them is bad"
        )
    if prior is None:
        raise ValueError("review needs a prior= that ranks the other samples; give both")
    if hold_out is not None:
        raise ValueError(
            "hold_out lets the model say what is bad, and review has said it; leave one of them out"
        )


def as_scores(scores: ArrayLike, name: str = "scores") -> Tensor:
    """Check scores and return them as a tensor.

    Args:
        scores: One anomaly score per sample, shape (N,): a tensor, an array or a list.
        name: Their name in errors.

    Returns:
        The scores (N,), single precision.

    Raises:
        TypeError: If they aren't floating-point numbers.
        ValueError: If they have another shape or are not finite.
    """
    scores = as_floats(scores, name)
    if scores.dim() != 1:
        raise ValueError(
            f"{name} has shape {tuple(scores.shape)}; expected one anomaly score per sample: "
            "reduce scores of parts to one per sample first, for instance with "
            ".flatten(1).amax(dim=1)"
        )
    # One pass in the common case: the sum is finite only if all its terms are.
    if not scores.float().sum(dtype=torch.float64).isfinite():
        bad = (~torch.isfinite(scores)).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"{len(bad)} of {len(scores)} {name} are NaN or infinite (first at positions "
                f"{bad[:8].tolist()}); expected finite anomaly scores"
            )
        raise ValueError(
            f"{name} reach {float(scores.abs().max()):.0e}, more than single precision holds; "
            "divide them by a constant"
        )
    return scores.float()


def too_few_or_equal(scores: Tensor) -> bool:
    """Whether scores (N,) are too few to weigh, or equal up to rounding.

    Example:
        >>> too_few_or_equal(torch.ones(100)), too_few_or_equal(torch.arange(8.0))
        (True, False)
    """
    if len(scores) < MIN_SAMPLES:
        return True
    low, high = scores.aminmax()
    rounding = 4 * torch.finfo(scores.dtype).eps * torch.maximum(low.abs(), high.abs())
    return bool(high - low <= rounding)


def check_rule_values(values: Tensor, name: str, scores: Tensor) -> None:
    """Check weights or P(bad) that a custom rule returned.

    Args:
        values: Expected in [0, 1], shape (N,).
        name: Their name in the error.
        scores: The scores that the rule got, shape (N,).

    Raises:
        ValueError: If the shape is another, or a value lies outside [0, 1].
    """
    if values.shape != scores.shape or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"the rule returned shape {tuple(values.shape)} for {len(scores)} scores, or "
            f"values outside [0, 1]; expected one {name} in [0, 1] for each score"
        )
