"""Tables as ADBench has them, and how ``breadth.py`` trains a detector on one.

The detectors train in a plain loop of 600 steps, whatever the table.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comet_meta import CoMetOptimizerWrapper, SoftConfidentWeighter
from table_detectors import DETECTORS, AutoEncoder, Model

Array = NDArray[Any]
Losses = Callable[[Model, Tensor], Tensor]
"""From a model and the positions (B,) of rows to their losses (B,)."""

MOST_ROWS = 10_000
STEPS = 600
BATCH = 128
REFIT_EVERY = 100


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
    losses: Losses | None = None,
) -> Model:
    """A detector after 600 steps.

    Args:
        task: The table.
        detector: Its name.
        weighter: Weights of the rows, and of their values if it has any.
        refit: Fit the weights every 100 steps, to the detector's own scores.
        rows: Positions of the rows to train on, shape (K,); None for all.
        losses: Other losses than the detector's own.
    """
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
        found = losses(model, index) if losses else own_losses(model, task, weighter, index)
        optimizer.objective(found, index).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if refit and weighter is not None and (step + 1) % REFIT_EVERY == 0:
            weighter.fit(scored(model, task.train))
    return model


def own_losses(
    model: Model, task: Task, weighter: SoftConfidentWeighter | None, index: Tensor
) -> Tensor:
    """Losses (B,), of weighted values where there are weights of values."""
    rows = task.train[index]
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
