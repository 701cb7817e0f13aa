"""Several optimizers that act as one torch optimizer."""

from collections import ChainMap
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override


class OptimizerGroup(Optimizer):
    """One or several optimizers as one.

    Parameter groups and per-parameter state are the wrapped optimizers' own, so schedulers,
    gradient scalers and clipping work on this object as on them.

    Args:
        optimizer: The optimizer to wrap, or a sequence of them.

    Raises:
        TypeError: If ``optimizer`` isn't a torch optimizer, or is LBFGS.
        ValueError: If there is none, or two of them own the same parameter.

    Example:
        >>> theta = torch.ones(2, requires_grad=True)
        >>> sgd = torch.optim.SGD([theta], lr=0.1)
        >>> OptimizerGroup(sgd).param_groups[0] is sgd.param_groups[0]
        True
    """

    def __init__(self, optimizer: Optimizer | Sequence[Optimizer]) -> None:
        # Optimizer.__init__ would create groups and state; here they are the wrapped optimizers'.
        self.optimizers = _checked_optimizers(optimizer)
        self.defaults = self.optimizers[0].defaults
        super().__setstate__({})  # hooks and profiling, which every torch optimizer has

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizers' own groups; changing one changes theirs."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> MutableMapping[Tensor, Any]:  # type: ignore[override]
        """The wrapped optimizers' own per-parameter state."""
        if len(self.optimizers) == 1:
            return self.optimizers[0].state
        return ChainMap(*(optimizer.state for optimizer in self.optimizers))

    def trained_parameters(self) -> list[Tensor]:
        """The parameters that the optimizers own and that require grad."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters, as for any torch optimizer."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer.

        Args:
            param_group: As for any torch optimizer.

        Raises:
            ValueError: If several optimizers are wrapped.
        """
        if len(self.optimizers) > 1:
            raise ValueError(
                f"{len(self.optimizers)} optimizers are wrapped; add the group to the one it "
                "belongs to: wrapper.optimizers[i].add_param_group(...)"
            )
        self.optimizers[0].add_param_group(param_group)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The states of the wrapped optimizers."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved.

        Args:
            state_dict: The saved state, from as many optimizers.

        Raises:
            ValueError: If it comes from something else, or from another number of optimizers.
        """
        self.check_state_dict(state_dict)
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a saved state fits, before anything is loaded.

        Args:
            state_dict: The saved state.

        Raises:
            ValueError: If it comes from something else, or from another number of optimizers.
        """
        if "optimizers" not in state_dict:
            raise ValueError(
                "this state was not saved by CoMetOptimizerWrapper.state_dict(); to continue from "
                "a plain optimizer's checkpoint, load it into that optimizer before wrapping it"
            )
        if len(state_dict["optimizers"]) != len(self.optimizers):
            raise ValueError(
                f"the saved state is of {len(state_dict['optimizers'])} optimizers, this wrapper "
                f"has {len(self.optimizers)}"
            )

    @override
    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        # Schedulers replace step on the instance by a function that can't be copied.
        state.pop("step", None)
        return state


def _checked_optimizers(optimizer: Optimizer | Sequence[Optimizer]) -> tuple[Optimizer, ...]:
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
    if not optimizers:
        raise ValueError("there's no optimizer to wrap; expected one or more")
    seen: set[int] = set()
    for wrapped in optimizers:
        if not isinstance(wrapped, Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer, got {type(wrapped).__name__}")
        if isinstance(wrapped, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS re-evaluates its closure while it steps, so neither weights nor a meta-step "
                "have a meaning there; wrap a first-order optimizer such as AdamW"
            )
        own = {id(p) for group in wrapped.param_groups for p in group["params"]}
        if own & seen:
            raise ValueError(
                "two of the wrapped optimizers own the same parameter, and would both step it. If "
                "they take turns, wrap each by itself, with one weighter for all, or let "
                "comet_meta.CoMet(loader, optimizers) guard them"
            )
        seen |= own
    return optimizers
