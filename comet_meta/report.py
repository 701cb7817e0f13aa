"""The curation report, and the lists of pictures, in your own training loop."""

import os
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from comet_meta.weights.review import Review
from comet_meta.weights.weighter import SoftConfidentWeighter


def write(
    weighter: SoftConfidentWeighter,
    paths: Sequence[str | PathLike[str]],
    file: str | PathLike[str] = "report.html",
    *,
    title: str = "Training pictures",
    size: tuple[int, int] = (256, 256),
    maps: Callable[[Sequence[Path]], Tensor] | None = None,
) -> Path:
    """Write an HTML page on which a person decides which training pictures to keep.

    The page is one file with small copies of the pictures; it needs no network. Writing it needs
    the extra ``comet-meta[vision]``.

    Args:
        weighter: The weighter after training, or with a prior.
        paths: The pictures' files: sample i is ``paths[i]``.
        file: HTML file to write or replace.
        title: Heading.
        size: Largest height and width in pixels at which the pictures are shown; they are padded,
            not stretched.
        maps: Function from some of the paths to their anomaly maps (B, H, W), shown as heat maps.
            None for none.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: If the extra isn't installed.
        ValueError: If there isn't one picture for each sample, or one can't be read.

    Example:
        >>> from comet_meta import report
        >>> report.write(weighter, paths, "report.html")  # doctest: +SKIP
    """
    # Only here: the core of the package doesn't need pictures.
    try:
        from comet_meta.vision.html_report import Run, write_report
        from comet_meta.vision.images import Transform
        from comet_meta.vision.samples import Sample, Split
        from comet_meta.vision.survey import survey_depth
    except ModuleNotFoundError as error:
        raise _without_extra(error) from error

    samples = [Sample(Path(path), None) for path in paths]
    known = survey_depth(Split(title, tuple(samples), (), has_masks=False))
    write_report(
        Path(file),
        Run(heading=title, subtitle=""),
        weighter,
        samples,
        known.scaled(Transform(size, keep_aspect=True)),
        None if maps is None else lambda samples: maps([sample.path for sample in samples]),
    )
    return Path(file)


def read_review(
    file: str | PathLike[str], paths: Sequence[str | PathLike[str]], *, subset: bool = False
) -> Review:
    """Read what a person has found in the report's sample, for the weighter's ``review=``.

    Args:
        file: The list that the report has exported after its sample was shown and its bad pictures
            were ticked. Pictures that were ticked elsewhere don't count: they would make the share
            of bad ones too large.
        paths: The pictures' files: sample i is ``paths[i]``.
        subset: Whether these may be a part of the ranked pictures, as where some are split off for
            testing. What was seen of the others is left out then, but for the share.

    Returns:
        Indices of the pictures that were looked at, whether each is bad, and the share of bad
        pictures that this tells, by the ranking of the report.

    Raises:
        ModuleNotFoundError: If the extra ``comet-meta[vision]`` isn't installed.
        ValueError: If the file is no such list, or has a picture that ``paths`` lacks; with
            ``subset``, if ``paths`` lacks all of them.

    Example:
        >>> from comet_meta import SoftConfidentWeighter, report
        >>> review = report.read_review("line_3_keep_drop.csv", paths)  # doctest: +SKIP
        >>> weighter = SoftConfidentWeighter(prior=prior, review=review)  # doctest: +SKIP
    """
    try:
        from comet_meta.vision.keep_list import KeepListError, read_reviewed
    except ModuleNotFoundError as error:
        raise _without_extra(error) from error

    index = {_in_full(path): i for i, path in enumerate(paths)}
    found, share = read_reviewed(Path(file))
    lacking = [path for path, _ in found if _in_full(path) not in index]
    if len(lacking) == len(found) or (lacking and not subset):
        raise KeepListError(
            f"{lacking[0]} in {file} is none of the {len(paths)} pictures; give the paths that the "
            "report was written with, or subset=True where some of them are left"
        )
    known = [(index[_in_full(path)], not keep) for path, keep in found if _in_full(path) in index]
    return Review([i for i, _ in known], [bad for _, bad in known], share)


def read_prior(
    file: str | PathLike[str],
    paths: Sequence[str | PathLike[str]],
    folder: str | PathLike[str] = "",
) -> Tensor:
    """Read the scores of a ranking, for the weighter's ``prior=``.

    Args:
        file: ``keep.csv`` of ``comet-meta rank``, or a list that its report has exported.
        paths: The training pictures' files: sample i is ``paths[i]``.
        folder: The folder that was ranked, below which the paths of ``keep.csv`` lie. An exported
            list has them in full.

    Returns:
        Anomaly scores, higher = more anomalous, float32, shape (N,).

    Raises:
        ModuleNotFoundError: If the extra ``comet-meta[vision]`` isn't installed.
        ValueError: If the file is no such list, or lacks a picture or its score.

    Example:
        >>> from comet_meta import SoftConfidentWeighter, report
        >>> prior = report.read_prior("line_3_ranked/keep.csv", paths, "line_3")  # doctest: +SKIP
        >>> weighter = SoftConfidentWeighter(prior=prior)  # doctest: +SKIP
    """
    try:
        from comet_meta.vision.keep_list import KeepListError, read_scores
    except ModuleNotFoundError as error:
        raise _without_extra(error) from error

    found = {_in_full(Path(folder) / path): score for path, score in read_scores(Path(file))}
    wanted = [_in_full(path) for path in paths]
    if lacking := [path for path in wanted if path not in found]:
        raise KeepListError(
            f"{file} lacks {len(lacking):,} of {len(paths):,} pictures, the first of them "
            f"{lacking[0]}; rank the folder that holds them all, and give it as folder="
        )
    if unread := [path for path in wanted if found[path] is None]:
        raise KeepListError(
            f"{unread[0]} has no score in {file}, since it couldn't be read; leave it out of "
            "training"
        )
    return torch.tensor([found[path] for path in wanted], dtype=torch.float32)


def _in_full(path: str | PathLike[str]) -> str:
    """A path by which the same picture is known from any list, also from ``a/../b``.

    Links aren't followed: the cleaned folder holds links to the pictures.
    """
    return os.path.abspath(path)  # noqa: PTH100  resolve() follows links


def _without_extra(error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f'the report needs the package {error.name}: pip install "comet-meta[vision]"',
        name=error.name,
    )
