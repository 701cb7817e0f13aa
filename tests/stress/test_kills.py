"""A short version of kills.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import kills
import pytest

SCRIPT = Path(__file__).with_name("kills.py")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_killed_trainings_resume_bit_equal():
    # In a process of its own: this one may have threads, which don't go with forks.
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "4", "--seed", "1"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "resumed trainings ended in the bits" in done.stdout
    met = re.findall(r"(\d+) met (?!nothing)", done.stdout)
    assert sum(map(int, met)) == 4


def test_the_digest_sees_every_bit():
    training = kills.trained("comet", None)
    before = kills.digest(training)
    assert kills.digest(training) == before
    training.optimizer.weighter.scores[3] += 1e-6
    assert kills.digest(training) != before
