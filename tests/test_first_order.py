"""Meta-gradients by hand and against an explicitly unrolled inner loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from comet_meta import CovarianceMetaRegularizer, SoftConfidentWeighter
from comet_meta.meta.first_order import first_order
from comet_meta.meta.second_order import AdamDirection, second_order
from comet_meta.tasks import Task, split_tasks
from wrapping import wrap

FIRST_ORDER = ("fomaml", "mldg", "reptile")


@settings(max_examples=80, deadline=None)
@given(
    batch_size=st.integers(2, 60),
    tasks=st.integers(1, 8),
    query_fraction=st.floats(0.01, 0.99),
)
def test_support_and_query_are_disjoint_and_use_every_row(batch_size, tasks, query_fraction):
    dealt = split_tasks(batch_size, tasks, query_fraction)
    assert len(dealt) == min(tasks, batch_size // 2)
    parts = [part for task in dealt for part in task]
    assert all(len(part) >= 1 for part in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(batch_size))


def test_seventy_thirty():
    (task,) = split_tasks(10, 1, 0.3)
    assert (len(task.support), len(task.query)) == (7, 3)


class Point(nn.Module):
    """L_i(theta) = (theta - x_i)^2 / 2: the gradient at theta is theta - x_i."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta], dtype=torch.float64))

    def losses(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (self.theta - x).square()


X = torch.tensor([1.0, 2.0, 3.0, 7.0, 11.0], dtype=torch.float64)
# One inner step of 0.1 from theta = 0 on the support 1, 2, 3: theta' = 0 + 0.1 * 2 = 0.2.
# The query 7, 11 has gradient 0.2 - 9 = -8.8 there; two of five rows are query rows.
BY_HAND = {
    "fomaml": -8.8,
    "maml": -8.8 * (1 - 0.1),  # d theta' / d theta = 1 - 0.1
    "mldg": 0.6 * (0 - 2) + 0.4 * -8.8,
    "reptile": -2.0,  # (0 - 0.2) / 0.1
}


def one_task(mode: str, inner: str = "sgd", steps: int = 1):
    model = Point(0.0)
    rows = split_tasks(5, 1, 0.4)[0]
    task = type(rows)(support=torch.tensor([0, 1, 2]), query=torch.tensor([3, 4]))
    settings = {"inner": inner, "inner_lr": 0.1, "inner_steps": steps}
    if mode == "maml":
        result = second_order(
            lambda rows: model.losses(X[rows]),
            lambda losses, parameters: losses.mean(),
            model,
            [model.theta],
            [task],
            **settings,
        )
    else:
        result = first_order(
            lambda rows: model.losses(X[rows]).mean(), [model.theta], [task], mode=mode, **settings
        )
    assert model.theta.item() == 0.0
    return result


@pytest.mark.parametrize("mode", BY_HAND)
def test_one_inner_step_by_hand(mode):
    result = one_task(mode)
    assert result.gradients[0].item() == pytest.approx(BY_HAND[mode])
    assert result.support_loss.item() == pytest.approx((1 + 4 + 9) / 6)
    assert result.query_loss.item() == pytest.approx((6.8**2 + 10.8**2) / 4)


@pytest.mark.parametrize("mode", BY_HAND)
def test_the_meta_update_moves_towards_the_adapted_weights(mode):
    # All data lie above theta = 0, so theta' > 0: descending along the gradient must increase it.
    assert one_task(mode, steps=3).gradients[0].item() < 0
    assert one_task(mode, inner="adam", steps=3).gradients[0].item() < 0


@pytest.mark.parametrize("mode", FIRST_ORDER)
def test_every_task_starts_from_theta(mode):
    torch.manual_seed(0)
    model, data = Net(), torch.randn(12, 3).double()
    tasks = split_tasks(12, 2, 0.3)

    def gradients(tasks):
        return first_order(
            lambda rows: model.losses(data[rows]).mean(),
            list(model.parameters()),
            tasks,
            mode=mode,
            inner="sgd",
            inner_lr=0.5,
            inner_steps=2,
        ).gradients

    first, second = gradients(tasks[:1]), gradients(tasks[1:])
    for both, a, b in zip(gradients(tasks), first, second, strict=True):
        torch.testing.assert_close(both, (a + b) / 2)


def test_adam_direction_equals_torch():
    start, lr = torch.randn(4, dtype=torch.float64), 0.01
    parameter = start.clone().requires_grad_()
    reference = torch.optim.Adam([parameter], lr=lr)
    direction, moved = AdamDirection(), start.clone()
    for gradient in torch.randn(5, 4, dtype=torch.float64):
        parameter.grad = gradient.clone()
        reference.step()
        moved = moved - lr * direction([gradient])[0]
    torch.testing.assert_close(moved, parameter.detach())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def losses(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) - x).square().mean(dim=1)


