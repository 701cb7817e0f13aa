"""Steps of optimizers that wait for finite gradients: samples are left out, steps are skipped."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from comet_meta import distributed
from comet_meta.gradients import all_finite
from comet_meta.nonfinite import check_parameters_finite, device_of, warn_of_samples_left_out
from comet_meta.restore import RunningStatistics
from comet_meta.wrapped import OptimizerGroup

_LOGGER = logging.getLogger(__name__)


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
        if distributed.all_agree(finite, device_of(parameters)):
            return True
        check_parameters_finite(parameters)
        _LOGGER.warning(
            "step skipped: although they were left out, these samples made the gradients NaN or "
            "infinite (as a NaN in the data does); step(closure, index) learns from the others "
            "all the same"
        )
        return False


class GuardedOptimizers(OptimizerGroup):
    """Optimizers as one that step unless a sample made the gradients NaN or infinite.

    This is step 7 of :class:`~comet_meta.CoMetOptimizerWrapper`, which records its batches here.

    Args:
        optimizer: The optimizer to wrap, or a sequence of them.
        model: The module whose batch-norm statistics survive a batch with NaN; None for none.
    """

    def __init__(self, optimizer: Optimizer | Sequence[Optimizer], model: nn.Module | None) -> None:
        super().__init__(optimizer)
        self.model = model
        self._guard = StepGuard(model)

    def allows_step(self) -> bool:
        """Whether the gradients in ``.grad`` can be used (step 7); a warning says so if not.

        :meth:`step` asks by itself. A loop that steps the optimizers in another way asks before it,
        after the last ``backward()``. If the answer is no, it clears the gradients instead. Asked
        again before new losses came, the answer is the same. Running statistics of batch norm in
        ``model`` that a batch made NaN are put back.

        Returns:
            False if a sample whose loss is NaN or infinite made the gradients so, or no loss was
            finite.

        Raises:
            ValueError: If the parameters are NaN or infinite.

        Example:
            >>> from comet_meta import CoMetOptimizerWrapper
            >>> theta = torch.ones(3, requires_grad=True)
            >>> optimizer = CoMetOptimizerWrapper(torch.optim.SGD([theta], lr=0.1))
            >>> optimizer.objective(theta * torch.tensor([1.0, torch.nan, 1.0])).backward()
            >>> optimizer.allows_step()
            False
        """
        self._check_recorded_batches()
        return self._guard.allows_step(self.trained_parameters())

    def _record_batch(self, finite: Tensor, index: Tensor | None, pair: Tensor | None) -> None:
        """Record which losses (B,) of a batch are finite, and its mean losses (2,) for Sigma."""
        self._guard.record_batch(finite, index, pair)
        if finite.device.type == "cpu":
            self._check_recorded_batches()

    def _check_recorded_batches(self) -> None:
        """Check batches of :meth:`objective` that weren't checked; record their losses (step 6)."""
        for pair in self._guard.check_batches():
            self._record_losses(pair)

    def _record_losses(self, pair: Tensor) -> None:
        """What a subclass does with the mean losses (2,) of a batch without NaN."""

    def _step_optimizers(self, closure: Callable[[], float] | None = None) -> float | None:
        loss: float | None = None
        if closure is not None and len(self.optimizers) > 1:
            with torch.enable_grad():
                loss = closure()
            closure = None
        # 7) Step, unless a gradient is NaN or infinite.
        if self.allows_step():
            if closure is not None:
                loss = self.optimizers[0].step(self.guarded(closure))
            else:
                for optimizer in self.optimizers:
                    _step_without_closure(optimizer)
        self._guard.reset()
        return loss

    def guarded(self, closure: Callable[[], float]) -> Callable[[], float]:
        """A closure for an optimizer's step that clears the gradients if they can't be used.

        Args:
            closure: Computes loss and gradients, as for any torch optimizer.

        Returns:
            The same with :meth:`allows_step` behind it.
        """
        parameters = self.trained_parameters()
        versions = [parameter._version for parameter in parameters]

        def guarded() -> float:
            loss = closure()
            if not self.allows_step():
                # An optimizer that has moved the parameters (SAM) needs gradients to move back.
                moved = versions != [parameter._version for parameter in parameters]
                self.zero_grad(set_to_none=not moved)
            return loss

        return guarded

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_guard": StepGuard(self.model)}


def _step_without_closure(optimizer: Optimizer) -> None:
    try:
        optimizer.step()
    except (AssertionError, TypeError) as error:
        if "closure" not in str(error):
            raise
        raise TypeError(
            f"{type(optimizer).__name__} computes gradients in its step and needs a closure: call "
            "wrapper.backward(closure, index) or objective(losses, index).backward(), and then "
            "wrapper.step(again) with a function that does the same once more"
        ) from error
