"""The table of rivals: what it runs, under which keys, and what it makes of the figures."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from tiny_experiment import experiment

import ablation
import contamination
import grid
from ablation import (
    CHOICES,
    GRID,
    PUBLISHED,
    SCORES,
    chosen,
    parts,
    plain_in_batches,
    published,
    relative_strength,
    scored,
)
from comet_examples.datasets import Transform
from comet_examples.presets import preset_for
from comet_examples.training import TrainingSettings
from comet_meta import CoMetOptimizerWrapper, CovarianceMetaRegularizer, SoftConfidentWeighter
from comet_meta.meta import step
from comet_meta.tasks import split_tasks
from contamination import GROUPS, VARIANTS, common_gap, cost, expanded, row
from contamination_page import detector_rows, over_sets, set_row, variant_rows
from grid import Trial, by_method, weighting_figures


@pytest.fixture(scope="module", params=["simplenet", "fastflow"])
def trial(request, tmp_path_factory) -> Trial:
    made = experiment(tmp_path_factory.mktemp("tiny"), request.param)
    return Trial(made, made.split(0.2, seed=100), TrainingSettings("plain", epochs=3))


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Runs a benchmark's command on tiny pictures and returns the lines of its file."""
    monkeypatch.setattr(
        grid.Benchmark, "_experiment", lambda _, detector, __: experiment(tmp_path, detector)
    )

    def run(*options):
        out = tmp_path / "runs.jsonl"
        common = ["--detectors", "simplenet", "--tasks", "elpv/mono", "--epochs", "2"]
        given = [*common, "--noise", "0.2", "--seeds", "100", "101", "--out", str(out), *options]
        monkeypatch.setattr(sys, "argv", ["contamination", *given])
        contamination.main()
        return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    return run


def test_finished_runs_are_kept_and_the_figure_drawn(ask, capsys, tmp_path):
    before = ask("--variants", "plain", "comet", "comet:mldg")
    assert len(before) == 6
    after = ask("--variants", "plain", "comet", "comet:mldg", "trim@true")
    assert after[:6] == before
    assert [run["key"]["method"] for run in after[6:]] == ["trim@true", "trim@true"]
    assert after[6]["key"] | {"method": "plain"} == before[0]["key"]
    capsys.readouterr()
    # The same command has nothing left to do, and prints the same again.
    figure = tmp_path / "figure.png"
    again = ask("--variants", "plain", "comet", "trim@true", "--figure", str(figure))
    assert again == after
    assert "| trim@true | 2     |" in capsys.readouterr().out
    assert figure.stat().st_size > 1000


def test_a_page_holds_the_finished_runs_of_todays_settings(ask, tmp_path):
    ask("--variants", "plain", "oracle", "comet")
    page, figure = tmp_path / "pages" / "pictures.md", tmp_path / "figure.png"
    found = ask("--page", str(page), "--figure", str(figure))
    assert len(found) == 6
    text = page.read_text()
    assert "## Noise 0.2" in text
    assert "![I-AUROC against the share of bad training pictures](../figure.png)" in text
    plain, oracle, comet = (
        sum(run["figures"]["I-AUROC"] for run in found if run["key"]["method"] == name) / 2
        for name in ("plain", "oracle", "comet")
    )
    assert f"| simplenet | 1    | {plain:.3f} | {comet:.3f} | {oracle:.3f}  |" in text
    # A file of other settings has nothing to show.
    with pytest.raises(SystemExit):
        ask("--page", str(page), "--epochs", "3")


def test_shards_share_the_work(ask):
    variants = ("--variants", "plain", "patchcore-random", "softpatch")
    first = ask("--shard", "1/2", *variants)
    both = ask("--shard", "2/2", *variants)
    assert len(first) == 3
    assert len(both) == 6
    assert len({json.dumps(run["key"]) for run in both}) == 6


def test_an_unknown_variant_is_an_error_before_anything_runs(ask, capsys):
    with pytest.raises(SystemExit):
        ask("--variants", "plain", "trim")
    assert "there's no variant 'trim'" in capsys.readouterr().err


def test_groups_stand_for_their_variants():
    assert expanded(["base", "comet", "trim@true"]) == [*GROUPS["base"], "trim@true"]
    assert sum(map(len, GROUPS.values())) == len(VARIANTS)