def forward_by_hand(values: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    w1, b1, w2, b2 = values
    return (torch.tanh(x @ w1.T + b1) @ w2.T + b2 - x).square().mean(dim=1)


@pytest.mark.parametrize("inner", ["sgd", "adam"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("tasks", [1, 2])
def test_maml_equals_an_explicitly_unrolled_inner_loop(inner, steps, tasks):
    torch.manual_seed(0)
    model, data, weights = Net(), torch.randn(12, 3).double(), torch.rand(12).double()
    dealt = split_tasks(12, tasks, 0.3)
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]
    lr, decay = 0.05, 0.01

    def objective(at, rows):
        penalty = decay * sum(p.square().sum() for p in at)
        return (weights[rows] * forward_by_hand(at, data[rows])).mean() + penalty

    total = 0
    for support, query in dealt:
        fast, first, second = list(values), [0] * 4, [0] * 4
        for k in range(1, steps + 1):
            gradients = torch.autograd.grad(objective(fast, support), fast, create_graph=True)
            for i, g in enumerate(gradients):
                if inner == "sgd":
                    fast[i] = fast[i] - lr * g
                else:
                    first[i] = 0.9 * first[i] + 0.1 * g
                    second[i] = 0.999 * second[i] + 0.001 * g * g
                    m, v = first[i] / (1 - 0.9**k), second[i] / (1 - 0.999**k)
                    fast[i] = fast[i] - lr * m / (v.sqrt() + 1e-8)
        total = total + objective(fast, query) / tasks
    expected = torch.autograd.grad(total, values)

    result = second_order(
        lambda rows: weights[rows] * model.losses(data[rows]),
        lambda losses, at: losses.mean() + decay * sum(p.square().sum() for p in at),
        model,
        list(model.parameters()),
        dealt,
        inner=inner,
        inner_lr=lr,
        inner_steps=steps,
    )
    for found, reference in zip(result.gradients, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-12)


def test_mldg_becomes_the_plain_gradient_as_the_inner_step_vanishes():
    torch.manual_seed(0)
    model, data = Net(), torch.randn(10, 3).double()
    plain = torch.autograd.grad(model.losses(data).mean(), list(model.parameters()))
    result = first_order(
        lambda rows: model.losses(data[rows]).mean(),
        list(model.parameters()),
        split_tasks(10, 1, 0.3),
        mode="mldg",
        inner="sgd",
        inner_lr=1e-12,
        inner_steps=1,
    )
    for found, reference in zip(result.gradients, plain, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-11)


class BatchNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.unused = nn.Parameter(torch.ones(2))

    def losses(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) - x).square().mean(dim=1)


@pytest.mark.parametrize("meta", [*FIRST_ORDER, "maml"])
def test_parameters_are_bit_equal_after_inner_steps(meta):
    torch.manual_seed(0)
    model, data = BatchNormNet(), torch.randn(16, 3)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = wrap(
        torch.optim.SGD(model.parameters(), lr=0.0),
        meta=meta,
        inner_lr=0.5,
        inner_steps=3,
        tasks=2,
        model=model,
        regularizer=CovarianceMetaRegularizer(),
    )
    optimizer.step(lambda rows: model.losses(data[rows]), torch.arange(16))
    for parameter, saved in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, saved)


@pytest.mark.parametrize("meta", [*FIRST_ORDER, "maml"])
def test_batch_norm_sees_only_the_pass_at_theta(meta):
    torch.manual_seed(0)
    model, data = BatchNormNet(), torch.randn(16, 3)
    optimizer = wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), meta=meta, inner_steps=3, model=model
    )
    calls = []

    def losses(rows):
        found = model.losses(data[rows])
        calls.append({k: v.clone() for k, v in model.named_buffers()})
        return found

    optimizer.step(losses, torch.arange(16))
    assert len(calls) == 4
    for name, value in model.named_buffers():
        assert torch.equal(value, calls[0][name])
        assert not torch.equal(value, calls[-1][name])


