"""From picture files to tensors of one size."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from comet_examples.datasets.base import DatasetError, Sample


@dataclass(frozen=True)
class Transform:
    """Resize, then centre crop.

    Attributes:
        resize: Length of the shorter side in pixels (the aspect is kept), or (height, width).
        crop: Side of the centre crop in pixels, or (height, width); None for no crop.
    """

    resize: int | tuple[int, int]
    crop: int | tuple[int, int] | None = None

    def __call__(self, picture: Image.Image, *, nearest: bool = False) -> Image.Image:
        """The picture in its new size."""
        how = tvf.InterpolationMode.NEAREST if nearest else tvf.InterpolationMode.BILINEAR
        size = [self.resize] if isinstance(self.resize, int) else list(self.resize)
        picture = tvf.resize(picture, size, interpolation=how)
        if self.crop is None:
            return picture
        crop = [self.crop] * 2 if isinstance(self.crop, int) else list(self.crop)
        return tvf.center_crop(picture, crop)


def load_image(path: Path, transform: Transform) -> Tensor:
    """Read a picture as RGB.

    Single-channel pictures are repeated into three channels, 16-bit ones scaled to 8 bits,
    transparency and palettes resolved, and the camera's rotation (EXIF) applied.

    Args:
        path: The file.
        transform: Size to bring it to.

    Returns:
        The picture, uint8 (3, H, W).

    Raises:
        DatasetError: If the file can't be read as a picture.
    """
    picture = transform(_open(path))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def load_mask(sample: Sample, transform: Transform) -> Tensor:
    """Read the defective pixels of a sample.

    Args:
        sample: The sample; without a mask, no pixel is defective.
        transform: The transform of its picture.

    Returns:
        True where defective, bool (H, W).

    Raises:
        DatasetError: If picture or mask can't be read, or their sizes differ.
    """
    picture = _open(sample.path)
    if sample.mask is None:
        width, height = transform(picture).size
        return torch.zeros(height, width, dtype=torch.bool)
    mask = _open(sample.mask)
    if mask.size != picture.size:
        raise DatasetError(
            f"{sample.mask} is {mask.width} x {mask.height} pixels but its picture {sample.path} "
            f"is {picture.width} x {picture.height}; a mask must have its picture's size"
        )
    return torch.from_numpy(np.array(transform(mask, nearest=True))).amax(dim=2) > 0


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
                values = np.asarray(picture, dtype=np.float32)
                # Pillow clips 16-bit values when it converts them to 8 bits.
                picture = Image.fromarray((values / 257).clip(0, 255).round().astype(np.uint8))
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"can't read the picture {path}: {error}; replace or remove it"
        ) from error
