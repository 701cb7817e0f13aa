"""Delete every statement of a module in turn: does a test fail?

    python benchmarks/deletions.py comet_meta/weights/rules.py tests/test_weighting.py

Deleted are, one at a time, all statements (whole blocks with their condition, and each statement in
them), decorators and keyword arguments; not docstrings, imports, definitions and bare annotations.
Tests are collected once; each deletion gets a fork, in which they run up to the first that fails.
What no test notices is printed.
"""

import argparse
import ast
import copy
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch

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


class Trial:
    """A plugin of pytest that runs the collected tests once for each deletion.

    Args:
        module: Where to delete.
        lines: Which of its lines.

    Attributes:
        tried: How many deletions there were.
        unnoticed: Line and content of those that no test noticed.
    """

    def __init__(self, module: Path, lines: range) -> None:
        self.module = module
        self.lines = lines
        self.tried = 0
        self.unnoticed: list[tuple[int, str]] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Take the place of pytest's own loop.

        Raises:
            SystemExit: If the tests fail without a deletion.
        """
        source = self.module.read_text()
        if not self._passes(session, source, 600):
            raise SystemExit("the tests fail as it is")
        limit = 10 + 5 * round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime)
        for line, shown, changed in deletions(source):
            if line not in self.lines:
                continue
            self.tried += 1
            print(f"\r{self.tried}: line {line}  ", end="", file=sys.stderr, flush=True)
            if self._passes(session, changed, limit):
                self.unnoticed.append((line, shown))
                print(f"line {line}: {shown}", flush=True)
        return True

    def _passes(self, session: pytest.Session, source: str, limit: int) -> bool:
        """Whether all tests pass in a fork, within as many seconds of processor time."""
        child = os.fork()
        if child > 0:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            replace(self.module, source)
            for item, following in zip(session.items, [*session.items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.testsfailed:
                    break
            status = int(session.testsfailed > 0)
        finally:
            os._exit(status)


def replace(file: Path, source: str) -> None:
    """Have an imported module, and all that imported from it, use another source.

    Args:
        file: Of the module.
        source: The other source.
    """
    module = next(
        m for m in sys.modules.values() if getattr(m, "__file__", None) == str(file.resolve())
    )
    names = vars(module)
    old = {name: value for name, value in names.items() if not name.startswith("__")}
    for name in old:
        del names[name]
    with tempfile.NamedTemporaryFile("w", suffix=".py") as changed:
        changed.write(source)
        changed.flush()
        SourceFileLoader(module.__name__, changed.name).exec_module(module)
    new = {
        id(value): names.get(name)
        for name, value in old.items()
        if getattr(value, "__module__", None) == module.__name__
    }
    for other in list(sys.modules.values()):
        for name, value in list(vars(other).items()):
            if other is not module and id(value) in new:
                setattr(other, name, new[id(value)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", type=Path, help="path of the module")
    parser.add_argument("tests", nargs="+", help="files, or other arguments for pytest")
    parser.add_argument("--lines", type=int, nargs=2, default=(1, 10**6), help="first and last")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    trial = Trial(options.module, range(options.lines[0], options.lines[1] + 1))
    pytest.main(
        ["-qs", "-p", "no:cacheprovider", "--hypothesis-profile=mutants", *options.tests], [trial]
    )
    print(f"{trial.tried} deletions, {len(trial.unnoticed)} unnoticed")
