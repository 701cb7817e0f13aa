"""The named rules: invariants, and golden values of those that draw a fence."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_meta import SoftConfidentWeighter
from comet_meta.weights.rules import (
    hard_weights,
    iqr_threshold,
    quantile,
    ratio_weights,
    standardize,
    trimmed_weights,
)
from fitting import NAMED, OUTLIER, fitted

AFFINE = ("trimmed", "hard")
# Scores on a grid: an affine map then keeps distinct scores distinct in float32.
score_lists = st.lists(st.integers(-500, 500), min_size=8, max_size=60).map(
    lambda xs: torch.tensor(xs, dtype=torch.float32) / 8
)


@settings(max_examples=60, deadline=None)
@given(scores=score_lists, rule=st.sampled_from(NAMED))
def test_weights_are_in_the_unit_interval_and_never_rise_with_the_score(scores, rule):
    weights = fitted(scores, rule)
    assert weights.min() >= 0
    assert weights.max() <= 1
    in_order = weights[scores.argsort()]
    assert (in_order.diff() <= 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(scores=score_lists, rule=st.sampled_from(NAMED), seed=st.integers(0, 99))
def test_weights_follow_the_sample_under_permutation(scores, rule, seed):
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(fitted(scores[order], rule), fitted(scores, rule)[order])


@settings(max_examples=60, deadline=None)
@given(
    scores=score_lists,
    rule=st.sampled_from(AFFINE),
    scale=st.sampled_from([0.125, 1.0, 64.0]),
    shift=st.sampled_from([-256.0, 0.0, 128.0]),
)
def test_weights_do_not_depend_on_offset_and_scale(scores, rule, scale, shift):
    expected = fitted(scores, rule)
    torch.testing.assert_close(fitted(scale * scores + shift, rule), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("rule", NAMED)
def test_equal_or_too_few_scores_tell_nothing(rule):
    assert fitted(torch.full((50,), 3.0), rule).tolist() == [1] * 50
    assert fitted(torch.tensor([0.0, 1.0, 2.0, 1.0, 0.5, 99.0, 1.5]), rule).tolist() == [1] * 7


def test_eight_scores_are_enough_and_equal_ones_forget_the_threshold():
    scores = torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 9.0])
    weighter = SoftConfidentWeighter(8, rule="hard")
    weighter.fit(scores)
    assert weighter().tolist() == [1] * 7 + [0]
    assert 1.6 < weighter.threshold < 9
    weighter.fit(torch.ones(8))
    assert weighter().tolist() == [1] * 8
    assert weighter.threshold == torch.inf


def test_rules_answer_in_the_type_of_the_scores():
    for rule in (hard_weights, ratio_weights, trimmed_weights):
        weighting = rule(OUTLIER.double())
        assert {part.dtype for part in weighting} == {torch.float64}
        assert torch.equal(weighting.p_bad, 1 - weighting.weights) or rule is trimmed_weights


def test_the_ratio_rule_by_hand():
    # Q1 = 2, Q3 = 4, tau = 4 + 1.5 * 2 = 7; 7 / 14 = 0.5.
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 14.0])
    weights, tau, _ = ratio_weights(scores)
    assert float(tau) == 7.0
    assert weights.tolist() == [1, 1, 1, 1, 0.5]
    # kappa = 0: tau = 4.
    assert ratio_weights(scores, kappa=0.0).weights.tolist() == pytest.approx([1, 1, 1, 1, 4 / 14])


def test_the_ratio_rule_measures_negative_scores_from_a_robust_lower_end():
    # Shifted by -20 the plain ratio tau / s would be -13 / -6 at the outlier and, clipped, 0 for
    # the most normal samples. Lower fence 2 - 3 = -1, minimum 1: measured from 1 (-19 shifted).
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 14.0]) - 20
    assert ratio_weights(scores).weights.tolist() == pytest.approx([1, 1, 1, 1, 6 / 13])


def test_one_very_negative_score_does_not_flatten_the_ratio():
    scores = torch.cat([torch.linspace(-1, 1, 99), torch.tensor([30.0])])
    with_stray = torch.cat([scores, torch.tensor([-1e6])])
    assert ratio_weights(with_stray).weights[99] < 0.3


def test_the_hard_rule_by_hand():
    scores = torch.tensor([1.0, 2.0, 1.5, 1.2, 9.0, 1.1, 1.7, 1.3, 1.6, 1.4])
    # Q1 = 1.225, Q3 = 1.675: tau = 2.35.
    assert float(iqr_threshold(scores)) == pytest.approx(2.35)
    assert fitted(scores, "hard").tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]


def test_the_fence_is_as_wide_as_asked_for():
    # tau = Q3 + kappa * IQR = 1.675 + 0.45 * kappa.
    wide, narrow = (SoftConfidentWeighter(10, rule="ratio", kappa=kappa) for kappa in (10.0, 0.5))
    wide.fit(OUTLIER)
    narrow.fit(OUTLIER)
    assert float(wide.threshold) == pytest.approx(6.175)
    assert float(wide()[4]) == pytest.approx(6.175 / 9)
    assert fitted(OUTLIER, "hard", kappa=0.5).tolist().count(0) == 2  # 2.0 lies above 1.9
    assert float(narrow.threshold) == pytest.approx(1.9)


def test_the_lower_fence_is_as_wide_too():
    scores = torch.tensor([-9.0, 1.0, 2.0, 3.0, 4.0, 14.0])
    # Q1 = 1.25, Q3 = 3.75, IQR = 2.5: with kappa = 2 from 1.25 - 5 = -3.75 up to 8.75.
    expected = (8.75 + 3.75) / (14 + 3.75)
    assert float(ratio_weights(scores, 2.0).weights[5]) == pytest.approx(expected)
    assert ratio_weights(scores, 2.0).weights[:5].tolist() == [1] * 5


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=50), q=st.floats(0, 1))
def test_quantile_equals_numpy(values, q):
    found = float(quantile(torch.tensor(values, dtype=torch.float64), q))
    assert found == pytest.approx(float(np.quantile(values, q)), abs=1e-6)


def test_standardized_scores_that_are_equal_are_zero():
    assert standardize(torch.full((5,), 7.0)).tolist() == [0] * 5
