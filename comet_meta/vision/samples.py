"""What every data set yields: samples, and one category's split into training and test set."""

from dataclasses import dataclass
from pathlib import Path

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


class DatasetError(ValueError):
    """Data that can't be used; the message is one for the user."""


@dataclass(frozen=True)
class Sample:
    """One picture.

    Attributes:
        path: The picture's file.
        label: 0 normal, 1 anomalous, None unknown. In a training set it is hidden from training
            and serves only to judge the outcome.
        mask: Ground-truth picture (> 0 where defective); None where there is none to have (normal
            pictures) or none was made.
        defect: Name of the kind of defect, ``"good"`` for none.
        group: Names the object; pictures of one object share it. None: a picture of its own.
    """

    path: Path
    label: int | None
    mask: Path | None = None
    defect: str = "good"
    group: str | None = None


@dataclass(frozen=True)
class Split:
    """Training and test set of one category.

    Attributes:
        category: Its name.
        train: Training pictures, mostly normal.
        test: Test pictures, normal and anomalous.
        has_masks: Whether anomalous test pictures have ground-truth masks.
    """

    category: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    has_masks: bool


def image_files(folder: Path) -> list[Path]:
    """Picture files of a folder by name, hidden ones left out.

    Args:
        folder: An existing folder; it is not searched recursively.

    Returns:
        The files, sorted by name.

    Raises:
        DatasetError: If one is a link to a file that isn't there.
    """
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
    )
    for path in found:
        if path.is_symlink() and not path.exists():
            raise DatasetError(
                f"{path} is a link to {path.readlink()}, which isn't there; restore or remove it"
            )
    return [path for path in found if path.is_file()]


def subfolders(folder: Path) -> list[Path]:
    """Folders of a folder by name, hidden ones left out.

    Args:
        folder: An existing folder.

    Returns:
        The folders in it, sorted by name.
    """
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
