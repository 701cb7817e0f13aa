"""Does a rare variant of the product keep its weight? Two kinds of solar cells in one folder.

Good monocrystalline cells make up the folder, good polycrystalline ones a minor share of it; with
--noise, cells of either kind are bad. The weights come from MemoryScorer as in ``comet-meta rank``,
without training; with --parts, patches have weights too. Mean weights, their patches' included, and
the variant's P(bad), over seeds (draws of the bad cells and of the variant's), by the default
prior, a more cautious one, and one for folders of one product.

With --train, what a detector is worth that has been trained on the folder: I-AUROC on test cells of
which the variant makes up the same share, and on those of either kind alone; and the weights of
good training cells of either kind at the end, when the detector has judged the suspects. With
*learned* the known labels play a person who looks at sixty of the cells, and the prior learns from
them.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from comet_examples.datasets import Sample, Split, bad_samples
from comet_examples.detectors import DETECTORS
from comet_examples.experiment import Experiment
from comet_examples.metrics import curation_metrics, image_metrics
from comet_examples.report import table
from comet_examples.training import Method, TrainingSettings
from comet_meta import MemoryScorer, SoftConfidentWeighter
from comet_meta.vision.backbones import DEFAULT_BACKBONE, load_backbone
from comet_meta.vision.picture_prior import PRECAUTION, memory_part_prior
from comet_meta.weights.review import Review
from grid import Benchmark
from reviewed import review_of
from runs import spread

_TASKS = ("elpv/mono", "elpv/poly")  # the many, and the variant
_METHODS: dict[str, Method] = {
    "plain": "plain",
    "oracle": "oracle",
    "comet": "comet",
    "learned": "comet",
}
_SCORERS = {
    "scale=1": MemoryScorer(scale=1.0),
    "default": MemoryScorer(),
    "scale=inf": MemoryScorer(scale=math.inf),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shares", nargs="+", type=float, default=[0.05, 0.15, 0.3])
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument(
        "--contamination",
        type=share_or_auto,
        default="auto",
        help="of the weighter: a share or auto",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--parts", action="store_true", help="patches have weights too")
    parser.add_argument("--train", choices=sorted(DETECTORS), help="what to train")
    options = parser.parse_args()
    bench = Benchmark(DEFAULT_BACKBONE, {}, "cpu", None)
    rows = []
    for share in options.shares:
        for noise in options.noise:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in _SCORERS}
            for seed in options.seeds:
                features, bad, minor = folder(bench, share, noise, seed)
                for name, scorer in _SCORERS.items():
                    scores, part_scores = memory_part_prior([[features]], len(features), scorer)
                    weighter = SoftConfidentWeighter(
                        prior=scores,
                        part_prior=part_scores if options.parts else None,
                        contamination=options.contamination,
                        precaution=None if options.parts else PRECAUTION,
                    )
                    found[name].append(figures(weighter, bad, minor))
            rows += [
                {"variant": f"{share:.0%}", "bad": f"{noise:.0%}", "prior": name}
                | {figure: spread([run[figure] for run in runs], 2) for figure in runs[0]}
                for name, runs in found.items()
            ]
    print(table(rows))
    if options.train:
        print()
        print(table(list(trained_rows(bench, options))))


def share_or_auto(text: str) -> float | Literal["auto"]:
    """The option's value."""
    return "auto" if text == "auto" else float(text)


