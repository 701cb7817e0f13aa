"""Data sets by name. A new one is a module with ``categories`` and ``load``, and a line here."""

from pathlib import Path
from typing import Protocol

from comet_examples.datasets import elpv, ksdd2, mvtec, viaduct
from comet_examples.datasets.contamination import bad_samples, contaminate, oracle
from comet_meta.vision import folder
from comet_meta.vision.images import Transform, load_image, load_mask, load_values
from comet_meta.vision.samples import DatasetError, Sample, Split
from comet_meta.vision.survey import Survey, survey


class Source(Protocol):
    """Where the splits of a data set come from."""

    def categories(self, root: Path | None) -> list[str]:
        """Names of the categories below ``root``."""
        ...

    def load(self, root: Path | None, category: str) -> Split:
        """Training and test set of one category."""
        ...


DATASETS: dict[str, Source] = {
    "elpv": elpv,
    "folder": folder,
    "ksdd2": ksdd2,
    "mvtec": mvtec,
    "viaduct": viaduct,
}

__all__ = [
    "DATASETS",
    "DatasetError",
    "Sample",
    "Source",
    "Split",
    "Survey",
    "Transform",
    "bad_samples",
    "contaminate",
    "load_image",
    "load_mask",
    "load_values",
    "oracle",
    "survey",
]
