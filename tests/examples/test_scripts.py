"""The scripts and their command line, end to end on small trees of every layout."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from tiny_experiment import Pooling

from comet_examples import cli, experiment, report, session
from comet_examples.datasets import DATASETS, Sample, Split, Transform
from comet_examples.detectors import DETECTORS
from comet_examples.experiment import Experiment
from comet_examples.presets import Preset, preset_for
from comet_meta import SoftConfidentWeighter
from comet_meta.vision.backbones import PAPER_BACKBONE
from comet_meta.vision.features import FeatureStore
from comet_meta.vision.files import replacing
from comet_meta.vision.images import SQUARE

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = [
    f"{detector}_{dataset}"
    for detector in ("simplenet", "fastflow", "reconstruction")
    for dataset in ("mvtec", "viaduct", "ksdd2")
]
SMALL = [
    *("--backbone", "resnet10t", "--weights", "random", "--resize", "48", "32"),
    *("--epochs", "1", "--device", "cpu"),
]


def tree(root: Path, layout: str, category: str = "part", *, flip_masks: bool = False) -> Path:
    """Noisy grey pictures, twelve for training and eight for the test.

    Half of the test pictures (and in KSDD2's layout two of the training pictures) are defective:
    they have a white square, marked by the mask. A mask that is flipped marks another place.
    """
    generator = np.random.default_rng(0)

    def save(file: Path, mask_file: Path | None, defective: bool) -> None:
        pixels = generator.integers(90, 120, (48, 32), dtype=np.uint8)
        mask = np.zeros((48, 32), dtype=np.uint8)
        if defective:
            pixels[:16, 4:20] = 250
            mask[:16, 4:20] = 255
        for path, image in ((file, pixels), (mask_file, mask[::-1] if flip_masks else mask)):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)

    if layout == "ksdd2":
        for part, first, defective in (("train", 10000, (3, 7)), ("test", 20000, (1, 3, 5, 7))):
            for i in range(12 if part == "train" else 8):
                truth = root / part / f"{first + i}_GT.png"
                save(root / part / f"{first + i}.png", truth, i in defective)
        return root
    base = root / category
    suffix = "_mask" if layout == "mvtec" else ""
    for i in range(12):
        save(base / "train" / "good" / f"{i:03d}_0.png", None, False)
    for i in range(4):
        save(base / "test" / "good" / f"{i:03d}_1.png", None, False)
        truth = base / "ground_truth" / "hole" / f"{i:03d}_1{suffix}.png"
        save(base / "test" / "hole" / f"{i:03d}_1.png", truth, True)
    return root


def run(script: str, root: Path, out: Path, *more: str) -> int:
    """The exit status of a script with small settings."""
    detector, dataset = script.split("_")
    arguments = ["--data-root", str(root), "--out", str(out), *SMALL, *more]
    return cli.main(detector, dataset, arguments)


def results(out: Path) -> dict:
    """The only category's results."""
    (file,) = out.glob("*/results.json")
    return json.loads(file.read_text())


def reviewed_list(file: Path, pictures: list[Path], bad: set[str]) -> Path:
    """A list as the report exports it: all pictures were looked at."""
    rows = [
        f"{path.absolute()},{rank},{'no' if path.name in bad else 'yes'},yes"
        for rank, path in enumerate(pictures, 1)
    ]
    file.write_text("\n".join(["path,rank,keep,reviewed", *rows, ""]))
    return file


def test_a_review_says_which_pictures_are_trained_on(tmp_path, capsys):
    tree(tmp_path / "data", "mvtec")
    pictures = sorted((tmp_path / "data" / "part" / "train" / "good").iterdir())
    bad = {pictures[2].name, pictures[7].name}
    file = reviewed_list(tmp_path / "list.csv", pictures, bad)
    out = tmp_path / "out"
    assert run("simplenet_mvtec", tmp_path / "data", out, "--review", str(file)) == 0
    found = results(out)
    weights = {
        Path(row["path"]).name: row["weight"] for row in found["methods"]["comet"]["suspects"]
    }
    assert {name for name, weight in weights.items() if weight == 0} == bad
    assert {weight for name, weight in weights.items() if name not in bad} == {1}
    assert found["settings"]["review"].startswith("list.csv, sha256 ")
    report = (out / "part" / "comet_report.html").read_text(encoding="utf-8")
    assert "Of 12 pictures that were looked at, 2 are bad: about 17 % (17 to 17 %) of all" in report
    # Another review is another training.
    reviewed_list(file, pictures, set())
    capsys.readouterr()
    assert run("simplenet_mvtec", tmp_path / "data", out, "--review", str(file)) == 2
    assert "review" in capsys.readouterr().err


def test_a_review_of_other_pictures_is_refused_before_any_training(tmp_path, capsys, trained):
    tree(tmp_path / "data", "mvtec")
    file = reviewed_list(tmp_path / "list.csv", [tmp_path / "elsewhere.png"], set())
    out = tmp_path / "out"
    assert run("simplenet_mvtec", tmp_path / "data", out, "--review", str(file)) == 1
    assert "elsewhere.png in" in capsys.readouterr().err
    file.unlink()
    assert run("simplenet_mvtec", tmp_path / "data", out, "--review", str(file)) == 1
    assert "there's no list" in capsys.readouterr().err
    assert trained == []


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The methods that are trained in the course of a test."""
    methods: list[str] = []
    train = experiment.train

    def recorded(build, data, settings, **options):
        methods.append(settings.method)
        return train(build, data, settings, **options)

    monkeypatch.setattr(experiment, "train", recorded)
    return methods


def runs(script: str, monkeypatch, *arguments: str) -> object:
    """The exit status of a script that is run in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    return exit_.value.code


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_the_same_command_line(monkeypatch, capsys, script):
    monkeypatch.setenv("COLUMNS", "10000")  # no line breaks where names differ in length

    def help_of(script: str) -> str:
        detector, dataset = script.split("_")
        assert runs(script, monkeypatch, "--help") == 0
        text = capsys.readouterr().out
        for own in (
            f"{script}.py",
            f"Train {detector} on {dataset},",
            f"(default: {dataset})",
            f"(default: {detector})",
        ):
            assert own in text
            text = text.replace(own, "")
        return text

    assert help_of(script) == help_of("simplenet_mvtec")


def test_the_command_line_is_the_golden_one(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs("simplenet_mvtec", monkeypatch, "--help") == 0
    golden = Path(__file__).with_name("help.txt")
    # Line breaks differ by version of Python.
    assert capsys.readouterr().out.split() == golden.read_text(encoding="utf-8").split(), (
        "the options changed: if that is meant, see that the README and the changelog say so, and "
        "run COLUMNS=100 python examples/simplenet_mvtec.py --help > tests/examples/help.txt"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs_end_to_end(tmp_path, monkeypatch, undrawn, script):
    root = tree(tmp_path / "data", script.split("_")[1])
    monkeypatch.chdir(tmp_path)
    assert runs(script, monkeypatch, "--data-root", str(root), *SMALL) == 0
    # Without --out, in the folder that is named after detector and data set.
    figures = results(tmp_path / "runs" / script)["methods"]["comet"]["test"]
    assert set(figures) == {"I-AUROC", "I-AP", "P-AUROC", "P-AP", "AUPRO"}


def test_train_takes_detector_and_data_set_by_name(tmp_path, monkeypatch, undrawn):
    root = tree(tmp_path / "data", "viaduct")
    monkeypatch.chdir(tmp_path)
    named = ["--detector", "fastflow", "--dataset", "viaduct", "--data-root", str(root)]
    assert runs("train", monkeypatch, *named, *SMALL) == 0
    by_name = results(tmp_path / "runs" / "fastflow_viaduct")
    assert run("fastflow_viaduct", root, tmp_path / "again") == 0
    assert (
        results(tmp_path / "again")["methods"]["comet"]["test"]
        == (by_name["methods"]["comet"]["test"])
    )


@pytest.mark.parametrize("script", ["simplenet_mvtec", "fastflow_ksdd2"])
def test_a_script_as_a_user_runs_it(tmp_path, script):
    root = tree(tmp_path / "data", script.split("_")[1])
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{script}.py"), "--data-root", str(root), *SMALL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "12 training pictures" in done.stdout
    assert re.search(r"\| (part|ksdd2) +\| comet +\|", done.stdout)
    for kind in ("maps", "weights", "suspects", "suspect_maps"):
        (file,) = (tmp_path / "runs" / script).glob(f"*/comet_{kind}.png")
        with Image.open(file) as picture:
            assert picture.size[0] > 500
    (page,) = (tmp_path / "runs" / script).glob("*/comet_report.html")
    assert f"look through the training pictures in {page.relative_to(tmp_path)}" in done.stdout
    assert len(re.findall(r'"heat":"\w', page.read_text(encoding="utf-8"))) == 12


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs_on_real_pictures(tmp_path, undrawn, shared_data, script):
    root = shared_data / script.split("_")[1]
    assert run(script, root, tmp_path, "--resize", "96", "64", "--curated") == 0
    stored = results(tmp_path)
    assert set(stored["methods"]["comet"]["test"]) >= {"I-AUROC", "AUPRO"}
    count = {"mvtec": 48, "viaduct": 26, "ksdd2": 70}[script.split("_")[1]]
    assert len(stored["methods"]["comet"]["suspects"]) == count


@pytest.mark.parametrize("dataset", ["mvtec", "viaduct", "ksdd2"])
def test_masks_are_used(tmp_path, undrawn, dataset):
    figures = []
    for name, flipped in (("upright", False), ("flipped", True)):
        root = tree(tmp_path / name, dataset, flip_masks=flipped)
        arguments = ["--resize", "96", "64"]
        assert run(f"simplenet_{dataset}", root, tmp_path / f"{name}_out", *arguments) == 0
        figures.append(results(tmp_path / f"{name}_out")["methods"]["comet"]["test"])
    assert figures[0]["I-AUROC"] == figures[1]["I-AUROC"]
    assert abs(figures[0]["P-AUROC"] - figures[1]["P-AUROC"]) > 0.05


def test_any_folder_of_pictures_is_ranked(tmp_path, monkeypatch, capsys):
    """Of several sizes, without labels and without a test set."""
    generator = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "pics" / f"line {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (30 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    captions, histograms = [], []
    monkeypatch.setattr(Axes, "set_title", lambda _, text, **__: captions.append(text))
    monkeypatch.setattr(Axes, "hist", lambda *_, label, **__: histograms.append(label))
    arguments = ["--dataset", "folder", "--plain"]
    assert run("simplenet_mvtec", tmp_path / "pics", tmp_path / "out", *arguments) == 0
    entry = results(tmp_path / "out")["methods"]["comet"]
    assert entry["test"] == {}
    assert "curation" not in entry
    assert len({suspect["path"] for suspect in entry["suspects"]}) == 12
    made = {path.name for path in (tmp_path / "out" / "pics").glob("*.png")}
    assert made == {"comet_weights.png", "comet_suspects.png", "comet_suspect_maps.png"}
    # Nobody knows what is normal or good here, so nothing says so.
    assert captions
    assert not any(word in text for text in captions for word in ("normal", "good", "defect"))
    assert histograms == [("training pictures",)] * 2
    printed = capsys.readouterr().out
    assert "12 training pictures (no one knows which are bad), 0 test pictures" in printed
    assert "no test figures" in printed
    assert "| pics     | comet  |" in printed


def test_known_and_unknown_pictures_are_told_apart(tmp_path, monkeypatch):
    histograms = []
    monkeypatch.setattr(Axes, "hist", lambda _, x, *, label, **__: histograms.append((label, x)))
    weighter = SoftConfidentWeighter(10)
    weighter.fit(torch.arange(10.0))
    samples = [Sample(tmp_path / "any.png", label) for label in (0, 0, None, 1, *[0] * 6)]
    report.draw_weights(weighter, samples, "title", tmp_path / "weights.png")
    names, scores = histograms[0]
    assert names == ("normal", "bad (hidden from training)", "unknown")
    assert [part.tolist() for part in scores] == [[0, 1, 4, 5, 6, 7, 8, 9], [3], [2]]


@pytest.mark.parametrize("missing", ["good", "hole"])
def test_a_test_set_of_one_kind_gives_no_figures(tmp_path, capsys, undrawn, missing):
    root = tree(tmp_path / "data", "mvtec")
    shutil.rmtree(root / "part" / "test" / missing)
    assert run("simplenet_mvtec", root, tmp_path / "out") == 0
    assert results(tmp_path / "out")["methods"]["comet"]["test"] == {}
    assert "4 test pictures; no test figures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0] * 20 + [1] * 20, [20, 24, 28, 31, 35, 39, 0, 19]),
        ([0, 0, 0], [0, 1, 2]),
        ([1, 1, 1], [0, 1, 2]),
        ([None, 1, 0], [1, 0, 2]),
    ],
)
def test_the_pictures_shown_are_spread_over_the_test_set(labels, expected):
    assert report.spread([Sample(Path("any.png"), label) for label in labels]) == expected


def test_a_single_picture_gets_a_sentence(tmp_path, capsys):
    (tmp_path / "pics").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "pics" / "a.png")
    arguments = ["--dataset", "folder"]
    assert run("simplenet_mvtec", tmp_path / "pics", tmp_path / "out", *arguments) == 1
    assert "error: pics: there are 1 training pictures; expected at" in capsys.readouterr().err


