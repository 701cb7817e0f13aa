"""Does it hold on data that nobody tuned on? Every table of a folder, plain against CoMet.

Each ``.npz`` with rows ``X`` (N, C) and labels ``y`` (1 = anomaly), as ADBench has them, is split
70/30 by label; the detector trains without labels on the 70 % and is judged (AUROC) on the others.
Tables of more than 10,000 rows are subsampled by label first. A condition says what the training
part holds:

- ``as-is``: its own anomalies;
- ``clean``: none;
- ``0.1`` (any share): as many of its anomalies as make up that share, where there are enough.

The detectors (an autoencoder, Deep SVDD, a variational autoencoder) train in a plain loop of 600
steps. ``comet`` is the library's default with the prior of ``RowScorer``, and with weights of
values where the loss is a mean over the values of a row (autoencoder); ``comet-samples`` has
weights of whole rows alone; ``comet@rate`` is ``comet`` told the share of anomalies,
``comet@reviewed`` which of sixty rows are bad; with ``comet@learned`` the prior learns from the
sixty too, and rows alone have weights; with ``comet@mistaken`` a twentieth of the answers is wrong;
``comet-own`` has no prior and refits on the model's own scores; ``samples-0.1`` and the like are
points of the frontier (``left_out.py``).
Rivals: ``trim-prior@rate`` and ``trim-own@rate`` leave out the highest scores of the prior or the
model at the true rate, ``trim-own@0.1`` at a guessed one, ``forest@rate`` those of an isolation
forest, ``folding@rate`` those of detectors trained on fifths of the data and applied to the rest
(after McIntosh and Albu, 2026), ``learning-bias@rate`` those of the same detectors applied to all
of it (after Zhang et al., 2025), ``retrain`` those above the fence of a box plot of the scores of a
first training. ``loe-hard@rate`` and ``loe-soft@rate`` train as many as there are bad ones to look
bad (latent outlier exposure, Qiu et al., ICML 2022).

Every run becomes a line of ``--out``; the same command goes on where it stopped, and several
processes may share the work (``--shard 1/4``). Then it prints a table for each condition, with
intervals by bootstrap over *sets*. ``--page`` writes a page with all tables from the finished runs,
and with ``--picture`` a dot for each set; without ``--folder`` nothing is run.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from breadth_page import draw, summaries, write_page
from comet_examples.report import table
from comet_meta import RowScorer, SoftConfidentWeighter, learn_from_review
from left_out import LeftOut, names
from reviewed import review_of
from runs import Figures, Runs, of_shard
from table_detectors import DETECTORS, Model, is_by_value
from table_rivals import (
    OutlierExposure,
    folding,
    forest,
    kept_by,
    learning_bias,
    trimming,
    without_outliers,
)
from table_training import Task, scored, trained

QUICK = 8  # sets


def priors(task: Task, *, by_value: bool) -> tuple[Tensor, Tensor | None]:
    """Prior of the rows (N,), and of their values (N, C) where losses come by value."""
    scores, value_scores = RowScorer(seed=task.seed).score_parts(task.train)
    return scores, value_scores if by_value else None


Look = Literal["told", "learned", "mistaken"]
"""What becomes of a look at sixty rows: the weighter is told of it, the prior learns from it too,
or it does from a person who is wrong about a twentieth of the rows."""


def with_prior(
    task: Task, *, by_value: bool, look: Look | None = None, **options: Any
) -> SoftConfidentWeighter:
    """A weighter with these priors, and with what a look at sixty rows shows, if there is one."""
    scores, value_scores = priors(task, by_value=by_value)
    if look is not None:
        mistakes = 0.05 if look == "mistaken" else 0.0
        options["review"] = review_of(scores, task.bad, mistakes, task.seed)
    if look in ("learned", "mistaken"):
        scores, options["review"] = learn_from_review(scores, task.train, options["review"])
        value_scores = None  # a learned ranking of the rows is worth more
    return SoftConfidentWeighter(prior=scores, part_prior=value_scores, **options)


Method = Callable[[Task, str], tuple[Model, SoftConfidentWeighter | None]]


def _comet(task: Task, detector: str) -> tuple[Any, SoftConfidentWeighter]:
    weighter = with_prior(task, by_value=is_by_value(detector))
    return trained(task, detector, weighter), weighter


def _comet_rate(task: Task, detector: str) -> tuple[Any, SoftConfidentWeighter]:
    by_value, rate = is_by_value(detector), min(task.rate, 0.49)
    weighter = with_prior(task, by_value=by_value, contamination=rate)
    return trained(task, detector, weighter), weighter


def _looked(look: Look) -> Method:
    def method(task: Task, detector: str) -> tuple[Any, SoftConfidentWeighter]:
        weighter = with_prior(task, by_value=is_by_value(detector), look=look)
        return trained(task, detector, weighter), weighter

    return method


def _comet_samples(task: Task, detector: str) -> tuple[Any, SoftConfidentWeighter]:
    weighter = with_prior(task, by_value=False)
    return trained(task, detector, weighter), weighter


def _left_out(name: str) -> Method:
    def method(task: Task, detector: str) -> tuple[Any, SoftConfidentWeighter]:
        weighter = LeftOut(name, *priors(task, by_value=is_by_value(detector)))
        return trained(task, detector, weighter), weighter

    return method


def _comet_own(task: Task, detector: str) -> tuple[Any, SoftConfidentWeighter]:
    weighter = SoftConfidentWeighter(len(task.train))
    return trained(task, detector, weighter, refit=True), weighter


def _trim_own(task: Task, detector: str, rate: float | None = None) -> tuple[Any, None]:
    return trained(task, detector, trimming(task.rate if rate is None else rate), refit=True), None


def _exposed(label: float) -> Method:
    return lambda task, detector: (
        trained(task, detector, losses=OutlierExposure(task, label)),
        None,
    )


USUAL: dict[str, Method] = {
    "plain": lambda task, detector: (trained(task, detector), None),
    "oracle": lambda task, detector: (
        trained(task, detector, rows=torch.from_numpy(np.flatnonzero(~task.bad))),
        None,
    ),
    "comet": _comet,
    "comet@rate": _comet_rate,
    "comet@reviewed": _looked("told"),
    "comet@learned": _looked("learned"),
    "comet@mistaken": _looked("mistaken"),
    "comet-samples": _comet_samples,
    "comet-own": _comet_own,
    "trim-prior@rate": lambda task, detector: (
        trained(task, detector, rows=kept_by(task, RowScorer(seed=task.seed)(task.train))),
        None,
    ),
    "trim-own@rate": _trim_own,
    "trim-own@0.1": lambda task, detector: _trim_own(task, detector, 0.1),
    "forest@rate": lambda task, detector: (
        trained(task, detector, rows=kept_by(task, forest(task))),
        None,
    ),
    "folding@rate": lambda task, detector: (
        trained(task, detector, rows=kept_by(task, folding(task, detector))),
        None,
    ),
    "learning-bias@rate": lambda task, detector: (
        trained(task, detector, rows=kept_by(task, learning_bias(task, detector))),
        None,
    ),
    "loe-hard@rate": _exposed(1.0),
    "loe-soft@rate": _exposed(0.5),
    "retrain": lambda task, detector: (without_outliers(task, detector), None),
}
FRONTIER: dict[str, Method] = {name: _left_out(name) for name in names()}
METHODS = USUAL | FRONTIER


def judged(task: Task, detector: str, method: str) -> Figures:
    """AUROC on the test rows; of a method with weights also what it left out."""
    model, weighter = METHODS[method](task, detector)
    figures = {"AUROC": float(roc_auc_score(task.labels, scored(model, task.test).numpy()))}
    if weighter is not None:
        weights = weighter.mean_weights().numpy()
        figures |= {"mean weight": float(weights.mean()), "proven": weighter.contamination_.low}
        if task.bad.any():
            suspicion = weighter.ranking_scores().nan_to_num(nan=0).numpy()
            figures["ranking AUROC"] = float(roc_auc_score(task.bad, suspicion))
    return figures


def is_needed(condition: str, detector: str, method: str) -> bool:
    """Whether a run says something that no other does."""
    if condition == "clean" and method == "oracle":
        return False  # plain training
    return is_by_value(detector) or not method.startswith(("parts", "both"))


def main() -> None:
    """Run what is missing, then print the tables and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, list(DETECTORS), list(METHODS), Path("docs/results/breadth.jsonl"))
    parser.set_defaults(methods=list(USUAL))
    parser.add_argument("--picture", type=Path, help="a PNG with one dot a set")
    parser.add_argument("--page", type=Path, help="a Markdown page with all tables")
    options = parser.parse_args()
    finished = finished_runs(parser, options, judged, is_needed)
    if options.picture:
        draw(finished, options.detectors, options.conditions, options.picture)
    if options.page:
        write_page(finished, DETECTORS, METHODS, options.page, options.picture)


