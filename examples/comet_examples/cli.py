"""The command line that the example scripts share."""

import argparse
import inspect
import io
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import torch

from comet_examples.datasets import DATASETS, DatasetError, Transform, oracle
from comet_examples.detectors import DETECTORS
from comet_examples.presets import PRESETS, Preset, preset_for
from comet_examples.report import table
from comet_examples.session import Session
from comet_examples.training import ResumeError
from comet_meta.cli import parse_contamination
from comet_meta.meta.step import MetaMode
from comet_meta.vision.backbones import PAPER_BACKBONE, BackboneError, load_backbone
from comet_meta.vision.download import DownloadError
from comet_meta.vision.features import FeatureStore
from comet_meta.vision.files import BusyError, unforeseen
from comet_meta.vision.pixels import largest_picture

_DEMO = (
    "DEMO: no --data-root, so this trains on solar cells from the elpv-dataset package "
    "(mono, 10 % of the training pictures defective), plain against CoMet"
)
DEMO_PIXELS = 176
"""Side of the demo's pictures, so that it ends within minutes on two CPU cores."""

_COMPARED = {
    "bank": "a memory of patches, which takes no training: what the training is worth",
    "plain": "training without CoMet",
    "oracle": "training on the set without its bad pictures",
    "paper": "training with the formulas of the paper",
}


