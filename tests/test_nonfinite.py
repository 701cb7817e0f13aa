"""Losses that are not finite and closures that raise: what is dropped, skipped and kept."""

import copy
import logging
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from comet_meta import CoMetOptimizerWrapper, CovarianceMetaRegularizer, SoftConfidentWeighter
from comet_meta.gradients import all_finite
from comet_meta.guard import DeferredFlag
from comet_meta.restore import undo_on_error
from wrapping import wrap

MODES = ("none", "mldg", "fomaml", "maml", "reptile")
INDEX = torch.arange(100, 112)
BAD_ROWS = [3, 7]
GOOD = torch.tensor([row for row in range(12) if row not in BAD_ROWS])
DATA = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


def pictures(bad: float = torch.nan, rows: list[int] = BAD_ROWS) -> torch.Tensor:
    """Data of which some rows hold a value that spreads through the model."""
    x = DATA.clone()
    x[rows, 2] = bad
    return x


def network(*, norm: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(6))
    return nn.Sequential(*layers)


def losses_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x).square().mean(dim=1)


def wrapped(model: nn.Module, **options) -> CoMetOptimizerWrapper:
    options.setdefault("inner_lr", 0.1)
    return wrap(
        torch.optim.AdamW(model.parameters(), lr=0.01),
        weighter=SoftConfidentWeighter(200),
        regularizer=CovarianceMetaRegularizer(0.01),
        model=model,
        generator=torch.Generator().manual_seed(5),
        **options,
    )


def step(optimizer, model, x, index=INDEX):
    return optimizer.step(lambda rows: losses_of(model, x[rows]), index)


def snapshot(model, optimizer) -> dict:
    """Everything that a step may change."""
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        # NaN stands for a sample that was never scored.
        return left.dtype == right.dtype and torch.allclose(
            left.double(), right.double(), rtol=0, atol=0, equal_nan=True
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


# Full steps.


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("norm", [False, True], ids=["", "batch norm"])
@pytest.mark.parametrize("meta", MODES)
def test_a_bad_sample_is_dropped_as_if_the_batch_had_come_without_it(meta, norm, bad, caplog):
    model, reference = network(norm=norm), network(norm=norm)
    ours, theirs = wrapped(model, meta=meta), wrapped(reference, meta=meta)
    torch.randperm(12, generator=theirs.generator)  # the split of the first attempt
    report = step(ours, model, pictures(bad))
    expected = step(theirs, reference, DATA[GOOD], INDEX[GOOD])
    assert same(model.state_dict(), reference.state_dict())
    assert same(ours.state_dict(), theirs.state_dict())
    assert report.dropped == 2
    assert expected.dropped == 0
    assert same(report[:-1], expected[:-1])
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "2 of 12 losses are NaN or infinite" in caplog.text
    assert "samples [103, 107]" in caplog.text


@pytest.mark.parametrize("meta", MODES)
def test_a_batch_of_bad_samples_is_skipped_and_said_so(meta, caplog):
    model = network(norm=True)
    optimizer = wrapped(model, meta=meta)
    step(optimizer, model, DATA)
    before = snapshot(model, optimizer)
    report = step(optimizer, model, pictures(rows=list(range(12))))
    after = snapshot(model, optimizer)
    before[1].pop("generator")
    after[1].pop("generator")
    assert same(after, before)
    assert report.dropped == 12
    assert report.objective.isnan()
    assert "12 of 12 losses" in caplog.text
    assert "batch left out: too few samples of the batch have a finite loss" in caplog.text
    assert "step skipped: none of its losses could be used" in caplog.text
    assert torch.isfinite(step(optimizer, model, DATA).objective)


def test_the_search_for_bad_samples_leaves_modes_as_they_were():
    model = network(norm=True)
    model[0].eval()
    step(wrapped(model), model, pictures())
    assert [module.training for module in model] == [False, True, True, True]


def test_without_the_model_batch_norm_spreads_one_nan_to_all(caplog):
    model = network(norm=True)
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), meta="none")
    assert step(optimizer, model, pictures(rows=[5])).dropped == 12
    assert "samples [100, 101, 102, 103, 104, 105, 106, 107] and others" in caplog.text


