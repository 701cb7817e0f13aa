"""The table of detectors against the bank."""

import itertools

import pytest
import torch
from sklearn.metrics import roc_auc_score
from tiny_experiment import TinyBenchmark

from comet_examples.detectors.positions import PositionScaler
from detectors import key_of, rows, run
from grid import Benchmark
from runs import Runs


def test_times_stretch_the_length_and_none_is_the_bank(tmp_path, monkeypatch):
    bench, lengths = TinyBenchmark(tmp_path), []
    made = bench.experiment("simplenet", "tiny")
    original = made.run

    def seen(split, settings):
        lengths.append((settings.steps, settings.schedule, settings.seed))
        return original(split, settings)

    monkeypatch.setattr(made, "run", seen)
    for times in (1, 5):
        assert 0 <= run(bench, "tiny", "simplenet", times, seed=3)["I-AUROC"] <= 1
    assert lengths == [(6, "cosine", 3), (30, "cosine", 3)]
    assert run(bench, "tiny", "simplenet", 0, seed=3)["I-AUROC"] > 0.9
    assert len(lengths) == 2


def test_scores_as_they_are_stand_beside_standardised_ones(tmp_path):
    bench, runs = TinyBenchmark(tmp_path, "fastflow"), Runs(tmp_path / "runs.jsonl")
    figures = run(bench, "tiny", "fastflow", 1, seed=0)
    made = bench.experiment("fastflow", "tiny")
    settings = made.preset.training("plain", seed=0)
    outcome = made.run(made.split(0, 0), settings)
    assert outcome.figures["I-AUROC"] == figures["I-AUROC"]
    outcome.training.detector.usual = PositionScaler()
    raw, _ = made.predict(outcome.training, made.split(0, 0).test)
    assert not torch.equal(raw, outcome.scores)
    bad = [sample.label for sample in made.split(0, 0).test]
    assert figures["raw I-AUROC"] == pytest.approx(roc_auc_score(bad, raw))
    longer = figures | {"raw I-AUROC": 0.25}
    for times, own in ((0, figures), (1, figures), (5, longer)):
        runs.add(key_of(bench, "mvtec/a", "fastflow", times) | {"seed": 0}, own)
    (row, _) = rows(bench, runs, ["mvtec/a"], "fastflow", [1, 5])
    assert row["raw, 1 x"] == f"{figures['raw I-AUROC']:.3f}"
    assert row["raw, 5 x"] == "0.250"


@pytest.mark.parametrize("times", [0, 1])
def test_bad_training_pictures_are_tested_beside_the_others(tmp_path, monkeypatch, times):
    bench, seen = TinyBenchmark(tmp_path), []
    made = bench.experiment("simplenet", "tiny")
    assert not any("left out" in name for name in run(bench, "tiny", "simplenet", times, seed=0))
    bad = made.split(0.2, 0)  # as a set that has bad training pictures of its own
    count = sum(sample.label for sample in bad.train)
    judge = made.judge

    def judged(split, scores, maps):
        seen.append((sum(s.label for s in split.train), [s.label for s in split.test], scores))
        return judge(split, scores, maps)

    monkeypatch.setattr(made, "split", lambda noise, seed: bad)
    monkeypatch.setattr(made, "judge", judged)
    figures = run(bench, "tiny", "simplenet", times, seed=0)
    (trained_on, labels, scores), (_, wider, all_scores) = seen
    assert trained_on == 0
    assert count > 0
    assert wider == labels + count * [1]
    assert torch.equal(all_scores[: len(labels)], scores)
    assert figures["I-AUROC"] == pytest.approx(roc_auc_score(labels, scores))
    found = figures["with left out I-AUROC"]
    assert found == pytest.approx(roc_auc_score(wider, all_scores))


def test_columns_of_left_out_pictures_stand_where_there_are_any(tmp_path):
    bench, runs = Benchmark("resnet18", {}, "cpu", None), Runs(tmp_path / "runs.jsonl")
    values = {0: (0.8, 0.96), 1: (0.7, 0.8), 5: (0.65, 0.95)}
    for task, (times, pair) in itertools.product(["mvtec/a", "ksdd2/ksdd2"], values.items()):
        for seed, value in enumerate(pair):
            figures = {"I-AUROC": value}
            if task == "ksdd2/ksdd2":
                figures["with left out I-AUROC"] = value / 2
            runs.add(key_of(bench, task, "simplenet", times) | {"seed": seed}, figures)
    first, second, mean = rows(bench, runs, ["mvtec/a", "ksdd2/ksdd2"], "simplenet", [1, 5])
    assert list(first) == list(second) == list(mean)
    assert {value for name, value in first.items() if "left out" in name} == {""}
    found = {name: value for name, value in second.items() if "left out" in name}
    assert found == {
        "with left out, bank": "0.440",
        "with left out, 1 x": "0.375",
        "with left out, 5 x": "0.400",
        # Differences -0.025 and 0.075: t = 0.5, p = 1 - 2 / pi * arctan t.
        "with left out, longer": "+0.025 (p = 0.705)",
        "with left out, ± s.e.": "0.050",
    }


def test_rows_are_the_finished_sets_and_their_mean(tmp_path):
    bench, runs = Benchmark("resnet18", {}, "cpu", None), Runs(tmp_path / "runs.jsonl")
    figures = {
        ("mvtec/a", 0): (0.89, 0.91),
        ("mvtec/a", 1): (0.9, 0.94, 0.1),  # no bank with the third seed
        ("mvtec/a", 5): (0.905, 0.915),
        ("mvtec/b", 0): (1.0, 1.0),
        ("mvtec/c", 0): (0.8,),
        ("mvtec/c", 1): (0.74,),
        ("mvtec/c", 5): (0.75,),
    }
    for (task, times), values in figures.items():
        for seed, value in enumerate(values):
            key = key_of(bench, task, "fastflow", times) | {"seed": seed}
            runs.add(key, {"I-AUROC": value})
    first, other, mean = rows(bench, runs, ["mvtec/a", "mvtec/b", "mvtec/c"], "fastflow", [1, 5])
    assert first == {
        "set": "mvtec/a",
        "seeds": "2",
        "bank": "0.900 ± 0.014",
        "1 x": "0.920 ± 0.028",
        "5 x": "0.910 ± 0.007",
        # Differences 0.01 and 0.03, then 0.005 and -0.025: t is 2 and -2/3. With one degree of
        # freedom p = 1 - 2 / pi * arctan |t|.
        "- bank": "+0.020 (p = 0.295)",
        "longer": "-0.010 (p = 0.626)",
        "± s.e.": "0.015",
    }
    # Seeds that weren't asked for are left out.
    (one, *_) = rows(bench, Runs(runs.file, [1]), ["mvtec/a"], "fastflow", [1, 5])
    assert (one["seeds"], one["bank"], one["1 x"]) == ("1", "0.910", "0.940")
    assert other["set"] == "mvtec/c"
    assert (mean["set"], mean["bank"], mean["1 x"]) == ("mean", "0.850", "0.830")
    assert (mean["- bank"], mean["longer"]) == ("-0.020", "+0.000")


@pytest.mark.parametrize("detector", ["simplenet", "fastflow", "reconstruction"])
def test_all_detectors_share_the_banks_figures(detector):
    bench = Benchmark("resnet18", {}, "cpu", None)
    keys = [key_of(bench, "mvtec/a", detector, times) for times in (0, 1, 5)]
    assert keys[0] == key_of(bench, "mvtec/a", "simplenet", 0)
    assert len({str(key) for key in keys}) == 3
