"""Writing files so that a run killed on the way leaves the old one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write aside, which takes the place of another once it is whole.

    Args:
        path: The file to replace or make; its folder is made where it is missing.

    Yields:
        The file to write. It is moved into place at the end, and removed if anything was raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
