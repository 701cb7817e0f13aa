"""The command line that the example scripts share."""

import argparse
import json
import logging
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import timm
import torch

import comet_meta
from comet_examples import report
from comet_examples.backbones import DEFAULT_BACKBONE, Backbone, BackboneError, load_backbone
from comet_examples.datasets import DATASETS, DatasetError, Split, Transform, bad_samples
from comet_examples.experiment import Experiment
from comet_examples.features import FeatureStore
from comet_examples.metrics import curation_metrics
from comet_examples.presets import Preset, preset_for
from comet_examples.training import Method, ResumeError, Training, TrainingSettings
from comet_meta.optimizer import MetaMode

_DEMO = (
    "DEMO: no --data-root, so this trains on solar cells from the elpv-dataset package "
    "(mono, 10 % of the training pictures defective), plain against CoMet"
)


def main(detector: str, dataset: str, argv: Sequence[str] | None = None) -> int:
    """Train and judge a detector on the categories of a data set.

    Args:
        detector: Name in ``DETECTORS``.
        dataset: Name in ``DATASETS``.
        argv: Arguments; by default the process's.

    Returns:
        The exit status: 0 done, 1 a category failed, 2 wrong arguments or data, 130 interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parser(detector, dataset).parse_args(argv)
    if options.data_root is None and dataset != "elpv":
        print(_DEMO)
        dataset = "elpv"
        options.plain = True
        options.category = options.category or ["mono"]
        options.noise = 0.1 if options.noise is None else options.noise
    try:
        return _run(options, detector, dataset)
    except (BackboneError, DatasetError, ResumeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: the last whole epoch is in {options.out}; the same command with "
            "--resume goes on from there",
            file=sys.stderr,
        )
        return 130


def _parser(detector: str, dataset: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"Train {detector} on {dataset}, robustly, on data that nobody has cleaned. "
        "Without --data-root it runs a demo on pictures that a package ships.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data-root", type=Path, help="folder of the data set")
    data.add_argument("--category", nargs="+", help="one or several, or all (default: all)")
    data.add_argument("--noise", type=_share, help="share of bad training pictures, in [0, 1)")
    data.add_argument(
        "--overlap", action="store_true", help="bad training pictures stay in the test set too"
    )
    data.add_argument("--resize", type=_size, help="shorter side of the pictures, in pixels")
    data.add_argument("--crop", type=_size, help="side of the centre crop, in pixels")
    model = parser.add_argument_group("model")
    model.add_argument("--backbone", default=DEFAULT_BACKBONE, help="name of a timm model")
    model.add_argument("--weights", help=".pth or .safetensors file of the backbone, or 'random'")
    method = parser.add_argument_group("training")
    method.add_argument("--epochs", type=_count, help="passes over the training set")
    method.add_argument("--batch-size", type=_count, default=8)
    method.add_argument("--seed", type=int, default=0)
    method.add_argument("--meta", choices=get_args(MetaMode), help="meta-step of CoMet")
    method.add_argument(
        "--strength", type=float, default=0.0, help="lambda_0 of CoMet's uncertainty penalty"
    )
    for name, what in (
        ("plain", "without CoMet"),
        ("oracle", "on the training set without its bad pictures"),
        ("paper", "with the formulas of the paper"),
    ):
        method.add_argument(f"--{name}", action="store_true", help=f"for comparison, also {what}")
    method.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("runs") / detector)
    output.add_argument("--resume", action="store_true", help="continue an interrupted run")
    return parser


def _run(options: argparse.Namespace, detector: str, dataset: str) -> int:
    source = DATASETS[dataset]
    preset = preset_for(options.backbone, dataset)
    if options.resize or options.crop:
        preset = replace(
            preset, transform=Transform(options.resize or preset.transform.resize, options.crop)
        )
    names = options.category or ["all"]
    categories = source.categories(options.data_root) if names == ["all"] else names
    splits = [source.load(options.data_root, name) for name in categories]
    backbone = load_backbone(options.backbone, options.weights)
    store = FeatureStore()
    rows: list[dict[str, str | float]] = []
    failed = []
    for split in splits:
        try:
            rows += _category(options, detector, preset, split, backbone, store)
        except ResumeError:
            raise
        except (DatasetError, ValueError) as error:
            print(f"error: {split.category}: {error}", file=sys.stderr)
            failed.append(split.category)
    if len(failed) == len(splits):
        return 1
    print("\n" + report.table(rows))
    print(f"\nresults, pictures and checkpoints: {options.out}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _category(
    options: argparse.Namespace,
    detector: str,
    preset: Preset,
    clean: Split,
    backbone: Backbone,
    store: FeatureStore,
) -> list[dict[str, str | float]]:
    """Train and judge every method on one category; the rows of the final table."""
    experiment = Experiment(clean, detector, preset, backbone, store, options.device)
    split = experiment.split(options.noise or 0.0, options.seed, overlap=options.overlap)
    folder = options.out / split.category
    folder.mkdir(parents=True, exist_ok=True)
    bad = int(bad_samples(split.train).sum())
    print(
        f"{split.category}: {len(split.train)} training pictures ({bad} bad), "
        f"{len(split.test)} test pictures"
    )
    methods: list[Method] = [m for m in ("plain", "oracle", "paper") if getattr(options, m)]
    table: list[dict[str, str | float]] = []
    results: dict[str, Any] = {"settings": _settings(options, preset, backbone), "methods": {}}
    for method in [*methods, "comet"]:
        settings = TrainingSettings(
            method,
            options.epochs or preset.epochs,
            options.batch_size,
            options.seed,
            options.meta,
            options.strength,
        )
        outcome = experiment.run(
            split, settings, checkpoint=folder / f"{method}.pt", resume=options.resume
        )
        trained, figures = outcome.training, outcome.figures
        entry: dict[str, Any] = {"test": figures, "history": trained.history}
        if trained.optimizer.weighter is not None:
            entry |= _curation(trained, split, method, preset.transform, folder)
        title = f"{split.category}, {method}: test pictures and their anomaly maps"
        report.draw_heat_maps(
            split.test,
            outcome.scores,
            outcome.maps,
            preset.transform,
            title,
            folder / f"{method}_maps.png",
        )
        results["methods"][method] = entry
        curation = {f"curation {k}": v for k, v in entry.get("curation", {}).items()}
        table.append({"category": split.category, "method": method, **figures, **curation})
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    return table


def _curation(
    trained: Training, split: Split, method: Method, transform: Transform, folder: Path
) -> dict[str, Any]:
    """The pictures and figures of the training set's ranking."""
    weighter = trained.optimizer.weighter
    if weighter is None:
        return {}
    heading = f"{split.category}, {method}"
    report.draw_weights(
        weighter, split.train, f"{heading}: the training set", folder / f"{method}_weights.png"
    )
    report.draw_suspects(
        weighter,
        split.train,
        transform,
        f"{heading}: the training pictures that fit in least",
        folder / f"{method}_suspects.png",
    )
    bad = bad_samples(split.train)
    order = weighter.ranking()
    suspects = [
        {
            "path": str(split.train[i].path),
            "weight": round(float(weighter.weights[i]), 6),
            "score": round(float(weighter.scores[i]), 6),
        }
        for i in order.tolist()
    ]
    if not bad.any():
        return {"suspects": suspects}
    # By rank: weights alone are tied at both ends.
    suspicion = torch.empty(len(order))
    suspicion[order] = torch.arange(len(order), 0, -1).float()
    return {"curation": curation_metrics(suspicion, bad), "suspects": suspects}


def _settings(options: argparse.Namespace, preset: Preset, backbone: Backbone) -> dict[str, Any]:
    return {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "epochs": options.epochs or preset.epochs,
        "transform": asdict(preset.transform),
        "detector": preset.detector,
        "backbone": backbone.fingerprint,
        "versions": {
            "comet_meta": comet_meta.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share in [0, 1)")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number >= 1")
    return value


_size = _count
