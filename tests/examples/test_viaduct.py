"""VIADUCT: spelling of classes, names of masks, the pictures left out, what the user is told."""

from pathlib import Path

import pytest
from PIL import Image

from comet_examples.datasets import DATASETS, DatasetError, Transform, contaminate, load_mask

VIADUCT = DATASETS["viaduct"]
CLASSES = ["05_cable_end_sleeve", "11 ring cable lug"]


def picture(path: Path, value: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 16), (value, value, value)).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, two views an object; masks are called like their pictures in the first only."""
    for name, suffix in zip(CLASSES, ("", "_mask"), strict=True):
        base = tmp_path / name
        for view in range(2):
            for i in range(3):
                picture(base / "train" / "good" / f"good_{i:03d}_{view}.png")
            picture(base / "val" / "good" / f"good_003_{view}.png")
            picture(base / "test" / "good" / f"good_004_{view}.png")
            for kind in ("bent", "torn"):
                picture(base / "test" / kind / f"{kind}_000_{view}.png")
                picture(base / "ground_truth" / kind / f"{kind}_000_{view}{suffix}.png", view + 1)
    return tmp_path


@pytest.mark.parametrize(("name", "suffix"), [(CLASSES[0], ""), (CLASSES[1], "_mask")])
def test_masks_are_named_in_either_way(root, name, suffix):
    assert VIADUCT.categories(root) == CLASSES
    split = VIADUCT.load(root, name)
    assert split.category == name
    assert split.has_masks
    assert sorted((s.defect, s.label) for s in split.test) == sorted(
        [("good", 0), ("bent", 1), ("torn", 1)] * 2
    )
    for sample in split.test:
        if sample.label == 1:
            assert sample.mask.parent.name == sample.defect
            assert sample.mask.stem == sample.path.stem + suffix


def test_held_out_normal_pictures_are_left_out(root):
    split = VIADUCT.load(root, CLASSES[0])
    assert len(split.train) == 6
    assert {s.label for s in split.train} == {0}
    assert not any("val" in s.path.parts for s in (*split.train, *split.test))


def test_views_of_one_object_are_on_one_side(root):
    split = VIADUCT.load(root, CLASSES[0])
    train, test = (
        {s.path.stem.rpartition("_")[0] for s in part} for part in (split.train, split.test)
    )
    assert not train & test


def test_views_share_their_objects_group(root):
    split = VIADUCT.load(root, CLASSES[0])
    for sample in (*split.train, *split.test):
        assert sample.group == f"{sample.defect}/{sample.path.stem[:-2]}"
    assert len({s.group for s in split.train}) == 3
    assert len({s.group for s in split.test}) == 3


@pytest.mark.parametrize(
    ("stem", "group"),
    [
        ("Image_broken_007_0", "torn/Image_broken_007"),
        ("Image_broken_007_12", "torn/Image_broken_007"),
        ("7_0", "torn/7"),
        ("007", None),
        ("cable", None),
        ("cable_007a", None),
        ("cable-7", None),
    ],
)
def test_the_object_is_what_precedes_the_view_number(root, stem, group):
    picture(root / CLASSES[0] / "test" / "torn" / f"{stem}.png")
    picture(root / CLASSES[0] / "ground_truth" / "torn" / f"{stem}.png")
    (found,) = (s for s in VIADUCT.load(root, CLASSES[0]).test if s.path.stem == stem)
    assert found.group == group


def test_objects_in_folders_of_different_defects_are_different(root):
    base = root / CLASSES[0]
    for folder in ("test", "ground_truth"):
        picture(base / folder / "torn" / "bent_000_0.png")
    groups = {s.group for s in VIADUCT.load(root, CLASSES[0]).test if s.label == 1}
    assert groups == {"bent/bent_000", "torn/torn_000", "torn/bent_000"}


@pytest.mark.parametrize("seed", range(5))
def test_contamination_keeps_the_views_of_an_object_on_one_side(root, seed):
    # One of the four defective pictures for six good ones; its other view leaves the test set.
    split = contaminate(VIADUCT.load(root, CLASSES[0]), 1 / 7, seed=seed)
    (drawn,) = (s for s in split.train if s.label == 1)
    left = [s for s in split.test if s.label == 1]
    assert len(left) == 2
    assert drawn.defect not in {s.defect for s in left}


def test_a_class_without_held_out_pictures_loads(root):
    (root / CLASSES[0] / "val").rename(root / "elsewhere")
    assert len(VIADUCT.load(root, CLASSES[0]).train) == 6


def test_a_copy_of_the_picture_is_not_taken_for_the_mask(root):
    base = root / CLASSES[1]
    picture(base / "ground_truth" / "torn" / "torn_000_0.png")
    masks = {s.mask.stem for s in VIADUCT.load(root, CLASSES[1]).test if s.defect == "torn"}
    assert masks == {"torn_000_0_mask", "torn_000_1_mask"}


def test_a_missing_mask_is_an_error_but_missing_ground_truth_is_not(root, caplog):
    base = root / CLASSES[0]
    (base / "ground_truth" / "bent" / "bent_000_1.png").unlink()
    with pytest.raises(
        DatasetError,
        match=r"bent_000_1\.png has no mask: expected bent_000_1_mask\.png or bent_000_1\.png in",
    ):
        VIADUCT.load(root, CLASSES[0])
    (base / "ground_truth").rename(root / "elsewhere")
    assert not VIADUCT.load(root, CLASSES[0]).has_masks
    assert "no pixel metrics" in caplog.text


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "nowhere", CLASSES[0]), "there's no folder .*nowhere"),
        (lambda root: (None, CLASSES[0]), "VIADUCT needs --data-root"),
        (lambda root: (root, "12 fuse"), "no category '12 fuse' .*found: 05_cable_end_sleeve, 11"),
        (lambda root: (root / CLASSES[1], CLASSES[1]), "looks like a single category: pass"),
    ],
)
def test_viaduct_says_what_is_missing(root, break_it, message):
    with pytest.raises(DatasetError, match=message):
        VIADUCT.load(*break_it(root))


@pytest.mark.parametrize("missing", ["train/good", "test"])
def test_viaduct_says_which_split_is_missing(root, missing):
    (root / CLASSES[0] / missing).rename(root / "elsewhere")
    with pytest.raises(DatasetError, match=f"{missing.replace('/', '.')}; VIADUCT's layout"):
        VIADUCT.load(root, CLASSES[0])


def test_real_pictures_in_the_layout_of_viaduct(shared_data):
    assert VIADUCT.categories(shared_data / "viaduct") == ["01_cookie"]
    split = VIADUCT.load(shared_data / "viaduct", "01_cookie")
    assert (len(split.train), len(split.test)) == (26, 14 + 32)
    defective = [s for s in split.test if s.label == 1]
    assert {s.defect for s in defective} == {"broken"}
    # A single view of each cookie.
    assert len({s.group for s in split.test}) == 14 + 32
    assert "broken/Image_broken_000" in {s.group for s in defective}
    assert all(load_mask(s, Transform(128)).any() for s in defective)
