"""Loaders: layouts, kinds of pictures, and what the user is told."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from comet_examples.datasets import DATASETS, DatasetError, Sample, Transform, load_image, load_mask
from comet_meta.vision.images import has_defect

MVTEC = DATASETS["mvtec"]


def picture(path: Path, value: int = 128, size: tuple[int, int] = (24, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two categories; masks whose sorted order differs from that of their pictures."""
    for category in ("bottle", "zipper ä"):
        base = tmp_path / category
        for i in range(4):
            picture(base / "train" / "good" / f"{i:03d}.png")
        picture(base / "test" / "good" / "000.png")
        for stem in ("1", "10", "2"):
            picture(base / "test" / "crack" / f"{stem}.png")
        # "10_mask" < "1_mask" by character, while "1" < "10".
        for stem in ("1", "10", "2"):
            picture(base / "ground_truth" / "crack" / f"{stem}_mask.png", value=int(stem))
    return tmp_path


def test_mvtec_discovers_categories_and_splits(root):
    assert MVTEC.categories(root) == ["bottle", "zipper ä"]
    split = MVTEC.load(root, "zipper ä")
    assert [s.label for s in split.train] == [0] * 4
    assert sorted((s.defect, s.label) for s in split.test) == [("crack", 1)] * 3 + [("good", 0)]
    assert split.has_masks


def test_masks_pair_by_name(root):
    for sample in MVTEC.load(root, "bottle").test:
        if sample.label == 1:
            assert sample.mask.stem == f"{sample.path.stem}_mask"
            # The mask's grey value is its picture's number.
            assert np.array(Image.open(sample.mask)).max() == int(sample.path.stem)


def test_without_ground_truth_there_are_no_masks(root, caplog):
    for file in (root / "bottle" / "ground_truth" / "crack").iterdir():
        file.unlink()
    with pytest.raises(DatasetError, match="has no mask"):
        MVTEC.load(root, "bottle")
    (root / "bottle" / "ground_truth" / "crack").rmdir()
    (root / "bottle" / "ground_truth").rmdir()
    split = MVTEC.load(root, "bottle")
    assert not split.has_masks
    assert "no pixel metrics" in caplog.text


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "nowhere", "bottle"), "there's no folder .*nowhere"),
        (lambda root: (None, "bottle"), "needs --data-root"),
        (lambda root: (root, "cork"), "no category 'cork' .*found: bottle, zipper"),
        (lambda root: (root / "bottle", "bottle"), "looks like a single category: pass"),
    ],
)
def test_mvtec_says_what_is_missing(root, break_it, message):
    with pytest.raises(DatasetError, match=message):
        MVTEC.load(*break_it(root))


@pytest.mark.parametrize("missing", ["train/good", "test"])
def test_mvtec_says_which_split_is_missing(root, missing):
    (root / "bottle" / missing).rename(root / "elsewhere")
    with pytest.raises(DatasetError, match=missing.replace("/", ".")):
        MVTEC.load(root, "bottle")


def test_an_empty_training_folder_is_an_error(root):
    for file in (root / "bottle" / "train" / "good").iterdir():
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(DatasetError, match="holds no picture"):
        MVTEC.load(root, "bottle")


def ramp(mode: str) -> Image.Image:
    values = np.tile(np.linspace(0, 255, 16, dtype=np.uint8), (16, 1))
    if mode == "I;16":
        return Image.fromarray(values.astype(np.uint16) * 257)
    image = Image.fromarray(values)
    if mode == "RGBA":
        image = image.convert("RGBA")
        image.putalpha(255)
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16", "1"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    ramp(mode).save(tmp_path / "x.png")
    found = load_image(tmp_path / "x.png", Transform(16))
    assert found.shape == (3, 16, 16)
    assert found.dtype == torch.uint8
    assert found[:, 0, 0].tolist() == [0, 0, 0]
    assert found[:, 0, -1].tolist() == [255, 255, 255]
    if mode != "1":
        assert 90 < found[0, 8, 7] < 140  # 16-bit values are scaled, not clipped


def test_the_rotation_of_the_camera_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10), "black")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg", Transform((20, 10))).shape == (3, 20, 10)
    assert load_image(tmp_path / "x.jpg", Transform(10)).shape == (3, 20, 10)


def test_resize_keeps_the_aspect_unless_told_otherwise(tmp_path):
    path = picture(tmp_path / "x.png", size=(60, 30))
    assert load_image(path, Transform(15)).shape == (3, 15, 30)
    assert load_image(path, Transform((20, 20))).shape == (3, 20, 20)
    assert load_image(path, Transform(20, 16)).shape == (3, 16, 16)


