"""How many pictures are bad, by the weighter's estimate, in words."""

import math

from comet_meta.weights.weighter import SoftConfidentWeighter

_FEWEST = 8  # with fewer scores the weighter leaves all weights at 1


def in_words(weighter: SoftConfidentWeighter) -> str:
    """What the estimate means, in a sentence or two.

    Args:
        weighter: After its fit.

    Returns:
        Plain text.

    Example:
        >>> import torch
        >>> weighter = SoftConfidentWeighter(num_samples=20, contamination=0.1)
        >>> weighter.fit(torch.arange(20.0))
        >>> print(in_words(weighter))  # doctest: +NORMALIZE_WHITESPACE
        At the given contamination of 10 %, 2 of 20 pictures are taken for bad. As a precaution,
        training leaves out 2 more.
    """
    count = len(weighter.weights)
    if count < _FEWEST:
        return (
            f"{count} pictures are too few to tell good from bad (it takes {_FEWEST}): nothing was "
            "down-weighted."
        )
    suspects = int((weighter.p_bad > 0.5).sum())
    left_out = int((weighter.weights < 0.5).sum())
    if weighter.contamination == "auto" and weighter.reviewed != (0, 0):
        return _of_review(weighter)
    if weighter.contamination != "auto":
        precaution = (
            f" As a precaution, training leaves out {left_out - suspects:,} more."
            if left_out > suspects
            else ""
        )
        return (
            f"At the given contamination of {100 * weighter.contamination:.0f} %, {suspects:,} of "
            f"{count:,} pictures are taken for bad.{precaution}"
        )
    share, low, high = weighter.contamination_
    if weighter.hold_out is not None and suspects == 0 and not low > 0:
        return _of_held_out(weighter)
    if suspects == 0 and not low > 0:
        if weighter.has_parts and bool((weighter.part_weights() < 1).any()):
            share = float((1 - weighter.part_weights()).mean())
            return (
                "No evidence of bad pictures: none is taken for bad. As a precaution, training "
                f"leaves out the {100 * share:.2g} % of their parts that fit in least."
            )
        if left_out == 0:
            return "No evidence of bad pictures: nothing was down-weighted."
        least = (
            "the one that fits in least" if left_out == 1 else f"the {left_out:,} that fit in least"
        )
        return (
            f"No evidence of bad pictures: none is taken for bad. As a precaution, training leaves "
            f"out {least}."
        )
    interval = "" if math.isnan(low + high) else f" ({100 * low:.0f} to {100 * high:.0f} %)"
    amount = f"About {100 * share:.0f} %" if share >= 0.005 else "Less than 1 %"
    named = (
        f"{suspects:,} of {count:,} are more likely bad than good"
        if suspects
        else "none is more likely bad than good by itself"
    )
    return f"{amount}{interval} of the pictures look bad; {named}."


def _of_review(weighter: SoftConfidentWeighter) -> str:
    """What a person found who looked at some."""
    (looks, bad), (share, low, high) = weighter.reviewed, weighter.contamination_
    left_out = int((weighter.weights < 0.5).sum())
    found = {0: "none is", 1: "one is"}.get(bad, f"{bad:,} are")
    out = f"{left_out:,} of {len(weighter.weights):,}" if left_out else "none"
    return (
        f"Of {looks:,} pictures that were looked at, {found} bad: about {100 * share:.0f} % "
        f"({100 * low:.0f} to {100 * high:.0f} %) of all. Training leaves out {out}."
    )


def _of_held_out(weighter: SoftConfidentWeighter) -> str:
    """What the model makes of the suspects that were held out."""
    count, left_out = len(weighter.weights), int((weighter.weights < 0.5).sum())
    if weighter.needs_scores:
        return (
            f"{left_out:,} of {count:,} pictures, the most suspect ones and some to compare them "
            "with, are held out until the model can judge them."
        )
    if left_out == 0:
        return "No evidence of bad pictures: nothing was down-weighted."
    rejected = weighter.rejected
    if rejected == 0:
        return (
            "The model finds some suspects a little stranger than others that it hadn't seen: "
            f"training leaves out {left_out:,} of {count:,} pictures, the first of the ranking."
        )
    are, them = ("is", "it") if rejected == 1 else ("are", "them")
    besides = (
        " Since no ranking finds all bad pictures, training also leaves out the next "
        f"{left_out - rejected:,} of it."
        if left_out > rejected
        else ""
    )
    return (
        f"{rejected:,} of {count:,} pictures {are} left out: the model, which wasn't trained on "
        f"{them}, finds {them} far stranger than others that it hadn't seen.{besides}"
    )
