"""What is known of each training set before training, by its prior alone.

For each data set and share of bad pictures: how many draws have evidence that some are bad, the
share that the scores prove (low), the estimate, and the share of all pictures in the region that
holds too many (high, over the draws with evidence). Then mean weights of the good and of the bad,
their mean P(bad), and how well the prior tells them apart (AUROC), and its fine and its coarse grid
alone. Means over seeds (draws of the bad). Below: how often clean scores of several kinds seem to
prove that some are bad.
"""

import argparse
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from comet_examples.datasets import bad_samples
from comet_examples.metrics import curation_metrics
from comet_examples.report import table
from comet_meta import MemoryScorer, SoftConfidentWeighter
from comet_meta.vision.backbones import DEFAULT_BACKBONE
from comet_meta.vision.picture_prior import (
    COARSE,
    PRECAUTION,
    grid_side,
    memory_prior,
    patches_on_grid,
    standardised,
)
from comet_meta.weights.rules import estimate_contamination
from grid import Benchmark
from runs import spread

# From rows of four independent normal numbers.
_CLEAN: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x[:, 0],
    "squared error": lambda x: x[:, 0].square(),
    "mean of four squared errors": lambda x: x.square().mean(dim=1),
    "lognormal": lambda x: (0.6 * x[:, 0]).exp(),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["elpv/mono", "elpv/poly"])
    parser.add_argument("--root", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.1, 0.2, 0.4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    roots = dict(item.split("=", 1) for item in options.root)
    bench = Benchmark(DEFAULT_BACKBONE, roots, "cpu", None)
    rows = []
    for task in options.tasks:
        for noise in options.noise:
            runs = [figures(bench, task, noise, seed) for seed in options.seeds]
            rows.append(
                {"data set": task, "bad": f"{noise:.0%}"}
                | {name: spread_known(run[name] for run in runs) for name in runs[0]}
            )
    print(table(rows))
    print()
    print(table([false_alarms(kind, size) for kind in _CLEAN for size in (50, 400, 2000)]))


def false_alarms(kind: str, size: int, draws: int = 200) -> dict[str, str | float]:
    """How often there seem to be bad samples among so many clean ones, and how many then."""
    generator = torch.Generator().manual_seed(0)
    lows = [
        estimate_contamination(_CLEAN[kind](torch.randn(size, 4, generator=generator))).low
        for _ in range(draws)
    ]
    alarms = [low for low in lows if low > 0]
    return {
        "clean scores": kind,
        "samples": str(size),
        "draws": str(draws),
        "false alarms": f"{len(alarms) / draws:.1%}",
        "low": spread_known(alarms),
    }


def spread_known(values: Iterable[float]) -> str:
    """Spread of those values that are not NaN; a dash where all are."""
    known = [value for value in values if not math.isnan(value)]
    return spread(known, 2) if known else "-"


def figures(bench: Benchmark, task: str, noise: float, seed: int) -> dict[str, float]:
    """What the prior says of one draw."""
    experiment = bench.experiment("simplenet", task)
    samples = experiment.split(noise, seed).train
    bad = torch.from_numpy(bad_samples(samples))
    levels = list(experiment.rows(samples).batches())
    prior = memory_prior(levels, len(samples))
    weighter = SoftConfidentWeighter(prior=prior, precaution=PRECAUTION)
    found = weighter.contamination_
    result = {
        "pictures": float(len(samples)),
        "evidence": float(found.low > 0),
        "low": found.low,
        "estimate": found.estimate,
        "high": found.high,
    }
    for kind, chosen in {"good": ~bad, "bad": bad}.items():
        if chosen.any():
            result[f"weight of {kind}"] = float(weighter.weights[chosen].mean())
            result[f"P(bad) of {kind}"] = float(weighter.p_bad[chosen].mean())
    if bad.any():
        result["AUROC"] = curation_metrics(prior.numpy(), bad.numpy())["AUROC"]
        for name, side in (("fine grid", grid_side(len(samples))), ("coarse grid", COARSE)):
            patches = torch.cat([patches_on_grid(batch, side) for batch in levels])
            alone = MemoryScorer()(standardised(patches))
            result[f"AUROC, {name}"] = curation_metrics(alone.numpy(), bad.numpy())["AUROC"]
    return result


if __name__ == "__main__":
    main()
