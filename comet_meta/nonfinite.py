"""What is said and done where losses, gradients or parameters are NaN or infinite."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from comet_meta import distributed
from comet_meta.gradients import all_finite

_LOGGER = logging.getLogger(__name__)
_MAX_NAMED = 8
_ADVICE = "look at these samples, lower the learning rate, or leave autocast for the loss"


@contextmanager
def finite_steps_only() -> Iterator[None]:
    """Clear gradients that are NaN or infinite before any optimizer's step in the body.

    For training code whose loss is out of reach. The check waits for the device.
    """

    def clear(optimizer: Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not all_finite([p.grad for p in parameters if p.grad is not None]):
            check_parameters_finite(parameters)
            _LOGGER.warning("step skipped: its gradients are NaN or infinite; %s", _ADVICE)
            optimizer.zero_grad()

    handle = register_optimizer_step_pre_hook(clear)
    try:
        yield
    finally:
        handle.remove()


def warn_of_samples_left_out(finite: Tensor, index: Tensor | None) -> None:
    """Name the samples whose loss isn't finite.

    Args:
        finite: Which losses are finite, shape (B,).
        index: Positions of the samples in the data set, shape (B,), where known.
    """
    rows = (~finite).nonzero().flatten().cpu()
    if not len(rows):
        return  # the sample is in another process's batch
    where = f"rows {_listed(rows)} of the batch"
    if index is not None:
        where = f"samples {_listed(index.cpu()[rows])}"
    _LOGGER.warning(
        "%d of %d losses are NaN or infinite and left out: %s; %s",
        len(rows),
        len(finite),
        where,
        _ADVICE,
    )


def warn_of_batch_left_out(reason: str) -> None:
    """Warn that a batch is left out, with the reason."""
    _LOGGER.warning("batch left out: %s", reason)


def check_parameters_finite(parameters: Sequence[Tensor]) -> None:
    """Check that the parameters are finite, without which no step can be taken.

    Args:
        parameters: All trained parameters.

    Raises:
        ValueError: If one of them is NaN or infinite.
    """
    if not distributed.all_agree(all_finite(parameters), device_of(parameters)):
        raise ValueError(
            "the model's parameters are NaN or infinite, so no step can be taken any more; go back "
            "to the last checkpoint and lower the learning rate, clip the gradients, or leave "
            "autocast for the loss"
        )


def device_of(parameters: Sequence[Tensor]) -> torch.device:
    """The device of the parameters; the CPU where there are none."""
    return parameters[0].device if parameters else torch.device("cpu")


def _listed(positions: Tensor) -> str:
    listed: list[int] = positions.tolist()
    return str(listed) if len(listed) <= _MAX_NAMED else f"{listed[:_MAX_NAMED]} and others"
