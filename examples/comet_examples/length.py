"""How long to train, as a set's own pictures say, without any label.

A longer training fits the training pictures more closely. Whether it fits other pictures of the
same kind more closely too, or only these few, shows in pictures that it was not trained on:

1. Hold out a fifth of the training pictures.
2. Train on the others, once for each length.
3. Take the mean loss of the pictures that were held out.
4. Choose the length with the lowest mean loss, the shorter of two that are equal.

Mean and not median: a longer training may fit most pictures more closely and a few far worse, and
these few may become false alarms. The pictures should all be good: nothing tells the loss of a bad
one from that of an odd good one.

Several trainings decide, and not one that is stopped early: learning rates that fall to 0 by the
end are part of a length. On the choice by a held-out loss: Prechelt, Early stopping - but when?,
1998.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from comet_examples.detectors import Detector
from comet_examples.training import FeatureRows, TrainingSettings, train

LENGTHS = (1.0, 5.0)
"""Multiples of the settings' length that are tried."""
HELD_OUT = 0.2
_FEWEST = 10  # of fewer pictures, one or none would be held out
_PASSES = 8  # losses of noise or of some of the patches differ from pass to pass


def losses_by_length(
    build: Callable[[], Detector],
    data: FeatureRows,
    settings: TrainingSettings,
    *,
    lengths: Sequence[float] = LENGTHS,
    device: torch.device | str = "cpu",
) -> dict[float, Tensor]:
    """Losses of pictures that were held out, for each length of training.

    All weights are 1, whatever the settings' method is: every method gets the same length.

    Args:
        build: Makes the untrained detector.
        data: Features of the training set. No label comes with them.
        settings: How to train; the length is what is stretched.
        lengths: Multiples of the settings' length, > 0.
        device: Where to train.

    Returns:
        Losses (H,) of the pictures that were held out by multiple, on the CPU.

    Raises:
        ValueError: If there are fewer than ten pictures.
    """
    if len(data) < _FEWEST:
        raise ValueError(
            f"there are {len(data)} training pictures; expected at least {_FEWEST}, of which a "
            "fifth is held out to choose the length of training: give a number of steps instead"
        )
    # 1. The draw has random numbers of its own, the same for every length.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(settings.seed))
    count = round(HELD_OUT * len(data))
    held_out, kept = (
        FeatureRows(data.features, data.rows[rows.sort().values])
        for rows in (order[:count], order[count:])
    )
    plain = TrainingSettings(
        "plain",
        settings.epochs,
        settings.batch_size,
        settings.seed,
        steps=settings.steps,
        schedule=settings.schedule,
    )
    found = {}
    for times in lengths:
        training = train(build, kept, plain.stretched(times), device=device)  # 2.
        torch.manual_seed(settings.seed)  # the same noise for every length
        found[times] = mean_losses(training.detector, held_out, device)  # 3.
    return found


def chosen(losses: Mapping[float, float]) -> float:
    """The multiple with the lowest loss, the smaller of two that are equal.

    Args:
        losses: Mean losses of held-out pictures by multiple.

    Raises:
        ValueError: If one of them isn't finite.

    Example:
        >>> chosen({1.0: 0.3, 5.0: 0.1})
        5.0
    """
    if not all(math.isfinite(loss) for loss in losses.values()):
        raise ValueError(
            f"the losses of held-out pictures are {dict(losses)}; expected finite ones: "
            "give a number of steps instead, or look for features that aren't finite"
        )
    return min(sorted(losses), key=lambda times: losses[times])  # 4. min takes the first


@torch.no_grad()
def mean_losses(detector: Detector, data: FeatureRows, device: torch.device | str) -> Tensor:
    """The losses of pictures in eval mode, the mean of several passes.

    Args:
        detector: In eval mode.
        data: Features of N pictures.
        device: Where the detector is.

    Returns:
        Losses (N,), on the CPU.
    """
    passes = [
        torch.cat([detector.losses(batch).cpu() for batch in data.batches(device)])
        for _ in range(_PASSES)
    ]
    return torch.stack(passes).mean(dim=0)
