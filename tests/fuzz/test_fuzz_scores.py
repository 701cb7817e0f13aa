"""Weights and ranking of random scores: ties, neighbouring floats, integers, offsets, NaN."""

import numpy as np
import pytest
import torch
from fuzzing import fuzz, is_a_sentence
from hypothesis import given
from hypothesis import strategies as st

from comet_meta import SoftConfidentWeighter

rules = st.sampled_from(["trimmed", "hard", "ratio"])


@st.composite
def score_sets(draw: st.DrawFn) -> torch.Tensor:
    """Scores on a grid of 2^-10, so that offsets by whole numbers are exact; some of them tied."""
    count = draw(st.integers(1, 80))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = generator.normal(0, draw(st.sampled_from([0.01, 1, 5])), count)
    kind = draw(st.sampled_from(["real", "integers", "tied", "two", "equal", "outliers"]))
    if kind == "integers":
        values = (10 * values).round()
    elif kind == "tied":
        values = generator.choice(values, count)
    elif kind == "two":
        values = (values > 0).astype(float)
    elif kind == "equal":
        values[:] = values[0]
    elif kind == "outliers":
        values[: count // 10] += draw(st.sampled_from([10, 1000]))
    return torch.from_numpy((values * 1024).round() / 1024).float()


def fitted(scores: torch.Tensor, rule: str) -> SoftConfidentWeighter:
    weighter = SoftConfidentWeighter(rule=rule)
    weighter.fit(scores)
    return weighter


@fuzz(0.06)
@given(score_sets(), rules, st.integers(0, 2**32))
def test_weights_follow_the_scores_and_the_samples(scores, rule, number):
    weighter = fitted(scores, rule)
    order = scores.argsort(descending=True, stable=True)
    weights = weighter.weights
    assert weights.isfinite().all()
    assert ((weights >= 0) & (weights <= 1)).all()
    assert (weights[order].diff() >= 0).all()
    assert torch.equal(weighter.ranking(), order)
    for value in scores.unique():
        assert len(weights[scores == value].unique()) == 1
    shuffle = torch.from_numpy(np.random.default_rng(number).permutation(len(scores)))
    torch.testing.assert_close(fitted(scores[shuffle], rule).weights, weights[shuffle])


@fuzz(0.04)
@given(score_sets(), st.sampled_from(["trimmed", "hard"]), st.integers(-50, 50))
def test_a_constant_offset_changes_nothing(scores, rule, offset):
    weighter, moved = fitted(scores, rule), fitted(scores + offset, rule)
    assert torch.equal(moved.ranking(), weighter.ranking())
    torch.testing.assert_close(moved.weights, weighter.weights, rtol=0, atol=2e-3)


@fuzz(0.02)
@given(score_sets(), rules, st.data())
def test_bad_scores_get_a_sentence(scores, rule, data):
    place = data.draw(st.integers(0, len(scores) - 1))
    scores[place] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    with pytest.raises(ValueError) as caught:
        fitted(scores, rule)
    assert str(place) in str(caught.value)
    assert is_a_sentence(caught.value)


@fuzz(0.02)
@given(st.floats(-1e6, 1e6, width=32), st.integers(8, 60), rules, st.data())
def test_neighbouring_floats_keep_their_order(start, count, rule, data):
    steps = [np.float32(start)]
    for _ in range(count - 1):
        steps.append(np.nextafter(steps[-1], np.float32(np.inf), dtype=np.float32))
    shuffled = data.draw(st.permutations(range(count)))
    scores = torch.tensor(np.array(steps))[list(shuffled)]
    weighter = fitted(scores, rule)
    assert torch.equal(weighter.ranking(), scores.argsort(descending=True, stable=True))
    order = weighter.ranking()
    assert weighter.weights.isfinite().all()
    assert (weighter.weights[order].diff() >= 0).all()
