"""Weights of the samples' parts: patches of a picture, time steps of a window, columns of a row."""

from typing import Literal

import torch
from torch import Tensor

from comet_meta.arrays import ArrayLike, as_floats
from comet_meta.weights.checks import MIN_SAMPLES, as_scores, too_few_or_equal
from comet_meta.weights.rules import Rule, RuleName, default_precaution, trimmed_parts


def as_part_scores(part_prior: ArrayLike, prior: Tensor | None, rule: RuleName | Rule) -> Tensor:
    """Check scores of parts and return them as a tensor.

    Args:
        part_prior: Anomaly scores of the parts of each sample, shape (N, ...).
        prior: Anomaly scores of the samples from the same source, shape (N,).
        rule: The rule for the samples.

    Returns:
        The scores (N, ...) on the CPU.

    Raises:
        TypeError: If they aren't floating-point numbers.
        ValueError: If there is no prior or another rule than ``"trimmed"``, or if they have another
            shape or are not finite.
    """
    if prior is None or rule != "trimmed":
        raise ValueError("part_prior goes with prior= and rule='trimmed'; give both")
    part_scores = as_floats(part_prior, "part_prior").detach().cpu()
    as_scores(part_scores.flatten(), "part_prior")
    if len(part_scores) != len(prior) or part_scores.dim() < 2:
        raise ValueError(
            f"part_prior has shape {tuple(part_scores.shape)} for {len(prior)} samples; "
            "expected (N, ...): a score of each part of each sample"
        )
    return part_scores


def weigh_parts(
    part_scores: Tensor,
    weights: Tensor,
    contamination: float | Literal["auto"],
    precaution: float | None = None,
) -> Tensor:
    """The weights of the parts, given those of the samples.

    Args:
        part_scores: Anomaly scores of the parts, shape (N, ...).
        weights: Weights of the samples, shape (N,).
        contamination: Share of bad samples, in [0, 0.5), or ``"auto"``.
        precaution: Fraction of the parts to leave out, in [0, 0.5]; None for the default.

    Returns:
        Weights in [0, 1], shape (N, ...); all 1 if contamination or precaution is 0, or the samples
        too few or all scores equal.

    Example:
        >>> part_scores = torch.linspace(0, 1, 40).reshape(10, 2, 2)
        >>> weigh_parts(part_scores, torch.ones(10), "auto").shape
        torch.Size([10, 2, 2])
        >>> bool((weigh_parts(part_scores, torch.ones(10), 0.0) == 1).all())
        True
    """
    flat = part_scores.float().flatten(1)
    a = default_precaution(contamination) if precaution is None else precaution
    nothing = contamination == 0 or a == 0
    if nothing or len(flat) < MIN_SAMPLES or too_few_or_equal(flat.flatten()):
        return torch.ones(part_scores.shape)
    return trimmed_parts(flat, weights, a).reshape(part_scores.shape)


def check_saved_parts(saved: Tensor | None, current: Tensor | None) -> None:
    """Check that saved weights of parts fit.

    Args:
        saved: Weights of the saved state, shape (N, ...); None without parts.
        current: Those of the weighter that is to load them.

    Raises:
        ValueError: If only one has parts, or the samples have other numbers of them.
    """
    there, here = (
        "no parts" if weights is None else f"parts of shape {tuple(weights.shape[1:])}"
        for weights in (saved, current)
    )
    if there != here:
        raise ValueError(
            f"the saved weighter has weights of {there}, this one of {here}; give it a "
            "part_prior= as the saved one had, or none"
        )