def test_curated_removes_what_the_data_set_has_and_noise_needs_it(tmp_path, capsys, undrawn):
    root = tree(tmp_path / "data", "ksdd2")
    assert run("simplenet_ksdd2", root, tmp_path / "a") == 0
    assert "12 training pictures (2 bad)" in capsys.readouterr().out
    assert "curation" in results(tmp_path / "a")["methods"]["comet"]
    assert run("simplenet_ksdd2", root, tmp_path / "b", "--curated") == 0
    assert "10 training pictures (0 bad), 8 test pictures" in capsys.readouterr().out
    assert run("simplenet_ksdd2", root, tmp_path / "c", "--noise", "0.2") == 1
    assert "2 of the training pictures are bad already" in (error := capsys.readouterr().err)
    assert "add --curated" in error
    assert run("simplenet_ksdd2", root, tmp_path / "c", "--noise", "0.2", "--curated") == 0
    assert "12 training pictures (2 bad), 6 test pictures" in capsys.readouterr().out


def test_curated_changes_nothing_where_training_sets_are_clean(tmp_path, capsys, undrawn):
    root = tree(tmp_path / "data", "viaduct")
    for out, arguments in (("a", []), ("b", ["--curated"])):
        assert run("fastflow_viaduct", root, tmp_path / out, *arguments) == 0
    assert "12 training pictures (0 bad)" in capsys.readouterr().out
    first, second = (results(tmp_path / out) for out in ("a", "b"))
    assert first == second


