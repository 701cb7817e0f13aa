"""What must hold for every model, optimizer and setting, on drawn ones."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from comet_meta import CovarianceMetaRegularizer, SoftConfidentWeighter
from wrapping import wrap

MODES = ("none", "mldg", "fomaml", "maml", "reptile")
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
rates = st.sampled_from([1e-4, 1e-2, 0.3])

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": [0.0, 0.9], "weight_decay": [0.0, 0.01]}),
    "adam": (torch.optim.Adam, {"amsgrad": [False, True], "weight_decay": [0.0, 0.01]}),
    "adamw": (torch.optim.AdamW, {"weight_decay": [0.0, 0.1], "foreach": [False, True]}),
    "rmsprop": (torch.optim.RMSprop, {"centered": [False, True], "momentum": [0.0, 0.5]}),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": [0.0, 0.1], "foreach": [False, True]}),
}


class Net(nn.Module):
    """Has what models have: a shared, a frozen and an unused parameter, and a scalar."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.to(dtype)

    def losses(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.second(self.first(x))) + self.frozen
        return (self.gain * self.tied(hidden) - x).square().mean(dim=1)


@st.composite
def optimizer_makers(draw):
    """A function from a Net to an optimizer with two groups of different rates."""
    kind, options = OPTIMIZERS[draw(st.sampled_from(sorted(OPTIMIZERS)))]
    chosen = {name: draw(st.sampled_from(values)) for name, values in options.items()}
    first, second = draw(rates), draw(rates)

    def make(model: Net) -> torch.optim.Optimizer:
        groups = [
            {"params": [model.first.weight, model.frozen], "lr": first},
            {"params": [*model.second.parameters(), model.gain, model.unused]},
        ]
        return kind(groups, lr=second, **chosen)

    return make


@QUICK
@given(
    make=optimizer_makers(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    level=st.sampled_from([1, 2]),
    batch=st.integers(1, 9),
)
def test_unit_weights_without_meta_change_no_bit_over_fifty_steps(make, dtype, level, batch):
    plain, model = Net(dtype), Net(dtype)
    optimizer = make(plain)
    wrapped = wrap(make(model), weighter=SoftConfidentWeighter(32), meta="none")
    data = torch.randn(32, 4, generator=torch.Generator().manual_seed(7)).to(dtype)
    for step in range(50):
        index = torch.randperm(32, generator=torch.Generator().manual_seed(step))[:batch]
        x = data[index]
        optimizer.zero_grad()
        plain.losses(x).mean().backward()
        optimizer.step()
        if not all(p.isfinite().all() for p in plain.parameters()):
            break  # the wrapper doesn't follow into NaN
        if level == 1:
            wrapped.zero_grad()
            wrapped.objective(model.losses(x), index).backward()
            wrapped.step()
        else:
            wrapped.step(lambda rows, x=x: model.losses(x[rows]), index)
        for ours, reference in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, reference)
    assert model.unused.tolist() == [1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(
    meta=st.sampled_from(MODES),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    inner=st.sampled_from(["sgd", "adam"]),
    steps=st.integers(1, 3),
    tasks=st.integers(1, 4),
    inner_lr=st.sampled_from([1e-6, 0.01, 0.3]),
    batch=st.integers(2, 12),
    penalty=st.booleans(),
)
def test_with_an_outer_rate_of_zero_no_bit_of_the_model_changes(
    meta, dtype, inner, steps, tasks, inner_lr, batch, penalty
):
    model = Net(dtype)
    before = copy.deepcopy(model.state_dict())
    optimizer = wrap(
        torch.optim.SGD(model.parameters(), lr=0.0),
        meta=meta,
        inner_optimizer=inner,
        inner_steps=steps,
        inner_lr=inner_lr,
        tasks=tasks,
        model=model,
        regularizer=CovarianceMetaRegularizer(0.01) if penalty else None,
    )
    data = torch.randn(batch, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    report = optimizer.step(lambda rows: model.losses(data[rows]), range(batch))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert report.dropped == 0
    assert torch.isfinite(report.objective)


@QUICK
@given(
    meta=st.sampled_from(MODES),
    weights=st.lists(st.floats(0, 1, width=32), min_size=6, max_size=12),
    seed=st.integers(0, 9),
)
def test_the_report_says_what_the_weights_were(meta, weights, seed):
    model = Net(torch.float32)
    weighter = SoftConfidentWeighter(len(weights))
    weighter.weights.copy_(torch.tensor(weights))
    optimizer = wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), weighter=weighter, meta=meta, model=model
    )
    data = torch.randn(len(weights), 4, generator=torch.Generator().manual_seed(seed))
    report = optimizer.step(lambda rows: model.losses(data[rows]), range(len(weights)))
    assert report.min_weight == min(torch.tensor(weights))
    torch.testing.assert_close(report.mean_weight, torch.tensor(weights).mean())
    assert report.strength == 0
    assert 0 <= min(report.support_loss, report.query_loss) <= report.objective + 1e-6
    assert report.objective <= max(report.support_loss, report.query_loss) + 1e-6


