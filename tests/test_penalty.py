"""The uncertainty penalty against numpy and by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_meta import CovarianceMetaRegularizer
from comet_meta.penalty import loss_covariance, model_uncertainty

losses = st.floats(-100, 100, width=32)


@settings(max_examples=80, deadline=None)
@given(pairs=st.lists(st.tuples(losses, losses), min_size=0, max_size=8))
def test_sigma_is_symmetric_and_positive_semi_definite(pairs):
    sigma = loss_covariance(torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2))
    assert torch.equal(sigma, sigma.T)
    assert torch.linalg.eigvalsh(sigma).min() >= -1e-9


def test_sigma_equals_numpy():
    pairs = np.random.default_rng(0).normal(size=(5, 2))
    z = (pairs - pairs.mean(axis=0)) / pairs.std(axis=0, ddof=1)
    expected = np.cov(z.T)
    np.testing.assert_allclose(loss_covariance(torch.from_numpy(pairs)).numpy(), expected)


def test_lambda_by_hand():
    # z of (1, 2, 3) is (-1, 0, 1) and of (1, 3, 2) is (-1, 1, 0): r = 1/2, det = 1 - 1/4 = 3/4.
    regularizer = CovarianceMetaRegularizer(base_strength=0.1, gamma=0.5, window=3)
    for pair in [(9.0, 9.0), (1.0, 1.0), (2.0, 3.0), (3.0, 2.0)]:  # the first leaves the window
        regularizer.update(torch.tensor(pair[0]), torch.tensor(pair[1]))
    torch.testing.assert_close(regularizer.covariance, torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    expected = 0.1 * (1 + 0.5 * math.log(1.75) / math.log(101))
    assert float(regularizer.strength) == pytest.approx(expected, rel=1e-6)


def test_the_penalty_by_hand():
    regularizer = CovarianceMetaRegularizer(base_strength=0.5, gamma=0.0)
    parameters = [torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([2.0])]
    assert regularizer.penalty(parameters).item() == pytest.approx(0.5 * (9 + 16 + 4))
    regularizer.penalty(parameters).backward()
    torch.testing.assert_close(parameters[0].grad, torch.tensor([[3.0, 4.0]]))  # 2 * 0.5 * theta
    without_biases = CovarianceMetaRegularizer(base_strength=0.5, gamma=0.0, exclude_1d=True)
    assert without_biases.penalty(parameters).item() == pytest.approx(0.5 * 25)
    assert float(without_biases.penalty([])) == 0
    assert float(without_biases.penalty(parameters, torch.tensor(2.0))) == pytest.approx(2 * 25)


@settings(max_examples=50, deadline=None)
@given(a=st.floats(0, 1e4), b=st.floats(0, 1e4))
def test_uncertainty_is_bounded_and_monotone_in_det_sigma(a, b):
    low, high = sorted((a, b))
    d_low, d_high = (
        float(model_uncertainty(torch.diag(torch.tensor([1.0, x])))) for x in (low, high)
    )
    assert 0 < d_low <= d_high <= 1 + 1e-6


def test_strength_starts_at_its_base_and_stays_bounded():
    regularizer = CovarianceMetaRegularizer(base_strength=0.005, gamma=0.5)
    assert float(regularizer.strength) == pytest.approx(0.005, rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        regularizer.update(*torch.randn(2, generator=generator))
        assert 0.005 <= float(regularizer.strength) <= 0.005 * (1 + 0.5 * 0.151)


def test_the_penalty_by_hand_and_its_derivatives():
    regularizer = CovarianceMetaRegularizer(base_strength=0.5, gamma=0.0)
    a = torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # a norm has no gradient here
    penalty = regularizer.penalty([a, b])
    assert float(penalty.detach()) == pytest.approx(0.5 * 5)
    gradients = torch.autograd.grad(penalty, [a, b])
    assert [g.tolist() for g in gradients] == [[[1.0, -2.0]], [0.0, 0.0]]
    assert torch.autograd.gradcheck(lambda *p: regularizer.penalty(p), (a, b))
    assert torch.autograd.gradgradcheck(lambda *p: regularizer.penalty(p), (a, b))


def test_losses_that_do_not_vary_are_certain():
    regularizer = CovarianceMetaRegularizer()
    for _ in range(6):
        regularizer.update(torch.tensor(0.7), torch.tensor(0.3))
    assert torch.equal(regularizer.covariance, torch.zeros(2, 2))


def test_state_survives_saving():
    saved = CovarianceMetaRegularizer()
    for pair in torch.randn(7, 2, generator=torch.Generator().manual_seed(0)):
        saved.update(*pair)
    restored = CovarianceMetaRegularizer()
    restored.load_state_dict(saved.state_dict())
    assert torch.equal(restored.strength, saved.strength)
    assert float(restored.covariance.det()) > 0


def test_a_loss_that_is_not_finite_is_refused_not_swallowed():
    with pytest.raises(ValueError, match="expected finite"):
        CovarianceMetaRegularizer().update(torch.tensor(torch.nan), torch.tensor(1.0))


def test_pairs_that_do_not_count_change_nothing():
    pairs = torch.tensor([[1.0, 2.0], [2.0, 1.0], [4.0, 5.0]], dtype=torch.float64)
    rubbish = torch.tensor([[1e3, -1e3], [7.0, 0.0]], dtype=torch.float64)
    valid = torch.tensor([False, True, True, False, True])
    mixed = torch.stack([rubbish[0], pairs[0], pairs[1], rubbish[1], pairs[2]])
    torch.testing.assert_close(loss_covariance(mixed, valid), loss_covariance(pairs))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_losses_that_vary_have_variance_one_however_few(count):
    pairs = torch.tensor([[1.0, 5.0], [2.0, 3.0], [3.0, 1.0], [4.0, -1.0]])[:count]
    expected = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    torch.testing.assert_close(loss_covariance(pairs), expected)
    padded = torch.cat([pairs, torch.full((3, 2), 9.0)])
    torch.testing.assert_close(loss_covariance(padded, torch.arange(count + 3) < count), expected)


def test_no_pair_and_one_pair_have_no_covariance():
    assert torch.equal(loss_covariance(torch.zeros(0, 2)), torch.zeros(2, 2))
    assert torch.equal(loss_covariance(torch.tensor([[3.0, 4.0]])), torch.zeros(2, 2))


@pytest.mark.parametrize("level", [1e-3, 1.0, 1e4])
def test_variation_counts_from_rounding_error_on_each_loss_by_its_own_measure(level):
    eps = torch.finfo(torch.float32).eps
    steps = torch.tensor([0.0, 1.0, 2.0])
    rounding = level * (1 + steps * eps)  # the last bits: no variation
    real = level * (1 + steps * 64 * eps)
    other = torch.tensor([1e6, 3e6, 2e6])  # large beside it, which must not matter
    assert loss_covariance(torch.stack([rounding, other], dim=1))[0, 0] == 0
    assert loss_covariance(torch.stack([real, other], dim=1))[0, 0] == pytest.approx(1)


def test_the_defaults_are_the_papers():
    regularizer = CovarianceMetaRegularizer()
    assert (regularizer.base_strength, regularizer.gamma, regularizer.window) == (0.005, 0.5, 5)
    assert regularizer.count.dtype == torch.int64
    assert CovarianceMetaRegularizer(window=2).pairs.shape == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_strength": -1.0}, "base_strength is -1.0; expected a finite number >= 0"),
        ({"base_strength": math.inf}, "base_strength is inf; expected"),
        ({"gamma": -0.5}, "gamma is -0.5; expected"),
        ({"gamma": math.nan}, "gamma is nan; expected"),
        ({"window": 1}, "window is 1; expected at least 2 loss pairs"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        CovarianceMetaRegularizer(**arguments)


def test_the_state_stays_on_its_device_and_off_the_graph():
    regularizer = CovarianceMetaRegularizer().to("meta")
    assert regularizer.strength.device.type == "meta"
    assert regularizer.penalty([]).device.type == "meta"
    loss = torch.ones((), requires_grad=True)
    regularizer = CovarianceMetaRegularizer()
    regularizer.update(2 * loss, 3 * loss)
    assert not regularizer.pairs.requires_grad


def test_the_window_holds_the_last_pairs_in_order():
    regularizer = CovarianceMetaRegularizer(window=4)
    for k in range(9):
        regularizer.update(torch.tensor(float(k)), torch.tensor(10.0 * k))
        expected = [[j, 10 * j] for j in range(max(0, k - 3), k + 1)]
        assert regularizer.pairs[-len(expected) :].tolist() == expected
        assert regularizer.count == k + 1


def test_losses_of_any_type_and_of_one_element_are_taken():
    regularizer = CovarianceMetaRegularizer(window=2)
    regularizer.update(torch.tensor(1.5, dtype=torch.float64), torch.tensor(2.5).bfloat16())
    assert regularizer.pairs[-1].tolist() == [1.5, 2.5]
    assert regularizer.count == 1


def test_the_settings_show():
    shown = repr(CovarianceMetaRegularizer(0.25, 0.75, 3))
    assert shown == "CovarianceMetaRegularizer(base_strength=0.25, gamma=0.75, window=3)"
