"""``comet-meta rank``: what it finds, what it says, and that it goes on where it was stopped."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rank_runs import FAST, rows, run

from comet_meta import MemoryScorer, cli
from comet_meta.vision import keep_list, patch_grids, rank
from comet_meta.vision.backbones import load_backbone
from comet_meta.vision.features import PatchFeatures
from comet_meta.vision.images import Transform, load_image, load_values
from comet_meta.vision.patch_grids import PatchGrids
from comet_meta.vision.picture_prior import (
    grid_side,
    memory_part_prior,
    memory_prior,
    streamed_part_prior,
)

pytestmark = pytest.mark.usefixtures("small_files")


@pytest.fixture
def folder(tmp_path) -> Path:
    """30 grey pictures in two folders; 003 and 017 have a bright block."""
    generator = np.random.default_rng(0)
    for i in range(30):
        pixels = generator.integers(90, 120, (64, 48), dtype=np.uint8)
        if i in (3, 17):
            pixels[16:40, 8:32] = 250
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "pictures"


# --- what it finds ----------------------------------------------------------------------------


def test_the_strange_pictures_come_first(folder, capsys):
    assert run(folder) == 0
    found = rows(folder)
    assert tuple(found[0]) == keep_list.COLUMNS
    assert {row["path"] for row in found[:2]} == {"b/003.png", "b/017.png"}
    dropped = [row for row in found if row["keep"] == "no"]
    assert dropped == [row for row in found if float(row["p_bad"]) > 0.5]
    assert dropped == []  # thirty pictures prove nothing
    assert [int(row["rank"]) for row in found] == list(range(1, 31))
    scores = [float(row["score"]) for row in found]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= float(row[name]) <= 1 for row in found for name in ("weight", "p_bad"))
    page = (folder.parent / "out" / "report.html").read_text(encoding="utf-8")
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    content = json.loads(data[1])
    assert [Path(p["path"]).name for p in content["pictures"]] == [
        Path(row["path"]).name for row in found
    ]
    shown = content["pictures"][0]["score"]  # six digits
    assert shown == pytest.approx(float(found[0]["score"]), rel=1e-5)
    assert content["threshold"] is not None
    assert content["verdict"] in capsys.readouterr().out
    assert not any(picture["heat"] for picture in content["pictures"])


def test_the_scores_are_those_of_the_prior(folder):
    extractor = PatchFeatures(load_backbone("resnet10t", "random"))
    transform = Transform((64, 64), keep_aspect=True)
    ranking = rank.rank_folder(
        folder, rank.RankSettings("resnet10t", "random", size=(64, 64), batch_size=7)
    )
    images = torch.stack([load_image(path, transform) for path in ranking.paths])
    expected = memory_prior([extractor.eval()(images)], len(images))
    torch.testing.assert_close(ranking.weighter.prior, expected, rtol=1e-4, atol=1e-4)
    left_out = float((1 - ranking.weighter()).mean())
    assert left_out == pytest.approx(ranking.weighter.contamination_.low + 0.1, abs=1e-4)


def test_pictures_are_ranked_in_their_own_shape(folder):
    found = rank.rank_folder(folder, rank.RankSettings("resnet10t", "random"))
    assert found.transform == Transform((288, 224), keep_aspect=True)  # of 64 x 48 pixels


def test_the_same_command_gives_the_same_list(folder):
    out = folder.parent / "out"
    assert run(folder) == 0
    first = (out / "keep.csv").read_bytes()
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]))
    assert run(folder) == 0
    assert (out / "keep.csv").read_bytes() == first
    assert run(folder, "--seed", "1") == 0
    assert (out / "keep.csv").read_bytes() != first


def test_names_and_order_of_the_files_are_of_no_matter(folder):
    """The same pictures under other names, in other folders: each has the score it had."""
    assert run(folder) == 0
    before = {row["path"]: float(row["score"]) for row in rows(folder)}
    moved = {}
    for i, path in enumerate(sorted(before, key=lambda path: Path(path).stem[::-1])):
        moved[path] = f"{'xyz'[i % 3]}/{i * 7 % 30:02d}.png"
        target = folder / moved[path]
        target.parent.mkdir(exist_ok=True)
        (folder / path).rename(target)
    assert run(folder) == 0
    after = {row["path"]: float(row["score"]) for row in rows(folder)}
    assert after == pytest.approx({moved[path]: score for path, score in before.items()}, rel=1e-4)


def test_a_known_share_is_dropped(folder):
    assert run(folder, "--contamination", "0.2") == 0
    found = rows(folder)
    assert [row["keep"] for row in found] == ["no"] * 6 + ["yes"] * 24


def test_pictures_of_a_12_bit_camera_rank_as_in_8_bits(folder, caplog):
    """They are scaled by the range that the folder uses, and neither ranked nor shown in black."""

    def mean_scores():  # features that differ a little lie in other random memories
        found = []
        for seed in range(4):
            assert run(folder, "--seed", str(seed)) == 0
            found.append({row["path"]: float(row["score"]) for row in rows(folder)})
        return {path: np.mean([scores[path] for scores in found]) for path in found[0]}

    before = mean_scores()
    for path in folder.rglob("*.png"):
        deep = np.asarray(Image.open(path)).astype(np.uint16) * 16 + 8
        Image.fromarray(deep).save(path)
    with caplog.at_level("INFO"):
        after = mean_scores()
    assert "30 of 30 pictures have more than 8 bits; 0 to 4095 becomes black to white" in (
        caplog.text
    )
    assert after == pytest.approx(before, rel=0.1)
    page = (folder.parent / "out" / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    thumbnail = Image.open(io.BytesIO(base64.b64decode(data["pictures"][-1]["image"])))
    assert 80 < np.asarray(thumbnail).mean() < 130


def test_large_pictures_are_allowed_by_an_option(folder, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert run(folder) == 2
    assert "--max-megapixels" in capsys.readouterr().err
    assert run(folder, "--max-megapixels", "1") == 0
    assert Image.MAX_IMAGE_PIXELS == 1000


# --- stopped and started again ----------------------------------------------------------------


def test_an_interrupted_run_goes_on(folder, loads, monkeypatch, capsys):
    assert run(folder) == 0
    whole = (folder.parent / "out" / "keep.csv").read_bytes()
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]))
    compute, calls = PatchGrids._patches, []

    def stopped(self, paths, workers, progress):
        calls.append(len(paths))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(self, paths, workers, progress)

    with monkeypatch.context() as patch:
        patch.setattr(PatchGrids, "_patches", stopped)
        assert run(folder) == 130
    assert "goes on from there" in capsys.readouterr().err
    loads.clear()
    assert run(folder) == 0
    assert len(loads) == 30 - 16
    assert (folder.parent / "out" / "keep.csv").read_bytes() == whole
    loads.clear()
    assert run(folder) == 0
    assert loads == []


def test_only_what_changed_is_computed_again(folder, loads):
    assert run(folder) == 0
    changed = folder / "b" / "017.png"
    Image.new("L", (48, 64), 10).save(changed)
    loads.clear()
    assert run(folder) == 0
    assert len(loads) == 8
    assert changed in loads


def test_a_damaged_file_of_features_is_computed_again(folder, loads):
    assert run(folder) == 0
    first = rows(folder)
    file = next(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npy"))
    file.write_bytes(file.read_bytes()[:-10])
    loads.clear()
    assert run(folder) == 0
    assert 6 <= len(loads) <= 8
    assert rows(folder) == first


@pytest.mark.slow
def test_a_killed_run_goes_on(folder, loads):
    for i in range(400):  # enough to be killed on the way
        shutil.copy(folder / "a" / "000.png", folder / f"copy{i:03d}.png")
    command = (
        "import comet_meta.vision.patch_grids as p; p._PICTURES = 8; from comet_meta import cli"
    )
    arguments = ["rank", str(folder), "--out", str(folder.parent / "out"), *FAST]
    process = subprocess.Popen([sys.executable, "-c", f"{command}; cli.main({arguments!r})"])
    cache = Path(os.environ["XDG_CACHE_HOME"])
    end = time.monotonic() + 120
    while len(list(cache.rglob("*.npy"))) < 4:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(cache.rglob("*.npy")))
    assert 4 <= done < 54
    assert run(folder) == 0
    assert len(loads) == 430 - 8 * done
    assert not list(cache.rglob("*.partial"))


# --- what it says -----------------------------------------------------------------------------


def test_all_broken_pictures_are_named(folder, capsys):
    (folder / "a" / "000.png").write_bytes(b"no picture")
    cut = folder / "b" / "029.png"
    cut.write_bytes(cut.read_bytes()[:200])
    assert run(folder) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in ("000.png", "029.png", "2 of the 30", "--keep-going"))
    assert not (folder.parent / "out").exists()
    assert run(folder, "--keep-going") == 1
    message = capsys.readouterr().err
    assert all(name in message for name in ("000.png", "029.png"))
    found = rows(folder)
    assert len(found) == 30
    assert {row["path"] for row in found[28:]} == {"a/000.png", "b/029.png"}
    assert all((row["keep"], row["score"], row["rank"]) == ("no", "", "") for row in found[28:])
    assert {row["path"] for row in found[:2]} == {"b/003.png", "b/017.png"}


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda f: shutil.rmtree(f), (), "there's no folder"),
        (lambda f: (shutil.rmtree(f), f.write_text("")), (), "is a file; give the folder"),
        (lambda f: (shutil.rmtree(f), f.symlink_to(f)), (), "there's no folder"),
        (lambda f: [p.unlink() for p in f.rglob("*.png")], (), "holds no picture"),
        (lambda f: [p.unlink() for p in sorted(f.rglob("*.png"))[1:]], (), "holds one picture"),
        (
            lambda f: [p.write_text("x") for p in f.rglob("*.png")],
            ("--keep-going",),
            "30 of the 30",
        ),
        (lambda f: None, ("--weights", "missing.pth"), "there's no weights file missing.pth"),
        (lambda f: None, ("--weights", "https://x.org/a.pth"), "#sha256="),
        (lambda f: None, ("--backbone", "resnet10x"), "timm has no model 'resnet10x'"),
        (lambda f: None, ("--resize", "1", "2", "3"), "--resize takes one number or two"),
        (lambda f: None, ("--out", "{folder}/a/000.png"), "is a file; give a folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_sentence_for_what_cannot_work(folder, make, options, words, capsys):
    make(folder)
    assert run(folder, *(option.format(folder=folder) for option in options)) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("error: ") == 1
    assert "Traceback" not in message
    assert "fault" not in message


def test_no_weights_to_be_had(folder, monkeypatch, capsys):
    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no network")
        return create(name, **options)

    from comet_meta.vision import backbones

    create = backbones.timm.create_model
    monkeypatch.setattr(backbones.timm, "create_model", offline)
    options = ["--backbone", "resnet18", "--device", "cpu"]
    assert cli.main(["rank", str(folder), *options]) == 2
    message = capsys.readouterr().err
    assert "can't download the pretrained weights of resnet18 (no network)" in message
    assert "--weights" in message


@pytest.mark.parametrize(
    "options",
    [
        ("--device", "cuda:99"),
        ("--contamination", "0.5"),
        ("--contamination", "ten"),
        ("--batch-size", "0"),
        ("--resize", "0"),
        ("--seed", str(2**70)),
    ],
)
def test_wrong_arguments(folder, options, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(folder, *options)
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_the_ranking_of_another_folder_is_not_overwritten(folder, capsys):
    assert run(folder) == 0
    other = shutil.copytree(folder, folder.parent / "others")
    before = rows(folder)
    assert run(other) == 2
    message = capsys.readouterr().err
    assert f"holds the ranking of {folder.resolve()}, which would be overwritten" in message
    assert rows(folder) == before
    assert run(folder, "--seed", "1") == 0


def test_results_beside_the_pictures_hide_none_of_them(folder):
    """A folder that held something before isn't marked as results, which no run reads."""
    inner = folder / "a"
    options = ["--out", str(inner), *FAST]
    assert cli.main(["rank", str(inner), *options]) == 0
    assert run(folder) == 0
    assert len(rows(folder)) == 30
    assert cli.main(["rank", str(inner), "--out", str(folder / "fresh"), *FAST]) == 0
    (folder / "fresh" / "x.png").write_bytes((inner / "000.png").read_bytes())
    assert run(folder) == 0
    assert len(rows(folder)) == 30


