"""The benchmark over tables: splits, resuming, what is counted, on two small tables."""

import sys

import numpy as np
import pytest
import torch

import breadth
import breadth_page
import looks
import table_detectors
import table_rivals
import table_training
from reviewed import review_of
from runs import Runs
from table_training import Task


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name, far in (("near", 2.0), ("far", 6.0)):
        good = random.normal(size=(200, 4)) * [1, 1, 0.1, 0.1]
        bad = random.normal(size=(40, 4)) + far
        rows = np.concatenate([good, bad])
        np.savez(tmp_path / f"{name}.npz", X=rows, y=np.repeat([0, 1], [200, 40]))
    return tmp_path


@pytest.mark.parametrize(
    ("condition", "share"), [("as-is", 28 / 168), ("clean", 0.0), ("0.1", 16 / 156)]
)
def test_a_condition_says_what_the_training_part_holds(folder, condition, share):
    task = Task(folder / "far.npz", condition, 0)
    assert task.rate == pytest.approx(share)
    assert (len(task.test), int(task.labels.sum())) == (72, 12)
    again, other = (Task(folder / "far.npz", condition, seed) for seed in (0, 1))
    assert np.array_equal(again.train, task.train)
    assert not np.array_equal(other.train, task.train)
    with pytest.raises(ValueError, match="too few"):
        Task(folder / "far.npz", "0.4", 0)


