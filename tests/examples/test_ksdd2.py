"""KolektorSDD2: labels out of masks, the uncurated training set, what the user is told."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from comet_examples.datasets import (
    DATASETS,
    DatasetError,
    Transform,
    bad_samples,
    contaminate,
    load_mask,
    oracle,
)

KSDD2 = DATASETS["ksdd2"]


def pair(folder: Path, stem: str, mark: int = 0, mode: str = "L") -> None:
    """A picture and its mask, of which one pixel has the value ``mark``."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 32), (90, 90, 90)).save(folder / f"{stem}.png")
    mask = Image.new("L", (12, 32))
    mask.putpixel((3, 5), mark)
    mask.convert(mode).save(folder / f"{stem}_GT.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six training pictures, 10002 defective by one faint pixel; three for the test."""
    for i in range(6):
        pair(tmp_path / "train", f"{10000 + i}", mark=1 if i == 2 else 0)
    for i in range(3):
        pair(tmp_path / "test", f"{20000 + i}", mark=255 if i == 1 else 0)
    return tmp_path


def test_labels_come_from_the_masks_and_defects_stay_in_training(root):
    assert KSDD2.categories(root) == ["ksdd2"]
    split = KSDD2.load(root, "ksdd2")
    assert [s.path.stem for s in split.train] == [f"{10000 + i}" for i in range(6)]
    assert [s.label for s in split.train] == [0, 0, 1, 0, 0, 0]
    assert [(s.label, s.defect) for s in split.test] == [(0, "good"), (1, "defective"), (0, "good")]
    assert split.has_masks


def test_only_defective_pictures_have_a_mask(root):
    split = KSDD2.load(root, "ksdd2")
    for sample in (*split.train, *split.test):
        assert (sample.mask is not None) == (sample.label == 1)
        assert load_mask(sample, Transform((32, 12))).sum() == sample.label
    assert split.train[2].mask == root / "train" / "10002_GT.png"


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA", "P"])
def test_masks_of_every_mode(root, mode):
    for stem, mark in (("10000", 255), ("10001", 0)):
        pair(root / "train", stem, mark, mode)
    assert [s.label for s in KSDD2.load(root, "ksdd2").train] == [1, 0, 1, 0, 0, 0]


def test_a_faint_16_bit_mask_counts(root):
    marks = np.zeros((32, 12), dtype=np.uint16)
    marks[4, 4] = 1
    Image.fromarray(marks).save(root / "train" / "10000_GT.png")
    assert KSDD2.load(root, "ksdd2").train[0].label == 1


def test_the_curated_set_is_the_oracle_of_the_uncurated_one(root):
    split = KSDD2.load(root, "ksdd2")
    with pytest.raises(DatasetError, match="1 anomalous training pictures already"):
        contaminate(split, 0.1, seed=0)
    assert len(oracle(split).train) == 5
    assert oracle(split).test == split.test


def test_the_stray_copy_of_the_published_archive_is_left_out(root):
    clean = KSDD2.load(root, "ksdd2")
    for name in ("10001", "10001_GT"):
        file = root / "train" / f"{name}.png"
        (root / "train" / f"{name} (copy).png").write_bytes(file.read_bytes())
    assert KSDD2.load(root, "ksdd2") == clean


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "nowhere", "ksdd2"), "there's no folder .*nowhere"),
        (lambda root: (None, "ksdd2"), "needs --data-root"),
        (lambda root: (root, "steel"), "no category 'steel' .*found: ksdd2"),
        (lambda root: (root / "train", "ksdd2"), "there's no folder .*train.train"),
    ],
)
def test_ksdd2_says_what_is_missing(root, break_it, message):
    with pytest.raises(DatasetError, match=message):
        KSDD2.load(*break_it(root))


@pytest.mark.parametrize("missing", [None, Path("nowhere")])
def test_categories_need_a_root(missing):
    with pytest.raises(DatasetError):
        KSDD2.categories(missing)


@pytest.mark.parametrize("part", ["train", "test"])
def test_ksdd2_says_which_part_is_missing_or_empty(root, part):
    (root / part).rename(root / "elsewhere")
    with pytest.raises(DatasetError, match=f"there's no folder .*{part}"):
        KSDD2.load(root, "ksdd2")
    (root / part).mkdir()
    with pytest.raises(DatasetError, match=f"{part} holds no picture"):
        KSDD2.load(root, "ksdd2")


def test_pictures_and_masks_must_pair(root):
    (root / "test" / "20000_GT.png").rename(root / "20000_GT.png")
    with pytest.raises(DatasetError, match=r"20000\.png has no mask: expected 20000_GT\.png"):
        KSDD2.load(root, "ksdd2")
    (root / "test" / "20000.png").unlink()
    (root / "20000_GT.png").rename(root / "test" / "20000_GT.png")
    with pytest.raises(DatasetError, match=r"20000_GT\.png has no picture: expected 20000\.png"):
        KSDD2.load(root, "ksdd2")


def test_an_unreadable_mask_is_named(root):
    (root / "test" / "20000_GT.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"20000_GT\.png"):
        KSDD2.load(root, "ksdd2")


def test_real_pictures_in_the_layout_of_ksdd2(shared_data):
    split = KSDD2.load(shared_data / "ksdd2", "ksdd2")
    assert (len(split.train), len(split.test)) == (80, 48)
    assert (bad_samples(split.train).sum(), bad_samples(split.test).sum()) == (10, 6)
    defective = [s for s in (*split.train, *split.test) if s.label == 1]
    assert all(load_mask(s, Transform(224)).any() for s in defective)
