"""A short version of endurance.py."""

import logging

import endurance
import pytest


@pytest.mark.slow
def test_memory_and_files_stay_as_they_are():
    pytest.importorskip("psutil")
    logging.disable()
    try:
        usage = endurance.main(2000)
    finally:
        logging.disable(logging.NOTSET)
    assert usage.files[0] == usage.files[1]
    assert usage.threads[0] == usage.threads[1]
    # A leak of one float a step and sample would show.
    assert usage.memory[-1] - usage.memory[len(usage.memory) // 2] < 2**20
