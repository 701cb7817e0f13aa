"""What the tests of ``comet-meta rank`` share."""

from pathlib import Path

import pytest

from comet_meta.vision import patch_grids
from comet_meta.vision.images import load_values


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
