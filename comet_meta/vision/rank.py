"""Rank the pictures of a folder, the most suspect first, from frozen features alone."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from comet_meta.report import read_review
from comet_meta.vision import folder as plain_folder
from comet_meta.vision.backbones import DEFAULT_BACKBONE, load_backbone
from comet_meta.vision.features import PatchFeatures
from comet_meta.vision.files import cache_folder, sole_writer
from comet_meta.vision.html_report import Run, write_report
from comet_meta.vision.images import SQUARE, Transform
from comet_meta.vision.keep_list import Row, write
from comet_meta.vision.patch_grids import PatchGrids
from comet_meta.vision.picture_prior import (
    PRECAUTION,
    grid_side,
    strangest_features,
    streamed_part_prior,
)
from comet_meta.vision.samples import Sample, Split
from comet_meta.vision.survey import survey_depth
from comet_meta.weights.learned import learn_from_review
from comet_meta.weights.prior import MemoryScorer
from comet_meta.weights.weighter import SoftConfidentWeighter


class RankError(ValueError):
    """Pictures that can't be ranked; the message is for the user."""


@dataclass(frozen=True)
class RankSettings:
    """How to rank.

    Attributes:
        backbone: Name of a timm model.
        weights: Its weights, as :func:`~comet_meta.vision.backbones.load_backbone` takes them.
        device: Where to compute.
        size: Height and width in pixels that the pictures are brought to; padded, not stretched.
            None for as many pixels as 256 x 256, in the shape of the pictures.
        batch_size: Pictures at a time.
        seed: Seed of the random memories.
        contamination: Share of bad pictures, in [0, 0.5), where it is known; else ``"auto"``.
        keep_going: Whether pictures that can't be read are left out instead of refused.
        review: A list that the report of an earlier ranking has exported after a person looked at
            its sample; the ranking learns from it.
    """

    backbone: str = DEFAULT_BACKBONE
    weights: str | None = None
    device: str = "cpu"
    size: tuple[int, int] | None = None
    batch_size: int = 32
    seed: int = 0
    contamination: float | Literal["auto"] = "auto"
    keep_going: bool = False
    review: Path | None = None


