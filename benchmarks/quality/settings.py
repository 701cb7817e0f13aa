"""Settings of the detectors, judged on sets that had no part in the choice.

A candidate changes one setting of a detector: the learning rate, the length of training, the noise.
All are trained on the clean pictures of every set, with ``--noise`` on bad ones too, and judged by
``--metric`` after the last step: sets without masks have no pixel metrics and are left out of them.

1. For every way to cut the sets into two halves, the candidate with the highest mean on one half is
   chosen.
2. It is judged on the other half, and so are the settings as they are. A set's figure *chosen on
   other sets* is the mean over the ways in which the set has no part in the choice.

If the settings as they are do as well there as the chosen ones, then it makes no difference that
some of their own sets had a part in their choice. Every finished run is a JSON line in ``--out``;
the same command goes on where it was stopped, and ``--shard i/n`` runs the i-th of n parts.
"""

import argparse
import copy
import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from scipy.stats import sem

from comet_examples.datasets import oracle
from comet_examples.experiment import Experiment
from comet_examples.report import table
from comet_examples.training import Method
from grid import Benchmark, add_arguments, benchmark
from runs import Figures, Runs, mean, of_shard, on_common_seeds

_LOGGER = logging.getLogger(__name__)

Array = npt.NDArray[np.float64]
AS_IS = "as they are"
METRICS = ("I-AUROC", "I-AP", "P-AUROC", "P-AP", "AUPRO")
_COLUMNS = ("settings", "mean", "difference", "worst", "chosen")


@dataclass(frozen=True)
class Candidate:
    """What is changed.

    Attributes:
        times: Factor on the length of training.
        rate: Factor on the learning rate.
        options: Keyword arguments of the detector.
    """

    times: float = 1.0
    rate: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def of(self, experiment: Experiment) -> Experiment:
        """The same experiment with this detector."""
        rate = cast("Any", experiment.build()).learning_rate * self.rate
        preset = experiment.preset
        detector = {**preset.detector, **self.options, "learning_rate": rate}
        changed = copy.copy(experiment)
        changed.preset = replace(preset, detector=detector)
        return changed


_ALL = {
    AS_IS: Candidate(),
    "a third of the rate": Candidate(rate=1 / 3),
    "three times the rate": Candidate(rate=3.0),
    "half as long": Candidate(times=0.5),
    "twice as long": Candidate(times=2.0),
}
CANDIDATES: dict[str, dict[str, Candidate]] = {
    "fastflow": _ALL
    | {f"noise of {std:g}": Candidate(options={"noise_std": std}) for std in (0.1, 0.3)},
    "simplenet": _ALL
    | {
        "ten times the rate": Candidate(rate=10.0),
        "half the noise": Candidate(options={"noise_std": 0.15, "own_noise": 0.35}),
        "twice the noise": Candidate(options={"noise_std": 0.6, "own_noise": 1.4}),
        "independent noise": Candidate(options={"noise_std": 1.0, "own_noise": 0.0}),
    },
}


@dataclass(frozen=True)
class Case:
    """On what the candidates are trained, and how.

    Attributes:
        noise: Share of bad training pictures; 0 for clean ones.
        method: ``"plain"`` or ``"comet"``.
    """

    noise: float = 0.0
    method: Method = "plain"

    def key(self, bench: Benchmark, task: str, detector: str, name: str) -> dict[str, Any]:
        """All that decides a run's figures, but for the seed."""
        method = name if self.method == "plain" else f"{name}, {self.method}"
        return bench.key(detector, task, self.noise, None, method)

    def run(self, bench: Benchmark, task: str, detector: str, name: str, seed: int) -> Figures:
        """Figures of a candidate that was trained on a set."""
        candidate = CANDIDATES[detector][name]
        experiment = candidate.of(bench.experiment(detector, task))
        split = experiment.split(self.noise, seed)
        if self.noise == 0:
            split = oracle(split)  # some sets have bad pictures as they are
        settings = experiment.preset.training(self.method, seed=seed)
        settings = settings.stretched(candidate.times)
        return experiment.run(split, settings).figures

    def finished(
        self,
        bench: Benchmark,
        runs: Runs,
        tasks: Sequence[str],
        detector: str,
        names: list[str],
        metric: str = "I-AUROC",
    ) -> dict[str, list[float]]:
        """A figure of these candidates, by set, where all have it: means over common seeds."""
        found: dict[str, list[float]] = {}
        for task in tasks:
            keys = {name: self.key(bench, task, detector, name) for name in names}
            own = on_common_seeds({name: runs.by_seed(**key) for name, key in keys.items()})
            figures = [one for by_seed in own.values() for one in by_seed.values()]
            if all(own.values()) and all(metric in one for one in figures):
                found[task] = [mean(one, metric) for one in own.values()]
        return found