def same(left, right):
    return {k: v for k, v in left.items() if "seconds" not in k} == right


def test_all_parts_off_or_on_are_plain_and_comet(trial):
    assert same(parts(False, "none", 0.0)(trial), by_method("plain")(trial))
    assert same(parts(True, "mldg", 0.0)(trial), by_method("comet:mldg")(trial))


def test_the_grid_has_every_combination_once():
    parts = {"mldg", "penalty", "mldg+penalty"}
    assert set(GRID) == parts | {f"weights+{part}" for part in parts}


def test_unchanged_published_settings_are_paper(trial):
    assert same(published()(trial), by_method("paper")(trial))
    assert same(plain_in_batches(8)(trial), by_method("plain")(trial))


def test_each_published_setting_changes_what_its_name_says(trial, monkeypatch):
    asked = {}

    class Asked(CoMetOptimizerWrapper):
        def __init__(self, optimizer, **options):
            asked.update(options)
            super().__init__(optimizer, **options)

    def tasks_of(batch_size, tasks, *rest):
        found = split_tasks(batch_size, tasks, *rest)
        sizes.append([len(task.support) + len(task.query) for task in found])
        return found

    monkeypatch.setattr(ablation, "CoMetOptimizerWrapper", Asked)
    monkeypatch.setattr(step, "split_tasks", tasks_of)
    found, strengths = {}, {}
    for name in PUBLISHED.keys() - {"paper-adapted", "paper-adapted-0"}:
        asked, sizes = {}, []
        short = replace(trial, settings=replace(trial.settings, epochs=1))
        PUBLISHED[name](short)
        parts = {key: asked.get(key) is not None for key in ("weighter", "regularizer")}
        if parts["regularizer"]:
            strengths[name] = asked["regularizer"].base_strength
        meta = asked.get("meta")
        inner = getattr(meta, "inner_steps", 0)
        found[name] = (*parts.values(), inner, sizes[0] if sizes else [])
    # 24 good and 6 bad pictures: batches of 8, or of 20.
    assert found == {
        "paper-no-ratio": (False, True, 5, [2, 2, 2, 2]),
        "paper-no-penalty": (True, False, 5, [2, 2, 2, 2]),
        "paper-summed": (True, True, 5, [2, 2, 2, 2]),
        "paper-no-meta": (True, True, 0, []),
        "paper-one-task": (True, True, 5, [8]),
        "paper-one-inner-step": (True, True, 1, [2, 2, 2, 2]),
        "paper-tasks-of-5": (True, True, 5, [5, 5, 5, 5]),
        "plain-batch-20": (False, False, 0, []),
    }
    # A picture has features (6, 4, 4) of SimpleNet, (3, 4, 4) and (3, 2, 2) of FastFlow.
    assert strengths.pop("paper-summed") in (0.005 / 96, 0.005 / 60)
    assert set(strengths.values()) == {0.005}


def test_the_summed_penalty_has_lambda_0s_part_in_the_summed_likelihood(tmp_path):
    made = experiment(tmp_path, "fastflow")
    data = made.rows(made.split(0.0, seed=0).train)
    torch.manual_seed(0)
    detector = made.build()
    detector.fit_statistics(data.batches())
    for parameter in detector.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    levels = [level[:4] for level in next(iter(data.batches()))]
    scaled = detector.scaler(levels)
    summed = -sum(
        flow.log_likelihood(level).sum(dim=(1, 2))
        for flow, level in zip(detector.flows, scaled, strict=True)
    )
    ours, published = ablation.summed_penalty(data), CovarianceMetaRegularizer()
    mean_part = ours.penalty(detector.parameters()) / detector.losses(levels)
    summed_part = published.penalty(detector.parameters()) / summed
    torch.testing.assert_close(mean_part, summed_part)


