"""A folder of pictures without labels: what is found in it, what the user is told."""

from pathlib import Path

import pytest
from PIL import Image

from comet_examples.datasets import DATASETS, DatasetError, Sample, bad_samples

FOLDER = DATASETS["folder"]


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8)).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three pictures at different depths, beside hidden and other files."""
    base = tmp_path / "my parts ä"
    for name in ("b.png", "line 1/a.JPG", "line 1/shift 2/c.tif"):
        picture(base / name)
    for name in (".hidden.png", ".thumbnails/a.png", "line 1/.cache/deep/a.png"):
        picture(base / name)
    (base / "line 1" / "notes.txt").write_text("none")
    return base


def test_every_picture_below_the_folder_is_for_training(root):
    assert FOLDER.categories(root) == ["my parts ä"]
    split = FOLDER.load(root, "my parts ä")
    found = [root / "b.png", root / "line 1" / "a.JPG", root / "line 1" / "shift 2" / "c.tif"]
    assert split.train == tuple(Sample(path, None) for path in found)
    assert split.test == ()
    assert not split.has_masks
    assert not bad_samples(split.train).any()
    assert FOLDER.load(root, "my parts ä") == split


def test_the_folder_itself_may_be_hidden_or_relative(root, monkeypatch):
    hidden = root.rename(root.parent / ".parts")
    assert len(FOLDER.load(hidden, ".parts").train) == 3
    monkeypatch.chdir(hidden / "line 1")
    assert FOLDER.categories(Path()) == ["line 1"]
    assert len(FOLDER.load(Path(), "line 1").train) == 2
    assert FOLDER.categories(Path("..")) == [".parts"]


def test_links_are_followed_once(root):
    other = picture(root.parent / "other" / "d.png").parent
    try:
        (root / "linked").symlink_to(other, target_is_directory=True)
        (root / "line 1" / "up").symlink_to(root, target_is_directory=True)
        (root / "again").symlink_to(other, target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    names = [s.path.name for s in FOLDER.load(root, root.name).train]
    assert sorted(names) == ["a.JPG", "b.png", "c.tif", "d.png"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "nowhere", "nowhere"), "there's no folder .*nowhere"),
        (lambda root: (root / "b.png", "b.png"), r"there's no folder .*b\.png"),
        (lambda root: (None, "parts"), "needs --data-root"),
        (lambda root: (root, "parts"), "no category 'parts' .*found: my parts"),
        (lambda root: (root / "empty", "empty"), "empty holds no picture"),
    ],
)
def test_folder_says_what_is_missing(root, break_it, message):
    (root / "empty" / ".hidden").mkdir(parents=True)
    picture(root / "empty" / ".hidden" / "a.png")
    with pytest.raises(DatasetError, match=message):
        FOLDER.load(*break_it(root))


@pytest.mark.parametrize("missing", [None, Path("nowhere")])
def test_categories_need_a_root(missing):
    with pytest.raises(DatasetError):
        FOLDER.categories(missing)


def test_real_pictures_of_a_folder(shared_data):
    root = shared_data / "mvtec" / "toothbrush" / "train"
    split = FOLDER.load(root, "train")
    assert len(split.train) == 48
    assert {s.label for s in split.train} == {None}