@pytest.mark.parametrize("home", [None, "file"])
def test_no_folder_for_the_cache(folder, monkeypatch, capsys, home):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    if home is None:  # a user without a home, as in containers
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", nobody)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "a" / "000.png"))
    assert run(folder) == 2
    message = capsys.readouterr().err
    assert "there's no folder for the cache" in message
    assert "set XDG_CACHE_HOME" in message
    assert "fault" not in message


def test_a_fault_is_written_down(folder, monkeypatch, capsys):
    def broken(*_):
        raise AttributeError("something nobody thought of")

    monkeypatch.setattr(rank, "streamed_part_prior", broken)
    assert run(folder) == 2
    message = capsys.readouterr().err
    assert "something nobody thought of" in message
    assert "Traceback" not in message
    file = Path(re.search(r"with the file (\S+),", message)[1])
    assert "in broken" in file.read_text()
    file.unlink()


def test_a_decoder_that_fails_in_an_unknown_way_names_the_picture(folder, monkeypatch, capsys):
    def load(path, transform):
        if path.name == "005.png":
            raise KeyError("marker")
        return load_values(path, transform)

    monkeypatch.setattr(patch_grids, "load_values", load)
    assert run(folder) == 2
    assert "005.png: KeyError: 'marker'" in capsys.readouterr().err