def add_arguments(
    parser: argparse.ArgumentParser, detectors: list[str], methods: list[str], out: Path
) -> None:
    """What every benchmark of tables asks for."""
    parser.add_argument("--folder", type=Path, help="with .npz tables, at any depth")
    parser.add_argument("--detectors", nargs="+", choices=detectors, default=detectors)
    parser.add_argument("--conditions", nargs="+", default=["as-is", "clean"])
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--half", choices=("a", "b"), help="every other set, by name")
    parser.add_argument("--shard", default="1/1", help="this process's part of the sets, as 1/4")
    parser.add_argument(
        "--least-rows", type=int, default=0, help="tables with fewer training rows are left out"
    )
    parser.add_argument("--quick", action="store_true", help="8 sets, seed 0, four methods")
    parser.add_argument("--out", type=Path, default=out)


def finished_runs(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    judge: Callable[[Task, str, str], Figures],
    is_needed: Callable[[str, str, str], bool],
) -> list[dict[str, Any]]:
    """Run what is missing, if there is a folder, and print a table for each condition.

    Args:
        parser: Raises what is wrong with the options.
        options: Those of :func:`add_arguments`.
        judge: Figures of a run, from task, detector and method.
        is_needed: Whether a run says something, from condition, detector and method.

    Returns:
        All finished runs.
    """
    runs = Runs(options.out)
    if options.folder:
        for file in chosen_files(parser, options):
            run_missing(file, options, runs, judge, is_needed)
    finished = list(runs)
    if options.least_rows:
        if not options.folder:
            parser.error("--least-rows needs --folder, which tells the sizes of the tables")
        large = {file.stem for file in chosen_files(parser, options)}
        finished = [run for run in finished if run["key"]["set"] in large]
    if not finished:
        parser.error(f"no finished runs in {options.out}: give --folder, so that there will be")
    for condition in options.conditions:
        print(f"\nTraining sets {condition}\n")
        print(table(summaries(finished, options.detectors, condition, options.methods)))
    return finished


