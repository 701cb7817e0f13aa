"""Finished runs of a benchmark: one JSON line each, and statistics over seeds."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy.stats import ttest_rel

from comet_examples.report import machine

Figures = dict[str, float]
Name = TypeVar("Name")


class Runs:
    """A file that gets a line for every finished run, and so says what is left to do.

    Several processes may append to it. A line that was cut off by a crash is skipped, and its run
    counts as not done.

    Args:
        file: Made with the first line.
        seeds: Of which :meth:`by_seed` gives the runs; None: of all.
    """

    def __init__(self, file: Path, seeds: Collection[int] | None = None) -> None:
        self.file = file
        self.seeds = seeds

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The finished runs, each with ``key``, ``figures`` and ``machine``."""
        if not self.file.exists():
            return
        for line in self.file.read_text().splitlines():
            if line.endswith("}}") or line.endswith('"}'):
                yield json.loads(line)

    def done(self, key: Mapping[str, Any]) -> bool:
        """Whether a run with this key is finished."""
        return any(run["key"] == key for run in self)

    def add(self, key: Mapping[str, Any], figures: Figures) -> None:
        """Append a run."""
        line = json.dumps({"key": key, "figures": figures, "machine": machine()})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        torn = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
        # One write, so that lines of several processes don't mix.
        with self.file.open("a") as file:
            file.write("\n" * torn + line + "\n")

    def by_seed(self, **wanted: Any) -> dict[int, Figures]:
        """Figures of the runs whose keys have these values, by seed."""
        return {
            run["key"]["seed"]: run["figures"]
            for run in self
            if all(run["key"].get(name) == value for name, value in wanted.items())
            and (self.seeds is None or run["key"]["seed"] in self.seeds)
        }


def of_shard(items: Iterable[Name], shard: str) -> list[Name]:
    """Every n-th of the items, from the i-th on.

    Args:
        items: What there is to do.
        shard: ``"i/n"``, with i from 1.
    """
    part, parts = (int(number) for number in shard.split("/"))
    return list(items)[part - 1 :: parts]


def on_common_seeds(runs: Mapping[Name, Mapping[int, Figures]]) -> dict[Name, dict[int, Figures]]:
    """Runs of the same seeds, so that their means can be compared.

    Args:
        runs: Figures by seed, of each method or length by name.

    Returns:
        The same without the seeds that another name lacks. Names without any run stay empty and
        take no seed from the others.
    """
    present = [{*figures} for figures in runs.values() if figures]
    common = sorted(set.intersection(*present)) if present else []
    return {name: {seed: own[seed] for seed in common if own} for name, own in runs.items()}


def spread(values: Iterable[float], digits: int = 3) -> str:
    """``mean ± standard deviation``, or the value where there is only one."""
    array = np.array(list(values))
    if len(array) == 1:
        return f"{array[0]:.{digits}f}"
    return f"{array.mean():.{digits}f} ± {array.std(ddof=1):.{digits}f}"


def mean(runs: Mapping[int, Figures], name: str) -> float:
    """Mean of a figure over seeds; NaN without runs."""
    return float(np.mean([figures[name] for figures in runs.values()])) if runs else float("nan")


def paired(ours: Mapping[int, Figures], theirs: Mapping[int, Figures], name: str) -> str:
    """Mean difference of a figure over the common seeds, with the p value of a paired t-test."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return ""
    left, right = (np.array([runs[seed][name] for seed in seeds]) for runs in (ours, theirs))
    difference = f"{(left - right).mean():+.3f}"
    if len(seeds) < 2 or (left == right).all():
        return difference
    return f"{difference} (p = {ttest_rel(left, right).pvalue:.3f})"


def gap_recovered(
    ours: Mapping[int, Figures], plain: Mapping[int, Figures], oracle: Mapping[int, Figures]
) -> float:
    """(ours - plain) / (oracle - plain) on the means of I-AUROC.

    NaN where the oracle is less than one point ahead of plain: there is nothing to recover, and the
    ratio would be noise.
    """
    low, high = mean(plain, "I-AUROC"), mean(oracle, "I-AUROC")
    return (mean(ours, "I-AUROC") - low) / (high - low) if high - low >= 0.01 else float("nan")
