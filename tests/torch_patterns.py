"""Patterns of torch's own optimizer tests, run against the wrapper around each torch optimizer.

The optimizers and their settings come from ``torch.testing._internal.common_optimizers``, which is
part of torch's wheel; the tests themselves (``test/test_optim.py``) are not, so their patterns are
written here in our words, under torch's names. ``python tests/torch_patterns.py`` prints the table
of ``docs/reliability.md``.
"""

import copy
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db

from comet_meta import CoMetOptimizerWrapper, SoftConfidentWeighter

BATCH = 6
DATA = torch.randn(BATCH, 4, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
INDEX = torch.arange(BATCH)
NOT_APPLICABLE = {"LBFGS"}  # refused: it evaluates its closure as often as it likes


class Pair:
    """A bare optimizer and a wrapped one, each on parameters of its own with equal values."""

    def __init__(
        self, info: OptimizerInfo, settings: dict[str, Any], *, named: bool = False
    ) -> None:
        self.sparse = info.only_supports_sparse_grads
        self.named = named
        self.sides = [self._side(info, settings, wrapped=wrapped) for wrapped in (False, True)]

    def _side(self, info: OptimizerInfo, settings: dict[str, Any], *, wrapped: bool) -> Any:
        torch.manual_seed(1)
        dtype = torch.float32
        if self.sparse:
            model: nn.Module = nn.Embedding(BATCH, 4, sparse=True, dtype=dtype)
        else:
            model = nn.Sequential(
                nn.Linear(4, 5, bias=False, dtype=dtype), nn.Linear(5, 4, bias=False, dtype=dtype)
            )
        parameters = list(model.named_parameters() if self.named else model.parameters())
        optimizer = info.optim_cls(parameters, **settings)
        if wrapped:
            optimizer = CoMetOptimizerWrapper(optimizer, weighter=SoftConfidentWeighter(BATCH))
        return model, optimizer

    def losses(self, model: nn.Module) -> Tensor:
        output: Tensor = model(INDEX if self.sparse else DATA)
        return (output - DATA).square().mean(dim=1)

    def backward(self, side: Any) -> float:
        model, optimizer = side
        losses = self.losses(model)
        wrapped = isinstance(optimizer, CoMetOptimizerWrapper)
        loss = optimizer.objective(losses, INDEX) if wrapped else losses.mean()
        loss.backward()
        return float(loss.detach())

    def steps(self, count: int, each: Callable[[], None] = lambda: None) -> None:
        for _ in range(count):
            for side in self.sides:
                side[1].zero_grad()
                self.backward(side)
                side[1].step()
            each()

    def assert_equal(self) -> None:
        (bare, _), (wrapped, _) = self.sides
        for ours, theirs in zip(wrapped.parameters(), bare.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    @property
    def wrapped(self) -> tuple[nn.Module, CoMetOptimizerWrapper]:
        return self.sides[1]  # type: ignore[no-any-return]


def settings_of(info: OptimizerInfo) -> Iterator[dict[str, Any]]:
    """Settings that torch tests on the CPU, and its choices of implementation."""
    for each in info.optim_inputs_func(device="cpu"):
        yield dict(each.kwargs)
    for flag in ("foreach", "fused"):
        if flag in info.supported_impls and info.optim_cls.__name__ != "SparseAdam":
            yield {flag: True}


def forloop_goes_right_direction(info: OptimizerInfo) -> None:
    for settings in settings_of(info):
        pair = Pair(info, settings)
        before = float(pair.losses(pair.wrapped[0]).mean().detach())
        pair.steps(15)
        pair.assert_equal()
        after = float(pair.losses(pair.wrapped[0]).mean().detach())
        assert (after > before) if settings.get("maximize") else (after < before)


def param_group_with_lrscheduler_goes_right_direction(info: OptimizerInfo) -> None:
    pair = Pair(info, {})
    schedulers = [torch.optim.lr_scheduler.StepLR(side[1], 2, gamma=0.5) for side in pair.sides]
    plateaus = [torch.optim.lr_scheduler.ReduceLROnPlateau(side[1]) for side in pair.sides]

    def schedule() -> None:
        for scheduler in schedulers:
            scheduler.step()
        for plateau in plateaus:
            plateau.step(1.0)

    pair.steps(8, schedule)
    pair.assert_equal()


def tensor_lr(info: OptimizerInfo) -> None:
    pair = Pair(info, {"lr": torch.tensor(0.01, dtype=torch.float32)})
    pair.steps(5)
    pair.assert_equal()


def step_is_noop_for_zero_grads(info: OptimizerInfo) -> None:
    for settings in settings_of(info):
        pair = Pair(info, settings)
        for model, optimizer in pair.sides:
            for parameter in model.parameters():
                zero = torch.zeros_like(parameter)
                parameter.grad = zero.to_sparse(1) if pair.sparse else zero
            optimizer.step()
        pair.assert_equal()


def step_is_noop_when_params_have_no_grad(info: OptimizerInfo) -> None:
    pair = Pair(info, {})
    before = copy.deepcopy(pair.wrapped[0].state_dict())
    pair.wrapped[1].step()
    for name, value in pair.wrapped[0].state_dict().items():
        assert torch.equal(value, before[name])


def state_dict_deterministic(info: OptimizerInfo) -> None:
    for settings in settings_of(info):
        pair = Pair(info, settings)
        pair.steps(3)
        other = Pair(info, settings)
        for side, saved in zip(other.sides, pair.sides, strict=True):
            side[0].load_state_dict(copy.deepcopy(saved[0].state_dict()))
            side[1].load_state_dict(copy.deepcopy(saved[1].state_dict()))
        for each in (pair, other):
            each.steps(3)
            each.assert_equal()
        for ours, theirs in zip(
            other.wrapped[0].parameters(), pair.wrapped[0].parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)


def save_load_equality_with_weights_only(info: OptimizerInfo) -> None:
    pair = Pair(info, {})
    pair.steps(2)
    file = io.BytesIO()
    torch.save(pair.wrapped[1].state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    bare = pair.sides[0][1].state_dict()
    assert _same(loaded["state"], bare["state"])


def can_load_from_to_named_state_dict(info: OptimizerInfo) -> None:
    named, plain = Pair(info, {}, named=True), Pair(info, {})
    named.steps(2)
    plain.wrapped[0].load_state_dict(named.wrapped[0].state_dict())
    plain.wrapped[1].load_state_dict(copy.deepcopy(named.wrapped[1].state_dict()))
    named.wrapped[1].load_state_dict(copy.deepcopy(plain.wrapped[1].state_dict()))
    assert "param_names" in named.wrapped[1].param_groups[0]


def state_dict_hooks(info: OptimizerInfo) -> None:
    _, optimizer = Pair(info, {}).wrapped
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("before save"))
    optimizer.register_state_dict_post_hook(lambda _, state: calls.append("after save") or state)
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before load") or None)
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after load"))
    optimizer.register_load_state_dict_post_hook(
        lambda *_: calls.append("first after load"), prepend=True
    )
    optimizer.load_state_dict(optimizer.state_dict())
    expected = ["before save", "after save", "before load", "first after load", "after load"]
    assert calls == expected


def step_all_hooks(info: OptimizerInfo) -> None:
    """Hooks of its own and global ones: each once, in torch's order."""
    calls: list[list[str]] = []
    for side in (0, 1):
        pair = Pair(info, {})
        optimizer, seen = pair.sides[side][1], []
        handles = [
            register_optimizer_step_pre_hook(lambda *_, seen=seen: seen.append("global before")),
            register_optimizer_step_post_hook(lambda *_, seen=seen: seen.append("global after")),
        ]
        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("after"))
        optimizer.zero_grad()
        pair.backward(pair.sides[side])
        optimizer.step()
        for handle in handles:
            handle.remove()
        calls.append(sorted(seen))
    assert calls[0] == calls[1] == ["after", "before", "global after", "global before"]


def deepcopy_copies_all_public_attrs(info: OptimizerInfo) -> None:
    pair = Pair(info, {})
    pair.steps(1)
    optimizer = pair.wrapped[1]
    other = copy.deepcopy(optimizer)

    def public(each: object) -> set[str]:
        return {name for name in dir(each) if not name.startswith("_")}

    assert public(other) == public(optimizer)
    assert _same(other.state_dict()["state"], optimizer.state_dict()["state"])


def non_empty_state(info: OptimizerInfo) -> None:
    pair = Pair(info, {"momentum": 0.9} if info.optim_cls is torch.optim.SGD else {})
    pair.steps(1)
    bare, wrapped = (side[1] for side in pair.sides)
    assert len(wrapped.state) == len(bare.state) > 0
    kept = [set(state) for state in wrapped.state.values()]
    assert kept == [set(state) for state in bare.state.values()]


def grads_are_never_inplaced_into(info: OptimizerInfo) -> None:
    pair = Pair(info, {})
    for side in pair.sides:
        pair.backward(side)
    gradients = [[p.grad.clone() for p in side[0].parameters()] for side in pair.sides]
    for side in pair.sides:
        side[1].step()
    left = [[p.grad for p in side[0].parameters()] for side in pair.sides]
    untouched = [
        all(_same(a, b) for a, b in zip(*each, strict=True))
        for each in zip(gradients, left, strict=True)
    ]
    assert untouched[0] == untouched[1]


def step_closure_returns_the_loss(info: OptimizerInfo) -> None:
    pair = Pair(info, {})
    results = []
    for side in pair.sides:

        def closure(side: Any = side) -> float:
            side[1].zero_grad()
            return pair.backward(side)

        results.append(side[1].step(closure))
    assert results[0] == results[1]
    pair.assert_equal()


def add_param_group(info: OptimizerInfo) -> None:
    pair = Pair(info, {})
    more = [nn.Parameter(torch.ones(2, 2, dtype=torch.float32)) for _ in pair.sides]
    for side, parameter in zip(pair.sides, more, strict=True):
        side[1].add_param_group({"params": [parameter], "lr": 1e-3})
    pair.steps(2)
    pair.assert_equal()
    assert len(pair.wrapped[1].state_dict()["param_groups"]) == 2


PATTERNS: dict[str, Callable[[OptimizerInfo], None]] = {
    function.__name__: function
    for function in (
        forloop_goes_right_direction,
        param_group_with_lrscheduler_goes_right_direction,
        tensor_lr,
        step_is_noop_for_zero_grads,
        step_is_noop_when_params_have_no_grad,
        state_dict_deterministic,
        save_load_equality_with_weights_only,
        can_load_from_to_named_state_dict,
        state_dict_hooks,
        step_all_hooks,
        deepcopy_copies_all_public_attrs,
        non_empty_state,
        grads_are_never_inplaced_into,
        step_closure_returns_the_loss,
        add_param_group,
    )
}


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        pair = [each.to_dense() if each.is_sparse else each for each in (left, right)]
        return torch.equal(*pair)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return bool(left == right)


def outcome(name: str, info: OptimizerInfo) -> str:
    """``"passes"``, ``"not applicable"`` or ``"fails"``; where bare torch fails, not applicable."""
    if info.optim_cls.__name__ in NOT_APPLICABLE:
        return "not applicable"
    if name == "tensor_lr" and not _takes_tensor_lr(info):
        return "not applicable"
    try:
        PATTERNS[name](info)
    except Exception:  # noqa: BLE001  # whatever it is, the table says so
        return "fails"
    return "passes"


def _takes_tensor_lr(info: OptimizerInfo) -> bool:
    try:
        Pair(info, {"lr": torch.tensor(0.01, dtype=torch.float32)})
    except (TypeError, ValueError):
        return False
    return True


def row(name: str) -> str:
    """A row of the table: how many optimizers pass, and which of them do not."""
    outcomes = {info.optim_cls.__name__: outcome(name, info) for info in optim_db}
    passed = sum(each == "passes" for each in outcomes.values())
    others = [
        ", ".join(key for key, each in outcomes.items() if each == kind) or "none"
        for kind in ("not applicable", "fails")
    ]
    return "| " + " | ".join([f"`{name}`", str(passed), *others]) + " |"


if __name__ == "__main__":
    head = ["| pattern | passes | not applicable | fails |", "|---|---|---|---|"]
    sys.stdout.write("\n".join([*head, *map(row, PATTERNS)]) + "\n")
