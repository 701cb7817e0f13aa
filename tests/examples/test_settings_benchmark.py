"""Settings that are chosen on one half of the sets and judged on the other."""

import itertools
import sys

import numpy as np
import pytest
from tiny_experiment import TinyBenchmark

from comet_meta.vision.backbones import DEFAULT_BACKBONE
from grid import Benchmark
from runs import Runs, of_shard
from settings import AS_IS, CANDIDATES, Case, by_set, crossed, gains, main, rows


@pytest.mark.parametrize("detector", CANDIDATES)
def test_candidates_change_what_their_names_say(tmp_path, monkeypatch, detector):
    bench, seen = TinyBenchmark(tmp_path, detector), []
    kind = type(bench.experiment(detector, "tiny"))
    original = kind.run

    def watched(self, split, settings):
        outcome = original(self, split, settings)
        trained = outcome.training.detector
        noise = (getattr(trained, name, None) for name in ("noise_std", "own_noise"))
        seen.append((settings.steps, trained.learning_rate, *noise))
        return outcome

    monkeypatch.setattr(kind, "run", watched)
    usual = bench.experiment(detector, "tiny").build().learning_rate
    # The tiny SimpleNet has independent noise as it is.
    own = {"fastflow": (0.0, None), "simplenet": (0.5, 0.0)}[detector]
    expected = {
        AS_IS: (6, usual, *own),
        "a third of the rate": (6, usual / 3, *own),
        "three times the rate": (6, usual * 3, *own),
        "ten times the rate": (6, usual * 10, *own),
        "half as long": (3, usual, *own),
        "twice as long": (12, usual, *own),
        "half the noise": (6, usual, 0.15, 0.35),
        "twice the noise": (6, usual, 0.6, 1.4),
        "independent noise": (6, usual, 1.0, 0.0),
        "noise of 0.1": (6, usual, 0.1, None),
        "noise of 0.3": (6, usual, 0.3, None),
    }
    for name in CANDIDATES[detector]:
        assert 0 <= Case().run(bench, "tiny", detector, name, seed=0)["I-AUROC"] <= 1
        assert seen[-1] == expected[name]
    # The experiment itself stays as it is.
    assert bench.experiment(detector, "tiny").build().learning_rate == usual


@pytest.mark.parametrize("case", [Case(), Case(0.2, "comet")])
def test_bad_pictures_are_trained_on_where_there_is_noise(tmp_path, monkeypatch, case):
    bench, seen = TinyBenchmark(tmp_path, "simplenet"), []
    kind = type(bench.experiment("simplenet", "tiny"))
    original, split_of = kind.run, kind.split

    def watched(self, split, settings):
        seen.append((sum(sample.label for sample in split.train) > 0, settings.method))
        return original(self, split, settings)

    def with_bad_ones_as_it_is(self, noise, seed):
        seen.append(noise)
        return split_of(self, 0.2, seed)

    monkeypatch.setattr(kind, "run", watched)
    monkeypatch.setattr(kind, "split", with_bad_ones_as_it_is)
    case.run(bench, "tiny", "simplenet", AS_IS, seed=0)
    assert seen == [case.noise, (case.noise > 0, case.method)]


def test_what_one_half_chooses_is_judged_on_the_other():
    # The second is best on the first two sets, and worse on the others.
    values = np.array([[0.5, 0.9], [0.5, 0.9], [0.8, 0.7], [0.8, 0.7]])
    counts, judged = crossed(values)
    # Only the half of the last two sets chooses the first.
    assert counts == {0: 1, 1: 5}
    nan = np.nan
    # Halves 01, 02, 03, 12, 13, 23: figures of the second on the others, then of the first.
    assert judged == pytest.approx(
        np.array(
            [
                [nan, nan, 0.7, 0.7],
                [nan, 0.9, nan, 0.7],
                [nan, 0.9, 0.7, nan],
                [0.9, nan, nan, 0.7],
                [0.9, nan, 0.7, nan],
                [0.5, 0.5, nan, nan],
            ]
        ),
        nan_ok=True,
    )
    # The gain of the second on the others, or none of the first.
    assert gains(values) == pytest.approx([-0.1, 0.15, 0.15, 0.15, 0.15, 0.0])
    found = dict(zip("abcd", values.tolist(), strict=True))
    # Sets a and b are judged three times, once with the first candidate.
    assert [line["chosen on other sets"] for line in by_set(found)] == [
        "0.767",
        "0.767",
        "0.700",
        "0.700",
        "0.733",
    ]
    assert [line[AS_IS] for line in by_set(found)] == ["0.500", "0.500", "0.800", "0.800", "0.650"]


def test_the_larger_half_of_three_sets_chooses():
    counts, judged = crossed(np.array([[0.5, 0.6], [0.5, 0.6], [0.9, 0.1]]))
    assert counts == {0: 2, 1: 1}
    assert np.nanmean(judged, axis=0) == pytest.approx([0.5, 0.5, 0.1])
    assert gains(np.array([[0.5, 0.6], [0.5, 0.6], [0.9, 0.1]])) == pytest.approx([-0.8, 0, 0])


