"""What becomes of samples whose loss is NaN or infinite, and of steps that fail."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from comet_meta import distributed
from comet_meta.restore import copies, copy_values

_LOGGER = logging.getLogger(__name__)
_NAMED = 8
_ADVICE = "look at these samples, lower the learning rate, or leave autocast for the loss"


class Look:
    """A look at a flag that doesn't stall the device that computes it.

    Reading a value means waiting until the device has got to it. The copy is queued at once, so a
    look that is read later waits only for what was queued before it: for a loss the forward pass,
    while the backward pass behind it keeps the device busy.

    Args:
        flag: Of any device, bool of shape ().

    Example:
        >>> bool(Look(torch.tensor(True)))
        True
    """

    def __init__(self, flag: Tensor) -> None:
        # Only CUDA lets the host know when a copy that doesn't block is complete.
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
    clean: Look
    losses: Tensor | None  # of training and validation part, (2,)


class LossWatch:
    """Account of the losses that went into the objective since the last step."""

    def __init__(self) -> None:
        self._unread: list[_Batch] = []
        self._dropped = False
        self._usable = False

    def add(self, finite: Tensor, index: Tensor | None, losses: Tensor | None) -> None:
        """Note a batch.

        Args:
            finite: Which of its losses are finite, shape (B,).
            index: Positions of its samples in the data set, shape (B,), where known.
            losses: Mean losses of its training and validation part, shape (2,), where needed.
        """
        clean = distributed.average(finite.all().float()) == 1
        self._unread.append(_Batch(finite, index, Look(clean), losses))

    def read(self) -> list[Tensor]:
        """Look at the batches not looked at yet, and name their samples that were dropped.

        Returns:
            For each batch without such a sample the losses that it was added with.
        """
        unread, self._unread = self._unread, []
        observed = []
        for batch in unread:
            if batch.clean:
                self._usable = True
                if batch.losses is not None:
                    observed.append(batch.losses)
                continue
            warn_of_dropped(batch.finite, batch.samples)
            self._dropped = True
            self._usable |= not everywhere(not bool(batch.finite.any()), batch.finite.device)
        return observed

    def note(self, *, usable: bool) -> None:
        """Note a batch whose gradient was added, or couldn't be."""
        self._dropped |= not usable
        self._usable |= usable

    def forbids_step(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the gradients can't be used; starts a new account.

        Args:
            parameters: With the gradients that were made of the batches.
        """
        dropped, usable = self._dropped, self._usable
        self._dropped = self._usable = False
        if not dropped:
            return False
        if not usable:
            check_parameters(parameters)
            _LOGGER.warning("step skipped: none of its losses could be used")
            return True
        gradients = [p.grad for p in parameters if p.grad is not None]
        if everywhere(all_finite(gradients), parameters[0].device):
            return False
        check_parameters(parameters)
        _LOGGER.warning(
            "step skipped: although they were left out, these samples made the gradients NaN or "
            "infinite (as a NaN in a picture does); step(closure, index) learns from the others "
            "all the same"
        )
        return True


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor has an entry that is NaN or infinite; waits for their device.

    Args:
        tensors: Of any shapes and floating-point or complex dtypes, also sparse or distributed (of
            which the part on this process counts).

    Example:
        >>> all_finite([torch.tensor([1e30])]), all_finite([torch.tensor([torch.nan])])
        (True, False)
    """
    parts = [_local(tensor.detach()) for tensor in tensors]
    if not parts:
        return True
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(parts)])
    if bool(norms.isfinite().all()):
        return True
    # Squares overflow where the entries themselves needn't.
    return all(bool(part.isfinite().all()) for part in parts)


def everywhere(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set in every process, so that all of them decide alike."""
    if distributed.world_size() == 1:
        return flag
    return bool(distributed.average(torch.tensor(float(flag), device=device)) == 1)


def warn_of_dropped(finite: Tensor, index: Tensor | None) -> None:
    """Name the samples whose loss isn't finite.

    Args:
        finite: Which losses are finite, shape (B,).
        index: Positions of the samples in the data set, shape (B,), where known.
    """
    rows = (~finite).nonzero().flatten().cpu()
    if not len(rows):
        return  # those of another process
    where = f"rows {_some(rows)} of the batch"
    if index is not None:
        where = f"samples {_some(index.cpu()[rows])}"
    _LOGGER.warning(
        "%d of %d losses are NaN or infinite and left out: %s; %s",
        len(rows),
        len(finite),
        where,
        _ADVICE,
    )


def warn_of_left_out(reason: str) -> None:
    """Say why a batch isn't learned from."""
    _LOGGER.warning("batch left out: %s", reason)


def check_parameters(parameters: Sequence[Tensor]) -> None:
    """Refuse to go on with a model that is lost.

    Args:
        parameters: All that are trained.

    Raises:
        ValueError: If they are NaN or infinite, so that no step could be taken any more.
    """
    if not everywhere(all_finite(parameters), parameters[0].device):
        raise ValueError(
            "the model's parameters are NaN or infinite, so no step can be taken any more; go back "
            "to the last checkpoint and lower the learning rate, clip the gradients, or leave "
            "autocast for the loss"
        )


@contextmanager
def undone_on_error(
    generator: torch.Generator, buffers: Sequence[Tensor]
) -> Iterator[Callable[[], None]]:
    """Give random state and buffers their values back if the body raises.

    Args:
        generator: Source of random numbers that the body draws from.
        buffers: Tensors that the body changes in place.

    Yields:
        A function that gives the buffers their values back at any time.
    """
    state = generator.get_state()
    undo = partial(copy_values, buffers, copies(buffers))

    try:
        yield undo
    except BaseException:
        generator.set_state(state)
        undo()
        raise


@contextmanager
def evaluating(model: nn.Module | None) -> Iterator[None]:
    """Have a model in eval mode, where batch norm doesn't spread one sample's NaN to all.

    Args:
        model: The model; None for nothing.
    """
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _local(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided:
        return tensor.coalesce().values()
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _some(positions: Tensor) -> str:
    listed: list[int] = positions.tolist()
    return str(listed) if len(listed) <= _NAMED else f"{listed[:_NAMED]} and others"
