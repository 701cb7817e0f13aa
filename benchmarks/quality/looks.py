"""How many samples must a person look at? The ranking of those that nobody saw, without a training.

Tables, split and conditions are those of ``breadth.py``, as they are. For each number of looks, for
all tables and for the large ones: by how much the estimated share of bad rows is off, and how well
the prior and the one that has learned from the review rank the rows that nobody saw, by the AUROC
of bad against good ones and by the precision among as many as there are bad. Tables without an
unseen bad row don't count. ``--mistakes`` of the answers are wrong.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from comet_examples.metrics import curation_metrics
from comet_examples.report import table
from comet_meta import RowScorer, learn_from_review, share_from_review
from reviewed import review_of
from table_training import Task

_LARGE = 2000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="with .npz tables, at any depth")
    parser.add_argument("--looks", nargs="+", type=int, default=[15, 30, 60, 120])
    parser.add_argument("--mistakes", type=float, default=0.0, help="share of wrong answers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    files = sorted(options.folder.rglob("*.npz"), key=lambda file: file.stem)
    if not files:
        parser.error(f"no .npz below {options.folder}; expected tables with X and y as in ADBench")
    torch.set_num_threads(1)
    found: dict[tuple[int, bool], list[dict[str, float]]] = {}
    for file in files:
        tasks = [Task(file, "as-is", seed) for seed in options.seeds]
        scores = [RowScorer(seed=task.seed)(task.train) for task in tasks]
        for looks in options.looks:
            runs = [
                figures(task, prior, looks, options.mistakes)
                for task, prior in zip(tasks, scores, strict=True)
            ]
            known = [run for run in runs if run]
            if known:
                mean = {name: float(np.mean([run[name] for run in known])) for name in known[0]}
                found.setdefault((looks, len(tasks[0].train) >= _LARGE), []).append(mean)
    print(table([row for looks in options.looks for row in rows(looks, found)]))


def figures(task: Task, prior: torch.Tensor, looks: int, mistakes: float) -> dict[str, float]:
    """What a look is worth on a table; nothing where all bad rows, or all good ones, were seen."""
    review = review_of(prior, task.bad, mistakes, task.seed, looks)
    unseen = np.ones(len(prior), dtype=bool)
    unseen[review[0].numpy()] = False
    bad = task.bad[unseen]
    if bad.all() or not bad.any():
        return {}
    result = {"share off by": abs(share_from_review(prior, *review).estimate - task.rate)}
    learned = learn_from_review(prior, task.train, review).prior
    for name, scores in (("prior", prior), ("learned", learned)):
        found = curation_metrics(scores.numpy()[unseen], bad)
        result |= {f"{figure}, {name}": value for figure, value in found.items()}
    return result


def rows(
    looks: int, found: dict[tuple[int, bool], list[dict[str, float]]]
) -> list[dict[str, str | float]]:
    """Means over all tables, and over the large ones."""
    by_size = {"all": [False, True], f"{_LARGE:,} rows or more": [True]}
    lines: list[dict[str, str | float]] = []
    for name, sizes in by_size.items():
        runs = [run for large in sizes for run in found.get((looks, large), [])]
        if runs:
            line: dict[str, str | float] = {
                "looks": str(looks),
                "tables": name,
                "number": str(len(runs)),
            }
            line |= {key: f"{np.mean([run[key] for run in runs]):.3f}" for key in runs[0]}
            lines.append(line)
    return lines


if __name__ == "__main__":
    main()