@pytest.mark.parametrize("meta", [*FIRST_ORDER, "maml", "none"])
def test_a_closure_that_raises_leaves_everything_as_it_was(meta):
    torch.manual_seed(0)
    model, data = BatchNormNet(), torch.randn(16, 3)
    optimizer = wrap(
        torch.optim.AdamW(model.parameters()),
        meta=meta,
        inner_lr=0.5,
        model=model,
        weighter=SoftConfidentWeighter(16),
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = []

    def losses(rows):
        calls.append(rows)
        if len(calls) == (1 if meta == "none" else 2):
            raise RuntimeError("the camera fell over")
        return model.losses(data[rows])

    with pytest.raises(RuntimeError, match="camera"):
        optimizer.step(losses, torch.arange(16))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not optimizer.state


@pytest.mark.parametrize("meta", [*FIRST_ORDER, "maml", "none"])
def test_an_unused_parameter_gets_no_gradient_and_no_weight_decay(meta):
    torch.manual_seed(0)
    model, data = BatchNormNet(), torch.randn(16, 3)
    optimizer = wrap(
        torch.optim.AdamW(model.parameters(), weight_decay=0.5), meta=meta, model=model
    )
    optimizer.step(lambda rows: model.losses(data[rows]), torch.arange(16))
    assert model.unused.grad is None
    assert model.unused.tolist() == [1.0, 1.0]


def test_inner_steps_are_seen_inside_autocast():
    # Autocast keeps low-precision copies of the weights; a copy of theta used at theta' would
    # make query and support losses of equal rows agree.
    torch.manual_seed(0)
    model, data = nn.Linear(8, 8), torch.randn(1, 8).repeat(4, 1)
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), meta="fomaml", inner_lr=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = optimizer.step(
            lambda rows: (model(data[rows]).float() - data[rows]).square().mean(dim=1),
            torch.arange(4),
        )
    assert report.query_loss < 0.9 * report.support_loss


@pytest.mark.parametrize("mode", FIRST_ORDER)
@pytest.mark.parametrize("inner", ["sgd", "adam"])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_device_is_never_waited_for(mode, inner, scaled):
    # On the meta device there are no values: whatever looks at one raises.
    with torch.device("meta"):
        model, data = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(32, 4)
        tasks = [Task(torch.arange(7), torch.arange(3)) for _ in range(2)]
        scale = torch.ones(())
    with pytest.raises(RuntimeError, match="meta"):
        bool(data.isfinite().all())
    result = first_order(
        lambda rows: model(data[rows]).square().mean(),
        list(model.parameters()),
        tasks,
        mode=mode,
        inner=inner,
        inner_lr=0.1,
        inner_steps=2,
        buffers=list(model.buffers()),
        scale=scale if scaled else None,
    )
    assert result.query_loss.device.type == "meta"


