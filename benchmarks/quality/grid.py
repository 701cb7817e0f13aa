"""Detectors x data sets x contamination x seeds x ways to train: what the tables are made of."""

import argparse
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from comet_examples.cli import DEMO_PIXELS
from comet_examples.datasets import DATASETS, DatasetError, Split, Transform, bad_samples
from comet_examples.detectors import DETECTORS
from comet_examples.experiment import Experiment
from comet_examples.metrics import curation_metrics
from comet_examples.presets import PRESETS, Preset, preset_for
from comet_examples.report import table
from comet_examples.training import Method, TrainingSettings, Wrap, wrap
from comet_meta import SoftConfidentWeighter
from comet_meta.meta.step import MetaMode
from comet_meta.vision.backbones import DEFAULT_BACKBONE, load_backbone
from comet_meta.vision.features import FeatureStore
from runs import Figures, Runs, of_shard, spread

_LOGGER = logging.getLogger(__name__)

Array = npt.NDArray[Any]
BySeed = dict[int, Figures]
METHODS = ("plain", "oracle", "paper", "comet")
_AS_MEASURED = {"elpv": f"{DEMO_PIXELS}", "ksdd2": "352x128", "viaduct": "256"}
"""Sizes of pictures in the runs under ``docs/results``, which were made before pictures that aren't
square got a size of their own shape; solar cells are as small as in the demo, to take less time."""


@dataclass(frozen=True)
class Trial:
    """What a way to train starts from.

    Attributes:
        experiment: The category, the detector and the frozen features.
        split: Training set with its bad pictures, and test set.
        settings: Epochs and seed of a plain training.
    """

    experiment: Experiment
    split: Split
    settings: TrainingSettings

    @property
    def bad(self) -> Array:
        """Which training pictures are bad, bool of shape (N,). For judging and for oracles only."""
        return bad_samples(self.split.train)


Variant = Callable[[Trial], Figures]
"""A way to train: trains on a trial's training set and returns the figures of its test set."""


def trained(trial: Trial, wrap: Wrap = wrap) -> Figures:
    """Train with an optimizer of one's own, or with that of ``trial.settings.method``."""
    outcome = trial.experiment.run(trial.split, trial.settings, wrap=wrap)
    weighter = outcome.training.optimizer.weighter
    return outcome.figures | ({} if weighter is None else weighting_figures(weighter, trial.bad))


def by_method(name: str) -> Variant:
    """A method of the examples: plain, oracle, paper, comet, or comet:<meta>."""
    base, _, meta = name.partition(":")

    def run(trial: Trial) -> Figures:
        settings = replace(
            trial.settings, method=cast("Method", base), meta=cast("MetaMode", meta) or None
        )
        return trained(replace(trial, settings=settings))

    return run


def weighting_figures(weighter: SoftConfidentWeighter, bad: Array) -> Figures:
    """How well a weighter found the bad pictures; nothing where there are none.

    *curation* judges the model's own last scores, *ranking* what users see, as far as there are
    any.
    """
    if not bad.any():
        return {}
    figures: Figures = {}
    if weighter.scores.isfinite().all():
        own = curation_metrics(weighter.scores.numpy(), bad)
        figures |= {f"curation {key}": value for key, value in own.items()}
    figures |= curation_figures(weighter.mean_weights().numpy(), bad)
    if weighter.ranking_scores().isfinite().all():
        order = weighter.ranking().numpy()
        suspicion = np.empty(len(order))
        suspicion[order] = np.arange(len(order))[::-1]
        figures |= {f"ranking {k}": v for k, v in curation_metrics(suspicion, bad).items()}
    return figures


def curation_figures(weights: Array, bad: Array, suspicion: Array | None = None) -> Figures:
    """Mean weights of bad and good pictures, and what a suspicion (N,) is worth as a curator."""
    if not bad.any():
        return {}
    found = {} if suspicion is None else curation_metrics(suspicion, bad)
    return {f"curation {key}": value for key, value in found.items()} | {
        "weight of bad": float(weights[bad].mean()),
        "weight of good": float(weights[~bad].mean()),
    }


