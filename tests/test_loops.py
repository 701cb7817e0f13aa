"""Public training loops, their shape in our own words: what changes, and what comes of it."""

import difflib
import runpy
import sys
from pathlib import Path

import pytest
import torch

from comet_meta import CoMet

LOOPS = Path(__file__).parent / "loops"
NAMES = sorted(path.stem.removesuffix("_plain") for path in LOOPS.glob("*_plain.py"))
BAD = 16


def changed_lines(name: str) -> int:
    """Lines added or replaced; lines taken away where those are more."""
    plain, comet = ((LOOPS / f"{name}_{kind}.py").read_text() for kind in ("plain", "comet"))
    lines = list(difflib.ndiff(plain.splitlines(), comet.splitlines()))
    return max(sum(line.startswith(sign) for line in lines) for sign in ("+ ", "- "))


def ran(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.syspath_prepend(str(LOOPS))
    monkeypatch.delitem(sys.modules, "data", raising=False)
    return runpy.run_path(str(LOOPS / f"{name}_{kind}.py"))


def test_the_loops_are_all_there():
    assert len(NAMES) == 8


@pytest.mark.parametrize("name", NAMES)
def test_at_most_five_lines_change(name):
    assert 0 < changed_lines(name) <= 5, changed_lines(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_loop_trains_and_ranks_its_bad_samples_on_top(name, monkeypatch, capsys):
    ran(name, "plain", monkeypatch)
    names = ran(name, "comet", monkeypatch)
    comet = names["detector"].comet if "detector" in names else names["loader"]
    if isinstance(comet, CoMet):
        weighter, top = comet.weighter, comet.suspects(BAD)
    else:
        weighter = names["weighter"]
        top = weighter.ranking(BAD)
    assert (top < BAD).sum() >= 14
    # The weights did their work: bad samples have less than half the confidence of good ones.
    assert weighter.weights[:BAD].mean() < 0.5 * weighter.weights[BAD:].mean()
    assert torch.isfinite(weighter.weights).all()
