"""Meta-steps and penalties against the length of training: do they steady what is trained long?

Every form is trained once, three and ten times as long as planned, on the same contaminated
pictures, without the weights and with them (``weights+...``):

- ``penalty-<l>``: the published penalty with lambda_0 = l, part of the loss;
- ``constant-<l>``: the same with gamma = 0, so that its strength doesn't follow the losses;
- ``summed-<l>``: the same over the number of a picture's feature values, which is its part in a
  loss that is a sum over them, as FastFlow's often is, see :func:`~ablation.summed_penalty`;
- ``running-<l>``: ours, the same with a strength that can rise to 11 times lambda_0, see
  :class:`RunningScale`;
- ``decoupled-<l>``: AdamW's weight decay l in place of a penalty in the loss;
- ``mldg``, ``fomaml``: the meta-step;
- ``query``: a control of ``fomaml``, whose inner step is next to nothing: what remains is a step on
  the query alone, three tenths of the batch;
- ``plain`` and ``weights``: none of these.

I-AUROC after the last step, the mean over those of ``--seeds`` that a form has at all lengths. The
table over sets compares a form with its base, at each length: that is ``weights`` for
``weights+...`` and ``plain`` for the others. It gives the mean difference over the sets that both
have finished, on their common seeds, its standard error, the p of a paired t-test over the sets,
the worst set, and the mean weight of the bad pictures.

Every finished run is a JSON line in ``--out``; the same command goes on where it was stopped,
``--shard i/n`` runs the i-th of n parts. ``--figure`` draws the finished runs: I-AUROC over the
length, a panel for each set and detector.
"""

import argparse
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import sem, ttest_rel
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ablation import LAMBDA_0, as_comet, relative_strength, summed_penalty, values_of_a_picture
from comet_examples.detectors import Detector
from comet_examples.report import table
from comet_examples.training import FeatureRows, TrainingSettings, wrap
from comet_meta import CoMetOptimizerWrapper, CovarianceMetaRegularizer
from comet_meta.meta.step import MetaMode, MetaStep
from grid import Benchmark, Trial, Variant, add_arguments, benchmark, trained
from runs import Figures, Runs, mean, of_shard, on_common_seeds

_LOGGER = logging.getLogger(__name__)

STRENGTHS = (1e-4, 1e-3, 5e-3)
DECAYS = (1e-2, 1e-1)
Penalty = Callable[[FeatureRows], CovarianceMetaRegularizer]
"""Makes the regularizer from the features of the training set."""
_CELLS = ("sets, ", "", "- base, ", "worst, ", "weight of bad, ")


class RunningScale(CovarianceMetaRegularizer):
    """The penalty with losses in units of how much they varied so far. Ours, not the paper's.

    Over the window, the published strength z-normalises the losses, so that det Sigma = 1 - r^2 and
    lambda varies by 7.5 % at most. Here they are divided by their running deviation, of the last
    hundred steps or so. det Sigma is then near 0 while the losses vary less than they used to, and
    large where they begin to vary more.

    Args:
        base_strength: lambda_0.
    """

    moments: Tensor
    _DECAY = 0.99

    def __init__(self, base_strength: float) -> None:
        super().__init__(base_strength, gamma=10)
        self.register_buffer("moments", torch.zeros(2, 2))  # of losses and of their squares

    def update(self, train_loss: Tensor | float, validation_loss: Tensor | float) -> None:
        """Append the losses of one step, and take them into the running deviation."""
        super().update(train_loss, validation_loss)
        pair = self.pairs[-1]
        self.moments.lerp_(torch.stack([pair, pair.square()]), 1 - self._DECAY)

    @property
    def covariance(self) -> Tensor:
        """Sigma (2, 2) over the window, in units of the running variance; 0 before it is full."""
        mean, square = self.moments / (1 - self._DECAY**self.count).clamp_min(1e-6)
        deviation = (square - mean.square()).clamp_min(1e-12).sqrt()
        return torch.cov((self.pairs / deviation).T) * (self.count >= self.window)


def form(
    weights: bool,
    *,
    meta: MetaMode | MetaStep = "none",
    penalty: Penalty | None = None,
    decay: float = 0,
) -> Variant:
    """A way to train: weights or none, with a meta-step, a penalty or decoupled weight decay."""

    def optimizer_for(
        detector: Detector, data: FeatureRows, settings: TrainingSettings
    ) -> CoMetOptimizerWrapper:
        # The weights are the examples'; only optimizers and regulariser are others.
        weighter = wrap(detector, data, settings).weighter if weights else None
        return CoMetOptimizerWrapper(
            [decayed(one, decay) if decay else one for one in detector.optimizers()],
            weighter=weighter,
            regularizer=penalty(data) if penalty else None,
            meta=meta,
            model=cast("nn.Module", detector),
        )

    return lambda trial: trained(as_comet(trial) if weights else trial, optimizer_for)


