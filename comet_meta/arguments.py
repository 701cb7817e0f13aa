"""What the wrapper's arguments stand for."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from comet_meta import distributed

if TYPE_CHECKING:
    from comet_meta.meta.step import MetaMode, MetaStep

_QUERY_FRACTION = 0.3


def resolve_meta(
    meta: "MetaMode | MetaStep", model: nn.Module | None
) -> "tuple[MetaStep | None, float]":
    """The meta-step that ``meta`` stands for, and its query fraction.

    Args:
        meta: A meta-step, or the name of its mode.
        model: The module that closures use, where given.

    Returns:
        The meta-step, None for ``"none"``; the fraction of the samples in the query, in (0, 1).

    Raises:
        ValueError: If there is no such mode, or it needs the model.

    Example:
        >>> resolve_meta("none", None)
        (None, 0.3)
    """
    if meta == "none":
        return None, _QUERY_FRACTION
    from comet_meta.meta.step import MetaStep  # not at the top: a plain step needs no meta code

    settings = meta if isinstance(meta, MetaStep) else MetaStep(meta)
    if settings.mode == "none":
        return None, settings.query_fraction
    if settings.mode == "maml" and model is None:
        raise ValueError("meta='maml' differentiates through the model: pass model=")
    return settings, settings.query_fraction


def seeded_generator() -> torch.Generator:
    """A new generator on the CPU with torch's initial seed, the first process's on every process.

    So wrapping a loop doesn't change its other random numbers.
    """
    generator = torch.Generator()
    generator.manual_seed(distributed.seed_of_first_process(torch.initial_seed()))
    return generator
