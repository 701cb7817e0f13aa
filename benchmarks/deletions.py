"""Delete every statement of a module in turn: does a test fail?

    python benchmarks/deletions.py comet_meta/weighting.py tests/test_weighting.py

Deleted are, one at a time, all statements (whole blocks with their condition, and each statement in
them), decorators and keyword arguments; not docstrings, imports, definitions and bare annotations.
The tests run in a copy of the project, up to the first that fails, in a process forked after the
slow imports. What no test notices is printed.
"""

import argparse
import ast
import copy
import importlib
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_ROOT = Path(__file__).parents[1]
_COPIED = ("comet_meta", "tests", "examples", "benchmarks", "pyproject.toml", "README.md", "docs")
_PROFILE = "--hypothesis-profile=mutants"
_SLOW_IMPORTS = ("hypothesis", "scipy.optimize", "scipy.stats", "sklearn.metrics")
_KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Pass)


def deletions(source: str) -> Iterator[tuple[int, str, str]]:
    """All ways to delete a part of a module.

    Args:
        source: Of the module.

    Yields:
        Line number and first line of the part, and the source without it.
    """
    tree = ast.parse(source)
    for number, node in enumerate(ast.walk(tree)):
        for field, parts in ast.iter_fields(node):
            if not isinstance(parts, list):
                continue
            for position, part in enumerate(parts):
                if not _deletable(part, field):
                    continue
                changed = copy.deepcopy(tree)
                twin = next(n for k, n in enumerate(ast.walk(changed)) if k == number)
                remaining = getattr(twin, field)
                del remaining[position]
                if not remaining and field in ("body", "finalbody"):
                    remaining.append(ast.Pass())
                shown = ast.unparse(part).splitlines()[0]
                yield part.lineno, shown, ast.unparse(ast.fix_missing_locations(changed))


def _deletable(part: object, field: str) -> bool:
    if field in ("decorator_list", "keywords"):
        return True
    if not isinstance(part, ast.stmt) or isinstance(part, _KEPT):
        return False
    if isinstance(part, ast.AnnAssign):
        return part.value is not None
    return not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))


def passes(folder: Path, tests: list[str], limit: int) -> bool:
    """Whether all tests pass, in a process of their own; one that doesn't end fails.

    Args:
        folder: Copy of the project.
        tests: Arguments for pytest.
        limit: Seconds of processor time.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            sys.path[:0] = [str(folder), str(folder / "examples"), str(folder / "benchmarks")]
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", _PROFILE, *tests]))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main(module: Path, tests: list[str], lines: range) -> tuple[int, list[tuple[int, str]]]:
    """Try all deletions.

    Args:
        module: Path from the project's folder.
        tests: Arguments for pytest.
        lines: Where to delete.

    Returns:
        How many deletions were tried, and those that no test noticed.

    Raises:
        SystemExit: If the tests fail without a deletion.
    """
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    for name in _SLOW_IMPORTS:
        importlib.import_module(name)
    source = (_ROOT / module).read_text()
    unnoticed, tried = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in _COPIED:
            if (_ROOT / part).is_dir():
                shutil.copytree(
                    _ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy(_ROOT / part, folder / part)
        if not passes(folder, tests, 600):
            raise SystemExit("the tests fail as it is")
        limit = 10 + 5 * round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime)
        for line, shown, changed in deletions(source):
            if line not in lines:
                continue
            tried += 1
            print(f"\r{tried}: line {line}  ", end="", file=sys.stderr, flush=True)
            (folder / module).write_text(changed)
            if passes(folder, tests, limit):
                unnoticed.append((line, shown))
                print(f"line {line}: {shown}", flush=True)
    return tried, unnoticed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", type=Path, help="path from the project's folder")
    parser.add_argument("tests", nargs="+", help="files, or other arguments for pytest")
    parser.add_argument("--lines", type=int, nargs=2, default=(1, 10**6), help="first and last")
    options = parser.parse_args()
    first, last = options.lines
    tried, unnoticed = main(options.module, options.tests, range(first, last + 1))
    print(f"{tried} deletions, {len(unnoticed)} unnoticed")
