"""The length of training that held-out pictures choose, in the examples and in the benchmark."""

import argparse
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from test_scripts import SMALL, results, tree
from tiny_experiment import TinyBenchmark
from torch import nn

import lengths
from comet_examples import cli, experiment, length
from comet_examples.length import chosen, losses_by_length, mean_losses
from comet_examples.presets import preset_for
from comet_examples.training import FeatureRows, TrainingSettings
from runs import Runs

COUNT, DIM = 60, 40
SETTINGS = TrainingSettings("plain", steps=16, seed=1, schedule="cosine")


class Regression(nn.Module):
    """Predicts a picture's last channel from the others; its loss is the squared error."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, 1)
        nn.init.zeros_(self.linear.weight)

    def fit_statistics(self, batches):
        pass

    def losses(self, features, part_weights=None):
        (level,) = features
        values = level.flatten(1)
        return (self.linear(values[:, :-1]).squeeze(1) - values[:, -1]) ** 2

    def scores(self, features):
        return self.losses(features)

    def optimizers(self):
        return [torch.optim.Adam(self.parameters(), lr=0.01)]


def pictures(learnable: bool, seed: int = 0) -> FeatureRows:
    """Features (COUNT, DIM + 1, 1, 1); the last channel follows from the others or from nothing."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(COUNT, DIM, generator=generator)
    target = values.mean(1) * DIM**0.5 if learnable else torch.randn(COUNT, generator=generator)
    features = torch.cat([values, target[:, None]], dim=1)[..., None, None]
    return FeatureRows([features], torch.arange(COUNT))


def means(losses):
    return {times: float(own.mean()) for times, own in losses.items()}


@pytest.mark.parametrize("seed", range(3))
def test_a_longer_training_is_chosen_where_it_fits_other_pictures_too(seed):
    learned = losses_by_length(Regression, pictures(True, seed), SETTINGS)
    assert chosen(means(learned)) == 5
    # 48 pictures and 40 channels: noise can be learned by heart, and helps no other picture.
    by_heart = losses_by_length(Regression, pictures(False, seed), SETTINGS)
    assert chosen(means(by_heart)) == 1


def test_a_fifth_is_held_out_of_every_training_and_nothing_else_is_judged(monkeypatch):
    data, trained_on, judged = pictures(True), [], []
    train, losses = length.train, length.mean_losses

    def training(build, rows, settings, **options):
        trained_on.append((rows.rows.tolist(), settings))
        return train(build, rows, settings, **options)

    def judging(detector, rows, device):
        assert not detector.training
        judged.append(rows.rows.tolist())
        return losses(detector, rows, device)

    monkeypatch.setattr(length, "train", training)
    monkeypatch.setattr(length, "mean_losses", judging)
    of_method = replace(SETTINGS, method="comet", strength=0.1, contamination=0.2, batch_size=6)
    found = losses_by_length(Regression, data, of_method, lengths=(1, 2.5))
    assert [len(own) for own in found.values()] == [12, 12]
    for (kept, settings), held_out, steps in zip(trained_on, judged, (16, 40), strict=True):
        assert sorted(kept + held_out) == list(range(COUNT))
        assert len(held_out) == 12
        assert settings == replace(SETTINGS, steps=steps, batch_size=6)
    assert judged[0] == judged[1]
    other = losses_by_length(Regression, data, replace(SETTINGS, seed=2), lengths=(1,))
    assert judged[2] != judged[0]
    assert not torch.equal(other[1], found[1])


def test_the_choice_is_reproducible():
    one, other = (losses_by_length(Regression, pictures(True), SETTINGS) for _ in range(2))
    assert all(torch.equal(one[times], other[times]) for times in one)


def test_losses_that_differ_from_pass_to_pass_are_averaged():
    class Noisy(Regression):
        def losses(self, features, part_weights=None):
            return torch.randn(len(features[0])) + 3

    torch.manual_seed(0)
    losses = mean_losses(Noisy(), pictures(True), "cpu")
    assert losses.shape == (COUNT,)
    assert losses.std() == pytest.approx(1 / math.sqrt(8), rel=0.3)


def test_every_length_is_judged_with_the_same_noise():
    class Noisy(Regression):
        def losses(self, features, part_weights=None):
            own = super().losses(features)
            return own if self.training else torch.randn(len(own))

    found = losses_by_length(Noisy, pictures(True), SETTINGS)
    assert torch.equal(found[1], found[5])


def test_too_few_pictures_are_refused():
    few = FeatureRows(pictures(True).features, torch.arange(9))
    with pytest.raises(ValueError, match="there are 9 training pictures; expected at least 10"):
        losses_by_length(Regression, few, SETTINGS)


def test_ties_take_the_shorter_and_losses_must_be_finite():
    assert chosen({5.0: 0.25, 1.0: 0.25}) == 1
    with pytest.raises(ValueError, match="expected finite ones"):
        chosen({1.0: 0.25, 5.0: math.nan})


