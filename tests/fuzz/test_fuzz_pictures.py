"""Pictures of random modes, depths, formats, EXIF, transparency and damage."""

import io
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import fuzz, is_a_sentence
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from comet_examples.datasets import (
    DatasetError,
    Sample,
    Split,
    Transform,
    load_image,
    load_mask,
    load_values,
    survey,
)

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = (9, 14)
WHOLE = Transform(SIZE)
arrays = st.integers(0, 2**32).map(
    lambda s: np.random.default_rng(s).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
)
GREY = {
    "png": {}, "bmp": {}, "tif": {"compression": "tiff_lzw"}, "tiff": {}, "gif": {}, "pgm": {},
    "tga": {}, "webp": {"lossless": True}, "jp2": {"irreversible": False}, "im": {}, "pcx": {},
}  # fmt: skip
COLOUR = {
    "png": {}, "bmp": {}, "dib": {}, "tif": {"compression": "tiff_deflate"}, "tiff": {},
    "ppm": {}, "tga": {}, "webp": {"lossless": True}, "jp2": {"irreversible": False}, "sgi": {},
    "pcx": {}, "apng": {},
}  # fmt: skip


def written(folder: str, image: Image.Image, ending: str, **options: object) -> Path:
    path = Path(folder) / f"x.{ending}"
    image.save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    return load_image(path, WHOLE).permute(1, 2, 0).numpy()


@fuzz(0.1)
@given(arrays, st.sampled_from([*GREY]), st.sampled_from([*COLOUR]))
def test_lossless_formats_give_the_same_picture(values, grey, colour):
    with tempfile.TemporaryDirectory() as folder:
        found = pixels(written(folder, Image.fromarray(values), colour, **COLOUR[colour]))
        assert np.array_equal(found, values)
        one = values[..., 0]
        found = pixels(written(folder, Image.fromarray(one), grey, **GREY[grey]))
        assert np.array_equal(found, one[..., None].repeat(3, axis=2))


@fuzz(0.08)
@given(
    st.lists(arrays, min_size=1, max_size=4), st.integers(0, 8), st.sampled_from("ui"), st.data()
)
def test_depth_changes_nothing_but_one_factor_for_the_folder(found, shift, kind, data):
    ending = data.draw(st.sampled_from(["png", "tif"])) if kind == "u" else "tif"
    with tempfile.TemporaryDirectory() as folder:
        samples = []
        for i, values in enumerate(found):
            deep = values[..., 0].astype(np.uint16 if kind == "u" else np.int32) << shift
            Image.fromarray(deep).save(path := Path(folder) / f"{i}.{ending}")
            samples.append(Sample(path, 0))
        known = survey(Split("x", tuple(samples), (), has_masks=False))
        transform = known.scaled(WHOLE)
        read = np.stack([load_values(sample.path, transform)[0].numpy() for sample in samples])
    truth = np.stack(found)[..., 0]
    factor = read.max() / truth.max()
    np.testing.assert_allclose(read, truth * factor, rtol=1e-5, atol=1e-3)
    assert 127 <= read.max() <= 255.01


@fuzz(0.08)
@given(
    arrays, arrays, st.sampled_from(["RGBA", "LA", "P"]), st.sampled_from(["png", "tif", "webp"])
)
def test_colours_under_transparency_do_not_matter(shown, hidden, mode, ending):
    clear = shown[..., 1] > 127
    with tempfile.TemporaryDirectory() as folder:
        read = []
        for other in (hidden, 255 - hidden):
            colours = np.where(clear[..., None], other, shown)
            image = Image.fromarray(colours if mode == "RGBA" else colours[..., 0])
            if mode == "P":
                # One index is transparent, whatever its colour is in the palette.
                index = np.where(clear, 0, np.maximum(shown[..., 0], 1)).astype(np.uint8)
                image = Image.fromarray(index)
                palette = np.arange(256).repeat(3).astype(np.uint8)
                palette[:3] = other[0, 0]
                image.putpalette(palette.tobytes())
                image.save(path := Path(folder) / "x.png", transparency=0)
            else:
                image.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
                if mode == "LA" and ending == "webp":
                    ending = "png"
                options = {"lossless": True, "exact": True} if ending == "webp" else {}
                path = written(folder, image, ending, **options)
            read.append(pixels(path))
    assert np.array_equal(*read)
    assert (read[0][clear] == 255).all()


