"""The trimmed rule: an independent count of ranks, known and proven shares, clean scores."""

import numpy as np
import pytest
import torch

from comet_meta.weights.rules import (
    ALWAYS_LEFT_OUT,
    LEFT_OUT_BESIDE_GIVEN,
    estimate_contamination,
    trimmed_weights,
)
from fitting import fitted


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


def test_a_twentieth_is_left_out_where_nothing_is_proven():
    scores = torch.special.ndtri(torch.linspace(0.005, 0.995, 101))
    weights = fitted(scores)
    # 101 / 20 samples: from the top 3.8 without weight, from 6.3 on with all of it.
    assert weights[-3:].tolist() == [0] * 3
    assert weights[:-7].tolist() == [1] * 94
    assert float((1 - weights).sum()) == pytest.approx(101 / 20, abs=1e-4)


def test_bad_samples_stand_out_from_squared_errors():
    generator = torch.Generator().manual_seed(0)
    errors = torch.randn(500, generator=generator).square()
    errors[:50] = 15 + 15 * torch.rand(50, generator=generator)
    proven, told = fitted(errors), fitted(errors, contamination=0.1)
    assert proven[:50].mean() < 0.1
    assert proven[50:].mean() > 0.95
    assert told[:50].mean() < 0.01
    assert told[50:].mean() > 0.85


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
