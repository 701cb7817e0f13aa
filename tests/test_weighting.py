"""Weights: golden values, invariants, streaming, priors and settings."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_meta import SoftConfidentWeighter
from comet_meta.weights.rules import (
    ALWAYS_LEFT_OUT,
    LEFT_OUT_BESIDE_GIVEN,
    Weighting,
    estimate_contamination,
    hard_weights,
    iqr_threshold,
    quantile,
    ratio_weights,
    standardize,
    trimmed_weights,
)

NAMED = ("trimmed", "hard", "ratio")
AFFINE = ("trimmed", "hard")


def fitted(scores: torch.Tensor, rule: str = "trimmed", **settings: float) -> torch.Tensor:
    weighter = SoftConfidentWeighter(len(scores), rule=rule, **settings)
    weighter.fit(scores)
    return weighter()


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


def ramp(scores: np.ndarray, share: float) -> np.ndarray:
    """Weights of distinct scores by rank, the ramp integrated numerically over each rank."""
    count, steps = len(scores), 2000
    ranks = np.argsort(np.argsort(-scores))
    inside = (ranks[:, None] + (np.arange(steps) + 0.5) / steps) / count
    return np.clip((inside - 0.75 * share) / (0.5 * share), 0, 1).mean(1)


def test_the_trimmed_weights_equal_an_independent_count_of_ranks():
    generator = np.random.default_rng(0)
    scores = np.concatenate([generator.normal(0, 1, 400), generator.uniform(8, 12, 60)])
    tensor = torch.from_numpy(scores)
    low = estimate_contamination(tensor).low
    assert 0.05 < low < 60 / 460
    for weighting, bad, extra in (
        (trimmed_weights(tensor), low, ALWAYS_LEFT_OUT),
        (trimmed_weights(tensor, 0.3), 0.3, LEFT_OUT_BESIDE_GIVEN),
    ):
        np.testing.assert_allclose(weighting.weights, ramp(scores, bad + extra), atol=1e-4)
        np.testing.assert_allclose(weighting.p_bad, 1 - ramp(scores, bad), atol=1e-4)
        trusted = scores[ramp(scores, bad + extra) >= 0.5]
        assert float(weighting.threshold) == trusted.max()


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4])
def test_two_modes_are_separated_where_the_share_is_known(share):
    generator = torch.Generator().manual_seed(1)
    bad = int(share * 500)
    scores = torch.randn(500, generator=generator)
    scores[:bad] += 6
    found = trimmed_weights(scores, share)
    assert found.weights[:bad].mean() < 0.01
    assert float((1 - found.weights).sum()) == pytest.approx(bad + 50, abs=0.01)  # a tenth more
    assert found.p_bad[:bad].mean() > 0.9
    assert found.p_bad[bad:].mean() < 0.05


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_two_modes_are_told_apart_by_the_scores_alone(share):
    scores = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    bad = int(share * 2000)
    scores[:bad] += 6
    weights = fitted(scores)
    assert weights[:bad].mean() < 0.2
    assert weights[bad:].mean() > 0.95


@pytest.mark.parametrize("rule", NAMED)
def test_equal_or_too_few_scores_tell_nothing(rule):
    assert fitted(torch.full((50,), 3.0), rule).tolist() == [1] * 50
    assert fitted(torch.tensor([0.0, 1.0, 2.0, 1.0, 0.5, 99.0, 1.5]), rule).tolist() == [1] * 7


@pytest.mark.parametrize(
    "scores",
    [
        torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).square().sum(dim=1),
        (0.5 * torch.randn(500, generator=torch.Generator().manual_seed(0))).exp(),
        torch.randn(500, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["squared errors", "log-normal", "normal"],
)
def test_clean_scores_keep_their_weight_even_with_a_heavy_tail(scores):
    # A twentieth of them is left out, whatever the tail looks like.
    assert float(fitted(scores).mean()) == pytest.approx(0.95, abs=1e-4)


def test_bad_samples_stand_out_from_squared_errors():
    generator = torch.Generator().manual_seed(0)
    errors = torch.randn(500, generator=generator).square()
    errors[:50] = 15 + 15 * torch.rand(50, generator=generator)
    proven, told = fitted(errors), fitted(errors, contamination=0.1)
    assert proven[:50].mean() < 0.1
    assert proven[50:].mean() > 0.95
    assert told[:50].mean() < 0.01
    assert told[50:].mean() > 0.85


def test_streaming_equals_batch():
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0))
    batch = SoftConfidentWeighter(40)
    batch.fit(scores)
    streaming = SoftConfidentWeighter(40)
    for index in torch.randperm(40).split(7):
        streaming.update(index, scores[index])
    assert torch.equal(streaming(), batch())
    assert torch.equal(streaming.threshold, batch.threshold)


def test_streaming_grows_with_a_data_set_of_unknown_size():
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0))
    streaming = SoftConfidentWeighter()
    for index in torch.arange(40).split(8):
        streaming.update(index, scores[index])
    streaming.fit()
    batch = SoftConfidentWeighter()
    batch.fit(scores)
    assert torch.equal(streaming(), batch())


def test_never_seen_samples_have_weight_one_and_rank_last():
    weighter = SoftConfidentWeighter(20, rule="hard")
    weighter.update(torch.arange(10), torch.tensor([1.0] * 4 + [1.1] * 5 + [9.0]))
    weighter.fit()
    assert weighter(torch.arange(10, 20)).tolist() == [1] * 10
    assert weighter().tolist().count(0) == 1
    assert weighter.ranking(1).tolist() == [9]
    assert sorted(weighter.ranking()[-10:].tolist()) == list(range(10, 20))


def test_who_reads_during_a_fit_finds_the_weights_of_the_last():
    seen = []

    def rule(scores):
        seen.append(weighter())
        return (scores < 15).float()

    weighter = SoftConfidentWeighter(20, rule=rule)
    for _ in range(2):
        weighter.update(torch.arange(18), torch.arange(18.0))  # two samples stay unseen
        weighter.fit()
    assert seen[0].tolist() == [1.0] * 20
    assert seen[1].tolist() == [1.0] * 15 + [0.0] * 3 + [1.0] * 2


def test_momentum_keeps_a_share_of_the_old_score():
    weighter = SoftConfidentWeighter(10, momentum=0.75)
    weighter.fit(torch.full((10,), 4.0))
    weighter.fit(torch.full((10,), 8.0))
    assert weighter.scores.tolist() == [5.0] * 10  # 0.75 * 4 + 0.25 * 8


def test_ranking_puts_the_least_confident_first_and_breaks_ties_by_score():
    scores = torch.tensor([1.0, 8.0, 1.5, 1.2, 9.0, 1.1, 1.7, 1.3, 1.6, 1.4])
    weighter = SoftConfidentWeighter(10, rule="hard")
    weighter.fit(scores)
    assert weighter.ranking(4).tolist() == [4, 1, 6, 8]
    assert len(weighter.ranking()) == 10


def test_a_rule_can_be_any_function():
    assert fitted(torch.arange(10.0), lambda s: (s < 5).float()).tolist() == [1] * 5 + [0] * 5
    with pytest.raises(ValueError, match="outside"):
        fitted(torch.arange(10.0), lambda s: s)


def test_state_survives_saving_also_into_a_weighter_of_unknown_size():
    saved = SoftConfidentWeighter(30)
    saved.fit(torch.randn(30))
    saved.update(torch.tensor([3, 4]), torch.tensor([0.1, 0.2]))
    for restored in (SoftConfidentWeighter(30), SoftConfidentWeighter()):
        restored.load_state_dict(saved.state_dict())
        assert torch.equal(restored.scores, saved.scores)
        assert torch.equal(restored(), saved())
        assert torch.equal(restored.threshold, saved.threshold)
        assert restored._updates == 2


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=50), q=st.floats(0, 1))
def test_quantile_equals_numpy(values, q):
    found = float(quantile(torch.tensor(values, dtype=torch.float64), q))
    assert found == pytest.approx(float(np.quantile(values, q)), abs=1e-6)


def test_a_prior_gives_weights_before_the_first_score():
    prior = torch.cat([torch.randn(90, generator=torch.Generator().manual_seed(0)), torch.ones(10)])
    prior[90:] += 8
    weighter = SoftConfidentWeighter(prior=prior, contamination=0.1)
    assert weighter.num_samples == 100
    assert weighter()[90:].max() < 0.01
    assert sorted(weighter.ranking(10).tolist()) == list(range(90, 100))


def test_prior_and_scores_count_alike_by_hand():
    # Median 2, mean absolute deviation (1 + 0 + 1 + 2 + ...) by hand for both.
    prior = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 2.0, 2.0, 2.0, 8.0])
    scores = torch.tensor([10.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0, 38.0])
    weighter = SoftConfidentWeighter(prior=prior)
    weighter.update([0, 8], scores[[0, 8]])
    weighter.fit(scores)
    # Prior: deviations from 2 are 2 1 0 1 2 0 0 0 6, mean 12 / 9; scores: from 20, 28 / 9.
    expected = (prior - 2) / (12 / 9) / 2 + (scores - 20) / (28 / 9) / 2
    torch.testing.assert_close(weighter.ranking_scores(), expected)


def test_weights_of_a_prior_stay_and_the_ranking_learns():
    prior = torch.cat([torch.linspace(0, 1, 40), torch.tensor([8.0, 9.0])])
    weighter = SoftConfidentWeighter(prior=prior)
    before = weighter(), weighter.p_bad.clone(), weighter.threshold.clone()
    assert weighter.ranking(2).tolist() == [41, 40]
    scores = torch.zeros(42)
    scores[[3, 40]] = torch.tensor([100.0, 50.0])
    weighter.fit(scores)
    after = weighter(), weighter.p_bad, weighter.threshold
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)
    assert weighter.ranking(2).tolist() == [3, 40]


def test_samples_without_a_score_are_judged_by_their_prior():
    prior = torch.arange(20.0)
    weighter = SoftConfidentWeighter(prior=prior)
    alone = weighter.ranking_scores()
    weighter.update(torch.arange(10), torch.arange(10.0))
    assert torch.equal(weighter.ranking_scores()[10:], alone[10:])
    assert not torch.equal(weighter.ranking_scores()[:10], alone[:10])


def test_the_prior_is_saved_and_restored():
    saved = SoftConfidentWeighter(prior=torch.randn(30))
    saved.fit(torch.randn(30))
    restored = SoftConfidentWeighter(prior=torch.zeros(30))
    restored.load_state_dict(saved.state_dict())
    assert torch.equal(restored.ranking_scores(), saved.ranking_scores())


def test_a_prior_that_does_not_fit_gets_a_sentence():
    with pytest.raises(ValueError, match="30 scores for 20 samples"):
        SoftConfidentWeighter(20, prior=torch.randn(30))
    with pytest.raises(ValueError, match="prior are NaN or infinite"):
        SoftConfidentWeighter(prior=torch.tensor([0.0, torch.nan]))
    with pytest.raises(TypeError, match="prior is"):
        SoftConfidentWeighter(prior=torch.arange(5))


def test_a_twentieth_is_left_out_where_nothing_is_proven():
    scores = torch.special.ndtri(torch.linspace(0.005, 0.995, 101))
    weights = fitted(scores)
    # 101 / 20 samples: from the top 3.8 without weight, from 6.3 on with all of it.
    assert weights[-3:].tolist() == [0] * 3
    assert weights[:-7].tolist() == [1] * 94
    assert float((1 - weights).sum()) == pytest.approx(101 / 20, abs=1e-4)


def test_a_known_share_finds_bad_samples_that_prove_nothing():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(400, generator=generator)
    bad = torch.arange(400) >= 280
    scores[bad] = 1.8 + 1.4 * scores[bad]  # half of them score like normal ones
    assert fitted(scores)[bad].mean() > 0.65
    told = fitted(scores, contamination=0.3)
    assert told[bad].mean() < 0.35
    assert told[~bad].mean() > 0.7


def test_few_good_samples_are_left_out_where_bad_ones_stand_apart():
    normal = torch.randn(1800, generator=torch.Generator().manual_seed(0))
    soft = trimmed_weights(torch.cat([normal, torch.linspace(8, 12, 200)]))
    assert soft.weights[:1800].mean() > 0.95
    assert soft.weights[1800:].mean() < 0.1
    assert soft.p_bad[:1800].mean() < 0.01
    assert soft.p_bad[1800:].mean() > 0.7


def test_a_histogram_of_many_scores_gives_the_weights_of_the_scores_themselves(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20_000, generator=generator)
    scores[:2000] += 5
    scores[0] = 1e6  # one stray score must not make all others share a bin
    binned = trimmed_weights(scores)
    assert 0.05 < float(binned.p_bad.mean()) < 0.1
    monkeypatch.setattr("comet_meta.weights.contamination.EXACT_SAMPLES", 10**6)
    exact = trimmed_weights(scores)
    # As many are left out, but for a few in a thousand; who is at the edge may gain or lose.
    assert float((binned.weights - exact.weights).abs().mean()) < 0.003
    assert float((binned.p_bad - exact.p_bad).abs().mean()) < 0.003


OUTLIER = torch.tensor([1.0, 2.0, 1.5, 1.2, 9.0, 1.1, 1.7, 1.3, 1.6, 1.4])


def test_rules_answer_in_the_type_of_the_scores():
    for rule in (hard_weights, ratio_weights, trimmed_weights):
        weighting = rule(OUTLIER.double())
        assert {part.dtype for part in weighting} == {torch.float64}
        assert torch.equal(weighting.p_bad, 1 - weighting.weights) or rule is trimmed_weights


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


def test_standardized_scores_that_are_equal_are_zero():
    assert standardize(torch.full((5,), 7.0)).tolist() == [0] * 5


def test_weights_change_once_as_many_scores_have_come_as_there_are_samples():
    weighter = SoftConfidentWeighter(10, rule="hard")
    weighter.update(torch.arange(6), OUTLIER[:6])
    assert weighter().tolist() == [1] * 10
    weighter.update(torch.arange(6, 10), OUTLIER[6:])
    assert weighter().tolist().count(0) == 1
    higher = OUTLIER.clone()
    higher[0] = 99
    for part in (torch.arange(3), torch.arange(3, 6), torch.arange(6, 9)):  # nine of ten
        weighter.update(part, higher[part])
        assert weighter().nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    weighter.update([9], higher[9:])
    assert (weighter() == 0).nonzero().flatten().tolist() == [0, 4]
    weighter.update([1], torch.tensor([1.9]))
    weighter.fit()  # by hand, which begins a new account
    assert weighter._updates == 0


def test_a_sample_never_seen_has_weight_one_whatever_it_had():
    weighter = SoftConfidentWeighter(20, rule="hard")
    weighter.weights.fill_(0.5)
    weighter.update(torch.arange(10), OUTLIER)
    weighter.fit()
    assert weighter()[10:].tolist() == [1] * 10
    assert weighter()[:10].tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]


def test_a_fit_without_any_score_leaves_all_weights_one():
    for weighter in (SoftConfidentWeighter(5), SoftConfidentWeighter()):
        weighter.fit()
        assert (weighter() == 1).all()
        assert weighter.threshold == torch.inf
        assert weighter.ranking().tolist() == list(range(len(weighter())))


def test_eight_scores_are_enough_and_equal_ones_forget_the_threshold():
    scores = torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 9.0])
    weighter = SoftConfidentWeighter(8, rule="hard")
    weighter.fit(scores)
    assert weighter().tolist() == [1] * 7 + [0]
    assert 1.6 < weighter.threshold < 9
    weighter.fit(torch.ones(8))
    assert weighter().tolist() == [1] * 8
    assert weighter.threshold == torch.inf


def test_asking_for_a_sample_makes_room_for_it():
    weighter = SoftConfidentWeighter()
    assert weighter([3, 5]).tolist() == [1, 1]
    assert len(weighter()) == len(weighter.scores) == 6
    assert weighter([0]).tolist() == [1]
    assert len(weighter()) == 6  # and never takes it back
    with pytest.raises(IndexError, match="out of range for 5 samples"):
        SoftConfidentWeighter(5)([5])


def test_all_weights_are_given_as_a_copy():
    weighter = SoftConfidentWeighter(5)
    weighter().zero_()
    assert weighter().tolist() == [1] * 5


def test_the_first_of_the_ranking_are_the_first_of_the_whole_ranking():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (30,), generator=generator).float()  # many equal ones
    scores[:3] = 40
    weighter = SoftConfidentWeighter(40, rule="hard")
    weighter.update(torch.arange(30), scores)
    weighter.fit()
    whole = weighter.ranking()
    assert weighter().tolist().count(0) == 3
    for k in range(45):
        assert torch.equal(weighter.ranking(k), whole[:k])
    by_hand = sorted(range(30), key=lambda i: (float(weighter()[i]), -float(scores[i]), i))
    assert whole.tolist() == [*by_hand, *range(30, 40)]


def test_samples_without_a_score_are_the_last_of_the_ranking_below_any_score():
    weighter = SoftConfidentWeighter(10)
    weighter.update([2, 5], torch.tensor([-1e30, -2e30]))
    weighter.fit()
    assert weighter.ranking().tolist() == [2, 5, 0, 1, 3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "rule",
    [
        lambda s: torch.ones(3),
        lambda s: torch.full_like(s, torch.nan),
        lambda s: torch.full_like(s, -0.1),
        lambda s: torch.full_like(s, 1.1),
    ],
)
def test_a_rule_that_gives_no_weights_is_refused(rule):
    with pytest.raises(ValueError, match=r"the rule returned shape .*for 10 scores"):
        fitted(OUTLIER, rule)


def test_the_threshold_of_a_rule_is_the_highest_score_that_is_trusted_by_half():
    weighter = SoftConfidentWeighter(10, rule=lambda s: 1 - s / 18)
    weighter.fit(OUTLIER)
    assert float(weighter.threshold) == 9  # of weight 1/2
    weighter = SoftConfidentWeighter(10, rule=lambda s: 1 - s / 17)
    weighter.fit(OUTLIER)
    assert float(weighter.threshold) == 2


def test_a_rule_may_give_the_full_result():
    p_bad = torch.linspace(0, 0.3, 10)
    weighter = SoftConfidentWeighter(
        10, rule=lambda s: Weighting((s < 5).float(), torch.tensor([4.0]), p_bad)
    )
    weighter.fit(OUTLIER)
    assert weighter.weights.tolist() == (OUTLIER < 5).float().tolist()
    assert torch.equal(weighter.p_bad, p_bad)
    assert float(weighter.threshold) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(3)}, "expected one weight in"),
        ({"weights": torch.full((10,), 1.5)}, "expected one weight in"),
        ({"p_bad": torch.full((10,), -0.1)}, r"expected one P\(bad\) in"),
        ({"p_bad": torch.zeros(9)}, r"expected one P\(bad\) in"),
        ({"threshold": torch.tensor(torch.nan)}, "returned the threshold"),
        ({"threshold": torch.ones(2)}, "returned the threshold"),
    ],
)
def test_a_rule_whose_full_result_is_wrong_is_refused(change, message):
    good = Weighting(torch.ones(10), torch.tensor(1.0), torch.zeros(10))
    with pytest.raises(ValueError, match=message):
        fitted(OUTLIER, lambda s: good._replace(**change))


def test_a_streamed_batch_is_what_all_processes_bring_together(monkeypatch):
    monkeypatch.setattr(
        "comet_meta.weights.weighter.distributed.gather_batches",
        lambda index, scores: (torch.cat([index, index + 4]), torch.cat([scores, -scores])),
    )
    weighter = SoftConfidentWeighter(8)
    weighter.update(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert weighter.scores.tolist() == [1, 2, 3, 4, -1, -2, -3, -4]
    assert weighter._updates == 0  # all eight have come


def test_scores_bring_no_graph_along():
    weighter = SoftConfidentWeighter(10, rule="hard")
    weighter.fit(OUTLIER.clone().requires_grad_())
    weighter.update([0], torch.ones(1, requires_grad=True))
    assert not weighter.scores.requires_grad
    assert not weighter().requires_grad


def test_the_settings_show():
    def tame(scores):
        return torch.ones_like(scores)

    shown = repr(SoftConfidentWeighter(3, rule="hard", momentum=0.5))
    assert shown == "SoftConfidentWeighter(num_samples=3, rule='hard', momentum=0.5)"
    assert "rule='tame'" in repr(SoftConfidentWeighter(rule=tame))


def test_a_small_prior_goes_with_its_own_number_of_samples():
    prior = torch.linspace(0, 1, 10, dtype=torch.float64, requires_grad=True)
    weighter = SoftConfidentWeighter(10, prior=prior)
    assert weighter.prior.dtype == torch.float32
    assert not weighter.prior.requires_grad
    assert torch.equal(weighter.ranking_scores(), standardize(prior.detach().float()))


def test_the_bounds_of_the_settings():
    for options in ({"kappa": 0.0}, {"contamination": 0.0}, {"momentum": 0.0}, {"num_samples": 1}):
        SoftConfidentWeighter(**options)
    for options, message in (
        ({"kappa": -0.1}, "kappa is -0.1; expected >= 0"),
        ({"kappa": float("nan")}, "kappa is nan"),
        ({"contamination": 0.5}, "contamination is 0.5; expected a share in"),
        ({"contamination": -0.1}, "contamination is -0.1"),
        ({"contamination": float("nan")}, "contamination is nan"),
        ({"contamination": "some"}, "contamination is 'some'"),
        ({"precaution": 0.6}, "precaution is 0.6; expected a fraction in"),
        ({"precaution": -0.1}, "precaution is -0.1"),
        ({"precaution": float("nan")}, "precaution is nan"),
        ({"precaution": "auto"}, "precaution is 'auto'"),
        ({"precaution": 0.1, "rule": "hard"}, "precaution goes with rule='trimmed'"),
        ({"momentum": 1.0}, "momentum is 1.0; expected a share in"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"num_samples": 0}, "num_samples is 0; expected"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            SoftConfidentWeighter(**options)


def test_the_ranking_goes_by_the_score_whatever_the_rule_says():
    weighter = SoftConfidentWeighter(10, rule=lambda s: (s >= 5) * 0.5)
    weighter.fit(torch.arange(10.0))
    assert weighter.ranking().tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert weighter.ranking(3).tolist() == [9, 8, 7]


def test_what_a_rule_computes_leaves_no_graph():
    scale = torch.ones((), requires_grad=True)
    weighter = SoftConfidentWeighter(10, rule=lambda s: scale * (s < 5))
    weighter.fit(torch.arange(10.0))
    assert not weighter.weights.requires_grad
    assert not weighter.threshold.requires_grad


def test_streamed_scores_that_are_not_finite_are_refused():
    weighter = SoftConfidentWeighter(20)
    with pytest.raises(ValueError, match="1 of 2 scores are NaN or infinite"):
        weighter.update([0, 1], torch.tensor([1.0, torch.nan]))
    with pytest.raises(TypeError, match="floating-point"):
        weighter.update([0, 1], torch.tensor([1, 2]))
