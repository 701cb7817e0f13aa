"""The length of training that pictures without labels choose, and what it is worth.

A fifth of the training pictures is held out; the detector is trained on the others, plainly, once
for each of ``--longer``; the length with the lowest mean loss of the pictures that were held out is
chosen (``comet_examples.length``). Every finished set of these trainings is a JSON line in
``--out``; the same command goes on where it was stopped, and ``--shard i/n`` runs the i-th of n
parts.

What a length is worth is read from ``--whole``: runs on the whole training set at each length, from
``detectors.py`` (clean pictures, ``--noise 0``: those without the set's bad ones) or ``regime.py``
(with bad ones), whose form ``--form`` is. I-AUROC, the mean over those of ``--seeds`` that have all
of it. *chosen* is each seed's own choice, ± s.e. the standard error of its difference from the
shortest length, over the seeds, and in the last line over the sets. *by the median* is what the
median loss would choose in place of the mean.
"""

import argparse
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import sem

from comet_examples.datasets import oracle
from comet_examples.length import chosen, losses_by_length
from comet_examples.report import table
from grid import Benchmark, add_arguments, benchmark
from runs import Figures, Runs, of_shard, on_common_seeds

_LOGGER = logging.getLogger(__name__)


def main() -> None:
    """Run what is missing, then print the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, Path("runs/lengths.jsonl"))
    parser.add_argument("--whole", type=Path, required=True, help="file of runs on whole sets")
    parser.add_argument("--form", default="plain", help="form of training in --whole")
    parser.add_argument("--noise", type=float, default=0.0, help="share of bad training pictures")
    parser.add_argument("--longer", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--metric", default="I-AUROC", help="figure of the test sets in --whole")
    options = parser.parse_args()
    options.longer = sorted(options.longer)
    if not options.whole.exists():
        parser.error(f"--whole: there's no {options.whole}; run detectors.py or regime.py first")
    bench, tasks, runs = benchmark(options)
    runs = Runs(runs.file, options.seeds)
    grid = itertools.product(options.seeds, tasks, options.detectors)
    for seed, task, detector in of_shard(grid, options.shard):
        key = key_of(bench, task, detector, options.noise, options.longer) | {"seed": seed}
        if runs.done(key):
            continue
        figures = run(bench, task, detector, options.noise, options.longer, seed)
        runs.add(key, figures)
        _LOGGER.info("%s, %s, seed %d: %s", task, detector, seed, figures)
    whole = Runs(options.whole, options.seeds)
    for detector in options.detectors:
        print(f"\n### {detector}, {options.form}, {options.metric}\n")
        lines = rows(bench, runs, whole, tasks, detector, options)
        if lines:
            print(table(lines))
        else:
            print(
                f"no run of these sets and seeds in {options.whole} has {options.metric} of the "
                f"form {options.form} at the lengths {options.longer}: run detectors.py or "
                "regime.py first"
            )


def run(
    bench: Benchmark, task: str, detector: str, noise: float, longer: list[int], seed: int
) -> Figures:
    """Mean and median loss of the pictures that were held out, at each length."""
    experiment = bench.experiment(detector, task)
    split = experiment.split(noise, seed)
    if noise == 0:
        split = oracle(split)
    losses = losses_by_length(
        experiment.build,
        experiment.rows(split.train),
        experiment.preset.training("plain", seed=seed),
        lengths=longer,
        device=bench.device,
    )
    figures = {f"median, {times} x": float(own.median()) for times, own in losses.items()}
    return figures | {f"mean, {times} x": float(own.mean()) for times, own in losses.items()}


def key_of(
    bench: Benchmark, task: str, detector: str, noise: float, longer: list[int]
) -> dict[str, Any]:
    """All that decides a run's figures, but for the seed."""
    lengths = " ".join(str(times) for times in longer)
    return bench.key(detector, task, noise, None, f"held out, {lengths} x")


def rows(
    bench: Benchmark,
    runs: Runs,
    whole: Runs,
    tasks: list[str],
    detector: str,
    options: argparse.Namespace,
) -> list[dict[str, str | float]]:
    """Lines of a detector's table: each task that is finished, and the mean over these."""
    longer: list[int] = options.longer
    found: list[dict[str, str | float]] = []
    figures: list[list[float]] = []
    for task in tasks:
        held_out = runs.by_seed(**key_of(bench, task, detector, options.noise, longer))
        trained = {
            times: whole.by_seed(
                **bench.key(detector, task, options.noise, None, f"{times} x {options.form}")
            )
            for times in longer
        }
        own = on_common_seeds({0: held_out, **trained})
        finished = all(own.values())
        if not finished or not all(options.metric in f for n in longer for f in own[n].values()):
            continue
        choices = {seed: choice(losses, longer) for seed, losses in own[0].items()}
        by_length = [[own[times][seed][options.metric] for seed in choices] for times in longer]
        picked = [own[times][seed][options.metric] for seed, times in choices.items()]
        by_median = [
            own[choice(losses, longer, "median")][seed][options.metric]
            for seed, losses in own[0].items()
        ]
        figures.append(np.mean([*by_length, by_median, picked], axis=1).tolist())
        line: dict[str, str | float] = {"set": task, "seeds": str(len(choices))}
        line |= _cells(longer, figures[-1])
        if len(choices) > 1:
            line["± s.e."] = f"{sem(np.subtract(picked, by_length[0])):.3f}"
        taken = [*choices.values()]
        line |= {f"{times} x chosen": str(taken.count(times)) for times in longer[1:]}
        found.append(line)
    if figures:
        means = _cells(longer, np.mean(figures, axis=0).tolist())
        found.append({"set": "mean", **means})
        if len(figures) > 1:
            by_set = np.array(figures)
            found[-1]["± s.e."] = f"{sem(by_set[:, -1] - by_set[:, 0]):.3f}"
    columns = dict.fromkeys(itertools.chain(*found))
    return [{name: row.get(name, "") for name in columns} for row in found]


def choice(figures: Figures, longer: list[int], statistic: str = "mean") -> int:
    """The length that the losses of a run choose, by their mean or their median."""
    return int(chosen({times: figures[f"{statistic}, {times} x"] for times in longer}))


def _cells(longer: list[int], figures: list[float]) -> dict[str, str | float]:
    """Cells of I-AUROC at each length and at the chosen one."""
    *by_length, by_median, picked = figures
    cells: dict[str, str | float] = {
        f"{times} x": f"{one:.3f}" for times, one in zip(longer, by_length, strict=True)
    }
    cells |= {"by the median": f"{by_median:.3f}", "chosen": f"{picked:.3f}"}
    return cells | {"chosen - shortest": f"{picked - by_length[0]:+.3f}"}


if __name__ == "__main__":
    main()
