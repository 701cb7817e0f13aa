"""Nothing in the source runs what it reads."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    file
    for folder in ("comet_meta", "examples", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
)
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_ATTRIBUTES = {
    *("os.system", "os.popen", "os.execv", "os.spawnv", "subprocess.getoutput"),
    *("tempfile.mktemp", "yaml.load", "torch.hub.load", "ssl._create_unverified_context"),
    *("zipfile.ZipFile.extractall", "shutil.unpack_archive", "tarfile.open"),
}


def calls(file: Path) -> Iterator[tuple[int, str, ast.Call]]:
    """All calls of a file: line, name as written, node."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> object:
    """A literal keyword argument's value."""
    for argument in call.keywords:
        if argument.arg == name and isinstance(argument.value, ast.Constant):
            return argument.value.value
    return None


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_pickle_eval_or_shell(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES
    for line, name, call in calls(file):
        where = f"line {line}: {name}"
        assert name not in FORBIDDEN_CALLS | FORBIDDEN_ATTRIBUTES, where
        assert not name.endswith((".extractall", ".extract")), where
        assert keyword(call, "shell") is not True, where
        if name == "torch.load":
            assert keyword(call, "weights_only") is True, where
        if name in ("np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") is not True, where
        if name.startswith("subprocess."):
            assert isinstance(call.args[0], ast.List | ast.Name), where


def test_the_search_finds_what_it_looks_for(tmp_path):
    for line in (
        "import pickle",
        "from dill import loads",
        "torch.load('x.pt')",
        "torch.load('x.pt', weights_only=False)",
        "eval('1')",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "np.load('x.npy', allow_pickle=True)",
        "archive.extractall('here')",
    ):
        file = tmp_path / "x.py"
        file.write_text(line)
        with pytest.raises(AssertionError):
            test_no_pickle_eval_or_shell(file)
