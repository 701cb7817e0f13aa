"""The ranking of a folder under changes that mean nothing."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from comet_examples.datasets import DATASETS, Transform, load_values, survey
from comet_meta.vision.picture_prior import memory_prior

pytestmark = pytest.mark.filterwarnings("ignore")
COUNT = 12
FILTERS = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) / 48
CHANGES = ["bmp", "tif", "webp", "ppm", "16 bits", "float", "transparent", "renamed", "turned"]


def scores(folder: Path) -> torch.Tensor:
    """The scores of a folder's pictures, by 8 fixed filters over blocks of 4 pixels."""
    split = DATASETS["folder"].load(folder, folder.name)
    transform = survey(split).scaled(Transform(32))
    load = partial(load_values, transform=transform)
    images = torch.stack([load(s.path).float() for s in split.train]) / 255
    return memory_prior([[F.conv2d(images, FILTERS, stride=4)]], len(images))


def save(folder: Path, i: int, pixels: np.ndarray, change: str) -> None:
    image = Image.fromarray(pixels)
    if change == "renamed":
        image.save(folder / f"é new name {i:02d}.png")
    elif change == "16 bits":
        Image.fromarray(pixels[..., 0].astype(np.uint16) << 4).save(folder / f"{i:02d}.png")
    elif change == "float":
        Image.fromarray((pixels[..., 0] / 255).astype(np.float32)).save(folder / f"{i:02d}.tif")
    elif change == "transparent":
        image.putalpha(255)
        image.save(folder / f"{i:02d}.png")
    elif change == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(folder / f"{i:02d}.png", exif=exif)
    else:
        options = {"lossless": True} if change == "webp" else {}
        image.save(folder / f"{i:02d}.{change}", **options)


@fuzz(0.08)
@given(st.integers(0, 2**32), st.sampled_from(CHANGES))
def test_harmless_changes_keep_the_ranking(number, change):
    generator = np.random.default_rng(number)
    # Every pixel differs: among patches that are copies of each other all distances are rounding.
    grey = generator.integers(60, 120, (COUNT, 32, 32))
    grey[5, 8:20, 8:20] = 250
    pictures = np.repeat(grey[..., None], 3, axis=3).astype(np.uint8)
    with tempfile.TemporaryDirectory() as temporary:
        first, second = Path(temporary) / "a", Path(temporary) / "b"
        for folder, kind in ((first, "png"), (second, change)):
            folder.mkdir()
            for i, pixels in enumerate(pictures):
                save(folder, i, pixels, kind)
        before, after = scores(first), scores(second)
    assert int(before.argmax()) == 5
    assert torch.equal(before.argsort(descending=True), after.argsort(descending=True))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=0)


def test_a_defect_on_flat_pictures_is_found():
    # Most patches are exact copies of others, as on the plain ground of a cut-out.
    generator = np.random.default_rng(1472)
    grey = generator.integers(60, 120, (COUNT, 8, 8)).repeat(4, axis=1).repeat(4, axis=2)
    grey[5, 8:20, 8:20] = 250
    images = torch.from_numpy(grey).float()[:, None].expand(-1, 3, -1, -1) / 255
    assert int(memory_prior([[F.avg_pool2d(images, 4)]], COUNT).argmax()) == 5
