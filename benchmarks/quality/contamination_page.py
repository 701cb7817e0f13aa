"""The page of ``contamination.py``, from its finished runs alone."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from comet_examples.report import table
from grid import BySeed
from runs import gap_recovered, mean, on_common_seeds, paired, spread

Chosen = Mapping[tuple[str, str], Mapping[tuple[float, str], BySeed]]
"""Finished runs by detector and task, then by noise and variant."""

MAIN = {
    "plain": "plain",
    "comet": "comet",
    "reviewed": "reviewed",
    "learned": "learned",
    "contamination@true": "told",
    "oracle": "oracle",
}
"""Variants of the page's first tables and of its figure, with their titles."""
_TOLD = ("reviewed", "learned", "contamination@true")
_INTRO = """\
# Pictures with bad ones among them

Every training set holds the share of bad pictures that the headings say, drawn by the seed; noise 0
is the set as it is on disk. I-AUROC on the test set after the last epoch, mean and standard
deviation over seeds. *plain* is training without the library, *oracle* without the bad pictures,
*comet* the library's default, *reviewed* the same told by a person which of sixty training
pictures are bad, *learned* the same with a prior that has learned from the sixty, *told* the same
told the true share. `--help` describes the other variants. Differences are paired by seed, with p
of a paired t-test. *Gap recovered* is (comet - plain) / (oracle - plain) on means; *gap, told* is
that of told. There is none where the bad pictures cost less than one point."""