def test_what_is_finished_is_not_trained_again(tmp_path, capsys, undrawn, trained):
    root, out = tree(tmp_path / "data", "mvtec"), tmp_path / "out"
    assert run("simplenet_mvtec", root, out, "--noise", "0.1") == 0
    before = capsys.readouterr().out
    stored = results(out)
    assert run("simplenet_mvtec", root, out, "--noise", "0.1") == 0
    after = capsys.readouterr().out
    assert trained == ["comet"]
    assert "part: comet finished before" in after
    assert after.splitlines()[-5:] == before.splitlines()[-5:]  # the table
    # Another method may join it.
    assert run("simplenet_mvtec", root, out, "--noise", "0.1", "--plain") == 0
    assert trained == ["comet", "plain"]
    assert re.search(r"\| part +\| plain .*\n\| part +\| comet ", capsys.readouterr().out)
    assert results(out)["methods"]["comet"] == stored["methods"]["comet"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "1"], "seed was 0, is 1"),
        (["--epochs", "2"], "epochs was 1, is 2"),
        (["--resize", "64"], r"transform was .*48, 32.*, is .*64"),
        (["--batch-size", "4", "--resume"], "batch_size was 8, is 4"),
    ],
)
def test_other_settings_are_refused_in_the_same_folder(tmp_path, capsys, undrawn, change, message):
    root, out = tree(tmp_path / "data", "mvtec"), tmp_path / "out"
    run("simplenet_mvtec", root, out)
    stored = results(out)
    assert run("simplenet_mvtec", root, out, *change) == 2
    error = capsys.readouterr().err
    assert re.search(f"error: .*part holds results of other settings: {message}", error)
    assert "give another --out, or remove that folder" in error
    assert results(out) == stored


