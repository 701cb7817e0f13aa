"""Metrics by hand and against an independent slow implementation."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from comet_examples.metrics import aupro, curation_metrics, image_metrics, pixel_metrics


def regions_of(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """8-connected regions by flood fill."""
    left = {(int(r), int(c)) for r, c in zip(*np.nonzero(mask), strict=True)}
    regions = []
    while left:
        region, border = set(), [left.pop()]
        while border:
            r, c = border.pop()
            region.add((r, c))
            near = {(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            border += near
        regions.append(region)
    return regions


def slow_aupro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    regions = [(n, region) for n, mask in enumerate(masks) for region in regions_of(mask)]
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        found = maps >= threshold
        fpr = (found & ~masks).sum() / (~masks).sum()
        shares = [sum(found[n, r, c] for r, c in region) / len(region) for n, region in regions]
        points.append((fpr, sum(shares) / len(shares)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / limit


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    levels=st.sampled_from([2, 3, 8, 1000]),
    limit=st.sampled_from([0.05, 0.3, 1.0]),
)
def test_aupro_equals_a_slow_independent_implementation(seed, levels, limit):
    generator = np.random.default_rng(seed)
    masks = generator.random((3, 7, 6)) < generator.uniform(0.02, 0.5)
    assume(masks.any() and not masks.all())
    maps = generator.integers(0, levels, masks.shape) + (generator.random() < 0.5) * masks
    assert aupro(maps.astype(np.float32), masks, fpr_limit=limit) == pytest.approx(
        slow_aupro(maps, masks, limit)
    )


def test_perfect_maps_are_perfect_and_constant_maps_are_chance():
    masks = np.zeros((2, 8, 8), dtype=bool)
    masks[0, 1:3, 1:3] = masks[0, 5, 5] = True
    assert pixel_metrics(masks.astype(float), masks) == {"P-AUROC": 1, "P-AP": 1, "AUPRO": 1}
    # One threshold takes everything: the line from (0, 0) to (1, 1), up to 0.3.
    assert aupro(np.zeros(masks.shape), masks) == pytest.approx(0.15)


def test_aupro_weighs_small_regions_like_large_ones():
    masks = np.zeros((1, 10, 10), dtype=bool)
    masks[0, :5, :5] = True
    masks[0, 9, 9] = True
    maps = np.zeros(masks.shape)
    maps[0, :5, :5] = 1  # the single pixel is missed until everything is found
    # Half of the regions found at FPR 0, rising linearly to all at FPR 1: at 0.3 it is 0.65.
    assert aupro(maps, masks) == pytest.approx((0.5 + 0.65) / 2)


def test_regions_do_not_connect_across_pictures():
    masks = np.zeros((2, 4, 4), dtype=bool)
    masks[:, 1, 1] = True
    maps = np.zeros(masks.shape)
    maps[0, 1, 1] = 1
    assert aupro(maps, masks, fpr_limit=1.0) == pytest.approx(0.75)  # two regions, one found


def test_image_metrics_by_hand():
    found = image_metrics([0.1, 0.9, 0.4, 0.8], [0, 1, 1, 0])
    # Of four pairs, (0.9, 0.1), (0.9, 0.8), (0.4, 0.1) are in order.
    assert found["I-AUROC"] == pytest.approx(0.75)
    # Precision 1 at the first hit, 2/3 at the second.
    assert found["I-AP"] == pytest.approx((1 + 2 / 3) / 2)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.sampled_from([2, 5, 1000]))
def test_auroc_is_the_share_of_pairs_in_order(seed, levels):
    generator = np.random.default_rng(seed)
    scores, labels = generator.integers(0, levels, 40), generator.random(40) < 0.3
    assume(labels.any() and not labels.all())
    statistic = mannwhitneyu(scores[labels], scores[~labels]).statistic
    expected = pytest.approx(statistic / (labels.sum() * (~labels).sum()))
    assert image_metrics(scores, labels)["I-AUROC"] == expected
    maps = scores.reshape(4, 2, 5).astype(np.float32)
    assert pixel_metrics(maps, labels.reshape(4, 2, 5))["P-AUROC"] == expected


def test_curation_metrics_by_hand():
    found = curation_metrics([0.9, 0.8, 0.1, 0.2, 0.7], [True, False, False, False, True])
    assert found["precision@k"] == pytest.approx(0.5)
    assert found["AUROC"] == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2], [0], "expected one for each"),
        ([], [], "expected one for each"),
        ([0.1, np.nan], [0, 1], "NaN"),
        ([0.1, 0.2], [0, 0], "every image is normal"),
        ([0.1, 0.2], [1, 1], "every image is anomalous"),
    ],
)
def test_what_metrics_cannot_judge_is_said(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        image_metrics(scores, labels)
