"""The state of a run: a resumed run equals an uninterrupted one."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from comet_meta.guard import GuardedOptimizers, StepGuard
from comet_meta.penalty import CovarianceMetaRegularizer
from comet_meta.weights.weighter import SoftConfidentWeighter

_LOGGER = logging.getLogger(__name__)


class ResumableOptimizers(GuardedOptimizers):
    """Optimizers as one, saved and copied together with weights, loss history and random state.

    Args:
        optimizer: The optimizer to wrap, or a sequence of them.
        weighter: Weights of the training samples; None for none.
        regularizer: Has the loss history; None for none.
        model: The module whose batch-norm statistics survive a batch with NaN; None for none.
        generator: Source of the random split of a batch (on the CPU).
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        weighter: SoftConfidentWeighter | None,
        regularizer: CovarianceMetaRegularizer | None,
        model: nn.Module | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__(optimizer, model)
        self.weighter = weighter
        self.regularizer = regularizer
        self.generator = generator

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state of a run: optimizers, weights, loss history and random state.

        ``"state"`` and ``"param_groups"`` are as in any torch optimizer, so
        ``torch.distributed.checkpoint`` can use it. That keeps these two alone: save the weighter
        (a module) and the regularizer beside it.

        Returns:
            Tensors and plain containers only: ``torch.load(..., weights_only=True)`` reads it.
        """
        self._check_recorded_batches()
        return super().state_dict()

    def method_state_dict(self) -> dict[str, Any]:
        """The part of :meth:`state_dict` that isn't the optimizers'."""
        self._check_recorded_batches()
        return self._own_state()

    def load_method_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`method_state_dict` saved.

        Args:
            state_dict: The saved state, from a wrapper with the same components.

        Raises:
            ValueError: As for :meth:`load_state_dict`.
        """
        self._check_own_state(state_dict)
        self._load_own_state(state_dict)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved; a resumed run then equals an uninterrupted one.

        Args:
            state_dict: The saved state, from a wrapper with the same components. If it comes from
                ``torch.distributed.checkpoint``, only the optimizers' state is restored.

        Raises:
            ValueError: If it comes from something else, from a wrapper with other components, or
                belongs to other samples. Nothing has changed then.
        """
        super().load_state_dict(state_dict)

    @override
    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().check_state_dict(state_dict)
        if "generator" in state_dict:
            self._check_own_state(state_dict)

    @override
    def _own_state(self) -> dict[str, Any]:
        return {
            "weighter": None if self.weighter is None else self.weighter.state_dict(),
            "regularizer": None if self.regularizer is None else self.regularizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    @override
    def _load_own_state(self, state_dict: dict[str, Any]) -> None:
        if "generator" not in state_dict:
            _LOGGER.info("the saved state has the optimizers alone: weights and losses stay")
            return
        if self.weighter is not None:
            self.weighter.load_state_dict(state_dict["weighter"])
        if self.regularizer is not None:
            self.regularizer.load_state_dict(state_dict["regularizer"])
        self.generator.set_state(state_dict["generator"].cpu())
        self._guard = StepGuard(self.model)

    def _check_own_state(self, state_dict: dict[str, Any]) -> None:
        for name, part in (("weighter", self.weighter), ("regularizer", self.regularizer)):
            if (part is None) != (state_dict[name] is None):
                here, there = ("no", "a") if part is None else ("a", "no")
                raise ValueError(f"the saved state has {there} {name}, this wrapper has {here}")
            if part is not None:
                part.check_state_dict(state_dict[name])

    @override
    def __getstate__(self) -> dict[str, Any]:
        # A generator itself can't be copied.
        return {**super().__getstate__(), "generator": self.generator.get_state()}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator()
        generator.set_state(state["generator"])
        super().__setstate__({**state, "generator": generator})
