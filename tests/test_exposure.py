"""Losses in pairs: samples taken as normal, and likely bad ones taken as anomalous."""

import math

import pytest
import torch
from torch import nn

from comet_meta import CoMetOptimizerWrapper, CovarianceMetaRegularizer, SoftConfidentWeighter
from comet_meta.weights.rules import (
    estimate_contamination,
    hard_weights,
    ratio_weights,
    trimmed_weights,
)

MODES = ("none", "mldg", "fomaml", "maml", "reptile")
DATA = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def weighter_of(weights: list[float], anomalous: list[float]) -> SoftConfidentWeighter:
    weighter = SoftConfidentWeighter(len(weights))
    weighter.weights.copy_(torch.tensor(weights))
    weighter.p_bad.copy_(torch.tensor(anomalous))
    return weighter


def wrapped(parameters, **options) -> CoMetOptimizerWrapper:
    return CoMetOptimizerWrapper(torch.optim.SGD(parameters, lr=0.1), **options)


def test_the_objective_of_pairs_by_hand():
    theta = torch.ones(1, requires_grad=True)
    optimizer = wrapped(
        [theta], weighter=weighter_of([1.0, 0.5, 0.0], [0.0, 0.25, 1.0]), exposure=0.5
    )
    pairs = torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]) * theta
    # Normal: 1 * 1 + 0.5 * 2 + 0 * 3 = 2; anomalous: 0.5 * (0 * 5 + 0.25 * 6 + 1 * 7) = 4.25.
    assert optimizer.objective(pairs, [0, 1, 2]).item() == pytest.approx((2 + 4.25) / 3)


def test_both_levels_agree_on_pairs():
    model = nn.Linear(4, 1)
    weighter = weighter_of([1.0, 0.2] * 8, [0.0, 0.8] * 8)

    def pairs(rows: torch.Tensor) -> torch.Tensor:
        scores = model(DATA[rows]).squeeze(1)
        return torch.stack([scores.square(), (3 - scores).relu()])

    optimizer = wrapped(model.parameters(), weighter=weighter)
    index = torch.arange(16)
    optimizer.objective(pairs(index), index).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    report = optimizer.backward(pairs, index)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert float(report.mean_weight) == pytest.approx(0.6)
    assert float(report.min_weight) == pytest.approx(0.2)


@pytest.mark.parametrize("meta", MODES)
def test_every_meta_step_takes_pairs(meta):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = wrapped(
        model.parameters(),
        weighter=weighter_of([1.0] * 8 + [0.0] * 8, [0.0] * 8 + [1.0] * 8),
        regularizer=CovarianceMetaRegularizer(0.01),
        meta=meta,
        model=model,
    )
    shifted = DATA.clone()
    shifted[8:, 0] += 4  # the bad ones

    def pairs(rows: torch.Tensor) -> torch.Tensor:
        scores = model(shifted[rows]).squeeze(1)
        return torch.stack([scores.square(), (3 - scores).relu()])

    for _ in range(200):
        optimizer.step(pairs, torch.arange(16))
    scores = model(shifted).detach().squeeze(1)
    assert scores[8:].mean() > 1.5 + scores[:8].mean()


def test_without_exposure_pairs_are_the_losses_alone():
    theta = torch.ones(1, requires_grad=True)
    weighter = weighter_of([1.0, 0.5], [0.0, 0.5])
    pairs = torch.tensor([[1.0, 2.0], [5.0, 6.0]]) * theta
    optimizer = wrapped([theta], weighter=weighter, exposure=0.0)
    assert optimizer.objective(pairs, [0, 1]).item() == pytest.approx(1.0)
    assert wrapped([theta]).objective(pairs).item() == pytest.approx(1.5)  # nobody is suspect


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("level", [1, 2])
def test_a_pair_with_a_loss_that_is_not_finite_is_left_out(row, level, caplog):
    theta = torch.ones(1, requires_grad=True)
    factors = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    factors[row, 2] = math.nan
    optimizer = wrapped([theta], weighter=weighter_of([1.0] * 4, [0.0] * 4))
    if level == 1:
        objective = optimizer.objective((factors * theta), torch.arange(4))
        assert objective.item() == pytest.approx((1 + 2 + 4) / 3)
    else:
        report = optimizer.step(lambda rows: factors[:, rows] * theta, torch.arange(4))
        assert int(report.dropped) == 1
        assert theta.item() == pytest.approx(1 - 0.1 * 7 / 3)
    assert "1 of 4 losses are NaN or infinite" in caplog.text


