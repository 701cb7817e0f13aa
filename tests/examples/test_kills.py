"""A short version of benchmarks/kills.py."""

import sys

import kills
import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_killed_trainings_resume_bit_equal():
    assert sum(kills.main(4, seed=1).values()) == 4


def test_the_digest_sees_every_bit():
    training = kills.trained("comet", None)
    before = kills.digest(training)
    assert kills.digest(training) == before
    training.optimizer.weighter.scores[3] += 1e-6
    assert kills.digest(training) != before
