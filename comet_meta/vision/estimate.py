"""How many pictures are bad, by the weighter's account, in figures and in words."""

import math
from typing import NamedTuple

from comet_meta.weights.weighter import SoftConfidentWeighter

_TOO_FEW = 8  # with fewer scores the weighter leaves all weights at 1
_UNTOUCHED = 0.95


class Contamination(NamedTuple):
    """Share of bad samples.

    Attributes:
        estimate: In [0, 1].
        low: Lower end of its interval; NaN where none is known.
        high: Upper end of its interval; NaN where none is known.
    """

    estimate: float
    low: float
    high: float


def estimated_contamination(weighter: SoftConfidentWeighter) -> Contamination:
    """The share of bad samples that a weighter sees.

    Args:
        weighter: After its fit.

    Returns:
        Its own estimate with the interval; the mean of P(bad), without one, where it makes none.
    """
    own = getattr(weighter, "contamination_", None)
    if own is not None:
        return Contamination(*(float(value) for value in own))
    return Contamination(float(weighter.anomalous.mean()), math.nan, math.nan)


def in_words(weighter: SoftConfidentWeighter, what: str = "pictures") -> str:
    """What the estimate means, in a sentence or two.

    Args:
        weighter: After its fit.
        what: The samples' name, in the plural.

    Returns:
        Plain text.

    Example:
        >>> import torch
        >>> weighter = SoftConfidentWeighter(num_samples=20)
        >>> weighter.fit(torch.erfinv(torch.linspace(-0.9, 0.9, 20)))
        >>> in_words(weighter)
        'No evidence of bad pictures: nothing was down-weighted.'
    """
    count = len(weighter.weights)
    if count < _TOO_FEW:
        return (
            f"{count} {what} are too few to tell good from bad (it takes {_TOO_FEW}): nothing was "
            "down-weighted."
        )
    share, low, high = estimated_contamination(weighter)
    suspects = int((weighter.anomalous > 0.5).sum())
    if suspects == 0 and float(weighter.weights.min()) >= _UNTOUCHED:
        return f"No evidence of bad {what}: nothing was down-weighted."
    interval = "" if math.isnan(low + high) else f" ({100 * low:.0f} to {100 * high:.0f} %)"
    amount = f"About {100 * share:.0f} %" if share >= 0.005 else "Less than 1 %"
    named = (
        f"{suspects:,} of {count:,} are more likely bad than good"
        if suspects
        else "none is more likely bad than good by itself"
    )
    return f"{amount}{interval} of the {what} look bad; {named}."
