"""What is gained and what it costs to leave out more, from finished runs alone.

A point is a fraction that is left out without evidence, of samples, of their parts or half of each
(``left_out.py``). It is drawn by its cost, the mean over clean sets of plain - method in points of
AUROC, and by its gain, the gap recovered on contaminated sets. ``breadth.py`` and
``contamination.py`` make the runs: the page says how. Seeds are averaged first; a point uses the
sets that have all runs.
"""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from comet_examples.report import table
from comet_meta.vision.picture_prior import HOLD_OUT
from left_out import KINDS, names
from runs import Runs

Array = NDArray[Any]
_COLOURS = {"samples": "tab:blue", "parts": "tab:orange", "both": "tab:green"}
# Methods that leave out the same by another name.
_SAME_FOR_TABLES = {
    ("autoencoder", "comet"): "parts-0.05",
    ("autoencoder", "comet-samples"): "samples-0.05",
    ("svdd", "comet"): "samples-0.05",
    ("vae", "comet"): "samples-0.05",
}
_HELD_OUT = f"held out-{HOLD_OUT}"
_REJECTED_ALONE = f"rejected alone-{HOLD_OUT}"
_SAME_FOR_PICTURES = {
    "comet": _HELD_OUT,
    "rejected-alone": _REJECTED_ALONE,
    "patches": "parts-0.05",
}
_PARTS = (slice(None), slice(0, None, 2), slice(1, None, 2))  # all sets, and either half
_INTRO = """\
# How much to leave out without evidence

Scores alone seldom prove that samples are bad, so a twentieth of a table is left out without
evidence. This page shows what other fractions would give and take, and what it changes to leave out
parts (patches of a picture, values of a row) in place of samples; *both* is half of each. What the
scores prove to be bad goes besides. Of pictures, the default is *held out*: the most suspect fifth
is held out at first, and the model, which hasn't seen them, decides who comes back. The more of
them it rejects, the more of the ranking is left out besides. Of fewer than 100 pictures a tenth is
left out in place of that.

- *seeds*: on average over the sets. A point uses the sets and seeds that have all runs.
- *cost*: plain - method on clean training sets, mean over sets, in points of AUROC; negative where
  leaving out helps.
- *worst*: the largest cost on a set.
- *gap recovered*: (method - plain) / (oracle - plain) on contaminated sets, on means over sets;
  *half a*, *half b*: on every other set by name, and on the others.

Runs and page come from

```bash
python benchmarks/quality/breadth.py --folder adbench/ \\
    --methods plain oracle comet comet-samples samples-0.1 samples-0.2 parts-0.1 parts-0.2 both-0.05
python benchmarks/quality/contamination.py --out docs/results/pictures.jsonl \\
    --variants plain oracle comet samples-0.1 samples-0.2 --noise 0 0.1 0.2
python benchmarks/quality/frontier.py --picture docs/images/frontier.png \\
    --page docs/results/frontier.md
```

Of tables, `comet` and `comet-samples` leave out the twentieths; of pictures, `comet` is
`held out, 0.2`. Further variants of pictures get a row once they are run: `rejected-alone` (what is
left out besides is not), `patches` (`parts, 0.05`), and other fractions."""


class Result(NamedTuple):
    """A finished run."""

    panel: str
    name: str
    contaminated: bool
    method: str
    seed: int
    auroc: float


class Point(NamedTuple):
    """A method on all sets of a panel."""

    sets: int
    seeds: float
    cost: float
    worst: float
    worst_set: str
    gap: float
    halves: tuple[float, float]


def of_tables(runs: Runs) -> list[Result]:
    """Those of ``breadth.py``."""
    return [
        Result(
            f"tables, {key['detector']}",
            key["set"],
            key["condition"] == "as-is",
            _SAME_FOR_TABLES.get((key["detector"], key["method"]), key["method"]),
            key["seed"],
            run["figures"]["AUROC"],
        )
        for run in runs
        if (key := run["key"])["condition"] in ("as-is", "clean")
    ]


def of_pictures(runs: Runs, noise: float) -> list[Result]:
    """Those of ``contamination.py`` on clean sets and with a share of bad pictures."""
    return [
        Result(
            f"pictures with {100 * noise:g} % bad, {key['detector']}",
            key["task"],
            key["noise"] > 0,
            _SAME_FOR_PICTURES.get(key["method"], key["method"]),
            key["seed"],
            run["figures"]["I-AUROC"],
        )
        for run in runs
        if (key := run["key"])["noise"] in (0.0, noise)
    ]


def point(results: Iterable[Result], method: str) -> Point | None:
    """Cost and gain of a method, on the seeds and sets that have all runs; None without any."""
    found: dict[tuple[bool, str], dict[tuple[str, int], float]] = {}
    for result in results:
        own = found.setdefault((result.contaminated, result.method), {})
        own[result.name, result.seed] = result.auroc
    needed = [(False, "plain"), (False, method), (True, "plain"), (True, method), (True, "oracle")]
    common = set.intersection(*({*found.get(key, {})} for key in needed))
    sets = sorted({name for name, _ in common})
    if not sets:
        return None

    def by_set(contaminated: bool, which: str) -> Array:
        values = found[contaminated, which]
        return np.array([np.mean([values[key] for key in common if key[0] == s]) for s in sets])

    clean, ours_clean, bad, ours_bad, oracle = (by_set(*key) for key in needed)
    costs = 100 * (clean - ours_clean)
    gains, room = ours_bad - bad, oracle - bad
    with np.errstate(divide="ignore", invalid="ignore"):  # half of a single set
        gaps = [gains[part].sum() / room[part].sum() for part in _PARTS]
    return Point(
        sets=len(sets),
        seeds=len(common) / len(sets),
        cost=float(costs.mean()),
        worst=float(costs.max()),
        worst_set=sets[int(costs.argmax())],
        gap=float(gaps[0]),
        halves=(float(gaps[1]), float(gaps[2])),
    )


