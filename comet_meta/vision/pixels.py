"""The pixels of a picture's file: upright, on one ground, in full depth."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from comet_meta.vision.samples import DatasetError

_ORIENTATION = 0x0112
_SWAPS_SIDES = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
_BITS_PER_SAMPLE, _SAMPLE_FORMAT = 258, 339  # tags of TIFF
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GROUND = 255  # what shows through where a picture is transparent: white, as on paper
_LOSSY = {"JPEG", "MPO", "JPEG2000", "AVIF"}
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Deep:
    """A picture of more than 8 bits a channel, upright.

    Attributes:
        values: As the file has them, (H, W) or (H, W, 3); NaN where it is transparent.
        whole: Whether all of them are whole numbers, as of a camera.
    """

    values: Array
    whole: bool

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.values.shape[1], self.values.shape[0]


def read_picture(path: Path) -> Image.Image | Deep:
    """Read a picture.

    Args:
        path: The file; of several pages the first counts.

    Returns:
        The picture upright and without transparency, in mode ``RGB``, or in full depth.

    Raises:
        DatasetError: If it can't be read.
    """
    with _opened(path) as file:
        deep = _deep_colour(path, file)
        picture, turn = _decoded(file)
        if deep is None and is_deep(picture):
            deep = np.asarray(picture, dtype=np.float32)
            clear = picture.info.get("transparency")
            finite = np.isfinite(deep)
            if not finite.all():
                raise ValueError(f"{(~finite).sum()} of its values are NaN or infinite")
            if isinstance(clear, int):
                deep = np.where(deep == clear, np.float32(np.nan), deep)
        if deep is not None:
            whole = bool(np.array_equal(deep.round(), deep, equal_nan=True))
            return Deep(_turned(deep, turn), whole)
        shown = _on_ground(picture, _GROUND).convert("RGB")
        return shown if turn is None else shown.transpose(turn)


def read_marks(path: Path) -> Image.Image:
    """Read the marked pixels of a mask.

    Any value above 0 is a mark, however faint, unless the file's format changes values a little
    (JPEG and the like): then only the upper half of the range is. What is transparent is not
    marked. A mask in black that only its transparency tells from the ground is marked where it's
    not transparent.

    Args:
        path: The file.

    Returns:
        1 where marked, 0 elsewhere, mode ``L``.

    Raises:
        DatasetError: If it can't be read.
    """
    with _opened(path) as file:
        least = 127 if _is_lossy(path, file) else 0
        deep = _deep_colour(path, file)
        picture, turn = _decoded(file)
        if deep is not None or is_deep(picture):
            values = np.asarray(picture, dtype=np.float32) if deep is None else deep
            marks = values > 0  # NaN, where it's transparent, isn't
        else:
            marks = np.asarray(_on_ground(picture, 0).convert("RGB")) > least
            if has_transparency(picture) and not marks.any():
                alpha = np.asarray(picture.convert("RGBA"))[..., 3]
                marks = (alpha > least) & (alpha.min() < alpha.max())
        flat = marks if marks.ndim == 2 else np.asarray(marks.any(axis=2))
        return Image.fromarray(_turned(flat.astype(np.uint8), turn))


@contextmanager
def largest_picture(megapixels: int | None) -> Iterator[None]:
    """Set the size above which a picture is refused, since it may be a bomb.

    Args:
        megapixels: Millions of pixels; None leaves Pillow's limit, 178.
    """
    usual = Image.MAX_IMAGE_PIXELS
    if megapixels is not None:
        # Pillow warns above the number and refuses above twice of it.
        Image.MAX_IMAGE_PIXELS = megapixels * 1_000_000 // 2
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = usual


def is_deep(picture: Image.Image) -> bool:
    """Whether it has one channel of more than 8 bits."""
    return picture.mode in ("I", "F") or picture.mode.startswith("I;16")


def has_transparency(picture: Image.Image) -> bool:
    """Whether some of its pixels may be transparent, in any of Pillow's ways to say so."""
    return picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info


@dataclass(frozen=True)
class Extremes:
    """Extremes and percentiles of a picture's values, and whether they are whole numbers."""

    low: float
    high: float
    usual_low: float
    usual_high: float
    whole: bool