def test_features_that_are_not_finite_are_most_suspect(folder, monkeypatch):
    features = PatchGrids._features

    def overflowing(self, images):
        found = features(self, images)
        found[images.flatten(1).float().max(dim=1).values > 200, 0, 0, 0] = torch.inf
        return found

    monkeypatch.setattr(PatchGrids, "_features", overflowing)
    assert run(folder) == 0
    found = {row["path"]: row["score"] for row in rows(folder)}
    assert found["b/003.png"] == found["b/017.png"] == max(found.values(), key=float)


# --- parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 3), (9, 6), (20, 20)])
def test_the_streamed_prior_is_the_prior(tmp_path, grid):
    patches = torch.randn(40, 5, *grid, generator=torch.Generator().manual_seed(0)) * 7 + 3
    patches[9, 2, 1, 1] = torch.nan
    whole = torch.arange(40) != 9
    streamed = streamed_part_prior(lambda: iter(patches.split(7)), tmp_path)
    for found, expected in zip(streamed, memory_part_prior([[patches[whole]]], 40), strict=True):
        assert found[9].isnan().all()
        torch.testing.assert_close(found[whole], expected, rtol=1e-5, atol=1e-5)
    assert list(tmp_path.iterdir()) == []


def test_a_memory_reads_no_more_patches_than_it_keeps():
    class Counting(torch.Tensor):
        largest = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            result = super().__torch_function__(function, types, args, kwargs or {})
            if function is torch.Tensor.__getitem__:
                cls.largest = max(cls.largest, result.numel())
            return result

    features = torch.randn(400, 10, 3).as_subclass(Counting)
    scorer = MemoryScorer(max_patches=50)
    memory = scorer._memory(features, torch.arange(300), torch.Generator().manual_seed(0))
    assert memory.shape == (50, 3)
    assert Counting.largest == 150


def test_a_grid_for_many_pictures_is_coarse():
    assert grid_side(50_000) == grid_side(10**9) == 6