@fuzz(0.08)
@given(
    st.integers(0, 2**32),
    st.sampled_from(["L", "1", "RGB", "RGBA", "LA", "P", "I;16", "jpg", "webp", "hidden"]),
    st.integers(1, 255),
)
def test_masks_mark_the_same_pixels_in_every_mode(number, mode, value):
    marks = np.random.default_rng(number).integers(0, 2, (4, 5)).repeat(8, axis=0).repeat(8, axis=1)
    grey = Image.fromarray((marks * (255 if mode in ("1", "jpg") else value)).astype(np.uint8))
    options = {}
    ending = mode if mode in ("jpg", "webp") else "png"
    if mode == "jpg":
        options = {"quality": 80}
    elif mode == "webp":
        options = {"lossless": True}
    elif mode == "I;16":
        grey = Image.fromarray((marks * value).astype(np.uint16))
    elif mode == "hidden":
        grey = Image.new("RGBA", grey.size, (200, 30, 255, 0))
        grey.putalpha(Image.fromarray((marks * 255).astype(np.uint8)))
    else:
        grey = grey.convert(mode)
    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", grey.size).save(picture := Path(folder) / "p.png")
        sample = Sample(picture, 1, written(folder, grey, ending, **options))
        assert np.array_equal(load_mask(sample, Transform((32, 40))).numpy(), marks > 0)


def _exif(draw: st.DataObject) -> bytes:
    block = Image.Exif()
    block[0x0112] = draw.draw(st.integers(1, 8))
    block[0x011A] = 300.0
    block[0x010F] = draw.draw(st.text(st.characters(codec="ascii"), max_size=12))
    block.get_ifd(0x8769)[0x829A] = 0.01
    content = block.tobytes()
    if draw.draw(st.booleans()):
        # A negative rational, which Pillow reads and can't write.
        content = content.replace(b"\x1a\x01\x05\x00", b"\x1a\x01\x0a\x00")
        content = content.replace(
            b"\x2c\x01\x00\x00\x01\x00\x00\x00", b"\xd4\xfe\xff\xff\x01\x00\x00\x00"
        )
    content = bytearray(content)
    for _ in range(draw.draw(st.integers(0, 6))):
        content[draw.draw(st.integers(6, len(content) - 1))] = draw.draw(st.integers(0, 255))
    return bytes(content)


@fuzz(0.09)
@given(arrays, st.data(), st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_no_exif_block_keeps_a_picture_from_being_read(values, data, kind):
    exif = _exif(data)
    content = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(values).save(content, kind, exif=exif, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x.{kind.lower()}"
        path.write_bytes(content.getvalue())
        found = load_image(path, Transform(9))
        (known,) = survey(Split("x", (Sample(path, 0),), (), has_masks=False)).faults or [None]
    assert known is None
    assert found.shape[0] == 3
    if kind != "JPEG":
        turned = [np.rot90(v, k) for v in (values, values.swapaxes(0, 1)) for k in range(4)]
        assert 9 in found.shape
        assert any(np.array_equal(found.permute(1, 2, 0).numpy(), t) for t in turned)


@fuzz(0.09)
@given(arrays, st.sampled_from([*COLOUR, "jpg", "gif", "mpo", "ico"]), st.data())
def test_damaged_files_are_read_or_get_a_sentence(values, ending, data):
    with tempfile.TemporaryDirectory() as folder:
        image = Image.fromarray(values)
        path = written(folder, image, ending, **COLOUR.get(ending, {}))
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content)))]
        for _ in range(data.draw(st.integers(0, 8))):
            if content:
                place = data.draw(st.integers(0, len(content) - 1))
                content[place] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fault = None
            try:
                assert load_image(path, Transform(8)).dtype == torch.uint8
            except DatasetError as error:
                fault = error
        assert fault is None or (path.name in str(fault) and is_a_sentence(fault))
