"""The contamination protocol."""

from pathlib import Path

import pytest
from comet_examples.datasets import DatasetError, Sample, Split, bad_samples, contaminate, oracle
from hypothesis import given
from hypothesis import strategies as st


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
