"""The command ``comet-meta``: rank a folder of pictures, and make the cleaned folder."""

import argparse
import io
import logging
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

import comet_meta

_DONE, _INCOMPLETE, _REFUSED, _INTERRUPTED = 0, 1, 2, 130
_RANKED = ".comet-meta-ranked"
"""A file beside a keep list that names the folder that was ranked."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; by default the process's.

    Returns:
        The exit status: 0 done; 1 done, but for pictures that can't be read; 2 wrong arguments or
        data, or a fault; 130 interrupted.
    """
    options = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files needn't be printable
    logging.basicConfig(format="%(message)s")
    logging.getLogger("comet_meta").setLevel(logging.INFO)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {options.interrupted}", file=sys.stderr)
        return _INTERRUPTED
    except ModuleNotFoundError as error:
        print(
            f"error: comet-meta {options.command} needs the package {error.name}: pip install "
            '"comet-meta[vision]"',
            file=sys.stderr,
        )
        return _REFUSED
    except torch.OutOfMemoryError:
        print(
            "error: the device is out of memory; take a smaller --batch-size, or --device cpu",
            file=sys.stderr,
        )
        return _REFUSED
    except (ValueError, OSError) as error:
        if _is_for_the_user(error):
            print(f"error: {error}", file=sys.stderr)
        else:
            _report_fault(error)
        return _REFUSED
    except Exception as error:  # noqa: BLE001  no traceback for a user, whatever it is
        _report_fault(error)
        return _REFUSED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="comet-meta",
        description="Find the bad pictures in a folder that nobody has cleaned.",
    )
    parser.add_argument("--version", action="version", version=comet_meta.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_rank(commands.add_parser("rank", help="rank the pictures of a folder, most suspect first"))
    _add_apply(commands.add_parser("apply", help="make the cleaned folder from a keep list"))
    return parser


def _add_rank(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Rank the pictures of a folder, and of the folders in it, by how little each looks like "
        "the others. Writes keep.csv, a list of what to keep, and report.html, a page to look "
        "through. No picture is changed. Exit status: 0 done, 1 done without the pictures that "
        "can't be read (--keep-going), 2 wrong arguments or data, 130 interrupted; then the same "
        "command goes on from there."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of pictures")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="(default: FOLDER's name + _ranked)"
    )
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        default="tf_efficientnet_lite0",
        help="name of a timm model (default: %(default)s, whose weights are installed)",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="weights of the backbone: a .pth or .safetensors file, the address of one, "
        "https://...#sha256=..., or 'random', which detects nothing",
    )
    parser.add_argument(
        "--device",
        type=_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--resize",
        type=_count,
        nargs="+",
        metavar="PIXELS",
        help="side that the pictures are brought to, or height and width; they are padded, not "
        "stretched (default: their own shape, as many pixels as 256 x 256)",
    )
    parser.add_argument("--batch-size", type=_count, default=32, help="(default: %(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--contamination",
        type=parse_contamination,
        default="auto",
        metavar="auto|SHARE",
        help="share of bad pictures, in [0, 0.5), where it is known (default: %(default)s)",
    )
    parser.add_argument(
        "--review",
        type=Path,
        metavar="LIST.CSV",
        help="the list that the report of an earlier ranking of the folder has exported, after you "
        "ticked the bad pictures of its sample: the ranking learns from it, and it tells the share",
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="leave out pictures that can't be read"
    )
    parser.add_argument(
        "--max-megapixels",
        type=_count,
        metavar="MILLIONS",
        help="largest picture that is read (default: 178); above, a file may be a bomb",
    )
    parser.set_defaults(
        run=_rank,
        interrupted="the features so far are kept; the same command goes on from there",
    )


def _add_apply(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a folder of the pictures that a keep list keeps: links to them, or copies, in the "
        "same folders. Nothing is deleted or overwritten. Exit status: 0 done, 2 wrong arguments "
        "or data, 130 interrupted; the same command then goes on from there."
    )
    parser.add_argument(
        "list", type=Path, metavar="KEEP.CSV", help="columns path and keep (yes/no)"
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the folder that was ranked")
    parser.add_argument("destination", type=Path, metavar="DEST", help="the folder to make")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--link",
        dest="how",
        action="store_const",
        const="link",
        help="symbolic links to the pictures, which must stay where they are (default)",
    )
    how.add_argument("--copy", dest="how", action="store_const", const="copy", help="copies")
    parser.set_defaults(
        run=_apply,
        how="link",
        interrupted="what was made stays; the same command goes on from there",
    )


def _rank(options: argparse.Namespace) -> int:
    # Only here, so that --help is quick and a missing extra can be told in a sentence.
    from comet_meta.vision.estimate import in_words
    from comet_meta.vision.files import sole_writer
    from comet_meta.vision.pixels import largest_picture
    from comet_meta.vision.rank import RankError, RankSettings, check_folder, rank_folder

    size = tuple(options.resize or ())
    if len(size) > 2:
        raise RankError(f"--resize takes one number or two, not {len(size)}")
    settings = RankSettings(
        backbone=options.backbone,
        weights=options.weights,
        device=options.device,
        size=(size[0], size[-1]) if size else None,
        batch_size=options.batch_size,
        seed=options.seed,
        contamination=options.contamination,
        keep_going=options.keep_going,
        review=options.review,
    )
    check_folder(options.folder)
    out = options.out or Path(f"{options.folder.resolve().name or 'pictures'}_ranked")
    if out.exists() and not out.is_dir():
        raise RankError(f"--out {out} is a file; give a folder")
    note, ranked = out / _RANKED, os.fsencode(options.folder.resolve())
    if note.exists() and (other := note.read_bytes()) != ranked:
        raise RankError(
            f"{out} holds the ranking of {os.fsdecode(other)}, which would be overwritten; give "
            "another --out"
        )
    with largest_picture(options.max_megapixels):
        ranking = rank_folder(options.folder, settings)
        with sole_writer(out):
            note.write_bytes(ranked)
            keep_list, report = ranking.write(out)
    print(f"{len(ranking.paths):,} pictures. {in_words(ranking.weighter)}")
    print(f"Look through them:  {report}")
    print(f"What to keep:       {keep_list}")
    if options.contamination == "auto" and options.review is None:
        print(
            "How many are bad:   tick the bad pictures of the report's sample, export the list and "
            "rank again with --review"
        )
    if not ranking.unreadable:
        return _DONE
    print(f"{len(ranking.unreadable):,} pictures can't be read and were left out:", file=sys.stderr)
    for one in ranking.unreadable:
        print(f"  {one.reason}", file=sys.stderr)
    return _INCOMPLETE


def _apply(options: argparse.Namespace) -> int:
    from comet_meta.vision.keep_list import apply

    done = apply(options.list, options.source, options.destination, how=options.how)
    verb = "linked" if options.how == "link" else "copied"
    there = f", {done.present:,} were there already" if done.present else ""
    print(
        f"{done.made:,} pictures {verb} in {options.destination}{there}; {done.left_out:,} left out"
    )
    return _DONE


def _is_for_the_user(error: ValueError | OSError) -> bool:
    """Whether the message was written for the user, or comes from the system."""
    if isinstance(error, OSError):
        return error.errno is not None
    return type(error).__module__.startswith("comet_meta.")


def _report_fault(error: Exception) -> None:
    """Say that comet-meta is at fault, and write the details to a file."""
    text = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile(
        "w",
        prefix="comet-meta-fault-",
        suffix=".txt",
        delete=False,
        encoding="utf-8",
        errors="backslashreplace",
    ) as file:
        versions = f"comet-meta {comet_meta.__version__}, torch {torch.__version__}"
        file.write(f"{versions}, Python {sys.version}\n{sys.argv}\n\n{text}")
    print(
        f"error: a fault of comet-meta: {type(error).__name__}: {error}\n"
        f"Please report it with the file {file.name}, which says where it happened; it holds names "
        "of files, but no pictures.",
        file=sys.stderr,
    )


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} is no device here ({reason})") from error
    return text


def _seed(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is no integer of 64 bits")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number >= 1")
    return value


def parse_contamination(text: str) -> float | Literal["auto"]:
    """The value of an option ``--contamination``.

    Args:
        text: ``auto``, or a share in [0, 0.5).

    Returns:
        What :class:`~comet_meta.SoftConfidentWeighter` takes.

    Raises:
        ArgumentTypeError: If it is something else.

    Example:
        >>> parse_contamination("auto"), parse_contamination("0.1")
        ('auto', 0.1)
    """
    if text == "auto":
        return "auto"
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share < 0.5:
        raise argparse.ArgumentTypeError(f"{text} is neither auto nor a share in [0, 0.5)")
    return share
