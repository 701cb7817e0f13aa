"""The list of what to keep and what to drop: a CSV, and the cleaned folder that it makes."""

import csv
import filecmp
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
import torch

from comet_meta.vision.files import replacing
from comet_meta.weights.contamination import Contamination
from comet_meta.weights.review import share_from_review

COLUMNS = ("path", "score", "weight", "p_bad", "rank", "keep")
_KEEP = {"yes": True, "no": False}


class KeepListError(ValueError):
    """A list or a folder that can't be used; the message is for the user."""


class Row(NamedTuple):
    """A line of the list.

    Attributes:
        path: The picture's, below the folder.
        score: Its anomaly score, higher = more anomalous; None, like the next three, for a picture
            that can't be read.
        weight: Confidence in it, in [0, 1].
        p_bad: Probability that it is bad, in [0, 1].
        rank: 1 for the most suspect picture.
        keep: Whether it stays.
    """

    path: Path
    score: float | None
    weight: float | None
    p_bad: float | None
    rank: int | None
    keep: bool


class Applied(NamedTuple):
    """What :func:`apply` did.

    Attributes:
        made: Pictures that were linked or copied.
        present: Pictures that were there already, from an earlier call.
        left_out: Pictures that the list drops.
    """

    made: int
    present: int
    left_out: int


def write(file: Path, rows: Iterable[Row]) -> None:
    """Write a list.

    Args:
        file: The CSV file to write or replace.
        rows: Its lines, with paths below the folder of pictures.
    """
    # Names of files needn't be valid UTF-8: what is written comes back as it was.
    with (
        replacing(file) as aside,
        aside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream,
    ):
        lines = csv.writer(stream)
        lines.writerow(COLUMNS)
        for row in rows:
            figures = (_figure(value) for value in (row.score, row.weight, row.p_bad, row.rank))
            lines.writerow([_spell(row.path), *figures, "yes" if row.keep else "no"])


def read(file: Path) -> list[tuple[str, bool]]:
    """Read paths and decisions of a list.

    Args:
        file: A CSV file with the columns ``path`` and ``keep`` (yes or no); others are ignored.

    Returns:
        Path as it is written and whether it stays, in the file's order.

    Raises:
        KeepListError: If the file is missing or is no such list.
    """
    return [(path, keep) for path, keep, _ in _read(file, {"path", "keep"})]


def read_scores(file: Path) -> list[tuple[str, float | None]]:
    """Read paths and anomaly scores of a list.

    Args:
        file: A CSV file with the columns ``path`` and ``score``; others are ignored.

    Returns:
        Path as it is written and score, in the file's order; None for a picture that couldn't be
        read.

    Raises:
        KeepListError: If the file is missing or is no such list.
    """
    return [
        (line["path"] or "", _score(file, number, line["score"] or ""))
        for number, line in _lines(file, {"path", "score"})
    ]


def read_reviewed(file: Path) -> tuple[list[tuple[str, bool]], Contamination]:
    """Read what a person has looked at in the report's sample.

    Args:
        file: A list that the report has exported, with the columns ``path``, ``rank``, ``keep``
            and ``reviewed`` (yes or no).

    Returns:
        Path as it is written and whether it stays, for each picture of the sample; and the share of
        all pictures that doesn't stay, as far as the sample tells.

    Raises:
        KeepListError: If the file is missing or is no such list, or nothing was looked at.
    """
    found = _read(file, {"path", "rank", "keep", "reviewed"})
    places = [place for place, (_, _, seen) in enumerate(found) if seen]
    reviewed = [found[place][:2] for place in places]
    if not reviewed:
        raise KeepListError(
            f"{file} has no picture that was looked at: show the report's sample, tick its bad "
            "pictures and export the list again"
        )
    try:
        share = share_from_review(
            -torch.arange(len(found)).float(), places, [not keep for _, keep in reviewed]
        )
    except ValueError as error:
        raise KeepListError(f"{file}: {error}") from error
    return reviewed, share


def _read(file: Path, needed: set[str]) -> list[tuple[str, bool, bool]]:
    """Path, whether it stays and whether it was looked at, of each line, by rank if need be."""
    rows = [(_rank(line), _decision(file, number, line)) for number, line in _lines(file, needed)]
    if "rank" in needed:
        rows.sort(key=lambda row: row[0])
    return [decision for _, decision in rows]


def _lines(file: Path, needed: set[str]) -> list[tuple[int, dict[str, str | None]]]:
    """Number and columns of each line, of which some are needed."""
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            lines = csv.DictReader(stream)
            missing = needed - set(lines.fieldnames or ())
            if missing:
                names = " nor ".join(sorted(missing))
                if "reviewed" in missing:
                    raise KeepListError(
                        f"{file} has no column {names}; expected the list that the report exports "
                        f"after its sample was shown, with {','.join([*COLUMNS, 'reviewed'])}"
                    )
                raise KeepListError(
                    f"{file} has no column {names}; expected the header {','.join(COLUMNS)}"
                )
            return [(lines.line_num, line) for line in lines]
    except FileNotFoundError:
        raise KeepListError(f"there's no list {file}") from None
    except csv.Error as error:
        raise KeepListError(f"{file} is no CSV file: {error}") from error


