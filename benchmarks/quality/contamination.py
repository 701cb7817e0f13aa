"""Ways to train on contaminated pictures, side by side: the library, its parts, and its rivals.

Every finished run is a JSON line in ``--out``; the same command goes on where it was stopped, and
``--shard i/n`` runs the i-th of n parts, also several at once on one file. A noise level that a
data set has too few bad pictures for is left out, with a message. Noise 0 is the data set as it is
on disk (KSDD2: uncurated).

Differences are paired by seed (contamination, initialisation, order), with a paired t-test over
the seeds. Gap recovered is (variant - plain) / (oracle - plain) on means of I-AUROC over the seeds
that all three have. Cost is the processor time of training and testing over that of plain, the
median over the seeds: it leaves waiting out, but is noisy where others use the machine. Choose
settings with seeds of 100 and up; report with the default ones.

@true: the variant is told the true share of bad pictures; @0.1: it takes it to be a tenth. *grid*
adds a meta-step and a penalty (1 % of the loss before training), with and without the weights.
*scores* fits the weights, in place of the prior, to the model's own scores (own; own+warmup4 waits
for four epochs) or to their mean with the prior (both). *choices* changes single settings:
no-exposure only leaves likely bad pictures out, rejected-alone leaves out nothing besides the
held-out suspects that the model rejects, reviewed is told by a person which of sixty pictures are
bad, learned has a prior that learned from them too, patches weights patches too, false-alarm is
told that a fifth is bad. *published* changes single settings of paper: without the ratio weights,
the penalty or the meta-step, with the part that the penalty would have in a loss summed over
feature values (summed), with one task a batch or one inner step, tested after five more inner steps
(adapted; adapted-0 is its control, with a step size of 0, so that batch norm alone sees their
batches), or with batches of 20, whose four tasks have five pictures, in place of 8, whose tasks
have two; plain-batch-20 is plain training in such batches. *frontier* leaves out other fractions,
of samples, parts or both, see ``left_out.py``. The groups of variants: {groups}

``--page`` runs nothing: it writes a page from all finished runs of ``--out`` that have today's
settings.
"""

import argparse
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ablation import CHOICES, FRONTIER, GRID, PUBLISHED, SCORES
from comet_examples.detectors import DETECTORS
from contamination_page import MAIN, Chosen, over_sets, write_page
from grid import (
    METHODS,
    Benchmark,
    BySeed,
    Variant,
    add_arguments,
    benchmark,
    by_method,
    common_figures,
    finished,
    run_missing,
    tables,
)
from memory_bank import memory_bank, random_memory, soft_patch
from rivals import filter_and_retrain, latent_outlier_exposure, trimming
from runs import Runs, gap_recovered, paired, spread

_LOGGER = logging.getLogger(__name__)

GROUPS: dict[str, dict[str, Variant]] = {
    "base": {name: by_method(name) for name in METHODS},
    "rivals": {
        "trim@true": trimming(None),
        "trim@0.1": trimming(0.1),
        "loe-hard@true": latent_outlier_exposure(1.0, None),
        "loe-hard@0.1": latent_outlier_exposure(1.0, 0.1),
        "loe-soft@true": latent_outlier_exposure(0.5, None),
        "loe-soft@0.1": latent_outlier_exposure(0.5, 0.1),
        "filter-iqr": filter_and_retrain(),
    },
    "banks": {
        "patchcore-random": memory_bank(random_memory),
        "softpatch": memory_bank(soft_patch),
    },
    "grid": GRID,
    "scores": SCORES,
    "choices": CHOICES,
    "published": PUBLISHED,
    "frontier": FRONTIER,
}
VARIANTS = {name: variant for group in GROUPS.values() for name, variant in group.items()}


