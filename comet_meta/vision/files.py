"""Write files so that a killed run leaves the old file whole, and two runs don't mix."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from comet_meta.vision.samples import OUTPUT_MARK

_PARTIAL = ".partial"


class CacheError(ValueError):
    """No folder for the cache; the message is for the user."""


class BusyError(ValueError):
    """A folder that another run writes to; the message is for the user."""


def cache_folder() -> Path:
    """``comet-meta`` in the user's cache: for files that can be computed or downloaded again.

    Raises:
        CacheError: If it can't be made.
    """
    set_by_user = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(set_by_user or Path.home() / ".cache") / "comet-meta"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise CacheError(
            f"there's no folder for the cache: {error}; set XDG_CACHE_HOME to a folder that can be "
            "written"
        ) from error
    return folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write aside, which takes the place of another once it is whole and on the disk.

    Args:
        path: The file to replace or make; its folder is made where it is missing.

    Yields:
        The file to write. It is moved into place at the end, and removed if anything was raised. A
        process that is killed leaves it behind, with a name that ends in ``.partial``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{uuid4().hex}{_PARTIAL}")  # short: the name may fill what is allowed
    try:
        yield partial
        # Without this, a power cut could leave the new name with the contents still to come.
        _to_disk(partial, os.O_RDWR)
        partial.replace(path)
        with suppress(OSError):  # not every system opens folders
            _to_disk(path.parent, os.O_RDONLY)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder.

    Args:
        folder: The folder; made where it is missing. What a killed run left half written in it is
            removed. The lock itself, ``.lock``, is let go however the process ends.

    Raises:
        BusyError: If another run has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # By this mark no run takes pictures from the folder. One that holds something already isn't
    # marked: that may be pictures.
    if not any(folder.iterdir()):
        (folder / OUTPUT_MARK).touch()
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise BusyError(
            f"another run is writing to {folder}; wait for it, or give another folder"
        ) from None
    try:
        for stray in folder.glob(f"*{_PARTIAL}"):
            stray.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def unforeseen(error: Exception, folder: Path) -> str:
    """A sentence on an error that nobody foresaw, whose details go into a file.

    Args:
        error: What was raised.
        folder: Where the file goes; made where it is missing.

    Returns:
        The sentence: what happened where, and how to report it.
    """
    reason = " ".join(str(error).split()) or "no reason given"
    if isinstance(error, MemoryError) or "out of memory" in reason.lower():
        return f"out of memory ({reason}); take smaller pictures by --resize, or --half-features"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    what = f"unforeseen {type(error).__name__}{place}: {reason}"
    file = folder / "error.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        file.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    except OSError:
        return f"{what}; please report it with the command that you ran"
    return f"{what}; the details are in {file}: please report it with them and your command"


def _to_disk(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
