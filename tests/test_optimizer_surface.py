"""What torch and other libraries do with an optimizer, done to the wrapper."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from comet_meta import (
    CoMet,
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    IndexedDataset,
    SoftConfidentWeighter,
)

N = 12
DATA = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
INDEX = torch.arange(N)


def network(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(6))
    return nn.Sequential(*layers)


def losses_of(model: nn.Module, rows: torch.Tensor = DATA) -> torch.Tensor:
    return (model(rows) - rows).square().mean(dim=1)


def adam(model: nn.Module, **settings) -> CoMetOptimizerWrapper:
    return CoMetOptimizerWrapper(torch.optim.Adam(model.parameters(), lr=0.01), **settings)


def two(model: nn.Module, **settings) -> CoMetOptimizerWrapper:
    parts = [torch.optim.Adam(model[k].parameters(), lr=0.01) for k in (0, 2)]
    return CoMetOptimizerWrapper(parts, **settings)


def train(optimizer: CoMetOptimizerWrapper, model: nn.Module, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.objective(losses_of(model), INDEX).backward()
        optimizer.step()


def same_parameters(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_schedule_free_optimizers_switch_their_mode():
    schedulefree = pytest.importorskip("schedulefree")
    model, plain_model = network(), network()
    plain = schedulefree.AdamWScheduleFree(plain_model.parameters(), lr=0.01)
    optimizer = CoMetOptimizerWrapper(
        schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01),
        weighter=SoftConfidentWeighter(N),
    )
    for each in (plain, optimizer):
        each.train()
    train(optimizer, model)
    for _ in range(3):
        plain.zero_grad()
        losses_of(plain_model).mean().backward()
        plain.step()
    assert same_parameters(model, plain_model)
    for each in (plain, optimizer):
        each.eval()
    assert same_parameters(model, plain_model)
    assert not optimizer.param_groups[0]["train_mode"]
    adam(network()).train()  # without a mode nothing happens
    two(network()).eval()


class SharpnessAware(torch.optim.Optimizer):
    """Foret, Kleiner, Mobahi, Neyshabur: Sharpness-aware minimization, ICLR 2021.

    The step takes a closure and calls it at the worst point nearby, as public versions do.
    """

    def __init__(self, params, base, rho=0.05, **settings):
        super().__init__(params, {"rho": rho, **settings})
        self.base = base(self.param_groups, **settings)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "sharpness-aware steps require a closure"
        parameters = [p for group in self.param_groups for p in group["params"]]
        with_gradient = [p for p in parameters if p.grad is not None]
        if not with_gradient:
            return
        norm = torch.stack([p.grad.norm() for p in with_gradient]).norm() + 1e-12
        moves = [p.grad * self.param_groups[0]["rho"] / norm for p in with_gradient]
        for p, move in zip(with_gradient, moves, strict=True):
            p.add_(move)
        self.zero_grad()
        torch.enable_grad()(closure)()
        for p, move in zip(with_gradient, moves, strict=True):
            if p.grad is not None:  # as public versions do
                p.sub_(move)
        self.base.step()


def sharp(model: nn.Module) -> SharpnessAware:
    return SharpnessAware(model.parameters(), torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("level", [1, 2])
def test_sharpness_aware_steps_inside_the_wrapper(level):
    model, plain_model = network(), network()
    plain = sharp(plain_model)
    optimizer = CoMetOptimizerWrapper(sharp(model), weighter=SoftConfidentWeighter(N))
    for _ in range(3):
        losses_of(plain_model).mean().backward()
        plain.step(lambda: losses_of(plain_model).mean().backward())
        plain.zero_grad()

        def again():
            if level == 1:
                optimizer.objective(losses_of(model), INDEX).backward()
            else:
                optimizer.backward(lambda rows: losses_of(model, DATA[rows]), INDEX)

        again()
        optimizer.step(again)
        optimizer.zero_grad()
    assert same_parameters(model, plain_model)


def test_a_sharpness_aware_step_that_cannot_be_taken_moves_back():
    model = network()
    optimizer = CoMetOptimizerWrapper(sharp(model), weighter=SoftConfidentWeighter(N))
    before = copy.deepcopy(model)
    optimizer.objective(losses_of(model), INDEX).backward()
    optimizer.step(lambda: optimizer.objective(losses_of(model) * torch.nan, INDEX).backward())
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_full_step_of_an_optimizer_that_needs_a_closure_gets_a_sentence():
    model = network()
    optimizer = CoMetOptimizerWrapper(sharp(model), weighter=SoftConfidentWeighter(N))
    with pytest.raises(TypeError, match=r"backward\(closure, index\)"):
        optimizer.step(lambda rows: losses_of(model, DATA[rows]), INDEX)


def test_groups_can_be_appended_or_say_where():
    model = network()
    optimizer = adam(model)
    extra = nn.Parameter(torch.ones(2))
    group = {**optimizer.param_groups[0], "params": [extra], "lr": 0.5}
    optimizer.param_groups.append(group)
    assert optimizer.optimizers[0].param_groups[-1] is group
    with pytest.raises(ValueError, match=r"wrapper\.optimizers\[i\]"):
        two(network()).param_groups.append(group)


def test_the_joined_state_belongs_to_the_right_optimizer():
    model = network()
    optimizer = two(model)
    train(optimizer, model)
    first, second = optimizer.optimizers
    parameter = model[2].weight
    assert optimizer.state[parameter] is second.state[parameter]
    assert parameter not in first.state
    assert set(optimizer.state) == set(model.parameters())
    with pytest.raises(KeyError):
        optimizer.state[nn.Parameter(torch.ones(1))]


def test_global_hooks_run_once_for_each_wrapped_optimizer():
    seen = []
    handle = register_optimizer_step_pre_hook(lambda each, *_: seen.append(each))
    try:
        model = network()
        optimizer = two(model)
        train(optimizer, model, 1)
        assert seen == list(optimizer.optimizers)
    finally:
        handle.remove()


def test_a_pre_hook_may_change_the_arguments():
    model = network()
    optimizer = adam(model)
    called = []

    def closure():
        called.append(1)
        optimizer.zero_grad()
        loss = optimizer.objective(losses_of(model))
        loss.backward()
        return float(loss.detach())

    optimizer.register_step_pre_hook(lambda each, args, kwargs: ((each, closure), {}))
    assert optimizer.step() > 0
    assert called == [1]


@pytest.mark.parametrize("make", [adam, two])
def test_distributed_checkpoints_keep_the_optimizers_state(make):
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = network()
    optimizer = make(model, weighter=SoftConfidentWeighter(N))
    train(optimizer, model)
    model_state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer))
    assert "0.weight" in optimizer_state["state"]
    resumed_model = network()
    resumed = make(resumed_model, weighter=SoftConfidentWeighter(N))
    set_state_dict(
        resumed_model,
        resumed,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
    )
    train(optimizer, model)
    train(resumed, resumed_model)
    assert same_parameters(model, resumed_model)
    for each in resumed.optimizers:
        assert all(isinstance(key, torch.Tensor) for key in each.state)
        assert "comet_meta" not in each.param_groups[0]


UNFIT = {
    "another number of samples": {"weighter": SoftConfidentWeighter(N + 1)},
    "another window": {
        "weighter": SoftConfidentWeighter(N), "regularizer": CovarianceMetaRegularizer(window=9),
    },
    "a prior": {"weighter": SoftConfidentWeighter(prior=torch.arange(float(N)))},
    "no weighter": {},
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_a_state_that_does_not_fit_changes_nothing(case):
    model = network()
    parts = {"weighter": SoftConfidentWeighter(N)}
    if case == "another window":
        parts["regularizer"] = CovarianceMetaRegularizer()
    optimizer = adam(model, **parts)
    train(optimizer, model)
    before = copy.deepcopy(optimizer.state_dict())
    other_model = network()
    other = adam(other_model, **copy.deepcopy(UNFIT[case]))
    if case != "another number of samples":
        train(other, other_model, 5)
    with pytest.raises(ValueError, match=r"saved|another"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert after["state"][0]["step"] == before["state"][0]["step"] == 3
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def test_groups_of_another_size_change_nothing():
    model = network()
    optimizer = two(model, weighter=SoftConfidentWeighter(N))
    train(optimizer, model)
    other_model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4, bias=False))
    other = two(other_model, weighter=SoftConfidentWeighter(N))
    train(other, other_model, 5)
    with pytest.raises(ValueError, match=r"groups of \[2, 1\] parameters"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.optimizers[0].state_dict()["state"][0]["step"] == 3


def test_a_saved_state_of_several_optimizers_comes_back():
    model = network()
    optimizer = two(model, weighter=SoftConfidentWeighter(N))
    train(optimizer, model)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_model = network()
    resumed_model.load_state_dict(model.state_dict())
    resumed = two(resumed_model, weighter=SoftConfidentWeighter(N))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(optimizer, model)
    train(resumed, resumed_model)
    assert same_parameters(model, resumed_model)


class TestStepsThatCannotBeTaken:
    """One question, asked by step() and by every loop that steps by itself."""

    @staticmethod
    def broken() -> torch.Tensor:
        rows = DATA.clone()
        rows[5] = torch.nan
        return rows

    def test_the_answer_is_the_same_until_new_losses_come(self, caplog):
        model = network()
        optimizer = adam(model, weighter=SoftConfidentWeighter(N))
        assert optimizer.allows_step()
        optimizer.objective(losses_of(model, self.broken()), INDEX).backward()
        assert not optimizer.allows_step()
        assert not optimizer.allows_step()
        assert caplog.text.count("step skipped") == 1
        assert "samples [5]" in caplog.text
        optimizer.zero_grad()
        optimizer.objective(losses_of(model), INDEX).backward()
        assert optimizer.allows_step()

    @pytest.mark.parametrize("closure", [False, True])
    @pytest.mark.parametrize("kind", ["wrapper", "CoMet"])
    def test_the_statistics_of_batch_norm_survive(self, kind, closure):
        model = network(norm=True)
        plain = torch.optim.Adam(model.parameters(), lr=0.01)
        if kind == "wrapper":
            optimizer = CoMetOptimizerWrapper(plain, weighter=SoftConfidentWeighter(N), model=model)

            def objective(rows):
                return optimizer.objective(losses_of(model, rows), INDEX)
        else:
            optimizer = plain
            comet = CoMet(DataLoader(DATA, batch_size=N), optimizer, model=model)

            def objective(rows):
                return comet.loss(losses_of(model, rows), index=INDEX)

        def step(rows):
            def compute():
                optimizer.zero_grad()
                loss = objective(rows)
                loss.backward()
                return float(loss.detach())

            if closure:
                optimizer.step(compute)
            else:
                compute()
                optimizer.step()

        step(DATA)
        before = copy.deepcopy(model.state_dict())
        step(self.broken())
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        step(DATA)
        assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])

    def test_a_second_comet_on_the_same_optimizer_is_not_held_by_the_first(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        first = CoMet(DataLoader(DATA, batch_size=N), optimizer)
        first.loss(losses_of(model, self.broken()), index=INDEX).backward()
        optimizer.step()
        optimizer.zero_grad()
        second = CoMet(DataLoader(DATA, batch_size=N), optimizer)
        before = copy.deepcopy(model)
        second.loss(losses_of(model), index=INDEX).backward()
        optimizer.step()
        assert not same_parameters(model, before)


def test_batch_norm_is_updated_over_an_indexed_loader_without_its_positions():
    """The way that the troubleshooting page names."""
    model, reference = network(norm=True), network(norm=True)
    loader = DataLoader(IndexedDataset(DATA), batch_size=4)
    update_bn((batch for _, batch in loader), model)
    update_bn(DataLoader(DATA, batch_size=4), reference)
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    update_bn(CoMet(DataLoader(DATA, batch_size=4)), model)  # whose batches have none
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(ours, theirs)


class TestWhatTakesTheFullStep:
    """A class that stands in for the wrapper refuses an index that its own step can't pass on."""

    def test_a_subclass_keeps_its_step(self):
        class Verbose(CoMetOptimizerWrapper):
            def step(self, *args, **kwargs):
                return super().step(*args, **kwargs)

        model = network()
        optimizer = Verbose(torch.optim.SGD(model.parameters(), lr=0.1))
        report = optimizer.step(lambda rows: losses_of(model)[rows], INDEX)
        assert torch.isfinite(report.objective)

    def test_a_stand_in_refuses_an_index(self):
        class StandIn:
            def step(self, closure=None, **_):
                return closure

        stand_in = type("TheirWrapper", (StandIn, CoMetOptimizerWrapper), {})
        optimizer = stand_in(torch.optim.SGD(network().parameters(), lr=0.1))
        assert optimizer.step(len) is len
        for call in (lambda: optimizer.step(len, INDEX), lambda: optimizer.step(len, index=INDEX)):
            with pytest.raises(TypeError, match="TheirWrapper calls the closure of a step itself"):
                call()
