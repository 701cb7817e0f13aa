"""Does ``comet-meta rank`` find what the examples find, whatever the files are called?

Pictures of which some are bad, by default solar cells, copied as files under random names. The
figure is the AUROC of the bad pictures against the good ones, of the command's keep list and of the
prior that the examples give to their detectors, on the same pictures at the same size (equal where
the pictures are square).

Then the known labels play a person who looks at the report's sample, and the folder is ranked again
with ``--review``: AUROC and precision (among as many as are bad) of the pictures that nobody saw,
before and after, and the share of bad pictures that the look tells, with its interval.
"""

import argparse
import csv
import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from comet_examples.datasets import DATASETS, bad_samples, contaminate
from comet_examples.metrics import curation_metrics
from comet_examples.report import table
from comet_examples.training import FeatureRows
from comet_meta import cli
from comet_meta.report import read_review
from comet_meta.vision.backbones import load_backbone
from comet_meta.vision.features import FeatureStore, PatchFeatures
from comet_meta.vision.images import Transform, load_values
from comet_meta.vision.picture_prior import memory_prior
from comet_meta.vision.samples import Sample
from comet_meta.weights.review import ranks_to_review

_WORDS = {True: "yes", False: "no"}


def main() -> None:
    """Print a line for each draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["elpv/mono"], help="data set/category")
    parser.add_argument(
        "--root", nargs="+", default=[], metavar="NAME=FOLDER", help="where a data set is"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--resize", type=int, default=176)
    options = parser.parse_args()
    roots = {name: Path(root) for name, root in (item.split("=", 1) for item in options.root)}
    rows: list[dict[str, str | float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        for task, seed in itertools.product(options.tasks, options.seeds):
            name, category = task.split("/")
            split = DATASETS[name].load(roots.get(name), category)
            samples = contaminate(split, options.noise, seed=seed).train
            size, folder = options.resize, Path(scratch)
            line = {"set": task, "draw": str(seed), "pictures": str(len(samples))}
            with renamed(samples, folder, names=1) as is_bad:
                line["rank"] = f"{auroc(ranked(folder, size), is_bad):.4f}"
                learned = with_review(folder, size, is_bad)
            with renamed(samples, folder, names=2) as is_bad:
                line["other names"] = f"{auroc(ranked(folder, size), is_bad):.4f}"
            rows.append(line | {"example": f"{example(samples, size):.4f}"} | learned)
    print(table(rows))


@contextmanager
def renamed(samples: tuple[Sample, ...], scratch: Path, names: int) -> Iterator[dict[str, bool]]:
    """The pictures in a folder, under names drawn with a seed; which of them are bad."""
    folder = scratch / "pictures"
    folder.mkdir()
    order = list(range(len(samples)))
    random.Random(names).shuffle(order)
    is_bad = {}
    for sample, number in zip(samples, order, strict=True):
        name = f"{number:05d}{sample.path.suffix}"
        shutil.copy(sample.path, folder / name)
        is_bad[name] = sample.label == 1
    yield is_bad
    shutil.rmtree(folder)


def ranked(scratch: Path, size: int, *options: str) -> dict[str, float]:
    """The command's scores by name, the most suspect first."""
    folder, out = scratch / "pictures", scratch / "out"
    status = cli.main(
        ["rank", str(folder), "--out", str(out), "--resize", str(size), "--device", "cpu", *options]
    )
    if status != 0:
        raise SystemExit(status)
    with (out / "keep.csv").open(newline="", encoding="utf-8") as lines:
        return {row["path"]: float(row["score"]) for row in csv.DictReader(lines)}


def with_review(scratch: Path, size: int, is_bad: dict[str, bool]) -> dict[str, str]:
    """What a look at the sample of the ranking is worth for those that aren't in it."""
    before = ranked(scratch, size)
    order = [*before]
    sample = {order[rank] for ranks in ranks_to_review(len(order)) for rank in ranks}
    lines = [
        f"{scratch / 'pictures' / name},{rank},{_WORDS[not (is_bad[name] and name in sample)]},"
        f"{_WORDS[name in sample]}"
        for rank, name in enumerate(order, start=1)
    ]
    file = scratch / "list.csv"
    file.write_text("\n".join(["path,rank,keep,reviewed", *lines]), encoding="utf-8")
    after = ranked(scratch, size, "--review", str(file))
    share = read_review(file, [scratch / "pictures" / name for name in order]).share
    unseen = {name: bad for name, bad in is_bad.items() if name not in sample}
    result = {"share": str(share), "unseen bad": str(sum(unseen.values()))}
    if not any(unseen.values()):
        return result
    for name, scores in (("before", before), ("after", after)):
        found = curation_metrics([scores[one] for one in unseen], [*unseen.values()])
        result[f"AUROC {name}"] = f"{found['AUROC']:.3f}"
        result[f"precision {name}"] = f"{found['precision@k']:.2f}"
    return result


def auroc(scores: dict[str, float], is_bad: dict[str, bool]) -> float:
    """AUROC of the bad pictures against the good ones."""
    return curation_metrics([scores[name] for name in is_bad], [*is_bad.values()])["AUROC"]


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
