"""Detectors that were trained on clean pictures, for as long as planned and longer, and a bank.

Every finished run is a JSON line in ``--out``; the same command goes on where it was stopped, and
``--shard i/n`` runs the i-th of n parts, also several at once on one file. I-AUROC, the mean ±
standard deviation over those of ``--seeds`` that bank and all lengths have, differences with the p
value of a paired t-test; that of the lengths with its standard error, too. *bank* is
``MemoryBank``, a tenth of the patches, at random, on SimpleNet's features. *raw* is the same
trained detector, whose scores aren't standardised by position. A set that has bad training pictures
is trained on without them; *with left out* is the same on a test set to which they are added.
"""

import argparse
import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy.stats import sem

from comet_examples.datasets import oracle
from comet_examples.detectors import ScoresFittable
from comet_examples.detectors.positions import PositionScaler
from comet_examples.report import table
from grid import Benchmark, add_arguments, benchmark
from runs import Figures, Runs, mean, of_shard, on_common_seeds, paired, spread

_LOGGER = logging.getLogger(__name__)

RAW, WITH_LEFT_OUT = "raw", "with left out"


def main() -> None:
    """Run what is missing, then print the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, Path("runs/detectors.jsonl"))
    parser.add_argument(
        "--longer", type=int, nargs="+", default=[1, 5], help="multiples of the preset's length"
    )
    options = parser.parse_args()
    bench, tasks, runs = benchmark(options)
    runs = Runs(runs.file, options.seeds)
    grid = itertools.product(options.seeds, [*options.longer, 0], tasks, options.detectors)
    for seed, times, task, detector in of_shard(grid, options.shard):
        key = key_of(bench, task, detector, times) | {"seed": seed}
        if runs.done(key):
            continue
        figures = run(bench, task, detector, times, seed)
        runs.add(key, figures)
        name = f"{times} x {detector}" if times else "bank"
        _LOGGER.info("%s, %s, seed %d: %.3f", task, name, seed, figures["I-AUROC"])
    for detector in options.detectors:
        print(f"\n### {detector}\n")
        print(table(rows(bench, runs, tasks, detector, options.longer)))


def run(bench: Benchmark, task: str, detector: str, times: int, seed: int) -> Figures:
    """Figures of a detector that is trained ``times`` as long as planned; of the bank for 0."""
    experiment = bench.experiment(detector if times else "simplenet", task)
    whole = experiment.split(0, seed)
    split = oracle(whole)
    left_out = tuple(sample for sample in whole.train if sample.label == 1)
    wider = replace(split, test=split.test + left_out)
    if times == 0:
        figures = dict(experiment.bank(split, seed).figures)
        if left_out:
            figures |= _named(WITH_LEFT_OUT, experiment.bank(wider, seed).figures)
        return figures
    settings = experiment.preset.training("plain", seed=seed)
    outcome = experiment.run(split, settings.stretched(times))
    figures = dict(outcome.figures)
    if left_out:
        judged = experiment.judge(wider, *experiment.predict(outcome.training, wider.test))
        figures |= _named(WITH_LEFT_OUT, judged)
    if isinstance(outcome.training.detector, ScoresFittable):
        cast("Any", outcome.training.detector).usual = PositionScaler()
        raw = experiment.judge(split, *experiment.predict(outcome.training, split.test))
        figures |= _named(RAW, raw)
    return figures


def _named(kind: str, figures: Figures) -> Figures:
    return {f"{kind} {name}": value for name, value in figures.items()}


def key_of(bench: Benchmark, task: str, detector: str, times: int) -> dict[str, Any]:
    """All that decides a run's figures, but for the seed."""
    if times == 0:
        return bench.key("simplenet", task, 0.0, None, "bank")
    return bench.key(detector, task, 0.0, None, f"{times} x plain")


def rows(
    bench: Benchmark, runs: Runs, tasks: list[str], detector: str, longer: list[int]
) -> list[dict[str, str | float]]:
    """Lines of a detector's table: each task that is finished, and the mean over these."""
    lines: list[list[float]] = []
    found: list[dict[str, str | float]] = []
    for task in tasks:
        keys = {times: key_of(bench, task, detector, times) for times in (0, *longer)}
        own = [*on_common_seeds({times: runs.by_seed(**keys[times]) for times in keys}).values()]
        if all(own):  # else it isn't finished
            lines.append([mean(one, "I-AUROC") for one in own])
            found.append(_row(task, own, longer))
    if lines:
        bank, *trained = np.mean(lines, axis=0).tolist()
        found.append({"set": "mean", "bank": f"{bank:.3f}", "- bank": f"{trained[0] - bank:+.3f}"})
        found[-1] |= {f"{n} x": f"{x:.3f}" for n, x in zip(longer, trained, strict=True)}
        if len(trained) > 1:
            found[-1]["longer"] = f"{trained[-1] - trained[0]:+.3f}"
    columns = dict.fromkeys(itertools.chain(*found))
    return [{name: row.get(name, "") for name in columns} for row in found]


def _row(task: str, own: list[dict[int, Figures]], longer: list[int]) -> dict[str, str | float]:
    """A line from the runs of the bank and of each length, by seed."""
    bank, *trained = own
    row: dict[str, str | float] = {"set": task, "seeds": str(len(bank)), "bank": _spread(bank)}
    row |= {f"{times} x": _spread(one) for times, one in zip(longer, trained, strict=True)}
    row["- bank"] = paired(trained[0], bank, "I-AUROC")
    row |= _gained(trained, "I-AUROC", "")
    if _have(trained, name := f"{RAW} I-AUROC"):
        for times, one in zip(longer, trained, strict=True):
            row[f"{RAW}, {times} x"] = f"{mean(one, name):.3f}"
    if _have(own, name := f"{WITH_LEFT_OUT} I-AUROC"):
        for column, one in zip(["bank", *(f"{n} x" for n in longer)], own, strict=True):
            row[f"{WITH_LEFT_OUT}, {column}"] = f"{mean(one, name):.3f}"
        row |= _gained(trained, name, f"{WITH_LEFT_OUT}, ")
    return row


def _have(own: list[dict[int, Figures]], name: str) -> bool:
    return all(name in figures for one in own for figures in one.values())


def _gained(trained: list[dict[int, Figures]], name: str, heading: str) -> dict[str, str | float]:
    """Cells of what the last length adds to the first, with the standard error over the seeds."""
    usual, longest = trained[0], trained[-1]
    if len(trained) < 2:
        return {}
    differences = [longest[seed][name] - usual[seed][name] for seed in usual]
    error = f"{sem(differences):.3f}" if len(differences) > 1 else ""
    return {f"{heading}longer": paired(longest, usual, name), f"{heading}± s.e.": error}


def _spread(runs: dict[int, Figures]) -> str:
    return spread(figures["I-AUROC"] for figures in runs.values())


if __name__ == "__main__":
    main()