@pytest.mark.parametrize("content", [b"", b"no picture", "truncated"])
def test_an_unreadable_picture_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        content = path.read_bytes()[:3000]
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"broken\.png"):
        load_image(path, Transform(16))


def test_masks_follow_the_picture(tmp_path):
    mask = Image.new("L", (40, 20), 0)
    mask.paste(1, (30, 0, 40, 20))  # any value above 0 is defective
    mask.save(tmp_path / "m.png")
    sample = Sample(picture(tmp_path / "x.png", size=(40, 20)), 1, tmp_path / "m.png", "crack")
    found = load_mask(sample, Transform((20, 40), (20, 20)))
    assert found.shape == (20, 20)
    assert not found.any()  # the crop leaves the defect out
    assert load_mask(sample, Transform(20)).float().mean() == pytest.approx(0.25)
    good = Sample(sample.path, 0)
    assert load_mask(good, Transform(10)).shape == (10, 20)
    assert not load_mask(good, Transform(10)).any()


def test_a_mask_of_another_size_is_an_error(tmp_path):
    sample = Sample(
        picture(tmp_path / "x.png", size=(40, 20)), 1, picture(tmp_path / "m.png", size=(20, 20))
    )
    with pytest.raises(DatasetError, match=r"20 x 20 pixels .* 40 x 20"):
        load_mask(sample, Transform(20))


def test_elpv_leaves_uncertain_cells_out_and_splits_once():
    pytest.importorskip("elpv_dataset", reason="the package elpv-dataset is not installed")
    elpv = DATASETS["elpv"]
    assert elpv.categories(None) == ["mono", "poly"]
    split = elpv.load(None, "mono")
    assert (len(split.train), len(split.test)) == (400, 188 + 313)
    assert {s.label for s in split.train} == {0}
    assert not {s.path for s in split.train} & {s.path for s in split.test}
    assert all(s.path.is_file() for s in split.test)
    assert elpv.load(None, "mono") == split
    with pytest.raises(DatasetError, match="found: mono, poly"):
        elpv.load(None, "amorphous")


def test_elpv_missing_names_the_pip_line(monkeypatch):
    monkeypatch.setattr("comet_examples.datasets.elpv.find_spec", lambda name: None)
    with pytest.raises(DatasetError, match="pip install"):
        DATASETS["elpv"].categories(None)


def test_real_mvtec_layout(shared_data):
    split = MVTEC.load(shared_data / "mvtec", "toothbrush")
    assert (len(split.train), len(split.test)) == (48, 42)
    defective = [s for s in split.test if s.label == 1]
    assert all(load_mask(s, Transform(64)).any() for s in defective)


def test_a_crop_larger_than_the_picture_is_an_error(tmp_path):
    with pytest.raises(DatasetError, match="32 x 32 pixels is larger than the resized picture"):
        load_image(picture(tmp_path / "x.png"), Transform(16, 32))
    with pytest.raises(ValueError, match="at least 1 pixel"):
        Transform(0)


def test_the_faintest_mark_of_a_16_bit_mask_counts(tmp_path):
    marks = np.zeros((16, 24), dtype=np.uint16)
    marks[:8] = 1
    Image.fromarray(marks).save(tmp_path / "m.png")
    sample = Sample(picture(tmp_path / "x.png"), 1, tmp_path / "m.png")
    assert load_mask(sample, Transform(16)).float().mean() == pytest.approx(0.5)


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "P", "I;16"])
@pytest.mark.parametrize("mark", [0, 1, 255])
def test_a_single_marked_pixel_is_a_defect(tmp_path, mode, mark):
    marks = np.zeros((16, 24), dtype=np.uint16 if mode == "I;16" else np.uint8)
    marks[5, 7] = mark
    image = Image.fromarray(marks)
    # Thresholded, as dithering would lose a single pixel.
    image = image.point(lambda v: 255 * (v > 0)).convert("1") if mode == "1" else image
    (image if mode in ("1", "I;16") else image.convert(mode)).save(tmp_path / "m.png")
    assert has_defect(tmp_path / "m.png") is (mark > 0)
    sample = Sample(picture(tmp_path / "x.png"), 1, tmp_path / "m.png")
    assert bool(load_mask(sample, Transform(16)).any()) is (mark > 0)


def test_an_unreadable_mask_is_named(tmp_path):
    (tmp_path / "m.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"m\.png"):
        has_defect(tmp_path / "m.png")


def disc(size: tuple[int, int], centre: tuple[int, int], radius: int) -> Image.Image:
    """White on black; size and centre are (x, y)."""
    image = Image.new("L", size)
    (x, y), r = centre, radius
    ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=255)
    return image


def extent(marks: torch.Tensor) -> tuple[int, int]:
    """Height and width of what is marked."""
    rows, columns = marks.any(dim=1).nonzero(), marks.any(dim=0).nonzero()
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