def test_one_sample_that_is_left_suffices_without_a_split_only():
    for meta, dropped in (("none", 11), ("mldg", 12)):
        model = network()
        x = pictures(rows=list(range(11)))
        assert step(wrapped(model, meta=meta), model, x).dropped == dropped


@pytest.mark.parametrize("meta", ["mldg", "fomaml", "maml", "reptile"])
def test_inner_steps_that_diverge_skip_the_step(meta, caplog):
    model = network().double()
    optimizer = wrapped(model, meta=meta, inner_lr=1e200, inner_steps=2)
    before = snapshot(model, optimizer)
    x = DATA.double()
    report = optimizer.step(lambda rows: (model(x[rows]) ** 4).mean(dim=1), INDEX)
    assert same(snapshot(model, optimizer)[0], before[0])
    assert report.dropped == 12
    assert "losses are NaN" not in caplog.text
    assert "step skipped" in caplog.text
    assert "lower inner_lr" in caplog.text


@pytest.mark.parametrize("meta", MODES)
def test_gradients_of_finite_losses_that_are_not_finite_skip_the_step(meta, caplog):
    model = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = wrapped(model, meta=meta)
    optimizer.regularizer = None
    # The root's derivative is infinite at 0, and times 0 it's NaN.
    report = optimizer.step(lambda rows: model(DATA[rows]).square().sum(dim=1).sqrt(), INDEX)
    assert report.dropped == 12
    assert torch.equal(model.weight, torch.zeros(4, 4))
    assert not optimizer.state
    assert "step skipped" in caplog.text


@pytest.mark.parametrize("meta", MODES)
def test_parameters_that_are_not_finite_end_the_training(meta):
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="go back to the last checkpoint"):
        step(wrapped(model, meta=meta), model, DATA)


def test_the_regularizer_remembers_finite_losses_only():
    model = network()
    optimizer = wrapped(model)
    for x in (DATA, pictures(), pictures(rows=list(range(12))), DATA):
        step(optimizer, model, x)
    assert optimizer.regularizer.count == 3
    assert torch.isfinite(optimizer.regularizer.pairs).all()


class CameraError(Exception):
    pass