def write_page(
    chosen: Chosen,
    tables: Sequence[str],
    machines: Sequence[str],
    out: Path,
    page: Path,
    figure: Path | None,
) -> None:
    """All figures as a page.

    Args:
        chosen: Finished runs.
        tables: What the command prints of each detector and task.
        machines: What they ran on.
        out: Their file.
        page: Markdown file to write.
        figure: I-AUROC against contamination, if it has been drawn.
    """
    seeds = {seed for own in chosen.values() for runs in own.values() for seed in runs}
    shown = " ".join(str(seed) for seed in sorted(seeds))
    command = f"python benchmarks/quality/contamination.py --out {out.as_posix()}"
    if figure:
        command += f" \\\n    --figure {figure.as_posix()}"
    command += f" \\\n    --page {page.as_posix()}"
    parts = [
        _INTRO,
        f"Seeds {shown}; {', '.join(machines)}. The command that trained them is the same without "
        f"`--page`; this page is written by\n\n```bash\n{command}\n```",
    ]
    if figure:
        link = Path(os.path.relpath(figure, page.parent)).as_posix()
        parts.append(f"![I-AUROC against the share of bad training pictures]({link})")
    levels = sorted({noise for own in chosen.values() for noise, _ in own})
    for noise in levels:
        rows = [row for key in chosen if (row := set_row(*key, chosen[key], noise)) is not None]
        if rows:
            parts += [f"## Noise {noise:g}", table(rows), table(detector_rows(chosen, noise))]
    parts += ["## Every variant", *over_sets(chosen), *(text.strip() for text in tables if text)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def set_row(
    detector: str, task: str, own: Mapping[tuple[float, str], BySeed], noise: float
) -> dict[str, str | float] | None:
    """A set at a level of noise; None without a plain training."""
    runs = on_common_seeds({name: own.get((noise, name), {}) for name in MAIN})
    if not runs["plain"]:
        return None
    row: dict[str, str | float] = {"detector": detector, "set": task}
    row |= {
        title: spread(one["I-AUROC"] for one in runs[name].values())
        for name, title in MAIN.items()
        if runs[name]
    }
    row["comet - plain"] = paired(runs["comet"], runs["plain"], "I-AUROC") or "-"
    row["gap recovered"] = _shown(gap_recovered(runs["comet"], runs["plain"], runs["oracle"]))
    for name in _TOLD:
        gap = gap_recovered(runs[name], runs["plain"], runs["oracle"])
        row[f"gap, {MAIN[name]}"] = _shown(gap)
    return row


def detector_rows(chosen: Chosen, noise: float) -> list[dict[str, str | float]]:
    """A detector's means over the sets that have plain and comet at a level of noise."""
    rows: list[dict[str, str | float]] = []
    for detector in dict.fromkeys(name for name, _ in chosen):
        sets = [
            on_common_seeds({name: own.get((noise, name), {}) for name in MAIN})
            for (name, _), own in chosen.items()
            if name == detector
        ]
        sets = [runs for runs in sets if runs["plain"] and runs["comet"]]
        if not sets:
            continue
        row: dict[str, str | float] = {"detector": detector, "sets": str(len(sets))}
        for name, title in MAIN.items():
            if all(runs[name] for runs in sets):
                row[title] = f"{np.mean([mean(runs[name], 'I-AUROC') for runs in sets]):.3f}"
        gains = [mean(r["comet"], "I-AUROC") - mean(r["plain"], "I-AUROC") for r in sets]
        row["comet - plain"] = f"{np.mean(gains):+.3f}"
        row["worst set"] = f"{min(gains):+.3f}"
        for name in ("comet", *_TOLD):
            note = "" if name == "comet" else f", {MAIN[name]}"
            gaps = np.array([gap_recovered(r[name], r["plain"], r["oracle"]) for r in sets])
            gaps = gaps[np.isfinite(gaps)]
            row[f"median gap{note}"] = _shown(float(np.median(gaps))) if len(gaps) else "-"
            row[f"least gap{note}"] = _shown(float(gaps.min())) if len(gaps) else "-"
        rows.append(row)
    return rows


def variant_rows(chosen: Chosen, detector: str, noise: float) -> list[dict[str, str | float]]:
    """Every variant's means over the sets that it and plain have finished at a level of noise.

    Beside them is plain training on the same sets, seeds in common, and the set that gains least.
    AUPRO is the mean over those that have masks.
    """
    own = {task: runs for (name, task), runs in chosen.items() if name == detector}
    names = dict.fromkeys(name for runs in own.values() for level, name in runs if level == noise)
    rows: list[dict[str, str | float]] = []
    for name in names:
        pairs = {
            task: on_common_seeds(
                {"own": runs.get((noise, name), {}), "plain": runs.get((noise, "plain"), {})}
            )
            for task, runs in own.items()
        }
        pairs = {task: pair for task, pair in pairs.items() if all(pair.values())}
        if not pairs:
            continue
        ours, plain = (
            np.array([mean(pair[which], "I-AUROC") for pair in pairs.values()])
            for which in ("own", "plain")
        )
        worst = int((ours - plain).argmin())
        masks = [pair["own"] for pair in pairs.values() if _has(pair["own"], "AUPRO")]
        row: dict[str, str | float] = {"variant": name, "sets": str(len(pairs))}
        row["seeds"] = str(min(len(pair["own"]) for pair in pairs.values()))
        row["I-AUROC"] = f"{ours.mean():.3f}"
        row["plain"] = f"{plain.mean():.3f}"
        row["worst set"] = f"{(ours - plain)[worst]:+.3f} ({list(pairs)[worst]})"
        row["AUPRO"] = f"{np.mean([mean(runs, 'AUPRO') for runs in masks]):.3f}" if masks else "-"
        rows.append(row)
    return rows


def over_sets(chosen: Chosen) -> list[str]:
    """Tables of :func:`variant_rows`, one for each detector and level that has several sets."""
    texts = []
    detectors = dict.fromkeys(name for name, _ in chosen)
    for noise in sorted({noise for own in chosen.values() for noise, _ in own}):
        for detector in detectors:
            rows = variant_rows(chosen, detector, noise)
            if any(int(row["sets"]) > 1 for row in rows):
                texts.append(f"### {detector}, noise {noise:g}: means over sets\n\n{table(rows)}")
    return texts


def _has(runs: BySeed, figure: str) -> bool:
    return all(figure in figures for figures in runs.values())


def _shown(gap: float) -> str:
    return f"{gap:.2f}" if np.isfinite(gap) else "-"
