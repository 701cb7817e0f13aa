"""From picture files to tensors of one size."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from comet_meta.vision.pixels import read_marks, read_picture, scaled
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
        values: Lowest and highest value of pictures of more than 8 bits a channel, which become 0
            and 255. One range for all pictures of a folder, see :func:`survey`.

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
    values: tuple[float, float] = (0.0, 65535.0)

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


SQUARE = Transform((256, 256), keep_aspect=True)
"""What square pictures are brought to, where nothing else is asked for."""

_STRIDE = 16  # of the coarsest of the levels in use: sides that it divides are used whole


def common_shape(shapes: Iterable[tuple[int, int]], pixels: int) -> tuple[int, int]:
    """The size that all pictures of a set are brought to: so many pixels, in their own shape.

    1. The shape is the median of height / width.
    2. Height and width have that ratio, and about ``pixels`` as their product.
    3. Both are rounded to the nearest multiple of 16, and are at least 32.

    Args:
        shapes: Height and width of each picture. None gives a square.
        pixels: Height x width to aim at, >= 1.

    Returns:
        Height and width.

    Example:
        >>> common_shape([(1024, 1024)], 256 * 256), common_shape([(630, 230)], 256 * 256)
        ((256, 256), (416, 160))
    """
    ratios = [height / width for height, width in shapes]
    ratio = float(np.median(ratios)) if ratios else 1.0
    height, width = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
    return _rounded(height), _rounded(width)


def _rounded(side: float) -> int:
    return max(2, round(side / _STRIDE)) * _STRIDE


def load_image(path: Path, transform: Transform) -> Tensor:
    """Read a picture as RGB of 8 bits, to be shown.

    Single-channel pictures are repeated into three channels, deeper ones scaled and rounded,
    palettes resolved, transparent ones laid on white, and the camera's rotation (EXIF) applied.

    Args:
        path: The file.
        transform: Size to bring it to, and range of the values of deeper pictures.

    Returns:
        The picture, uint8 (3, H, W).

    Raises:
        DatasetError: If the file can't be read as a picture, or the crop is larger than the resized
            picture.
    """
    values = load_values(path, transform)
    return values if values.dtype == torch.uint8 else values.clamp(0, 255).round().byte()


def load_values(path: Path, transform: Transform) -> Tensor:
    """Read a picture as RGB in its full depth, to compute features.

    Args:
        path: The file.
        transform: Size to bring it to, and range of the values of deeper pictures.

    Returns:
        The picture, shape (3, H, W): uint8, as :func:`load_image` gives it, or float32 where it has
        more than 8 bits a channel. Then values outside of the transform's range come out below 0
        and above 255.

    Raises:
        DatasetError: If the file can't be read as a picture, or the crop is larger than the resized
            picture.
    """
    picture = read_picture(path)
    if isinstance(picture, Image.Image):
        return _tensor(transform(picture))
    deep = scaled(picture.values, transform.values)
    channels = [deep] if deep.ndim == 2 else [deep[..., c] for c in range(3)]
    resized = [_tensor(transform(Image.fromarray(channel))) for channel in channels]
    return torch.cat(resized).expand(3, -1, -1).contiguous()


def load_mask(sample: Sample, transform: Transform) -> Tensor:
    """Read the defective pixels of a sample.

    Args:
        sample: The sample; without a mask, no pixel is defective. In a mask, any value above 0 is;
            in one of a lossy format, any in the upper half. What is transparent isn't.
        transform: The transform of its picture.

    Returns:
        True where defective, bool (H, W).

    Raises:
        DatasetError: If picture or mask can't be read, their sizes differ, or the crop is larger
            than the resized picture.
    """
    size = read_picture(sample.path).size
    if sample.mask is None:
        width, height = transform(Image.new("1", size)).size
        return torch.zeros(height, width, dtype=torch.bool)
    return (
        torch.from_numpy(np.array(transform(_marks(sample.mask, sample.path, size), mask=True))) > 0
    )


def has_defect(mask: Path) -> bool:
    """Whether a mask marks any pixel, read as :func:`load_mask` reads it.

    Args:
        mask: The mask's file.

    Returns:
        True if any pixel is marked, however faint.

    Raises:
        DatasetError: If the file can't be read as a picture.
    """
    return read_marks(mask).getbbox() is not None


def check_mask(sample: Sample, size: tuple[int, int]) -> None:
    """Read a sample's mask as :func:`load_mask` will.

    Args:
        sample: The sample.
        size: Width and height of its picture.

    Raises:
        DatasetError: If the mask can't be read, or its size is another.
    """
    if sample.mask is not None:
        _marks(sample.mask, sample.path, size)


def _marks(path: Path, picture: Path, size: tuple[int, int]) -> Image.Image:
    mask = read_marks(path)
    if mask.size != size:
        raise DatasetError(
            f"{path} is {mask.width} x {mask.height} pixels but its picture {picture} "
            f"is {size[0]} x {size[1]}; a mask must have its picture's size"
        )
    return mask


def _tensor(picture: Image.Image) -> Tensor:
    """Channels first, (C, H, W)."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()