def test_finished_runs_are_kept_and_the_tables_printed(folder, monkeypatch, capsys):
    monkeypatch.setattr(table_training, "STEPS", 30)
    out = folder / "runs.jsonl"
    command = ["breadth", "--folder", str(folder), "--out", str(out), "--seeds", "0"]
    command += ["--detectors", "svdd", "--picture", str(folder / "dots.png")]
    monkeypatch.setattr(sys, "argv", [*command, "--methods", "plain", "oracle", "comet"])
    breadth.main()
    assert len(list(Runs(out))) == 2 * (3 + 2)
    monkeypatch.setattr(sys, "argv", command)
    breadth.main()
    runs = list(Runs(out))
    assert len(runs) == 2 * (len(breadth.USUAL) * 2 - 1)
    printed = capsys.readouterr().out
    assert "Training sets clean" in printed
    page = folder / "pages" / "breadth.md"
    # Without a folder nothing is run, and the page shows what is finished.
    shown = ["breadth", "--out", str(out), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", [*shown, "--picture", str(folder / "dots.png")])
    breadth.main()
    assert len(list(Runs(out))) == len(runs)
    text = page.read_text()
    assert "![A dot for each table: plain training against CoMet](../dots.png)" in text
    for heading in ("as-is", "clean"):
        assert f"## Training sets: {heading}" in text
    plain = next(r for r in runs if r["key"]["set"] == "far" and r["key"]["method"] == "plain")
    assert f"| far  | {plain['figures']['AUROC']:.3f} |" in text
    assert (folder / "dots.png").stat().st_size > 1000
    for run in runs:
        told = run["key"]["method"] in ("comet@rate", "comet@reviewed", "comet@learned")
        if told and run["key"]["condition"] == "clean":
            assert run["figures"]["mean weight"] == 1


def test_only_large_tables_where_they_are_asked_for(folder, monkeypatch, capsys):
    with np.load(folder / "far.npz") as file:
        np.savez(folder / "large.npz", X=np.tile(file["X"], (2, 1)), y=np.tile(file["y"], 2))
    monkeypatch.setattr(table_training, "STEPS", 5)
    command = ["breadth", "--folder", str(folder), "--out", str(folder / "runs.jsonl")]
    command += ["--detectors", "svdd", "--seeds", "0", "--conditions", "as-is"]
    monkeypatch.setattr(sys, "argv", [*command, "--methods", "plain", "oracle"])
    breadth.main()
    assert {run["key"]["set"] for run in Runs(folder / "runs.jsonl")} == {"far", "large", "near"}
    capsys.readouterr()
    monkeypatch.setattr(
        sys, "argv", [*command, "--least-rows", "200", "--methods", "plain", "oracle"]
    )
    breadth.main()
    rows = [line.split("|")[3:5] for line in capsys.readouterr().out.splitlines() if "svdd" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [["plain", "1"], ["oracle", "1"]]
    monkeypatch.setattr(sys, "argv", ["breadth", "--out", command[4], "--least-rows", "200"])
    with pytest.raises(SystemExit):
        breadth.main()


def test_a_learned_prior_weighs_rows_alone(folder):
    task = Task(folder / "far.npz", "as-is", 0)
    assert breadth.with_prior(task, by_value=True, look="told").has_parts
    learned = breadth.with_prior(task, by_value=True, look="learned")
    assert not learned.has_parts
    plain, _ = breadth.priors(task, by_value=False)
    expected = breadth.learn_from_review(plain, task.train, review_of(plain, task.bad))
    assert torch.equal(learned.prior, expected.prior)


def test_a_person_errs_as_often_as_asked(folder):
    task = Task(folder / "far.npz", "as-is", 0)
    prior = breadth.RowScorer(seed=0)(task.train)
    look_at, said = review_of(prior, task.bad, mistakes=0.05, seed=3)
    assert int((said.numpy() != task.bad[look_at]).sum()) == 3
    again = review_of(prior, task.bad, mistakes=0.05, seed=3)[1]
    assert torch.equal(said, again)


def test_what_a_number_of_looks_is_worth(folder, monkeypatch, capsys):
    command = ["looks", "--folder", str(folder), "--looks", "15", "60", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", command)
    looks.main()
    header, _, *lines = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.strip().splitlines()
    )
    few, many = (dict(zip(header, line, strict=True)) for line in lines)
    assert (few["looks"], many["looks"], few["tables"], few["number"]) == ("15", "60", "all", "2")
    # Rows of both tables are far from each other where they are bad.
    assert float(many["AUROC, learned"]) > 0.95
    assert float(many["share off by"]) < float(few["share off by"]) + 0.05


def test_who_looks_at_sixty_sees_no_other(folder):
    task = Task(folder / "far.npz", "as-is", 0)
    prior = breadth.RowScorer(seed=0)(task.train)
    look_at, bad = review_of(prior, task.bad)
    assert len(look_at) == 60
    assert bad.tolist() == task.bad[look_at].tolist()
    unseen = torch.ones(len(prior), dtype=torch.bool)
    unseen[look_at] = False
    assert not review_of(prior, unseen.numpy())[1].any()


def test_the_bound_of_the_variational_autoencoder_by_hand():
    torch.manual_seed(0)
    rows = torch.randn(5, 3)
    model = table_detectors.VAE(rows)
    with torch.no_grad():
        for layer in (model.encoder[2], model.decoder[2]):
            layer.weight.zero_()
        model.encoder[2].bias.copy_(torch.tensor([2.0] + 7 * [0.0] + [0.0] + 7 * [0.0]))
        model.decoder[2].bias.fill_(1.0)
    # KL of N((2, 0, ...), 1) from N(0, 1) is 2; the rows are taken for (1, 1, 1).
    expected = ((rows - 1).square().sum(dim=1) / 2 + 2) / 3
    torch.testing.assert_close(model.losses(rows), expected)
    with torch.no_grad():
        model.decoder[2].weight.normal_()
    assert not torch.equal(model.losses(rows), model.losses(rows))
    model.eval()
    assert torch.equal(model.losses(rows), model.losses(rows))


def test_scores_of_a_detector_are_those_of_eval_mode_and_training_goes_on(folder):
    task = Task(folder / "far.npz", "as-is", 0)
    model = table_detectors.VAE(task.train)
    assert torch.equal(
        table_training.scored(model, task.test), table_training.scored(model, task.test)
    )
    assert model.training


def test_folding_leaves_out_what_a_fifth_says_of_itself_and_learning_bias_does_not(
    folder, monkeypatch
):
    task = Task(folder / "far.npz", "as-is", 0)
    own = torch.arange(len(task.train)) % 5
    # Detectors that find their own fifth normal and all others alike.
    fifths = [(own == number, (own != number).float() + 1) for number in range(5)]
    monkeypatch.setattr(table_rivals, "by_fifths", lambda *_: iter(fifths))
    assert table_rivals.learning_bias(task, "svdd").unique().tolist() == [9.0]
    monkeypatch.setattr(table_rivals, "by_fifths", lambda *_: iter([(own == 0, own * 1.0)]))
    assert table_rivals.folding(task, "svdd")[own == 0].unique().tolist() == [0.0]
    assert (table_rivals.learning_bias(task, "svdd") == own).all()


@pytest.mark.parametrize("detector", breadth.DETECTORS)
def test_every_detector_of_tables_finds_rows_that_lie_far_off(folder, detector):
    task = Task(folder / "far.npz", "clean", 0)
    assert breadth.judged(task, detector, "plain")["AUROC"] > 0.9


def test_a_row_of_the_summary_by_hand(tmp_path):
    runs = Runs(tmp_path / "runs.jsonl")
    figures = {"a": (0.5, 0.9, 0.7), "b": (0.8, 0.8, 0.7)}
    for name, values in figures.items():
        for method, value in zip(("plain", "oracle", "comet"), values, strict=True):
            key = {"set": name, "condition": "as-is", "detector": "svdd", "seed": 0}
            runs.add({**key, "method": method}, {"AUROC": value})
    row = breadth_page.summary_row(runs, "svdd", "as-is", "comet")
    assert row["AUROC"] == "0.700"
    assert row["losses > .005"] == "1"
    assert row["worst"] == "-0.100 b"
    assert row["gap recovered"].startswith("0.250 ")
    assert row["median of sets"] == "0.50"


def test_seeds_that_a_method_lacks_do_not_count():
    values = {"plain": (0.5, 0.9), "oracle": (0.9, 0.9), "comet": (0.7,)}
    runs = [
        {
            "key": {
                "set": "a",
                "condition": "as-is",
                "detector": "svdd",
                "seed": seed,
                "method": method,
            },
            "figures": {"AUROC": value},
        }
        for method, own in values.items()
        for seed, value in enumerate(own)
    ]
    row = breadth_page.summary_row(runs, "svdd", "as-is", "comet")
    assert row["gain over plain"].startswith("0.200 ")
    assert row["gap recovered"].startswith("0.500 ")
    assert breadth_page.summary_row(runs, "svdd", "as-is", "retrain") is None


def test_a_loss_is_beyond_noise_by_two_standard_errors():
    plain = {"a": dict.fromkeys(range(3), 0.9), "b": dict.fromkeys(range(3), 0.9)}
    ours = {"a": {0: 0.88, 1: 0.87, 2: 0.89}, "b": {0: 0.80, 1: 0.93, 2: 0.89}}
    assert breadth_page.beyond_noise(ours, plain) == "1"
    assert breadth_page.beyond_noise({"a": {0: 0.5, 1: 0.5}}, plain) == "-"


def test_halves_are_every_other_set_by_name(tmp_path):
    runs = [
        {
            "key": {
                "set": name,
                "condition": "clean",
                "detector": "svdd",
                "seed": 0,
                "method": method,
            },
            "figures": {"AUROC": value},
        }
        for name, gain in (("d", 0.4), ("a", 0.1), ("c", 0.3), ("b", 0.2))
        for method, value in (("plain", 0.5), ("comet", 0.5 + gain))
    ]
    (row,) = breadth_page.halves(runs, ["svdd"], "clean", ["comet"])
    assert row["half a"].startswith("0.200 ")
    assert row["half b"].startswith("0.300 ")


def test_latent_outlier_exposure_by_hand(folder):
    task = Task(folder / "far.npz", "as-is", 0)
    exposure = table_rivals.OutlierExposure(task, 0.5)
    model = table_detectors.DeepSVDD(task.train)
    index = torch.arange(8)
    distance = (model.layers(task.train) - model.centre).square().sum(dim=1)
    torch.testing.assert_close(exposure(model, index), distance[:8])  # plain at first
    exposure.relabel(model)
    y = torch.zeros(len(distance))
    y[distance.topk(int(task.bad.sum())).indices] = 0.5
    assert torch.equal(exposure.labels, y)
    expected = (1 - y) * distance + y / distance
    torch.testing.assert_close(exposure(model, torch.arange(len(y))), expected)


def test_latent_outlier_exposure_labels_anew_after_every_pass(folder, monkeypatch):
    task = Task(folder / "far.npz", "as-is", 0)
    exposure = table_rivals.OutlierExposure(task, 1.0)
    relabelled: list[int] = []
    monkeypatch.setattr(exposure, "relabel", lambda _: relabelled.append(exposure.steps))
    table_training.trained(task, "svdd", losses=exposure)
    # Of 168 rows a step takes 128, and two steps make a pass; the first 75 are plain training.
    assert relabelled[:3] == [75, 77, 79]


def test_latent_outlier_exposure_tells_the_bad_rows_apart(folder):
    task = Task(folder / "far.npz", "as-is", 0)
    exposure = table_rivals.OutlierExposure(task, 1.0)
    model = table_training.trained(task, "svdd", losses=exposure)
    assert torch.equal(exposure.labels == 1, torch.from_numpy(task.bad))
    normal = model.losses(task.train).sqrt()
    plain = table_training.trained(task, "svdd").losses(task.train).sqrt()
    bad = torch.from_numpy(task.bad)
    assert normal[bad].min() / normal[~bad].max() > 3 * plain[bad].min() / plain[~bad].max()