class Benchmark:
    """Runs and their names.

    Args:
        backbone: timm name.
        roots: Folder of each data set that needs one.
        device: Where to train.
        epochs: Instead of the preset's.
        sizes: Sizes of the pictures by data set, as of ``--resize``, instead of the preset's.
        preset: A name in ``PRESETS``: whose epochs, rates and detectors are taken, with
            ``backbone`` in place of its own.
    """

    def __init__(
        self,
        backbone: str,
        roots: dict[str, str],
        device: str,
        epochs: int | None,
        sizes: Mapping[str, str] = _AS_MEASURED,
        preset: str = "default",
    ) -> None:
        self.backbone = backbone
        self.roots = {name: Path(folder) for name, folder in roots.items()}
        self.device = device
        self.epochs = epochs
        self.settings_of = backbone if preset == "default" else PRESETS[preset].backbone
        self.sizes = {name: sized(text) for name, text in sizes.items()}
        # On disk, so that shards and later runs share them.
        self.store = FeatureStore(memory_budget=0)
        self.experiment = cache(self._experiment)

    def expanded(self, task: str) -> list[str]:
        """``mvtec/all`` as the names of all its categories."""
        dataset, _, category = task.partition("/")
        if category != "all":
            return [task]
        found = DATASETS[dataset].categories(self.roots.get(dataset))
        return [f"{dataset}/{name}" for name in found]

    def key(
        self, detector: str, task: str, noise: float, seed: int | None, method: str
    ) -> dict[str, Any]:
        """All that decides a run's result. Without a seed, what the runs of all seeds share."""
        preset = self.preset(detector, task)
        seeded = {} if seed is None else {"seed": seed}
        return {
            "detector": detector,
            "task": task,
            "noise": noise,
            "method": method,
            "backbone": self.backbone,
            "epochs": preset.epochs,
            "steps": preset.steps,
            "schedule": preset.schedule,
            "transform": str(preset.transform),
            "options": {name: str(value) for name, value in preset.detector.items()},
            **seeded,
        }

    def preset(self, detector: str, task: str) -> Preset:
        """The settings of a detector on a task."""
        preset = preset_for(detector, self.settings_of).lasting(epochs=self.epochs)
        size = self.sizes.get(task.partition("/")[0])
        return preset if size is None else preset.sized(size)

    def run(self, detector: str, task: str, noise: float, seed: int, variant: Variant) -> Figures:
        """One training, judged on the test set after its last epoch.

        Raises:
            DatasetError: If there are too few bad pictures for the noise.
        """
        experiment = self.experiment(detector, task)
        trial = Trial(
            experiment,
            experiment.split(noise, seed),
            experiment.preset.training("plain", seed=seed),
        )
        wall, processor = time.perf_counter(), time.process_time()
        figures = variant(trial)
        return figures | {
            "seconds": time.perf_counter() - wall,
            "processor seconds": time.process_time() - processor,
        }

    def _experiment(self, detector: str, task: str) -> Experiment:
        dataset, _, category = task.partition("/")
        clean: Split = DATASETS[dataset].load(self.roots.get(dataset), category)
        preset = self.preset(detector, task)
        backbone = load_backbone(self.backbone)
        return Experiment(clean, detector, preset, backbone, self.store, self.device)


def sized(text: str) -> Transform:
    """The transform to a size: ``"256"``, the shorter side, or ``"352x128"``, height and width."""
    sides = [int(side) for side in text.split("x")]
    if len(sides) == 1:
        return Transform(sides[0])
    height, width = sides
    return Transform((height, width), keep_aspect=True)


