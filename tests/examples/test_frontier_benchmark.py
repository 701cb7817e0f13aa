"""The frontier: its points leave out what they say, and its figures are right by hand."""

import sys

import pytest
import torch

import breadth
import frontier
from comet_meta import SoftConfidentWeighter
from comet_meta.vision.picture_prior import HOLD_OUT
from left_out import LeftOut, RejectedAlone, names
from runs import Runs

SCORES = torch.randn(400, generator=torch.Generator().manual_seed(0))
PART_SCORES = torch.randn(400, 3, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", names())
def test_a_point_leaves_out_its_fraction(name):
    weighter = LeftOut(name, SCORES, PART_SCORES)
    kind, _, number = name.partition("-")
    fraction = float(number)
    kept = (1 - fraction / 2) ** 2 if kind == "both" else 1 - fraction
    assert float(weighter.mean_weights().mean()) == pytest.approx(kept, abs=0.005)
    assert weighter.has_parts == (kind != "samples")


def test_the_defaults_are_points():
    samples = LeftOut("samples-0.05", SCORES, None)
    assert torch.equal(samples.weights, SoftConfidentWeighter(prior=SCORES).weights)
    with pytest.raises(ValueError, match="no parts"):
        samples.part_weights()
    parts = LeftOut("parts-0.05", SCORES, PART_SCORES)
    default = SoftConfidentWeighter(prior=SCORES, part_prior=PART_SCORES)
    assert torch.equal(parts.weights, default.weights)
    assert torch.equal(parts.part_weights(), default.part_weights())
    assert torch.equal(parts.part_weights([3, 5]), default.part_weights([3, 5]))
    assert torch.equal(parts.mean_weights(), default.mean_weights())
    with pytest.raises(ValueError, match="losses by part"):
        LeftOut("both-0.05", SCORES, None)


def test_rejected_alone_leaves_out_nothing_besides_and_stays_so():
    default = SoftConfidentWeighter(prior=SCORES, hold_out=0.2)
    alone = RejectedAlone(prior=SCORES, hold_out=0.2)
    assert torch.equal(alone(), default())
    scores = torch.rand(400, generator=torch.Generator().manual_seed(2))
    rejected = SCORES.topk(40).indices
    scores[rejected] += 10
    for _ in range(2):
        alone.fit(scores)
        default.fit(scores)
        assert (alone() == 0).nonzero().flatten().tolist() == rejected.sort().values.tolist()
        assert float(alone().sum()) == 360
        # Half of the suspects is rejected: 20 more.
        assert float(default().sum()) == pytest.approx(340, abs=1e-3)


def result(name, contaminated, method, auroc, seed=0):
    return frontier.Result("panel", name, contaminated, method, seed, auroc)


def test_a_point_by_hand():
    results = [
        *(result("a", False, "plain", 0.9), result("a", False, "parts-0.1", 0.88)),
        *(result("b", False, "plain", 0.8), result("b", False, "parts-0.1", 0.81)),
        *(result("a", True, "plain", 0.6), result("a", True, "parts-0.1", 0.7)),
        *(result("b", True, "plain", 0.5), result("b", True, "parts-0.1", 0.5)),
        *(result("a", True, "oracle", 0.8), result("b", True, "oracle", 0.7)),
        # a seed without all runs doesn't count
        *(result("a", False, "plain", 0.1, 1), result("a", True, "parts-0.1", 0.1, 1)),
    ]
    at = frontier.point(results, "parts-0.1")
    assert at.sets == 2
    assert at.cost == pytest.approx(0.5)
    assert (at.worst, at.worst_set) == (pytest.approx(2.0), "a")
    assert at.gap == pytest.approx(0.25)
    assert at.halves == (pytest.approx(0.5), pytest.approx(0.0))
    assert frontier.point(results, "samples-0.1") is None


def test_the_default_of_every_detector_is_a_point_of_the_frontier():
    for detector in breadth.DETECTORS:
        assert frontier.default_of(f"tables, {detector}") in names()
    assert frontier.default_of("tables, another") is None
    assert frontier.default_of("pictures with 10 % bad, any") == f"held out-{HOLD_OUT}"


def test_page_and_picture_from_finished_runs(tmp_path, monkeypatch, capsys):
    tables, pictures = Runs(tmp_path / "tables.jsonl"), Runs(tmp_path / "pictures.jsonl")
    values = {"plain": (0.9, 0.6), "comet": (0.88, 0.7), "oracle": (0.9, 0.8)}
    for method, (clean, bad) in values.items():
        common = {"detector": "svdd", "set": "a", "seed": 0, "method": method}
        tables.add(common | {"condition": "clean"}, {"AUROC": clean})
        tables.add(common | {"condition": "as-is"}, {"AUROC": bad})
        tables.add(common | {"condition": "0.1"}, {"AUROC": 0.0})
        common = {"detector": "fastflow", "task": "b", "seed": 0, "method": method}
        pictures.add(common | {"noise": 0.0}, {"I-AUROC": clean})
        pictures.add(common | {"noise": 0.1}, {"I-AUROC": bad})
        pictures.add(common | {"noise": 0.2}, {"I-AUROC": bad - 0.1})
        pictures.add(common | {"noise": 0.4}, {"I-AUROC": 0.0})
    page, picture = tmp_path / "pages" / "frontier.md", tmp_path / "frontier.png"
    command = ["frontier", "--tables", str(tables.file), "--pictures", str(pictures.file)]
    monkeypatch.setattr(sys, "argv", [*command, "--page", str(page), "--picture", str(picture)])
    frontier.main()
    printed = capsys.readouterr().out
    for panel in (
        "tables, svdd",
        "pictures with 10 % bad, fastflow",
        "pictures with 20 % bad, fastflow",
    ):
        assert f"## {panel}" in printed
    lines = [line.split("|") for line in printed.splitlines() if "+2.0" in line]
    found = {tuple(cell.strip() for cell in line[1:7]) for line in lines}
    assert found == {
        ("samples, 0.05", "1", "1", "+2.00", "+2.0 a", "0.50"),
        ("held out, 0.2", "1", "1", "+2.00", "+2.0 b", "0.50"),
    }
    assert "![Gain against cost](../frontier.png)" in page.read_text()
    assert picture.stat().st_size > 1000
    monkeypatch.setattr(
        sys, "argv", ["frontier", "--tables", str(tmp_path / "none.jsonl"), *command[3:]]
    )
    pictures.file.unlink()
    with pytest.raises(SystemExit):
        frontier.main()
