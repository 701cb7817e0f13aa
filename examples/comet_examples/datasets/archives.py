"""Zip archives of data sets, unpacked without trusting them."""

import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from uuid import uuid4

from comet_meta.vision.samples import DatasetError

_MOST_FILES = 1_000_000
# Pictures are compressed already; a bomb is made of what compresses a thousandfold.
_MOST_EXPANSION = 100
_ALWAYS_ALLOWED = 64 * 2**20
_COPIED_AT_ONCE = 2**20
_FAULTS = (
    *(OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error),
    *(NotImplementedError, RuntimeError),  # zipfile's, for methods and encryption it doesn't have
)


def unpack_missing(root: Path) -> None:
    """Unpack every ``<name>.zip`` of a folder that has no folder ``<name>`` beside it.

    Args:
        root: The folder.

    Raises:
        DatasetError: If an archive can't be unpacked, see :func:`unpack`.
    """
    for archive in sorted(root.glob("*.zip")):
        if not archive.with_suffix("").exists():
            unpack(archive, archive.with_suffix(""))


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip archive into a folder that doesn't exist yet.

    All or nothing: it is unpacked aside and moved into place. A single folder that holds all the
    rest, as many archives have it, is left out.

    Args:
        archive: The archive.
        target: The folder to make.

    Raises:
        DatasetError: If the archive is damaged or encrypted, has names that lead out of the folder,
            links or other special files, two files of one name, or far more contents than its size
            suggests; or if the contents don't fit on the disk or can't be written.
    """
    aside = target.with_name(f"{target.name}.{uuid4().hex}.partial")
    try:
        with zipfile.ZipFile(archive) as opened:
            members = _checked(opened.infolist(), archive.stat().st_size)
            free = shutil.disk_usage(target.parent).free
            if (size := sum(member.file_size for member in members)) > free:
                raise ValueError(f"it takes {size} bytes, and {free} are free")
            aside.mkdir()
            for member in members:
                _write(opened, member, aside)
        inner = list(aside.iterdir())
        whole = inner[0] if len(inner) == 1 and inner[0].is_dir() else aside
        if not target.exists():  # another process may have been faster
            whole.rename(target)
    except _FAULTS as error:
        raise DatasetError(
            f"can't unpack {archive}: {error}; get the archive anew from its publisher, or unpack "
            f"it by hand into {target}"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _checked(members: list[zipfile.ZipInfo], archive_size: int) -> list[zipfile.ZipInfo]:
    """The files among the members, if all of them are harmless."""
    if len(members) > _MOST_FILES:
        raise ValueError(f"it has {len(members)} members, expected at most {_MOST_FILES}")
    seen: set[str] = set()
    for member in members:
        name = member.filename
        path = PurePosixPath(name)
        # Backslashes and colons lead out of the folder on Windows.
        if path.is_absolute() or ".." in path.parts or any(c in name for c in "\\:\0"):
            raise ValueError(f"the name {name!r} leads out of the folder")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{name!r} is a link or a special file")
        if member.flag_bits & 1:
            raise ValueError(f"{name!r} is encrypted")
        key = str(path).casefold()  # some systems don't tell upper case from lower
        if key in seen:
            raise ValueError(f"it has {name!r} twice")
        seen.add(key)
    files = [member for member in members if not member.is_dir()]
    size = sum(member.file_size for member in files)
    if size > max(_ALWAYS_ALLOWED, _MOST_EXPANSION * archive_size):
        raise ValueError(f"its {archive_size} bytes would become {size}, as no pictures do")
    return files


def _write(archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    path = folder / member.filename
    path.parent.mkdir(parents=True, exist_ok=True)
    # zipfile reads no more than the size that was checked, and compares the checksum at the end.
    with archive.open(member) as source, path.open("xb") as copy:
        shutil.copyfileobj(source, copy, _COPIED_AT_ONCE)
