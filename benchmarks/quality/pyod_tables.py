"""PyOD's detectors through PyOD's own loop: every table of a folder, plain against CoMet.

Tables, split, conditions and figures are those of ``breadth.py``. The detectors have PyOD's default
settings, and the seed. ``plain`` is PyOD alone, ``oracle`` PyOD without the bad rows; ``comet`` is
``CoMetDetector`` as it is, with the prior of ``RowScorer``; ``comet@rate`` is told the true share
of bad rows, ``comet@reviewed`` which of sixty rows are bad, and with ``comet@learned`` the prior
learns from the sixty too; ``comet-values`` has weights of values as well (the autoencoder alone),
``comet-own`` the detector's own scores.

Every run becomes a line of ``--out``; the same command goes on where it stopped. Then it prints a
table for each condition; without ``--folder`` nothing is run.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from pyod.models.auto_encoder import AutoEncoder
from pyod.models.base import BaseDetector
from pyod.models.deep_svdd import DeepSVDD
from pyod.models.vae import VAE
from sklearn.metrics import roc_auc_score

from breadth import add_arguments, finished_runs, with_prior
from comet_meta import SoftConfidentWeighter
from comet_meta.integrations.pyod import CoMetDetector
from runs import Figures
from table_training import Task

DETECTORS: dict[str, Callable[[Task], BaseDetector]] = {
    "autoencoder": lambda task: AutoEncoder(random_state=task.seed, verbose=0),
    "vae": lambda task: VAE(random_state=task.seed, verbose=0),
    "svdd": lambda task: DeepSVDD(
        n_features=task.train.shape[1], random_state=task.seed, verbose=0
    ),
}


WEIGHTERS: dict[str, Callable[[Task], SoftConfidentWeighter]] = {
    "comet": partial(with_prior, by_value=False),
    "comet@rate": lambda task: with_prior(task, by_value=False, contamination=min(task.rate, 0.49)),
    "comet@reviewed": partial(with_prior, by_value=False, look="told"),
    "comet@learned": partial(with_prior, by_value=False, look="learned"),
    "comet-values": partial(with_prior, by_value=True),
    "comet-own": lambda task: SoftConfidentWeighter(len(task.train)),
}
METHODS = ("plain", "oracle", *WEIGHTERS)


def judged(task: Task, detector: str, method: str) -> Figures:
    """AUROC on the test rows; of a method with weights also their mean."""
    rows = task.train.numpy()
    model = DETECTORS[detector](task)
    if method == "oracle":
        rows = rows[~task.bad]
    elif method in WEIGHTERS:
        model = CoMetDetector(model, weighter=WEIGHTERS[method](task))
    model.fit(rows)
    scores = np.nan_to_num(model.decision_function(task.test.numpy()), nan=1e9, posinf=1e9)
    figures = {"AUROC": float(roc_auc_score(task.labels, scores))}
    if method in WEIGHTERS:
        figures["mean weight"] = float(model.weights_.mean())
    return figures


def is_needed(condition: str, detector: str, method: str) -> bool:
    """Whether a run says something that no other does: on clean sets some are plain training."""
    if method == "comet-values" and detector != "autoencoder":
        return False  # its losses don't come by value
    return condition != "clean" or method not in (
        "oracle",
        "comet@rate",
        "comet@reviewed",
        "comet@learned",
    )


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, list(DETECTORS), list(METHODS), Path("docs/results/pyod.jsonl"))
    finished_runs(parser, parser.parse_args(), judged, is_needed)


if __name__ == "__main__":
    main()
