"""The feature cache: how fast it fills, and what half precision does to the figures."""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from comet_examples.datasets import DATASETS, load_image
from comet_examples.detectors import DETECTORS
from comet_examples.experiment import Experiment
from comet_examples.metrics import image_metrics
from comet_examples.presets import preset_for
from comet_examples.report import machine, table
from comet_meta.vision.backbones import load_backbone
from comet_meta.vision.features import FeatureExtractor, FeatureStore, PatchFeatures
from overhead import interleaved, quartiles


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data-root", type=Path, required=True, help="in MVTec AD's layout")
    parser.add_argument("--category", default="toothbrush")
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, help="instead of the preset's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine()}\n")
    print(table(throughput(options)) + "\n")
    print(table([precision(options, detector) for detector in DETECTORS]))


def throughput(options: argparse.Namespace) -> list[dict[str, str | float]]:
    """Time of filling the cache, against the plainest way."""
    device = torch.device(options.device)
    split = DATASETS["mvtec"].load(options.data_root, options.category)
    paths = [sample.path for sample in split.train]
    transform = preset_for("simplenet", "tf_efficientnet_lite0").transform
    load = partial(load_image, transform=transform)
    extractor, plain = PatchFeatures(load_backbone()), PatchFeatures(load_backbone()).to(device)

    def fill(half: bool, workers: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = FeatureStore(Path(folder), memory_budget=0, half=half)
            store.get(
                extractor,
                paths,
                load,
                transform_key=str(transform),
                device=device,
                num_workers=workers,
            )

    ways = {
        "one by one, without the store": lambda: one_by_one(plain, paths, load, device),
        "store": lambda: fill(False, 0),
        "store, half": lambda: fill(True, 0),
        "store, two workers": lambda: fill(False, 2),
    }
    times = interleaved(list(ways.values()), options.rounds, device, warm_up=1)
    return [
        {
            "way": way,
            "pictures a second": f"{len(paths) / np.median(own.wall):.1f}",
            "speed-up": quartiles(times[0].wall / own.wall),
            "of processor": quartiles(times[0].processor / own.processor),
        }
        for way, own in zip(ways, times, strict=True)
    ]


def one_by_one(
    extractor: FeatureExtractor,
    paths: list[Path],
    load: partial[Tensor],
    device: torch.device,
) -> None:
    """A picture at a time, in the default memory layout."""
    for path in paths:
        [level.cpu() for level in extractor(load(path).unsqueeze(0).to(device))]


def precision(options: argparse.Namespace, detector: str) -> dict[str, str | float]:
    """Largest change of I-AUROC, and its size in memory, that float16 features make."""
    clean = DATASETS["mvtec"].load(options.data_root, options.category)
    preset = preset_for(detector, "tf_efficientnet_lite0")
    preset = preset.lasting(epochs=options.epochs)
    whole, half = (
        Experiment(
            clean, detector, preset, load_backbone(), FeatureStore(half=half), options.device
        )
        for half in (False, True)
    )
    scored, trained, figures = [], [], []
    for seed in options.seeds:
        split = whole.split(options.noise, seed)
        settings = preset.training("plain", seed=seed)
        reference = whole.run(split, settings)
        labels = np.array([sample.label for sample in split.test])
        scores, _ = half.predict(reference.training, split.test)
        figures.append(reference.figures["I-AUROC"])
        scored.append(abs(image_metrics(scores, labels)["I-AUROC"] - figures[-1]))
        trained.append(abs(half.run(split, settings).figures["I-AUROC"] - figures[-1]))
    return {
        "detector": detector,
        "seeds": str(len(options.seeds)),
        "I-AUROC, float32": f"{np.mean(figures):.4f}",
        "largest change, same detector": f"{max(scored):.4f}",
        "largest change, trained on float16": f"{max(trained):.4f}",
    }


if __name__ == "__main__":
    main()