def crossed(values: Array) -> tuple[Counter[int], Array]:
    """Choose on one half of the sets, judge on the other, for all ways to halve them.

    Args:
        values: The figure, shape (sets, candidates).

    Returns:
        How often each candidate is chosen, and the figure of the chosen one, shape (ways, sets);
        NaN for the sets that chose it. Of an odd number of sets the larger half chooses.
    """
    sets = range(len(values))
    counts: Counter[int] = Counter()
    judged = []
    for half in itertools.combinations(sets, -(-len(values) // 2)):
        best = int(values[list(half)].mean(axis=0).argmax())
        counts[best] += 1
        judged.append([np.nan if number in half else values[number, best] for number in sets])
    return counts, np.array(judged)


def gains(values: Array) -> Array:
    """What the chosen candidate is better than the first, on the half that didn't choose: (ways,).

    Args:
        values: The figure, shape (sets, candidates); the first is that of the settings as they are.
    """
    _, judged = crossed(values)
    return np.asarray(np.nanmean(judged - values[:, 0], axis=1))


def by_set(found: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Lines of a detector's sets: the settings as they are, and those that other sets chose."""
    values = np.array([*found.values()])
    _, judged = crossed(values)
    chosen = np.nanmean(judged, axis=0)
    lines = zip([*found, "mean"], _with_mean(values[:, 0]), _with_mean(chosen), strict=True)
    return [
        {"set": name, AS_IS: f"{usual:.3f}", "chosen on other sets": f"{other:.3f}"}
        for name, usual, other in lines
    ]


def _with_mean(values: Array) -> list[float]:
    return [*values.tolist(), float(values.mean())]


def rows(found: Mapping[str, Sequence[float]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of a detector's table, one for each candidate."""
    values = np.array([*found.values()])
    counts, _ = crossed(values)
    lines = []
    for number, name in enumerate(names):
        differences = values[:, number] - values[:, 0]
        worst = int(differences.argmin())
        line = {"settings": name, "mean": f"{values[:, number].mean():.3f}"}
        if number > 0:
            line["difference"] = f"{differences.mean():+.3f} ± {sem(differences):.3f}"
            line["worst"] = f"{differences[worst]:+.3f} ({[*found][worst]})"
        line["chosen"] = f"{counts[number] / counts.total():.0%}"
        lines.append({column: line.get(column, "") for column in _COLUMNS})
    return lines


def main() -> None:
    """Run what is missing, then print the tables."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, Path("runs/settings.jsonl"))
    parser.add_argument("--noise", type=float, default=0.0, help="share of bad training pictures")
    parser.add_argument(
        "--methods", nargs="+", choices=("plain", "comet"), default=["plain"], help="how to train"
    )
    everything = list(dict.fromkeys(itertools.chain(*CANDIDATES.values())))
    parser.add_argument(
        "--candidates",
        nargs="+",
        choices=everything,
        default=everything,
        help=f"which of them beside {AS_IS!r}",
    )
    parser.add_argument("--metric", choices=METRICS, default="I-AUROC", help="what the tables say")
    options = parser.parse_args()
    bench, tasks, runs = benchmark(options)
    runs = Runs(runs.file, options.seeds)
    names = {
        detector: [name for name in CANDIDATES[detector] if name in {AS_IS, *options.candidates}]
        for detector in options.detectors
        if detector in CANDIDATES
    }
    cases = [Case(options.noise, method) for method in options.methods]
    grid = [
        (seed, task, case, detector, name)
        for seed, task, case in itertools.product(options.seeds, tasks, cases)
        for detector in names
        for name in names[detector]
    ]
    for seed, task, case, detector, name in of_shard(grid, options.shard):
        key = case.key(bench, task, detector, name) | {"seed": seed}
        if runs.done(key):
            continue
        figures = case.run(bench, task, detector, name, seed)
        runs.add(key, figures)
        _LOGGER.info("%s, %s, %s: %.3f", task, detector, key["method"], figures["I-AUROC"])
    for case, detector in itertools.product(cases, names):
        found = case.finished(bench, runs, tasks, detector, names[detector], options.metric)
        if len(found) < 2:
            continue
        gained = gains(np.array([*found.values()]))
        trained_on = f"{case.method}, {case.noise:.0%} bad, {len(found)} sets"
        print(f"\n### {detector}, {trained_on}: {options.metric}\n")
        print(table(rows(found, names[detector])))
        print()
        print(table(by_set(found)))
        print(
            f"\nChosen on one half of the sets, on the other half: {gained.mean():+.3f} against "
            f"the settings as they are (the mean of {len(gained)} ways; from {gained.min():+.3f} "
            f"to {gained.max():+.3f})"
        )


if __name__ == "__main__":
    main()
