"""Other ways to train ``breadth.py``'s detectors on tables with bad rows among them.

Most leave rows out, as many as are bad. *Latent outlier exposure* (Qiu, Li, Kloft, Rudolph, Mandt:
Latent outlier exposure for anomaly detection with contaminated data, ICML 2022) trains as many to
look bad instead. *Dataset folding* (McIntosh and Albu, 2026) and *learning bias* (Zhang et al.,
2025) are re-implemented from their texts.
"""

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.ensemble import IsolationForest
from torch import Tensor

from comet_meta import SoftConfidentWeighter
from table_detectors import DeepSVDD, Model
from table_training import STEPS, Task, scored, trained


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


def without_outliers(task: Task, detector: str) -> Model:
    """Trained anew without what lies above the fence of a box plot of a first training's scores."""
    scores = scored(trained(task, detector), task.train)
    q1, q3 = scores.quantile(0.25), scores.quantile(0.75)
    kept = (scores <= q3 + 1.5 * (q3 - q1)).nonzero().flatten()
    return trained(task, detector, rows=kept)


class OutlierExposure:
    """Losses (1 - y) L_n + y L_a of latent outlier exposure, for :func:`trained`.

    1. L_n is the detector's own loss, of Deep SVDD the squared distance, and L_a = 1 / L_n.
    2. y is ``label`` for the rows with the highest L_n - L_a, as many as are bad in the table, and
       0 for the others.
    3. y is chosen anew after every pass through the rows. In the paper that is done in each batch,
       where a small share comes to no row at all. An eighth of the steps are plain training.

    Args:
        task: The table, with the true rate.
        label: 1 (hard) or 0.5 (soft).
    """

    def __init__(self, task: Task, label: float) -> None:
        self.task = task
        self.label = label
        self.labels = torch.zeros(len(task.train))  # y
        self.steps = 0
        self.unseen = 0  # rows until the pass is over

    def __call__(self, model: Model, index: Tensor) -> Tensor:
        """Losses (B,) of the rows at ``index``."""
        if self.steps >= STEPS // 8 and self.unseen <= 0:
            self.relabel(model)
            self.unseen = len(self.task.train)
        self.steps += 1
        self.unseen -= len(index)
        normal, anomalous = self.pair(model, self.task.train[index])
        y = self.labels[index]
        return (1 - y) * normal + y * anomalous

    @staticmethod
    def pair(model: Model, rows: Tensor) -> tuple[Tensor, Tensor]:
        """L_n and L_a of rows (B, C), step 1, (B,) each."""
        normal = model.losses(rows)
        if isinstance(model, DeepSVDD):
            normal = normal * len(model.centre)  # the sum in place of the mean
        return normal, 1 / normal.clamp_min(1e-6)

    @torch.no_grad()
    def relabel(self, model: Model) -> None:
        """Choose y, step 2."""
        normal, anomalous = self.pair(model, self.task.train)
        highest = (normal - anomalous).topk(int(self.task.bad.sum())).indices
        self.labels = torch.zeros(len(self.labels)).index_fill(0, highest, self.label)
