"""Writing files so that a run killed on the way leaves the old one, and no two runs mix."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

_PARTIAL = ".partial"


class BusyError(ValueError):
    """A folder that another run writes to; the message is one for the user."""


def cache_folder() -> Path:
    """Where files that can be had again are kept: ``comet-meta`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comet-meta"


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
    partial = path.with_name(f"{path.name}.{uuid4().hex}{_PARTIAL}")
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


def _to_disk(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
