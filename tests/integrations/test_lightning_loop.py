"""The Lightning callback against the same training written as a plain loop."""

import copy

import pytest
import torch
from lightning_training import (
    DATA,
    EPOCHS,
    Module,
    N,
    assert_same,
    by_hand,
    callback,
    fit,
    loader,
    scores_of,
)
from torch import nn

from comet_meta import MetaStep, SoftConfidentWeighter


def drop_in(comet, net, index, batch) -> None:
    comet.zero_grad()
    comet.objective(net.losses(batch), index).backward()
    comet.step()


def test_drop_in_equals_a_plain_loop():
    module = Module()
    fit(module, callback())
    assert_same(module, by_hand(drop_in))


def test_the_full_method_equals_a_plain_loop():
    module = Module()
    fit(module, callback(meta=MetaStep("mldg", inner_lr=0.1)))

    def step(comet, net, index, batch):
        comet.step(lambda rows: net.losses(batch[rows]), index)

    assert_same(module, by_hand(step, meta=MetaStep("mldg", inner_lr=0.1)), rtol=1e-5, atol=1e-6)


class Paired(Module):
    """Says also what a sample's loss is if it is anomalous."""

    @staticmethod
    def pairs(losses: torch.Tensor) -> torch.Tensor:
        return torch.stack([losses, (50 - losses).relu()])

    def training_step(self, batch, batch_idx):
        return self.pairs(self.net.losses(batch))


@pytest.mark.parametrize("scores", [True, False])
def test_pairs_of_losses_equal_a_plain_loop(scores):
    module = Paired()
    fit(module, callback() if scores else callback(scores=None))
    seen = []

    def step(comet, net, index, batch):
        losses = net.losses(batch)
        comet.zero_grad()
        comet.objective(Paired.pairs(losses), index).backward()
        comet.step()
        seen.append(losses.detach())
        if not scores and len(seen) % 4 == 0 and len(seen) > 4:
            comet.weighter.fit(torch.cat(seen[-4:]))

    net = by_hand(step, scores=scores)
    assert_same(module, net)
    # The second row has had a say.
    assert any(
        not torch.equal(ours, theirs)
        for ours, theirs in zip(net.parameters(), by_hand(drop_in).parameters(), strict=True)
    )


def test_training_losses_serve_as_scores():
    module = Module()
    fit(module, callback(scores=None))
    seen = []

    def step(comet, net, index, batch):
        losses = net.losses(batch)
        comet.zero_grad()
        comet.objective(losses, index).backward()
        comet.step()
        seen.append(losses.detach())
        if len(seen) % 4 == 0 and len(seen) > 4:
            comet.weighter.fit(torch.cat(seen[-4:]))

    assert_same(module, by_hand(step, scores=False))


def test_gradient_clipping_and_accumulation():
    def step(comet, net, index, batch):
        comet.objective(net.losses(batch), index).div(2).backward()
        step.count += 1
        if step.count % 2 == 0:
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            comet.step()
            comet.zero_grad()

    step.count = 0
    net = by_hand(step)
    module = Module()
    fit(module, callback(), accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert_same(module, net)


def test_the_full_method_accumulates_too():
    def step(comet, net, index, batch):
        step.batches.append((index, batch))
        if len(step.batches) == 2:
            total = [torch.zeros_like(p) for p in net.parameters()]
            for index, batch in step.batches:
                for group in comet.param_groups:
                    group["lr"] = 0.0
                state = copy.deepcopy(comet.optimizers[0].state_dict())
                comet.step(lambda rows, batch=batch: net.losses(batch[rows]), index)
                comet.optimizers[0].load_state_dict(state)
                for sum_, p in zip(total, net.parameters(), strict=True):
                    sum_ += p.grad / 2
            for sum_, p in zip(total, net.parameters(), strict=True):
                p.grad = sum_
            for group in comet.param_groups:
                group["lr"] = 0.02
            comet.optimizers[0].step()
            step.batches.clear()

    step.batches = []
    net = by_hand(step, meta=MetaStep("mldg", inner_lr=0.1))
    module = Module()
    fit(module, callback(meta=MetaStep("mldg", inner_lr=0.1)), accumulate_grad_batches=2)
    assert_same(module, net, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("meta", ["none", "mldg"])
def test_bf16_mixed_precision(meta):
    module = Module()
    comet = callback(meta=meta)
    fit(module, comet, precision="bf16-mixed")
    assert module.net.body[0].weight.dtype == torch.float32
    assert comet.weighter()[24:].max() < comet.weighter()[:24].mean()

    def step(comet, net, index, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if meta == "none":
                objective = comet.objective(net.losses(batch), index)
            else:
                comet.step(lambda rows: net.losses(batch[rows]), index)
        if meta == "none":
            comet.zero_grad()
            objective.backward()
            comet.step()

    assert_same(module, by_hand(step, meta=meta), rtol=0.1, atol=0.05)


def test_with_a_prior_the_set_is_scored_once_for_the_ranking():
    prior = torch.linspace(0, 1, N)
    scored = []

    def scores(module, batch):
        scored.append(len(batch))
        return scores_of(module, batch)

    comet = callback(weighter=SoftConfidentWeighter(prior=prior), scores=scores)
    module = Module()
    fit(module, comet)
    assert sum(scored) == N
    assert torch.equal(comet.weighter.weights, SoftConfidentWeighter(prior=prior).weights)
    with torch.no_grad():
        expected = module.net.eval().losses(DATA)
    torch.testing.assert_close(comet.weighter.scores, expected)


def test_while_samples_are_held_out_the_set_is_scored_until_the_model_has_judged_them():
    data = torch.cat([DATA] * 4)
    epochs = []

    def scores(module, batch):
        epochs.append(module.current_epoch)
        return scores_of(module, batch)

    weighter = SoftConfidentWeighter(prior=torch.linspace(0, 1, len(data)), hold_out=0.2)
    fit(Module(), callback(weighter=weighter, scores=scores, warm_up=2), data=loader(data))
    assert sorted(set(epochs)) == [1, EPOCHS]  # after the second epoch, and after the training
    assert not weighter.needs_scores
