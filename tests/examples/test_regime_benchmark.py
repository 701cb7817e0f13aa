"""Forms of the method against the length of training."""

from functools import partial

import pytest
import torch
from tiny_experiment import TinyBenchmark
from torch.optim import Adam, AdamW

from comet_meta import CovarianceMetaRegularizer
from grid import Benchmark
from regime import (
    FORMS,
    RunningScale,
    decayed,
    draw,
    key_of,
    over_sets,
    penalty_parts,
    rows,
    run,
)
from runs import Runs


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """A run's settings and optimizer."""
    bench, found = TinyBenchmark(tmp_path), []
    made = bench.experiment("simplenet", "tiny")
    original = made.run

    def watched(split, settings, wrap):
        outcome = original(split, settings, wrap=wrap)
        found.append((settings, outcome.training))
        return outcome

    monkeypatch.setattr(made, "run", watched)

    def last(name, times=1):
        figures = run(bench, "tiny", "simplenet", 0.0, times, name, seed=3)
        assert 0 <= figures["I-AUROC"] <= 1
        return found[-1]

    return last


def test_times_stretch_the_length(seen):
    # 24 pictures in batches of 8: 6 steps are 2 epochs.
    assert [len(seen("plain", times)[1].history) for times in (1, 3)] == [2, 6]
    settings, _ = seen("weights")
    assert (settings.schedule, settings.seed) == ("cosine", 3)


def test_forms_are_what_their_names_say(seen):
    for name in FORMS:
        wrapper = seen(name)[1].optimizer
        base = name.removeprefix("weights").removeprefix("+")
        assert (wrapper.weighter is not None) == name.startswith("weights")
        mode = "none" if wrapper.meta is None else wrapper.meta.mode
        modes = {"mldg": "mldg", "fomaml": "fomaml", "query": "fomaml"}
        assert mode == modes.get(base, "none")
        if base == "query":
            assert wrapper.meta.inner_lr < 1e-9
        kind, _, number = base.partition("-")
        if kind in ("penalty", "constant", "running"):
            assert wrapper.regularizer.base_strength == float(base.split("-", 1)[1])
            gammas = {"penalty": 0.5, "constant": 0, "running": 10}
            assert wrapper.regularizer.gamma == gammas[kind]
            assert isinstance(wrapper.regularizer, RunningScale) == (kind == "running")
        elif kind == "summed":
            # Features (6, 4, 4).
            assert wrapper.regularizer.base_strength == float(number) / 96
        else:
            assert wrapper.regularizer is None
        if kind == "decoupled":
            assert {group["weight_decay"] for group in wrapper.param_groups} == {float(number)}


def test_forms_train_to_different_figures(seen):
    def bits(name):
        detector = seen(name, times=2)[1].detector
        return torch.cat([p.detach().flatten() for p in detector.parameters()])

    plain = bits("plain")
    for name in ("penalty-0.005", "decoupled-0.1", "mldg", "fomaml", "weights"):
        assert not torch.equal(bits(name), plain), name


def test_a_running_scale_lets_the_strength_follow_how_steady_the_losses_are():
    regularizer, generator = RunningScale(0.01), torch.Generator().manual_seed(0)

    def strengths(deviation, steps=200):
        found = []
        for _ in range(steps):
            regularizer.update(*(5 + deviation * torch.randn(2, generator=generator)).tolist())
            found.append(float(regularizer.strength))
        return found

    strengths(1.0)
    steady = strengths(0.1, 20)
    unsteady = strengths(10.0, 5)
    assert max(steady[5:]) < 0.011  # near lambda_0
    assert max(unsteady) > 0.03
    published = CovarianceMetaRegularizer(0.01)
    published.pairs.copy_(regularizer.pairs)
    published.count.copy_(regularizer.count)
    assert float(published.strength) < 0.0108


