"""The contamination protocol."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comet_examples.datasets import DatasetError, Sample, Split, bad_samples, contaminate, oracle


def a_split(good: int = 90, anomalous: int = 80) -> Split:
    train = tuple(Sample(Path(f"train/{i}"), 0) for i in range(good))
    test = tuple(Sample(Path(f"good/{i}"), 0) for i in range(10)) + tuple(
        Sample(Path(f"bad/{i}"), 1, None, "crack") for i in range(anomalous)
    )
    return Split("bottle", train, test, has_masks=False)


@given(noise=st.floats(0.01, 0.45), seed=st.integers(0, 1000), overlap=st.booleans())
def test_counts_and_disjointness(noise, seed, overlap):
    clean = a_split()
    split = contaminate(clean, noise, seed=seed, overlap=overlap)
    bad = int(bad_samples(split.train).sum())
    assert bad == round(noise / (1 - noise) * 90)
    assert len(split.train) == 90 + bad
    assert set(clean.train) <= set(split.train)
    if overlap:
        assert split.test == clean.test
    else:
        assert not set(split.train) & set(split.test)
        assert set(split.train) | set(split.test) == set(clean.train) | set(clean.test)
    assert contaminate(clean, noise, seed=seed, overlap=overlap) == split
    assert set(oracle(split).train) == set(clean.train)


@given(low=st.floats(0.01, 0.4), high=st.floats(0.01, 0.4), seed=st.integers(0, 100))
def test_more_noise_adds_to_the_same_draw(low, high, seed):
    low, high = sorted((low, high))
    drawn = [
        {s for s in contaminate(a_split(), noise, seed=seed).train if s.label == 1}
        for noise in (low, high)
    ]
    assert drawn[0] <= drawn[1]


def test_the_order_of_training_tells_nothing():
    split = contaminate(a_split(), 0.3, seed=0)
    bad = bad_samples(split.train)
    assert 0.3 < bad[: len(bad) // 2].sum() / bad.sum() < 0.7


def test_seeds_draw_different_pictures():
    first, second = (
        {s for s in contaminate(a_split(), 0.1, seed=seed).train if s.label == 1} for seed in (0, 1)
    )
    assert first != second


def test_no_noise_is_the_split_itself():
    clean = a_split()
    assert contaminate(clean, 0.0, seed=0) is clean


def test_too_few_anomalies_says_how_much_is_possible():
    # 90 good and 9 of the 10 anomalous ones: 9 / 99 = 0.0909.
    with pytest.raises(DatasetError, match=r"the most is noise 0\.090"):
        contaminate(a_split(anomalous=10), 0.5, seed=0)
    contaminate(a_split(anomalous=10), 0.09, seed=0)
    contaminate(a_split(anomalous=10), 0.1, seed=0, overlap=True)


@pytest.mark.parametrize("noise", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(noise):
    with pytest.raises(DatasetError, match=r"\[0, 1\)"):
        contaminate(a_split(), noise, seed=0)


def test_a_contaminated_split_is_not_contaminated_again():
    with pytest.raises(DatasetError, match="10 anomalous training pictures already"):
        contaminate(contaminate(a_split(), 0.1, seed=0), 0.2, seed=0)


def test_without_groups_the_draw_is_the_start_of_a_permutation():
    clean = a_split()
    split = contaminate(clean, 0.1, seed=3)
    anomalous = [sample for sample in clean.test if sample.label == 1]
    drawn = [anomalous[i] for i in np.random.default_rng(3).permutation(80)[:10]]
    together = [*clean.train, *drawn]
    order = np.random.default_rng([3, 100]).permutation(100)
    assert split.train == tuple(together[i] for i in order)
    assert split.test == tuple(sample for sample in clean.test if sample not in drawn)


def of_objects(sizes: list[int]) -> Split:
    """Anomalous objects of so many views, and five anomalous pictures that belong to none."""
    views = tuple(
        Sample(Path(f"bad/{i}_{view}"), 1, None, "crack", group=f"crack/{i}")
        for i, size in enumerate(sizes)
        for view in range(size)
    )
    clean = a_split(anomalous=5)
    return replace(clean, test=clean.test + views)


def bad_of(samples: tuple[Sample, ...]) -> set[Sample]:
    return {sample for sample in samples if sample.label == 1}


OBJECTS = st.lists(st.integers(1, 6), min_size=4, max_size=20)


@given(sizes=OBJECTS, wanted=st.integers(1, 60), seed=st.integers(0, 100))
def test_no_object_is_on_both_sides(sizes, wanted, seed):
    clean = of_objects(sizes)
    noise = wanted / (90 + wanted)
    try:
        split = contaminate(clean, noise, seed=seed)
    except DatasetError:
        # All but one object at most, so one of six views could be the one that has to stay.
        assert wanted > sum(sizes) + 5 - 6
        return
    drawn, left = bad_of(split.train), bad_of(split.test)
    assert len(drawn) == wanted
    assert left
    assert not {s.group for s in drawn} & {s.group for s in left} - {None}
    assert not drawn & left
    lost = bad_of(clean.test) - drawn - left
    # Only what is left of the one object that is torn apart is in neither set.
    assert {s.group for s in lost} <= {s.group for s in drawn} - {None}
    assert len({s.group for s in lost}) <= 1
    assert [s for s in split.test if s.label == 0] == [s for s in clean.test if s.label == 0]
    shared = contaminate(clean, noise, seed=seed, overlap=True)
    assert shared.train == split.train
    assert shared.test == clean.test


@given(sizes=OBJECTS, wanted=st.integers(2, 8), seed=st.integers(0, 100))
def test_more_noise_adds_to_the_same_objects(sizes, wanted, seed):
    more, less = (
        contaminate(of_objects([*sizes, *[2] * 5]), bad / (90 + bad), seed=seed)
        for bad in (wanted, wanted - 1)
    )
    assert bad_of(less.train) < bad_of(more.train)
    assert bad_of(less.test) >= bad_of(more.test)


def test_objects_are_drawn_by_chance():
    first = Counter(
        min(s.group for s in bad_of(contaminate(of_pairs(), 2 / 92, seed=seed).train))
        for seed in range(400)
    )
    # Ten objects, 40 times each but for chance (a standard deviation is 6).
    assert len(first) == 10
    assert all(20 <= count <= 60 for count in first.values())


def of_pairs(count: int = 10) -> Split:
    clean = of_objects([2] * count)
    return replace(clean, test=tuple(s for s in clean.test if s.label == 0 or s.group))


def test_objects_with_one_picture_change_nothing():
    clean = a_split()
    grouped = replace(clean, test=tuple(replace(s, group=str(s.path)) for s in clean.test))
    for overlap in (False, True):
        expected = contaminate(clean, 0.2, seed=1, overlap=overlap)
        found = contaminate(grouped, 0.2, seed=1, overlap=overlap)
        for part in ("train", "test"):
            assert [s.path for s in getattr(found, part)] == [
                s.path for s in getattr(expected, part)
            ]


def test_normal_views_of_a_drawn_object_leave_the_test_set():
    clean = of_pairs()
    views = tuple(Sample(Path(f"good/{i}_9"), 0, group=f"crack/{i}") for i in range(10))
    split = contaminate(replace(clean, test=clean.test + views), 4 / 94, seed=0)
    drawn = {s.group for s in bad_of(split.train)}
    assert len(drawn) == 2
    assert {s.group for s in split.test if s.label == 0} - {None} == {
        f"crack/{i}" for i in range(10)
    } - drawn


def test_one_object_stays_in_the_test_set():
    # Two of three pairs can be drawn: 4 / 94 = 0.0425.
    message = r"takes 5 anomalous .* there are 6, .* one object's \(2\) .* the most is noise 0\.042"
    with pytest.raises(DatasetError, match=message):
        contaminate(of_pairs(3), 5 / 95, seed=0)
    assert len(bad_of(contaminate(of_pairs(3), 4 / 94, seed=0).test)) == 2
    assert len(bad_of(contaminate(of_pairs(3), 6 / 96, seed=0, overlap=True).train)) == 6
    with pytest.raises(DatasetError, match=r"one object's \(2\) .* the most is noise 0\.000"):
        contaminate(of_pairs(1), 0.02, seed=0)
    with pytest.raises(DatasetError, match=r"there are 0, .* the most is noise 0\.000"):
        contaminate(of_pairs(0), 0.001, seed=0)