def chosen_files(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Path]:
    """The tables of this process; ``--quick`` also limits the other options."""
    files = sorted(options.folder.rglob("*.npz"), key=lambda file: file.stem)
    if not files:
        parser.error(f"no .npz below {options.folder}; expected tables with X and y as in ADBench")
    if options.least_rows:
        files = [f for f in files if len(Task(f, "as-is", 0).train) >= options.least_rows]
    if options.quick:
        files, options.seeds = files[:: max(1, len(files) // QUICK)][:QUICK], [0]
        options.methods = ["plain", "oracle", "comet", "comet@rate"]
    if options.half:
        files = files[options.half == "b" :: 2]
    return of_shard(files, options.shard)


def run_missing(
    file: Path,
    options: argparse.Namespace,
    runs: Runs,
    judge: Callable[[Task, str, str], Figures],
    is_needed: Callable[[str, str, str], bool],
) -> None:
    """Run what isn't finished of a table."""
    torch.set_num_threads(1)
    finished = {tuple(sorted(run["key"].items())) for run in runs}
    for condition in options.conditions:
        for seed in options.seeds:
            try:
                task = Task(file, condition, seed)
            except ValueError as error:
                print(f"left out: {error}")
                break
            for detector, method in itertools.product(options.detectors, options.methods):
                key = {
                    "set": file.stem,
                    "condition": condition,
                    "detector": detector,
                    "method": method,
                    "seed": seed,
                }
                done = tuple(sorted(key.items())) in finished
                if not done and is_needed(condition, detector, method):
                    runs.add(key, judge(task, detector, method))


if __name__ == "__main__":
    main()
