"""What is known of each training set before training, by its prior and the mixture fitted to it.

For each data set and share of bad pictures: the gain in log-likelihood of the mixture over a normal
density alone (in nats; the weights react from 5), its doubt (of those it takes for bad, the share
it expects to be good), mean weights of the good and of the bad by the fit and in training, where by
its doubt more are spared, their mean P(bad) in training, and how well the prior tells them apart
(AUROC). Means over seeds (draws of the bad). Then: how often normally distributed scores alone gain
5 nats and more.
"""

import argparse

import torch
from comet_examples.datasets import bad_samples
from comet_examples.metrics import curation_metrics
from comet_examples.report import table
from comet_meta.weights.mixture import Mixture, summary
from grid import Benchmark
from runs import spread
from torch import Tensor

from comet_meta import SoftConfidentWeighter
from comet_meta.vision.backbones import DEFAULT_BACKBONE
from comet_meta.vision.picture_prior import memory_prior
from comet_meta.weights.rules import standardized


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
                | {name: spread([run[name] for run in runs], 2) for name in runs[0]}
            )
    print(table(rows))
    print()
    print(table([false_alarms(size) for size in (50, 100, 400, 2000)]))


def false_alarms(size: int, draws: int = 1000) -> dict[str, str | float]:
    """How often there seem to be bad samples among so many normal ones, and the doubt then."""
    generator = torch.Generator().manual_seed(0)
    doubts = []
    for _ in range(draws):
        mixture, values, counts = fit(torch.randn(size, generator=generator))
        if mixture.evidence(values, counts) > 0.5:
            doubts.append(float(mixture.doubt(values, counts)))
    return {
        "normal scores": str(size),
        "draws": str(draws),
        "false alarms": f"{len(doubts) / draws:.1%}",
        "doubt": spread(doubts, 2),
    }


def figures(bench: Benchmark, task: str, noise: float, seed: int) -> dict[str, float]:
    """What the prior says of one draw."""
    experiment = bench.experiment("simplenet", task)
    samples = experiment.split(noise, seed).train
    bad = torch.from_numpy(bad_samples(samples))
    prior = memory_prior(experiment.rows(samples).batches(), len(samples))
    mixture, values, counts = fit(prior)
    by_fit = SoftConfidentWeighter(prior=prior, spare=0.0)
    training = SoftConfidentWeighter(prior=prior)
    result = {
        "pictures": float(len(samples)),
        "gain": float(mixture.gain(values, counts)),
        "doubt": float(mixture.doubt(values, counts)),
    }
    for kind, chosen in {"good": ~bad, "bad": bad}.items():
        if chosen.any():
            result[f"weight of {kind} by the fit"] = float(by_fit.weights[chosen].mean())
            result[f"{kind} in training"] = float(training.weights[chosen].mean())
            result[f"P(bad) of {kind}"] = float(training.anomalous[chosen].mean())
    if bad.any():
        result["AUROC"] = curation_metrics(prior.numpy(), bad.numpy())["AUROC"]
    return result


def fit(scores: Tensor) -> tuple[Mixture, Tensor, Tensor]:
    """The mixture of scores (N,), and the values (M,) and counts (M,) that it was fitted to."""
    values, counts = summary(standardized(scores))
    return Mixture.fitted(values, counts, values[-1]), values, counts


if __name__ == "__main__":
    main()