def main() -> None:
    """Run what is missing, then print the tables and draw the figure."""
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
    if options.page:
        tasks, variants = all_finished(parser, options, bench, runs)
    else:
        run_missing(bench, runs, options, tasks, variants, variant)
    chosen = {
        (detector, task): finished(bench, runs, options, detector, task, variants)
        for detector, task in itertools.product(options.detectors, tasks)
    }
    texts = [
        tables(f"{detector}, {task}", own, options.noise, variants, row)
        for (detector, task), own in chosen.items()
    ]
    if options.figure:
        # On a page, which has all variants in its tables, the figure shows the main ones.
        drawn = [name for name in MAIN if name in variants] if options.page else variants
        draw(chosen, options.noise, drawn, options.figure)
    if options.page:
        machines = sorted({run["machine"] for run in runs})
        write_page(chosen, texts, machines, options.out, options.page, options.figure)
    else:
        print("\n\n".join([*(text for text in texts if text), *over_sets(chosen)]))


def all_finished(
    parser: argparse.ArgumentParser, options: argparse.Namespace, bench: Benchmark, runs: Runs
) -> tuple[list[str], list[str]]:
    """Ask for all runs of the file that have today's settings, in place of what was asked for.

    Returns:
        Their tasks and variants.
    """
    keys = [run["key"] for run in runs]
    named = [
        {name: key[name] for name in ("detector", "task", "noise", "seed", "method")}
        for key in keys
    ]
    today = [own for own, key in zip(named, keys, strict=True) if bench.key(**own) == key]
    if not today:
        parser.error(
            f"{options.out} has no finished run of today's settings, among {len(keys)} in all"
        )
    if len(today) < len(keys):
        _LOGGER.warning("left out: %d runs of other settings", len(keys) - len(today))
    options.detectors = [name for name in DETECTORS if any(k["detector"] == name for k in today)]
    options.noise = sorted({key["noise"] for key in today})
    options.seeds = sorted({key["seed"] for key in today})
    order = {name: place for place, name in enumerate(VARIANTS)}
    variants = dict.fromkeys(key["method"] for key in today)
    return (
        list(dict.fromkeys(key["task"] for key in today)),
        sorted(variants, key=lambda name: order.get(name, len(order))),
    )


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
    add_arguments(parser, Path("runs/contamination.jsonl"))
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.1, 0.2, 0.3, 0.4])
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["base", "rivals", "banks"],
        metavar="NAME",
        help="variants, groups of them, or comet:<meta> for any meta-step",
    )
    parser.add_argument("--figure", type=Path, help="PNG of I-AUROC against contamination")
    parser.add_argument("--page", type=Path, help="Markdown page with all tables")
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


def draw(chosen: Chosen, levels: Sequence[float], variants: Sequence[str], file: Path) -> None:
    """I-AUROC against contamination, a panel for each detector and task."""
    detectors, tasks = (list(dict.fromkeys(key[place] for key in chosen)) for place in (0, 1))
    size = (2.4 + 2.6 * len(tasks), 2.4 * len(detectors) + 0.4)
    palette = colormaps["tab10" if len(variants) <= 10 else "tab20"]
    colours = {name: palette(number % palette.N) for number, name in enumerate(variants)}
    handles: dict[str, Any] = {}
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(detectors), len(tasks), squeeze=False, sharex=True, sharey="col")
    for detector, line in zip(detectors, panels, strict=True):
        for task, axes in zip(tasks, line, strict=True):
            for name in variants:
                points = []
                for noise in levels:
                    values = [
                        run["I-AUROC"] for run in chosen[detector, task][noise, name].values()
                    ]
                    if values:
                        deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
                        points.append((100 * noise, np.mean(values), deviation))
                if points:
                    handles[name] = axes.errorbar(
                        *zip(*points, strict=True), color=colours[name], marker="o", capsize=2
                    )
            axes.set_title(f"{detector}, {task}", fontsize=9)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("bad training pictures, %")
    for axes in panels[:, 0]:
        axes.set_ylabel("I-AUROC")
    shown = [name for name in variants if name in handles]
    figure.legend(
        [handles[name] for name in shown],
        ["told" if name == "contamination@true" else name for name in shown],
        loc="outside right center",
        frameon=False,
        fontsize=8,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
