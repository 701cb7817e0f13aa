"""Tables, picture and page of ``breadth.py``, from its finished runs alone."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from comet_examples.report import table

Array = NDArray[Any]
Run = Mapping[str, Any]
Row = dict[str, str | float]

_MAIN = ("plain", "comet", "comet@learned", "comet@rate", "oracle")
_DRAWN = {"comet": "tab:blue", "comet@rate": "tab:orange", "comet@learned": "tab:green"}
_LOSS = 0.005
_DRAWS = 2000
_INTRO = """\
# Tables that nobody tuned on

Every table is split 70/30 by label; a detector trains on the 70 % without labels and is judged
(AUROC) on the others. *as-is*: the training part keeps its own anomalies; *clean*: it has none; a
number: that share of it is bad. *plain* is training without the library, *oracle* training without
the bad rows, *comet* the library's default with the prior of `RowScorer`, for the autoencoder with
weights of values too; *comet-samples* has weights of whole rows alone, `@rate` is told the true
share of bad rows, `@reviewed` which of sixty training rows are bad. With `@learned` the prior has
learned from the sixty too and rows alone have weights, and with `@mistaken` a twentieth of the
answers is wrong. `--help` describes the other methods. Some of them have fewer seeds: *gain* and
*gap* compare each with plain and oracle on the seeds that it has; its *AUROC* is of these alone.

- *gain over plain*: mean over the sets, with its 95 % bootstrap interval over sets.
- *losses*: sets on which the method is more than .005 behind plain; *beyond noise*: of these, those
  where the loss is more than two standard errors of the paired seeds (three seeds or more).
- *gap recovered*: (method - plain) / (oracle - plain) on means over the sets, the part of what the
  bad rows cost that the method gives back; *median of sets*: over sets where they cost more
  than .02.
- *mean weight, least*: mean over the sets, and the set with the lowest mean weight.
- *ranking*: AUROC of bad against good training rows."""
_FIRST = ("as-is", "clean")  # of the conditions


def interval(values: Array, statistic: Callable[[Array], Array]) -> str:
    """A statistic over sets with its 95 % bootstrap interval.

    Args:
        values: Values of each set, shape (S, K).
        statistic: Makes shape (...) of values (..., S, K).
    """
    drawn = np.random.default_rng(0).integers(len(values), size=(_DRAWS, len(values)))
    low, high = np.nanquantile(statistic(values[drawn]), [0.025, 0.975])
    return f"{statistic(values):.3f} ({low:.3f} to {high:.3f})"


def by_seed(
    runs: Iterable[Run], detector: str, condition: str, method: str, name: str
) -> dict[str, dict[int, float]]:
    """A figure of each set and seed."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        key = run["key"]
        if (key["detector"], key["condition"], key["method"]) == (detector, condition, method):
            found.setdefault(key["set"], {})[key["seed"]] = run["figures"].get(name, np.nan)
    return found


def by_set(
    runs: Iterable[Run], detector: str, condition: str, method: str, name: str
) -> dict[str, float]:
    """Means over seeds, by set."""
    found = by_seed(runs, detector, condition, method, name)
    return {name: float(np.mean([*seeds.values()])) for name, seeds in found.items()}


def paired_by_set(
    runs: Iterable[Run], detector: str, condition: str, methods: Iterable[str]
) -> list[dict[str, float]]:
    """AUROC by set of each method, the mean over the seeds that all of them have."""
    runs = list(runs)
    found = [by_seed(runs, detector, condition, method, "AUROC") for method in methods]
    seeds = {
        name: set.intersection(*({*own[name]} for own in found))
        for name in set.intersection(*({*own} for own in found))
    }
    return [
        {
            name: float(np.mean([own[name][seed] for seed in common]))
            for name, common in seeds.items()
            if common
        }
        for own in found
    ]