def add_arguments(parser: argparse.ArgumentParser, out: Path) -> None:
    """What every table asks for."""
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS))
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["elpv/mono", "elpv/poly"],
        help="data set/category, or data set/all",
    )
    parser.add_argument(
        "--root", nargs="+", default=[], metavar="NAME=FOLDER", help="where a data set is"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2, 3, 4],
        help="those of the default are for reporting; choose settings with 100 and up",
    )
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="default",
        help="paper: the published epochs, rates and detectors, with --backbone",
    )
    parser.add_argument("--epochs", type=int, help="instead of the preset's")
    parser.add_argument(
        "--resize",
        nargs="*",
        default=[f"{name}={size}" for name, size in _AS_MEASURED.items()],
        metavar="NAME=SIZE",
        help="size of a set's pictures in place of the preset's: the shorter side, or HEIGHTxWIDTH",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shard", default="1/1", help="i/n: run the i-th of n parts")
    parser.add_argument("--out", type=Path, default=out)


def benchmark(options: argparse.Namespace) -> tuple[Benchmark, list[str], Runs]:
    """The benchmark, the names of its tasks and its file of runs, from parsed arguments."""
    roots = dict(item.split("=", 1) for item in options.root)
    sizes = dict(item.split("=", 1) for item in options.resize)
    bench = Benchmark(
        options.backbone, roots, options.device, options.epochs, sizes, options.preset
    )
    tasks = [task for name in options.tasks for task in bench.expanded(name)]
    return bench, tasks, Runs(options.out)


def run_missing(
    bench: Benchmark,
    runs: Runs,
    options: argparse.Namespace,
    tasks: Sequence[str],
    methods: Sequence[str],
    variant_of: Callable[[str], Variant],
) -> None:
    """Run what is missing of the part that ``--shard`` names."""
    # Seeds outermost: what is finished when the time is up makes whole tables.
    grid = itertools.product(options.seeds, tasks, options.detectors, options.noise, methods)
    for seed, task, detector, noise, name in of_shard(grid, options.shard):
        key = bench.key(detector, task, noise, seed, name)
        if runs.done(key):
            continue
        try:
            figures = bench.run(detector, task, noise, seed, variant_of(name))
        except DatasetError as error:
            _LOGGER.warning("left out: %s", error)
            continue
        runs.add(key, figures)
        _LOGGER.info(
            "%s %s noise %s seed %d %s: %.3f", detector, task, noise, seed, name, figures["I-AUROC"]
        )


def finished(
    bench: Benchmark,
    runs: Runs,
    options: argparse.Namespace,
    detector: str,
    task: str,
    methods: Sequence[str],
) -> dict[tuple[float, str], BySeed]:
    """Figures of the finished runs of a detector and task, by noise and method."""
    return {
        (noise, name): {
            seed: figures
            for seed, figures in runs.by_seed(
                **bench.key(detector, task, noise, None, name)
            ).items()
            if seed in options.seeds
        }
        for noise in options.noise
        for name in methods
    }


def overview(
    chosen: dict[tuple[float, str], BySeed], levels: Sequence[float], methods: Sequence[str]
) -> list[dict[str, str | float]]:
    """Rows of a table of I-AUROC by method and contamination."""
    rows: list[dict[str, str | float]] = []
    for name in methods:
        row: dict[str, str | float] = {"method": name}
        for noise in levels:
            if own := chosen[noise, name]:
                row[f"noise {noise:g}"] = spread(run["I-AUROC"] for run in own.values())
        rows.append(row)
    return rows


def tables(
    title: str,
    chosen: dict[tuple[float, str], BySeed],
    levels: Sequence[float],
    methods: Sequence[str],
    row: Callable[[float, str, dict[tuple[float, str], BySeed]], dict[str, str | float]],
) -> str:
    """I-AUROC by method and contamination, then what ``row`` says of each method at every level.

    Empty without finished runs.
    """
    levels = [noise for noise in levels if any(chosen[noise, name] for name in methods)]
    if not levels:
        return ""
    methods = [name for name in methods if any(chosen[noise, name] for noise in levels)]
    parts = [f"### {title}: I-AUROC", table(overview(chosen, levels, methods))]
    for noise in levels:
        seeds = max(len(chosen[noise, name]) for name in methods)
        parts.append(f"{title}, noise {noise:g}, {seeds} seeds")
        parts.append(table([row(noise, name, chosen) for name in methods if chosen[noise, name]]))
    return "\n\n".join(parts)


def common_figures(own: BySeed) -> list[str]:
    """Names of the figures that all of these runs have, in order."""
    first, *others = own.values()
    return [name for name in first if all(name in other for other in others)]
