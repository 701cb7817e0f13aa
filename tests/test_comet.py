"""The object that knows the data of a loop."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from comet_meta import (
    CoMet,
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    IndexedDataset,
    SoftConfidentWeighter,
)

N = 40
DATA = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2))
        self.body.append(nn.Linear(6, 4))
        self.frozen = nn.BatchNorm1d(4).eval()
        self.scored_in: list[bool] = []

    def losses(self, batch):
        return (self.body(batch) - batch).square().mean(dim=1)

    def scores(self, batch):
        self.scored_in.append(self.body.training)
        return self.losses(batch)


class Augmented(torch.utils.data.Dataset):
    """Draws from every source of random numbers that there is."""

    def __len__(self):
        return N

    def __getitem__(self, position):
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return DATA[position] + 0.01 * noise


def unit(scores):
    return torch.ones_like(scores)


def trained(comet_of=None, dataset=DATA, epochs=3, **settings):
    model = Net()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = DataLoader(dataset, batch_size=8, shuffle=True, **settings)
    comet = None if comet_of is None else comet_of(loader, optimizer, model)
    for _ in range(epochs):
        for batch in loader if comet is None else comet:
            losses = model.losses(batch)
            optimizer.zero_grad()
            (losses.mean() if comet is None else comet.loss(losses)).backward()
            optimizer.step()
    return model, comet


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def equal_trust(loader, optimizer, model):
    weighter = SoftConfidentWeighter(N, rule=unit)
    return CoMet(loader, optimizer, scores=model.scores, weighter=weighter)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"drop_last": True, "dataset": Augmented()},
        {"generator": torch.Generator()},
        {"num_workers": 1, "persistent_workers": True},
    ],
    ids=["shuffled", "augmented", "generator", "workers"],
)
def test_unit_weights_train_to_the_bits_of_the_plain_loop(settings):
    runs = []
    for comet_of in (None, equal_trust):
        if "generator" in settings:
            settings["generator"].manual_seed(9)
        runs.append(trained(comet_of, **settings)[0])
    assert same(*runs)
    assert runs[1].scored_in  # it was scored, and in eval mode
    assert not any(runs[1].scored_in)


def test_modes_are_restored_module_by_module():
    model, _ = trained(equal_trust)
    assert model.body.training
    assert not model.frozen.training


def test_it_trains_as_the_parts_it_is_made_of():
    def rule(scores):
        return torch.linspace(0, 1, len(scores))

    def comet_of(loader, optimizer, model):
        weighter = SoftConfidentWeighter(N, rule=rule)
        return CoMet(
            loader, optimizer, scores=model.scores, weighter=weighter, warm_up=2,
            regularizer=CovarianceMetaRegularizer(0.01),
        )  # fmt: skip

    model = Net()
    torch.manual_seed(1)
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    weighter = SoftConfidentWeighter(N, rule=rule)
    optimizer = CoMetOptimizerWrapper(
        inner, weighter=weighter, regularizer=CovarianceMetaRegularizer(0.01)
    )
    loader = DataLoader(IndexedDataset(DATA), batch_size=8, shuffle=True)
    for epoch in range(4):
        for index, batch in loader:
            optimizer.zero_grad()
            optimizer.objective(model.losses(batch), index).backward()
            optimizer.step()
        if epoch >= 1:
            weighter.fit(torch.arange(float(N)))
    other, comet = trained(comet_of, epochs=4)
    assert comet.rounds == 4
    assert same(model, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_loaders_own_and_their_positions_known(workers):
    data = [{"x": torch.tensor(float(i)), "name": str(i)} for i in range(11)]
    plain = DataLoader(data, batch_size=4, shuffle=True, num_workers=workers)
    comet = CoMet(plain)
    for batch in comet:
        assert batch["x"].tolist() == comet.index.tolist()
        assert batch["name"] == [str(i) for i in comet.index.tolist()]
    assert len(comet) == 3
    assert comet.dataset is data
    assert comet.batch_size == 4
    for _ in comet:  # left early
        break
    for batch in comet:
        assert batch["x"].tolist() == comet.index.tolist()


def test_every_sample_is_scored_whatever_the_loader_leaves_out():
    batches = BatchSampler(RandomSampler(range(5)), 2, drop_last=True)  # five of forty
    model = Net()
    comet = CoMet(DataLoader(DATA, batch_sampler=batches), scores=model.scores)
    comet.refit()
    with torch.no_grad():
        expected = model.eval().losses(DATA)
    assert torch.allclose(comet.weighter.scores, expected)


@pytest.mark.parametrize("kind", ["list of floats", "list of tensors", "array"])
def test_scores_of_one_picture_at_a_time(kind):
    def scores(batch):
        each = [row.sum() for row in batch]
        if kind == "array":
            return batch.sum(dim=1).numpy()
        return [float(score) for score in each] if kind == "list of floats" else each

    comet = CoMet(DataLoader(DATA, batch_size=7), scores=scores, model=[])
    comet.refit()
    assert torch.allclose(comet.weighter.scores, DATA.sum(dim=1))


class Stream(IterableDataset):
    def __iter__(self):
        while True:
            for position in torch.randperm(N).tolist():
                yield position, DATA[position]


def test_a_stream_warms_up_in_steps():
    loader = DataLoader(Stream(), batch_size=8)
    model = Net()
    weighter = SoftConfidentWeighter(N, rule=lambda scores: (scores < scores.median()).float())
    comet = CoMet(loader, index=lambda batch: batch[0], weighter=weighter, warm_up=3, every=5)
    seen = []
    for step, (_, batch) in enumerate(comet):
        seen.append(float(weighter.weights.mean()))
        comet.loss(model.losses(batch)).backward()
        if step == 20:
            break
    assert seen[:15] == [1] * 15
    assert max(seen[15:]) < 0.6


def test_an_endless_sampler_is_refitted_once_as_many_samples_have_come():
    class Endless(torch.utils.data.Sampler):
        def __iter__(self):
            while True:
                yield from torch.randperm(N).tolist()

    model = Net()
    comet = CoMet(DataLoader(DATA, batch_size=8, sampler=Endless()), scores=model.scores)
    for step, _ in enumerate(comet):
        assert comet.rounds == step // 5
        if step == 12:
            break


def test_dropped_batches_do_not_shift_the_rounds():
    comet = CoMet(DataLoader(DATA[:39], batch_size=10, shuffle=True, drop_last=True))
    for epoch in range(4):
        for batch in comet:
            comet.loss(batch.sum(dim=1).requires_grad_())
        assert comet.rounds == epoch + 1


def test_a_prior_needs_no_scoring_pass():
    model = Net()
    prior = DATA.norm(dim=1)
    comet = CoMet(
        DataLoader(DATA, batch_size=8),
        scores=model.scores,
        weighter=SoftConfidentWeighter(prior=prior),
    )
    for _ in range(3):
        list(comet)
    assert not model.scored_in
    before = comet.weighter.weights.clone()
    assert comet.suspects(5).shape == (5,)
    assert model.scored_in
    assert torch.equal(comet.weighter.weights, before)


def test_there_are_no_suspects_before_there_are_scores():
    comet = CoMet(DataLoader(DATA, batch_size=8))
    with pytest.raises(RuntimeError, match=r"no sample has a score yet.*warm_up=1"):
        comet.suspects()
    _, after_an_epoch = trained(lambda loader, optimizer, _: CoMet(loader, optimizer), epochs=1)
    assert after_an_epoch.suspects(5).shape == (5,)
    scored = CoMet(DataLoader(DATA, batch_size=8), scores=Net().scores)
    assert scored.suspects(5).shape == (5,)
    prior = DATA.norm(dim=1)
    known = CoMet(DataLoader(DATA, batch_size=8), weighter=SoftConfidentWeighter(prior=prior))
    assert torch.equal(known.suspects(5), prior.topk(5).indices)


def test_one_sample_with_nan_takes_no_step_away_and_leaves_no_nan():
    data = DATA.clone()
    data[3] = torch.nan
    model = Net()
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for _ in range(2)]
    comet = CoMet(DataLoader(data, batch_size=8), optimizers)
    before = [p.clone() for p in model.parameters()]
    for step, batch in enumerate(comet):
        for optimizer in optimizers:  # two that share all parameters and take turns
            optimizer.zero_grad()
            comet.loss(model.losses(batch)).backward()
            optimizer.step()
        changed = not all(
            torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
        )
        assert changed == (step > 0)  # the first batch holds the NaN
    assert all(p.isfinite().all() for p in model.parameters())
    assert comet.epoch_loss.isfinite()


def test_a_function_is_given_the_rows_that_count():
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    weighter = SoftConfidentWeighter(10, rule=lambda scores: weights)
    weighter.fit(torch.arange(10.0))
    comet = CoMet(DataLoader(DATA[:10], batch_size=5), weighter=weighter)
    seen, found = [], []
    for batch in comet:
        values = batch.sum(dim=1).requires_grad_()

        def losses(rows, values=values):
            seen.append(rows.tolist())
            return values[rows]

        found.append(comet.loss(losses))
        found[-1].backward()
        if len(found) == 1:
            assert torch.allclose(found[0], (weights[:5] * values).sum() / 5)
            assert torch.allclose(values.grad, weights[:5] / 5)
            assert torch.allclose(comet.epoch_loss, (weights[:5] * values).sum() / 2.5)
    assert seen == [[0, 2, 4]]  # of the second batch one row is left: not learned from
    assert found[1] == 0


def test_the_loss_to_monitor_does_not_fall_with_the_weights():
    half = SoftConfidentWeighter(10, rule=lambda scores: torch.full_like(scores, 0.5))
    half.fit(torch.arange(10.0))
    comet = CoMet(DataLoader(torch.ones(10), batch_size=10), weighter=half)
    for batch in comet:
        assert comet.loss(batch * 3) == 1.5
    assert comet.epoch_loss == 3


def test_anomalous_losses_are_a_second_row():
    weighter = SoftConfidentWeighter(10, rule=lambda scores: (scores > 4).float())
    weighter.fit(torch.arange(10.0))
    comet = CoMet(DataLoader(torch.arange(10.0), batch_size=10), weighter=weighter)
    next(iter(comet))
    loss = comet.loss(torch.ones(10, 3), anomalous={"hinge": torch.full((10,), 2.0)})
    assert loss == (5 * 1 + 0.5 * 5 * 2) / 10


def test_a_resumed_run_goes_on_with_weights_and_rounds():
    _, comet = trained(equal_trust)
    _, other = trained(equal_trust, epochs=0)
    other.load_state_dict(comet.state_dict())
    assert other.rounds == 3
    assert torch.equal(other.weighter.scores, comet.weighter.scores)


def test_a_batch_that_is_not_the_last_drawn():
    comet = CoMet(DataLoader(DATA, batch_size=8))
    list(comet)
    with pytest.raises(RuntimeError, match=r"itertools\.cycle"):
        comet.loss(torch.ones(8))
    assert comet.loss(torch.ones(8), index=range(8)) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loader": DataLoader(Stream(), batch_size=4)}, TypeError, "index="),
        ({"loader": [DATA]}, TypeError, "index="),
        ({"loader": DataLoader(DATA, batch_size=None)}, TypeError, "makes batches"),
        ({"scores": lambda batch: batch}, ValueError, "model="),
        ({"index": len, "scores": len, "model": []}, ValueError, "either"),
        ({"loader": iter([]), "index": len}, ValueError, "every="),
        ({"weighter": SoftConfidentWeighter(3)}, ValueError, "3 samples"),
        ({"warm_up": 0}, ValueError, "warm_up is 0"),
        ({"every": 0}, ValueError, "every is 0"),
        ({"optimizers": torch.optim.LBFGS(Net().parameters())}, TypeError, "LBFGS"),
        ({"optimizers": [Net()]}, TypeError, "got Net"),
        (
            {"optimizers": CoMetOptimizerWrapper(torch.optim.SGD(Net().parameters()))},
            TypeError,
            "comet.weighter",
        ),
    ],
)
def test_what_does_not_go_together(arguments, error, message):
    with pytest.raises(error, match=message):
        CoMet(**{"loader": DataLoader(DATA, batch_size=8)} | arguments)