def gap(gains: Array, room: Array) -> str:
    """Part of the room above plain that is gained, on means over sets (S,), with its interval."""
    pairs = np.stack([gains, room], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw of sets without any room
        return interval(pairs, lambda p: p[..., 0].mean(axis=-1) / p[..., 1].mean(axis=-1))


def beyond_noise(
    ours: Mapping[str, Mapping[int, float]], plain: Mapping[str, Mapping[int, float]]
) -> str:
    """How many sets lose more than .005 and two standard errors of their paired seeds."""
    lost = 0
    for name in ours.keys() & plain.keys():
        seeds = sorted(ours[name].keys() & plain[name].keys())
        if len(seeds) < 3:
            return "-"
        gains = np.array([ours[name][seed] - plain[name][seed] for seed in seeds])
        error = gains.std(ddof=1) / len(seeds) ** 0.5
        lost += gains.mean() < -max(_LOSS, 2 * error)
    return str(lost)


def summary_row(runs: Iterable[Run], detector: str, condition: str, method: str) -> Row | None:
    """A row of the summary; None where runs are missing."""
    runs = list(runs)
    needed = ("plain", method) if condition == "clean" else ("plain", method, "oracle")
    plain, ours, *others = paired_by_set(runs, detector, condition, needed)
    if not plain:
        return None
    sets, oracle = sorted(plain), others[0] if others else {}
    gains = np.array([ours[name] - plain[name] for name in sets])
    row: Row = {
        "detector": detector,
        "training set": condition,
        "method": method,
        "sets": str(len(sets)),
        "AUROC": f"{np.mean([ours[name] for name in sets]):.3f}",
        "gain over plain": interval(gains[:, None], lambda g: g[..., 0].mean(axis=-1)),
        "losses > .005": str(int((gains < -_LOSS).sum())),
        "beyond noise": beyond_noise(
            by_seed(runs, detector, condition, method, "AUROC"),
            by_seed(runs, detector, condition, "plain", "AUROC"),
        ),
        "worst": f"{gains.min():+.3f} {sets[int(gains.argmin())]}",
    }
    if condition != "clean":
        room = np.array([oracle[name] - plain[name] for name in sets])
        row["gap recovered"] = gap(gains, room)
        wide = room > 0.02
        row["median of sets"] = f"{np.median(gains[wide] / room[wide]):.2f}" if wide.any() else ""
    weights = by_set(runs, detector, condition, method, "mean weight")
    if np.isfinite([*weights.values()]).all():
        row["mean weight, least"] = (
            f"{np.mean([*weights.values()]):.3f}, {min(weights.values()):.3f}"
        )
    ranking = [*by_set(runs, detector, condition, method, "ranking AUROC").values()]
    if np.isfinite(ranking).any():
        row["ranking"] = f"{np.nanmean(ranking):.3f}"
    return row


def summaries(
    runs: Sequence[Run], detectors: Iterable[str], condition: str, methods: Collection[str]
) -> list[Row]:
    """The rows of all detectors and methods that have runs."""
    found = (summary_row(runs, d, condition, m) for d in detectors for m in methods)
    return [row for row in found if row is not None]


def halves(
    runs: Sequence[Run], detectors: Iterable[str], condition: str, methods: Collection[str]
) -> list[Row]:
    """The main column of the summary on every other set, and on the others."""
    methods = [name for name in methods if name not in ("plain", "oracle")]
    sets = sorted({run["key"]["set"] for run in runs})
    parts = {
        "half a": [run for run in runs if run["key"]["set"] in sets[0::2]],
        "half b": [run for run in runs if run["key"]["set"] in sets[1::2]],
    }
    column = "gain over plain" if condition == "clean" else "gap recovered"
    rows: dict[tuple[str | float, str | float], Row] = {}
    for half, part in parts.items():
        for row in summaries(part, detectors, condition, methods):
            own = {name: row[name] for name in ("detector", "method")}
            rows.setdefault((own["detector"], own["method"]), own)[half] = row[column]
    return [*rows.values()]


def every_set(runs: Sequence[Run], detector: str, condition: str) -> list[Row]:
    """AUROC of each set with the main methods, the mean over seeds."""
    columns = {method: by_set(runs, detector, condition, method, "AUROC") for method in _MAIN}
    sets = sorted({name for column in columns.values() for name in column})
    rows: list[Row] = [{"set": name} for name in sets]
    for row, name in zip(rows, sets, strict=True):
        row |= {method: f"{own[name]:.3f}" for method, own in columns.items() if name in own}
    return rows


def draw(
    runs: Sequence[Run], detectors: Sequence[str], conditions: Sequence[str], file: Path
) -> None:
    """One dot a set and method: plain against CoMet; no panel where there are no runs."""
    size = (3.4 * len(conditions), 3.4 * len(detectors))
    figure = Figure(figsize=size)
    axes = figure.subplots(len(detectors), len(conditions), squeeze=False)
    for detector, line in zip(detectors, axes, strict=True):
        for condition, axis in zip(conditions, line, strict=True):
            plain = by_set(runs, detector, condition, "plain", "AUROC")
            if not plain:
                axis.set_axis_off()
                continue
            for method, colour in _DRAWN.items():
                ours = by_set(runs, detector, condition, method, "AUROC")
                sets = sorted(plain.keys() & ours.keys())
                x, y = [plain[name] for name in sets], [ours[name] for name in sets]
                axis.scatter(x, y, s=14, color=colour, label=method)
            axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
            axis.set(xlim=(0.2, 1.02), ylim=(0.2, 1.02), title=f"{detector}, {condition}")
            axis.set(xlabel="AUROC, plain", ylabel="AUROC, CoMet")
    drawn = [axis for line in axes for axis in line if axis.get_legend_handles_labels()[0]]
    if drawn:
        drawn[0].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def write_page(
    runs: Sequence[Run],
    detectors: Collection[str],
    methods: Collection[str],
    page: Path,
    picture: Path | None = None,
) -> None:
    """All tables as a page.

    Args:
        runs: Finished runs.
        detectors: Names in the order of the tables; those without runs have no rows.
        methods: The same for methods.
        page: Markdown file to write.
        picture: What :func:`draw` has drawn, if anything.
    """

    def values(name: str) -> list[Any]:
        return sorted({run["key"][name] for run in runs}, key=str)

    conditions = sorted(values("condition"), key=lambda name: (name not in _FIRST, name))
    detectors = [name for name in detectors if name in values("detector")]
    methods = [name for name in methods if name in values("method")]
    seeds = " ".join(str(seed) for seed in values("seed"))
    drawn = f"--picture {picture.as_posix()} " if picture else ""
    command = (
        f"python benchmarks/quality/breadth.py --folder adbench/ --seeds {seeds} \\\n"
        f"    --detectors {' '.join(detectors)} --conditions {' '.join(conditions)} \\\n"
        f"    --methods {' '.join(methods)} \\\n"
        f"    {drawn}--page {page.as_posix()}"
    )
    parts = [
        _INTRO,
        f"{len(values('set'))} tables, seeds {seeds}; {', '.join(_machines(runs))}. This page is "
        f"written by\n\n```bash\n{command}\n```",
    ]
    if picture:
        link = Path(os.path.relpath(picture, page.parent)).as_posix()
        parts.append(f"![A dot for each table: plain training against CoMet]({link})")
    for condition in conditions:
        rows = summaries(runs, detectors, condition, methods)
        parts += [f"## Training sets: {condition}", table([_without(row) for row in rows])]
    parts += [
        "## One half of the sets against the other",
        "Every other set by name. What was chosen on one half may be judged by the other.",
    ]
    for condition in conditions:
        what = "gain over plain" if condition == "clean" else "gap recovered"
        rows = halves(runs, detectors, condition, methods)
        parts += [f"{condition}, {what}:", table(rows)]
    parts.append("## Every set")
    for condition in conditions:
        for detector in detectors:
            if rows := every_set(runs, detector, condition):
                parts += [f"{detector}, {condition}:", table(rows)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _machines(runs: Iterable[Run]) -> list[str]:
    return sorted({run["machine"] for run in runs})


def _without(row: Row) -> Row:
    """The row without the column that a section's title says."""
    return {name: cell for name, cell in row.items() if name != "training set"}
