"""Files from the network, told apart by their SHA-256: whole and right, or not there."""

import hashlib
import logging
import re
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.parse import urldefrag, urlsplit

from typing_extensions import override

from comet_meta.vision.files import sole_writer

_LOGGER = logging.getLogger(__name__)
_SCHEMES = ("https",)
_ATTEMPTS = 4
_TIMEOUT_S = 30
_READ_AT_ONCE = 2**20


class DownloadError(ValueError):
    """A file that can't be had; the message is for the user."""


def download(address: str, folder: Path) -> Path:
    """Get a file, or find it where an earlier call left it.

    A transfer that breaks off goes on from where it was, in this call or the next one.

    Args:
        address: ``https://...#sha256=<64 hexadecimal digits>``.
        folder: Where it goes, under a name that begins with its digest.

    Returns:
        The file. Its contents have the digest.

    Raises:
        DownloadError: If the address has another form, the network fails, or the contents have
            another digest.
        BusyError: If another process downloads into the folder.
    """
    url, digest = _parse(address)
    target = folder / f"{digest[:16]}-{Path(urlsplit(url).path).name or 'file'}"
    with sole_writer(folder):
        if target.exists() and _digest(target) == digest:
            return target
        part = target.with_name(f"{target.name}.part")
        _LOGGER.info("downloading %s", url)
        _fetch(url, part)
        if (found := _digest(part)) != digest:
            part.unlink()
            raise DownloadError(
                f"{url} has the SHA-256 {found}, expected {digest}: it is another file than the "
                "one meant, or was tampered with; nothing of it was kept"
            )
        part.replace(target)
    return target


def _parse(address: str) -> tuple[str, str]:
    url, fragment = urldefrag(address)
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if urlsplit(url).scheme not in _SCHEMES or not match:
        raise DownloadError(
            f"{address} is no address to download from; expected "
            "https://...#sha256=<64 hexadecimal digits>, so that what comes is what was meant"
        )
    return url, match[1].lower()


class _SameScheme(urllib.request.HTTPRedirectHandler):
    @override
    def redirect_request(
        self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in _SCHEMES:
            raise DownloadError(f"{req.full_url} leads to {newurl}, which is not secure")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(url: str, part: Path) -> None:
    """Complete a file; several attempts, each from where the last one broke off."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            if _continue(url, part):
                return
            error: Exception = EOFError("the transfer broke off")
        except urllib.error.HTTPError as refused:
            if refused.code == 416:  # more is there than the server has
                part.unlink(missing_ok=True)
            elif refused.code < 500:
                raise _failure(url, refused) from refused
            error = refused
        except (OSError, HTTPException) as broken:
            error = broken
        _LOGGER.warning("attempt %d of %d: %s", attempt, _ATTEMPTS, error)
    raise _failure(url, error) from error


def _continue(url: str, part: Path) -> bool:
    """Whether the file is complete after reading all that came."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers=headers)
    opener = urllib.request.build_opener(_SameScheme)
    with opener.open(request, timeout=_TIMEOUT_S) as answer:
        resumed = answer.status == 206
        expected = answer.headers.get("Content-Length")
        got = 0
        with part.open("ab" if resumed else "wb") as file:
            while block := answer.read(_READ_AT_ONCE):
                file.write(block)
                got += len(block)
    return expected is None or got == int(expected)


def _digest(file: Path) -> str:
    with file.open("rb") as contents:
        digest = hashlib.sha256()
        while block := contents.read(_READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _failure(url: str, error: Exception) -> DownloadError:
    return DownloadError(
        f"can't download {url} ({error}); try again (it goes on from where it broke off), or "
        "download it by hand and pass the file"
    )
