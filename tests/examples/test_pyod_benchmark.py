"""PyOD's detectors on tables: what runs, and that a detector of unit weights is PyOD alone."""

import sys

import numpy as np
import pytest

pytest.importorskip("pyod.models.deep_svdd", reason='needs pip install "comet-meta[pyod]"')

from pyod.models.auto_encoder import AutoEncoder

import pyod_tables
from comet_meta import SoftConfidentWeighter
from runs import Runs


def test_finished_runs_are_kept_and_the_tables_printed(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    rows = np.concatenate([random.normal(size=(120, 4)), random.normal(size=(24, 4)) + 3])
    np.savez(tmp_path / "far.npz", X=rows, y=np.repeat([0, 1], [120, 24]))
    monkeypatch.setitem(
        pyod_tables.DETECTORS,
        "autoencoder",
        lambda task: AutoEncoder(
            epoch_num=2, batch_size=64, random_state=task.seed, verbose=0, hidden_neuron_list=[8, 2]
        ),
    )
    unit = {"unit": lambda task: SoftConfidentWeighter(len(task.train), contamination=0.0)}
    monkeypatch.setattr(pyod_tables, "WEIGHTERS", pyod_tables.WEIGHTERS | unit)
    monkeypatch.setattr(pyod_tables, "METHODS", (*pyod_tables.METHODS, "unit"))
    out = tmp_path / "runs.jsonl"
    command = ["pyod_tables", "--folder", str(tmp_path), "--out", str(out), "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", [*command, "--detectors", "autoencoder"])
    pyod_tables.main()
    runs = list(Runs(out))
    assert len(runs) == 9 + 5
    printed = capsys.readouterr().out
    assert "Training sets as-is" in printed
    assert "| comet@rate " in printed
    assert "| comet@reviewed " in printed
    assert "| comet@learned " in printed
    pyod_tables.main()
    assert list(Runs(out)) == runs
    found = {(r["key"]["condition"], r["key"]["method"]): r["figures"] for r in runs}
    for condition in ("as-is", "clean"):
        assert found[condition, "unit"]["AUROC"] == found[condition, "plain"]["AUROC"]
        assert found[condition, "unit"]["mean weight"] == 1
    assert found["as-is", "comet@rate"]["mean weight"] < found["as-is", "comet"]["mean weight"]
    assert found["as-is", "comet"]["mean weight"] == pytest.approx(0.95, abs=0.01)