def main(
    detector: str = "simplenet", dataset: str = "mvtec", argv: Sequence[str] | None = None
) -> int:
    """Train and judge a detector on the categories of a data set.

    Args:
        detector: Name in ``DETECTORS``, what ``--detector`` is without being given.
        dataset: Name in ``DATASETS``, the same for ``--dataset``.
        argv: Arguments; by default the process's.

    Returns:
        The exit status: 0 done, 1 a category failed, 2 wrong arguments or data, 130 interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files needn't be printable
    options = _options(detector, dataset, argv)
    try:
        with largest_picture(options.max_megapixels):
            return _run(options)
    except (BackboneError, BusyError, DatasetError, DownloadError, ResumeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: the last whole epoch is in {options.out}; the same command with "
            "--resume goes on from there",
            file=sys.stderr,
        )
        return 130
    except Exception as error:  # noqa: BLE001 - no traceback is for a user to read
        print(f"error: {unforeseen(error, options.out)}", file=sys.stderr)
        return 2


def _options(detector: str, dataset: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser(detector, dataset)
    options = parser.parse_args(argv)
    if options.resize and len(options.resize) > 2:
        parser.error(f"--resize takes one number or two, not {len(options.resize)}")
    if options.dataset == "folder":
        for name in ("noise", "curated", "oracle", "overlap"):
            if getattr(options, name):
                parser.error(
                    f"--{name} needs pictures known to be good or bad, and nothing is known "
                    f"about those of a plain folder: leave out --{name}"
                )
    if options.good and "good" not in inspect.signature(DATASETS[options.dataset].load).parameters:
        parser.error(
            f"--good is for data sets with a folder for each kind of test picture, and "
            f"{options.dataset} has none: leave out --good"
        )
    if options.tensorboard and find_spec("tensorboard") is None:
        parser.error(
            "--tensorboard needs the package tensorboard: pip install tensorboard, or "
            'pip install "comet-meta[tensorboard]"'
        )
    if options.preset == "paper" and options.backbone not in (None, PAPER_BACKBONE):
        parser.error(
            f"--preset paper is for {PAPER_BACKBONE}: leave out --backbone {options.backbone}, or "
            "take the other preset with --plain --paper"
        )
    if options.data_root is None and options.dataset == dataset != "elpv":
        print(_DEMO)
        options.dataset = "elpv"
        options.plain = True
        options.category = options.category or ["mono"]
        options.noise = 0.1 if options.noise is None else options.noise
        options.resize = options.resize or [DEMO_PIXELS]
    choice = PRESETS[options.preset]
    options.backbone = options.backbone or choice.backbone
    compared = [
        method for method in _COMPARED if getattr(options, method) or method in choice.methods
    ]
    options.methods = [*compared, "comet"]
    options.out = options.out or Path("runs") / f"{options.detector}_{options.dataset}"
    return options


def _parser(detector: str, dataset: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"Train {detector} on {dataset}, robustly, on data that nobody has cleaned. "
        "Without --data-root it runs a demo on pictures that a package ships.",
        epilog="A folder --out holds the results of one group of settings. The same command again "
        "trains only what isn't finished in it (other methods may be added, a method that was "
        "stopped starts again or, with --resume, continues); other settings are refused there.",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data-root", type=Path, help="folder of the data set")
    data.add_argument(
        "--dataset",
        choices=DATASETS,
        default=dataset,
        help="its layout; folder: any pictures, to be ranked (default: %(default)s)",
    )
    data.add_argument("--category", nargs="+", help="one or several, or all (default: all)")
    data.add_argument(
        "--curated", action="store_true", help="remove the bad training pictures that it has"
    )
    data.add_argument(
        "--noise", type=_share, help="share of bad training pictures to add, in [0, 1) (default: 0)"
    )
    data.add_argument(
        "--overlap", action="store_true", help="bad training pictures stay in the test set too"
    )
    data.add_argument(
        "--good",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="folders of good test pictures, besides good, ok, normal and the like",
    )
    data.add_argument(
        "--keep-going",
        action="store_true",
        help="train without the pictures that can't be read, and name them",
    )
    data.add_argument(
        "--max-megapixels",
        type=_count,
        metavar="MILLIONS",
        help="largest picture that is read (default: 178); above, a file may be a bomb",
    )
    data.add_argument(
        "--resize",
        type=_count,
        nargs="+",
        metavar="PIXELS",
        help="shorter side of the pictures, or height and width (default: the preset's)",
    )
    data.add_argument(
        "--crop",
        type=_count,
        metavar="PIXELS",
        help="side of the centre crop (default: the preset's; none with --resize)",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--detector", choices=DETECTORS, default=detector, help="(default: %(default)s)"
    )
    model.add_argument(
        "--preset",
        choices=PRESETS,
        default="default",
        help=f"paper: {PAPER_BACKBONE}, the paper's settings, --plain --paper (default: "
        "%(default)s)",
    )
    model.add_argument("--backbone", help="name of a timm model (default: the preset's)")
    model.add_argument(
        "--weights",
        help=".pth or .safetensors file of the backbone, its address https://...#sha256=..., or "
        "'random'",
    )
    model.add_argument(
        "--half-features", action="store_true", help="keep features in half precision"
    )
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=_count, help="passes over the training set (default: the preset's length)"
    )
    length.add_argument(
        "--steps",
        type=_steps,
        metavar="auto|STEPS",
        help="or optimizer steps, rounded up to whole passes; auto: the preset's length, or five "
        "times it where pictures that were held out have a lower loss then (for clean sets)",
    )
    training.add_argument(
        "--batch-size", type=_pair, default=8, help="at least 2 (default: %(default)s)"
    )
    training.add_argument("--seed", type=_seed, default=0, help="(default: %(default)s)")
    training.add_argument(
        "--contamination",
        type=parse_contamination,
        default="auto",
        metavar="auto|SHARE",
        help="share of bad training pictures, in [0, 0.5), where it is known (default: "
        "%(default)s: as many as the scores prove)",
    )
    training.add_argument(
        "--review",
        type=Path,
        metavar="CSV",
        help="list from the report of comet-meta rank, or of an earlier training of the same "
        "pictures, in which you have ticked the bad pictures of the sample: it tells the share of "
        "bad pictures, and the looked-at ones are trained on or left out as you say",
    )
    training.add_argument("--meta", choices=get_args(MetaMode), help="meta-step of CoMet")
    training.add_argument(
        "--strength",
        type=_strength,
        default=0.0,
        help="lambda_0 of CoMet's uncertainty penalty (default: %(default)s)",
    )
    for method, what in _COMPARED.items():
        training.add_argument(
            f"--{method}", action="store_true", help=f"for comparison, also {what}"
        )
    training.add_argument(
        "--device",
        type=_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, help="folder (default: runs/DETECTOR_DATASET)")
    output.add_argument(
        "--resume", action="store_true", help="continue a stopped method from its last epoch"
    )
    output.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write logs for TensorBoard, into the folders tensorboard in --out",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    source = DATASETS[options.dataset]
    preset = _preset(options)
    names = options.category or ["all"]
    categories = source.categories(options.data_root) if names == ["all"] else dict.fromkeys(names)
    more = {"good": options.good} if options.good else {}
    splits = [source.load(options.data_root, name, **more) for name in categories]
    session = Session(
        detector=options.detector,
        dataset=options.dataset,
        preset=preset,
        training=preset.training(
            "comet",
            batch_size=options.batch_size,
            seed=options.seed,
            contamination=options.contamination,
            meta=options.meta,
            strength=options.strength,
        ),
        methods=options.methods,
        backbone=load_backbone(options.backbone, options.weights),
        out=options.out,
        device=options.device,
        noise=options.noise or 0.0,
        overlap=options.overlap,
        resume=options.resume,
        store=FeatureStore(half=options.half_features),
        tensorboard=options.tensorboard,
        keep_going=options.keep_going,
        review=options.review,
        chooses_length=options.steps == "auto",
    )
    rows, failed = session.run([oracle(s) for s in splits] if options.curated else splits)
    if rows:
        print("\n" + table(rows))
        print(f"\nresults, pictures and checkpoints: {options.out}")
        for line in ahead(rows):
            print(line)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _preset(options: argparse.Namespace) -> Preset:
    """The preset with what the options say otherwise."""
    preset = preset_for(options.detector, options.backbone)
    if options.resize:
        size = tuple(options.resize) if len(options.resize) == 2 else options.resize[0]
        preset = preset.sized(Transform(size, options.crop))
    elif options.crop:
        preset = preset.sized(replace(preset.transform, crop=options.crop))
    steps = None if options.steps == "auto" else options.steps
    return preset.lasting(epochs=options.epochs, steps=steps)


def ahead(rows: Sequence[Mapping[str, str | float]]) -> list[str]:
    """Where the memory bank beats CoMet, in a sentence each.

    Args:
        rows: Lines of the table: ``category``, ``method`` and, where it could be judged, I-AUROC.

    Example:
        >>> ahead([{"category": "tile", "method": "bank", "I-AUROC": 0.9},
        ...        {"category": "tile", "method": "comet", "I-AUROC": 0.8}])
        ['tile: the memory bank is ahead of comet, I-AUROC 0.900 against 0.800: use the bank here']
    """
    figures = {
        (row["category"], row["method"]): float(row["I-AUROC"]) for row in rows if "I-AUROC" in row
    }
    return [
        f"{category}: the memory bank is ahead of comet, I-AUROC {bank:.3f} against "
        f"{figures[category, 'comet']:.3f}: use the bank here"
        for (category, method), bank in figures.items()
        if method == "bank" and bank > figures.get((category, "comet"), bank)
    ]


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share in [0, 1)")
    return value


def _pair(text: str) -> int:
    value = _count(text)
    if value < 2:
        raise argparse.ArgumentTypeError(
            f"{text} is too few: a batch is split in two, so it takes at least 2"
        )
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2^63 - 1")
    return value


def _strength(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number >= 0")
    return value


def _device(text: str) -> str:
    try:
        known = torch.device(text).type != "meta"
        if known:
            torch.zeros(1, device=text).add(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        known = False
    if not known:
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        there += ["mps"] if torch.backends.mps.is_available() else []
        raise argparse.ArgumentTypeError(
            f"{text} is no device of this machine; there are: {', '.join(['cpu', *there])}"
        )
    return text


def _steps(text: str) -> int | str:
    return text if text == "auto" else _count(text)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number >= 1")
    return value
