"""Detectors x data sets x contamination x methods x seeds: tables and a figure.

Every finished run is a JSON line in ``--out``; the same command goes on where it was stopped, and
``--shard i/n`` runs the i-th of n parts, also several at once on one file. The tables and the
figure cover all that is asked for and finished. A noise level that a data set has too few bad
pictures for is left out, with a message. Noise 0 is the data set as it is on
disk (KSDD2: uncurated).
"""

import argparse
import itertools
import logging
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from comet_examples.backbones import DEFAULT_BACKBONE, load_backbone
from comet_examples.datasets import DATASETS, DatasetError, Split, bad_samples
from comet_examples.detectors import DETECTORS
from comet_examples.experiment import Experiment
from comet_examples.features import FeatureStore
from comet_examples.metrics import curation_metrics
from comet_examples.presets import preset_for
from comet_examples.report import table
from comet_examples.training import Method, TrainingSettings
from matplotlib.figure import Figure
from runs import Figures, Runs, gap_recovered, paired, spread

from comet_meta.meta_step import MetaMode

_LOGGER = logging.getLogger(__name__)


def main() -> None:
    """Run what is missing, then print the tables and draw the figure."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parser().parse_args()
    roots = dict(item.split("=", 1) for item in options.root)
    bench = Benchmark(options.backbone, roots, options.device, options.epochs)
    tasks = [task for name in options.tasks for task in bench.expanded(name)]
    runs = Runs(options.out)
    # Seeds outermost: what is finished when the time is up makes whole tables.
    grid = itertools.product(
        options.seeds, tasks, options.detectors, options.noise, options.methods
    )
    part, parts = (int(number) for number in options.shard.split("/"))
    for number, (seed, task, detector, noise, method) in enumerate(grid):
        if number % parts != part - 1:
            continue
        key = bench.key(detector, task, noise, seed, method)
        if runs.done(key):
            continue
        try:
            figures = bench.run(detector, task, noise, seed, method)
        except DatasetError as error:
            _LOGGER.warning("left out: %s", error)
            continue
        runs.add(key, figures)
        _LOGGER.info("%s %s noise %s seed %d %s: %.3f", *grid_name(key), figures["I-AUROC"])
    for detector, task in itertools.product(options.detectors, tasks):
        chosen = {
            (noise, method): {
                seed: figures
                for seed, figures in runs.by_seed(
                    **bench.key(detector, task, noise, None, method)
                ).items()
                if seed in options.seeds
            }
            for noise in options.noise
            for method in options.methods
        }
        print_tables(f"{detector}, {task}", chosen, options.noise, options.methods)
    if options.figure:
        draw(bench, runs, options, tasks)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
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
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.1, 0.2, 0.4])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["plain", "oracle", "paper", "comet"],
        help="plain, oracle, paper, comet, or comet:<meta> for another meta-step",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--epochs", type=int, help="instead of the preset's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shard", default="1/1", help="i/n: run the i-th of n parts")
    parser.add_argument("--out", type=Path, default=Path("runs/table.jsonl"))
    parser.add_argument("--figure", type=Path, help="PNG of I-AUROC against contamination")
    return parser


class Benchmark:
    """Runs and their names.

    Args:
        backbone: timm name.
        roots: Folder of each data set that needs one.
        device: Where to train.
        epochs: Instead of the preset's.
    """

    def __init__(
        self, backbone: str, roots: dict[str, str], device: str, epochs: int | None
    ) -> None:
        self.backbone = backbone
        self.roots = {name: Path(folder) for name, folder in roots.items()}
        self.device = device
        self.epochs = epochs
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
        preset = preset_for(detector, self.backbone, task.partition("/")[0])
        seeded = {} if seed is None else {"seed": seed}
        return {
            "detector": detector,
            "task": task,
            "noise": noise,
            "method": method,
            "backbone": self.backbone,
            "epochs": self.epochs or preset.epochs,
            "transform": str(preset.transform),
            "options": {name: str(value) for name, value in preset.detector.items()},
            **seeded,
        }

    def run(self, detector: str, task: str, noise: float, seed: int, method: str) -> Figures:
        """One training, judged on the test set after its last epoch.

        Raises:
            DatasetError: If there are too few bad pictures for the noise.
        """
        name, _, meta = method.partition(":")
        experiment = self.experiment(detector, task)
        split = experiment.split(noise, seed)
        settings = TrainingSettings(
            cast("Method", name),
            self.epochs or experiment.preset.epochs,
            seed=seed,
            meta=cast("MetaMode", meta) or None,
        )
        start = time.perf_counter()
        outcome = experiment.run(split, settings)
        figures = outcome.figures | {"seconds": time.perf_counter() - start}
        weighter = outcome.training.optimizer.weighter
        bad = bad_samples(split.train)
        if weighter is not None and bad.any():
            curation = curation_metrics(weighter.scores, bad)
            figures |= {f"curation {key}": value for key, value in curation.items()}
            figures["weight of bad"] = float(weighter.weights[torch.from_numpy(bad)].mean())
            figures["weight of good"] = float(weighter.weights[torch.from_numpy(~bad)].mean())
        return figures

    def _experiment(self, detector: str, task: str) -> Experiment:
        dataset, _, category = task.partition("/")
        clean: Split = DATASETS[dataset].load(self.roots.get(dataset), category)
        preset = preset_for(detector, self.backbone, dataset)
        backbone = load_backbone(self.backbone)
        return Experiment(clean, detector, preset, backbone, self.store, self.device)


def grid_name(key: dict[str, Any]) -> tuple[str, str, float, int, str]:
    """Short name of a run for messages."""
    return key["detector"], key["task"], key["noise"], key["seed"], key["method"]


def print_tables(
    title: str,
    chosen: dict[tuple[float, str], dict[int, Figures]],
    levels: Sequence[float],
    methods: Sequence[str],
) -> None:
    """I-AUROC by method and contamination, then all figures of every level."""
    levels = [noise for noise in levels if any(chosen[noise, method] for method in methods)]
    if not levels:
        return
    print(f"\n### {title}: I-AUROC\n")
    rows: list[dict[str, str | float]] = []
    for method in methods:
        row: dict[str, str | float] = {"method": method}
        for noise in levels:
            if own := chosen[noise, method]:
                row[f"noise {noise:g}"] = spread(run["I-AUROC"] for run in own.values())
        rows.append(row)
    print(table(rows))
    for noise in levels:
        seeds = max(len(chosen[noise, method]) for method in methods)
        print(f"\n{title}, noise {noise:g}, {seeds} seeds\n")
        print(table([_row(noise, method, chosen) for method in methods if chosen[noise, method]]))


def _row(
    noise: float, method: str, chosen: dict[tuple[float, str], dict[int, Figures]]
) -> dict[str, str | float]:
    own = chosen[noise, method]
    plain, oracle = (chosen.get((noise, name), {}) for name in ("plain", "oracle"))
    row: dict[str, str | float] = {"method": method}
    for name in next(iter(own.values())):
        values = [figures[name] for figures in own.values()]
        row[name] = f"{np.median(values):.0f}" if name == "seconds" else spread(values)
    if method != "plain" and plain:
        row["I-AUROC - plain"] = paired(own, plain, "I-AUROC")
    if method not in ("plain", "oracle") and plain and oracle:
        gap = gap_recovered(own, plain, oracle)
        row["gap recovered"] = f"{gap:.2f}" if np.isfinite(gap) else "-"
    return row


def draw(bench: Benchmark, runs: Runs, options: argparse.Namespace, tasks: list[str]) -> None:
    """I-AUROC against contamination, a panel for each detector and task."""
    size = (0.6 + 2.6 * len(tasks), 2.4 * len(options.detectors) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(
        len(options.detectors), len(tasks), squeeze=False, sharex=True, sharey="col"
    )
    for detector, line in zip(options.detectors, panels, strict=True):
        for task, axes in zip(tasks, line, strict=True):
            for method in options.methods:
                points = []
                for noise in options.noise:
                    own = runs.by_seed(**bench.key(detector, task, noise, None, method))
                    values = [run["I-AUROC"] for seed, run in own.items() if seed in options.seeds]
                    if values:
                        deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
                        points.append((100 * noise, np.mean(values), deviation))
                if points:
                    axes.errorbar(*zip(*points, strict=True), label=method, marker="o", capsize=2)
            axes.set_title(f"{detector}, {task}", fontsize=9)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("bad training pictures, %")
    for axes in panels[:, 0]:
        axes.set_ylabel("I-AUROC")
    panels[0, 0].legend(frameon=False, fontsize=8)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