def regardless(made: Callable[[], CovarianceMetaRegularizer]) -> Penalty:
    """A penalty that is the same for any training set."""
    return lambda _: made()


def decayed(optimizer: Optimizer, decay: float) -> Optimizer:
    """An AdamW with the parameters and learning rates of an Adam."""
    return AdamW(
        [{"params": group["params"], "lr": group["lr"]} for group in optimizer.param_groups],
        weight_decay=decay,
    )


def _forms() -> dict[str, Variant]:
    found: dict[str, Variant] = {}
    for weights in (False, True):
        own: dict[str, Variant] = {"": form(weights)}
        fixed: dict[str, Callable[[], CovarianceMetaRegularizer]] = {
            **{f"penalty-{x:g}": partial(CovarianceMetaRegularizer, x) for x in STRENGTHS},
            **{f"constant-{x:g}": partial(CovarianceMetaRegularizer, x, 0) for x in STRENGTHS[-1:]},
            **{f"running-{x:g}": partial(RunningScale, x) for x in STRENGTHS[-2:]},
        }
        own |= {name: form(weights, penalty=regardless(made)) for name, made in fixed.items()}
        own[f"summed-{LAMBDA_0:g}"] = form(weights, penalty=summed_penalty)
        own |= {f"decoupled-{x:g}": form(weights, decay=x) for x in DECAYS}
        own |= {
            "mldg": form(weights, meta="mldg"),
            "fomaml": form(weights, meta="fomaml"),
            "query": form(weights, meta=MetaStep("fomaml", inner_lr=1e-12)),
        }
        if weights:
            own = {f"weights+{name}".removesuffix("+"): value for name, value in own.items()}
        found |= {name or "plain": value for name, value in own.items()}
    return found


FORMS = _forms()


def key_of(
    bench: Benchmark, task: str, detector: str, noise: float, times: int, name: str
) -> dict[str, Any]:
    """All that decides a run's figures, but for the seed."""
    return bench.key(detector, task, noise, None, f"{times} x {name}")


def run(
    bench: Benchmark, task: str, detector: str, noise: float, times: int, name: str, seed: int
) -> Figures:
    """Figures of a form that is trained ``times`` as long as planned."""
    experiment = bench.experiment(detector, task)
    split = experiment.split(noise, seed)
    settings = experiment.preset.training("plain", seed=seed)
    length = times * settings.epochs_for(len(split.train))
    settings = replace(settings, epochs=length, steps=None)
    return FORMS[name](Trial(experiment, split, settings))


def penalty_parts(
    bench: Benchmark, tasks: list[str], detectors: list[str], noise: float, seed: int
) -> list[dict[str, str | float]]:
    """Lines of the table of the published penalty's part in a loss before training.

    lambda_0 ||theta||^2 / L, by set and detector, and how many feature values a picture has.
    """
    found: list[dict[str, str | float]] = []
    for task in tasks:
        line: dict[str, str | float] = {"set": task}
        for name in detectors:
            experiment = bench.experiment(name, task)
            data = experiment.rows(experiment.split(noise, seed).train)
            torch.manual_seed(seed)
            detector = experiment.build()
            detector.fit_statistics(data.batches())
            line[name] = f"{LAMBDA_0 / relative_strength(detector, data):.2g}"
            line[f"values, {name}"] = str(values_of_a_picture(data))
        found.append(line)
    return found


def rows(
    runs: Runs, names: list[str], longer: list[int], key: Callable[[int, str], dict[str, Any]]
) -> list[dict[str, str | float]]:
    """Lines of the table of a detector and set: the finished forms at each length."""
    found: list[dict[str, str | float]] = []
    for name in names:
        own = on_common_seeds({times: runs.by_seed(**key(times, name)) for times in longer})
        if any(own.values()):
            seeds = max(len(one) for one in own.values())
            line: dict[str, str | float] = {"form": name, "seeds": str(seeds)}
            found.append(line | {f"{times} x": _figure(one) for times, one in own.items()})
    return found


def over_sets(
    runs: Runs,
    panels: list[str],
    names: list[str],
    longer: list[int],
    key: Callable[[str, int, str], dict[str, Any]],
) -> list[dict[str, str | float]]:
    """Lines of a detector's table over sets: each form against its base, at each length."""
    found: list[dict[str, str | float]] = []
    for name in names:
        base = "weights" if name.startswith("weights+") else "plain"
        line: dict[str, str | float] = {"form": name}
        for times in longer:
            pairs = {}
            for panel in panels:
                own = {one: runs.by_seed(**key(panel, times, one)) for one in (name, base)}
                both = on_common_seeds(own)
                if all(both.values()):
                    pairs[panel.split(", ")[1]] = (both[name], both[base])
            line |= _against(pairs, times, name != base)
        if len(line) > 1:
            found.append(line)
    cells = [f"{cell}{times} x" for times in longer for cell in _CELLS]
    columns = ["form", *(cell for cell in cells if any(cell in line for line in found))]
    return [{column: line.get(column, "") for column in columns} for line in found]


