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
from pathlib import Path

import numpy as np
from grid import (
    METHODS,
    Benchmark,
    BySeed,
    add_arguments,
    benchmark,
    by_method,
    common_figures,
    finished,
    print_tables,
    run_missing,
)
from matplotlib.figure import Figure
from runs import Runs, gap_recovered, paired, spread


def main() -> None:
    """Run what is missing, then print the tables and draw the figure."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parser().parse_args()
    bench, tasks, runs = benchmark(options)
    run_missing(bench, runs, options, tasks, options.methods, by_method)
    for detector, task in itertools.product(options.detectors, tasks):
        chosen = finished(bench, runs, options, detector, task, options.methods)
        print_tables(f"{detector}, {task}", chosen, options.noise, options.methods, _row)
    if options.figure:
        draw(bench, runs, options, tasks)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_arguments(parser, Path("runs/table.jsonl"))
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.1, 0.2, 0.4])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        help="plain, oracle, paper, comet, or comet:<meta> for another meta-step",
    )
    parser.add_argument("--figure", type=Path, help="PNG of I-AUROC against contamination")
    return parser


def _row(
    noise: float, method: str, chosen: dict[tuple[float, str], BySeed]
) -> dict[str, str | float]:
    own = chosen[noise, method]
    plain, oracle = (chosen.get((noise, name), {}) for name in ("plain", "oracle"))
    row: dict[str, str | float] = {"method": method}
    for name in common_figures(own):
        values = [figures[name] for figures in own.values()]
        row[name] = f"{np.median(values):.0f}" if name.endswith("seconds") else spread(values)
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
