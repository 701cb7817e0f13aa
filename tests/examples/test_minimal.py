"""examples/minimal.py, word for word, with the core's dependencies alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "minimal.py"
# A module that is None in sys.modules can't be imported.
CORE_ALONE = """
import runpy, sys
sys.modules.update(dict.fromkeys({extras}))
runpy.run_path({script!r}, run_name="__main__")
"""
EXTRAS = {
    *("PIL", "timm", "torchvision", "matplotlib", "tqdm", "safetensors", "sklearn"),
    *("scipy", "pandas", "lightning", "anomalib", "pyod", "skorch", "transformers", "accelerate"),
}


@pytest.mark.slow
def test_minimal_example_runs_word_for_word_with_the_core_alone(tmp_path):
    code = CORE_ALONE.format(extras=EXTRAS, script=str(SCRIPT))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    plain, robust, found = re.findall(r": +([\d.]+)$", done.stdout, re.MULTILINE)
    assert float(robust) > 0.95 > float(plain) + 0.1
    assert int(found) > 70


def test_minimal_example_fits_on_a_screen():
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) <= 55
    assert max(map(len, lines)) <= 100
