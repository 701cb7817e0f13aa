"""The guard against NaN and infinite values: samples are left out, steps are skipped."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from comet_meta import distributed
from comet_meta.restore import RunningStatistics

_LOGGER = logging.getLogger(__name__)
_MAX_NAMED = 8
_ADVICE = "look at these samples, lower the learning rate, or leave autocast for the loss"


class DeferredFlag:
    """A flag that a device computes and that is read later, without stopping the device.

    Reading a value on the host waits until the device has computed it. Here the copy to the host is
    queued at once. Reading it later waits only for the work queued before the copy: for a loss this
    is the forward pass, and the backward pass keeps the device busy meanwhile.

    Args:
        flag: Bool of shape (), on any device.

    Example:
        >>> bool(DeferredFlag(torch.tensor(True)))
        True
    """

    def __init__(self, flag: Tensor) -> None:
        # Only CUDA tells the host when a non-blocking copy is complete.
        self._flag = flag.detach().to("cpu", non_blocking=flag.is_cuda)
        self._copied: torch.cuda.Event | None = None
        if flag.is_cuda:
            self._copied = torch.cuda.current_stream(flag.device).record_event()

    def __bool__(self) -> bool:
        """The flag's value."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._flag)


class _Batch(NamedTuple):
    finite: Tensor  # (B,)
    samples: Tensor | None  # (B,)
    all_finite: DeferredFlag
    losses: Tensor | None  # mean training and validation loss, (2,)


class StepGuard:
    """Decides whether the next step can be taken, from the batches since the last one.

    Args:
        model: The module whose batch-norm statistics survive a batch with NaN; None for none.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._unchecked: list[_Batch] = []
        self._any_left_out = False
        self._any_usable = False
        self._answer: bool | None = None
        self._statistics = RunningStatistics(model)

    def reset(self) -> None:
        """Forget the batches recorded so far."""
        self._any_left_out = self._any_usable = False
        self._answer = None

    def record_batch(self, finite: Tensor, index: Tensor | None, losses: Tensor | None) -> None:
        """Record a batch; its losses are checked later, by :meth:`check_batches`.

        Args:
            finite: Which of its losses are finite, shape (B,).
            index: Positions of its samples in the data set, shape (B,), where known.
            losses: Mean losses of its training and validation part, shape (2,), where needed.
        """
        if self._answer is not None:
            self.reset()
        all_finite = distributed.average(finite.all().float()) == 1
        self._unchecked.append(_Batch(finite, index, DeferredFlag(all_finite), losses))

    def check_batches(self) -> list[Tensor]:
        """Check the batches recorded since the last call; warn of samples that were left out.

        Returns:
            For each batch whose losses are all finite, the losses (2,) that it was recorded with.
        """
        unchecked, self._unchecked = self._unchecked, []
        pairs = []
        for batch in unchecked:
            if batch.all_finite:
                self._any_usable = True
                if batch.losses is not None:
                    pairs.append(batch.losses)
                continue
            warn_of_samples_left_out(batch.finite, batch.samples)
            self._any_left_out = True
            none_finite = not bool(batch.finite.any())
            self._any_usable |= not distributed.all_agree(none_finite, batch.finite.device)
        return pairs

    def record_gradient(self, *, usable: bool) -> None:
        """Record whether a batch had a gradient that could be added."""
        if self._answer is not None:
            self.reset()
        self._any_left_out |= not usable
        self._any_usable |= usable

    def allows_step(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the gradients can be used; the same answer until a new batch is recorded.

        Args:
            parameters: The trained parameters, with the gradients of the batches in ``.grad``.
        """
        if self._answer is None:
            self._answer = self._gradients_usable(parameters)
            if self._any_left_out:
                self._statistics.restore_if_not_finite()
            else:
                self._statistics.keep()
        return self._answer

    def _gradients_usable(self, parameters: Sequence[Tensor]) -> bool:
        if not self._any_left_out:
            return True
        if not self._any_usable:
            check_parameters_finite(parameters)
            _LOGGER.warning("step skipped: none of its losses could be used")
            return False
        gradients = [p.grad for p in parameters if p.grad is not None]
        finite = bool(parameters) and all_finite(gradients)  # unknown without parameters
        if distributed.all_agree(finite, _device(parameters)):
            return True
        check_parameters_finite(parameters)
        _LOGGER.warning(
            "step skipped: although they were left out, these samples made the gradients NaN or "
            "infinite (as a NaN in a picture does); step(closure, index) learns from the others "
            "all the same"
        )
        return False


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


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor has an entry that is NaN or infinite; waits for their device.

    Args:
        tensors: Any shapes, floating-point or complex dtypes, also sparse or distributed (then the
            part on this process is checked).

    Example:
        >>> all_finite([torch.tensor([1e30])]), all_finite([torch.tensor([torch.nan])])
        (True, False)
    """
    parts = [_stored_values(tensor.detach()) for tensor in tensors]
    if not parts:
        return True
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(parts)])
    if bool(norms.isfinite().all()):
        return True
    # The squares in a norm can overflow although the entries are finite.
    return all(bool(part.isfinite().all()) for part in parts)


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
    if not distributed.all_agree(all_finite(parameters), _device(parameters)):
        raise ValueError(
            "the model's parameters are NaN or infinite, so no step can be taken any more; go back "
            "to the last checkpoint and lower the learning rate, clip the gradients, or leave "
            "autocast for the loss"
        )


def _device(parameters: Sequence[Tensor]) -> torch.device:
    return parameters[0].device if parameters else torch.device("cpu")


def _stored_values(tensor: Tensor) -> Tensor:
    """The values that this process holds of a sparse or distributed tensor."""
    if tensor.layout != torch.strided:
        return tensor.coalesce().values()
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _listed(positions: Tensor) -> str:
    listed: list[int] = positions.tolist()
    return str(listed) if len(listed) <= _MAX_NAMED else f"{listed[:_MAX_NAMED]} and others"
