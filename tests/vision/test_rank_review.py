"""``comet-meta rank --review``: a ranking that learns from what a person saw."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rank_runs import rows, run

from comet_meta import SoftConfidentWeighter, report
from comet_meta.vision import rank
from comet_meta.weights.review import ranks_to_review

pytestmark = pytest.mark.usefixtures("small_files")


@pytest.fixture
def two_kinds(tmp_path) -> Path:
    """100 grey pictures: the bad_ have a block at the top, and as many good ones at the bottom."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(100):
        pixels = generator.integers(90, 120, (64, 64), dtype=np.uint8)
        name = f"{i:03d}.png"
        if i % 4 == 0:
            top = 4 if i % 8 == 0 else 40
            pixels[top : top + 20, 8:56] = 250 if i % 8 == 0 else 0
            name = f"bad_{name}" if i % 8 == 0 else name
        Image.fromarray(pixels).save(folder / name)
    return folder


def reviewed(folder: Path, looks: int) -> tuple[Path, set[str]]:
    """A list as the report exports it after a look at some, and who was looked at."""
    found = rows(folder)
    chosen = {r for ranks in ranks_to_review(len(found), looks) for r in ranks}
    file, seen = folder.parent / "list.csv", {found[rank]["path"] for rank in chosen}
    lines = [
        f"{folder / row['path']},{row['score']},{row['rank']},"
        f"{'no' if row['path'] in seen and row['path'].startswith('bad') else 'yes'},"
        f"{'yes' if row['path'] in seen else 'no'}"
        for row in found
    ]
    file.write_text("\n".join(["path,score,rank,keep,reviewed", *lines]))
    return file, seen


def test_the_ranking_learns_from_what_a_person_saw(two_kinds, loads, capsys):
    assert run(two_kinds) == 0
    assert "rank again with --review" in capsys.readouterr().out
    file, seen = reviewed(two_kinds, looks=40)
    bad = {row["path"] for row in rows(two_kinds) if row["path"].startswith("bad")}
    unseen = bad - seen
    assert len(bad) == 13
    assert len(unseen) >= 3

    def found() -> int:
        """How many of the unseen bad ones come first among those that nobody saw."""
        order = [row["path"] for row in rows(two_kinds) if row["path"] not in seen]
        return len(unseen & set(order[: len(unseen)]))

    before = found()
    del loads[:]
    assert run(two_kinds, "--review", str(file)) == 0
    assert loads == []  # the features are there
    assert found() == len(unseen) > before
    keeps = {row["path"]: row for row in rows(two_kinds)}
    assert {path for path in seen if keeps[path]["keep"] == "no"} == bad & seen
    assert {float(keeps[path]["weight"]) for path in seen - bad} == {1.0}
    said = capsys.readouterr().out
    assert f"Of {len(seen)} pictures that were looked at, {len(bad & seen)} are bad" in said
    assert "--review" not in said


def test_scores_and_review_of_a_ranking_make_a_weighter(two_kinds):
    assert run(two_kinds) == 0
    file, seen = reviewed(two_kinds, looks=40)
    assert run(two_kinds, "--review", str(file)) == 0
    paths = sorted(two_kinds.iterdir(), key=lambda path: path.name[::-1])
    prior = report.read_prior(two_kinds.parent / "out" / "keep.csv", paths, two_kinds)
    settings = rank.RankSettings("resnet10t", "random", size=(64, 64), device="cpu", review=file)
    ranking = rank.rank_folder(two_kinds, settings)
    place = {path: i for i, path in enumerate(ranking.paths)}
    assert torch.equal(prior, ranking.weighter.prior[[place[path] for path in paths]])
    weighter = SoftConfidentWeighter(prior=prior, review=report.read_review(file, paths))
    for path, weight, p_bad in zip(paths, weighter.weights, weighter.p_bad, strict=True):
        if path.name in seen:
            is_bad = path.name.startswith("bad")
            assert (float(weight), float(p_bad)) == (1 - is_bad, is_bad)
    assert weighter.contamination_ == ranking.weighter.contamination_


def test_a_review_of_no_use_is_told_before_the_work(two_kinds, loads, capsys):
    (two_kinds.parent / "list.csv").write_text("path,rank,keep,reviewed\nelsewhere.png,1,yes,yes\n")
    for name, words in (("list.csv", "is none of the 100 pictures"), ("no.csv", "there's no list")):
        assert run(two_kinds, "--review", str(two_kinds.parent / name)) == 2
        assert words in capsys.readouterr().err
    assert loads == []
