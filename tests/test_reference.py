"""The library computes what the plain lines of reference.py do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import reference
from comet_meta import (
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    MetaStep,
    SoftConfidentWeighter,
)
from comet_meta.weights.rules import ratio_weights, trimmed_parts, trimmed_weights

N, BATCH, EXPOSURE, INNER_LR, LR = 40, 10, 0.7, 0.3, 0.05
DATA = torch.randn(N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
# On a grid, so that some scores are equal.
score_lists = st.lists(st.integers(0, 60), min_size=8, max_size=40, unique_by=lambda x: x // 2).map(
    lambda xs: torch.tensor([x // 2 for x in xs + xs[:3]], dtype=torch.float64)
)


@settings(max_examples=25, deadline=None)
@given(s=score_lists, contamination=st.sampled_from([0.02, 0.1, 0.3, 0.47]))
def test_trimmed_weights(s, contamination):
    found = trimmed_weights(s, contamination)
    w, p_bad = reference.trimmed_weights(s, contamination)
    torch.testing.assert_close(found.weights, w.double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.p_bad, p_bad.double(), atol=1e-5, rtol=0)


@settings(max_examples=10, deadline=None)
@given(s=score_lists, parts=st.integers(1, 3), contamination=st.sampled_from([0.1, 0.3]))
def test_trimmed_parts(s, parts, contamination):
    s = torch.stack([s.roll(shift) for shift in range(parts)], dim=1)
    weighter = SoftConfidentWeighter(prior=s[:, 0], part_prior=s, contamination=contamination)
    w = 1 - reference.left_out(s[:, 0], contamination)
    torch.testing.assert_close(weighter.weights, w, atol=1e-5, rtol=0)
    expected = reference.trimmed_parts(s, weighter.weights)
    torch.testing.assert_close(weighter.part_weights(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(trimmed_parts(s, w, 0.1).float(), expected, atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(s=score_lists, kappa=st.sampled_from([0.0, 0.3, 1.5]))
def test_ratio_weights(s, kappa):
    torch.testing.assert_close(
        ratio_weights(s + 0.5, kappa).weights, reference.ratio_weights(s + 0.5, kappa)
    )


def test_strength():
    regularizer = CovarianceMetaRegularizer(base_strength=0.2, gamma=3.0, window=4)
    pairs = torch.rand(9, 2, generator=torch.Generator().manual_seed(1))
    for count in range(len(pairs) + 1):
        window = pairs[max(0, count - 4) : count]
        expected = reference.strength(window, 0.2, 3.0)
        assert float(regularizer.strength) == pytest.approx(expected, rel=1e-5)
        if count < len(pairs):
            regularizer.update(*pairs[count])


def build(mode: str) -> tuple[nn.Module, CoMetOptimizerWrapper]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    weighter = SoftConfidentWeighter(N, contamination=0.2)
    weighter.fit(torch.rand(N))
    optimizer = CoMetOptimizerWrapper(
        torch.optim.SGD(model.parameters(), lr=LR),
        weighter=weighter,
        regularizer=CovarianceMetaRegularizer(base_strength=0.02, gamma=4.0, window=3),
        exposure=EXPOSURE,
        meta=MetaStep(mode, inner_lr=INNER_LR, query_fraction=0.3),
        model=model,
        generator=torch.Generator().manual_seed(3),
    )
    return model, optimizer


def errors(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x).square().mean(dim=1)


def split(generator: torch.Generator, size: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """Support and query of the next batch: the last 70 % and the first 30 % of a random order."""
    order = torch.randperm(size, generator=generator)
    queries = round(0.3 * size)
    return order[queries:], order[:queries]


class Plain:
    """Steps 1 to 7 by the reference."""

    def __init__(self, model: nn.Module, weighter: SoftConfidentWeighter) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.theta = [p.detach().clone().requires_grad_() for p in model.parameters()]
        self.model, self.weighter = model, weighter
        self.generator = torch.Generator().manual_seed(3)
        self.pairs: list[list[float]] = []

    def step(self, index: torch.Tensor, mode: str) -> None:
        lambda_sigma = reference.strength(torch.tensor(self.pairs[-3:]), 0.02, 4.0)
        w, p_bad = self.weighter.weights[index], self.weighter.p_bad[index]

        def objective_at(theta, rows):
            x = DATA[index[rows]]
            losses = errors(lambda x: functional_call(self.model, self.named(theta), (x,)), x)
            anomalous = (3 - losses).relu()
            return reference.objective(
                theta, losses, anomalous, w[rows], p_bad[rows], EXPOSURE, lambda_sigma
            )

        support, query = split(self.generator, len(index))
        found, *pair = reference.gradient(self.theta, objective_at, support, query, mode, INNER_LR)
        self.pairs.append([loss.item() for loss in pair])
        self.theta = [
            (p - LR * g).detach().requires_grad_() for p, g in zip(self.theta, found, strict=True)
        ]

    def named(self, theta):
        return dict(zip(self.names, theta, strict=True))


@pytest.mark.parametrize("mode", ["objective", "none", "mldg", "fomaml", "maml", "reptile"])
def test_step(mode):
    meta = "none" if mode == "objective" else mode
    model, optimizer = build(meta)
    plain = Plain(model, optimizer.weighter)
    assert float(optimizer.weighter.weights.min()) == 0  # some samples are left out
    assert float(optimizer.weighter.p_bad.max()) > 0.5

    def pairs(index):
        losses = errors(model, DATA[index])
        return torch.stack([losses, (3 - losses).relu()])

    for index in torch.randperm(N, generator=torch.Generator().manual_seed(4)).split(BATCH) * 3:
        plain.step(index, meta)
        if mode == "objective":
            optimizer.zero_grad()
            optimizer.objective(pairs(index), index).backward()
            optimizer.step()
        else:
            optimizer.step(lambda rows, index=index: pairs(index[rows]), index)
        for parameter, expected in zip(model.parameters(), plain.theta, strict=True):
            torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-6, atol=1e-8)
    assert len({round(pair[0], 6) for pair in plain.pairs}) > 5  # lambda(Sigma) had to follow


@pytest.mark.parametrize("mode", ["objective", "none"])
def test_samples_that_are_not_finite_do_not_count(mode):
    model, optimizer = build("none")
    optimizer.regularizer = None
    bad, index = torch.tensor([2, 7]), torch.arange(BATCH)
    kept = torch.tensor([i for i in range(BATCH) if i not in bad.tolist()])
    theta = list(model.parameters())
    w, p_bad = optimizer.weighter.weights, optimizer.weighter.p_bad
    own = errors(model, DATA[kept])
    expected = torch.autograd.grad(
        reference.objective(theta, own, 0 * own, w[kept], p_bad[kept], EXPOSURE, 0.0),
        theta,
    )

    def losses(rows):
        factor = torch.ones(len(rows), dtype=torch.float64)
        factor[torch.isin(rows, bad)] = torch.inf
        return errors(model, DATA[rows]).detach() * (factor - 1) + errors(model, DATA[rows])

    if mode == "objective":
        optimizer.objective(losses(index), index).backward()
    else:
        optimizer.backward(losses, index)
    for parameter, gradient in zip(theta, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