@pytest.mark.parametrize("mode", FIRST_ORDER)
@pytest.mark.parametrize("steps", [1, 3])
def test_first_order_adam_equals_an_inner_loop_with_torchs_own(mode, steps):
    torch.manual_seed(0)
    model, data, lr = Net(), torch.randn(10, 3).double(), 0.05
    (task,) = split_tasks(10, 1, 0.3)
    settings = {"mode": mode, "inner": "adam", "inner_lr": lr, "inner_steps": steps}
    parameters = list(model.parameters())
    theta = [p.detach().clone() for p in parameters]

    def gradients(rows):
        return torch.autograd.grad(model.losses(data[rows]).mean(), parameters)

    found = first_order(
        lambda rows: model.losses(data[rows]).mean(), parameters, [task], **settings
    )
    support = gradients(task.support)
    adam = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        for p, g in zip(parameters, gradients(task.support), strict=True):
            p.grad = g
        adam.step()
    query = gradients(task.query)
    expected = {
        "fomaml": query,
        "mldg": [0.7 * s + 0.3 * q for s, q in zip(support, query, strict=True)],
        "reptile": [(t - p) / (lr * steps) for t, p in zip(theta, parameters, strict=True)],
    }[mode]
    for ours, reference in zip(found.gradients, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


MODES = (*FIRST_ORDER, "maml")


def meta_gradient(mode, model, data, tasks, *, watch=lambda: None, scale=None, **options):
    """The meta-gradient of any mode on a model that has ``losses``."""
    options = {"inner": "sgd", "inner_lr": 0.1, "inner_steps": 2, **options}

    def losses(rows):
        watch()
        return model.losses(data[rows])

    parameters = [p for p in model.parameters() if p.requires_grad]
    if mode == "maml":
        return second_order(
            losses,
            lambda found, at: found.mean(),
            model,
            parameters,
            tasks,
            scale=scale,
            **options,
        )
    return first_order(
        lambda rows: losses(rows).mean(),
        parameters,
        tasks,
        mode=mode,
        buffers=list(model.buffers()),
        scale=scale,
        **options,
    )


@pytest.mark.parametrize("mode", MODES)
def test_losses_are_means_over_tasks_without_a_graph(mode):
    model = Point(0.0)
    tasks = [Task(torch.tensor([0]), torch.tensor([1])), Task(torch.tensor([3]), torch.tensor([4]))]
    found = meta_gradient(mode, model, X, tasks, inner_steps=1)
    # One step of 0.1 from 0: to 0.1 towards 1, and to 0.7 towards 7.
    assert found.support_loss.item() == pytest.approx((1 + 49) / 4)
    assert found.query_loss.item() == pytest.approx((1.9**2 + 10.3**2) / 4)
    assert not found.support_loss.requires_grad
    assert not found.query_loss.requires_grad
    assert not found.gradients[0].requires_grad
    assert model.theta.grad is None


@pytest.mark.parametrize("inner", ["sgd", "adam"])
@pytest.mark.parametrize("mode", MODES)
def test_a_scale_multiplies_the_gradient_and_nothing_else(mode, inner):
    torch.manual_seed(0)
    model, data = Net(), torch.randn(12, 3).double()
    tasks = split_tasks(12, 2, 0.3)
    plain = meta_gradient(mode, model, data, tasks, inner=inner)
    scale = torch.tensor(2.0**12, dtype=torch.float64)
    scaled = meta_gradient(mode, model, data, tasks, inner=inner, scale=scale)
    for found, reference in zip(scaled.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(found, scale * reference, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scaled[1:], plain[1:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("inner", ["sgd", "adam"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [1, 2])
def test_an_inner_gradient_that_overflows_spoils_the_meta_gradient_not_theta(mode, inner, at):
    calls = []
    task = Task(torch.tensor([0, 1, 2]), torch.tensor([3, 4]))

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.inf

    class SpoiledPoint(Point):
        def losses(self, x):
            calls.append(len(x))
            found = super().losses(x)
            return Spoiled.apply(found) if len(calls) == at else found

    model = SpoiledPoint(0.0)
    options = {"inner": inner, "scale": torch.tensor(8.0, dtype=torch.float64)}
    found = meta_gradient(mode, model, X, [task], **options)
    assert not found.gradients[0].isfinite().all()
    assert found.support_loss.isfinite()
    assert model.theta.item() == 0


@pytest.mark.parametrize("mode", MODES)
def test_batch_norm_has_the_statistics_of_the_supports_of_all_tasks(mode):
    torch.manual_seed(0)
    model, data = BatchNormNet(), torch.randn(16, 3)
    norm = model.body[1]
    tasks = split_tasks(16, 3, 0.3)
    inputs = [model.body[0](data[task.support]).detach() for task in tasks]
    calls = []

    def losses(x):
        calls.append(len(x))
        return BatchNormNet.losses(model, x)

    model.losses = losses
    found = meta_gradient(mode, model, data, tasks)
    assert calls == [4, 4, 2, 3, 3, 2, 3, 3, 2]  # two inner steps and the query, for each task
    # Batch norm moves by a tenth: from mean 0 and variance 1, here to the mean over the tasks.
    mean = torch.stack([x.mean(dim=0) for x in inputs]).mean(dim=0)
    variance = torch.stack([x.var(dim=0) for x in inputs]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance)
    assert norm.num_batches_tracked == 1
    assert [g is None for g in found.gradients] == [True] + [False] * 6  # one isn't used


@pytest.mark.parametrize("mode", MODES)
def test_buffers_that_no_pass_changes_stay_bit_equal(mode):
    torch.manual_seed(0)
    model, data = BatchNormNet(), torch.randn(16, 3)
    model.register_buffer("bounds", torch.tensor([0.1, math.inf, -math.inf, math.nan]))
    model.register_buffer("known", torch.tensor([True, False]))
    model.register_buffer("phase", torch.tensor([0.1 + 0.7j]))
    before = {name: value.clone() for name, value in model.named_buffers()}
    meta_gradient(mode, model, data, split_tasks(16, 3, 0.3))
    for name in ("bounds", "known", "phase"):
        found = getattr(model, name)
        torch.testing.assert_close(found, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
def test_theta_is_seen_again_inside_autocast(mode):
    # Autocast's copies of the weights at theta' must not outlive theta'.
    torch.manual_seed(0)

    class Rebuild(nn.Linear):
        def losses(self, x):
            return (self(x).float() - x).square().mean(dim=1)

    model, data = Rebuild(8, 8), torch.randn(1, 8).repeat(8, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model.losses(data).mean()
        found = meta_gradient(mode, model, data, split_tasks(8, 2, 0.5), inner_lr=1.0)
        after = model.losses(data).mean()
    assert found.support_loss == pytest.approx(before.item(), rel=1e-6)
    assert found.query_loss < 0.9 * before
    assert after == before


def test_reptile_judges_the_query_without_a_graph():
    model, enabled = Point(0.0), []
    task = Task(torch.tensor([0, 1, 2]), torch.tensor([3, 4]))
    meta_gradient(
        "reptile", model, X, [task], watch=lambda: enabled.append(torch.is_grad_enabled())
    )
    assert enabled == [True, True, False]


def test_a_model_in_shards_has_its_query_pass_backward_too(monkeypatch):
    # FSDP2 puts gathered parameters away only then; the gradient is dropped.
    model, enabled, backward = Point(0.0), [], []
    task = Task(torch.tensor([0, 1, 2]), torch.tensor([3, 4]))

    class Watched(Point):
        def losses(self, x):
            enabled.append(torch.is_grad_enabled())
            found = super().losses(x)
            if found.requires_grad:
                found.register_hook(lambda gradient: backward.append(len(gradient)))
            return found

    plain = meta_gradient("reptile", model, X, [task])
    monkeypatch.setattr("comet_meta.meta.first_order.is_sharded", lambda _: True)
    found = meta_gradient("reptile", Watched(0.0), X, [task])
    assert enabled == [True, True, True]
    assert backward == [3, 3, 2]
    assert torch.equal(found.gradients[0], plain.gradients[0])


@pytest.mark.parametrize(("device", "fused"), [("cpu", True), ("meta", False)])
def test_adam_is_fused_where_it_can_be_and_its_steps_are_on_the_cpu_where_not(
    device, fused, monkeypatch
):
    calls = []
    spy = lambda *arguments, **options: calls.append((arguments, options))  # noqa: E731
    monkeypatch.setattr("comet_meta.meta.first_order.adam", spy)
    with torch.device(device):
        model, data = nn.Linear(3, 3), torch.randn(4, 3)
    task = Task(torch.arange(2), torch.arange(2, 4))
    settings = {"mode": "mldg", "inner": "adam", "inner_lr": 0.1, "inner_steps": 1}
    with torch.device("meta"):  # where new tensors go that aren't told where
        first_order(
            lambda rows: model(data[rows]).square().mean(),
            list(model.parameters()),
            [task],
            **settings,
        )
    ((arguments, options),) = calls
    assert (options["fused"], options["foreach"]) == (fused, not fused)
    assert [steps.device.type for steps in arguments[5]] == ["cpu", "cpu"]


def test_without_a_fused_kernel_adam_is_the_same(monkeypatch):
    torch.manual_seed(0)
    model, data = Net(), torch.randn(12, 3).double()
    tasks = split_tasks(12, 2, 0.3)
    fused = meta_gradient("mldg", model, data, tasks, inner="adam")
    monkeypatch.setattr("comet_meta.meta.first_order.all", lambda _: False, raising=False)
    other = meta_gradient("mldg", model, data, tasks, inner="adam")
    for found, reference in zip(other.gradients, fused.gradients, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-12)


def test_adam_s_direction_stays_differentiable_where_a_gradient_is_zero():
    gradient = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (direction,) = AdamDirection()([gradient])
    (slope,) = torch.autograd.grad(direction.sum(), gradient)
    assert direction.tolist() == [0, 0]
    # g / (|g| + eps) with the root held at eps: 1 / (2 eps).
    assert slope.tolist() == pytest.approx([0.5e8, 0.5e8])
