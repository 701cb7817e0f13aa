"""The documentation: snippets run as they stand, messages and commands are the real ones."""

import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from comet_meta import CoMetOptimizerWrapper, IndexedDataset

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
IN_COMMANDS = [ROOT / "README.md", *PAGES]


class Model(nn.Module):
    """A linear autoencoder of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.body(batch)

    def losses(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.body(batch) - batch).square().mean(dim=1)

    def scores(self, batch: torch.Tensor) -> torch.Tensor:
        return self.losses(batch).sqrt()


def rows() -> dict:
    """A model, and rows on a line of which the first twentieth lies beside it."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(400, 1, generator=generator) * torch.tensor([1.0, 2.0, -1.0, 0.5])
    data += 0.1 * torch.randn(400, 4, generator=generator)
    data[:20] = 3 * torch.randn(20, 4, generator=generator)
    torch.manual_seed(0)
    return {"train_set": data, "model": Model()}


def found(suspects: torch.Tensor) -> int:
    return len(set(suspects[:20].tolist()) & set(range(20)))


def check_index(names: dict) -> None:
    assert found(names["suspects"]) >= 17


def looked_at() -> dict:
    return rows() | {"is_bad": lambda i: i < 20}


def check_adopt(names: dict) -> None:
    assert len(names["bad"]) == 60
    assert sum(names["bad"]) == 9  # all that were looked at of the first twentieth
    assert found(names["weighter"].ranking()) >= 17
    assert found(names["suspects"]) >= 17
    assert names["losses"].shape == (16,)
    assert torch.isfinite(names["report"].objective)
    assert Path("run.pt").exists()
    assert all(torch.isfinite(p).all() for p in names["model"].parameters())


def pictures() -> dict:
    from PIL import Image

    generator = np.random.default_rng(0)
    Path("pictures").mkdir()
    for i in range(9):
        pixels = generator.integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pictures/{i}.png")
    return {}


def check_curation(names: dict) -> None:
    assert Path("report.html").read_text(encoding="utf-8").count('"heat":') == 9


def ranked() -> dict:
    from comet_meta.vision.keep_list import Row, write

    names = pictures()
    rows = [Row(Path(f"{i}.png"), 2.0 - i / 8, 0.5, 0.9 - i / 10, i + 1, i > 3) for i in range(8)]
    write(Path("pictures_ranked/keep.csv"), [*rows, Row(Path("8.png"), *[None] * 4, False)])
    paths = [Path(f"pictures/{i}.png").absolute() for i in range(8)]
    lines = [
        f"{path},{rank},{'no' if rank < 3 else 'yes'},yes" for rank, path in enumerate(paths, 1)
    ]
    Path("list.csv").write_text("\n".join(["path,rank,keep,reviewed", *lines]))
    return names | {"paths": paths}


def check_rank(names: dict) -> None:
    import json

    assert names["prior"].tolist() == [2.0 - i / 8 for i in range(8)]
    assert names["review"].bad == [True, True] + 6 * [False]
    assert Path("report.html").read_text(encoding="utf-8").count('"heat":') == 9
    content = json.loads(Path("labels.json").read_text())
    assert set(content) == {"classes", "labels"}
    assert set(content["labels"]) == {str(i) for i in range(8)}
    assert content["labels"]["0"] == {
        "label": "drop", "confidence": 0.9, "attributes": {"score": 2.0, "rank": 1}
    }  # fmt: skip
    assert all(label["label"] in content["classes"] for label in content["labels"].values())
    tasks = json.loads(Path("tasks.json").read_text())
    assert [task["data"] for task in tasks] == [
        {"image": f"/data/local-files/?d=pictures/{i}.png"} for i in range(8)
    ]
    interface = re.search(
        r"```xml\n(.*?)```", (ROOT / "docs" / "rank.md").read_text(encoding="utf-8"), re.S
    )
    view = ElementTree.fromstring(interface[1])
    choices = {choice.get("value") for choice in view.iter("Choice")}
    for task in tasks:
        (prediction,) = task["predictions"]
        (result,) = prediction["result"]
        assert 0 <= prediction["score"] <= 1
        control = view.find(f".//Choices[@name='{result['from_name']}']")
        assert control.get("toName") == result["to_name"] == view.find("Image").get("name")
        assert result["type"] == "choices"
        assert set(result["value"]["choices"]) <= choices
    assert view.find("Image").get("value") == "$image"


def wrapped() -> dict:
    names = rows()
    model = names["model"]
    inner = torch.optim.Adam(model.parameters(), lr=1e-2)
    optimizer = CoMetOptimizerWrapper(inner, meta="mldg", model=model)
    loader = DataLoader(IndexedDataset(names["train_set"]), batch_size=20)
    before = model.losses(names["train_set"]).mean().item()
    return names | {"torch": torch, "optimizer": optimizer, "loader": loader, "before": before}


