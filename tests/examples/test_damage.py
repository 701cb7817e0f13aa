"""Pictures as they come: damaged, of every kind, under odd names, gone in the meantime."""

import io
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_scripts import EXAMPLES, SMALL, results, run, tree

from comet_examples import cli, experiment
from comet_examples.datasets import DATASETS, DatasetError, Transform, load_image
from comet_examples.results import fingerprint

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)


def encoded(kind: str, mode: str, **options: object) -> bytes:
    picture = Image.fromarray(PIXELS[..., :3]).convert(mode)
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


ENCODED = {
    "rgb.png": encoded("PNG", "RGB"),
    "palette.png": encoded("PNG", "P"),
    "rgba.png": encoded("PNG", "RGBA"),
    "rgb.jpg": encoded("JPEG", "RGB"),
    "cmyk.jpg": encoded("JPEG", "CMYK"),
    "rgb.bmp": encoded("BMP", "RGB"),
    "lzw.tif": encoded("TIFF", "RGB", compression="tiff_lzw"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ENCODED)
def test_damaged_pictures_are_read_or_named_and_nothing_else(tmp_path, name, capfd):
    # Sixty damages each.
    random.seed(name)
    file = tmp_path / name
    named = refused = 0
    for k in range(60):
        content = bytearray(ENCODED[name])
        if k % 3 == 0:
            content = content[: random.randrange(len(content))]
        else:
            for _ in range(random.choice([1, 5, 30])):
                content[random.randrange(len(content))] = random.randrange(256)
        file.write_bytes(content)
        try:
            assert load_image(file, Transform(16)).shape[0] == 3
        except DatasetError as error:
            named += f"{name}: " in str(error) and str(error).endswith("replace or remove it")
            refused += 1
    assert named == refused >= 15
    capfd.readouterr()  # the decoders' own complaints


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "LA"), ("PNG", "RGBA"), ("JPEG", "CMYK"), ("TIFF", "CMYK")]
)
def test_pictures_of_more_kinds_become_rgb(tmp_path, kind, mode):
    file = tmp_path / f"x.{kind.lower()}"
    file.write_bytes(encoded(kind, mode))
    found = load_image(file, Transform((24, 20)))
    expected = PIXELS[..., :3].astype(float)
    if mode == "LA":
        expected = expected @ np.array([[0.299], [0.587], [0.114]])
    # JPEG is lossy on noise: compare what is left of it after smoothing.
    difference = found.permute(1, 2, 0).numpy() - expected
    assert abs(difference.mean()) < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_rotation_and_flip_of_the_camera_is_undone(tmp_path, orientation):
    upright = Image.fromarray(np.kron(PIXELS[:3, :2, :3], np.ones((8, 8, 1), dtype=np.uint8)))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # shown rotated by 270 degrees
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = stored.getexif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    found = load_image(tmp_path / "x.png", Transform((24, 16)))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(upright))


ODD_NAMES = [
    "Ölfleck 日本 🔧",
    "-rf",
    "a'b\"c",
    "<img onerror=alert(1)>",
    "$x^{2$ 50 % {0}",
    "line\nfeed",
]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_of_folders_and_files(tmp_path, name, capsys):
    root = tree(tmp_path / "data", "mvtec", name)
    for path in sorted((root / name / "train" / "good").iterdir()):
        path.rename(path.with_name(f"{name} {path.name}"))
    assert run("simplenet_mvtec", root, tmp_path / "out") == 0
    suspects = results(tmp_path / "out")["methods"]["comet"]["suspects"]
    assert all(Path(suspect["path"]).is_file() for suspect in suspects)
    assert "failed" not in capsys.readouterr().err


def test_names_that_are_no_valid_utf8(tmp_path):
    folder = tmp_path / "data"
    try:
        tree(folder, "mvtec", os.fsdecode(b"caf\xe9"))
    except OSError:
        pytest.skip("this file system takes valid names only")
    script = [sys.executable, str(EXAMPLES / "simplenet_mvtec.py")]
    arguments = ["--data-root", str(folder), "--out", str(tmp_path / "out"), *SMALL]
    done = subprocess.run([*script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "caf\\udce9: 12 training pictures" in done.stdout
    assert len(results(tmp_path / "out")["methods"]["comet"]["suspects"]) == 12


def test_linked_pictures_are_read_and_dangling_links_named(tmp_path):
    folder = tmp_path / "pics"
    folder.mkdir()
    real = tmp_path / "real.png"
    real.write_bytes(ENCODED["rgb.png"])
    (folder / "a.png").symlink_to(real)
    (split_sample,) = DATASETS["folder"].load(folder, "pics").train
    assert load_image(split_sample.path, Transform(16)).shape == (3, 19, 16)
    (folder / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DatasetError, match=r"b\.png is a link to .*gone\.png, which isn't there"):
        DATASETS["folder"].load(folder, "pics")


def test_pipes_and_folders_that_are_called_like_pictures_are_left_out(tmp_path):
    (tmp_path / "a.png").write_bytes(ENCODED["rgb.png"])
    (tmp_path / "b.png").mkdir()
    os.mkfifo(tmp_path / "c.png")
    (sample,) = DATASETS["folder"].load(tmp_path, tmp_path.name).train
    assert sample.path.name == "a.png"


@pytest.mark.parametrize("when", ["before features", "before masks"])
def test_a_file_that_vanishes_gets_a_sentence(tmp_path, monkeypatch, capsys, undrawn, when):
    root = tree(tmp_path / "data", "mvtec")
    if when == "before features":
        victim = root / "part" / "train" / "good" / "003_0.png"
        place, name = experiment.FeatureStore, "get"
    else:
        victim = root / "part" / "ground_truth" / "hole" / "001_1_mask.png"
        place, name = experiment, "image_metrics"
    whole = getattr(place, name)

    def vanishing(*args, **kwargs):
        victim.unlink()
        return whole(*args, **kwargs)

    monkeypatch.setattr(place, name, vanishing)
    assert run("simplenet_mvtec", root, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "error: part: " in error
    assert victim.name in error
    assert "Traceback" not in error


def test_a_changed_picture_is_another_picture(tmp_path):
    root = tree(tmp_path / "data", "mvtec")
    split = DATASETS["mvtec"].load(root, "part")
    before = fingerprint(split.train)
    assert fingerprint(split.train) == before
    split.train[0].path.write_bytes(ENCODED["rgb.png"])
    assert fingerprint(split.train) != before


@pytest.mark.parametrize("content", [b"", b"P", ENCODED["rgb.png"][:200]])
def test_a_broken_picture_in_a_folder_stops_its_category_with_its_name(
    tmp_path, capsys, undrawn, content
):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(ENCODED["rgb.png"] if i else content)
    arguments = ["--dataset", "folder", "--data-root", str(tmp_path), "--out"]
    assert cli.main("simplenet", "mvtec", [*arguments, str(tmp_path / "out"), *SMALL]) == 1
    assert "0.png" in (error := capsys.readouterr().err)
    assert "replace or remove it" in error
