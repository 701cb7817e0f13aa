"""The README: its snippet runs as it stands there, and it stays one screen long."""

import re
from pathlib import Path

import pytest

import snippets

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```|^\|.*?$|^!\[.*?$", "", README, flags=re.DOTALL | re.MULTILINE)


def test_the_snippet_runs_when_pasted_and_finds_the_bad_rows(capsys):
    names: dict = {}
    snippets.run("README.md", "adoption", names)
    assert int((names["suspects"] >= 900).sum()) >= 70
    weights, p_bad = names["weighter"](), names["weighter"].p_bad
    assert weights[900:].mean() < 0.4 < 0.8 < weights[:900].mean()
    assert p_bad[900:].mean() > 0.5 > 0.06 > p_bad[:900].mean()
    assert "of the 100 suspects are bad" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        'pip install -e ".[examples]" && python examples/simplenet_mvtec.py',
        'pip install -e ".[dev]" && pytest',
        "comet-meta rank pictures/",
    ],
)
def test_the_commands_stand_in_the_readme(command):
    assert command in README.splitlines()


def test_the_readme_is_a_front_door():
    assert len(README.splitlines()) <= 160
    tables = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    assert len(tables) <= 1
    for table in tables:
        rows = table.strip().splitlines()
        assert len(rows) - 2 <= 6
        assert rows[0].count("|") - 1 <= 5


def test_no_sentence_holds_more_than_two_figures():
    for sentence in re.split(r"(?<=[.:;!?])\s+|\n\n", PROSE):
        assert len(re.findall(r"(?<![\w.])[-+]?\d*\.?\d+ ?%?", sentence)) <= 2, sentence
