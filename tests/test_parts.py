"""Weights of parts: the patches of a picture, the columns of a row, the steps of a series."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn

from comet_meta import CoMetOptimizerWrapper, RowScorer, SoftConfidentWeighter
from comet_meta.weights.rules import ALWAYS_LEFT_OUT, LEFT_OUT_BESIDE_GIVEN, trimmed_parts

PARTS_LEFT_OUT = ALWAYS_LEFT_OUT  # fraction of the parts of the samples that stay
N, P = 60, 5


@st.composite
def part_scores(draw, levels: int = 400):
    """Scores (N, P), not all equal, on a grid, so that moving and scaling them is exact."""
    count, parts = draw(st.integers(8, 20)), draw(st.integers(1, 6))
    values = draw(st.lists(st.integers(-levels, levels), min_size=count * parts, max_size=300))
    scores = torch.tensor(values[: count * parts], dtype=torch.float32).reshape(count, parts) / 16
    return scores if scores.min() < scores.max() else scores + torch.eye(count, parts)


@st.composite
def weights_for(draw, count: int):
    """Weights of samples, at least one of them above 0."""
    found = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=count, max_size=count))
    return torch.tensor([1.0, *found[1:]])


def weighter_of(scores: torch.Tensor, **options) -> SoftConfidentWeighter:
    return SoftConfidentWeighter(prior=scores.flatten(1).mean(dim=1), part_prior=scores, **options)


def some_scores(seed: int = 0, shape: tuple[int, ...] = (N, P)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- the rule


@settings(max_examples=40, deadline=None)
@given(data=st.data(), scores=part_scores())
def test_the_twentieth_is_one_of_the_parts_of_the_samples_that_stay(data, scores):
    weights = data.draw(weights_for(len(scores)))
    found = trimmed_parts(scores, weights)
    assert ((found >= 0) & (found <= 1)).all()
    assert (found[weights == 0] == 1).all()
    counting = scores[weights > 0].numel()
    left_out = float((1 - found).sum())
    assert left_out == pytest.approx(PARTS_LEFT_OUT * counting, rel=1e-4, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), scores=part_scores(levels=20))
def test_part_weights_never_rise_with_the_score_and_ties_share(data, scores):
    weights = data.draw(weights_for(len(scores)))
    kept = weights > 0
    found, own = trimmed_parts(scores, weights)[kept].flatten(), scores[kept].flatten()
    assert (found[own.argsort()].diff() <= 1e-6).all()
    for score in own.unique():
        assert len(found[own == score].unique()) == 1


@settings(max_examples=25, deadline=None)
@given(scores=part_scores(levels=30), seed=st.integers(0, 99))
def test_a_permutation_of_samples_or_parts_permutes_the_weights(scores, seed):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randperm(len(scores), generator=generator)
    parts = torch.randperm(scores.shape[1], generator=generator)
    weights = torch.ones(len(scores))
    weights[:2] = 0
    found = trimmed_parts(scores, weights)
    assert torch.equal(trimmed_parts(scores[samples], weights[samples]), found[samples])
    assert torch.equal(trimmed_parts(scores[:, parts], weights), found[:, parts])


@settings(max_examples=25, deadline=None)
@given(
    scores=part_scores(),
    scale=st.sampled_from([2.0**-10, 1.0, 2.0**10]),
    shift=st.sampled_from([-64.0, 0.0, 32.0]),
)
def test_offset_and_scale_of_the_part_scores_do_not_matter(scores, scale, shift):
    weights = torch.ones(len(scores))
    assert torch.equal(
        trimmed_parts(scale * (scores + shift), weights), trimmed_parts(scores, weights)
    )


def test_the_ramp_by_hand():
    # 100 parts, 5 of them left out: w = clip((r - 3.75) / 2.5, 0, 1) at the rank r - 1/2.
    scores = torch.arange(100.0).reshape(20, 5)
    found = trimmed_parts(scores, torch.ones(20)).flatten().flip(0)
    # The fourth rank runs from 3 to 4, the last quarter of it on the ramp; the mean is 0.0125.
    assert found[:7].tolist() == pytest.approx([0, 0, 0, 0.0125, 0.3, 0.7, 0.9875], abs=1e-5)
    assert (found[7:] == 1).all()


def test_samples_that_are_out_do_not_use_up_the_twentieth():
    scores = some_scores()
    scores[:6] += 10  # all parts that score high belong to samples of weight 0
    weights = torch.ones(N)
    weights[:6] = 0
    found = trimmed_parts(scores, weights)
    assert torch.equal(found[6:], trimmed_parts(scores[6:], torch.ones(N - 6)))
    assert found[6:].min() == 0


# --- the weighter


def test_a_strange_part_goes_and_its_sample_stays():
    scores = some_scores()
    scores[7, 2] += 5
    weighter = weighter_of(scores)
    assert weighter.has_parts
    assert weighter.part_weights([7])[0, 2] == 0
    assert weighter([7]) == 1
    assert weighter.p_bad[7] == 0
    assert torch.equal(weighter.part_weights(), trimmed_parts(scores, weighter.weights))


def test_samples_that_are_known_to_be_bad_still_go_as_a_whole():
    scores = some_scores()
    scores[:12] += 5
    weighter = weighter_of(scores, contamination=0.2)
    assert int((weighter.weights == 0).sum()) == 9  # three quarters of a fifth
    assert int((weighter.weights[12:] == 1).sum()) == 45  # the ramp ends at a quarter
    assert weighter.p_bad.sum() == pytest.approx(12, abs=1e-3)
    gone = weighter.weights == 0
    counting = P * int((~gone).sum())
    left_out = float((1 - weighter.part_weights()).sum())
    assert left_out == pytest.approx(LEFT_OUT_BESIDE_GIVEN * counting, rel=1e-4)


def test_a_precaution_is_a_fraction_of_the_parts():
    scores = some_scores()
    weighter = weighter_of(scores, precaution=0.2)
    assert bool((weighter() == 1).all())
    assert float((1 - weighter.part_weights()).sum()) == pytest.approx(0.2 * N * P, rel=1e-4)
    none = weighter_of(scores, precaution=0.0)
    assert bool((none.part_weights() == 1).all())


def test_the_parts_keep_their_shape():
    scores = some_scores(shape=(N, 3, 4))
    weighter = weighter_of(scores)
    assert weighter.part_weights().shape == (N, 3, 4)
    assert weighter.part_weights(torch.tensor([3, 3, 0])).shape == (3, 3, 4)
    flat = weighter_of(scores.flatten(1))
    assert torch.equal(weighter.part_weights().flatten(1), flat.part_weights())


def test_part_weights_by_index():
    weighter = weighter_of(some_scores())
    whole = weighter.part_weights()
    index = torch.tensor([5, 0, 5, N - 1])
    assert torch.equal(weighter.part_weights(index), whole[index])
    assert torch.equal(weighter.part_weights([2]), whole[2:3])
    whole.zero_()  # a copy
    assert weighter.part_weights().max() == 1
    with pytest.raises(IndexError):
        weighter.part_weights([N])
    with pytest.raises(TypeError):
        weighter.part_weights(torch.tensor([0.5]))


def test_equal_part_scores_tell_nothing():
    prior = some_scores()[:, 0]
    weighter = SoftConfidentWeighter(prior=prior, part_prior=torch.full((N, P), 3.0))
    assert (weighter.part_weights() == 1).all()


def test_parts_of_fewer_than_eight_samples_tell_nothing():
    assert (weighter_of(some_scores(shape=(7, 40))).part_weights() == 1).all()
    assert (weighter_of(some_scores(shape=(8, 40))).part_weights() < 1).any()


def test_later_scores_of_a_model_change_no_part():
    weighter = weighter_of(some_scores())
    before, whole = weighter.part_weights(), weighter()
    weighter.fit(some_scores(1)[:, 0])
    assert torch.equal(weighter.part_weights(), before)
    assert torch.equal(weighter(), whole)


def test_mean_weights_count_samples_and_their_parts():
    scores = some_scores()
    scores[:6] += 3
    weighter = weighter_of(scores, contamination=0.1)
    expected = [
        float(w) * float(parts.mean())
        for w, parts in zip(weighter.weights, weighter.part_weights(), strict=True)
    ]
    assert weighter.mean_weights().tolist() == pytest.approx(expected)
    assert weighter.mean_weights().min() == 0
    plain = SoftConfidentWeighter(prior=scores[:, 0])
    assert not plain.has_parts
    assert torch.equal(plain.mean_weights(), plain.weights)
    plain.mean_weights().zero_()  # a copy
    assert plain.weights.max() == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"part_prior": torch.rand(N, P)}, ValueError, r"goes with prior="),
        (
            {"prior": torch.rand(N), "part_prior": torch.rand(N, P), "rule": "hard"},
            ValueError,
            "rule='trimmed'",
        ),
        (
            {"prior": torch.rand(N), "part_prior": torch.rand(N - 1, P)},
            ValueError,
            r"shape \(59, 5\) for 60 samples",
        ),
        (
            {"prior": torch.rand(N), "part_prior": torch.rand(N)},
            ValueError,
            r"shape \(60,\) .*expected \(N, \.\.\.\)",
        ),
        (
            {"prior": torch.rand(N), "part_prior": torch.ones(N, P, dtype=torch.int64)},
            TypeError,
            "part_prior is torch.int64; expected a floating-point tensor",
        ),
        (
            {"prior": torch.rand(N), "part_prior": torch.full((N, P), torch.nan)},
            ValueError,
            "300 of 300 part_prior are NaN or infinite",
        ),
    ],
)
def test_bad_part_scores_get_a_sentence(options, error, message):
    with pytest.raises(error, match=message):
        SoftConfidentWeighter(**options)


def test_without_parts_a_sentence_says_what_is_missing():
    with pytest.raises(ValueError, match="give the weighter a part_prior="):
        SoftConfidentWeighter(prior=torch.rand(N)).part_weights()


def test_copies_and_saved_states_hold_the_part_weights():
    weighter = weighter_of(some_scores())
    expected = weighter.part_weights()
    other = weighter_of(some_scores(1))
    assert not torch.equal(other.part_weights(), expected)
    other.load_state_dict(weighter.state_dict())
    for again in (copy.deepcopy(weighter), pickle.loads(pickle.dumps(weighter)), other):
        assert torch.equal(again.part_weights(), expected)
        assert torch.equal(again.mean_weights(), weighter.mean_weights())
    assert weighter.to(torch.float64).part_weights().dtype == torch.float64
    assert weighter.to("meta").part_weights([0]).device.type == "meta"


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        ((N, P), None, r"weights of parts of shape \(5,\), this one of no parts"),
        (None, (N, P), r"weights of no parts, this one of parts of shape \(5,\)"),
        ((N, P), (N, P, 2), r"parts of shape \(5,\), this one of parts of shape \(5, 2\)"),
    ],
)
def test_a_saved_state_with_other_parts_changes_nothing(saved, here, message):
    def with_parts(shape: tuple[int, ...] | None, seed: int) -> SoftConfidentWeighter:
        torch.manual_seed(seed)
        parts = None if shape is None else torch.rand(shape)
        return SoftConfidentWeighter(prior=torch.rand(N), part_prior=parts)

    source, weighter = with_parts(saved, 1), with_parts(here, 2)
    model = a_model()
    before = copy.deepcopy(weighter.state_dict())
    del before["_extra_state"]
    optimizer = wrapped(model, weighter)
    settings = optimizer.param_groups[0]["lr"]
    source_optimizer = wrapped(a_model(), source)
    source_optimizer.param_groups[0]["lr"] = 7.0
    for load in (
        lambda: weighter.load_state_dict(source.state_dict()),
        lambda: optimizer.load_state_dict(source_optimizer.state_dict()),
    ):
        with pytest.raises(ValueError, match=message):
            load()
    after = {name: weighter.state_dict()[name] for name in before}
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    assert optimizer.param_groups[0]["lr"] == settings


# --- training


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(P, 2), nn.Linear(2, P))


def trained_for(
    epochs: int, data: torch.Tensor, model: nn.Module, optimizer: CoMetOptimizerWrapper
) -> dict[str, torch.Tensor]:
    """Batches of ten in order; part weights where there are some."""
    weighter = optimizer.weighter
    for index in list(torch.arange(len(data)).split(10)) * epochs:
        losses = (model(data[index]) - data[index]).square()
        if weighter is not None and weighter.has_parts:
            losses = weighter.part_weights(index) * losses
        optimizer.zero_grad()
        optimizer.objective(losses.mean(dim=1), index).backward()
        optimizer.step()
    return model.state_dict()


def wrapped(model: nn.Module, weighter: SoftConfidentWeighter | None) -> CoMetOptimizerWrapper:
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    return CoMetOptimizerWrapper(adam, weighter=weighter)


def test_a_contamination_of_zero_is_plain_training_bit_for_bit():
    data, scores = torch.randn(N, P), some_scores()
    weighter = weighter_of(scores, contamination=0.0)
    assert (weighter.part_weights() == 1).all()
    assert (weighter.mean_weights() == 1).all()
    plain, at_zero, by_default = (
        trained_for(2, data, model, wrapped(model, own))
        for model, own in [(a_model(), own) for own in (None, weighter, weighter_of(scores))]
    )
    assert all(torch.equal(plain[name], at_zero[name]) for name in plain)
    assert not all(torch.equal(plain[name], by_default[name]) for name in plain)


def test_a_resumed_training_ends_in_the_same_bits():
    data, scores = torch.randn(N, P), some_scores()
    model = a_model()
    whole = copy.deepcopy(trained_for(3, data, model, wrapped(model, weighter_of(scores))))
    model = a_model()
    optimizer = wrapped(model, weighter_of(scores))
    trained_for(1, data, model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model = a_model()
    # The state brings the part weights: those of other scores are overwritten.
    optimizer = wrapped(model, weighter_of(some_scores(1)))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    again = trained_for(2, data, model, optimizer)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


PLANE = torch.randn(2, 10, generator=torch.Generator().manual_seed(99))


def faulty_rows(seed: int, count: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a plane, of which the first ones have two of ten columns off; which they are."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 2, generator=generator) @ PLANE
    rows += 0.3 * torch.randn(count, 10, generator=generator)
    bad = torch.arange(count) < share * count
    rows[bad, :2] += 8 * torch.randn(int(bad.sum()), 2, generator=generator)
    return rows, bad


def detection(
    rows: torch.Tensor, part_weights: torch.Tensor, weighter: SoftConfidentWeighter, seed: int
) -> float:
    """AUROC of an autoencoder's errors on other rows, after a training on these."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 2), nn.Linear(2, 10))
    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    optimizer = CoMetOptimizerWrapper(adam, weighter=weighter)
    for _ in range(80):
        losses = part_weights * (model(rows) - rows).square()
        optimizer.zero_grad()
        optimizer.objective(losses.mean(dim=1), torch.arange(len(rows))).backward()
        optimizer.step()
    test, bad = faulty_rows(seed + 50, 400, share=0.5)
    with torch.no_grad():
        return roc_auc_score(bad, (model(test) - test).square().mean(dim=1))


def test_a_twentieth_of_the_values_holds_more_that_is_bad_than_a_twentieth_of_the_rows():
    """A fifth of the rows has two bad columns of ten: 4 % of the values."""
    by_value, by_row, shuffled = [], [], []
    for seed in (0, 1):
        rows, bad = faulty_rows(seed, 100, share=0.2)
        scores, value_scores = RowScorer(draws=32).score_parts(rows)
        values = SoftConfidentWeighter(prior=scores, part_prior=value_scores)
        whole = SoftConfidentWeighter(prior=scores)
        part_weights = values.part_weights()
        assert (1 - part_weights[bad, :2]).mean() > 10 * (1 - part_weights[~bad]).mean()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        by_value.append(detection(rows, part_weights, values, seed))
        by_row.append(detection(rows, torch.ones_like(rows), whole, seed))
        shuffled.append(detection(rows, part_weights[order], values, seed))
    assert min(by_value) > 0.97
    assert np.mean(by_value) > np.mean(by_row) + 0.05
    assert np.mean(by_value) > np.mean(shuffled) + 0.2
