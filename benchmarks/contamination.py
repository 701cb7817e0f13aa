"""Ways to train on contaminated data, side by side: with the library, its parts, and its rivals.

Every finished run is a JSON line in ``--out``; the same command goes on where it was stopped, and
``--shard i/n`` runs the i-th of n parts, also several at once on one file. plain, oracle, paper,
comet and comet:<meta> are the runs of table.py, and one file serves both.

Differences are paired by seed (contamination, initialisation, order), with a paired t-test over
the seeds. Gap recovered is (variant - plain) / (oracle - plain) on means of I-AUROC over the seeds
that all three have. Cost is the processor time of training and testing over that of plain, the
median over the seeds: it leaves waiting out, but is noisy where others use the machine. Choose
settings with seeds of 100 and up; report with the default ones.

@true: the variant is given the true share of bad pictures; @0.1: it takes it to be a tenth. Patch
memories: +top takes the mean of the highest patch scores as the detectors do, in place of the
published score. *grid* switches weights, meta-step and penalty (1 % of the loss before training) on
or off; *scores* fits the weights, in place of the prior, to the model's own scores or their mean
with the prior; the loss or the mean of all patches in place of the score;
epochs of warm-up; epochs from one fit to the next; momentum 0.5. *choices* changes single settings:
no-exposure only leaves likely bad pictures out, one-product measures distances by what is usual in
the set alone (``MemoryScorer(scale=inf)``), patches leaves of SimpleNet's likely bad pictures only
the most anomalous patches out. The groups of variants: {groups}
"""

import argparse
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ablation import CHOICES, GRID, SCORES
from grid import (
    METHODS,
    BySeed,
    Variant,
    add_arguments,
    benchmark,
    by_method,
    common_figures,
    finished,
    print_tables,
    run_missing,
)
from memory_bank import greedy_memory, memory_bank, random_memory, soft_patch
from rivals import filter_and_retrain, latent_outlier_exposure, trimming
from runs import gap_recovered, paired, spread

_TOP = 5

GROUPS: dict[str, dict[str, Variant]] = {
    "base": {name: by_method(name) for name in METHODS},
    "rivals": {
        "trim@true": trimming(None),
        "trim@0.1": trimming(0.1),
        "loe-hard@true": latent_outlier_exposure(1.0, None),
        "loe-hard@0.1": latent_outlier_exposure(1.0, 0.1),
        "loe-soft@true": latent_outlier_exposure(0.5, None),
        "loe-soft@0.1": latent_outlier_exposure(0.5, 0.1),
        "filter-iqr": filter_and_retrain("hard"),
        "filter-trimmed": filter_and_retrain("trimmed"),
    },
    "banks": {
        "patchcore-random": memory_bank(random_memory),
        "patchcore-random+top": memory_bank(random_memory, _TOP),
        "patchcore": memory_bank(greedy_memory),
        "patchcore+top": memory_bank(greedy_memory, _TOP),
        "softpatch": memory_bank(soft_patch),
        "softpatch+top": memory_bank(soft_patch, _TOP),
    },
    "grid": GRID,
    "scores": SCORES,
    "choices": CHOICES,
}
VARIANTS = {name: variant for group in GROUPS.values() for name, variant in group.items()}


def main() -> None:
    """Run what is missing, then print the tables."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = _parser()
    options = parser.parse_args()
    variants = expanded(options.variants)
    for name in variants:
        if name not in VARIANTS and not name.startswith("comet:"):
            parser.error(
                f"there's no variant {name!r}; there are {', '.join([*GROUPS, *VARIANTS])}"
            )
    bench, tasks, runs = benchmark(options)
    run_missing(bench, runs, options, tasks, variants, variant)
    for detector, task in itertools.product(options.detectors, tasks):
        chosen = finished(bench, runs, options, detector, task, variants)
        print_tables(f"{detector}, {task}", chosen, options.noise, variants, row)


def variant(name: str) -> Variant:
    """A variant by name; comet:<meta> for any meta-step."""
    return VARIANTS.get(name) or by_method(name)


def expanded(names: Sequence[str]) -> list[str]:
    """Names with those of groups in place of the groups, none twice."""
    return list(dict.fromkeys(each for name in names for each in GROUPS.get(name, [name])))


def _parser() -> argparse.ArgumentParser:
    groups = "; ".join(f"{group} = {', '.join(members)}" for group, members in GROUPS.items())
    parser = argparse.ArgumentParser(
        description=str(__doc__).format(groups=groups),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser, Path("runs/table.jsonl"))
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.1, 0.2, 0.3, 0.4])
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["base", "rivals", "banks"],
        metavar="NAME",
        help="variants, or groups of them",
    )
    return parser


def row(noise: float, name: str, chosen: dict[tuple[float, str], BySeed]) -> dict[str, str | float]:
    """Figures of a variant at a noise level: mean ± standard deviation over seeds."""
    own = chosen[noise, name]
    plain, oracle, comet = (chosen.get((noise, other), {}) for other in METHODS if other != "paper")
    cells: dict[str, str | float] = {"variant": name, "seeds": str(len(own))}
    cells["I-AUROC"] = spread(run["I-AUROC"] for run in own.values())
    for other, theirs in (("plain", plain), ("comet", comet)):
        cells[f"- {other}"] = paired(own, theirs, "I-AUROC") if name != other else ""
    cells["gap recovered"] = common_gap(own, plain, oracle)
    cells["cost"] = cost(own, plain)
    for figure in common_figures(own):
        if figure != "I-AUROC" and not figure.endswith("seconds"):
            cells[figure] = spread(run[figure] for run in own.values())
    return {column: cell or "-" for column, cell in cells.items()}


def common_gap(own: BySeed, plain: BySeed, oracle: BySeed) -> str:
    """Gap recovered over the seeds that all have; empty without any, or without a gap."""
    common = own.keys() & plain.keys() & oracle.keys()
    if not common:
        return ""
    gap = gap_recovered(*({seed: runs[seed] for seed in common} for runs in (own, plain, oracle)))
    return f"{gap:.2f}" if np.isfinite(gap) else ""


def cost(own: BySeed, plain: BySeed) -> str:
    """Median over the common seeds of the processor time's ratio to plain; empty without any."""
    clock = "processor seconds"
    ratios = [
        own[seed][clock] / plain[seed][clock]
        for seed in own.keys() & plain.keys()
        if clock in own[seed] and clock in plain[seed]
    ]
    return f"{np.median(ratios):.2f}" if ratios else ""


if __name__ == "__main__":
    main()