def default_of(panel: str) -> str | None:
    """The point of a panel that is the default; None for a detector that isn't known."""
    data, detector = panel.split(", ")
    if data.startswith("pictures"):
        return _SAME_FOR_PICTURES["comet"]
    return _SAME_FOR_TABLES.get((detector, "comet"))


def frontiers(results: Iterable[Result]) -> dict[str, dict[str, Point]]:
    """The points of each panel, by method."""
    panels: dict[str, list[Result]] = {}
    for result in results:
        panels.setdefault(result.panel, []).append(result)
    found: dict[str, dict[str, Point]] = {}
    for panel, own in panels.items():
        points = {
            name: at
            for name in (*names(), _REJECTED_ALONE, _HELD_OUT)
            if (at := point(own, name)) is not None
        }
        if points:
            found[panel] = points
    return found


def draw(found: dict[str, dict[str, Point]], file: Path) -> None:
    """Gain against cost, a row for each kind of data, a line for each kind of what is left out."""
    data: dict[str, list[str]] = {}
    for panel in found:
        data.setdefault(panel.split(", ")[0], []).append(panel)
    columns = max(map(len, data.values()))
    figure = Figure(figsize=(3.6 * columns, 3.2 * len(data)), layout="constrained")
    grid = figure.subplots(len(data), columns, squeeze=False, sharex=True, sharey=True)
    for line_of_axes, panels in zip(grid, data.values(), strict=True):
        for axes in line_of_axes[len(panels) :]:
            axes.set_axis_off()
    places = [
        (axes, panel)
        for line_of_axes, panels in zip(grid, data.values(), strict=True)
        for axes, panel in zip(line_of_axes, panels, strict=False)
    ]
    for axes, panel in places:
        points = found[panel]
        for kind in KINDS:
            line = [
                (points[name].cost, points[name].gap, name.partition("-")[2])
                for name in names([kind])
                if name in points
            ]
            if line:
                axes.plot(
                    *zip(*(at[:2] for at in line), strict=True),
                    marker="o",
                    markersize=4,
                    color=_COLOURS[kind],
                    label=kind,
                )
                for at in line:
                    axes.annotate(at[2], at[:2], (3, 3), textcoords="offset points", fontsize=7)
        default = points.get(default_of(panel) or "")
        if default is not None:
            ring = {"color": "black", "markersize": 10, "fillstyle": "none", "label": "default"}
            axes.plot(default.cost, default.gap, "o", **ring)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_title(panel, fontsize=9)
        axes.set(xlabel="cost on clean sets, points", ylabel="gap recovered")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def rows(points: dict[str, Point]) -> list[dict[str, str | float]]:
    """The table of a panel."""
    return [
        {
            "left out": name.replace("-", ", "),
            "sets": str(at.sets),
            "seeds": f"{at.seeds:.2g}",
            "cost": f"{at.cost:+.2f}",
            "worst": f"{at.worst:+.1f} {at.worst_set}",
            "gap recovered": f"{at.gap:.2f}",
            "half a": _shown(at.halves[0]),
            "half b": _shown(at.halves[1]),
        }
        for name, at in points.items()
    ]


def _shown(gap: float) -> str:
    return f"{gap:.2f}" if np.isfinite(gap) else "-"


def main() -> None:
    """Print the tables, and write picture and page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=Path, default=Path("docs/results/breadth.jsonl"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/results/pictures.jsonl"))
    parser.add_argument(
        "--noise", type=float, nargs="+", default=[0.1, 0.2], help="shares of bad pictures"
    )
    parser.add_argument("--picture", type=Path, help="PNG, a panel for each detector and share")
    parser.add_argument("--page", type=Path, help="Markdown page with picture and tables")
    options = parser.parse_args()
    pictures = Runs(options.pictures)
    found = frontiers(
        [
            *of_tables(Runs(options.tables)),
            *(result for noise in options.noise for result in of_pictures(pictures, noise)),
        ]
    )
    if not found:
        parser.error("no point of the frontier has all its runs: see --help for the commands")
    texts = [f"## {panel}\n\n{table(rows(points))}" for panel, points in found.items()]
    print("\n\n".join(texts))
    if options.picture:
        draw(found, options.picture)
    if options.page:
        shown = options.picture and Path(os.path.relpath(options.picture, options.page.parent))
        picture = [f"![Gain against cost]({shown.as_posix()})"] if shown else []
        options.page.parent.mkdir(parents=True, exist_ok=True)
        options.page.write_text("\n\n".join([_INTRO, *picture, *texts]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
