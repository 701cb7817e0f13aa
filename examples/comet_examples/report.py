"""Pictures and tables of a run."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from comet_examples.datasets import Sample, Transform, load_image, load_mask
from comet_meta import SoftConfidentWeighter

mpl.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
mpl.rcParams["text.parse_math"] = False  # names are names, whatever dollar signs they have
_GOOD, _BAD, _UNKNOWN = "#4c78a8", "#e4572e", "#9d9da1"
_KINDS = {
    0: ("normal", _GOOD),
    1: ("bad (hidden from training)", _BAD),
    None: ("unknown", _UNKNOWN),
}


def draw_weights(
    weighter: SoftConfidentWeighter, samples: Sequence[Sample], title: str, file: Path
) -> None:
    """Histograms of the scores that the weights come from, with the threshold, and of the weights.

    Normal, bad and unknown pictures are told apart where there are several of these kinds.

    Args:
        weighter: After training.
        samples: The training set, in the weighter's order.
        title: Heading.
        file: PNG to write.
    """
    labels = [sample.label for sample in samples]
    kinds = {
        label: np.array([other == label for other in labels]) for label in _KINDS if label in labels
    }
    names, colors = zip(*(_KINDS[label] for label in kinds), strict=True)
    if len(kinds) == 1:
        names = ("training pictures",)
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    scores = weighter.scores if weighter.prior is None else weighter.prior
    basis = "anomaly score" if weighter.prior is None else "anomaly score before training (prior)"
    for axes, values, name in (
        (left, scores.double().cpu().numpy(), basis),
        (right, weighter.mean_weights().double().cpu().numpy(), "weight in training"),
    ):
        groups = [values[kind] for kind in kinds.values()]
        axes.hist(groups, bins=_bins(values), stacked=True, label=names, color=colors)
        axes.set_xlabel(name)
        axes.set_ylabel("pictures")
    left.axvline(float(weighter.threshold), color="black", linestyle=":", label="threshold")
    left.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=150)


def _bins(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Edges of 30 bins, also where all values are equal or nearly so."""
    low, high = float(values.min()), float(values.max())
    least = max(1e-6 * max(abs(low), abs(high)), 1e-12)
    if high - low < least:
        low, high = low - least, high + least
    return np.linspace(low, high, 31)


def draw_suspects(
    weighter: SoftConfidentWeighter,
    samples: Sequence[Sample],
    transform: Transform,
    title: str,
    file: Path,
    *,
    rows: int = 3,
    columns: int = 7,
) -> None:
    """Thumbnails of the training pictures that fit in least, most suspect first.

    Args:
        weighter: After training.
        samples: The training set, in the weighter's order.
        transform: How to read the pictures.
        title: Heading.
        file: PNG to write.
        rows: Rows of thumbnails.
        columns: Thumbnails in a row.
    """
    figure = Figure(figsize=(1.25 * columns, 1.55 * rows + 0.4), layout="constrained")
    ranking = weighter.ranking(rows * columns).tolist()
    weights = weighter.mean_weights()
    for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.axis("off")
    for place, (i, axes) in enumerate(zip(ranking, grid.flat, strict=False), start=1):
        axes.imshow(load_image(samples[i].path, transform).permute(1, 2, 0).numpy())
        weight = float(weights[i])
        truth, color = _truth(samples[i])
        axes.set_title(f"{place}. w = {weight:.2f}\n{truth}", color=color, fontsize=7)
    figure.suptitle(title)
    figure.savefig(file, dpi=150)


def draw_heat_maps(
    samples: Sequence[Sample],
    scores: Tensor,
    maps: Tensor,
    transform: Transform,
    title: str,
    file: Path,
    *,
    shown: Sequence[int],
) -> None:
    """Pictures, below them their anomaly maps, with the true defects outlined.

    One colour scale serves all, from the median of all maps to their 99.5th percentile.

    Args:
        samples: Pictures, shown or not.
        scores: Their scores, shape (N,).
        maps: Their maps, shape (N, H, W).
        transform: How to read the pictures.
        title: Heading.
        file: PNG to write.
        shown: Which of them to show, in this order; at least one.
    """
    low, high = np.quantile(maps.numpy(), [0.5, 0.995])
    figure = Figure(figsize=(1.25 * len(shown), 3.2), layout="constrained")
    top, bottom = figure.subplots(2, len(shown), squeeze=False)
    for i, above, below in zip(shown, top, bottom, strict=True):
        picture = load_image(samples[i].path, transform).permute(1, 2, 0).numpy()
        for axes in (above, below):
            axes.imshow(picture)
            axes.axis("off")
        below.imshow(maps[i].numpy(), cmap="inferno", vmin=low, vmax=high, alpha=0.6)
        mask = load_mask(samples[i], transform).numpy()
        if mask.any():
            above.contour(mask, levels=[0.5], colors="lime", linewidths=0.8)
        truth, color = _truth(samples[i])
        above.set_title(truth, color=color)
        below.set_title(f"score {float(scores[i]):.2f}", fontsize=7)
    figure.suptitle(title)
    figure.savefig(file, dpi=150)


def spread(samples: Sequence[Sample], count: int = 8) -> list[int]:
    """Choose pictures evenly over a test set, none for its score.

    Args:
        samples: The test set.
        count: Most pictures to choose.

    Returns:
        Their places: anomalous ones, then others (about a quarter).
    """
    others = [i for i, sample in enumerate(samples) if sample.label != 1]
    anomalous = [i for i, sample in enumerate(samples) if sample.label == 1]
    chosen = _spread(anomalous, count - min(len(others), count // 4))
    return chosen + _spread(others, count - len(chosen))


def table(rows: Sequence[Mapping[str, str | float]]) -> str:
    """A Markdown table.

    Args:
        rows: Cells by column; numbers are printed with three decimals, missing cells as a dash.

    Returns:
        The table, columns in the order of their first appearance.

    Example:
        >>> print(table([{"method": "plain", "I-AUROC": 0.5}, {"method": "comet"}]))
        | method | I-AUROC |
        |--------|---------|
        | plain  | 0.500   |
        | comet  | -       |
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns]
    for row in rows:
        values = [row.get(column, "-") for column in columns]
        cells.append([f"{v:.3f}" if isinstance(v, float) else v for v in values])
    widths = [max(len(line[c]) for line in cells) for c in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def machine() -> str:
    """What figures were measured on: processor or GPU, threads, version of torch."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def printable(name: str) -> str:
    """A file's name with escapes for bytes that are no valid text, which no font can draw."""
    return name.encode(errors="backslashreplace").decode()


def _truth(sample: Sample) -> tuple[str, str]:
    """Caption and colour: empty where nobody knows."""
    caption = {0: "normal", 1: printable(sample.defect), None: ""}[sample.label]
    return caption, _BAD if sample.label == 1 else "black"


def _spread(items: list[int], count: int) -> list[int]:
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]
