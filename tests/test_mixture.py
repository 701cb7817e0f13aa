"""The mixture of normal and bad scores: against scipy, and when there is none."""

import numpy as np
import pytest
import torch
from comet_meta.weights.mixture import Mixture, summary
from scipy import stats

from comet_meta.weights.rules import posterior_weights, standardized


def _fit(scores):
    values, counts = summary(standardized(scores))
    return Mixture.fitted(values, counts, values[-1]), values, counts


@pytest.mark.parametrize("far", [2.0, 3.0, 4.0])
def test_evidence_is_the_ratio_of_likelihoods_less_five_nats(far):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(60, generator=generator).double()
    scores[:6] = far + torch.rand(6, generator=generator).double()
    mixture, values, counts = _fit(scores)
    x = values.numpy()
    share, mean, variance, top = (float(value) for value in mixture)
    together = share * stats.norm.pdf(x, mean, variance**0.5)
    together += (1 - share) * stats.uniform.pdf(x, 0, top)
    alone = stats.norm.logpdf(x, x.mean(), (x.var() + 1e-3) ** 0.5)
    gain = (np.log(together) - alone).sum()
    expected = 1 / (1 + np.exp(5 - gain))
    assert float(mixture.evidence(values, counts)) == pytest.approx(expected, rel=1e-6)


def test_posterior_is_bayes_rule():
    mixture = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in (0.8, 0.1, 0.5, 4.0)))
    x = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
    normal = 0.8 * stats.norm.pdf(x.numpy(), 0.1, 0.5**0.5)
    bad = 0.2 * stats.uniform.pdf(x.numpy(), 0, 4)
    np.testing.assert_allclose(mixture.posterior(x).numpy(), normal / (normal + bad), rtol=1e-12)


def test_doubt_is_the_expected_share_of_normal_samples_among_those_taken_for_bad():
    mixture = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in (0.8, 0.0, 1.0, 5.0)))
    values = torch.tensor([-1.0, 2.0, 4.0], dtype=torch.float64)
    counts = torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)
    # Below the centre a sample has the posterior of the centre.
    normal = 0.8 * stats.norm.pdf([0.0, 2.0, 4.0])
    bad = 0.04 / (normal + 0.04)
    expected = (counts.numpy() * bad * (1 - bad)).sum() / (counts.numpy() * bad).sum()
    assert float(mixture.doubt(values, counts)) == pytest.approx(expected, rel=1e-9)
    assert float(mixture._replace(share=torch.tensor(1.0)).doubt(values, counts)) == 0


def test_counts_stand_for_repeated_values():
    scores = torch.cat([torch.randn(50), torch.full((5,), 4.0)])
    mixture, values, counts = _fit(scores)
    twice = Mixture.fitted(values, 2 * counts, values[-1])
    assert torch.stack(twice[:3]).tolist() == pytest.approx(torch.stack(mixture[:3]).tolist())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("apart", [1.0, 1.5, 2.0])
def test_two_kinds_of_normal_samples_in_a_small_set_are_no_bad_ones(seed, apart):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(48, generator=generator)
    scores[:20] += apart
    anomalous = posterior_weights(scores).anomalous
    assert anomalous.mean() < 0.1
    # The fit alone would take many for bad in some draws.
    mixture, values, counts = _fit(scores)
    assert float(mixture.evidence(values, counts)) < 0.5


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.4])
def test_bad_samples_that_stand_out_are_evidence(share):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, generator=generator)
    bad = torch.arange(200) < 200 * share
    scores[bad] = 4 + 4 * torch.rand(int(bad.sum()), generator=generator)
    mixture, values, counts = _fit(scores)
    assert float(mixture.evidence(values, counts)) > 0.99
    assert posterior_weights(scores, spare=0.0).weights[bad].mean() < 0.1


def test_more_of_the_same_evidence_convinces():
    quantiles = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    normal = torch.special.ndtri(quantiles)
    scores = torch.cat([normal, torch.tensor([2.8, 3.2], dtype=torch.float64)])
    odds = []
    for times in (1, 2, 8):
        mixture, values, counts = _fit(scores.repeat(times))
        odds.append(float(mixture.evidence(values, counts)))
    assert odds[0] < 0.1
    assert odds[0] < odds[1] < odds[2]
    assert odds[2] > 0.9


def test_a_histogram_counts_every_score_close_to_its_value():
    x = standardized(torch.randn(20_000, generator=torch.Generator().manual_seed(0)).double())
    values, counts = summary(x)
    assert values.dtype == counts.dtype == torch.float64
    assert len(values) < 8193 < len(x)
    assert counts.sum() == len(x)
    each = values.repeat_interleave(counts.long())
    torch.testing.assert_close(each, x.sort().values, rtol=0, atol=3e-3 * float(1 + x.abs().max()))
