"""How many samples are bad, from a look at a few of them."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comet_meta import choose_for_review, share_from_review
from comet_meta.weights.review import ranks_to_review, share_of_strata, strata

counts = st.lists(
    st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(0, 300)).map(
        lambda some: (max(some), sorted(some)[1], min(some))
    ),
    min_size=1,
    max_size=5,
)


@given(st.integers(1, 5000))
def test_the_strata_hold_every_rank_once(count):
    assert [rank for ranks in strata(count) for rank in ranks] == list(range(count))


@given(st.integers(1, 5000), st.integers(7, 200))
def test_as_many_are_looked_at_as_asked(count, looks):
    parts, chosen = strata(count), ranks_to_review(count, looks)
    together = [rank for some in chosen for rank in some]
    assert len(together) == min(looks, count)
    assert together == sorted(set(together))
    assert all(set(some) <= set(ranks) for some, ranks in zip(chosen, parts, strict=True))
    assert all(chosen)


def test_more_looks_go_to_the_ranks_where_the_bad_are():
    looks = [len(some) for some in ranks_to_review(444)]
    assert looks == [1, 3, 6, 6, 9, 13, 22]
    parts = [
        len(some) / len(ranks)
        for some, ranks in zip(ranks_to_review(444), strata(444), strict=True)
    ]
    assert parts[2:4] == pytest.approx([0.3, 0.3], abs=0.04)
    assert parts[0] > parts[1] > parts[2] > parts[4] > parts[5] > parts[6]


def test_of_few_samples_all_are_looked_at_and_nothing_is_open():
    scores = torch.arange(50.0)
    look_at = choose_for_review(scores)
    assert look_at.tolist() == list(range(49, -1, -1))
    assert share_from_review(scores, look_at, look_at > 42) == pytest.approx((0.14, 0.14, 0.14))


def wilson(share, looks, z=1.959964):
    half = z * math.sqrt(share * (1 - share) / looks + z**2 / (4 * looks**2))
    middle = share + z**2 / (2 * looks)
    return (middle - half) / (1 + z**2 / looks), (middle + half) / (1 + z**2 / looks)


def test_the_interval_of_one_stratum_is_wilsons():
    # Drawn from very many, all looks are at random.
    share, low, high = share_of_strata([(10**9, 10, 2)])
    assert share == 0.2
    assert (low, high) == pytest.approx(wilson(0.2, 10), abs=1e-6)
    assert (low, high) == pytest.approx((0.0567, 0.5098), abs=1e-4)  # of tables


def test_the_interval_of_two_strata_by_hand():
    # Halves of very many, 2 of 10 and 0 of 10: q = 2.5/11 and 0.5/11, mean 1.5/11.
    variance = (2.5 * 8.5 + 0.5 * 10.5) / 121 / 10 / 4
    looks = 1.5 * 9.5 / 121 / variance
    assert looks == pytest.approx(21.509, abs=1e-3)
    share, low, high = share_of_strata([(10**9, 10, 2), (10**9, 10, 0)])
    assert share == pytest.approx(0.1)
    assert (low, high) == pytest.approx(wilson(0.1, looks), abs=1e-6)


@given(counts)
def test_the_interval_holds_the_share_and_what_was_seen(found):
    share, low, high = share_of_strata(found)
    total = sum(size for size, _, _ in found)
    assert 0 <= low <= share + 1e-12
    assert share <= high + 1e-12 <= 1 + 2e-12
    assert low * total >= sum(bad for _, _, bad in found) - 1e-6
    assert (1 - high) * total >= sum(looks - bad for _, looks, bad in found) - 1e-6


@given(counts, st.data())
def test_one_more_bad_sample_raises_share_and_interval(found, data):
    which = data.draw(st.integers(0, len(found) - 1))
    size, looks, bad = found[which]
    if bad == looks:
        return
    more = [*found]
    more[which] = (size, looks, bad + 1)
    before, after = share_of_strata(found), share_of_strata(more)
    assert after[0] > before[0]
    assert after[1] >= before[1] - 1e-9
    assert after[2] >= before[2] - 1e-9


@pytest.mark.parametrize(
    "others",
    [
        lambda bad: [(20, 16, bad), (16, 1, 0)],
        lambda bad: [(20, 2, 2), (194, 192, bad)],
        lambda bad: [(40, 1, 0), (215, 192, bad), (17, 10, 0)],
        lambda bad: [(40, 33, bad), (13, 1, 1)],
    ],
)
def test_the_interval_rises_where_few_looks_stand_for_many_samples(others):
    # Wilson's upper bound of so many effective looks falls there: .5488, .5485 with one more.
    looks = max(looks for _, looks, _ in others(0))
    found = [share_of_strata(others(bad)) for bad in range(looks + 1)]
    for before, after in itertools.pairwise(found):
        assert all(b >= a - 1e-12 for a, b in zip(before, after, strict=True))


@given(st.integers(8, 20_000), st.integers(8, 120), st.data())
def test_the_interval_of_a_chosen_sample_is_wilsons_of_its_effective_looks(count, looks, data):
    found = [
        (len(ranks), len(seen), data.draw(st.integers(0, len(seen))))
        for ranks, seen in zip(strata(count), ranks_to_review(count, looks), strict=True)
    ]
    share = sum(size * bad / looks for size, looks, bad in found) / count
    rates = [(bad + 0.5) / (looks + 1) for _, looks, bad in found]
    centre = sum(size * q for (size, _, _), q in zip(found, rates, strict=True)) / count
    variance = sum(
        size**2 * q * (1 - q) / looks * (size - looks) / max(size - 1, 1)
        for (size, looks, _), q in zip(found, rates, strict=True)
    )
    low, high = share, share
    if variance > 0:
        low, high = wilson(share, centre * (1 - centre) * count**2 / variance)
    bad, good = sum(bad for *_, bad in found), sum(looks - bad for _, looks, bad in found)
    expected = share, max(low, bad / count), min(high, 1 - good / count)
    assert share_of_strata(found) == pytest.approx(expected, abs=1e-9)


@given(st.integers(8, 20_000), st.integers(8, 120), st.data())
def test_one_more_bad_sample_raises_the_interval_of_a_chosen_sample(count, looks, data):
    found = [
        (len(ranks), len(seen), data.draw(st.integers(0, len(seen))))
        for ranks, seen in zip(strata(count), ranks_to_review(count, looks), strict=True)
    ]
    which = data.draw(st.integers(0, len(found) - 1))
    size, looks, bad = found[which]
    if bad == looks:
        return
    more = [*found]
    more[which] = (size, looks, bad + 1)
    before, after = share_of_strata(found), share_of_strata(more)
    assert all(b >= a - 1e-9 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("separation", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_the_interval_covers_whatever_the_ranking_is_worth(share, separation):
    draws = torch.Generator().manual_seed(0)
    covered, errors = 0, []
    for _ in range(200):
        bad = torch.rand(600, generator=draws) < share
        scores = torch.randn(600, generator=draws) + separation * bad
        look_at = choose_for_review(scores)
        found, truth = share_from_review(scores, look_at, bad[look_at]), float(bad.float().mean())
        covered += found.low <= truth <= found.high
        errors.append(found.estimate - truth)
    assert covered >= 0.9 * 200
    assert abs(sum(errors) / 200) < 0.01


def test_a_good_ranking_makes_a_look_at_sixty_worth_more():
    draws = torch.Generator().manual_seed(0)
    spread = {}
    for separation in (0.0, 2.5):  # AUROC 1/2 and .96
        errors = []
        for _ in range(200):
            bad = torch.rand(600, generator=draws) < 0.1
            scores = torch.randn(600, generator=draws) + separation * bad
            look_at = choose_for_review(scores)
            share = share_from_review(scores, look_at, bad[look_at]).estimate
            errors.append(share - float(bad.float().mean()))
        spread[separation] = torch.tensor(errors).std()
    assert spread[2.5] < 0.025 < 0.6 * spread[0.0] + 0.005


def test_the_first_ranks_show_what_less_than_one_in_a_hundred_is():
    bad = torch.zeros(7000, dtype=torch.bool)
    bad[:28] = True
    scores = torch.randn(7000, generator=torch.Generator().manual_seed(0)) + 8.0 * bad
    look_at = choose_for_review(scores)
    share = share_from_review(scores, look_at, bad[look_at])
    assert 0.002 <= share.estimate <= 0.008


def test_the_order_of_samples_and_answers_is_no_matter():
    scores = torch.randperm(300, generator=torch.Generator().manual_seed(1)).float()
    look_at = choose_for_review(scores)
    bad = scores[look_at] > 270
    shuffled = torch.randperm(len(look_at))
    assert share_from_review(scores, look_at[shuffled], bad[shuffled]) == pytest.approx(
        share_from_review(scores, look_at, bad)
    )
    assert share_from_review(scores.tolist(), look_at.tolist(), bad.tolist()) == pytest.approx(
        share_from_review(scores, look_at, bad)
    )


def test_words():
    scores = torch.arange(300.0)
    look_at = choose_for_review(scores)
    none = share_from_review(scores, look_at, torch.zeros(len(look_at)))
    assert str(none) == "no evidence of bad samples"
    assert none.estimate == 0
    assert 0.02 < none.high < 0.1


@pytest.mark.parametrize(
    ("reviewed", "bad", "error", "message"),
    [
        ([1, 2], [True], ValueError, r"bad has shape \(1,\); expected \(2,\)"),
        ([1, 1], [True, True], ValueError, "twice"),
        ([300], [True], IndexError, "300"),
        ([299, 298], [True, False], ValueError, "ranks 3 to 14 was looked at"),
    ],
)
def test_what_is_wrong_is_said(reviewed, bad, error, message):
    with pytest.raises(error, match=message):
        share_from_review(torch.arange(300.0), reviewed, bad)


def test_too_few_looks_and_no_scores_are_refused():
    with pytest.raises(ValueError, match="looks is 6; expected at least 7"):
        choose_for_review(torch.arange(300.0), looks=6)
    with pytest.raises(ValueError, match="no scores"):
        choose_for_review(torch.zeros(0))
    with pytest.raises(ValueError, match="NaN"):
        choose_for_review(torch.tensor([1.0, torch.nan]))
