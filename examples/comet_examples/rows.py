"""Beyond pictures: rows of numbers, and trainings with and without CoMet compared on them."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.stats import ttest_rel
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor

from comet_examples.metrics import curation_metrics, image_metrics
from comet_examples.report import table
from comet_meta import SoftConfidentWeighter
from comet_meta.cli import parse_contamination

_TEST_SHARE = 0.3


@dataclass(frozen=True)
class Rows:
    """Rows of which it is known whether they are normal.

    Attributes:
        normal: Shape (N, D).
        anomalous: Shape (M, D).
    """

    normal: Tensor
    anomalous: Tensor


class Draw(NamedTuple):
    """One contaminated training set and its test set.

    Attributes:
        train: Shape (T, D).
        bad: Which of its rows are bad, bool (T,). Hidden from training.
        test: Shape (S, D).
        anomalous: Which of the test rows are, bool (S,).
    """

    train: Tensor
    bad: Tensor
    test: Tensor
    anomalous: Tensor


class Fitted(NamedTuple):
    """A trained model.

    Attributes:
        scores: Anomaly scores of rows, (B, D) -> (B,).
        weighter: What it learned about its training rows, if it was trained with CoMet.
    """

    scores: Callable[[Tensor], Tensor]
    weighter: SoftConfidentWeighter | None


Weights = Literal["none", "own", "prior"]
"""From the model's own scores; or from these and a prior by a memory of the rows."""
Contamination = float | Literal["auto"]
"""Share of bad rows that the weights are told, in [0, 0.5)."""
Fit = Callable[[Tensor, Weights, Contamination], Fitted]
"""Trains a model on rows (T, D)."""

_METHODS: dict[str, Weights] = {
    "plain": "none",
    "oracle": "none",
    "comet": "prior",
    "comet, no prior": "own",
}


def breast_cancer() -> list[Rows]:
    """Cell nuclei of 357 benign (normal) and 212 malignant tumours, 30 measurements each.

    Wolberg, Street, Mangasarian 1995, as scikit-learn ships it.
    """
    values, benign = load_breast_cancer(return_X_y=True)
    return [_rows(values, benign == 1)]


def digits() -> list[Rows]:
    """1,797 handwritten digits as 64 grey values; each digit in turn is the normal one.

    Alpaydin, Kaynak 1998, as scikit-learn ships it.
    """
    values, digit = load_digits(return_X_y=True)
    return [_rows(values, digit == normal) for normal in range(10)]


def power_demand() -> list[Rows]:
    """Italy's demand for electric power on 1,096 days, 24 hourly values, each day z-normalised.

    Days from October to March are normal, those from April to September anomalous: the season
    shows in the shape of the day. The series is the ``ItalyPowerDemand`` of the UCR archive, which
    the package ``aeon`` ships; only its files are read, so it needs none of its dependencies.

    Keogh, Wei, Xi, Lonardi, Shieh, Sirowy: Intelligent Icons, ICDM 2006; Dau et al.: The UCR time
    series archive, 2019.

    Raises:
        ModuleNotFoundError: If the package isn't there.
    """
    spec = find_spec("aeon")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the power series are not installed: pip install --no-deps aeon (only its files are "
            "read)"
        )
    folder = Path(spec.origin).parent / "datasets" / "data" / "ItalyPowerDemand"
    days, seasons = [], []
    for part in ("TRAIN", "TEST"):
        text = (folder / f"ItalyPowerDemand_{part}.ts").read_text(encoding="utf-8")
        for line in text.partition("@data\n")[2].split():
            day, season = line.split(":")
            days.append([float(value) for value in day.split(",")])
            seasons.append(season)
    return [_rows(np.array(days), np.array(seasons) == "1")]


