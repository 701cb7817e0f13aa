"""What the scores prove of bad samples: golden values, clean sets, power, and odd scores."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator
from scipy.optimize import brentq
from scipy.stats import chi2_contingency

from comet_meta import SoftConfidentWeighter
from comet_meta.weights.contamination import (
    NO_EVIDENCE,
    Contamination,
    _removable,
    count_values,
    excess,
    proven_contamination,
)
from comet_meta.weights.rules import Weighting, estimate_contamination, standardize, trimmed_weights

TWENTIETH, TENTH = 0.05, 0.1


def double(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def likelihood_ratio(n1: float, n2: float, n3: float) -> float:
    """The G statistic of reached and not reached, from m to a and from a to b."""
    table = [[n2 + n3, n1], [n3, n2]]
    found = chi2_contingency(table, correction=False, lambda_="log-likelihood")
    return float(found.statistic)


def with_bad(count: int, share: float, far: float, seed: int) -> torch.Tensor:
    """Normal scores (N,), of which the first ones, a share of them, lie `far` higher."""
    scores = np.random.default_rng(seed).normal(size=count)
    scores[: round(share * count)] += far
    return torch.from_numpy(scores)


# The test of two shares.


@pytest.mark.parametrize(
    "counts", [(50, 10, 30), (100, 20, 6), (1000, 5, 400), (3, 2, 5), (80.5, 20.25, 40.75)]
)
def test_excess_is_the_root_of_the_likelihood_ratio(counts):
    n1, n2, n3 = counts
    assert n3 / (n2 + n3) > (n2 + n3) / (n1 + n2 + n3)
    expected = math.sqrt(likelihood_ratio(*counts))
    assert float(excess(*double(*counts))) == pytest.approx(expected, rel=1e-9)


def test_excess_by_hand():
    # r1 = 4 / 8 and r2 = 3 / 4, together 7 / 12: 2 [8 ln .5 + 3 ln .75 + ln .25 - 7 ln 7/12 - ...].
    ratio = 8 * math.log(0.5) + 3 * math.log(0.75) + math.log(0.25)
    ratio -= 7 * math.log(7 / 12) + 5 * math.log(5 / 12)
    assert float(excess(*double(4, 1, 3))) == pytest.approx(math.sqrt(2 * ratio), rel=1e-12)


@pytest.mark.parametrize("counts", [(50, 10, 2), (60, 30, 30), (0, 0, 0), (5, 0, 0), (0, 7, 3)])
def test_there_is_no_excess_where_the_tail_thins_out_as_fast_as_before(counts):
    assert float(excess(*double(*counts))) == 0


@settings(max_examples=100, deadline=None)
@given(
    n1=st.integers(0, 500), n2=st.integers(0, 500), n3=st.integers(0, 500), more=st.integers(1, 99)
)
def test_excess_is_finite_and_grows_with_the_samples_above(n1, n2, n3, more):
    before, after = (float(excess(*double(n1, n2, n))) for n in (n3, n3 + more))
    assert 0 <= before <= after + 1e-6
    assert math.isfinite(after)


def test_as_many_can_be_removed_as_until_the_shares_are_equal():
    # n1 = 80, n2 = 20: n3 / (20 + n3) = (20 + n3) / (100 + n3) at n3 = 400 / 60.
    found = _removable(*double(80, 20, 30), 0.0)
    assert float(found) == pytest.approx(30 - 400 / 60, abs=1e-4)


def test_the_lower_bound_leaves_an_excess_of_four_standard_errors():
    left = brentq(lambda n3: likelihood_ratio(80, 20, n3) - 16, 400 / 60, 120)
    found = _removable(*double(80, 20, 120), 4.0)
    assert float(found) == pytest.approx(120 - left, abs=1e-4)
    assert 0 < float(found) < float(_removable(*double(80, 20, 120), 0.0))
    assert float(_removable(*double(80, 20, 9), 4.0)) == 0  # r2 > r1, by less than that


# Clean sets.


def neighbour_distances(generator: Generator, count: int) -> np.ndarray:
    """Distances (N,) of Gaussian rows to their nearest neighbours among 400 others."""
    rows, memory = generator.normal(size=(count, 8)), generator.normal(size=(400, 8))
    squared = (rows**2).sum(1)[:, None] + (memory**2).sum(1) - 2 * rows @ memory.T
    return np.sqrt(np.partition(squared, 3, axis=1)[:, :3].clip(0)).mean(1)


CLEAN: dict[str, Callable[[Generator, int], np.ndarray]] = {
    "normal": lambda g, n: g.normal(size=n),
    "exponential": lambda g, n: g.gamma(1, size=n),
    "gamma 9": lambda g, n: g.gamma(9, size=n),
    "chi2 1": lambda g, n: g.chisquare(1, size=n),
    "chi2 5": lambda g, n: g.chisquare(5, size=n),
    "lognormal 0.1": lambda g, n: g.lognormal(0, 0.1, size=n),
    "lognormal 0.6": lambda g, n: g.lognormal(0, 0.6, size=n),
    "Gumbel": lambda g, n: g.gumbel(size=n),
    "Weibull 2": lambda g, n: g.weibull(2, size=n),
    "beta 2 5": lambda g, n: g.beta(2, 5, size=n),
    "mean of squares": lambda g, n: (g.normal(size=(n, 4)) ** 2).mean(1),
    "neighbours": neighbour_distances,
}
DRAWS = {50: 100, 200: 100, 1000: 100, 10_000: 20}  # fewer of the large sets, for time


def rounded(scores: np.ndarray) -> np.ndarray:
    """Scores as integers, of which ten lie between the first and the last hundredth."""
    low, high = np.quantile(scores, [0.01, 0.99])
    return np.round(10 * (scores - low) / (high - low))


@pytest.mark.parametrize("integers", [False, True], ids=["", "rounded"])
@pytest.mark.parametrize("count", DRAWS)
@pytest.mark.parametrize("kind", CLEAN)
def test_clean_sets_lose_no_more_than_a_tenth_in_any_draw(kind, count, integers):
    means = []
    for seed in range(DRAWS[count]):
        scores = CLEAN[kind](np.random.default_rng(seed), count)
        if integers:
            scores = rounded(scores)
            assert 5 <= len(np.unique(scores)) <= 50
        means.append(float(trimmed_weights(torch.from_numpy(scores)).weights.mean()))
    assert np.mean(means) >= 0.93
    assert min(means) >= 0.9, f"draws {[seed for seed, mean in enumerate(means) if mean < 0.9]}"


@pytest.mark.slow
@pytest.mark.parametrize("integers", [False, True], ids=["", "rounded"])
@pytest.mark.parametrize("kind", CLEAN)
def test_a_million_clean_scores_lose_no_more_than_a_tenth(kind, integers):
    scores = CLEAN[kind](np.random.default_rng(0), 10**6 if kind != "neighbours" else 10**5)
    if integers:
        scores = rounded(scores)
    assert float(trimmed_weights(torch.from_numpy(scores)).weights.mean()) >= 0.93


# Bad samples that stand out.


def found_in(count: int, share: float, far: float) -> list[Contamination]:
    return [estimate_contamination(with_bad(count, share, far, seed)) for seed in range(100)]


@pytest.mark.parametrize(
    ("count", "share", "far", "least", "often"),
    [
        # Of 400, in some draws the bound is lower: a few of the best ones touch the bad ones.
        (400, 0.1, 6.0, 0.03, 90),
        (2000, 0.1, 6.0, 0.07, 100),
        (2000, 0.2, 5.0, 0.1, 100),
    ],
)
def test_bad_samples_that_stand_out_are_proven(count, share, far, least, often):
    found = found_in(count, share, far)
    assert sum(each.low > least for each in found) >= often
    assert min(each.low for each in found) > 0
    assert max(each.low for each in found) <= share
    for low, middle, high in ((each.low, each.estimate, each.high) for each in found):
        assert low <= middle <= high
    # By the estimate about as many are bad as there are.
    assert np.mean([each.estimate for each in found]) == pytest.approx(share, rel=0.15)


def test_more_samples_prove_more():
    quantiles = [torch.linspace(0.5 / n, 1 - 0.5 / n, n).double() for n in (90, 900, 9000)]
    lows = []
    for each in quantiles:
        bad = 5 + each[:: len(each) // (len(each) // 9)]
        lows.append(estimate_contamination(torch.cat([torch.special.ndtri(each), bad])).low)
    assert lows == sorted(lows)
    assert lows[0] < lows[1] < lows[2] < 0.11


def test_the_sentence_has_the_figures():
    assert str(NO_EVIDENCE) == "no evidence of bad samples"
    found = Contamination(0.123, 0.084, 0.151)
    assert str(found) == "about 12 % (8 to 15 %) of the samples look bad"


def test_without_evidence_there_is_no_upper_bound():
    estimate_, low, high = estimate_contamination(
        torch.randn(200, generator=torch.Generator().manual_seed(0))
    )
    assert (estimate_, low) == (0, 0)
    assert math.isnan(high)


# Invariances.


sets = st.builds(
    # On a grid, so that scaling by a power of two and shifting are exact.
    lambda count, share, seed: (with_bad(count, share, 7.0, seed) * 64).round(),
    count=st.integers(60, 500),
    share=st.sampled_from([0.0, 0.1, 0.2, 0.3]),
    seed=st.integers(0, 999),
)


@settings(max_examples=40, deadline=None)
@given(scores=sets, seed=st.integers(0, 99))
def test_a_permutation_changes_nothing(scores, seed):
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    assert str(estimate_contamination(scores[order])) == str(estimate_contamination(scores))
    assert estimate_contamination(scores[order])[:2] == estimate_contamination(scores)[:2]
    moved, kept = trimmed_weights(scores[order]), trimmed_weights(scores)
    assert torch.equal(moved.weights, kept.weights[order])
    assert torch.equal(moved.p_bad, kept.p_bad[order])


@settings(max_examples=40, deadline=None)
@given(
    scores=sets,
    scale=st.sampled_from([2.0**-20, 0.5, 2.0**20]),
    shift=st.integers(-(2**20), 2**20),
)
def test_offset_and_scale_change_nothing(scores, scale, shift):
    moved = scale * (scores + shift)
    assert estimate_contamination(moved)[:2] == estimate_contamination(scores)[:2]
    assert torch.equal(trimmed_weights(moved).weights, trimmed_weights(scores).weights)


@settings(max_examples=40, deadline=None)
@given(scores=sets, scale=st.floats(1e-6, 1e6), shift=st.floats(-1e3, 1e3))
def test_offset_and_scale_with_rounding_change_next_to_nothing(scores, scale, shift):
    moved = scale * (scores + shift)
    assert estimate_contamination(moved).low == pytest.approx(
        estimate_contamination(scores).low, abs=1e-4
    )


@pytest.mark.parametrize(("share", "far"), [(0.0, 0.0), (0.1, 5.0), (0.3, 6.0)])
def test_a_histogram_of_many_scores_tells_what_the_scores_tell(monkeypatch, share, far):
    scores = with_bad(20_000, share, far, seed=0)
    scores[-1] = 1e6  # one stray score must not make all others share a bin
    binned, weights = estimate_contamination(scores), trimmed_weights(scores).weights
    monkeypatch.setattr("comet_meta.weights.contamination.EXACT_SAMPLES", 10**6)
    assert binned.low == pytest.approx(estimate_contamination(scores).low, abs=0.005)
    assert binned.estimate == pytest.approx(estimate_contamination(scores).estimate, abs=0.005)
    assert (binned.low > 0.5 * share) == (share > 0)
    assert float((weights - trimmed_weights(scores).weights).abs().mean()) < 0.005


def test_a_histogram_counts_every_score_close_to_its_value():
    x = standardize(torch.randn(20_000, generator=torch.Generator().manual_seed(0)).double())
    values, counts = count_values(x)
    assert values.dtype == counts.dtype == torch.float64
    assert len(values) < 8193 < len(x)
    assert counts.sum() == len(x)
    each = values.repeat_interleave(counts.long())
    torch.testing.assert_close(each, x.sort().values, rtol=0, atol=3e-3 * float(1 + x.abs().max()))


# What is left out.


def removed(weighting: Weighting) -> float:
    return float((1 - weighting.weights).sum())


@settings(max_examples=60, deadline=None)
@given(scores=sets)
def test_by_default_what_is_proven_and_a_twentieth_is_left_out(scores):
    low, count = estimate_contamination(scores).low, len(scores)
    found = trimmed_weights(scores)
    assert removed(found) <= (low + TWENTIETH) * count + 1
    assert removed(found) == pytest.approx(min(low + TWENTIETH, 0.5) * count, abs=1e-6)
    assert float(found.p_bad.sum()) == pytest.approx(low * count, abs=1e-6)
    assert bool((found.p_bad <= 1 - found.weights + 1e-12).all())


@settings(max_examples=60, deadline=None)
@given(scores=sets, share=st.floats(0.001, 0.39))
def test_of_a_given_share_that_and_a_tenth_is_left_out(scores, share):
    found, count = trimmed_weights(scores, share), len(scores)
    assert removed(found) == pytest.approx((share + TENTH) * count, abs=1e-6)
    assert float(found.p_bad.sum()) == pytest.approx(share * count, abs=1e-6)
    assert bool((found.p_bad <= 1 - found.weights + 1e-12).all())


@settings(max_examples=60, deadline=None)
@given(scores=sets, share=st.sampled_from(["auto", 0.07]), precaution=st.floats(0, 0.42))
def test_a_precaution_is_left_out_in_place_of_the_default(scores, share, precaution):
    weighter = SoftConfidentWeighter(
        prior=scores.float(), contamination=share, precaution=precaution
    )
    low = weighter.contamination_.low if share == "auto" else share
    left_out = min(low + precaution, 0.5) * len(scores)
    assert float((1 - weighter()).sum()) == pytest.approx(left_out, rel=1e-4, abs=1e-3)
    assert float(weighter.p_bad.sum()) == pytest.approx(low * len(scores), rel=1e-4, abs=1e-3)
    weighter.fit()
    assert float((1 - weighter()).sum()) == pytest.approx(left_out, rel=1e-4, abs=1e-3)


@settings(max_examples=20, deadline=None)
@given(scores=sets)
def test_a_contamination_of_zero_leaves_nobody_out(scores):
    found = trimmed_weights(scores, 0.0)
    assert torch.equal(found.weights, torch.ones_like(scores))
    assert torch.equal(found.p_bad, torch.zeros_like(scores))
    assert found.threshold == scores.max()


def test_of_more_than_half_nothing_is_left_out():
    assert removed(trimmed_weights(torch.arange(200.0), 0.49)) == pytest.approx(100)


def test_weights_by_rank_by_hand():
    # 0.1 and a tenth: w is 0 up to rank 15 of 100 from the top, 1 from rank 25 on; the sample
    # between the ranks 19 and 20 loses what the ramp has at 19.5: (25 - 19.5) / 10.
    scores = torch.arange(100.0).double()
    weights = trimmed_weights(scores, 0.1).weights.flip(0)
    assert weights[:15].tolist() == pytest.approx([0] * 15, abs=1e-9)
    assert weights[25:].tolist() == [1] * 75
    assert weights[15:25].tolist() == pytest.approx([0.05 + 0.1 * k for k in range(10)])
    # P(bad) of the same by the 0.1 alone: 1 up to 7.5, 0 from 12.5 on.
    bad = trimmed_weights(scores, 0.1).p_bad.flip(0)
    assert bad[:7].tolist() == pytest.approx([1] * 7)
    assert float(bad[9]) == pytest.approx((12.5 - 9.5) / 5)
    assert bad[13:].tolist() == [0] * 87


# Ties and other odd scores.


_LOW, _HIGH = 1.0, float(np.nextafter(1.0, 2.0))
TIED: dict[str, list[float]] = {
    "two values, few high": [0.0] * 90 + [1.0] * 10,
    "two values, half high": [0.0] * 50 + [1.0] * 50,
    "two values, most high": [0.0] * 10 + [1.0] * 90,
    "one ulp apart": [_LOW] * 90 + [_HIGH] * 10,
    "two values, many": [0.0] * 45_000 + [1.0] * 5_000,
    "three values": [0.0] * 45 + [1.0] * 45 + [2.0] * 10,
    "integers": [float(k % 7) for k in range(200)],
}


@pytest.mark.parametrize("kind", TIED)
def test_tied_scores_share_what_is_left_out_and_prove_nothing(kind):
    scores = torch.tensor(TIED[kind], dtype=torch.float64)
    found = trimmed_weights(scores)
    assert estimate_contamination(scores).low == 0
    assert removed(found) == pytest.approx(TWENTIETH * len(scores))
    for value in scores.unique():
        assert len(found.weights[scores == value].unique()) == 1
    # More samples are tied at the top than may be left out: none of them has lost all weight.
    assert float(found.weights.min()) > 0.4
    assert float(found.p_bad.max()) == 0


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("kind", TIED)
def test_tied_scores_lose_a_given_share_and_no_more(kind, share):
    scores = torch.tensor(TIED[kind], dtype=torch.float64)
    found = trimmed_weights(scores, share)
    assert removed(found) == pytest.approx((share + TENTH) * len(scores))
    assert float(found.p_bad.sum()) == pytest.approx(share * len(scores))


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.integers(-3, 12), min_size=8, max_size=200).filter(lambda v: len(set(v)) > 1)
)
def test_no_scores_lose_more_than_is_proven_and_a_twentieth(values):
    scores = torch.tensor(values, dtype=torch.float64)
    found, low = trimmed_weights(scores), estimate_contamination(scores).low
    assert removed(found) <= (low + TWENTIETH) * len(scores) + 1e-6
    assert bool(((found.weights >= 0) & (found.weights <= 1)).all())
    assert bool((found.weights[scores.argsort()].diff() <= 1e-12).all())


def test_half_of_the_scores_at_zero_as_of_a_rectifier_prove_nothing():
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=1000)).relu()
    assert estimate_contamination(scores).low == 0
    assert removed(trimmed_weights(scores)) == pytest.approx(50)


def test_one_outlier_proves_nothing_and_loses_its_weight():
    scores = torch.cat([torch.zeros(99), torch.tensor([1e6])]).double()
    found = trimmed_weights(scores)
    assert found.weights[99] == 0
    assert removed(found) == pytest.approx(5)
    assert float(found.weights[:99].min()) > 0.95


@pytest.mark.parametrize(
    "scores", [torch.full((50,), 3.0), torch.tensor([0.0, 1, 2, 1, 0.5, 99, 1.5]), torch.ones(1)]
)
def test_equal_or_fewer_than_eight_scores_tell_nothing(scores):
    weighter = SoftConfidentWeighter(len(scores))
    weighter.fit(scores)
    assert weighter().tolist() == [1] * len(scores)
    assert weighter.p_bad.tolist() == [0] * len(scores)
    assert str(weighter.contamination_) == "no evidence of bad samples"


def test_fewer_than_three_values_prove_nothing():
    values, counts = torch.tensor([[-1.0, 5.0], [90.0, 10.0]]).double()
    assert proven_contamination(values, counts) is NO_EVIDENCE


# The weighter.


def test_the_weighter_says_what_the_scores_prove_whatever_it_was_told():
    scores = with_bad(1000, 0.2, 6.0, seed=0)
    told = SoftConfidentWeighter(1000, contamination=0.3)
    for weighter in (SoftConfidentWeighter(1000), told, SoftConfidentWeighter(1000, rule="hard")):
        weighter.fit(scores)
        assert weighter.contamination_ == estimate_contamination(scores.float())
        assert 0.1 < weighter.contamination_.low < 0.2
    assert float(told().mean()) == pytest.approx(0.6, abs=1e-4)
    assert float(told.p_bad.mean()) == pytest.approx(0.3, abs=1e-4)


def test_the_evidence_is_read_from_the_prior_and_from_the_samples_that_have_scores():
    prior = with_bad(1000, 0.1, 6.0, seed=0).float()
    weighter = SoftConfidentWeighter(prior=prior)
    weighter.fit(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert weighter.contamination_ == estimate_contamination(prior)
    streaming = SoftConfidentWeighter(1500)
    streaming.update(torch.arange(1000), prior)
    assert streaming.contamination_ == estimate_contamination(prior)
    assert weighter.contamination_.low > 0
