"""Time and memory of ``comet-meta rank`` on a folder of many pictures.

    python benchmarks/cost/rank_many.py --pictures 2000
    python benchmarks/cost/rank_many.py --pictures 50000 --random-features

The pictures are solar cells (elpv), each as a file, as often as it takes. With
``--random-features`` they are small pictures of noise, and random features lie in the cache: then
the backbone, whose time is proportional to the pictures and whose memory doesn't depend on their
number, is left out, and comparing the pictures and the report are measured alone. One picture in a
hundred has features of another kind; its place in the list is checked.

Memory is the process's own; pages of the mapped file of features are the system's to take back.
"""

import argparse
import csv
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image
from typing_extensions import override

from comet_examples.datasets import elpv
from comet_meta.vision.backbones import load_backbone
from comet_meta.vision.features import PatchFeatures
from comet_meta.vision.files import sole_writer
from comet_meta.vision.images import SQUARE
from comet_meta.vision.patch_grids import PatchGrids
from comet_meta.vision.picture_prior import grid_side
from comet_meta.vision.rank import feature_cache

_ODD = 100


def main() -> None:
    """Print seconds and megabytes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--random-features", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        folder = Path(scratch) / "pictures"
        if options.random_features:
            noise(folder, options.pictures)
            random_features(folder)
        else:
            solar_cells(folder, options.pictures)
        out = Path(scratch) / "out"
        command = [sys.executable, "-m", "comet_meta", "rank", str(folder), "--device", "cpu"]
        threads = {"OMP_NUM_THREADS": str(options.threads)}
        seconds, own, mapped = measured([*command, "--out", str(out)], threads)
        page = (out / "report.html").stat().st_size
        if options.random_features:
            with (out / "keep.csv").open(newline="", encoding="utf-8") as lines:
                first = [row["path"] for row in csv.DictReader(lines)][: options.pictures // _ODD]
            odd = sum(int(name[:-4]) % _ODD == 0 for name in first)
            print(f"of the first hundredth of the list, {odd} of {len(first)} are of another kind")
    print(
        f"{options.pictures} pictures, {options.threads} threads: {seconds:.0f} s, at most "
        f"{own / 1e6:.0f} MB of its own and {mapped / 1e6:.0f} MB mapped; "
        f"report {page / 1e6:.0f} MB"
    )


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, int, int]:
    """Seconds of a command, and the most bytes of its own and of mapped files it ever had."""
    start = time.perf_counter()
    process = psutil.Popen(command, env={**os.environ, **environment})
    own = mapped = 0
    while process.poll() is None:
        try:
            memory = process.memory_info()
        except psutil.Error:
            break
        own, mapped = max(own, memory.rss - memory.shared), max(mapped, memory.shared)
        time.sleep(0.1)
    if process.wait() != 0:
        raise RuntimeError(f"exit status {process.returncode} of {command}")
    return time.perf_counter() - start, own, mapped


def solar_cells(folder: Path, count: int) -> None:
    """Copies of the package's certain pictures, which are a little more than 2,000."""
    kinds = [elpv.load(None, kind) for kind in elpv.categories(None)]
    cells = [sample.path for split in kinds for sample in (*split.train, *split.test)]
    folder.mkdir()
    for i in range(count):
        source = cells[i % len(cells)]
        shutil.copy(source, folder / f"{i:06d}{source.suffix}")


def noise(folder: Path, count: int) -> None:
    """Pictures of 32 x 32 pixels."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = generator.integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06d}.png")


class RandomGrids(PatchGrids):
    """Random features, in the files in which the command looks for its own."""

    @override
    def _patches(
        self, paths: Sequence[Path], workers: Any, progress: Any
    ) -> npt.NDArray[np.float32]:
        numbers = np.array([int(path.stem) for path in paths])
        generator = np.random.default_rng(numbers[0])
        patches = generator.standard_normal((len(paths), *self._shape), dtype=np.float32)
        patches[numbers % _ODD == 0, :, :2] += 2
        progress.update(len(paths))
        return patches


def random_features(folder: Path) -> None:
    """Fill the command's cache; every hundredth picture is of another kind."""
    paths = sorted(folder.iterdir())
    cache = feature_cache(folder)
    with sole_writer(cache):
        extractor = PatchFeatures(load_backbone())
        RandomGrids(extractor, SQUARE, grid_side(len(paths)), cache).compute(paths)


if __name__ == "__main__":
    main()
