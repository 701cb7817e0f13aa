"""The table of detectors against the bank."""

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
