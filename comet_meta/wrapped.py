"""Several optimizers that act as one torch optimizer."""

import functools
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

_MARK = "comet_meta"
"""Key that saved parameter groups have, also after torch.distributed.checkpoint rebuilt them."""

Step = TypeVar("Step", bound=Callable[..., Any])


def with_own_hooks(step: Step) -> Step:
    """Let ``step`` call the hooks that were registered on its own object, and no global ones.

    torch lets every optimizer's ``step`` call the global hooks too. Each wrapped optimizer calls
    them already, and they must not be called twice.
    """

    @functools.wraps(step)
    def step_with_hooks(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        every: tuple[Any, ...] = (self, *args)
        for before in self._optimizer_step_pre_hooks.values():
            changed = before(self, every, kwargs)
            if changed is not None:
                every, kwargs = changed
        result = step(*every, **kwargs)
        for after in self._optimizer_step_post_hooks.values():
            after(self, every, kwargs)
        return result

    step_with_hooks.hooked = True  # type: ignore[attr-defined]  # torch adds its own hooks if unset
    return cast("Step", step_with_hooks)


def refuse_index(step: Step) -> Step:
    """Let a ``step`` that calls its closure itself, without rows, refuse an ``index``.

    Args:
        step: The step of a class that stands in for a wrapper and takes a closure alone.

    Returns:
        The step; with an index, by position or by name, it raises a TypeError that names the way.
    """

    @functools.wraps(step)
    def step_without_index(
        self: Optimizer, closure: Any = None, index: Any = None, **kwargs: Any
    ) -> Any:
        if index is not None:
            raise TypeError(
                f"{type(self).__name__} calls the closure of a step itself, without rows; call "
                "optimizer.backward(closure, index) and then optimizer.step()"
            )
        return step(self, closure, **kwargs)

    return cast("Step", step_without_index)


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
        if len(self.optimizers) == 1:
            return self.optimizers[0].param_groups
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return _JoinedGroups(groups)

    @property
    def state(self) -> MutableMapping[Tensor, Any]:  # type: ignore[override]
        """The wrapped optimizers' own per-parameter state."""
        if len(self.optimizers) == 1:
            return self.optimizers[0].state
        return _JoinedState(self.optimizers)

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
            _refuse_group(len(self.optimizers))
        self.optimizers[0].add_param_group(param_group)

    def train(self, mode: bool = True) -> None:
        """Set the wrapped optimizers to train mode, where they have one (schedule-free ones do).

        Args:
            mode: False for eval mode.
        """
        for optimizer in self.optimizers:
            switch = getattr(optimizer, "train" if mode else "eval", None)
            if switch is not None:
                switch()

    def eval(self) -> None:
        """Set the wrapped optimizers to eval mode, where they have one."""
        self.train(mode=False)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The states of the wrapped optimizers, joined in the shape of one torch optimizer's.

        Returns:
            ``"state"`` and ``"param_groups"`` with the parameters numbered through;
            ``"optimizers"``: what else the optimizers save, one dictionary each.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        joined: dict[str, Any] = {"state": {}, "param_groups": [], "optimizers": []}
        first = 0
        for optimizer in self.optimizers:
            state = optimizer.state_dict()
            groups = [_renumbered(group, first) for group in state.pop("param_groups")]
            joined["state"] |= _shifted(state.pop("state"), first)
            joined["param_groups"] += [{**group, _MARK: len(self.optimizers)} for group in groups]
            joined["optimizers"].append(state)
            first += sum(len(group["params"]) for group in groups)
        joined |= self._own_state()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, joined)
            joined = joined if changed is None else changed
        return joined

    def _own_state(self) -> dict[str, Any]:
        """What a subclass saves beside the optimizers' states."""
        return {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved. Nothing changes if it doesn't fit.

        Args:
            state_dict: The saved state, from as many optimizers.

        Raises:
            ValueError: If it comes from something else, from another number of optimizers, or from
                optimizers with other parameter groups.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.check_state_dict(state_dict)
        others = state_dict.get("optimizers") or [{} for _ in self.optimizers]
        every = {p for group in state_dict["param_groups"] for p in group["params"]}
        place = first = 0
        for optimizer, other in zip(self.optimizers, others, strict=True):
            groups = state_dict["param_groups"][place : place + len(optimizer.param_groups)]
            own = {p for group in groups for p in group["params"]}
            state = {k: v for k, v in state_dict["state"].items() if k in own or k not in every}
            groups = [_renumbered(group, -first) for group in groups]
            optimizer.load_state_dict(
                {**other, "state": _shifted(state, -first), "param_groups": groups}
            )
            place += len(groups)
            first += len(own)
        self._load_own_state(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load_own_state(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`_own_state` saved."""

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a saved state fits, before anything is loaded.

        Args:
            state_dict: The saved state.

        Raises:
            ValueError: If it comes from something else, from another number of optimizers, or from
                optimizers with other parameter groups.
        """
        groups = state_dict.get("param_groups", [])
        if not any(_MARK in group for group in groups):
            raise ValueError(
                "this state was not saved by CoMetOptimizerWrapper.state_dict(); to continue from "
                "a plain optimizer's checkpoint, load it into that optimizer before wrapping it"
            )
        count = groups[0][_MARK]
        if count != len(self.optimizers):
            raise ValueError(
                f"the saved state is of {count} optimizers, this wrapper has {len(self.optimizers)}"
            )
        saved, own = ([len(g["params"]) for g in each] for each in (groups, self.param_groups))
        if saved != own:
            raise ValueError(
                f"the saved state has parameter groups of {saved} parameters, the wrapped "
                f"optimizers have groups of {own}; build model and optimizers as they were"
            )

    @override
    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        # Schedulers replace step on the instance by a function that can't be copied.
        state.pop("step", None)
        return state


class SteppedByTheLoop(Optimizer):
    """Stands for optimizers that a training loop steps itself, where a wrapper needs an optimizer.

    Args:
        optimizers: The loop's optimizers; they may share parameters.

    Example:
        >>> theta = torch.ones(2, requires_grad=True)
        >>> sgd = torch.optim.SGD([theta], lr=0.1)
        >>> [len(group["params"]) for group in SteppedByTheLoop([sgd, sgd]).param_groups]
        [1]
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        self.defaults: dict[str, Any] = {}
        super().__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """One group with the parameters that the optimizers have now, each once."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        parameters = {id(p): p for group in groups for p in group["params"]}
        return [{"params": list(parameters.values())}]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """Empty: the state is the loop's."""
        return {}

    @override
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Leave parameters and gradients as they are."""


class _JoinedGroups(list[dict[str, Any]]):
    """The groups of several optimizers, to which none can be added."""

    def append(self, _: object) -> NoReturn:
        _refuse_group(len(self))

    extend = insert = __iadd__ = append  # type: ignore[assignment]


class _JoinedState(MutableMapping[Tensor, Any]):
    """The per-parameter states of several optimizers; each keeps those of its own parameters."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def _owner(self, parameter: Tensor) -> MutableMapping[Tensor, Any]:
        for optimizer in self._optimizers:
            groups = optimizer.param_groups
            if any(parameter is p for group in groups for p in group["params"]):
                return optimizer.state
        raise KeyError(parameter)

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._owner(parameter)[parameter]

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        self._owner(parameter)[parameter] = value

    def __delitem__(self, parameter: Tensor) -> None:
        del self._owner(parameter)[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for optimizer in self._optimizers for parameter in optimizer.state)

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in optimizer.state for optimizer in self._optimizers)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


def _refuse_group(count: int) -> NoReturn:
    raise ValueError(
        f"{count} optimizers are wrapped; add the group to the one it belongs to: "
        "wrapper.optimizers[i].add_param_group(...)"
    )


def _renumbered(group: dict[str, Any], by: int) -> dict[str, Any]:
    """A saved group without the mark, with other parameter numbers (names stay)."""
    group = {key: value for key, value in group.items() if key != _MARK}
    group["params"] = [p + by if isinstance(p, int) else p for p in group["params"]]
    return group


def _shifted(state: dict[Any, Any], by: int) -> dict[Any, Any]:
    """A saved per-parameter state with other parameter numbers."""
    return {key + by if isinstance(key, int) else key: value for key, value in state.items()}


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
