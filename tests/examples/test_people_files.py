"""What people's files and command lines are like: the right value, or a sentence."""

import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_scripts import SMALL, run, tree

from comet_examples import cli, report
from comet_examples.datasets import (
    DATASETS,
    DatasetError,
    Sample,
    Split,
    Transform,
    load_image,
    load_mask,
    load_values,
    survey,
)
from comet_meta import SoftConfidentWeighter
from comet_meta.vision.files import unforeseen
from comet_meta.vision.images import common_shape
from comet_meta.vision.samples import OUTPUT_MARK
from comet_meta.vision.survey import survey_depth

GREY = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
WHOLE = Transform((16, 16))


def split_of(*paths: Path, test: tuple[Path, ...] = ()) -> Split:
    train = tuple(Sample(path, 0) for path in paths)
    return Split("x", train, tuple(Sample(path, 1) for path in test), has_masks=False)


@pytest.mark.parametrize("shift", [2, 4, 8])
def test_cameras_of_10_and_12_bits_keep_their_levels(tmp_path, caplog, shift):
    caplog.set_level(logging.INFO)
    deep = GREY.astype(np.uint16) << shift
    Image.fromarray(deep).save(tmp_path / "a.png")
    Image.fromarray(deep // 2).save(tmp_path / "b.tif")  # darker: the scale stays
    known = survey(split_of(tmp_path / "a.png", tmp_path / "b.tif"))
    assert known.values == (0, 2 ** (8 + shift) - 1)
    assert "2 of 2 pictures have more than 8 bits" in caplog.text
    first, second = (
        load_values(tmp_path / name, known.scaled(WHOLE)) for name in ("a.png", "b.tif")
    )
    expected = deep * (255 / (2 ** (8 + shift) - 1))
    np.testing.assert_allclose(first[2].numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(second[2].numpy(), expected / 2, rtol=1e-6)
    assert load_image(tmp_path / "a.png", known.scaled(WHOLE)).dtype == torch.uint8


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (GREY.astype(np.int32) * 4, (0, 1023)),
        ((GREY / 255).astype(np.float32), (0, 1)),
        (GREY.astype(np.float32), (0, 255)),
    ],
)
def test_int32_and_float_pictures_are_scaled_by_what_they_hold(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tif")
    known = survey(split_of(tmp_path / "a.tif"))
    assert known.values == expected
    found = load_values(tmp_path / "a.tif", known.scaled(WHOLE))[0].numpy()
    np.testing.assert_allclose(found, GREY, atol=1.0)


def tiff(path: Path, values: np.ndarray) -> Path:
    """A grey TIFF of whole numbers of any width and sign, which Pillow can't write."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    tags = {
        256: width, 257: height, 258: 8 * values.dtype.itemsize, 259: 1, 262: 1, 273: 8, 277: 1,
        278: height, 279: len(data), 339: 2 if values.dtype.kind == "i" else 1,
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<L", 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
def test_whole_numbers_of_every_width_and_sign_keep_their_order(tmp_path, dtype):
    limits = np.iinfo(dtype)
    steps = np.linspace(limits.min, limits.max, 256).round().astype(dtype).reshape(16, 16)
    path = tiff(tmp_path / "a.tif", steps)
    known = survey(split_of(path))
    assert not known.faults
    shown = load_values(path, known.scaled(WHOLE))[0].flatten().float()
    np.testing.assert_allclose(shown, np.arange(256), atol=1)
    marked = load_mask(Sample(path, 1, mask=path), WHOLE).flatten()
    lowest = limits.min if dtype is np.int8 else 0  # shifted: 8 bits have no sign in Pillow
    assert torch.equal(marked, torch.from_numpy(steps.flatten() > lowest))


def test_pictures_are_brought_to_one_shape_of_their_own(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, size in zip(paths, [(40, 100)] * 3 + [(44, 100), (100, 40)], strict=True):
        Image.new("L", size, 90).save(path)
    known = survey(split_of(*paths, test=(tmp_path / "4.png",)))
    assert known.shapes == ((100, 40),) * 3 + ((100, 44), (40, 100))
    found = known.fitted(Transform(329, 288))
    assert found.crop is None
    assert found == Transform(common_shape([(100, 40)], 288 * 288), keep_aspect=True)
    assert load_image(paths[4], found).shape[1:] == found.resize


def test_a_photo_that_lies_on_its_side_counts_as_it_stands(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("L", (100, 40), 90).save(tmp_path / "x.jpg", exif=turned)
    split = split_of(tmp_path / "x.jpg")
    assert survey(split).shapes == survey_depth(split).shapes == ((100, 40),)


def test_square_pictures_get_the_size_as_it_is(tmp_path):
    for i, size in enumerate([(50, 50), (90, 91)]):
        Image.new("L", size, 90).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    known = survey(split_of(*(tmp_path / f"{i}.png" for i in range(3))))
    assert known.shapes == ((50, 50), (91, 90))
    assert known.fitted(Transform(329, 288)) == Transform(329, 288)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1),
    pixels=st.integers(64**2, 1024**2),
)
def test_the_common_shape_has_about_as_many_pixels_and_does_not_depend_on_scale(shapes, pixels):
    height, width = common_shape(shapes, pixels)
    assert height % 16 == width % 16 == 0
    assert min(height, width) >= 32
    doubled = [(2 * height, 2 * width) for height, width in shapes]
    assert common_shape(doubled, pixels) == (height, width)
    if min(height, width) >= 64:
        assert height * width == pytest.approx(pixels, rel=0.3)
    ratio = float(np.median([height / width for height, width in shapes]))
    if 1 / 4 <= ratio <= 4:
        assert height / width == pytest.approx(ratio, rel=0.35)


def test_one_hot_pixel_does_not_set_the_range_of_measurements(tmp_path):
    values = np.linspace(-3, 5, 10_000, dtype=np.float32).reshape(100, 100).copy()
    values[0, 0] = 1e9
    Image.fromarray(values).save(tmp_path / "a.tif")
    low, high = survey(split_of(tmp_path / "a.tif")).values
    assert low == pytest.approx(-3, abs=0.02)
    assert high == pytest.approx(5, abs=0.02)


def test_only_training_pictures_set_the_range(tmp_path):
    Image.fromarray(GREY.astype(np.uint16) * 4).save(tmp_path / "a.png")
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "b.png")
    known = survey(split_of(tmp_path / "a.png", test=(tmp_path / "b.png",)))
    assert known.values == (0, 1023)
    assert load_values(tmp_path / "b.png", known.scaled(WHOLE)).max() > 10_000


def test_values_that_are_nan_get_a_sentence(tmp_path):
    values = GREY.astype(np.float32)
    values[3, 3] = np.nan
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DatasetError, match=r"a\.tif: 1 of its values are NaN or infinite"):
        load_values(tmp_path / "a.tif", WHOLE)


def test_a_mask_may_have_hidden_colours_or_be_told_by_transparency_alone(tmp_path):
    Image.new("RGB", (96, 96)).save(tmp_path / "x.png")
    for name, inner in (("hidden", (255, 255, 255)), ("black", (0, 0, 0))):
        mask = Image.new("RGBA", (96, 96), (9, 8, 7, 0) if name == "hidden" else (0, 0, 0, 0))
        mask.paste((*inner, 255), (10, 10, 30, 30))
        mask.save(tmp_path / f"{name}.png")
        sample = Sample(tmp_path / "x.png", 1, tmp_path / f"{name}.png")
        assert load_mask(sample, Transform(96)).sum() == 400


def test_jpeg_masks_are_cut_at_half(tmp_path):
    Image.new("RGB", (96, 96)).save(tmp_path / "x.png")
    mask = Image.new("L", (96, 96))
    mask.paste(255, (13, 13, 33, 33))
    mask.save(tmp_path / "m.jpg", quality=75)
    sample = Sample(tmp_path / "x.png", 1, tmp_path / "m.jpg")
    assert load_mask(sample, Transform(96)).sum() == 400


def test_several_pages_and_other_files_are_said(tmp_path, caplog):
    frames = [Image.new("L", (8, 8), v) for v in (0, 100, 200)]
    for name in ("a.gif", "b.tif", "c.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    for name in ("d.jfif", "e.pgm", "f.jp2", "g.avif"):
        frames[1].save(tmp_path / name)
    for name in ("h.heic", "i.heic", "notes.txt"):
        (tmp_path / name).write_bytes(b"?")
    split = DATASETS["folder"].load(tmp_path, tmp_path.name)
    assert [s.path.name[0] for s in split.train] == list("abcdefg")
    assert "left out 3 files that are no pictures which can be read (2 .heic, 1 .txt)" in (
        caplog.text
    )
    survey(split)
    assert "3 files hold several pictures, of which only the first is read" in caplog.text


@pytest.mark.parametrize("name", ["ok", "Good", "NORMAL", "defect-free", "No_Defect"])
def test_other_words_for_good(tmp_path, name, caplog):
    caplog.set_level(logging.INFO)
    root = tree(tmp_path, "mvtec")
    (root / "part" / "test" / "good").rename(root / "part" / "test" / name)
    labels = [s.label for s in DATASETS["mvtec"].load(root, "part").test]
    assert sorted(labels) == [0] * 4 + [1] * 4
    assert f"{name}: taken for good pictures" in caplog.text


def test_words_of_ones_own_for_good(tmp_path):
    root = tree(tmp_path, "mvtec")
    (root / "part" / "test" / "good").rename(root / "part" / "test" / "fleckenlos")
    mvtec = DATASETS["mvtec"]
    with pytest.raises(DatasetError, match="--good 'fleckenlos'"):
        mvtec.load(root, "part")
    assert sum(s.label == 0 for s in mvtec.load(root, "part", good=["Fleckenlos"]).test) == 4
    with pytest.raises(DatasetError, match="no such folder; found: fleckenlos, hole"):
        mvtec.load(root, "part", good=["spotless"])


def test_folders_below_are_read_and_loose_pictures_said(tmp_path, caplog):
    root = tree(tmp_path, "mvtec")
    for part in ("train/good", "test/hole", "ground_truth/hole"):
        inner = root / "part" / part / "line 1"
        inner.mkdir()
        for path in sorted((root / "part" / part).glob("000*")):
            path.rename(inner / path.name)
    Image.new("L", (8, 8)).save(root / "part" / "test" / "loose.png")
    split = DATASETS["mvtec"].load(root, "part")
    assert (len(split.train), len(split.test)) == (12, 8)
    assert any(s.mask and s.mask.parent.name == "line 1" for s in split.test)
    assert "1 pictures left out that lie beside its folders (loose.png)" in caplog.text


def test_results_of_earlier_runs_are_never_pictures(tmp_path):
    for i in range(3):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    marks = {"results.json": '{"settings": {}, "methods": {}}', OUTPUT_MARK: ""}
    for name, content in marks.items():
        out = tmp_path / "runs" / name / "part"
        out.mkdir(parents=True)
        (out / name).write_text(content)
        Image.new("L", (8, 8)).save(out / "comet_maps.png")
    other = tmp_path / "other tool"
    other.mkdir()
    (other / "results.json").write_text("[1]")
    Image.new("L", (8, 8)).save(other / "theirs.png")
    names = [s.path.name for s in DATASETS["folder"].load(tmp_path, tmp_path.name).train]
    assert names == ["0.png", "1.png", "2.png", "theirs.png"]


def test_results_may_lie_in_the_folder_of_the_data(tmp_path):
    root = tree(tmp_path / "data", "mvtec")
    (root / "part" / OUTPUT_MARK).touch()
    assert DATASETS["mvtec"].categories(root) == ["part"]
    assert len(DATASETS["mvtec"].load(root, "part").train) == 12
    good = root / "part" / "train" / "good"
    for path in (good / OUTPUT_MARK, good / "comet_suspect_maps.png", good / "plain_maps.png"):
        path.touch()
    assert len(DATASETS["folder"].load(good, "good").train) == 12


def test_all_damage_is_named_at_once_and_left_out_on_request(tmp_path, capsys, undrawn):
    root = tree(tmp_path / "data", "mvtec")
    bad = [root / "part" / p for p in ("train/good/003_0.png", "test/hole/001_1.png")]
    bad.append(root / "part" / "ground_truth" / "hole" / "002_1_mask.png")
    for path in bad:
        path.write_bytes(b"damaged")
    assert run("simplenet_mvtec", root, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert all(str(path) in error for path in bad)
    assert "3 pictures can't be used" in error
    assert "--keep-going" in error
    assert run("simplenet_mvtec", root, tmp_path / "out", "--keep-going") == 0
    said = capsys.readouterr()
    assert all(str(path) in said.err for path in bad)


def test_large_scans_are_allowed_by_an_option(tmp_path, capsys, undrawn):
    for i in range(3):
        Image.fromarray(np.full((1100, 1000), 90 + i, np.uint8)).save(tmp_path / f"{i}.png")
    arguments = ["--dataset", "folder", "--data-root", str(tmp_path), *SMALL]
    arguments += ["--out", str(tmp_path / "out")]
    assert cli.main("simplenet", "mvtec", [*arguments, "--max-megapixels", "1"]) == 1
    assert "by --max-megapixels" in capsys.readouterr().err
    assert cli.main("simplenet", "mvtec", [*arguments, "--max-megapixels", "2"]) == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch-size 1", "at least 2"),
        ("--device gpu", "no device of this machine; there are: cpu"),
        ("--device cuda:77", "no device of this machine"),
        ("--seed -1", "whole number from 0"),
        ("--strength nan", "finite number >= 0"),
        ("--strength inf", "finite number >= 0"),
        ("--noise 0.1 --dataset folder", "nothing is known about those of a plain folder"),
        ("--good x --dataset ksdd2", "ksdd2 has none"),
    ],
)
def test_options_out_of_range_get_a_sentence(tmp_path, capsys, option, message):
    with pytest.raises(SystemExit) as exit_:
        cli.main("simplenet", "mvtec", ["--data-root", str(tmp_path), *option.split()])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_seed_may_be_a_date(tmp_path, undrawn):
    root = tree(tmp_path / "data", "mvtec")
    assert run("simplenet_mvtec", root, tmp_path / "out", "--seed", "20261126183000") == 0


@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, 16777216.0, 1e20])
def test_equal_and_nearly_equal_scores_are_drawn(tmp_path, value):
    scores = torch.full((12,), value)
    scores[3] = torch.nextafter(scores[3], torch.tensor(torch.inf))
    weighter = SoftConfidentWeighter()
    weighter.fit(scores)
    samples = [Sample(tmp_path / "x.png", None)] * 12
    report.draw_weights(weighter, samples, "title", tmp_path / "weights.png")
    assert (tmp_path / "weights.png").stat().st_size > 0


def test_the_unforeseen_is_one_line_with_a_file_to_report(tmp_path, monkeypatch, capsys):
    def fails(*_: object) -> None:
        raise KeyError("nobody\nknows")

    monkeypatch.setattr(cli, "_run", fails)
    assert cli.main("simplenet", "mvtec", ["--data-root", ".", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "unforeseen KeyError at test_people_files.py" in error
    assert "please report it" in error
    assert "Traceback" in (tmp_path / "error.txt").read_text()
    assert "--resize" in unforeseen(MemoryError(), tmp_path)
