"""Trees of pictures under random names, and random command lines on them."""

import shutil
import tempfile
import unicodedata
from pathlib import Path

import pytest
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from comet_examples import cli
from comet_examples.datasets import DATASETS

GOOD = ["good", "ok", "normal", "defect-free", "no_defect", "i.O.", "nominal", "pass"]
JUNK = ["@eaDir", "__MACOSX", ".thumbnails", "Thumbnails", "$RECYCLE.BIN", ".hidden"]
BAD = ["crack", "Löcher", "été", "hole 2", "scratch-deep", "日本"]
STEMS = ["1", "10", "ü 7", "á.b", "Ångström", "x y"]
cases = st.sampled_from([str, str.upper, str.title, str.swapcase])
forms = st.sampled_from(["NFC", "NFD"])


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@st.composite
def trees(draw: st.DrawFn) -> dict[str, int]:
    """Paths below a category, without ground truth, and their labels; -1 must not be read."""
    found: dict[str, int] = {}
    ending = draw(st.sampled_from(["png", "JPG", "gif", "jfif", "jp2", "avif", "pgm", "TiF"]))

    def add(folder: str, label: int) -> None:
        for stem in draw(st.lists(st.sampled_from(STEMS), min_size=1, unique=True)):
            below = draw(st.sampled_from(["", "", "a/", "a/b/"]))
            found[f"{folder}/{below}{stem}.{ending}"] = label
        if draw(st.booleans()):
            found[f"{folder}/{draw(st.sampled_from(JUNK))}/1.{ending}"] = -1
            found[f"{folder}/._1.{ending}"] = -1
            found[f"{folder}/notes.txt"] = -1

    add("train/good", 0)
    add(f"test/{draw(cases)(draw(st.sampled_from(GOOD)))}", 0)
    for kind in draw(st.lists(st.sampled_from(BAD), unique=True, max_size=3)):
        add(f"test/{kind}", 1)
    return found


@fuzz(0.1)
@given(trees(), forms, forms, st.booleans())
def test_labels_and_masks_come_from_where_pictures_lie(tree, first, second, masks):
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        expected: dict[tuple[str, int], int] = {}
        for name, label in tree.items():
            path = touch(root / "part" / unicodedata.normalize(first, name))
            if label >= 0:
                expected[str(path), label] = 1
            if masks and label == 1:
                place = Path(unicodedata.normalize(second, name.replace("test/", "", 1)))
                touch(root / "part" / "ground_truth" / place.with_name(f"{place.stem}_mask.png"))
        split = DATASETS["mvtec"].load(root, "part")
        samples = (*split.train, *split.test)
        assert {(str(s.path), s.label) for s in samples} == set(expected)
        assert len(samples) == len(expected)
        for sample in split.test:
            if split.has_masks and sample.label == 1:
                stem = unicodedata.normalize("NFC", f"{sample.path.stem}_mask")
                assert unicodedata.normalize("NFC", sample.mask.stem) == stem
                assert len(sample.mask.parts) == len(sample.path.parts)
        folder = DATASETS["folder"]
        before = [s.path.relative_to(root) for s in folder.load(root, root.name).train]
        copied = root.parent / f"{root.name} copy"
        try:
            shutil.copytree(root, copied)
            (copied / "runs" / "part").mkdir(parents=True)
            (copied / "runs" / "part" / "results.json").write_text(
                '{"settings": {}, "methods": {}}'
            )
            touch(copied / "runs" / "part" / "comet_maps.png")
            after = [s.path.relative_to(copied) for s in folder.load(copied, copied.name).train]
        finally:
            shutil.rmtree(copied, ignore_errors=True)
        assert after == before


OPTIONS = {
    "--batch-size": ["1", "2", "8", "-3", "x", "1e3"],
    "--device": ["cpu", "cuda", "gpu", "cuda:9", "meta", ""],
    "--seed": ["0", "20261126183000", "9223372036854775807", "-1", "99999999999999999999", "nan"],
    "--strength": ["nan", "inf", "-1", "0.5", "x"],
    "--noise": ["0.1", "nan", "1", "-0.1", "0.9", "1e-9"],
    "--epochs": ["1", "0", "two"],
    "--resize": ["48", "0", "-1", "nan"],
    "--crop": ["32", "0", "1000000"],
    "--good": ["fine", "crack", "ok"],
    "--max-megapixels": ["1", "0", "500"],
    "--category": ["all", "part", "nowhere"],
    "--dataset": ["folder", "mvtec", "viaduct", "ksdd2", "other"],
}


class Trained:
    """Stands in for a training, which takes seconds: here it is about what comes before it."""

    def __init__(self, **settings: object) -> None:
        assert settings["training"].batch_size >= 2

    def run(self, splits):
        assert all(split.train for split in splits)
        return [], []


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("data") / "part"
    for name in ("train/good/1.png", "train/good/2.png", "test/ok/1.png", "test/crack/1.png"):
        Image.new("L", (8, 8)).save(touch(base / name))
    return base.parent


@fuzz(0.1)
@given(st.dictionaries(st.sampled_from([*OPTIONS]), st.integers(0, 9), max_size=4), st.booleans())
def test_no_command_line_ends_in_a_traceback(root, chosen, keep_going):
    arguments = ["--data-root", str(root), "--out", str(root.parent / "out")]
    arguments += ["--keep-going"] if keep_going else []
    for name, number in chosen.items():
        arguments += [name, OPTIONS[name][number % len(OPTIONS[name])]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "Session", Trained)
        patch.setattr(cli, "load_backbone", lambda *_: None)
        try:
            status = cli.main("simplenet", "mvtec", arguments)
        except SystemExit as exit_:
            status = exit_.code
    assert status in (0, 2)
    assert not (root.parent / "out" / "error.txt").exists()
