"""The schedule of the public research code against this library's, and where the time goes.

Both train SimpleNet's head on the same pictures, on the same frozen backbone, with batches of the
same size, for the same number of outer updates.

*Public schedule*, written anew from its description: a batch is dealt into tasks, one after the
other; each task reads its pictures, works on a deep copy of the whole model, takes five Adam steps
on the support pictures and judges the query pictures. The frozen backbone runs anew in each of
these passes. All its updates cost the same, so a few are measured and their cost is multiplied.

*Ours*: the features of all pictures once, which counts, then ``train`` as the examples use it, with
the weights refitted every epoch. ``--meta paper`` gives our training the public code's meta-step
(the preset "paper": four tasks, five Adam steps each), and so tells apart what comes from the
features and what from the meta-step.
"""

import argparse
import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam

from comet_examples.datasets import DATASETS, load_image
from comet_examples.detectors.simplenet import SimpleNet
from comet_examples.presets import preset_for
from comet_examples.report import machine, table
from comet_examples.training import FeatureRows, Method, TrainingSettings, train
from comet_meta.vision.backbones import load_backbone
from comet_meta.vision.features import FeatureStore, PatchFeatures

_BATCH, _TASKS, _INNER_STEPS = 8, 4, 5


class Clock:
    """Seconds by part of the work: wall-clock time and processor time.

    Attributes:
        wall: Seconds on the wall.
        processor: Seconds of all threads of this process.
    """

    def __init__(self) -> None:
        self.wall: Counter[str] = Counter()
        self.processor: Counter[str] = Counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time that the body takes."""
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.wall[part] += time.perf_counter() - wall  # type: ignore[assignment]
        self.processor[part] += time.process_time() - processor  # type: ignore[assignment]

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its time counted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return function(*args, **kwargs)

        return timed


def main() -> None:
    """Measure and print."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    preset = preset_for("simplenet", "tf_efficientnet_lite0")
    split = DATASETS["mvtec"].load(options.data_root, options.category)
    paths = [sample.path for sample in split.train]
    load = partial(load_image, transform=preset.transform)
    updates = options.epochs * (len(paths) // _BATCH + (len(paths) % _BATCH > 1))
    print(f"{machine()}; {len(paths)} pictures, {updates} outer updates, {preset.transform}")
    ratios = []
    for repeat in range(options.repeats):
        theirs, ours = Clock(), Clock()
        features = train_ours(
            paths, load, str(preset.transform), options.epochs, options.meta, ours
        )
        public_schedule(paths, load, features, options.measured, theirs)
        share = updates / options.measured
        ratios.append(
            [
                share * theirs.wall["all"] / ours.wall["all"],
                share * theirs.processor["all"] / ours.processor["all"],
            ]
        )
        wall, processor = ratios[-1]
        print(f"public / ours, run {repeat}: {wall:.1f} on the wall, {processor:.1f} of processor")
    wall, processor = np.median(ratios, axis=0)
    print(f"\nmedian of {options.repeats}: {wall:.1f} on the wall, {processor:.1f} of processor\n")
    rows: list[dict[str, str | float]] = []
    for name, clock, factor in (("public", theirs, share), ("ours", ours, 1.0)):
        parts = clock.processor.copy()
        whole = parts.pop("all")
        parts["other"] = whole - parts.total()
        for part, seconds in [("all", whole), *parts.most_common()]:
            rows.append(
                {
                    "schedule": name,
                    "part": part,
                    "processor seconds": f"{factor * seconds:.1f}",
                    "share": f"{seconds / whole:.0%}",
                }
            )
    print(table(rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", type=Path, required=True, help="in MVTec AD's layout")
    parser.add_argument("--category", default="toothbrush")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--measured", type=int, default=6, help="updates of the public schedule")
    parser.add_argument("--meta", choices=["comet", "paper"], default="comet")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def train_ours(
    paths: Sequence[Path],
    load: Callable[[Path], Tensor],
    transform_key: str,
    epochs: int,
    method: Method,
    clock: Clock,
) -> FeatureRows:
    """Features and training, by part; returns the features."""
    extractor = PatchFeatures(load_backbone())
    with tempfile.TemporaryDirectory() as folder, clock("all"):
        with clock("features, once"):
            levels = FeatureStore(Path(folder)).get(
                extractor, paths, load, transform_key=transform_key
            )
        data = FeatureRows(levels, torch.arange(len(paths)))

        def build() -> SimpleNet:
            detector = SimpleNet(extractor.channels, (256, 256))
            detector.losses = clock.around("head: forward", detector.losses)  # type: ignore[method-assign]
            detector.scores = clock.around("weights: scoring", detector.scores)  # type: ignore[method-assign]
            return detector

        backward = torch.autograd.backward
        torch.autograd.backward = clock.around("head: backward", backward)
        try:
            train(build, data, TrainingSettings(method, epochs, _BATCH))
        finally:
            torch.autograd.backward = backward
    return data


def public_schedule(
    paths: Sequence[Path],
    load: Callable[[Path], Tensor],
    features: FeatureRows,
    updates: int,
    clock: Clock,
) -> None:
    """Some outer updates of the public code's schedule."""
    torch.manual_seed(0)
    extractor = PatchFeatures(load_backbone())
    head = SimpleNet(extractor.channels, (256, 256))
    head.fit_statistics(features.batches())
    outer = Adam(head.parameters(), lr=2e-4)
    with clock("all"):
        for _ in range(updates):
            outer.zero_grad()
            batch = torch.randperm(len(paths))[:_BATCH]
            for rows in batch.chunk(_TASKS):
                with clock("reading pictures"):
                    images = torch.stack([load(paths[row]) for row in rows.tolist()])
                with clock("copies of the model"):
                    whole = copy.deepcopy(nn.ModuleList([extractor, head]))
                adapted = cast("SimpleNet", whole[1])
                adapt(cast("PatchFeatures", whole[0]), adapted, images, clock)
                for parameter, moved in zip(head.parameters(), adapted.parameters(), strict=True):
                    difference = (parameter - moved).detach() / _TASKS
                    parameter.grad = (
                        difference if parameter.grad is None else parameter.grad + difference
                    )
            with clock("outer update"):
                outer.step()


def adapt(extractor: PatchFeatures, head: SimpleNet, images: Tensor, clock: Clock) -> None:
    """The inner steps of a task on 70 % of its pictures, and the loss of the others."""
    queries = max(1, round(0.3 * len(images)))
    inner = Adam(head.parameters(), lr=1e-4)
    head.train()
    for _ in range(_INNER_STEPS):
        with clock("backbone"):
            levels = extractor(images[queries:])
        with clock("head: forward"):
            loss = head.losses(levels).mean()
        with clock("head: backward"):
            inner.zero_grad()
            torch.autograd.backward(loss)
        with clock("inner Adam"):
            inner.step()
    with clock("backbone"):
        levels = extractor(images[:queries])
    with clock("head: forward"), torch.no_grad():
        head.losses(levels)


if __name__ == "__main__":
    main()