def test_the_running_covariance_equals_one_from_all_losses():
    regularizer = RunningScale(0.01)
    pairs = torch.randn(40, 2, generator=torch.Generator().manual_seed(1)).double()
    for number, pair in enumerate(pairs.tolist()):
        if number < regularizer.window:
            assert not bool(regularizer.covariance.any())
        regularizer.update(*pair)
    ages = 0.99 ** torch.arange(39, -1, -1).double().unsqueeze(1)
    mean = (ages * pairs).sum(dim=0) / ages.sum()
    deviation = ((ages * pairs.square()).sum(dim=0) / ages.sum() - mean.square()).sqrt()
    expected = torch.cov((pairs[-5:] / deviation).T)
    torch.testing.assert_close(regularizer.covariance.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_penaltys_part_is_that_of_lambda_0_in_the_loss(tmp_path):
    bench = TinyBenchmark(tmp_path)
    ((name, part, values),) = [
        line.values() for line in penalty_parts(bench, ["tiny"], ["simplenet"], 0.0, 3)
    ]
    assert (name, values) == ("tiny", "96")
    experiment = bench.experiment("simplenet", "tiny")
    data = experiment.rows(experiment.split(0.0, 3).train)
    torch.manual_seed(3)
    detector = experiment.build()
    detector.fit_statistics(data.batches())
    with torch.no_grad():
        loss = torch.cat([detector.eval().losses(levels) for levels in data.batches()]).mean()
    penalty = CovarianceMetaRegularizer(0.005, gamma=0).penalty(detector.parameters())
    assert float(part) == pytest.approx(float(penalty / loss), rel=0.1)


def test_decoupled_decay_keeps_parameters_and_rates():
    first, second = (torch.zeros(2, requires_grad=True) for _ in range(2))
    made = decayed(Adam([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}]), 0.3)
    assert isinstance(made, AdamW)
    assert [group["lr"] for group in made.param_groups] == [0.1, 0.2]
    assert [group["weight_decay"] for group in made.param_groups] == [0.3, 0.3]
    assert made.param_groups[1]["params"][0] is second


def test_table_and_figure_show_what_is_finished(tmp_path):
    bench, runs = Benchmark("resnet18", {}, "cpu", None), Runs(tmp_path / "runs.jsonl")
    key = partial(key_of, bench, "mvtec/a", "fastflow", 0.1)
    for times, name, values in ((1, "plain", (0.8, 0.9, 0.1)), (3, "plain", (0.7, 0.8))):
        for seed, value in enumerate(values):
            runs.add(key(times, name) | {"seed": seed}, {"I-AUROC": value})
    runs.add(key(1, "weights") | {"seed": 0}, {"I-AUROC": 0.95})
    assert rows(runs, list(FORMS), [1, 3], key) == [
        {"form": "plain", "seeds": "2", "1 x": "0.850", "3 x": "0.750"},
        {"form": "weights", "seeds": "1", "1 x": "0.950", "3 x": ""},
    ]
    file = tmp_path / "figures" / "regime.png"
    draw(runs, ["a", "b"], list(FORMS), [1, 3], lambda _, times, name: key(times, name), file, 2)
    assert file.stat().st_size > 5000


def test_the_table_over_sets_compares_a_form_with_its_base(tmp_path):
    bench, runs = Benchmark("resnet18", {}, "cpu", None), Runs(tmp_path / "runs.jsonl")

    def key(panel, times, name):
        detector, task = panel.split(", ")
        return key_of(bench, task, detector, 0.1, times, name)

    finished = {
        ("a", "plain"): (0.8, 0.9),
        ("a", "mldg"): (0.85,),  # against the plain run of its seed
        ("b", "plain"): (0.7,),
        ("b", "mldg"): (0.68,),
        ("c", "mldg"): (0.1,),  # no base
        ("a", "weights"): (0.9,),
        ("a", "weights+mldg"): (0.8,),
    }
    for (task, name), values in finished.items():
        for seed, value in enumerate(values):
            figures = {"I-AUROC": value} | ({"weight of bad": 0.25} if "+" in name else {})
            runs.add(key(f"fastflow, {task}", 1, name) | {"seed": seed}, figures)
    panels = [f"fastflow, {task}" for task in "abc"]
    names = ["plain", "mldg", "weights", "weights+mldg"]
    plain, meta, _, weights = over_sets(runs, panels, names, [1, 3], key)
    assert (plain["sets, 1 x"], plain["1 x"], plain["- base, 1 x"]) == ("2", "0.775", "")
    # Differences .05 and -.02: mean .015, standard error .035, t = 3/7 with one degree of freedom.
    assert (meta["sets, 1 x"], meta["1 x"]) == ("2", "0.765")
    assert meta["- base, 1 x"] == "+0.015 ± 0.035 (p = 0.742)"
    assert meta["worst, 1 x"] == "-0.020 (b)"
    assert (weights["- base, 1 x"], weights["worst, 1 x"]) == ("-0.100", "-0.100 (a)")
    assert (weights["weight of bad, 1 x"], plain["weight of bad, 1 x"]) == ("0.25", "")
