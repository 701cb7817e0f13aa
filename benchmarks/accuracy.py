"""Detection under contamination: methods paired by seed, one JSON line a run.

Rerun the same command after an interruption: runs that are already in the file are not repeated.
A method is ``plain``, ``oracle``, ``paper``, ``comet``, or ``comet:<meta>`` for another meta-step.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import ttest_rel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from comet_examples.backbones import DEFAULT_BACKBONE, load_backbone
from comet_examples.datasets import DATASETS, bad_samples
from comet_examples.detectors import DETECTORS
from comet_examples.experiment import Experiment
from comet_examples.features import FeatureStore
from comet_examples.metrics import curation_metrics
from comet_examples.presets import preset_for
from comet_examples.report import table
from comet_examples.training import Method, TrainingSettings

from comet_meta.optimizer import MetaMode


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", choices=DATASETS, default="elpv")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--category", default="mono")
    parser.add_argument("--detector", choices=DETECTORS, default="simplenet")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--methods", nargs="+", default=["plain", "oracle", "comet"])
    parser.add_argument("--noise", nargs="+", type=float, default=[0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--strength", type=float, default=0.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy.jsonl"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)

    preset = preset_for(options.detector, options.backbone, options.dataset)
    clean = DATASETS[options.dataset].load(options.data_root, options.category)
    backbone = load_backbone(options.backbone)
    experiment = Experiment(
        clean, options.detector, preset, backbone, FeatureStore(), options.device
    )

    def one_run(noise: float, seed: int, method: str) -> dict[str, float]:
        split = experiment.split(noise, seed)
        name, _, meta = method.partition(":")
        settings = TrainingSettings(
            cast("Method", name),
            options.epochs or preset.epochs,
            seed=seed,
            meta=cast("MetaMode", meta) or None,
            strength=options.strength,
        )
        start = time.perf_counter()
        outcome = experiment.run(split, settings)
        figures = outcome.figures | {"seconds": time.perf_counter() - start}
        weighter = outcome.training.optimizer.weighter
        if weighter is not None and noise > 0:
            bad = bad_samples(split.train)
            curation = curation_metrics(weighter.scores, bad)
            figures |= {f"curation {key}": value for key, value in curation.items()}
            figures["weight of bad"] = float(weighter.weights[torch.from_numpy(bad)].mean())
            figures["weight of good"] = float(weighter.weights[torch.from_numpy(~bad)].mean())
        return figures

    fixed = {
        key: str(getattr(options, key))
        for key in ("dataset", "category", "detector", "backbone", "strength")
    } | {"epochs": options.epochs or preset.epochs, "transform": str(preset.transform)}
    runs = _read(options.out)
    for noise in options.noise:
        for seed in options.seeds:
            for method in options.methods:
                key = fixed | {"noise": noise, "seed": seed, "method": method}
                if any(run["key"] == key for run in runs):
                    continue
                run = {"key": key, "figures": one_run(noise, seed, method), "machine": _machine()}
                runs.append(run)
                with options.out.open("a") as file:
                    file.write(json.dumps(run) + "\n")
    for noise in options.noise:
        chosen = {
            method: {
                run["key"]["seed"]: run["figures"]
                for run in runs
                if run["key"]
                == fixed | {"noise": noise, "seed": run["key"]["seed"]} | {"method": method}
                and run["key"]["seed"] in options.seeds
            }
            for method in options.methods
        }
        print(f"\n{options.category}, noise {noise}, seeds {options.seeds}\n")
        print(table([_row(method, chosen) for method in options.methods]))


def _row(method: str, chosen: dict[str, dict[int, dict[str, float]]]) -> dict[str, str | float]:
    """Mean ± standard deviation over seeds, and the paired difference to plain."""
    own, plain = chosen[method], chosen.get("plain", {})
    row: dict[str, str | float] = {"method": method}
    for name in next(iter(own.values())):
        values = np.array([figures[name] for figures in own.values()])
        row[name] = f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
        if name == "seconds":
            row[name] = f"{np.median(values):.0f}"
    seeds = sorted(own.keys() & plain.keys())
    if method != "plain" and len(seeds) > 1:
        ours, theirs = ([part[seed]["I-AUROC"] for seed in seeds] for part in (own, plain))
        row["I-AUROC - plain"] = f"{np.mean(ours) - np.mean(theirs):+.3f}"
        row["p (paired t)"] = float(ttest_rel(ours, theirs).pvalue)
    return row


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def _machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    main()