def contaminated(rows: Rows, noise: float, seed: int) -> Draw:
    """Draw a training set with bad rows in it.

    30 % of the normal rows are kept for the test. The bad rows leave the test set. All rows are
    standardised by mean and standard deviation of the training set, bad rows included.

    Args:
        rows: All rows.
        noise: Share of bad rows in the training set, in [0, 1).
        seed: Decides the draw.

    Returns:
        Training and test set.

    Raises:
        ValueError: If there are too few anomalous rows.
    """
    generator = np.random.default_rng(seed)
    normal = rows.normal[generator.permutation(len(rows.normal))]
    anomalous = rows.anomalous[generator.permutation(len(rows.anomalous))]
    held_out = round(_TEST_SHARE * len(normal))
    bad = round(noise / (1 - noise) * (len(normal) - held_out))
    if bad >= len(anomalous):
        raise ValueError(
            f"noise {noise} takes {bad} of {len(anomalous)} anomalous rows and leaves none for the "
            "test; take less noise"
        )
    train = torch.cat([normal[held_out:], anomalous[:bad]])
    test = torch.cat([normal[:held_out], anomalous[bad:]])
    mean, std = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)
    return Draw(
        (train - mean) / std,
        torch.arange(len(train)) >= len(normal) - held_out,
        (test - mean) / std,
        torch.arange(len(test)) >= held_out,
    )


def main(title: str, fit: Fit, cases: Sequence[Rows]) -> None:
    """Print what an example script has to say.

    Args:
        title: First line.
        fit: Trains a model.
        cases: The data.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument(
        "--contamination",
        type=parse_contamination,
        default="auto",
        metavar="auto|SHARE",
        help="share of bad rows that CoMet is told, in [0, 0.5) (default: %(default)s; it is 0.1)",
    )
    options = parser.parse_args()
    print(f"{title}, 5 seeds\n")
    print(compare(fit, cases, contamination=options.contamination))


def compare(
    fit: Fit,
    cases: Sequence[Rows],
    *,
    noise: float = 0.1,
    seeds: Sequence[int] = range(5),
    contamination: Contamination = "auto",
) -> str:
    """Train plainly, without the bad rows, and with CoMet's weights of either kind.

    The draws and seeds are the same for all.

    Args:
        fit: Trains a model.
        cases: Figures are averaged over them before they are averaged over seeds.
        noise: Share of bad rows in the training sets.
        seeds: Seeds of draws and trainings.
        contamination: What CoMet is told about the share of bad rows.

    Returns:
        A Markdown table: mean ± standard deviation over seeds, and the difference to plain training
        with the p value of a paired t-test.
    """
    figures: dict[str, list[float]] = {method: [] for method in _METHODS}
    curation: dict[str, list[float]] = {method: [] for method in _METHODS}
    for seed in seeds:
        draws = [contaminated(rows, noise, seed) for rows in cases]
        for method, weights in _METHODS.items():
            detection, ranking = [], []
            for draw in draws:
                torch.manual_seed(seed)
                train = draw.train[~draw.bad] if method == "oracle" else draw.train
                scores, weighter = fit(train, weights, contamination)
                with torch.no_grad():
                    detection.append(image_metrics(scores(draw.test), draw.anomalous)["I-AUROC"])
                if weighter is not None:
                    place = weighter.ranking().argsort()
                    ranking.append(curation_metrics(-place, draw.bad)["AUROC"])
            figures[method].append(float(np.mean(detection)))
            if ranking:
                curation[method].append(float(np.mean(ranking)))
    lines: list[dict[str, str | float]] = []
    for method, values in figures.items():
        line: dict[str, str | float] = {"method": method, "AUROC": _spread(values)}
        if method != "plain":
            difference = np.mean(np.subtract(values, figures["plain"]))
            p = ttest_rel(values, figures["plain"]).pvalue
            significance = f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"
            line["minus plain"] = f"{difference:+.3f} ({significance})"
        if curation[method]:
            line["who is bad? AUROC"] = _spread(curation[method])
        lines.append(line)
    return table(lines)


def _rows(values: object, normal: object) -> Rows:
    tensor, chosen = torch.as_tensor(values, dtype=torch.float32), torch.as_tensor(normal)
    return Rows(tensor[chosen], tensor[~chosen])


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
