"""The loss to monitor, beside the objective."""

import pytest
import torch
from torch import nn

from comet_meta import (
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    MetaStep,
    SoftConfidentWeighter,
)

WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 0.5, 1.0, 0.0, 0.5, 0.5])
LOSSES = torch.arange(1.0, 9.0)


def wrapped(**settings) -> tuple[CoMetOptimizerWrapper, nn.Module]:
    weighter = SoftConfidentWeighter(8, rule=lambda scores: WEIGHTS)
    weighter.fit(torch.arange(8.0))
    model = nn.Linear(1, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    return CoMetOptimizerWrapper(inner, weighter=weighter, **settings), model


def expected() -> float:
    return float((WEIGHTS * LOSSES).sum() / WEIGHTS.sum())


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_of_the_drop_in_step(strength):
    regularizer = CovarianceMetaRegularizer(strength) if strength else None
    optimizer, model = wrapped(regularizer=regularizer)
    assert optimizer.loss.isnan()
    objective = optimizer.objective(LOSSES + 0 * model.weight.sum(), range(8))
    assert float(optimizer.loss) == pytest.approx(expected())
    assert float(objective.detach()) < expected()


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_of_a_full_step(strength):
    regularizer = CovarianceMetaRegularizer(strength) if strength else None
    optimizer, model = wrapped(regularizer=regularizer, meta=MetaStep("none", query_fraction=0.5))
    report = optimizer.step(lambda rows: LOSSES[rows] + 0 * model.weight.sum(), range(8))
    assert float(report.loss) == pytest.approx(expected(), rel=1e-5)


def test_a_sample_without_a_finite_loss_does_not_count():
    optimizer, model = wrapped()
    losses = LOSSES.clone()
    losses[0] = torch.nan
    optimizer.objective(losses + 0 * model.weight.sum(), range(8))
    kept = (WEIGHTS * LOSSES)[1:].sum() / WEIGHTS[1:].sum()
    assert float(optimizer.loss) == pytest.approx(float(kept))
