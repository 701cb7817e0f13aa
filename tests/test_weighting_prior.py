"""Weights and rankings of a prior, before the first score and beside scores."""

import pytest
import torch

from comet_meta import SoftConfidentWeighter
from comet_meta.weights.rules import standardize


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


def test_a_small_prior_goes_with_its_own_number_of_samples():
    prior = torch.linspace(0, 1, 10, dtype=torch.float64, requires_grad=True)
    weighter = SoftConfidentWeighter(10, prior=prior)
    assert weighter.prior.dtype == torch.float32
    assert not weighter.prior.requires_grad
    assert torch.equal(weighter.ranking_scores(), standardize(prior.detach().float()))