@pytest.mark.parametrize("size", [(213, 606), (233, 653), (230, 630), (630, 230)])
def test_pictures_of_different_sizes_come_out_alike_and_undistorted(tmp_path, size):
    transform = Transform((320, 112), keep_aspect=True)
    disc(size, (size[0] // 3, size[1] // 3), 60).save(tmp_path / "x.png")
    found = load_image(tmp_path / "x.png", transform)
    assert found.shape == (3, 320, 112)
    height, width = extent(found[0] > 127)
    assert abs(height - width) <= 1
    scale = min(320 / size[1], 112 / size[0])
    assert abs(width - 121 * scale) <= 1.5
    stretched = load_image(tmp_path / "x.png", Transform((320, 112)))
    assert abs(np.subtract(*extent(stretched[0] > 127))) > (0 if size[0] < size[1] else 50)


def test_padding_repeats_the_edge_and_is_centred(tmp_path):
    values = np.repeat(np.array([[10, 20, 30, 40]], dtype=np.uint8), 2, axis=0)
    Image.fromarray(values).save(tmp_path / "x.png")
    tall = load_image(tmp_path / "x.png", Transform((6, 4), keep_aspect=True))
    assert tall[0].tolist() == [[10, 20, 30, 40]] * 6
    wide = load_image(tmp_path / "x.png", Transform((2, 9), keep_aspect=True))
    # Five pixels to pad: the odd one goes behind.
    assert wide[0].tolist() == [[10, 10, 10, 20, 30, 40, 40, 40, 40]] * 2


def test_padding_of_masks_is_normal(tmp_path):
    Image.new("L", (4, 2), 255).save(tmp_path / "m.png")
    sample = Sample(picture(tmp_path / "x.png", size=(4, 2)), 1, tmp_path / "m.png")
    found = load_mask(sample, Transform((6, 4), keep_aspect=True))
    assert found.int().tolist() == [[0] * 4] * 2 + [[1] * 4] * 2 + [[0] * 4] * 2
    good = load_mask(Sample(sample.path, 0), Transform((6, 4), keep_aspect=True))
    assert good.shape == (6, 4)
    assert not good.any()


@pytest.mark.parametrize("crop", [None, (96, 64)])
@pytest.mark.parametrize("size", [(213, 606), (606, 213), (120, 120), (300, 301)])
def test_mask_and_padded_picture_stay_aligned(tmp_path, size, crop):
    image = disc(size, (size[0] // 2 + 15, size[1] // 2 - 20), 30)
    for name in ("x", "m"):
        image.save(tmp_path / f"{name}.png")
    transform = Transform((128, 80), crop, keep_aspect=True)
    pixels = load_image(tmp_path / "x.png", transform)[0] > 127
    mask = load_mask(Sample(tmp_path / "x.png", 1, tmp_path / "m.png"), transform)
    assert mask.shape == (crop or (128, 80))
    assert mask.any()
    centres = [marks.nonzero().double().mean(dim=0) for marks in (pixels, mask)]
    # Half a pixel: picked and interpolated edges differ by no more.
    torch.testing.assert_close(centres[0], centres[1], rtol=0, atol=0.5)
    assert (pixels != mask).sum() <= 0.25 * mask.sum()


@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    target=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_any_size_fits(size, target):
    mask = Transform(target, keep_aspect=True)(Image.new("L", size, 255), mask=True)
    assert (mask.height, mask.width) == target
    height, width = extent(torch.from_numpy(np.array(mask)) > 0)
    assert height == target[0] or width == target[1]
    # To the nearest pixel.
    scale = min(target[0] / size[1], target[1] / size[0])
    assert abs(height - scale * size[1]) <= 0.5 or height == 1
    assert abs(width - scale * size[0]) <= 0.5 or width == 1


def test_keeping_the_aspect_needs_both_sides_and_has_a_key_of_its_own():
    with pytest.raises(ValueError, match=r"keep_aspect needs resize=\(height, width\), got 16"):
        Transform(16, keep_aspect=True)
    assert str(Transform((8, 8), keep_aspect=True)) != str(Transform((8, 8)))


def test_real_surfaces_of_different_sizes_can_be_stacked(shared_data):
    split = DATASETS["ksdd2"].load(shared_data / "ksdd2", "ksdd2")
    transform = Transform((160, 56), keep_aspect=True)
    some = [*(s for s in split.train if s.label == 1), *split.train[:4]]
    pictures = torch.stack([load_image(s.path, transform) for s in some])
    masks = torch.stack([load_mask(s, transform) for s in some])
    assert pictures.shape[-2:] == masks.shape[-2:] == (160, 56)
    assert masks.flatten(1).any(dim=1).tolist() == [s.label == 1 for s in some]
