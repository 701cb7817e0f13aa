"""Figures of merit: detection by image and by pixel, and curation of the training set."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.integrate import trapezoid
from sklearn.metrics import average_precision_score, roc_auc_score

Array = npt.NDArray[Any]


def image_metrics(scores: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, float]:
    """Detection by image.

    Args:
        scores: Anomaly scores, shape (N,).
        labels: 1 anomalous, 0 normal, shape (N,).

    Returns:
        I-AUROC and I-AP, in [0, 1].

    Raises:
        ValueError: If shapes differ, scores are not finite, or a class is missing.
    """
    values, truth = _checked(scores, labels, "image")
    return {
        "I-AUROC": float(roc_auc_score(truth, values)),
        "I-AP": float(average_precision_score(truth, values)),
    }


def pixel_metrics(
    maps: npt.ArrayLike, masks: npt.ArrayLike, *, fpr_limit: float = 0.3
) -> dict[str, float]:
    """Detection by pixel.

    Args:
        maps: Anomaly maps, shape (N, H, W).
        masks: True where defective, shape (N, H, W).
        fpr_limit: For :func:`aupro`, in (0, 1].

    Returns:
        P-AUROC, P-AP and AUPRO, in [0, 1].

    Raises:
        ValueError: If shapes differ, maps are not finite, or a class is missing.
    """
    values, truth = _checked(maps, masks, "pixel")
    return {
        "P-AUROC": float(roc_auc_score(truth.ravel(), values.ravel())),
        "P-AP": float(average_precision_score(truth.ravel(), values.ravel())),
        "AUPRO": aupro(values, truth, fpr_limit=fpr_limit),
    }


def aupro(maps: npt.ArrayLike, masks: npt.ArrayLike, *, fpr_limit: float = 0.3) -> float:
    """Area under the per-region overlap curve, exact over all thresholds.

    The per-region overlap at a threshold is the mean, over all defective regions (8-connected),
    of the share of the region that is found; the false-positive rate is over all normal pixels.
    The area up to ``fpr_limit`` (cut off by linear interpolation) is divided by it.

    Args:
        maps: Anomaly maps, shape (N, H, W).
        masks: True where defective, shape (N, H, W).
        fpr_limit: Highest false-positive rate, in (0, 1].

    Returns:
        AUPRO, in [0, 1].

    Raises:
        ValueError: If shapes differ, maps are not finite, or a class is missing.

    Source: Bergmann et al.: The MVTec anomaly detection dataset, IJCV 2021, section 5.
    """
    values, truth = _checked(maps, masks, "pixel")
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit is {fpr_limit}; expected a rate in (0, 1]")
    # Regions connect within a picture only: no neighbours along the first axis.
    neighbours = np.zeros((3, 3, 3), dtype=bool)
    neighbours[1] = True
    regions, count = ndimage.label(truth, structure=neighbours)
    sizes = np.bincount(regions.ravel(), minlength=count + 1)
    # A pixel found adds its share of its region to the overlap, or of the normal pixels to the FPR.
    shares = 1.0 / (sizes * count)
    shares[0] = 0.0
    order = np.argsort(-values, axis=None, kind="stable")
    overlap = np.cumsum(shares[regions.ravel()[order]])
    fpr = np.cumsum(~truth.ravel()[order], dtype=np.float64) / sizes[0]
    ordered = values.ravel()[order]
    last_of_ties = np.append(ordered[1:] != ordered[:-1], True)
    overlap = np.append(0.0, overlap[last_of_ties])
    fpr = np.append(0.0, fpr[last_of_ties])
    end = int(np.searchsorted(fpr, fpr_limit))  # the first threshold at or beyond the limit
    run, rise = fpr[end] - fpr[end - 1], overlap[end] - overlap[end - 1]
    at_limit = overlap[end - 1] + rise * (fpr_limit - fpr[end - 1]) / run
    area = trapezoid(np.append(overlap[:end], at_limit), np.append(fpr[:end], fpr_limit))
    return float(area / fpr_limit)


def curation_metrics(suspicion: npt.ArrayLike, bad: npt.ArrayLike) -> dict[str, float]:
    """How well the training pictures that don't belong were found.

    Args:
        suspicion: Higher = more suspect, for instance 1 - weight, shape (N,).
        bad: Which pictures are bad, shape (N,).

    Returns:
        AUROC, and precision@k: the share of bad ones among the k most suspect, k their number.

    Raises:
        ValueError: If shapes differ, the suspicion is not finite, or a class is missing.
    """
    values, truth = _checked(suspicion, bad, "training picture")
    k = int(truth.sum())
    most = np.argsort(-values, kind="stable")[:k]
    return {
        "AUROC": float(roc_auc_score(truth, values)),
        "precision@k": float(truth[most].mean()),
    }


def _checked(scores: npt.ArrayLike, labels: npt.ArrayLike, what: str) -> tuple[Array, Array]:
    values, truth = np.asarray(scores), np.asarray(labels).astype(bool)
    if values.shape != truth.shape or not values.size:
        raise ValueError(
            f"scores have shape {values.shape}, labels {truth.shape}; expected one for each {what}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"the scores of some {what}s are NaN or infinite")
    if truth.all() or not truth.any():
        kind = "anomalous" if truth.all() else "normal"
        raise ValueError(f"every {what} is {kind}; the metrics need both kinds")
    return values, truth
