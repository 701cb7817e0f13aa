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
first training.

Every run becomes a line of ``--out``; the same command goes on where it stopped, and several
processes may share the work (``--shard 1/4``). Then it prints a table for each condition, with
intervals by bootstrap over *sets*. ``--page`` writes a page with all tables from the finished runs,
and with ``--picture`` a dot for each set; without ``--folder`` nothing is run.
"""

import argparse
import itertools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from torch import Tensor

from breadth_page import draw, summaries, write_page
from comet_examples.report import table
from comet_meta import (
    CoMetOptimizerWrapper,
    RowScorer,
    SoftConfidentWeighter,
    learn_from_review,
)
from left_out import LeftOut, names
from reviewed import review_of
from runs import Figures, Runs
from table_detectors import DETECTORS, AutoEncoder, Model, is_by_value

Array = NDArray[Any]
MOST_ROWS = 10_000
STEPS = 600
BATCH = 128
REFIT_EVERY = 100
QUICK = 8  # sets


class Task:
    """A table under a condition.

    Attributes:
        train: Standardised rows, (N, C).
        bad: Which of them are anomalies, (N,).
        test: Standardised rows, (M, C).
        labels: Which of these are anomalies, (M,).
        rate: Share of anomalies in training.
    """

    def __init__(self, path: Path, condition: str, seed: int) -> None:
        with np.load(path, allow_pickle=False) as file:
            rows, labels = file["X"].astype(np.float64), file["y"].astype(int)
        random = np.random.default_rng([seed, zlib.crc32(path.stem.encode())])
        share = min(1.0, MOST_ROWS / len(rows))
        train, test = [], []
        for label in (0, 1):
            found = random.permutation(np.flatnonzero(labels == label))
            found = found[: max(2, round(share * len(found)))]
            cut = round(0.7 * len(found))
            train.append(found[:cut])
            test.append(found[cut:])
        good, bad = train
        if condition == "clean":
            bad = bad[:0]
        elif condition != "as-is":
            wanted = round(float(condition) / (1 - float(condition)) * len(good))
            if wanted > len(bad):
                raise ValueError(f"{path.stem} has too few anomalies for a share of {condition}")
            bad = bad[:wanted]
        kept = random.permutation(np.concatenate([good, bad]))
        judged = np.concatenate(test)
        mean, deviation = rows[kept].mean(axis=0), rows[kept].std(axis=0)
        deviation[deviation == 0] = 1
        scaled = ((rows - mean) / deviation).clip(-20, 20)
        self.train = torch.from_numpy(scaled[kept]).float()
        self.bad: Array = labels[kept] == 1
        self.test = torch.from_numpy(scaled[judged]).float()
        self.labels: Array = labels[judged] == 1
        self.rate = float(self.bad.mean())
        self.seed = seed


def trained(
    task: Task,
    detector: str,
    weighter: SoftConfidentWeighter | None = None,
    *,
    refit: bool = False,
    rows: Tensor | None = None,
) -> Model:
    """A detector after 600 steps; with ``rows`` (K,), trained on these alone."""
    torch.manual_seed(task.seed)
    model = DETECTORS[detector](task.train)
    optimizer = CoMetOptimizerWrapper(
        torch.optim.Adam(model.parameters(), lr=1e-3), weighter=weighter
    )
    chosen = torch.arange(len(task.train)) if rows is None else rows
    batches: list[Tensor] = []
    for step in range(STEPS):
        if not batches:
            batches = list(torch.split(chosen[torch.randperm(len(chosen))], BATCH))
            if len(batches) > 1 and len(batches[-1]) < BATCH:
                batches.pop()
        index = batches.pop()
        optimizer.zero_grad()
        objective = optimizer.objective(losses_of(model, task.train[index], weighter, index), index)
        objective.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if refit and weighter is not None and (step + 1) % REFIT_EVERY == 0:
            weighter.fit(scored(model, task.train))
    return model


def losses_of(
    model: Model,
    rows: Tensor,
    weighter: SoftConfidentWeighter | None,
    index: Tensor,
) -> Tensor:
    """Losses (B,), of weighted values where there are weights of values."""
    if isinstance(model, AutoEncoder) and weighter is not None and weighter.has_parts:
        return (weighter.part_weights(index) * model.part_losses(rows)).mean(dim=1)
    return model.losses(rows)


@torch.no_grad()
def scored(model: Model, rows: Tensor) -> Tensor:
    """Anomaly scores (N,): the root of the loss, whose tail is shorter."""
    model.eval()
    losses = torch.cat([model.losses(part) for part in torch.split(rows, 4096)])
    model.train()
    return losses.sqrt().nan_to_num(nan=1e9)


def trimming(share: float) -> SoftConfidentWeighter:
    """Hard trimming of a share as a rule, for rivals."""

    def rule(scores: Tensor) -> Tensor:
        out = scores.topk(int(np.ceil(share * len(scores)))).indices
        return torch.ones_like(scores).index_fill(0, out, 0)

    return SoftConfidentWeighter(rule=rule)


def kept_by(task: Task, scores: Tensor) -> Tensor:
    """The rows that stay if those of the highest scores (N,) go, at the true rate."""
    return scores.argsort()[: len(scores) - round(task.rate * len(scores))]


def forest(task: Task) -> Tensor:
    """Scores (N,) of an isolation forest."""
    model = IsolationForest(n_estimators=100, random_state=task.seed).fit(task.train.numpy())
    return torch.from_numpy(-model.score_samples(task.train.numpy())).float()


def by_fifths(task: Task, detector: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each fifth of the rows: which they are, (N,), and the scores (N,) of what it trained."""
    fold = torch.arange(len(task.train)) % 5
    for number in range(5):
        own = fold == number
        yield own, scored(trained(task, detector, rows=own.nonzero().flatten()), task.train)


def folding(task: Task, detector: str) -> Tensor:
    """Sums (N,) of the ranks by detectors that were trained on other fifths."""
    return sum_of(s.argsort().argsort().float() * ~own for own, s in by_fifths(task, detector))


def learning_bias(task: Task, detector: str) -> Tensor:
    """Sums (N,) of the scores by detectors that were trained on a fifth each, also their own."""
    return sum_of(scores for _, scores in by_fifths(task, detector))


def sum_of(terms: Iterator[Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack([*terms]).sum(dim=0)


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


def _retrain(task: Task, detector: str) -> tuple[Any, None]:
    scores = scored(trained(task, detector), task.train)
    q1, q3 = scores.quantile(0.25), scores.quantile(0.75)
    kept = (scores <= q3 + 1.5 * (q3 - q1)).nonzero().flatten()
    return trained(task, detector, rows=kept), None


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
    "retrain": _retrain,
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
    part, parts = (int(number) for number in options.shard.split("/"))
    return files[part - 1 :: parts]


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
