"""Context managers that put things back: tensors, buffers after an error, modes, random numbers."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def restore_on_exit(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Restore the tensors' values on leaving, also after an exception.

    Args:
        tensors: Tensors that the body changes in place.

    Yields:
        Copies of the values on entry.
    """
    saved = copy_tensors(tensors)
    try:
        yield saved
    finally:
        copy_values(tensors, saved)


@contextmanager
def undo_on_error(
    generator: torch.Generator, buffers: Sequence[Tensor]
) -> Iterator[Callable[[], None]]:
    """Restore random state and buffers if the body raises.

    Args:
        generator: Source of random numbers that the body draws from.
        buffers: Tensors that the body changes in place.

    Yields:
        A function that restores the buffers at any time.
    """
    state = generator.get_state()
    undo = partial(copy_values, buffers, copy_tensors(buffers))
    try:
        yield undo
    except BaseException:
        generator.set_state(state)
        undo()
        raise


@contextmanager
def eval_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """Set models to eval mode; on leaving, each module gets the mode that it had.

    Args:
        models: The models; a frozen part that was in eval mode stays in it.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def same_random_numbers(models: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Restore the random state on leaving: torch (CPU, the models' CUDA devices), NumPy, Python.

    Args:
        models: The models that the body uses.
    """
    devices = {p.device.index for model in models for p in model.parameters() if p.is_cuda}
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class RunningStatistics:
    """The running statistics of a model's batch norm layers, kept to be put back.

    Args:
        model: The model, or None for no statistics.
    """

    def __init__(self, model: nn.Module | None) -> None:
        modules = [] if model is None else model.modules()
        self._layers = [m for m in modules if getattr(m, "track_running_stats", False)]
        self._kept: list[Tensor] = []
        self.keep()

    def keep(self) -> None:
        """Keep the values that the statistics have now."""
        now = self._tensors()
        if len(self._kept) != len(now):
            self._kept = copy_tensors(now)
        else:
            copy_values(self._kept, now)

    def restore_if_not_finite(self) -> None:
        """Put the kept values back if one of the statistics is NaN or infinite."""
        now = self._tensors()
        if len(self._kept) == len(now) and not all(bool(t.isfinite().all()) for t in now):
            copy_values(now, self._kept)

    def _tensors(self) -> list[Tensor]:
        return [buffer for layer in self._layers for buffer in layer.buffers(recurse=False)]


def copy_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors, without their graph."""
    new = [torch.empty_like(tensor, requires_grad=False) for tensor in tensors]
    copy_values(new, tensors)
    return new


@torch.no_grad()
def copy_values(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy the values of each source into its target, in place."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
        # Inside autocast, torch caches low-precision copies of the parameters, now out of date.
        torch.clear_autocast_cache()