def test_a_refusal_comes_before_the_first_training(tmp_path, capsys, undrawn, trained):
    root, out = tree(tree(tmp_path / "data", "mvtec", "b"), "mvtec", "a"), tmp_path / "out"
    run("simplenet_mvtec", root, out, "--category", "b")
    # A picture that is gone since, as after looking at the suspects.
    next((root / "b" / "train" / "good").glob("*.png")).unlink()
    trained.clear()
    assert run("simplenet_mvtec", root, out) == 2
    assert "pictures was '20 pictures" in capsys.readouterr().err
    assert not trained


def test_damaged_results_get_a_sentence(tmp_path, capsys):
    root, out = tree(tmp_path / "data", "mvtec"), tmp_path / "out"
    for damage in ("{", "[]", '{"settings": 1, "methods": {}}'):
        (out / "part").mkdir(parents=True, exist_ok=True)
        (out / "part" / "results.json").write_text(damage)
        assert run("simplenet_mvtec", root, out) == 2
        assert "results.json" in (error := capsys.readouterr().err)
        assert "remove it to start afresh" in error


def test_an_interruption_loses_no_finished_method(tmp_path, monkeypatch, undrawn, trained):
    root, out = tree(tmp_path / "data", "mvtec"), tmp_path / "out"
    train = experiment.train

    def interrupted(build, data, settings, **options):
        if settings.method == "comet":
            raise KeyboardInterrupt
        return train(build, data, settings, **options)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train", interrupted)
        assert run("simplenet_mvtec", root, out, "--plain") == 130
    assert list(results(out)["methods"]) == ["plain"]
    assert run("simplenet_mvtec", root, out, "--plain") == 0
    assert trained == ["plain", "comet"]
    assert list(results(out)["methods"]) == ["plain", "comet"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "results.json"
    file.write_text("old")

    def write_half() -> None:
        with replacing(file) as aside:
            aside.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert file.read_text() == "old"


def test_a_category_that_fails_leaves_the_others_their_results(tmp_path, capsys, undrawn):
    root = tree(tree(tmp_path / "data", "mvtec", "a"), "mvtec", "b")
    for path in (root / "a" / "test" / "hole").glob("00[12]*"):
        path.unlink()
    assert run("simplenet_mvtec", root, tmp_path / "out", "--noise", "0.2") == 1
    captured = capsys.readouterr()
    assert "error: a: noise 0.2 of a takes 3 anomalous pictures, but there are 2" in captured.err
    assert "failed: a\n" in captured.err
    assert "| b        | comet  |" in captured.out
    assert results(tmp_path / "out")["settings"]["category"] == "b"


def test_a_method_that_fails_leaves_the_others_their_results(
    tmp_path, monkeypatch, capsys, undrawn
):
    train = experiment.train

    def failing(build, data, settings, **options):
        if settings.method == "comet":
            raise ValueError("the losses are NaN")
        return train(build, data, settings, **options)

    monkeypatch.setattr(experiment, "train", failing)
    root = tree(tmp_path / "data", "mvtec")
    assert run("simplenet_mvtec", root, tmp_path / "out", "--plain") == 1
    captured = capsys.readouterr()
    assert "error: part: the losses are NaN" in captured.err
    assert "| part     | plain  |" in captured.out
    assert "comet" not in captured.out


def test_settings_are_stored_as_json_has_them(tmp_path, undrawn):
    run("fastflow_ksdd2", tree(tmp_path / "data", "ksdd2"), tmp_path / "out")
    settings = results(tmp_path / "out")["settings"]
    assert settings["transform"]["resize"] == [48, 32]
    assert settings["overlap"] is False
    assert (settings["epochs"], settings["noise"], settings["meta"]) == (1, 0.0, None)
    assert (settings["detector"], settings["dataset"]) == ("fastflow", "ksdd2")


def test_resize_takes_one_number_or_two(tmp_path, capsys, undrawn):
    root = tree(tmp_path / "data", "mvtec")
    for out, arguments, expected in (
        ("one", ["--resize", "40"], [40, None]),
        ("two", ["--resize", "40", "32"], [[40, 32], None]),
        ("both", ["--resize", "40", "--crop", "32"], [40, 32]),
    ):
        assert run("simplenet_mvtec", root, tmp_path / out, *arguments) == 0
        assert list(results(tmp_path / out)["settings"]["transform"].values())[:2] == expected
    with pytest.raises(SystemExit, match="2"):
        run("simplenet_mvtec", root, tmp_path / "three", "--resize", "1", "2", "3")
    assert "--resize takes one number or two, not 3" in capsys.readouterr().err


@pytest.mark.parametrize("document", ["docs/train.md", "docs/benchmarks.md"])
def test_the_documents_commands_are_understood(document):
    text = (EXAMPLES.parent / document).read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^python examples/(\w+)_(\w+)\.py (.*)$", text, re.MULTILINE)
    assert len(commands) >= 2
    for detector, dataset, arguments in commands:
        assert f"{detector}_{dataset}" in SCRIPTS
        assert cli._options(detector, dataset, shlex.split(arguments)).data_root is not None


PAPER_NOISE = {
    "adaptor": True,
    "learning_rate": 2e-4,
    "standardize": False,
    "noise_std": 0.015,
    "own_noise": 0.0,
    "hidden": 1024,
    "patches": None,
    "top": 1,
}
PAPER_FLOW = {"steps": 8, "hidden_ratio": 1.0, "top": 1, "standardize_scores": False}


@pytest.mark.parametrize(
    ("detector", "backbone", "expected"),
    [
        ("simplenet", PAPER_BACKBONE, Preset(Transform(329, 288), 160, PAPER_NOISE)),
        ("fastflow", PAPER_BACKBONE, Preset(Transform(329, 288), 160, PAPER_FLOW)),
        ("newcomer", PAPER_BACKBONE, Preset(Transform(329, 288), 160)),
        ("newcomer", "resnet18", Preset(SQUARE, steps=1000, schedule="cosine")),
    ],
)
def test_presets(detector, backbone, expected):
    assert preset_for(detector, backbone) == expected


def test_an_experiment_sees_pictures_in_their_own_shape(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path in paths:
        Image.new("L", (40, 100), 90).save(path)
    clean = Split("x", tuple(Sample(path, 0) for path in paths), (), has_masks=False)
    store = FeatureStore(tmp_path / "cache")
    preset = Preset(Transform((64, 64), keep_aspect=True), steps=1)
    found = Experiment(clean, "simplenet", preset, Pooling(), store, "cpu")
    assert found.map_size == (96, 48)
    asked = preset.sized(Transform((64, 32)))
    assert Experiment(clean, "simplenet", asked, Pooling(), store, "cpu").map_size == (64, 32)


def test_the_papers_preset_is_chosen_by_name(tmp_path, monkeypatch, capsys):
    asked = {}

    class Asked(session.Session):
        def run(self, categories):
            asked.update(vars(self))
            return [], []

    monkeypatch.setattr(cli, "Session", Asked)
    monkeypatch.setattr(cli, "load_backbone", lambda name, weights: name)
    root = str(tree(tmp_path / "data", "mvtec"))
    assert cli.main("simplenet", "mvtec", ["--data-root", root, "--preset", "paper"]) == 0
    assert asked["backbone"] == PAPER_BACKBONE
    assert asked["methods"] == ["plain", "paper", "comet"]
    assert asked["preset"] == preset_for("simplenet", PAPER_BACKBONE)
    assert asked["training"].epochs == 160
    assert asked["out"] == Path("runs/simplenet_mvtec")
    assert cli.main("simplenet", "mvtec", ["--data-root", root]) == 0
    assert (asked["backbone"], asked["methods"]) == ("tf_efficientnet_lite0", ["comet"])
    with pytest.raises(SystemExit, match="2"):
        cli.main("simplenet", "mvtec", ["--preset", "paper", "--backbone", "resnet18"])
    assert "--preset paper is for wide_resnet50_2" in capsys.readouterr().err


def snippet(name: str) -> types.ModuleType:
    """A module made of a code block of docs/extending.md, word for word."""
    text = (EXAMPLES.parent / "docs" / "extending.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```\n<!-- /{name} -->", text, re.DOTALL)
    assert found, f"the document has no block {name}"
    module = types.ModuleType(name)
    exec(compile(found.group(1), "extending.md", "exec"), vars(module))
    return module


def test_the_documents_detector_takes_one_line_in_the_registry(tmp_path, monkeypatch, undrawn):
    monkeypatch.setitem(DETECTORS, "autoencoder", snippet("detector").Autoencoder)
    root = tree(tmp_path / "data", "ksdd2")
    arguments = ["--epochs", "30", "--plain"]
    assert run("autoencoder_ksdd2", root, tmp_path / "out", *arguments) == 0
    methods = results(tmp_path / "out")["methods"]
    assert set(methods) == {"plain", "comet"}
    losses = [epoch["loss"] for epoch in methods["plain"]["history"]]
    assert losses[-1] < 0.9 * losses[0]
    # White squares on grey noise: it learns to tell them.
    assert methods["comet"]["test"]["I-AUROC"] > 0.9
    assert methods["comet"]["curation"]["AUROC"] == 1


def test_the_documents_data_set_takes_one_line_in_the_registry(tmp_path, monkeypatch, undrawn):
    monkeypatch.setitem(DATASETS, "parts", snippet("dataset"))
    root = tree(tmp_path / "data", "mvtec") / "part"
    for i, path in enumerate(sorted((root / "test").glob("*/*.png"))):
        path.rename(root / "test" / f"{'bad' if path.parent.name == 'hole' else 'fine'}_{i}.png")
    for path in (root / "train" / "good").iterdir():
        path.rename(root / "train" / path.name)
    arguments = ["--dataset", "parts", "--noise", "0.1"]
    assert run("fastflow_viaduct", root, tmp_path / "out", *arguments) == 0
    assert set(results(tmp_path / "out")["methods"]["comet"]["test"]) == {"I-AUROC", "I-AP"}
