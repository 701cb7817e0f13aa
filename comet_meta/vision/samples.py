"""What every data set yields: samples, and one category's split into training and test set."""

import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

_LOGGER = logging.getLogger(__name__)
OUTPUT_MARK = ".comet-meta-results"  # an empty file in every folder that a run writes to
# The pictures that a run draws, which may lie among the data if somebody chose that folder.
_DRAWN = re.compile(r"(plain|oracle|paper|comet)_(weights|maps|suspects|suspect_maps)\.png$")
# Registered by Pillow, but no pictures, or read only with the help of other programs or systems.
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
# Made by storage devices, systems and viewers beside the pictures that people put there.
_SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "@recycle", "$recycle.bin", "lost+found", "__macosx", "__pycache__"),
    *("system volume information", "thumbnails", "thumbs", "thumbnail", "_thumbs", "_thumbnails"),
}


class DatasetError(ValueError):
    """Data that can't be used; the message is for the user."""


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


@cache
def suffixes() -> frozenset[str]:
    """What the names of pictures end with, in lower case: all that Pillow reads by itself."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(end for end, kind in known if kind in Image.OPEN and kind not in _NOT_READ)


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
        if path.suffix.lower() in suffixes() and not path.name.startswith(".")
    )
    for path in found:
        if path.is_symlink() and not path.exists():
            raise DatasetError(
                f"{path} is a link to {path.readlink()}, which isn't there; restore or remove it"
            )
    drawn = is_output(folder)
    return [path for path in found if path.is_file() and not (drawn and _DRAWN.match(path.name))]


def subfolders(folder: Path, *, outputs: bool = False) -> list[Path]:
    """Folders of a folder by name.

    Left out are hidden ones, those that storage devices, systems and viewers make (``@eaDir``,
    ``__MACOSX``, ``thumbnails`` ...), and results of earlier runs.

    Args:
        folder: An existing folder.
        outputs: Whether folders with results count: the data may lie in one of them.

    Returns:
        The folders in it, sorted by name.
    """
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir()
        and not path.name.startswith(".")
        and path.name.casefold() not in _SYSTEM_FOLDERS
        and (outputs or not is_output(path))
    )


def pictures_below(folder: Path) -> list[Path]:
    """Pictures of a folder and of those below it.

    Links are followed, every folder is read once. What is no picture is counted in the log.

    Args:
        folder: An existing folder.

    Returns:
        The files, those of a folder before those of the folders in it, each sorted by name.

    Raises:
        DatasetError: If one is a link to a file that isn't there.
    """
    others: Counter[str] = Counter()
    found = _pictures_in(folder, set(), others)
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        _LOGGER.warning(
            "%s: left out %d files that are no pictures which can be read (%s)",
            *(folder, others.total(), kinds),
        )
    return found


def is_output(folder: Path) -> bool:
    """Whether a folder holds results of an earlier run, whose pictures are none of the data."""
    try:
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (folder / OUTPUT_MARK).exists()
    return isinstance(content, dict) and {"settings", "methods"} <= set(content)


def composed_name(name: str) -> str:
    """A name by which files of one name find each other, whatever form their accents have.

    Args:
        name: As the file system has it.

    Returns:
        Its composed form.

    Example:
        >>> composed_name("u\u0308ber") == composed_name("\u00fcber")
        True
    """
    return unicodedata.normalize("NFC", name)


def find_by_name(paths: Iterable[Path], name: str) -> Path | None:
    """The one of some paths that has a name, in any form of accents and, failing that, any case.

    Args:
        paths: Candidates.
        name: The name looked for.

    Returns:
        The path, or None.
    """
    candidates = list(paths)
    for form in (composed_name, lambda text: composed_name(text).casefold()):
        for path in candidates:
            if form(path.name) == form(name):
                return path
    return None


def _pictures_in(folder: Path, seen: set[Path], others: Counter[str]) -> list[Path]:
    if folder.resolve() in seen:
        return []
    seen.add(folder.resolve())
    own = image_files(folder)
    for path in folder.iterdir():
        if (
            path.is_file()
            and not path.name.startswith(".")
            and path.suffix.lower() not in suffixes()
        ):
            others[path.suffix.lower() or "without an ending"] += 1
    return [
        *own,
        *(path for inner in subfolders(folder) for path in _pictures_in(inner, seen, others)),
    ]