def check_performance(names: dict) -> None:
    assert names["model"].losses(names["train_set"]).mean().item() < names["before"]


# Pages with snippets: what they start from, and what must hold after the last of them.
RUN: dict[str, tuple[Callable[[], dict], Callable[[dict], None]]] = {
    "index.md": (rows, check_index),
    "adopt.md": (looked_at, check_adopt),
    "curation.md": (pictures, check_curation),
    "performance.md": (wrapped, check_performance),
    "rank.md": (ranked, check_rank),
}
# Those that are run elsewhere.
RUN_BY = {
    "extending.md": "examples/test_scripts.py",
    "integrations/lightning.md": "integrations/test_lightning_docs.py",
    "integrations/anomalib.md": "integrations/test_anomalib.py",
    "integrations/distributed.md": "docs_ranks.py",
    "integrations/pyod.md": "integrations/test_pyod.py",
    "integrations/skorch.md": "integrations/test_skorch.py",
    "integrations/transformers.md": "integrations/test_transformers.py",
}


def relative(page: Path) -> str:
    return page.relative_to(ROOT / "docs").as_posix()


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("page", RUN)
def test_snippets_run_word_for_word(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start, check = RUN[page]
    names = start() | {"__name__": "docs"}
    blocks = snippets(ROOT / "docs" / page)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    check(names)


@pytest.mark.parametrize("page", [relative(page) for page in PAGES if snippets(page)])
def test_every_page_with_snippets_is_run_by_a_test(page):
    if page not in RUN:
        assert page in RUN_BY, f"no test runs the snippets of docs/{page}"
        test = (ROOT / "tests" / RUN_BY[page]).read_text(encoding="utf-8")
        assert Path(page).name in test


# --- messages ---------------------------------------------------------------------------------


def literals(source: str) -> list[str]:
    """The strings of a module; what is put into them at run time is a ``…``."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
            texts.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(re.sub(r"%[sdrg]|%\.\d+g", "…", node.value))
    return texts


MESSAGES = re.findall(
    r"^#### `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M
)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    files = [*(ROOT / "comet_meta").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    return [text for file in files for text in literals(file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("message", MESSAGES)
def test_the_messages_are_the_codes_own(message, texts):
    parts = [re.escape(part) for part in message.split("…")]
    # A placeholder may stand for more of them.
    pattern = re.compile(".*…[^;:]*".join(parts) if len(parts) > 1 else parts[0], re.S)
    assert any(pattern.search(text) for text in texts), f"no message of the code is: {message}"


def test_there_are_messages_and_none_twice():
    assert len(MESSAGES) > 40
    assert len(set(MESSAGES)) == len(MESSAGES)


def test_a_message_that_changed_would_be_noticed(texts):
    with pytest.raises(AssertionError, match="no message of the code"):
        test_the_messages_are_the_codes_own("losses has shape …; hoped for (B,)", texts)


# --- commands, links, navigation ----------------------------------------------------------------


@pytest.mark.parametrize("page", IN_COMMANDS, ids=lambda page: page.name)
def test_commands_name_scripts_and_options_that_exist(page):
    from comet_examples import cli

    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for script, arguments in re.findall(
        r"python ((?:examples|benchmarks/\w+|tests/stress)/\w+\.py)([^\n&`]*)", text
    ):
        file = ROOT / script
        assert file.exists(), f"{page.name} names {script}, which isn't there"
        if "cli import main" in file.read_text(encoding="utf-8"):
            named = [] if file.stem == "train" else file.stem.split("_")
            cli._options(*(named or ("simplenet", "mvtec")), shlex.split(arguments))
        else:
            source = file.read_text(encoding="utf-8")
            if "from grid import" in source:  # the options that the tables have in common
                source += (file.with_name("grid.py")).read_text(encoding="utf-8")
            if "from breadth import" in source:
                source += (file.with_name("breadth.py")).read_text(encoding="utf-8")
            for option in re.findall(r"--[\w-]+", arguments):
                assert f'"{option}"' in source, (script, option)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"^ +- .*: ([\w/.-]+\.md)$", text, re.M))
    assert named == {relative(page) for page in PAGES}


def test_the_commands_and_options_of_the_ranking_page_exist():
    from comet_meta import cli

    text = (ROOT / "docs" / "rank.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ *comet-meta ([^\n]+)$", text, re.M)
    assert len(commands) == 3
    for command in commands:
        cli._parser().parse_args(shlex.split(command))
    rank = cli._parser().parse_args(["rank", "pictures"])
    for option in re.findall(r"`--([\w-]+)", text):
        assert option == "copy" or hasattr(rank, option.replace("-", "_")), option