def test_shards_are_all_items_once():
    assert [of_shard("abcde", f"{i}/2") for i in (1, 2)] == [["a", "c", "e"], ["b", "d"]]
    assert of_shard("abc", "9/9") == []


def test_the_table_shows_sets_on_which_all_candidates_are_finished(tmp_path):
    bench, runs = Benchmark("resnet18", {}, "cpu", None), Runs(tmp_path / "runs.jsonl")
    names = [*CANDIDATES["fastflow"]]
    complete = (0.8, 0.9, 0.7, 0.8, 0.8, 0.8, 0.8)
    for task, values in (("mvtec/a", complete), ("mvtec/b", (0.6, 0.8))):
        for name, value in zip(names, values, strict=False):
            for seed in (0, 1):
                key = Case().key(bench, task, "fastflow", name) | {"seed": seed}
                runs.add(key, {"I-AUROC": value + 0.02 * seed})
    found = Case().finished(bench, runs, ["mvtec/a", "mvtec/b"], "fastflow", names)
    assert not Case(0.1).finished(bench, runs, ["mvtec/a"], "fastflow", names)
    assert not Case(method="comet").finished(bench, runs, ["mvtec/a"], "fastflow", names)
    assert found == {"mvtec/a": pytest.approx([0.81, 0.91, 0.71, 0.81, 0.81, 0.81, 0.81])}
    found["mvtec/b"] = [0.61, 0.81, 0.61, 0.61, 0.61, 0.61, 0.61]
    first, second, third, *_ = rows(found, names)
    assert first == {
        "settings": AS_IS,
        "mean": "0.710",
        "difference": "",
        "worst": "",
        "chosen": "0%",
    }
    assert (second["mean"], second["difference"]) == ("0.860", "+0.150 ± 0.050")
    assert (second["worst"], second["chosen"]) == ("+0.100 (mvtec/a)", "100%")
    assert (third["difference"], third["worst"]) == ("-0.050 ± 0.050", "-0.100 (mvtec/a)")


def test_sets_without_masks_are_left_out_of_pixel_metrics(tmp_path, monkeypatch, capsys):
    file, names = tmp_path / "runs.jsonl", [AS_IS, "half as long"]
    bench, runs = Benchmark(DEFAULT_BACKBONE, {}, "cpu", None), Runs(file)
    tasks = ["elpv/mono", "elpv/poly", "mvtec/a"]
    for task, name in itertools.product(tasks, names):
        figures = {"I-AUROC": 0.9} | ({} if task == "elpv/mono" else {"AUPRO": 0.5})
        figures = figures if name == AS_IS else {key: x - 0.2 for key, x in figures.items()}
        runs.add(Case().key(bench, task, "fastflow", name) | {"seed": 0}, figures)
    found = Case().finished(bench, runs, tasks, "fastflow", names, "AUPRO")
    assert found == {task: pytest.approx([0.5, 0.3]) for task in tasks[1:]}
    assert [*Case().finished(bench, runs, tasks, "fastflow", names)] == tasks
    command = ["settings", "--out", str(file), "--detectors", "fastflow", "--seeds", "0"]
    command += ["--tasks", *tasks[:2], "mvtec/a", "--candidates", "half as long"]
    monkeypatch.setattr(sys, "argv", [*command, "--metric", "AUPRO", "--root", f"mvtec={tmp_path}"])
    main()
    printed = capsys.readouterr().out
    assert printed.startswith("\n### fastflow, plain, 0% bad, 2 sets: AUPRO")
    assert "0.300" in printed
    assert "0.700" not in printed


def test_the_command_prints_the_asked_candidates_for_each_method(tmp_path, monkeypatch, capsys):
    file, tasks = tmp_path / "runs.jsonl", ["elpv/mono", "elpv/poly"]
    bench, runs = Benchmark(DEFAULT_BACKBONE, {}, "cpu", None), Runs(file)
    figures = {(AS_IS, "plain"): 0.8, ("half as long", "plain"): 0.7}
    figures |= {(AS_IS, "comet"): 0.9, ("half as long", "comet"): 0.95}
    for (name, method), value in figures.items():
        for task in tasks:
            key = Case(0.1, method).key(bench, task, "simplenet", name)
            runs.add(key | {"seed": 0}, {"I-AUROC": value})
    command = ["settings", "--out", str(file), "--detectors", "simplenet", "--seeds", "0"]
    command += ["--tasks", *tasks, "--noise", "0.1", "--methods", "plain", "comet"]
    monkeypatch.setattr(sys, "argv", [*command, "--candidates", "half as long"])
    main()  # a candidate that wasn't asked for would be trained now
    _, plain, comet = capsys.readouterr().out.split("### ")
    assert plain.startswith("simplenet, plain, 10% bad, 2 sets: I-AUROC")
    assert "0.700" in plain
    assert "+0.000 against the settings as they are" in plain
    assert comet.startswith("simplenet, comet, 10% bad, 2 sets")
    assert "+0.050 against the settings as they are" in comet
    assert "twice as long" not in plain + comet
    assert len(list(runs)) == 8