@pytest.mark.parametrize("penalty", [None, 0.1])
@pytest.mark.parametrize("inner", ["sgd", "adam"])
@pytest.mark.parametrize("meta", MODES)
def test_complex_parameters_train_like_pairs_of_real_ones(meta, inner, penalty):
    """A complex linear map against the same map written out in real and imaginary parts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 3, 2, generator=generator, dtype=torch.float64)
    start = torch.randn(3, 3, 2, generator=generator, dtype=torch.float64)

    class Map(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = nn.Parameter(weight)

    def complex_losses(model, rows):
        z = torch.view_as_complex(x[rows])
        return (z @ model.weight - z).abs().square().mean(dim=1)

    def real_losses(model, rows):
        (a, b), (c, d) = x[rows].unbind(-1), model.weight.unbind(-1)
        real, imaginary = a @ c - b @ d - a, a @ d + b @ c - b
        return (real.square() + imaginary.square()).mean(dim=1)

    outcomes = []
    for model, losses in (
        (Map(torch.view_as_complex(start.clone())), complex_losses),
        (Map(start.clone()), real_losses),
    ):
        optimizer = wrap(
            torch.optim.Adam(model.parameters(), lr=0.05),
            meta=meta,
            inner_optimizer=inner,
            inner_lr=0.05,
            inner_steps=2,
            model=model,
            regularizer=None if penalty is None else CovarianceMetaRegularizer(penalty),
            generator=torch.Generator().manual_seed(3),
        )
        for _ in range(5):
            optimizer.step(lambda rows, m=model, f=losses: f(m, rows), range(10))
        weight = model.weight.detach()
        outcomes.append(torch.view_as_real(weight) if weight.is_complex() else weight)
    torch.testing.assert_close(*outcomes)


def embedding_losses(table: nn.Embedding, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return (table(index[rows]) - 1).square().mean(dim=1)


@pytest.mark.parametrize("level", [1, 2])
def test_sparse_gradients_are_right_without_a_meta_step(level):
    torch.manual_seed(0)
    table = nn.Embedding(10, 3, sparse=True)
    plain = copy.deepcopy(table)
    reference = torch.optim.SparseAdam(plain.parameters(), lr=0.1)
    optimizer = wrap(torch.optim.SparseAdam(table.parameters(), lr=0.1), meta="none")
    for step in range(5):
        index = (torch.arange(4) + step) % 10
        reference.zero_grad()
        embedding_losses(plain, index, torch.arange(4)).mean().backward()
        reference.step()
        optimizer.zero_grad()
        if level == 1:
            optimizer.objective(embedding_losses(table, index, torch.arange(4))).backward()
            optimizer.step()
        else:
            optimizer.step(lambda rows, i=index: embedding_losses(table, i, rows), index)
    assert table.weight.grad.is_sparse
    assert torch.equal(table.weight, plain.weight)


@pytest.mark.parametrize("inner", ["sgd", "adam"])
@pytest.mark.parametrize("meta", ["mldg", "fomaml", "maml", "reptile"])
def test_sparse_gradients_are_refused_by_a_meta_step(meta, inner):
    table = nn.Embedding(10, 3, sparse=True)
    before = table.weight.detach().clone()
    optimizer = wrap(
        torch.optim.SGD(table.parameters(), lr=0.1), meta=meta, inner_optimizer=inner, model=table
    )
    with pytest.raises(TypeError, match=r"sparse gradient.*meta='none', or sparse=False"):
        optimizer.step(lambda rows: embedding_losses(table, torch.arange(8), rows), range(8))
    assert torch.equal(table.weight, before)


losses = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(
    stream=st.lists(st.tuples(losses, losses), max_size=15),
    window=st.integers(2, 7),
    strength=st.sampled_from([0.0, 0.005, 3.0]),
    gamma=st.sampled_from([0.0, 0.5, 4.0]),
)
def test_lambda_is_bounded_and_sigma_a_covariance_whatever_the_losses(
    stream, window, strength, gamma
):
    regularizer = CovarianceMetaRegularizer(strength, gamma, window)
    for train_loss, validation_loss in stream:
        regularizer.update(torch.tensor(train_loss), torch.tensor(validation_loss))
    sigma = regularizer.covariance
    assert torch.equal(sigma, sigma.T)
    assert torch.linalg.eigvalsh(sigma.double()).min() >= -1e-5
    assert (sigma.diagonal() <= 1 + 1e-5).all()
    assert strength * (1 - 1e-6) <= float(regularizer.strength) <= strength * (1 + gamma) + 1e-6
    # A window is a window: what came before it has no influence.
    fresh = CovarianceMetaRegularizer(strength, gamma, window)
    for train_loss, validation_loss in stream[-window:]:
        fresh.update(torch.tensor(train_loss), torch.tensor(validation_loss))
    assert torch.equal(fresh.covariance, sigma)
