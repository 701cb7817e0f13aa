"""Does ``comet-meta rank`` find what the examples find, whatever the files are called?

Solar cells (elpv, mono, 10 % of the pictures defective), copied as files under random names. The
figure is the AUROC of the bad pictures against the good ones, of the command's keep list and of the
prior that the examples give to their detectors, on the same pictures at the same size.
"""

import argparse
import csv
import os
import random
import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch

from comet_examples.datasets import bad_samples, contaminate, elpv
from comet_examples.metrics import curation_metrics
from comet_examples.report import table
from comet_examples.training import FeatureRows
from comet_meta import cli
from comet_meta.vision.backbones import load_backbone
from comet_meta.vision.features import FeatureStore, PatchFeatures
from comet_meta.vision.images import Transform, load_values
from comet_meta.vision.picture_prior import memory_prior
from comet_meta.vision.samples import Sample


def main() -> None:
    """Print a line for each draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--resize", type=int, default=176)
    options = parser.parse_args()
    rows: list[dict[str, str | float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        for seed in options.seeds:
            samples = contaminate(elpv.load(None, "mono"), options.noise, seed=seed).train
            by_command, again = (
                command(samples, Path(scratch), options.resize, names) for names in (1, 2)
            )
            by_example = example(samples, options.resize)
            rows.append(
                {
                    "draw": str(seed),
                    "pictures": str(len(samples)),
                    "rank": f"{by_command:.4f}",
                    "other names": f"{again:.4f}",
                    "example": f"{by_example:.4f}",
                }
            )
    print(table(rows))


def command(samples: tuple[Sample, ...], scratch: Path, size: int, names: int) -> float:
    """AUROC of the command's scores, with the files under names drawn with a seed."""
    folder, out = scratch / "pictures", scratch / "out"
    folder.mkdir()
    order = list(range(len(samples)))
    random.Random(names).shuffle(order)
    is_bad = {}
    for sample, number in zip(samples, order, strict=True):
        name = f"{number:05d}{sample.path.suffix}"
        shutil.copy(sample.path, folder / name)
        is_bad[name] = sample.label == 1
    status = cli.main(
        ["rank", str(folder), "--out", str(out), "--resize", str(size), "--device", "cpu"]
    )
    if status != 0:
        raise SystemExit(status)
    with (out / "keep.csv").open(newline="", encoding="utf-8") as lines:
        score = {row["path"]: float(row["score"]) for row in csv.DictReader(lines)}
    shutil.rmtree(folder)
    ordered = sorted(is_bad)
    return curation_metrics([score[name] for name in ordered], [is_bad[name] for name in ordered])[
        "AUROC"
    ]


def example(samples: tuple[Sample, ...], size: int) -> float:
    """AUROC of the prior of the examples."""
    transform = Transform(size)
    features = FeatureStore().get(
        PatchFeatures(load_backbone()),
        [sample.path for sample in samples],
        partial(load_values, transform=transform),
        transform_key=str(transform),
    )
    data = FeatureRows(features, torch.arange(len(samples)))
    prior = memory_prior(data.batches(), len(data))
    return curation_metrics(prior.numpy(), bad_samples(samples))["AUROC"]


if __name__ == "__main__":
    main()
