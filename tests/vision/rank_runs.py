"""Runs of ``comet-meta rank`` on small pictures."""

import csv
from pathlib import Path

from comet_meta import cli

FAST = ["--backbone", "resnet10t", "--weights", "random", "--resize", "64", "--device", "cpu"]


def run(folder: Path, *options: str) -> int:
    return cli.main(["rank", str(folder), "--out", str(folder.parent / "out"), *FAST, *options])


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder.parent / "out" / "keep.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))