def joint_range(found: Sequence[Extremes]) -> tuple[float, float] | None:
    """The range of values that deep pictures of a folder share.

    Whole numbers from 0 to 65535 are those of a camera or a scanner: from 0 to the highest value of
    the fewest bits, but at least 8, that hold all of them. Other values in [0, 1] are shares.
    Anything else goes from the lowest to the highest of the pictures' 0.1st and 99.9th percentiles.

    Args:
        found: Extremes of each deep picture.

    Returns:
        The lowest and the highest value, or None if no picture is deep.

    Example:
        >>> joint_range([Extremes(8, 1020, 8, 1020, True), Extremes(0, 500, 0, 500, True)])
        (0.0, 1023.0)
    """
    if not found:
        return None
    low, high = min(each.low for each in found), max(each.high for each in found)
    if low >= 0 and high <= 65535 and all(each.whole for each in found):
        return 0.0, float(2 ** max(8, int(high).bit_length()) - 1)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return min(each.usual_low for each in found), max(each.usual_high for each in found)


def extremes(picture: Deep) -> Extremes:
    """Extremes of a picture's values; 0 if all of it is transparent."""
    values = picture.values[np.isfinite(picture.values)]
    if not values.size:
        return Extremes(0, 0, 0, 0, whole=True)
    low, usual_low, usual_high, high = np.quantile(values, [0, 0.001, 0.999, 1]).tolist()
    return Extremes(low, high, usual_low, usual_high, picture.whole)


def scaled(deep: Array, values: tuple[float, float]) -> Array:
    """Values (H, W) or (H, W, C) with the range brought to [0, 255], unrounded and unclipped."""
    low, high = values
    span = high - low if high > low else 1.0
    result = (deep.astype(np.float64) - low) * (255 / span)
    return np.where(np.isnan(result), _GROUND, result).astype(np.float32)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture's file; whatever is wrong with it is raised as a sentence."""
    try:
        with Image.open(path) as file:
            yield file
    except DatasetError:
        raise
    except Image.DecompressionBombError as error:
        raise DatasetError(
            f"can't read the picture {path}: {error}; if you trust the file, allow its size by "
            "--max-megapixels, otherwise replace or remove it"
        ) from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DatasetError(
            f"can't read the picture {path}: {reason}; replace or remove it"
        ) from error


def _decoded(file: Image.Image) -> tuple[Image.Image, Image.Transpose | None]:
    """The pixels as stored, and the turn that sets them upright.

    Of EXIF only the orientation is taken. Other entries may be such that Pillow can't read or
    rewrite them, and nothing depends on them.
    """
    turn = _turn(file)
    try:
        file.load()
    except Exception:
        # The decoder is done when no tile is left: then only what comes after, EXIF, was damaged.
        if getattr(file, "tile", None):
            raise
    return _as_meant(file), turn