class Unreadable(NamedTuple):
    """A picture that can't be read.

    Attributes:
        path: Its file.
        reason: A sentence.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class Ranking:
    """A ranked folder.

    Attributes:
        folder: The folder.
        paths: Its readable pictures, sorted.
        unreadable: The others.
        weighter: Scores (as its prior), weights and P(bad) of ``paths``.
        settings: How they were ranked.
        transform: How their files were read.
    """

    folder: Path
    paths: tuple[Path, ...]
    unreadable: tuple[Unreadable, ...]
    weighter: SoftConfidentWeighter
    settings: RankSettings
    transform: Transform

    def rows(self) -> list[Row]:
        """The lines of the keep list: most suspect first, unreadable pictures last."""
        weighter = self.weighter
        scores = cast("Tensor", weighter.prior)
        return [
            Row(
                self.paths[i].relative_to(self.folder),
                float(scores[i]),
                float(weighter.weights[i]),
                float(weighter.p_bad[i]),
                rank,
                keep=float(weighter.p_bad[i]) <= 0.5,
            )
            for rank, i in enumerate(weighter.ranking().tolist(), start=1)
        ] + [
            Row(path.relative_to(self.folder), None, None, None, None, keep=False)
            for path, _ in self.unreadable
        ]

    def write(self, out: Path) -> tuple[Path, Path]:
        """Write the keep list and the report.

        Args:
            out: Folder to write to.

        Returns:
            Their files.
        """
        keep_list, report = out / "keep.csv", out / "report.html"
        write(keep_list, self.rows())
        settings = self.settings
        left_out = f", {len(self.unreadable):,} left out as unreadable" if self.unreadable else ""
        write_report(
            report,
            Run(
                heading=self.folder.resolve().name or str(self.folder),
                subtitle=f"Ranked by frozen features of {settings.backbone}{left_out}",
                settings={
                    "backbone": settings.backbone,
                    "weights": settings.weights,
                    "pixels": self.transform.resize,
                    "contamination": settings.contamination,
                    "review": None if settings.review is None else settings.review.name,
                    "seed": settings.seed,
                },
            ),
            self.weighter,
            [Sample(path, None) for path in self.paths],
            self.transform,
        )
        return keep_list, report


def rank_folder(folder: Path, settings: RankSettings) -> Ranking:
    """Rank the pictures of a folder and of those below it.

    Features are kept in the user's cache folder: a run that was stopped goes on, and one with other
    settings of the ranking is quick.

    Args:
        folder: The folder. Hidden files and folders are left out.
        settings: How to rank.

    Returns:
        The ranking.

    Raises:
        RankError: If folder or pictures are missing, some can't be read (unless ``keep_going``), or
            fewer than two are left.
        ValueError: If backbone, weights, size, review or a link in the folder are of no use.
        OSError: If the cache can't be written.
    """
    split = _pictures(folder)
    paths = [sample.path for sample in split.train]
    if settings.review is not None:
        read_review(settings.review, paths)  # before hours of work, if it is of no use
    extractor = PatchFeatures(load_backbone(settings.backbone, settings.weights))
    known = survey_depth(split)
    if settings.size is None:
        transform = known.scaled(known.fitted(SQUARE))
    else:
        transform = known.scaled(Transform(settings.size, keep_aspect=True))
    cache = feature_cache(folder)
    with sole_writer(cache):
        grids = PatchGrids(
            extractor,
            transform,
            grid_side(len(paths)),
            cache,
            device=settings.device,
            batch_size=settings.batch_size,
        )
        files = grids.compute(paths)
        read = torch.cat([~part.isnan().flatten(1).all(dim=1) for part in grids.read(files)])
        unreadable = {}
        for i in (~read).nonzero().flatten().tolist():
            if reason := grids.why_unreadable(paths[i]):
                unreadable[i] = Unreadable(paths[i], reason)
        _check_readable(folder, len(paths), list(unreadable.values()), settings.keep_going)
        scorer = MemoryScorer(seed=settings.seed)
        prior, patch_scores = streamed_part_prior(
            lambda: grids.read(files), cache, scorer, settings.device
        )
        readable = [i for i in range(len(paths)) if i not in unreadable]
        kept = tuple(paths[i] for i in readable)
        prior = prior[readable]
        # Features that are not finite are as strange as can be.
        prior = prior.nan_to_num(nan=float(prior[prior.isfinite()].max()))
        review = None
        if settings.review is not None:
            batches = ([part] for part in grids.read(files))
            strange = strangest_features(batches, patch_scores)[readable]
            prior, review = learn_from_review(prior, strange, read_review(settings.review, kept))
    weighter = SoftConfidentWeighter(
        prior=prior, contamination=settings.contamination, precaution=PRECAUTION, review=review
    )
    return Ranking(folder, kept, tuple(unreadable.values()), weighter, settings, transform)


def check_folder(folder: Path) -> None:
    """Check that there's a folder.

    Args:
        folder: The folder of pictures.

    Raises:
        RankError: If there's none, or a file.
    """
    if not folder.exists():
        raise RankError(f"there's no folder {folder}; give the folder of pictures")
    if not folder.is_dir():
        raise RankError(f"{folder} is a file; give the folder of pictures that it lies in")


def _pictures(folder: Path) -> Split:
    check_folder(folder)
    (category,) = plain_folder.categories(folder)
    split = plain_folder.load(folder, category)
    samples = sorted(split.train, key=lambda sample: sample.path.parts)
    if len(samples) == 1:
        raise RankError(
            f"{folder} holds one picture, {samples[0].path.name}; pictures are ranked by comparing "
            "them with each other, which takes at least two, better some hundred"
        )
    return replace(split, train=tuple(samples))


def _check_readable(
    folder: Path, count: int, unreadable: Sequence[Unreadable], keep_going: bool
) -> None:
    if not unreadable:
        return
    reasons = "".join(f"\n  {one.reason}" for one in unreadable)
    if count - len(unreadable) < 2:
        raise RankError(
            f"{len(unreadable)} of the {count} pictures in {folder} can't be read, which leaves "
            f"too few to compare:{reasons}"
        )
    if not keep_going:
        raise RankError(
            f"{len(unreadable)} of the {count} pictures in {folder} can't be read:{reasons}\n"
            "Repair or remove them, or leave them out with --keep-going; the features of the "
            "others are kept, so the next run is quick."
        )


def feature_cache(folder: Path) -> Path:
    """Where the features of a folder's pictures are kept."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return cache_folder() / "rank" / name