def _against(
    pairs: Mapping[str, tuple[dict[int, Figures], ...]], times: int, differs: bool
) -> dict[str, str | float]:
    """Cells of a length, from the runs of a form and of its base by set."""
    if not pairs:
        return {}
    ours, theirs = np.array([[mean(one, "I-AUROC") for one in pair] for pair in pairs.values()]).T
    cells: dict[str, str | float] = {f"sets, {times} x": str(len(pairs))}
    cells[f"{times} x"] = f"{ours.mean():.3f}"
    if differs:
        differences = ours - theirs
        worst = int(differences.argmin())
        text = f"{differences.mean():+.3f}"
        if len(pairs) > 1 and differences.any():
            p = ttest_rel(ours, theirs).pvalue
            text += f" ± {sem(differences):.3f} (p = {p:.3f})"
        cells[f"- base, {times} x"] = text
        cells[f"worst, {times} x"] = f"{differences[worst]:+.3f} ({[*pairs][worst]})"
    bad = "weight of bad"
    weighted = [own for own, _ in pairs.values() if all(bad in one for one in own.values())]
    if weighted:
        cells[f"{bad}, {times} x"] = f"{np.mean([mean(own, bad) for own in weighted]):.2f}"
    return cells


def _figure(own: dict[int, Figures]) -> str:
    return f"{mean(own, 'I-AUROC'):.3f}" if own else ""


def draw(
    runs: Runs,
    panels: list[str],
    names: list[str],
    longer: list[int],
    key: Callable[[str, int, str], dict[str, Any]],
    file: Path,
    columns: int,
) -> None:
    """I-AUROC over the multiples of the planned length, a panel for each detector and set.

    All points of a panel are means over the same seeds.
    """
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2.6 * columns + 1.6, 2.4 * lines + 0.3), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    shown: dict[str, Line2D] = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        cells = itertools.product(names, longer)
        own = on_common_seeds(
            {(name, times): runs.by_seed(**key(panel, times, name)) for name, times in cells}
        )
        for number, name in enumerate(names):
            found = [(times, own[name, times]) for times in longer if own[name, times]]
            points = [(times, mean(one, "I-AUROC")) for times, one in found]
            if points:
                style = "-" if name.startswith("weights") else "--"
                (shown[name],) = axes.plot(
                    *np.array(points).T, style, marker="o", markersize=4, color=f"C{number}"
                )
        axes.set_xscale("log")
        axes.set_xlim(min(longer) / 1.3, max(longer) * 1.3)
        axes.set_xticks(longer, [f"{times} x" for times in longer])
        axes.minorticks_off()
        axes.set_title(panel, fontsize=9)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("length of training")
    for axes in grid[:, 0]:
        axes.set_ylabel("I-AUROC")
    handles = [shown[name] for name in names if name in shown]
    labels = [name for name in names if name in shown]
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run what is missing, then print the tables and draw the figure."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, Path("runs/regime.jsonl"))
    parser.add_argument("--noise", type=float, default=0.1, help="share of bad training pictures")
    parser.add_argument("--longer", type=int, nargs="+", default=[1, 3, 10])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--figure", type=Path, help="PNG")
    parser.add_argument(
        "--penalty-parts", action="store_true", help="print the penalty's parts in the losses alone"
    )
    options = parser.parse_args()
    bench, tasks, runs = benchmark(options)
    if options.penalty_parts:
        print(
            table(penalty_parts(bench, tasks, options.detectors, options.noise, min(options.seeds)))
        )
        return
    runs = Runs(runs.file, options.seeds)
    grid = itertools.product(options.seeds, options.longer, tasks, options.detectors, options.forms)
    for seed, times, task, detector, name in of_shard(grid, options.shard):
        key = key_of(bench, task, detector, options.noise, times, name) | {"seed": seed}
        if runs.done(key):
            continue
        figures = run(bench, task, detector, options.noise, times, name, seed)
        runs.add(key, figures)
        _LOGGER.info("%s, %s, %d x %s: %.3f", task, detector, times, name, figures["I-AUROC"])

    def key_in(panel: str, times: int, name: str) -> dict[str, Any]:
        detector, task = panel.split(", ")
        return key_of(bench, task, detector, options.noise, times, name)

    panels = [f"{detector}, {task}" for detector in options.detectors for task in tasks]
    for panel in panels:
        lines = rows(runs, options.forms, options.longer, partial(key_in, panel))
        if lines:
            print(f"\n### {panel}\n\n{table(lines)}")
    for detector in options.detectors:
        own = [f"{detector}, {task}" for task in tasks]
        lines = over_sets(runs, own, options.forms, options.longer, key_in)
        if lines:
            print(f"\n### {detector}, over sets\n\n{table(lines)}")
    if options.figure:
        draw(runs, panels, options.forms, options.longer, key_in, options.figure, len(tasks))


if __name__ == "__main__":
    main()