def _turn(file: Image.Image) -> Image.Transpose | None:
    """The turn that sets a picture upright; taken from its EXIF, where it's gone then."""
    try:
        # Removed so that Pillow's reader of TIFF doesn't turn the picture itself.
        orientation: Any = file.getexif().pop(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - as many kinds as there are ways to damage a block
        return None
    return _UNDO.get(orientation) if isinstance(orientation, int) else None


def _as_meant(file: Image.Image) -> Image.Image:
    """A copy of a picture whose values are the file's, where Pillow takes their sign amiss (TIFF).

    Whole numbers of 32 bits without a sign become floats, those of 8 bits with a sign are shifted
    by 128.
    """
    tags: Any = getattr(file, "tag_v2", None) or {}
    signed = set(tags.get(_SAMPLE_FORMAT, (1,))) == {2}
    bits = set(tags.get(_BITS_PER_SAMPLE, (1,)))
    if file.mode == "I" and bits == {32} and not signed:
        return Image.fromarray(np.asarray(file).view(np.uint32).astype(np.float32))
    if file.mode == "L" and bits == {8} and signed:
        return Image.fromarray(np.asarray(file) ^ np.uint8(128))
    return file.copy()


def _deep_colour(path: Path, file: Image.Image) -> Array | None:
    """Values (H, W, 3) of a PNG of 16 bits a channel, of which Pillow keeps the upper 8."""
    if file.format != "PNG" or is_deep(file) or not _keeps_upper_bits(file):
        return None
    content = torch.from_numpy(np.frombuffer(path.read_bytes(), dtype=np.uint8).copy())
    values = decode_image(content, mode=ImageReadMode.UNCHANGED).to(torch.int32)
    deep = values.permute(1, 2, 0).numpy().astype(np.float32)
    clear = file.info.get("transparency")
    opaque = np.ones(deep.shape[:2], dtype=np.float32)
    if deep.shape[2] in (2, 4):
        opaque = deep[..., -1] / 65535
        deep = deep[..., :-1]
    elif isinstance(clear, tuple):
        opaque = (deep != np.array(clear, dtype=np.float32)).any(axis=2).astype(np.float32)
    deep = np.broadcast_to(deep, (*deep.shape[:2], 3)).copy()
    # Half of a pixel can't be NaN: it counts as what its larger part is.
    deep[opaque < 0.5] = np.nan
    return deep


def has_more_than_8_bits(path: Path) -> bool:
    """Whether a file has more than 8 bits a channel, by its head alone."""
    with _opened(path) as file:
        return is_deep(file) or _keeps_upper_bits(file)


def upright_shape(path: Path) -> tuple[int, int]:
    """Height and width of an upright picture, by its file's head alone."""
    with _opened(path) as file:
        lies = _turn(file) in _SWAPS_SIDES
        return (file.width, file.height) if lies else (file.height, file.width)


def keeps_upper_bits_only(path: Path) -> bool:
    """Whether a file has 16 bits a channel in colour of which 8 are read: any but PNG."""
    with _opened(path) as file:
        return file.format != "PNG" and not is_deep(file) and _keeps_upper_bits(file)


def _keeps_upper_bits(file: Image.Image) -> bool:
    return any(";16" in str(tile[3]) for tile in getattr(file, "tile", ()))


def _on_ground(picture: Image.Image, grey: int) -> Image.Image:
    if not has_transparency(picture):
        return picture
    ground = Image.new("RGBA", picture.size, (grey, grey, grey, 255))
    return Image.alpha_composite(ground, picture.convert("RGBA"))


def _turned(values: npt.NDArray[Any], turn: Image.Transpose | None) -> npt.NDArray[Any]:
    return np.ascontiguousarray(_TURNS[turn](values)) if turn is not None else values


_TURNS: dict[Any, Any] = {
    Image.Transpose.FLIP_LEFT_RIGHT: np.fliplr,
    Image.Transpose.ROTATE_180: lambda x: np.rot90(x, 2),
    Image.Transpose.FLIP_TOP_BOTTOM: np.flipud,
    Image.Transpose.TRANSPOSE: lambda x: x.swapaxes(0, 1),
    Image.Transpose.ROTATE_270: lambda x: np.rot90(x, 3),
    Image.Transpose.TRANSVERSE: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    Image.Transpose.ROTATE_90: lambda x: np.rot90(x, 1),
}


def _is_lossy(path: Path, file: Image.Image) -> bool:
    if file.format == "TIFF":
        return file.info.get("compression") in ("jpeg", "webp", "tiff_jpeg")
    if file.format == "WEBP":
        return not _is_lossless_webp(path.read_bytes())
    return file.format in _LOSSY


def _is_lossless_webp(content: bytes) -> bool:
    """Whether the first picture of a WebP is coded without loss: chunk ``VP8L``."""
    place = 12
    while place + 8 <= len(content):
        name = content[place : place + 4]
        if name in (b"VP8L", b"VP8 "):
            return name == b"VP8L"
        if name == b"ANMF":  # a frame: its own chunks follow 16 bytes of head
            place += 8 + 16
            continue
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
    return False


def pages(file: Image.Image) -> int:
    """How many pictures a file holds; 1 where that can't be told."""
    try:
        return int(getattr(file, "n_frames", 1))
    except Exception:  # noqa: BLE001 - a damaged list of pages: the first one decides
        return 1