def apply(
    list_file: Path, source: Path, destination: Path, *, how: Literal["link", "copy"] = "link"
) -> Applied:
    """Make a folder of the pictures that a list keeps.

    Folders below the source stay as they are. Nothing is deleted or overwritten; what an earlier,
    interrupted call has made stays and counts.

    Args:
        list_file: The CSV file.
        source: The folder that was ranked.
        destination: The folder to make, or one that holds nothing else under the same names.
        how: ``"link"``: symbolic links to the pictures; ``"copy"``: copies with their times.

    Returns:
        How many pictures were made, were there already, and were left out.

    Raises:
        KeepListError: If list, source or a picture is missing, a path lies outside of the source,
            the destination is part of the source, or another file is in the way. Nothing has been
            made then.
        OSError: If a link or a copy can't be made.
    """
    decisions = read(list_file)
    if not source.is_dir():
        raise KeepListError(f"there's no folder {source}")
    if destination.resolve().is_relative_to(source.resolve()):
        raise KeepListError(
            f"{destination} lies in {source}: what is made there would be ranked with it the next "
            "time; give a folder outside"
        )
    kept = {_path_below(source, path, list_file) for path, keep in decisions if keep}
    dropped = {_path_below(source, path, list_file) for path, keep in decisions if not keep}
    if both := sorted(kept & dropped):
        raise KeepListError(f"{list_file} keeps and drops {_first_few(both)}")
    if not kept:
        raise KeepListError(f"{list_file} keeps no picture")
    if missing := [path for path in sorted(kept) if not (source / path).is_file()]:
        raise KeepListError(f"{source} lacks {_first_few(missing)}, which {list_file} keeps")
    taken = [path for path in sorted(kept) if os.path.lexists(destination / path)]
    if different := [p for p in taken if not _same_content(source / p, destination / p)]:
        raise KeepListError(
            f"{destination} holds other files called {_first_few(different)}; nothing is "
            "overwritten: give an empty folder"
        )
    for path in sorted(kept.difference(taken)):
        target = destination / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if how == "link":
            target.symlink_to((source / path).absolute())
        else:
            with replacing(target) as aside:
                shutil.copy2(source / path, aside)
    return Applied(len(kept) - len(taken), len(taken), len(dropped))


def _rank(row: dict[str, str | None]) -> float:
    """A picture that has none, as it can't be read, comes last."""
    text = (row.get("rank") or "").strip()
    return float(text) if text.isdigit() else math.inf


def _score(file: Path, line: int, text: str) -> float | None:
    """A score as it is written; None for a picture that couldn't be read."""
    try:
        score = float(text) if text.strip() else None
    except ValueError:
        score = math.nan
    if score is not None and not math.isfinite(score):
        raise KeepListError(f"line {line} of {file} has the score {text!r}; expected a number")
    return score


def _decision(file: Path, line: int, row: dict[str, str | None]) -> tuple[str, bool, bool]:
    path, keep = row["path"], (row["keep"] or "").strip().lower()
    if not path or keep not in _KEEP:
        raise KeepListError(
            f"line {line} of {file} has path {path!r} and keep {row['keep']!r}; expected a path, "
            "and yes or no"
        )
    return path, _KEEP[keep], (row.get("reviewed") or "").strip().lower() == "yes"


def _path_below(source: Path, path: str, list_file: Path) -> Path:
    """A picture's path below the source, also where the list has it in full."""
    found = Path(path)
    if found.is_absolute():
        root = next(
            (r for r in (source.absolute(), source.resolve()) if found.is_relative_to(r)), None
        )
        found = found.relative_to(root) if root else found
    if found.is_absolute() or ".." in found.parts or not found.parts:
        raise KeepListError(f"{path} in {list_file} is no picture below {source}")
    return found


def _same_content(source: Path, target: Path) -> bool:
    if not target.is_file():
        return False
    return target.samefile(source) or filecmp.cmp(source, target, shallow=False)


def _spell(path: Path) -> str:
    """With slashes on every system, and so that no spreadsheet takes it for a formula."""
    text = PurePosixPath(path.as_posix()).as_posix()
    return f"./{text}" if text.startswith(("=", "+", "-", "@")) else text


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    return np.format_float_positional(np.float32(value), trim="-")  # the same when read back


def _first_few(paths: list[Path]) -> str:
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return ", ".join(map(str, paths[:5])) + more