def test_stretched_settings():
    assert TrainingSettings("plain", 3).stretched(5) == TrainingSettings("plain", 15)
    assert TrainingSettings("plain", 3).stretched(0.1) == TrainingSettings("plain", 1)
    for times in (0, -1, math.nan):
        with pytest.raises(ValueError, match="expected a factor > 0"):
            SETTINGS.stretched(times)


@pytest.fixture
def longer(monkeypatch):
    """Held-out losses that ask for the longer training; the settings that were asked with."""
    asked = []

    def losses(build, data, settings, **_):
        asked.append((len(data), settings))
        return {1.0: torch.tensor([0.5, 0.5, 0.5]), 5.0: torch.tensor([0.1, 0.1, 0.4])}

    monkeypatch.setattr("comet_examples.session.losses_by_length", losses)
    return asked


@pytest.fixture
def short(monkeypatch):
    """Presets of two steps; the settings of every training."""
    trained = []
    train = experiment.train

    def recorded(build, data, settings, **options):
        trained.append(settings)
        return train(build, data, settings, **options)

    monkeypatch.setattr(experiment, "train", recorded)
    monkeypatch.setattr(cli, "preset_for", lambda *a: replace(preset_for(*a), steps=2, epochs=None))
    return trained


def auto(tmp_path, *more) -> int:
    """The exit status of a script with ``--steps auto``."""
    if not (tmp_path / "data").exists():
        tree(tmp_path / "data", "mvtec")
    at = SMALL.index("--epochs")
    small = [*SMALL[:at], *SMALL[at + 2 :], "--steps", "auto", *more]
    paths = ["--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    return cli.main("simplenet", "mvtec", [*paths, *small])


def test_all_methods_of_a_category_get_the_length_that_its_pictures_choose(
    tmp_path, capsys, longer, short
):
    assert auto(tmp_path, "--plain", "--bank") == 0
    assert {(s.method, s.steps) for s in short} == {("plain", 10), ("comet", 10)}
    ((count, settings),) = longer
    assert (count, settings.steps) == (12, 2)
    found = results(tmp_path / "out")
    assert found["lengths"] == pytest.approx({"1": 0.5, "5": 0.2})
    assert found["settings"]["steps"] == "auto"
    assert "part: 5 x the preset's length; loss held out: 0.5 after 1 x, 0.2 after 5 x" in (
        capsys.readouterr().out
    )
    # A method that is added later gets the same length, and nothing is chosen again.
    assert auto(tmp_path, "--plain", "--oracle") == 0
    assert [(s.method, s.steps) for s in short[2:]] == [("oracle", 10)]
    assert len(longer) == 1
    assert results(tmp_path / "out")["lengths"] == found["lengths"]


def test_a_choice_outlives_a_stop(tmp_path, longer, short, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train", stopped)
        assert auto(tmp_path) == 130
    assert results(tmp_path / "out")["lengths"] == pytest.approx({"1": 0.5, "5": 0.2})
    assert auto(tmp_path, "--resume") == 0
    assert [s.steps for s in short] == [10]
    assert len(longer) == 1


def test_losses_that_are_not_finite_are_not_kept(tmp_path, capsys, longer, short, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "comet_examples.session.losses_by_length",
            lambda *_, **__: {1.0: torch.tensor([0.5, math.nan]), 5.0: torch.tensor([0.1, 0.1])},
        )
        assert auto(tmp_path) == 1
    assert "expected finite ones" in capsys.readouterr().err
    assert results(tmp_path / "out")["lengths"] == {}
    assert short == []
    assert auto(tmp_path) == 0  # it is chosen afresh
    assert len(longer) == 1


def test_results_that_were_written_before_lengths_were_chosen_are_kept(tmp_path, short):
    assert auto(tmp_path, "--steps", "2") == 0
    file = tmp_path / "out" / "part" / "results.json"
    content = json.loads(file.read_text())
    del content["lengths"]
    file.write_text(json.dumps(content))
    assert auto(tmp_path, "--steps", "2", "--plain") == 0
    assert [s.method for s in short] == ["comet", "plain"]


def test_the_planned_length_stays_where_pictures_choose_it_or_are_not_asked(
    tmp_path, longer, short, monkeypatch
):
    monkeypatch.setattr("comet_examples.session.chosen", lambda _: 1.0)
    assert auto(tmp_path) == 0
    assert [s.steps for s in short] == [2]
    paths = ["--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "other")]
    at = SMALL.index("--epochs")
    assert cli.main("simplenet", "mvtec", [*paths, *SMALL[:at], *SMALL[at + 2 :]]) == 0
    assert [s.steps for s in short] == [2, 2]
    assert len(longer) == 1
    assert results(tmp_path / "other")["lengths"] == {}


def test_the_choice_runs_on_real_pictures_and_other_lengths_are_refused(tmp_path, capsys, short):
    assert auto(tmp_path) == 0
    found = results(tmp_path / "out")["lengths"]
    assert {*found} == {"1", "5"}
    assert all(math.isfinite(loss) for loss in found.values())
    steps = int(2 * chosen({float(n): loss for n, loss in found.items()}))
    assert short[-1].steps == steps
    # The choice leaves nothing behind: the training is the one of that length, to the last bit.
    auto_out = (tmp_path / "out").rename(tmp_path / "auto")
    assert auto(tmp_path, "--steps", str(steps)) == 0
    of_length, of_choice = (
        results(folder)["methods"]["comet"] for folder in (tmp_path / "out", auto_out)
    )
    assert [of_length[key] for key in ("test", "history", "suspects")] == [
        of_choice[key] for key in ("test", "history", "suspects")
    ]
    shutil.rmtree(tmp_path / "out")
    auto_out.rename(tmp_path / "out")
    capsys.readouterr()
    assert auto(tmp_path, "--steps", "2") == 2  # the same folder, another way to choose
    assert "steps was 'auto', is 2" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["none", "0", "-3", "1.5"])
def test_steps_are_a_number_or_auto(tmp_path, capsys, text):
    with pytest.raises(SystemExit):
        auto(tmp_path, "--steps", text)
    assert "--steps" in capsys.readouterr().err


def test_the_benchmark_chooses_seed_by_seed(tmp_path):
    bench = TinyBenchmark(tmp_path)
    runs, whole = (Runs(tmp_path / name) for name in ("held.jsonl", "whole.jsonl"))
    options = argparse.Namespace(noise=0.0, longer=[1, 5], form="plain", metric="I-AUROC")
    held_out = {0: (0.2, 0.1), 1: (0.1, 0.2), 2: (0.3, 0.1), 3: (0.1, 0.1)}
    for seed, own in held_out.items():
        key = lengths.key_of(bench, "mvtec/a", "simplenet", 0.0, [1, 5]) | {"seed": seed}
        means = {f"mean, {n} x": x for n, x in zip((1, 5), own, strict=True)}
        runs.add(key, means | {"median, 1 x": 0.2, "median, 5 x": 0.1})
    auroc = {1: (0.5, 0.6, 0.7, 0.8), 5: (0.6, 0.5, 0.6, 0.4)}
    for times, own in auroc.items():
        for seed, figure in enumerate(own[:-1] if times == 5 else own):
            key = bench.key("simplenet", "mvtec/a", 0.0, seed, f"{times} x plain")
            whole.add(key, {"I-AUROC": figure})
    row, total = lengths.rows(bench, runs, whole, ["mvtec/a", "mvtec/b"], "simplenet", options)
    # Seed 3 has no longer training. Seeds 0 and 2 choose it: .6 and .6, and seed 1 keeps .6.
    assert row == {
        "set": "mvtec/a",
        "seeds": "3",
        "1 x": "0.600",
        "5 x": "0.567",
        "by the median": "0.567",
        "chosen": "0.600",
        "chosen - shortest": "+0.000",
        "± s.e.": "0.058",
        "5 x chosen": "2",
    }
    assert (total["set"], total["chosen"]) == ("mean", "0.600")
    options.form = "weights"
    assert lengths.rows(bench, runs, whole, ["mvtec/a"], "simplenet", options) == []
    assert lengths.choice({"mean, 1 x": 0.1, "mean, 5 x": 0.1}, [1, 5]) == 1


def test_the_benchmark_says_what_is_missing(tmp_path, capsys, monkeypatch):
    whole = tmp_path / "whole.jsonl"
    paths = ["--out", str(tmp_path / "held.jsonl"), "--whole", str(whole)]
    monkeypatch.setattr(
        "sys.argv",
        ["lengths.py", *paths, "--shard", "9/9", "--seeds", "0", "--detectors", "simplenet"],
    )
    with pytest.raises(SystemExit):
        lengths.main()
    assert "whole.jsonl; run detectors.py or regime.py first" in capsys.readouterr().err
    whole.touch()
    lengths.main()
    assert "has I-AUROC of the form plain at the lengths [1, 5]" in capsys.readouterr().out


def test_the_benchmark_trains_on_clean_pictures_or_with_bad_ones(tmp_path, monkeypatch):
    bench, seen = TinyBenchmark(tmp_path), []

    def losses(build, data, settings, **options):
        seen.append((len(data), settings, options["lengths"]))
        return {1: torch.tensor([0.0, 1.0, 5.0]), 5: torch.tensor([1.0, 2.0, 6.0])}

    monkeypatch.setattr(lengths, "losses_by_length", losses)
    made = bench.experiment("simplenet", "tiny")
    bad = made.split(0.2, 3)  # as a set that has bad training pictures of its own
    monkeypatch.setattr(made, "split", lambda noise, seed: bad)
    figures = lengths.run(bench, "tiny", "simplenet", 0.0, [1, 5], 3)
    assert figures == {"median, 1 x": 1, "median, 5 x": 2, "mean, 1 x": 2, "mean, 5 x": 3}
    lengths.run(bench, "tiny", "simplenet", 0.2, [1, 5], 3)
    count = sum(sample.label for sample in bad.train)
    assert count > 0
    settings = made.preset.training("plain", seed=3)
    assert seen == [
        (len(bad.train) - count, settings, [1, 5]),
        (len(bad.train), settings, [1, 5]),
    ]