def test_adapted_is_paper_after_inner_steps(trial, monkeypatch):
    outcomes, predicted = [], []
    run, predict = trial.experiment.run, trial.experiment.predict

    def state(training):
        return {name: value.clone() for name, value in training.detector.named_parameters()}

    def kept(*args):
        outcomes.append(run(*args))
        outcomes.append(state(outcomes[0].training))
        return outcomes[0]

    def seen(training, samples):
        assert not training.detector.training
        predicted.append(state(training))
        return predict(training, samples)

    with monkeypatch.context() as patched:
        patched.setattr(trial.experiment, "run", kept)
        patched.setattr(trial.experiment, "predict", seen)
        figures = ablation.adapted()(trial)
    assert predicted.pop(0).keys() == outcomes[1].keys()  # of the training itself
    assert outcomes[0].figures["I-AUROC"] == by_method("paper")(trial)["I-AUROC"]
    assert figures.keys() == outcomes[0].figures.keys()
    # Five steps of Adam with rate 1e-4: at most 5e-4 and, of most parameters, more than half of it.
    moved = torch.cat([(predicted[0][k] - v).abs().flatten() for k, v in outcomes[1].items()])
    assert 2e-4 < moved.median() <= moved.max() < 5.1e-4


def test_steps_of_size_0_change_batch_norm_alone(trial, monkeypatch):
    tested = []
    predict = trial.experiment.predict

    def seen(training, samples):
        tested.append({k: v.clone() for k, v in training.detector.state_dict().items()})
        return predict(training, samples)

    monkeypatch.setattr(trial.experiment, "predict", seen)
    PUBLISHED["paper-adapted-0"](trial)
    trained, after = tested
    changed = {k for k in trained if not torch.equal(trained[k], after[k])}
    assert all("running_" in k or "num_batches" in k for k in changed)
    assert bool(changed) == any("running_mean" in k for k in trained)


def test_unchanged_choices_are_comet(trial):
    assert same(chosen()(trial), by_method("comet")(trial))


def test_scores_that_never_come_leave_the_prior_of_whole_pictures(trial):
    late, whole = scored(start=math.inf)(trial), ablation.frontier("samples-0.1")(trial)
    assert late["I-AUROC"] == whole["I-AUROC"]
    assert late["weight of bad"] == pytest.approx(whole["weight of bad"], rel=1e-4)


def test_patches_have_weights_where_asked_for(trial, monkeypatch):
    asked = []

    def weighter(**options):
        asked.append(options["part_prior"] is None)
        return SoftConfidentWeighter(**options)

    monkeypatch.setattr(ablation, "SoftConfidentWeighter", weighter)
    chosen()(trial)
    CHOICES["contamination@true"](trial)
    CHOICES["patches"](trial)
    CHOICES["patches@true"](trial)
    assert asked == [True, True, False, False]


def test_the_weighter_is_told_the_share(trial, monkeypatch):
    made = []

    def weighter(**options):
        made.append(SoftConfidentWeighter(**options))
        return made[-1]

    monkeypatch.setattr(ablation, "SoftConfidentWeighter", weighter)
    share = float(trial.bad.mean())
    for given, told in ((0.1, 0.1), ("true", share)):
        chosen(contamination=given)(trial)
        assert float(made[-1].weights.mean()) == pytest.approx(0.9 - told, abs=0.01)
        chosen(contamination=given, parts=True)(trial)
        assert float(made[-1].weights.mean()) == pytest.approx(1 - told, abs=0.01)
        counting = made[-1].part_weights()[made[-1].weights > 0]
        assert float(counting.mean()) == pytest.approx(0.9, abs=1e-4)


def test_a_look_at_all_of_few_pictures_leaves_out_the_bad_ones_alone(trial, monkeypatch):
    made = []

    def weighter(**options):
        made.append(SoftConfidentWeighter(**options))
        return made[-1]

    monkeypatch.setattr(ablation, "SoftConfidentWeighter", weighter)
    assert len(trial.bad) < 60
    for look in ("reviewed", "learned"):
        chosen(contamination=look)(trial)
        assert made[-1].weights.tolist() == (1.0 - trial.bad).tolist()


def test_a_look_that_finds_none_is_plain_training(trial):
    clean = replace(trial, split=trial.experiment.split(0.0, seed=100))
    assert not clean.bad.any()
    plain = by_method("plain")(clean)["I-AUROC"]
    for look in ("reviewed", "learned"):
        assert chosen(contamination=look)(clean)["I-AUROC"] == pytest.approx(plain)


@pytest.mark.parametrize("name", CHOICES)
def test_choices_run(trial, name):
    assert CHOICES[name](trial)["I-AUROC"] > 0.5


@pytest.mark.parametrize("name", ["weights+mldg+penalty", "penalty", "mldg"])
def test_parts_of_the_grid_run(trial, name):
    figures = GRID[name](trial)
    assert figures["I-AUROC"] > 0.5
    assert ("weight of bad" in figures) == name.startswith("weights")