def trained_rows(bench: Benchmark, options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Figures of detectors trained on each folder, means over seeds."""
    major, minor = (bench.experiment(options.train, task) for task in _TASKS)
    both = replace(
        major.clean,
        train=(*major.clean.train, *minor.clean.train),
        test=(*major.clean.test, *minor.clean.test),
    )
    backbone = load_backbone(DEFAULT_BACKBONE)
    experiment = Experiment(both, options.train, major.preset, backbone, bench.store, "cpu")
    for share in options.shares:
        for noise in options.noise:
            for name, method in _METHODS.items():
                if noise == 0 and name in ("oracle", "learned"):
                    continue  # plain training
                runs = []
                for seed in options.seeds:
                    parts = major.split(noise, seed), minor.split(noise, seed)
                    settings = major.preset.training(method, seed=seed)
                    runs.append(
                        detection(experiment, *parts, share, settings, look=name == "learned")
                    )
                yield (
                    {"variant": f"{share:.0%}", "bad": f"{noise:.0%}", "method": name}
                    | {name: spread(run[name] for run in runs) for name in runs[0]}
                )


def detection(
    experiment: Experiment,
    major: Split,
    minor: Split,
    share: float,
    settings: TrainingSettings,
    *,
    look: bool = False,
) -> dict[str, float]:
    """I-AUROC of a detector of both kinds, on both and on either; with weights also their means.

    Args:
        experiment: Knows the cells of both kinds.
        major: Cells of the one.
        minor: Cells of the other, of which some are drawn.
        share: What these make up, of the training cells and among good and bad test cells.
        settings: How to train.
        look: Whether a person looks at sixty of the training cells.
    """
    generator = np.random.default_rng(settings.seed)

    def beside(others: Sequence[Sample], cells: Sequence[Sample]) -> tuple[Sample, ...]:
        return tuple(cells[i] for i in drawn(len(cells), len(others), share, generator))

    train = major.train + beside(major.train, minor.train)
    test = major.test
    for label in (0, 1):
        kinds = ([s for s in part.test if s.label == label] for part in (major, minor))
        test += beside(*kinds)
    split = replace(major, train=train, test=test)
    if look:
        scores, _ = memory_part_prior(experiment.rows(train).batches(), len(train))
        settings = replace(settings, review=Review(*review_of(scores, bad_samples(train))))
    outcome, bad = experiment.run(split, settings), bad_samples(test)
    size = len(major.test)
    parts = {"all": slice(None), "the others": slice(size), "the variant": slice(size, None)}
    found = {
        name: image_metrics(outcome.scores[part], bad[part])["I-AUROC"]
        for name, part in parts.items()
    }
    weighter = outcome.training.optimizer.weighter
    if weighter is not None:
        weights = weighter.mean_weights()
        good = torch.from_numpy(~bad_samples(train))
        if not good.all():
            found["of the bad"] = float(weights[~good].mean())
        of_variant = torch.arange(len(train)) >= len(major.train)
        found["weight of the others"] = float(weights[good & ~of_variant].mean())
        found["of the variant"] = float(weights[good & of_variant].mean())
    return found


def drawn(count: int, others: int, share: float, generator: np.random.Generator) -> list[int]:
    """Which of the variant's cells (count of them) to take, to be a share beside the others."""
    wanted = round(share / (1 - share) * others)
    return [int(i) for i in generator.permutation(count)[:wanted]]


def folder(bench: Benchmark, share: float, noise: float, seed: int) -> tuple[Tensor, ...]:
    """Features (N, C, h, w) of a folder, who in it is bad and who is of the variant, (N,)."""
    parts = list(_kinds(bench, noise, seed))
    (major, major_bad), (minor, minor_bad) = parts
    chosen = drawn(len(minor), len(major), share, np.random.default_rng(seed))
    of_variant = torch.arange(len(major) + len(chosen)) >= len(major)
    return (
        torch.cat([major, minor[chosen]]),
        torch.cat([major_bad, minor_bad[chosen]]),
        of_variant,
    )


def _kinds(bench: Benchmark, noise: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    for task in _TASKS:
        experiment = bench.experiment("simplenet", task)
        samples = experiment.split(noise, seed).train
        (features,) = zip(*experiment.rows(samples).batches(), strict=True)
        yield torch.cat(features), torch.from_numpy(bad_samples(samples))


def figures(weighter: SoftConfidentWeighter, bad: Tensor, minor: Tensor) -> dict[str, float]:
    """Mean weights of good cells of either kind and of bad ones, and the AUROC of the prior."""
    weights = weighter.mean_weights()
    result = {
        "weight of the others": float(weights[~bad & ~minor].mean()),
        "of the variant": float(weights[~bad & minor].mean()),
        "its P(bad)": float(weighter.p_bad[~bad & minor].mean()),
    }
    if bad.any():
        result["of the bad"] = float(weights[bad].mean())
        result["AUROC"] = curation_metrics(weighter.ranking_scores().numpy(), bad.numpy())["AUROC"]
    return result


if __name__ == "__main__":
    main()
