"""From picture files to tensors of one size."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from comet_meta.vision.samples import DatasetError, Sample


@dataclass(frozen=True)
class Transform:
    """Resize, then centre crop.

    Pictures that differ in size come out in one size with a crop, or with a ``resize`` of (height,
    width). The latter stretches them unless ``keep_aspect``: then they are made as large as fits,
    centred, and padded by repeating the pixels at their edges. In masks the padding is normal, also
    where a defect at the edge is repeated, and pixel metrics count it.

    Attributes:
        resize: Length of the shorter side in pixels (the aspect is kept), or (height, width).
        crop: Side of the centre crop in pixels, or (height, width); None for no crop.
        keep_aspect: Whether a ``resize`` of (height, width) pads instead of stretching.

    Raises:
        ValueError: If a size is not positive, or ``keep_aspect`` comes without (height, width).

    Example:
        >>> tall = Image.new("L", (20, 60))
        >>> Transform(10)(tall).size, Transform((32, 16), keep_aspect=True)(tall).size
        ((10, 30), (16, 32))
    """

    resize: int | tuple[int, int]
    crop: int | tuple[int, int] | None = None
    keep_aspect: bool = False

    def __post_init__(self) -> None:
        if self.keep_aspect and isinstance(self.resize, int):
            raise ValueError(
                f"keep_aspect needs resize=(height, width), got {self.resize}, which keeps the "
                "aspect anyway and doesn't pad"
            )
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            sides = (size,) if isinstance(size, int) else size or ()
            if any(side < 1 for side in sides):
                raise ValueError(f"{name} is {size}; expected at least 1 pixel")

    def __call__(self, picture: Image.Image, *, mask: bool = False) -> Image.Image:
        """The picture in its new size.

        Args:
            picture: The picture as it was read.
            mask: Whether it is a mask: pixels are then taken from the nearest one instead of
                interpolated, and padding is 0.

        Returns:
            The resized, padded and cropped picture.

        Raises:
            DatasetError: If the crop is larger than the resized picture.
        """
        how = tvf.InterpolationMode.NEAREST if mask else tvf.InterpolationMode.BILINEAR
        size = [self.resize] if isinstance(self.resize, int) else list(self.resize)
        if not self.keep_aspect:
            picture = tvf.resize(picture, size, interpolation=how)
        else:
            height, width = size
            scale = min(height / picture.height, width / picture.width)
            inner = [max(1, round(scale * side)) for side in (picture.height, picture.width)]
            top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
            picture = tvf.pad(
                tvf.resize(picture, inner, interpolation=how),
                [left, top, width - inner[1] - left, height - inner[0] - top],
                padding_mode="constant" if mask else "edge",
            )
        if self.crop is None:
            return picture
        crop = [self.crop] * 2 if isinstance(self.crop, int) else list(self.crop)
        if crop[0] > picture.height or crop[1] > picture.width:
            raise DatasetError(
                f"the crop of {crop[1]} x {crop[0]} pixels is larger than the resized picture, "
                f"{picture.width} x {picture.height}; take a smaller crop or a larger resize"
            )
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
        DatasetError: If the file can't be read as a picture of 8 or 16 bits, or the crop is larger
            than the resized picture.
    """
    picture = transform(_read(path, _rgb))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def load_mask(sample: Sample, transform: Transform) -> Tensor:
    """Read the defective pixels of a sample.

    Args:
        sample: The sample; without a mask, no pixel is defective. In a mask, any value above 0 is.
        transform: The transform of its picture.

    Returns:
        True where defective, bool (H, W).

    Raises:
        DatasetError: If picture or mask can't be read, their sizes differ, or the crop is larger
            than the resized picture.
    """
    picture = _read(sample.path, _rgb)
    if sample.mask is None:
        width, height = transform(picture).size
        return torch.zeros(height, width, dtype=torch.bool)
    mask = _read(sample.mask, _defective)
    if mask.size != picture.size:
        raise DatasetError(
            f"{sample.mask} is {mask.width} x {mask.height} pixels but its picture {sample.path} "
            f"is {picture.width} x {picture.height}; a mask must have its picture's size"
        )
    return torch.from_numpy(np.array(transform(mask, mask=True))) > 0


def has_defect(mask: Path) -> bool:
    """Whether a mask marks any pixel, read as :func:`load_mask` reads it.

    Args:
        mask: The mask's file.

    Returns:
        True if any value is above 0, however faint.

    Raises:
        DatasetError: If the file can't be read as a picture.
    """
    return _read(mask, _defective).getbbox() is not None


def _read(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with Image.open(path) as file:
            return convert(ImageOps.exif_transpose(file))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"can't read the picture {path}: {error}; replace or remove it"
        ) from error


def _rgb(picture: Image.Image) -> Image.Image:
    if _is_deep(picture):
        values = np.asarray(picture, dtype=np.float32)
        low, high = values.min(), values.max()
        if picture.mode == "F" or low < 0 or high > 65535:
            raise ValueError(f"values from {low:g} to {high:g}, expected 8 or 16 bits a pixel")
        # Pillow clips 16-bit values when it converts them to 8 bits.
        picture = Image.fromarray((values / 257).round().astype(np.uint8))
    return picture.convert("RGB")


def _defective(mask: Image.Image) -> Image.Image:
    # Before any scaling of values or pixels, so that the faintest mark counts.
    marks = np.asarray(mask if _is_deep(mask) else mask.convert("RGB")) > 0
    return Image.fromarray((marks if marks.ndim == 2 else marks.any(axis=2)).astype(np.uint8))


def _is_deep(picture: Image.Image) -> bool:
    """Whether it has one channel of more than 8 bits."""
    return picture.mode in ("I", "F") or picture.mode.startswith("I;16")
