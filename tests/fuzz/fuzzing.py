"""How many cases, from which seed: the same for all fuzz tests."""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, seed, settings

SEED = 20261126
CASES = int(os.environ.get("COMET_FUZZ_CASES", "400"))


def fuzz(share: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a test that gets a share of all cases. The shares of all tests add up to 1."""
    limits = settings(
        max_examples=max(1, round(share * CASES)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(SEED)(limits(test))


def is_a_sentence(error: BaseException) -> bool:
    """Whether an error is one for the user: one line, of words."""
    text = str(error)
    return "\n" not in text.strip() and " " in text.strip()
