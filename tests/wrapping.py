"""Wrappers whose meta-step is given by separate settings, as parametrised tests have them."""

from dataclasses import fields
from typing import Any

from comet_meta import CoMetOptimizerWrapper, MetaStep

NAMES = {field.name for field in fields(MetaStep)} - {"mode"}


def with_meta_step(options: dict[str, Any]) -> dict[str, Any]:
    """The options with the meta-step's settings gathered in one object."""
    settings = {name: value for name, value in options.items() if name in NAMES}
    others = {name: value for name, value in options.items() if name not in NAMES}
    if settings:
        others["meta"] = MetaStep(others.get("meta", "none"), **settings)
    return others


def wrap(optimizer: Any, **options: Any) -> CoMetOptimizerWrapper:
    """The wrapper around an optimizer."""
    return CoMetOptimizerWrapper(optimizer, **with_meta_step(options))
