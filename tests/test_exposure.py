"""Losses in pairs: samples taken as normal, and likely bad ones taken as anomalous."""

import math

import pytest
import torch
from torch import nn

from comet_meta import CoMetOptimizerWrapper, CovarianceMetaRegularizer, SoftConfidentWeighter
from comet_meta.weights.rules import hard_weights, posterior_weights, ratio_weights

MODES = ("none", "mldg", "fomaml", "maml", "reptile")
DATA = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def weighter_of(weights: list[float], anomalous: list[float]) -> SoftConfidentWeighter:
    weighter = SoftConfidentWeighter(len(weights))
    weighter.weights.copy_(torch.tensor(weights))
    weighter.anomalous.copy_(torch.tensor(anomalous))
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


def test_probabilities_are_those_of_the_rule():
    generator = torch.Generator().manual_seed(0)
    scores = torch.cat([torch.randn(90, generator=generator), torch.full((10,), 9.0)])
    soft = posterior_weights(scores)
    # Bad samples stand apart: nobody else is called bad.
    assert float(soft.anomalous[90:].min()) > 0.99
    assert float(soft.anomalous[:90].mean()) < 0.1
    unspared = posterior_weights(scores, spare=0.0)
    torch.testing.assert_close(unspared.anomalous, 1 - unspared.weights)


def test_half_of_the_spared_samples_are_taken_for_bad():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(280, generator=generator)
    scores = torch.cat([normal, 1.8 + 1.4 * torch.randn(120, generator=generator)])
    soft, unspared = posterior_weights(scores), posterior_weights(scores, spare=0.0)
    spared = soft.weights < unspared.weights
    exposed = soft.anomalous > unspared.anomalous
    assert int(exposed.sum()) > 30
    assert int(spared.sum()) == pytest.approx(2 * int(exposed.sum()), abs=1)
    assert bool(spared[exposed].all())
    assert scores[exposed].min() > scores[spared & ~exposed].max()
    assert bool((soft.anomalous <= 1 - soft.weights).all())
    torch.testing.assert_close(soft.anomalous[~spared], 1 - soft.weights[~spared])


def test_the_other_rules_take_for_bad_what_weights_lack():
    generator = torch.Generator().manual_seed(0)
    scores = torch.cat([torch.randn(90, generator=generator), torch.full((10,), 9.0)])
    for rule in (hard_weights, ratio_weights):
        found = rule(scores.abs())
        assert torch.equal(found.anomalous, 1 - found.weights)


def test_a_weighter_keeps_and_restores_probabilities():
    scores = torch.cat([torch.linspace(0, 1, 50), torch.full((5,), 9.0)])
    weighter = SoftConfidentWeighter()
    weighter.fit(scores)
    assert float(weighter.anomalous[50:].min()) > 0.9
    assert float(weighter.anomalous[:50].max()) < 0.5
    restored = SoftConfidentWeighter()
    restored.load_state_dict(weighter.state_dict())
    assert torch.equal(restored.anomalous, weighter.anomalous)
    unseen = SoftConfidentWeighter(60)
    unseen.update(torch.arange(55), scores)
    unseen.fit()
    assert unseen.anomalous[55:].tolist() == [0] * 5
    assert SoftConfidentWeighter(3).anomalous.tolist() == [0, 0, 0]