FAULTS = [
    CameraError("the camera fell over"),
    torch.OutOfMemoryError("no memory"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize(
    ("meta", "at"), [("none", 1), *((meta, at) for meta in MODES[1:] for at in (1, 2, 3, 5))]
)
def test_a_closure_that_raises_midway_leaves_everything_as_it_was(meta, at, fault):
    model = network(norm=True)
    optimizer = wrapped(model, meta=meta, inner_steps=2, tasks=2)
    for _ in range(2):
        step(optimizer, model, DATA)
    before = snapshot(model, optimizer)
    calls = []

    def losses(rows):
        found = losses_of(model, DATA[rows])  # batch norm has seen the rows by now
        calls.append(rows)
        if len(calls) == at:
            raise fault
        return found

    with pytest.raises(type(fault)):
        optimizer.step(losses, INDEX)
    assert len(calls) == at
    assert same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("meta", MODES)
def test_running_out_of_memory_in_the_backward_pass_leaves_everything_as_it_was(meta):
    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    model = network(norm=True)
    optimizer = wrapped(model, meta=meta)
    step(optimizer, model, DATA)
    before = snapshot(model, optimizer)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(lambda rows: Greedy.apply(losses_of(model, DATA[rows])), INDEX)
    assert same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("meta", MODES)
def test_what_earlier_batches_left_in_the_gradients_survives_a_later_ones_fault(meta):
    model = network(norm=True)
    optimizer = wrapped(model, meta=meta)
    optimizer.backward(lambda rows: losses_of(model, DATA[rows]), INDEX, factor=1 / 3)
    held = [p.grad for p in model.parameters()]
    before = [gradient.clone() for gradient in held]

    def falls_over(rows):
        losses_of(model, DATA[rows])
        raise CameraError

    with pytest.raises(CameraError):
        optimizer.backward(falls_over, INDEX, factor=1 / 3)
    report = optimizer.backward(
        lambda rows: losses_of(model, DATA[rows]) * torch.nan, INDEX, factor=1 / 3
    )
    assert report.dropped == 12
    for parameter, gradient, value in zip(model.parameters(), held, before, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)
    weight = model[0].weight.detach().clone()
    optimizer.step()  # with what is there
    assert not torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("meta", MODES)
def test_a_scaler_skips_a_full_step_of_bad_samples(meta):
    model = network()
    optimizer = wrapped(model, meta=meta)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())
    for x, moves in ((DATA * torch.nan, False), (pictures(), True)):
        optimizer.zero_grad()
        optimizer.backward(lambda rows, x=x: losses_of(model, x[rows]), INDEX, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        assert same(model.state_dict(), before) is not moves
    assert scaler.get_scale() == 2.0**9


def test_a_raising_search_for_the_bad_samples_leaves_everything_as_it_was():
    model = network(norm=True)
    optimizer = wrapped(model, meta="none")
    before = snapshot(model, optimizer)
    calls = []

    def losses(rows):
        calls.append(rows)
        if len(calls) == 2:
            raise CameraError
        return losses_of(model, pictures()[rows])

    with pytest.raises(CameraError):
        optimizer.step(losses, INDEX)
    assert same(snapshot(model, optimizer), before)


# The drop-in objective.


def drop_in(optimizer, losses, index=INDEX):
    optimizer.zero_grad()
    objective = optimizer.objective(losses, index)
    objective.backward()
    optimizer.step()
    return objective


def test_the_objective_drops_a_bad_sample_as_if_the_batch_had_come_without_it(caplog):
    model, reference = network(), network()
    ours, theirs = wrapped(model), wrapped(reference)
    ours.weighter.fit(torch.linspace(0, 9, 200).square())
    theirs.weighter.load_state_dict(ours.weighter.state_dict())
    term = torch.zeros(12)
    term[BAD_ROWS] = torch.inf  # as from a logarithm of 0 in a part of the loss
    found = drop_in(ours, losses_of(model, DATA) + term)
    expected = drop_in(theirs, losses_of(reference, DATA)[GOOD], INDEX[GOOD])
    torch.testing.assert_close(found, expected)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert "samples [103, 107]" in caplog.text
    assert ours.regularizer.count == 0


def test_the_objective_names_rows_where_samples_have_no_names(caplog):
    theta = torch.ones(2, requires_grad=True)
    optimizer = wrap(torch.optim.SGD([theta], lr=0.1))
    optimizer.objective(theta * torch.tensor([1.0, torch.nan]))
    assert "1 of 2 losses are NaN or infinite and left out: rows [1] of the batch" in caplog.text


def test_a_bad_picture_in_a_drop_in_step_skips_it_because_its_gradient_is_nan(caplog):
    model = network()
    optimizer = wrapped(model)
    drop_in(optimizer, losses_of(model, DATA))
    before = snapshot(model, optimizer)
    objective = drop_in(optimizer, losses_of(model, pictures()))
    assert torch.isfinite(objective)
    after = snapshot(model, optimizer)
    assert same(after[0], before[0])
    assert same(after[1]["optimizers"], before[1]["optimizers"])
    assert "samples [103, 107]" in caplog.text
    assert "step skipped: although they were left out" in caplog.text
    caplog.clear()
    drop_in(optimizer, losses_of(model, DATA))
    assert not same(model.state_dict(), before[0])
    assert not caplog.records


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_drop_in_step_without_any_good_sample_is_skipped(value, caplog):
    model = network()
    optimizer = wrapped(model)
    drop_in(optimizer, losses_of(model, DATA))
    before = snapshot(model, optimizer)
    # The gradients are exactly 0, yet weight decay and momentum would move the parameters.
    objective = drop_in(optimizer, losses_of(model, DATA) * 0 + torch.full((12,), value))
    assert torch.isfinite(objective)
    assert same(snapshot(model, optimizer)[0], before[0])
    assert "step skipped: none of its losses could be used" in caplog.text


def test_accumulated_gradients_count_when_one_of_their_batches_is_good():
    model = network()
    optimizer = wrapped(model)
    before = copy.deepcopy(model.state_dict())
    for losses in (losses_of(model, DATA) * torch.nan, losses_of(model, DATA)):
        if torch.isfinite(losses).all():
            optimizer.objective(losses, INDEX).backward()
        else:
            optimizer.objective(losses, INDEX)
    optimizer.step()
    assert not same(model.state_dict(), before)


def test_a_drop_in_step_names_parameters_that_are_not_finite():
    model = network()
    optimizer = wrapped(model)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="go back to the last checkpoint"):
        drop_in(optimizer, losses_of(model, DATA))


def test_a_scaler_skips_overflows_and_the_next_step_is_taken():
    model = network()
    optimizer = wrapped(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())
    for x, moves in ((pictures(), False), (DATA, True)):
        optimizer.zero_grad()
        scaler.scale(optimizer.objective(losses_of(model, x), INDEX)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(model.state_dict(), before) is not moves
    assert scaler.get_scale() == 2.0**9


def test_an_objective_that_nothing_is_learned_from_is_the_plain_one(caplog):
    model = network()
    optimizer = wrapped(model)
    with torch.no_grad():
        assert optimizer.objective(losses_of(model, pictures()), INDEX).isnan()
    assert optimizer.regularizer.count == 0
    assert not caplog.records


def test_a_copy_made_between_backward_and_step_can_step():
    model = network()
    optimizer = wrapped(model)
    optimizer.objective(losses_of(model, DATA), INDEX).backward()
    copied_model, copied = copy.deepcopy((model, optimizer))
    for p, q in zip(copied_model.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    copied.step()
    optimizer.step()
    assert same(model.state_dict(), copied_model.state_dict())


# Several processes.


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    logging.disable()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    rows = torch.arange(12)[rank::2]
    outcomes = []
    for x in (pictures(rows=[4]), pictures(rows=[0, 2, 4, 6, 8, 10])):  # of the first process only
        model = network()
        optimizer = wrapped(model)
        report = step(optimizer, model, x[rows], INDEX[rows])
        outcomes += [int(report.dropped), model.state_dict()]
        # Drop-in: DistributedDataParallel has spread the NaN.
        model = network()
        optimizer = wrapped(model)
        optimizer.objective(losses_of(model, x[rows]), INDEX[rows]).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        optimizer.step()
        outcomes.append(model.state_dict())
    torch.save(outcomes, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_processes_drop_and_skip_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    untouched = network().state_dict()
    assert (first[0], second[0]) == (1, 0)
    assert same(first[1], second[1])
    assert not same(first[1], untouched)
    assert (first[3], second[3]) == (6, 6)  # one has nothing left: both skip
    for skipped in (first[2], second[2], first[4], second[4], first[5], second[5]):
        assert same(skipped, untouched)


# The parts.


def test_deferred_flag_is_the_flag():
    assert DeferredFlag(torch.tensor(True))
    assert not DeferredFlag(torch.tensor(False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_deferred_flag_reads_what_the_device_computes():
    values = torch.zeros(8, device="cuda")
    flag = DeferredFlag(torch.isfinite(values).all())
    values.fill_(torch.nan)  # queued behind it
    assert flag
    assert not DeferredFlag(torch.isfinite(values).all())


@pytest.mark.parametrize(
    ("tensor", "finite"),
    [
        (torch.tensor([1e30, -1e30]), True),  # whose squares overflow
        (torch.full((3,), 3e38), True),
        (torch.empty(0), True),
        (torch.tensor([1.0, torch.inf]), False),
        (torch.tensor([1.0, torch.nan]), False),
        (torch.tensor([1 + 2j]), True),
        (torch.tensor([complex(1, torch.nan)]), False),
        (torch.tensor([torch.finfo(torch.bfloat16).max], dtype=torch.bfloat16), True),
        (torch.eye(3).to_sparse(), True),
        (
            (torch.eye(3) * torch.tensor([1, torch.inf, 1])).nan_to_num(0.0, torch.inf).to_sparse(),
            False,
        ),
    ],
)
def test_all_finite(tensor, finite):
    assert all_finite([torch.ones(2), tensor]) is finite
    assert all_finite([])


def test_undone_on_error_keeps_what_a_good_body_did():
    generator, buffer = torch.Generator().manual_seed(1), torch.zeros(2)
    before = generator.get_state()
    with undo_on_error(generator, [buffer]):
        torch.rand(1, generator=generator)
        buffer.add_(1)
    assert buffer.tolist() == [1, 1]
    assert not torch.equal(generator.get_state(), before)