def test_other_shapes_and_factors_get_a_sentence():
    theta = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="taken as anomalous"):
        wrapped([theta]).objective(torch.ones(3, 5) * theta)
    with pytest.raises(ValueError, match="got 5 losses for 4 samples"):
        wrapped([theta]).step(lambda rows: torch.ones(2, 5) * theta, torch.arange(4))
    with pytest.raises(ValueError, match="exposure is -1"):
        wrapped([theta], exposure=-1)


def test_only_proven_samples_are_taken_for_bad():
    generator = torch.Generator().manual_seed(0)
    scores = torch.cat([torch.randn(360, generator=generator), torch.linspace(8, 10, 40)])
    soft = trimmed_weights(scores)
    low = estimate_contamination(scores).low
    # Next to nobody but the bad ones is called bad, and as many are as the scores prove.
    assert low > 0.05
    assert float(soft.p_bad.sum()) == pytest.approx(400 * low, abs=1e-3)
    assert float(soft.p_bad[360:].mean()) > 0.5
    assert float(soft.p_bad[:360].sum()) < 0.1


def test_the_twentieth_left_out_without_evidence_is_not_taken_for_bad():
    scores = torch.randn(400, generator=torch.Generator().manual_seed(0))
    soft = trimmed_weights(scores)
    assert float((1 - soft.weights).sum()) == pytest.approx(20, abs=1e-3)
    assert soft.p_bad.tolist() == [0] * 400


def test_of_a_given_share_that_is_taken_for_bad_and_a_tenth_more_left_out():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(280, generator=generator)
    scores = torch.cat([normal, 1.8 + 1.4 * torch.randn(120, generator=generator)])
    soft = trimmed_weights(scores, contamination=0.3)
    left_out, exposed = 1 - soft.weights, soft.p_bad
    assert float(exposed.sum()) == pytest.approx(120, abs=1e-3)
    assert float(left_out.sum()) == pytest.approx(160, abs=1e-3)
    assert bool((exposed <= left_out + 1e-6).all())
    # Both go by the score: the highest ones first.
    order = scores.argsort(descending=True)
    assert bool((exposed[order].diff() <= 0).all())
    assert exposed[order[:90]].tolist() == pytest.approx([1] * 90)  # 3/4 of 120
    assert exposed[order[150:]].tolist() == [0] * 250  # 5/4 of it


def test_the_other_rules_take_for_bad_what_weights_lack():
    generator = torch.Generator().manual_seed(0)
    scores = torch.cat([torch.randn(90, generator=generator), torch.full((10,), 9.0)])
    for rule in (hard_weights, ratio_weights):
        found = rule(scores.abs())
        assert torch.equal(found.p_bad, 1 - found.weights)


def test_a_weighter_keeps_and_restores_probabilities():
    scores = torch.cat([torch.linspace(0, 1, 50), torch.full((5,), 9.0)])
    weighter = SoftConfidentWeighter(contamination=5 / 55)
    weighter.fit(scores)
    assert float(weighter.p_bad[50:].min()) > 0.9
    assert float(weighter.p_bad[:50].max()) < 0.5
    restored = SoftConfidentWeighter()
    restored.load_state_dict(weighter.state_dict())
    assert torch.equal(restored.p_bad, weighter.p_bad)
    unseen = SoftConfidentWeighter(60, contamination=5 / 55)
    unseen.update(torch.arange(55), scores)
    unseen.fit()
    assert torch.equal(unseen.p_bad[:55], weighter.p_bad)
    assert unseen.p_bad[55:].tolist() == [0] * 5
    assert SoftConfidentWeighter(3).p_bad.tolist() == [0, 0, 0]
