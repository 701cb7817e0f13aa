"""A few generated pictures with an obvious defect, on features that take no time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from comet_examples.datasets import Sample, Split, Transform
from comet_examples.experiment import Experiment
from comet_examples.presets import Preset
from comet_meta.vision.features import FeatureStore
from grid import Benchmark

OPTIONS = {
    "simplenet": {
        "hidden": 16,
        "top": 2,
        "adaptor": True,
        "learning_rate": 2e-4,
        "noise_std": 0.5,
        "own_noise": 0.0,
    },
    "fastflow": {"steps": 2, "top": 2},
}


class Pooling(nn.Module):
    """Stands in for a backbone: pictures averaged to two grids."""

    channels = (3, 3)
    fingerprint = "pooling"

    def forward(self, images):
        return [F.avg_pool2d(images.float() / 255, stride) for stride in (8, 16)]


def split(folder: Path, good: int = 24, tested: int = 12) -> Split:
    generator = np.random.default_rng(0)

    def sample(name: str, label: int) -> Sample:
        # One grey value a block, so that blocks differ and pooling keeps the differences.
        pixels = generator.integers(60, 120, (4, 4, 3)).repeat(8, axis=0).repeat(8, axis=1)
        if label:
            y, x = generator.integers(0, 3, 2) * 8
            pixels[y : y + 16, x : x + 16] = (250, 20, 250)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
        return Sample(folder / name, label, defect="spot" if label else "good")

    train = tuple(sample(f"train{i}.png", 0) for i in range(good))
    test = tuple(sample(f"test{i}.png", i % 2) for i in range(2 * tested))
    return Split("tiny", train, test, has_masks=False)


def experiment(folder: Path, detector: str) -> Experiment:
    torch.manual_seed(0)
    preset = Preset(Transform(32), epochs=3, detector=OPTIONS[detector])
    store = FeatureStore(folder / "cache")
    return Experiment(split(folder), detector, preset, Pooling(), store, "cpu")


class TinyBenchmark(Benchmark):
    """Has one experiment for all tasks, of steps in place of epochs."""

    def __init__(self, folder: Path, detector: str = "simplenet"):
        super().__init__("resnet18", {}, "cpu", None)
        made = experiment(folder, detector)
        made.preset = replace(made.preset, epochs=None, steps=6, schedule="cosine")
        self.experiment = lambda detector, task: made
