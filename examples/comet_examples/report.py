"""Pictures and tables of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from comet_examples.datasets import Sample, Transform, load_image, load_mask
from comet_meta import SoftConfidentWeighter

mpl.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
_GOOD, _BAD = "#4c78a8", "#e4572e"


def draw_weights(
    weighter: SoftConfidentWeighter, samples: Sequence[Sample], title: str, file: Path
) -> None:
    """Histograms of the training set's scores, with the threshold, and of its weights.

    Where the bad pictures are known, as under the contamination protocol, they are told apart.

    Args:
        weighter: After training.
        samples: The training set, in the weighter's order.
        title: Heading.
        file: PNG to write.
    """
    bad = np.array([sample.label == 1 for sample in samples])
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, values, name in (
        (left, weighter.scores.cpu().numpy(), "anomaly score"),
        (right, weighter.weights.cpu().numpy(), "weight in training"),
    ):
        groups = [values[~bad], values[bad]] if bad.any() else [values]
        names = ["normal", "bad (hidden from training)"] if bad.any() else ["training pictures"]
        axes.hist(groups, bins=30, stacked=True, label=names, color=[_GOOD, _BAD][: len(groups)])
        axes.set_xlabel(name)
        axes.set_ylabel("pictures")
    left.axvline(float(weighter.threshold), color="black", linestyle=":", label="threshold")
    left.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=150)


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
    for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.axis("off")
    for place, (i, axes) in enumerate(zip(ranking, grid.flat, strict=False), start=1):
        axes.imshow(load_image(samples[i].path, transform).permute(1, 2, 0).numpy())
        # Thumbnail captions: rank, weight and, where the protocol knows it, the truth.
        truth = {0: "normal", 1: samples[i].defect, None: ""}[samples[i].label]
        color = _BAD if samples[i].label == 1 else "black"
        axes.set_title(
            f"{place}. w = {float(weighter.weights[i]):.2f}\n{truth}", color=color, fontsize=7
        )
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
    columns: int = 8,
) -> None:
    """Test pictures, below them their anomaly maps, with the true defects outlined.

    The pictures are spread evenly over the test set: none is chosen for its score. One colour
    scale serves all, from the median of all maps to their 99.5th percentile.

    Args:
        samples: The test set.
        scores: Its scores, shape (N,).
        maps: Its maps, shape (N, H, W).
        transform: How to read the pictures.
        title: Heading.
        file: PNG to write.
        columns: Most pictures to show.
    """
    normal = [i for i, sample in enumerate(samples) if sample.label != 1]
    anomalous = [i for i, sample in enumerate(samples) if sample.label == 1]
    shown = _spread(anomalous, columns - min(len(normal), columns // 4))
    shown = shown + _spread(normal, columns - len(shown))
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
        above.set_title(samples[i].defect, color=_BAD if samples[i].label == 1 else "black")
        below.set_title(f"score {float(scores[i]):.2f}", fontsize=7)
    figure.suptitle(title)
    figure.savefig(file, dpi=150)


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


def _spread(items: list[int], count: int) -> list[int]:
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]
