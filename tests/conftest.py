"""Shared fixtures."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

# Of a mutant it matters that it fails, not how simply.
settings.register_profile(
    "mutants", phases=[Phase.explicit, Phase.generate], database=None, derandomize=True
)


def pytest_configure(config: pytest.Config) -> None:
    """Processes that share the tests have one thread each, and so have theirs."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the examples leave their pictures out, which take most of the time."""
    monkeypatch.setattr("comet_examples.session._draw", lambda *_: None)
    monkeypatch.setattr("comet_examples.session._report", lambda *_: None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Small real pictures in the layouts of the benchmarks, where they lie beside the project."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder shared/data beside the project")
    return folder
