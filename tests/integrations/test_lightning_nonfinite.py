"""Batches without a usable loss: NaN costs its own batch alone, a step may return nothing."""

import pytest
import torch
from lightning_training import (
    BATCH,
    DATA,
    Manual,
    Module,
    N,
    assert_same,
    callback,
    fit,
    loader,
)
from torch import nn

from comet_meta import SoftConfidentWeighter
from comet_meta.integrations.lightning import CoMetCallback


def broken(rows: torch.Tensor = DATA) -> torch.Tensor:
    rows = rows.clone()
    rows[5] = torch.nan
    return rows


class Plain(Module):
    """Without batch norm, which spreads a NaN over its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net.body[1] = nn.Identity()


@pytest.mark.parametrize("scores", [None, lambda module, batch: module.net.losses(batch)])
@pytest.mark.parametrize("kind", [Plain, Module])
def test_one_sample_with_nan_is_named_and_costs_its_batch_alone(kind, scores, caplog):
    module, comet = kind(), CoMetCallback(scores=scores)
    fit(module, comet, data=loader(broken()))
    assert all(torch.isfinite(value).all() for value in module.net.state_dict().values())
    named = (
        "samples [0, 1, 2, 3, 4, 5, 6, 7]" if kind is Module and scores is None else "samples [5"
    )
    assert named in caplog.text
    assert "step skipped" in caplog.text
    known = comet.weighter.scores.isfinite()
    assert known[8:].all()
    if scores is not None:
        assert comet.weighter.ranking(30)[:7].tolist().count(5) == 1  # as suspect as the worst
    # The other batches' steps are those of a training that never met this one.
    if kind is Plain and scores is None:
        other, ones = Plain(), SoftConfidentWeighter(N, rule=torch.ones_like)
        fit(other, CoMetCallback(ones), data=loader(broken()), epochs=1)
        by_hand = Plain()
        optimizer = by_hand.configure_optimizers()
        for rows in DATA.split(BATCH)[1:]:
            optimizer.zero_grad()
            by_hand.net.losses(rows).mean().backward()
            optimizer.step()
        assert_same(other, by_hand.net)


@pytest.mark.parametrize("meta", ["none", "mldg"])
def test_manual_steps_and_meta_steps_survive_nan_too(meta):
    module = Manual() if meta == "none" else Module()
    fit(module, callback(meta=meta), data=loader(broken()))
    assert all(torch.isfinite(value).all() for value in module.net.state_dict().values())


def test_a_training_step_may_return_nothing():
    class Skips(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    for settings in ({"scores": None}, {"meta": "mldg"}):
        module, comet = Skips(), callback(**settings)
        fit(module, comet)
        assert comet.weighter.scores.isfinite().sum() >= N - BATCH
        assert all(torch.isfinite(p).all() for p in module.parameters())
