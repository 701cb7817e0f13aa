"""The core knows nothing of the integrations; a missing package says how to get it."""

import subprocess
import sys

import pytest

EXTRAS = {"lightning": "lightning", "anomalib": "anomalib"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_core_imports_no_integration():
    packages = ("lightning", "pytorch_lightning", "anomalib", "accelerate", "timm", "torchvision")
    code = f"import sys, comet_meta; print([p for p in {packages} if p in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize("module", EXTRAS)
def test_a_missing_package_names_its_extra(module):
    code = (
        "import sys\n"
        f"sys.modules[{module!r}] = None\n"  # as if it weren't installed
        "try:\n"
        f"    import comet_meta.integrations.{module}\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert f'pip install "comet-meta[{EXTRAS[module]}]"' in python(code)
