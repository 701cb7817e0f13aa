"""The wrapper as a torch optimizer: equality with what it wraps, exact resume, hooks, copies."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from comet_meta import (
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    IndexedDataset,
    SoftConfidentWeighter,
    collect_scores,
)
from wrapping import wrap

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}
MODES = ("none", "mldg", "fomaml", "maml", "reptile")


def autoencoder(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 4))


def losses_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x).square().mean(dim=1)


DATA = torch.randn(32, 4, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("level", [1, 2])
def test_unit_weights_without_meta_equal_the_unwrapped_optimizer_bit_for_bit(name, level):
    plain_model, model = autoencoder(), autoencoder()
    plain = OPTIMIZERS[name](plain_model.parameters())
    wrapped = wrap(
        OPTIMIZERS[name](model.parameters()), weighter=SoftConfidentWeighter(32), meta="none"
    )
    for step in range(50):
        index = torch.randperm(32, generator=torch.Generator().manual_seed(step))[:8]
        plain.zero_grad()
        losses_of(plain_model, DATA[index]).mean().backward()
        plain.step()
        if level == 1:
            wrapped.zero_grad()
            wrapped.objective(losses_of(model, DATA[index]), index).backward()
            wrapped.step()
        else:
            batch = DATA[index]
            wrapped.step(lambda rows, batch=batch: losses_of(model, batch[rows]), index)
    for ours, reference in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert torch.equal(ours, reference)


def test_the_objective_by_hand():
    weighter = SoftConfidentWeighter(10, rule=lambda s: (s < 5).float() * 0.75)
    weighter.fit(torch.arange(10.0))
    theta = torch.tensor([[3.0]], requires_grad=True)
    optimizer = wrap(
        torch.optim.SGD([theta], lr=1.0),
        weighter=weighter,
        regularizer=CovarianceMetaRegularizer(base_strength=0.1, gamma=0.0),
    )
    # Samples 4 and 7 have weights 0.75 and 0: (0.75 * 2 + 0 * 100) / 2 + 0.1 * 9.
    objective = optimizer.objective(torch.tensor([2.0, 100.0]), torch.tensor([4, 7]))
    assert objective.item() == pytest.approx(0.75 + 0.9)


@pytest.mark.parametrize("meta", MODES)
def test_weights_follow_the_sample_through_a_shuffling_loader(meta):
    # One-hot samples: the gradient of sample i lies in coordinate i alone, so what the step does
    # to coordinate i shows which weight sample i got.
    n = 12
    model = nn.Linear(n, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    weighter = SoftConfidentWeighter(n, rule=lambda s: (s + 1) / n)
    weighter.fit(torch.arange(n, dtype=torch.float32))
    optimizer = wrap(
        torch.optim.SGD(model.parameters(), lr=1.0),
        weighter=weighter,
        meta=meta,
        inner_lr=1e-6,
        model=model,
    )
    expected = torch.arange(1, n + 1) / n
    loader = DataLoader(
        IndexedDataset(torch.eye(n).double()),
        batch_size=4,
        shuffle=True,
        generator=torch.Generator().manual_seed(3),
    )
    for index, batch in loader:
        before = model.weight.detach().clone()
        optimizer.step(lambda rows, batch=batch: model(batch[rows]).squeeze(1), index)
        moved = (before - model.weight.detach())[0]
        touched = index[moved[index] != 0]
        assert len(touched) > 0
        ratio = moved[touched] / expected[touched]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        others = torch.ones(n, dtype=torch.bool)
        others[index] = False
        assert (moved[others] == 0).all()


def test_support_and_query_rows_are_disjoint_in_every_step():
    model = autoencoder()
    optimizer = wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), meta="fomaml", tasks=2, inner_steps=2
    )
    for _ in range(10):
        calls: list[list[int]] = []

        def losses(rows, calls=calls):
            calls.append(rows.tolist())
            return losses_of(model, DATA[rows])

        optimizer.step(losses, torch.arange(32))
        for support, again, query in (calls[:3], calls[3:]):
            assert support == again
            assert not set(support) & set(query)
        assert sorted(calls[0] + calls[2] + calls[3] + calls[5]) == list(range(32))


def test_the_regularizer_watches_disjoint_samples():
    # The loss of sample i is 2^i, so a sum of losses names the samples in it.
    theta = torch.ones(1, requires_grad=True)
    regularizer = CovarianceMetaRegularizer(base_strength=0.0)
    seen = []
    regularizer.update = lambda train, validation: seen.append((train, validation))
    optimizer = wrap(torch.optim.SGD([theta], lr=0.0), regularizer=regularizer, meta="none")
    powers = 2.0 ** torch.arange(10)
    optimizer.objective(powers * theta, torch.arange(10))
    optimizer.step(lambda rows: powers[rows] * theta, torch.arange(10))
    assert len(seen) == 2
    for train, validation in seen:
        support, query = round(train.item() * 7), round(validation.item() * 3)
        assert support & query == 0
        assert support | query == 2**10 - 1


@pytest.mark.parametrize("meta", MODES)
def test_training_lowers_the_loss(meta):
    model = autoencoder()
    optimizer = wrap(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        weighter=SoftConfidentWeighter(32),
        regularizer=CovarianceMetaRegularizer(base_strength=1e-4),
        meta=meta,
        model=model,
    )
    before = losses_of(model, DATA).mean().item()
    for _ in range(60):
        report = optimizer.step(lambda rows: losses_of(model, DATA[rows]), torch.arange(32))
    assert losses_of(model, DATA).mean().item() < 0.7 * before
    assert all(torch.isfinite(value) for value in report)
    assert not any(value.requires_grad for value in report)


def run(steps, optimizer, model, start=0):
    for step in range(start, steps):
        index = torch.randperm(32, generator=torch.Generator().manual_seed(step))[:8]
        if step % 5 == 4:
            optimizer.weighter.fit(losses_of(model, DATA).detach())
        optimizer.step(lambda rows, index=index: losses_of(model, DATA[index][rows]), index)


def assembled(model, meta="mldg"):
    return wrap(
        [
            torch.optim.AdamW(model[0].parameters(), lr=1e-2),
            torch.optim.Adam([*model[2].parameters(), *model[3].parameters()], lr=1e-2),
        ],
        weighter=SoftConfidentWeighter(32, momentum=0.5),
        regularizer=CovarianceMetaRegularizer(),
        meta=meta,
        model=model,
    )


@pytest.mark.parametrize("meta", MODES)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(meta):
    model = autoencoder()
    whole = assembled(model, meta)
    run(12, whole, model)

    first = autoencoder()
    optimizer = assembled(first, meta)
    run(7, optimizer, first)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.manual_seed(99)  # a new process has another state of the global generator
    second = autoencoder(seed=5)
    resumed = assembled(second, meta)
    second.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    run(12, resumed, second, start=7)

    for name, value in model.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert torch.equal(whole.weighter(), resumed.weighter())
    assert torch.equal(whole.regularizer.pairs, resumed.regularizer.pairs)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_train_on_like_the_original(clone):
    model = autoencoder()
    optimizer = assembled(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    run(3, optimizer, model)
    scheduler.step()
    other_model, other = clone((model, optimizer))
    run(6, optimizer, model, start=3)
    run(6, other, other_model, start=3)
    for ours, theirs in zip(model.parameters(), other_model.parameters(), strict=True):
        assert ours is not theirs
        assert torch.equal(ours, theirs)


def test_groups_and_state_are_shared_with_the_wrapped_optimizer():
    model = autoencoder()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = wrap(inner)
    assert optimizer.param_groups[0] is inner.param_groups[0]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    run_once = losses_of(model, DATA).mean()
    run_once.backward()
    optimizer.step()
    scheduler.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert optimizer.state is inner.state
    extra = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert inner.param_groups[1]["lr"] == 0.5
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_several_optimizers_step_together():
    model = autoencoder()
    optimizer = assembled(model)
    assert len(optimizer.param_groups) == 2
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.objective(losses_of(model, DATA), torch.arange(32)).backward()
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert all(moved)
    assert set(optimizer.state) == set(model.parameters())


def test_hooks_fire_once_and_clipping_sees_the_meta_gradient():
    model = autoencoder()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = wrap(inner, meta="mldg", inner_lr=0.1)
    fired = []
    optimizer.register_step_post_hook(lambda *_: fired.append("outer"))
    inner.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None
    )
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer.step(lambda rows: losses_of(model, DATA[rows]), torch.arange(32))
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert fired == ["outer"]
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_the_drop_in_objective_works_with_a_gradient_scaler():
    models = [autoencoder(), autoencoder()]
    for model, wrapper in zip(models, (lambda o: o, CoMetOptimizerWrapper), strict=True):
        optimizer = wrapper(torch.optim.AdamW(model.parameters(), lr=1e-2))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(6):
            optimizer.zero_grad()
            losses = losses_of(model, DATA) * (torch.inf if step == 3 else 1.0)
            if isinstance(optimizer, CoMetOptimizerWrapper) and step != 3:
                objective = optimizer.objective(losses)
            else:
                objective = losses.mean()
            scaler.scale(objective).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)  # skipped where gradients overflowed
            scaler.update()
        assert scaler.get_scale() == 2.0**9
    for ours, reference in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(ours, reference)
        assert torch.isfinite(ours).all()


def micro_batches(optimizer, model, batches, **options):
    for index in batches:
        optimizer.backward(
            lambda rows, index=index: losses_of(model, DATA[index][rows]),
            index,
            factor=1 / len(batches),
            **options,
        )
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("meta", MODES)
@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_gradients_of_micro_batches_add_up(meta, inner):
    batches = torch.arange(32).split(8)
    options = {"meta": meta, "inner_lr": 0.05, "inner_steps": 2, "inner_optimizer": inner}
    gradients = []
    for share in (True, False):
        model = autoencoder()
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model, **options)
        optimizer.generator.manual_seed(0)
        if share:
            gradients.append(micro_batches(optimizer, model, batches))
            continue
        total = [torch.zeros_like(p) for p in model.parameters()]
        for index in batches:
            model.load_state_dict(autoencoder().state_dict())
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.param_groups[0]["lr"] = 1.0
            # With SGD and lr = 1, what a step takes away is its gradient.
            optimizer.step(
                lambda rows, model=model, index=index: losses_of(model, DATA[index][rows]), index
            )
            for t, b, p in zip(total, before, model.parameters(), strict=True):
                t += (b - p.detach()) / len(batches)
        gradients.append(total)
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_a_plain_loop_accumulates_the_objective_as_usual():
    model, whole = autoencoder(), autoencoder()
    model.eval()  # batch norm would tell the batches apart
    whole.eval()
    weighter = SoftConfidentWeighter(32, rule=lambda scores: 1 - scores / 40)
    weighter.fit(torch.arange(32.0))
    optimizers = [
        wrap(torch.optim.AdamW(m.parameters(), lr=1e-2), weighter=weighter) for m in (model, whole)
    ]
    for index in torch.arange(32).split(8):
        (optimizers[0].objective(losses_of(model, DATA[index]), index) / 4).backward()
    optimizers[1].objective(losses_of(whole, DATA), torch.arange(32)).backward()
    for ours, reference in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad)


@pytest.mark.parametrize("meta", MODES)
@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_a_gradient_scaler_changes_nothing_but_the_range(meta, inner):
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        model = autoencoder()
        optimizer = wrap(
            torch.optim.SGD(model.parameters(), lr=0.1),
            weighter=SoftConfidentWeighter(32),
            meta=meta,
            inner_lr=0.1,
            inner_optimizer=inner,
            tasks=2,
            model=model,
        )
        optimizer.generator.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            micro_batches(optimizer, model, torch.arange(32).split(16), scaler=scaler)
            if scaler is None:
                optimizer.step()
            else:
                largest = max(p.grad.abs().max() for p in model.parameters())
                scaler.unscale_(optimizer)
                assert largest == 2**12 * max(p.grad.abs().max() for p in model.parameters())
                scaler.step(optimizer)
                scaler.update()
        results.append(list(model.parameters()))
    # Powers of two scale without rounding.
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("meta", MODES)
def test_a_step_whose_inner_gradients_overflow_is_skipped_and_the_scale_lowered(meta):
    model = autoencoder()
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), meta=meta, model=model)
    # float32 overflows at this scale, as float16 does at a usual one.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(2):
        optimizer.zero_grad()
        report = optimizer.backward(
            lambda rows: 100 * losses_of(model, DATA[rows]), torch.arange(32), scaler=scaler
        )
        assert torch.isfinite(report.objective)
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert moved == (step == 1)
    assert scaler.get_scale() == 2.0**7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("meta", MODES)
def test_the_full_method_trains_under_autocast_with_a_scaler(dtype, meta):
    model = autoencoder()
    optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=1e-2), meta=meta, model=model)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)

    def losses(rows):
        with torch.autocast("cpu", dtype):
            return (model(DATA[rows]).float() - DATA[rows]).square().mean(dim=1)

    before = losses_of(model, DATA).mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        optimizer.backward(losses, torch.arange(32), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert losses_of(model, DATA).mean().item() < 0.7 * before


def test_gradients_that_are_one_tensor_are_accumulated_apart():
    # autograd.grad gives a and b one and the same gradient, c one with a stride of 0.
    a, b, c = (torch.zeros(4, requires_grad=True) for _ in range(3))
    optimizer = wrap(torch.optim.SGD([a, b, c], lr=1.0), meta="mldg")
    for _ in range(2):
        optimizer.backward(lambda rows: (a + b)[rows] + c.sum(), torch.arange(4))
    assert a.grad.tolist() == b.grad.tolist() == [0.5] * 4
    assert c.grad.tolist() == [2.0] * 4


def test_frozen_parameters_stay():
    model = autoencoder()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=0.1))
    optimizer.step(lambda rows: losses_of(model, DATA[rows]), torch.arange(32))
    assert torch.equal(model[0].weight, before)


def test_shared_parameters_are_adapted_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encode = nn.Linear(4, 4, bias=False)
            self.decode = nn.Linear(4, 4, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(self.encode(x))

    gradients = {}
    for meta in ("fomaml", "maml"):
        model = Tied()
        optimizer = wrap(
            torch.optim.SGD(model.parameters(), lr=0.0), meta=meta, inner_lr=1e-7, model=model
        )
        torch.manual_seed(1)
        optimizer.generator.manual_seed(0)
        optimizer.step(lambda rows, model=model: losses_of(model, DATA[rows]), torch.arange(32))
        gradients[meta] = model.encode.weight.grad
    # With a vanishing inner step both are the query gradient at theta.
    torch.testing.assert_close(gradients["maml"], gradients["fomaml"], rtol=1e-4, atol=1e-6)


def test_wrapping_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    theta = torch.ones(2, requires_grad=True)
    optimizer = wrap(torch.optim.SGD([theta], lr=0.1))
    optimizer.step(lambda rows: theta.sum() * rows.float(), torch.arange(8))
    assert torch.equal(torch.rand(3), expected)


def test_the_paper_preset():
    theta = torch.ones(1, requires_grad=True)
    preset = CoMetOptimizerWrapper.paper(torch.optim.Adam([theta], lr=2e-4), num_samples=50)
    assert (preset.weighter.rule, preset.weighter.kappa) == ("ratio", 1.5)
    assert preset.regularizer.base_strength == 0.005
    assert (preset.regularizer.gamma, preset.regularizer.window) == (0.5, 5)
    assert (preset.meta.mode, preset.meta.inner_optimizer, preset.meta.inner_lr) == (
        "fomaml",
        "adam",
        1e-4,
    )
    assert (preset.meta.inner_steps, preset.meta.query_fraction, preset.meta.tasks) == (5, 0.3, 4)
    changed = CoMetOptimizerWrapper.paper(torch.optim.Adam([theta]), num_samples=50, meta="reptile")
    assert changed.meta.mode == "reptile"


def test_contaminated_training_is_rescued_end_to_end():
    """A linear autoencoder must not learn the direction that only bad samples use."""
    generator = torch.Generator().manual_seed(0)
    sizes = 1 + torch.rand(180, 1, generator=generator)
    signs = torch.randn(200, 1, generator=generator).sign()
    good = sizes * signs[:180] * torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    bad = signs[180:] * torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    data = torch.cat([good, bad]) + 0.05 * torch.randn(200, 4, generator=generator)

    def error_on_bad(robust: bool) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False))
        weighter = SoftConfidentWeighter(200, contamination=0.1) if robust else None
        optimizer = wrap(torch.optim.Adam(model.parameters(), lr=1e-2), weighter=weighter)
        loader = DataLoader(
            IndexedDataset(TensorDataset(data)),
            batch_size=20,
            shuffle=True,
            generator=torch.Generator().manual_seed(0),
        )
        for epoch in range(30):
            for index, (batch,) in loader:
                optimizer.step(lambda rows, b=batch: losses_of(model, b[rows]), index)
            if weighter is not None and epoch >= 4:
                weighter.fit(collect_scores(lambda batch: losses_of(model, batch[0]), loader))
        if weighter is not None:
            assert len(set(weighter.ranking(20).tolist()) & set(range(180, 200))) >= 18
        return losses_of(model, data[180:]).mean().item()

    assert error_on_bad(robust=True) > 5 * error_on_bad(robust=False)
