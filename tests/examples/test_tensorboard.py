"""Logs for TensorBoard: there when asked for, and only then."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from comet_examples import cli

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from comet_examples.tensorboard import TensorBoardLog


def read(folder: Path) -> EventAccumulator:
    log = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return log.Reload()


def run(root: Path, out: Path, *more: str) -> int:
    """Train on twelve noisy pictures that nobody has looked at."""
    generator = np.random.default_rng(0)
    root.mkdir(exist_ok=True)
    for i in range(12):
        pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    small = ["--backbone", "resnet10t", "--weights", "random", "--resize", "48", "--device", "cpu"]
    arguments = ["--data-root", str(root), "--dataset", "folder", "--out", str(out), *small, *more]
    return cli.main("simplenet", "mvtec", arguments)


def test_a_training_is_logged(tmp_path):
    out = tmp_path / "out"
    assert run(tmp_path / "pics", out, "--tensorboard", "--plain", "--epochs", "3") == 0
    log = read(out / "pics" / "tensorboard" / "comet")
    tags = log.Tags()
    assert set(tags["scalars"]) >= {"train/loss", "train/mean_weight", "train/strength"}
    assert [event.step for event in log.Scalars("train/loss")] == [1, 2, 3]
    assert tags["histograms"] == ["scores", "weights"]
    assert log.Histograms("weights")[0].histogram_value.num == 12
    assert set(tags["images"]) == {"comet_suspect_maps", "comet_suspects", "comet_weights"}
    assert log.Images("comet_suspects")[0].width > 500
    assert read(out / "pics" / "tensorboard" / "plain").Tags()["histograms"] == []


def test_nothing_is_logged_unasked(tmp_path, monkeypatch, undrawn):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "comet_examples.tensorboard", None)
    assert run(tmp_path / "pics", tmp_path / "out", "--epochs", "1") == 0
    assert not list(tmp_path.rglob("*tensorboard*"))
    assert not list(tmp_path.rglob("*tfevents*"))


def test_a_missing_package_gets_a_sentence_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "pics", tmp_path / "out", "--tensorboard")
    error = capsys.readouterr().err
    assert re.search(r"--tensorboard needs .*\bpip install tensorboard\b", error)
    assert 'pip install "comet-meta[tensorboard]"' in error
    assert not (tmp_path / "out").exists()


def test_epochs_that_are_trained_again_replace_those_of_the_stopped_run(tmp_path):
    stopped, resumed = TensorBoardLog(tmp_path), TensorBoardLog(tmp_path)
    for epoch in (1, 2, 3):
        stopped.epoch(epoch, {"loss": 10.0 * epoch})
    for epoch in (3, 4):
        resumed.epoch(epoch, {"loss": float(epoch)})
    resumed.finish({"I-AUROC": 0.75}, {"weights": torch.ones(4)}, [])
    log = read(tmp_path)
    events = [(event.step, event.value) for event in log.Scalars("train/loss")]
    assert events == [(1, 10), (2, 20), (3, 3), (4, 4)]
    assert [(event.step, event.value) for event in log.Scalars("outcome/I-AUROC")] == [(4, 0.75)]