@pytest.mark.parametrize("name", SCORES)
def test_scores_for_weighting_run(trial, name):
    figures = SCORES[name](trial)
    assert figures["I-AUROC"] > 0.5
    # Three epochs: nothing of the model's own before the end of a warm-up of four.
    assert ("ranking AUROC" in figures) == ("warmup" not in name or name.startswith("both"))


def test_the_penalty_is_measured_by_the_loss(trial):
    data = trial.experiment.rows(trial.split.train)
    torch.manual_seed(0)
    detector = trial.experiment.build()
    detector.fit_statistics(data.batches())
    strength = relative_strength(detector, data)
    square = sum(
        float(p.detach().square().sum())
        for optimizer in detector.optimizers()
        for p in optimizer.param_groups[0]["params"]
    )
    with torch.no_grad():
        (levels,) = [[x[data.rows] for x in data.features]]
        loss = float(detector.losses(levels).mean())
    assert strength * square == pytest.approx(loss, rel=0.05)


def test_figures_of_a_weighter():
    weighter = SoftConfidentWeighter(10, rule="hard")
    weighter.fit(torch.tensor([1.0, 1.1, 1.2, 1.3, 9.0, 1.4, 1.5, 1.6, 8.0, 1.7]))
    bad = torch.tensor([0, 0, 0, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool).numpy()
    figures = weighting_figures(weighter, bad)
    assert figures["weight of bad"] == 0.5
    assert figures["weight of good"] == pytest.approx(7 / 8)
    # Of the 16 pairs, the one bad picture wins all 8, the other 3.
    assert figures["ranking AUROC"] == figures["curation AUROC"] == pytest.approx(11 / 16)
    assert figures["ranking precision@k"] == 0.5
    assert weighting_figures(weighter, bad & ~bad) == {}


def test_figures_of_a_weighter_without_scores_of_the_model():
    weighter = SoftConfidentWeighter(prior=torch.arange(10.0))
    bad = (torch.arange(10) > 7).numpy()
    figures = weighting_figures(weighter, bad)
    assert figures["ranking AUROC"] == figures["ranking precision@k"] == 1
    assert "curation AUROC" not in figures


def runs(*values, seconds=1.0):
    return {
        seed: {"I-AUROC": value, "processor seconds": seconds * (1 + seed)}
        for seed, value in enumerate(values)
    }


def test_sizes_are_named_by_data_set():
    assert grid.sized("256") == Transform(256)
    assert grid.sized("352x128") == Transform((352, 128), keep_aspect=True)
    bench = grid.Benchmark("resnet18", {}, "cpu", None, {"ksdd2": "352x128"})
    named, other = (bench.preset("simplenet", f"{name}/x") for name in ("ksdd2", "mvtec"))
    assert (str(named.transform), named.fits) == (str(grid.sized("352x128")), False)
    assert other == preset_for("simplenet", "resnet18")


def test_the_papers_preset_goes_with_any_backbone(monkeypatch):
    made = ["contamination", "--preset", "paper", "--backbone", "resnet18", "--resize", "mvtec=256"]
    monkeypatch.setattr(sys, "argv", made)
    bench, _, _ = grid.benchmark(contamination._parser().parse_args())
    preset = bench.preset("simplenet", "mvtec/a")
    assert bench.backbone == "resnet18"
    assert (preset.epochs, preset.steps, preset.schedule) == (160, None, "constant")
    assert preset.detector["adaptor"]
    assert preset.transform == grid.sized("256")
    assert bench.key("simplenet", "mvtec/a", 0.1, 0, "plain")["options"]["noise_std"] == "0.015"


def test_a_row_is_paired_by_seed():
    chosen = {
        (0.1, "plain"): runs(0.80, 0.82),
        (0.1, "oracle"): runs(0.90, 0.92),
        (0.1, "comet"): runs(0.88, 0.90, 0.1),
        (0.1, "trim@true"): runs(0.85, 0.89, seconds=3.0),
    }
    cells = row(0.1, "trim@true", chosen)
    assert cells["I-AUROC"] == "0.870 ± 0.028"
    assert cells["- plain"] == "+0.060 (p = 0.105)"  # t = 6: p = 1 - 2 atan(6) / pi
    assert cells["- comet"] == "-0.020 (p = 0.295)"  # t = 2
    assert cells["gap recovered"] == "0.60"
    assert cells["cost"] == "3.00"
    # The third seed of comet has no plain run, so it doesn't count.
    assert row(0.1, "comet", chosen)["gap recovered"] == "0.80"
    assert row(0.1, "plain", chosen)["- plain"] == "-"


def test_without_common_seeds_there_is_nothing_to_compare():
    assert common_gap(runs(0.8), {}, runs(0.9)) == ""
    assert common_gap(runs(0.8), runs(0.9), runs(0.9)) == ""
    assert cost(runs(0.8), {}) == ""
    assert cost({0: {"I-AUROC": 0.8}}, runs(0.9)) == ""


def test_the_means_of_a_detector_are_over_its_sets():
    good = {(0.1, "plain"): runs(0.80), (0.1, "comet"): runs(0.85), (0.1, "oracle"): runs(0.90)}
    poor = {(0.1, "plain"): runs(0.70), (0.1, "comet"): runs(0.69), (0.1, "oracle"): runs(0.80)}
    flat = {(0.1, "plain"): runs(0.90), (0.1, "comet"): runs(0.92), (0.1, "oracle"): runs(0.90)}
    chosen = {("fastflow", "a/b"): good, ("fastflow", "c/d"): poor, ("fastflow", "e/f"): flat}
    chosen |= {("simplenet", "a/b"): {(0.1, "plain"): runs(0.5)}}
    (row,) = detector_rows(chosen, 0.1)
    assert (row["sets"], row["plain"], row["comet"]) == ("3", "0.800", "0.820")
    assert (row["comet - plain"], row["worst set"]) == ("+0.020", "-0.010")
    assert (row["median gap"], row["least gap"]) == ("0.20", "-0.10")  # none for the flat set
    assert (row["median gap, told"], row["least gap, told"]) == ("-", "-")
    for own in (good, poor, flat):
        own[0.1, "contamination@true"] = own[0.1, "oracle"]
        own[0.1, "reviewed"] = own[0.1, "plain"]
    (row,) = detector_rows(chosen, 0.1)
    assert (row["median gap, reviewed"], row["least gap, reviewed"]) == ("0.00", "0.00")
    assert (row["median gap, told"], row["least gap, told"]) == ("1.00", "1.00")
    assert set_row("fastflow", "a/b", good, 0.1)["gap, told"] == "1.00"
    assert set_row("fastflow", "e/f", flat, 0.1)["gap recovered"] == "-"


def test_the_page_compares_the_seeds_that_all_main_methods_have():
    own = {(0.1, "plain"): runs(0.80, 0.2), (0.1, "comet"): runs(0.85), (0.1, "oracle"): runs(0.90)}
    cells = set_row("fastflow", "a/b", own, 0.1)
    assert (cells["plain"], cells["comet - plain"], cells["gap recovered"]) == (
        "0.800",
        "+0.050",
        "0.50",
    )


def test_means_over_sets_compare_a_variant_with_plain_on_its_own_sets_and_seeds():
    def runs(*values, **more):
        return {seed: {"I-AUROC": value, **more} for seed, value in enumerate(values)}

    made = {
        ("simplenet", "a"): {
            (0.1, "plain"): runs(0.8, 0.6, AUPRO=0.5),
            (0.1, "trim"): runs(0.9, 0.7, AUPRO=0.7),
        },
        ("simplenet", "b"): {(0.1, "plain"): runs(0.9), (0.1, "trim"): runs(0.84, 0.1)},
        ("simplenet", "c"): {(0.1, "plain"): runs(0.5), (0.1, "trim"): {}},
        ("simplenet", "d"): {(0.2, "plain"): runs(0.5)},
    }
    plain, trim = variant_rows(made, "simplenet", 0.1)
    assert plain["sets"] == "3"
    assert plain["I-AUROC"] == "0.700"
    assert plain["AUPRO"] == "0.500"
    assert trim == {
        "variant": "trim",
        "sets": "2",
        "seeds": "1",
        "I-AUROC": "0.820",
        "plain": "0.800",
        "worst set": "-0.060 (b)",
        "AUPRO": "0.700",
    }
    (text,) = over_sets(made)  # a single set has no mean
    assert text.startswith("### simplenet, noise 0.1: means over sets")
