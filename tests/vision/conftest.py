"""What the tests of ``comet-meta rank`` and of the curation report share."""

from pathlib import Path

import pytest
from html_runs import HOSTILE, pictures, write

from comet_meta.vision import patch_grids
from comet_meta.vision.images import load_values
from comet_meta.vision.samples import Sample


@pytest.fixture
def small_files(tmp_path_factory, monkeypatch):
    """Eight pictures in a file of features, in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(patch_grids, "_PICTURES", 8)


@pytest.fixture
def loads(monkeypatch) -> list[Path]:
    """The pictures that were read for their features, in order."""
    read: list[Path] = []

    def load(path, transform):
        read.append(path)
        return load_values(path, transform)

    monkeypatch.setattr(patch_grids, "load_values", load)
    return read


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    """107 pictures, some with hostile names."""
    names = [f"line-{'ab'[i % 2]}/{i:03d}.png" for i in range(100)]
    return pictures(tmp_path_factory.mktemp("pictures"), names + HOSTILE)


@pytest.fixture(scope="module")
def report(samples, tmp_path_factory) -> Path:
    """A report of them."""
    return write(tmp_path_factory.mktemp("out"), samples)
