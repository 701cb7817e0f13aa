"""Rules of one's own: what they may return, and what is refused."""

import pytest
import torch

from comet_meta import SoftConfidentWeighter
from comet_meta.weights.rules import Weighting
from fitting import OUTLIER, fitted


def test_a_rule_can_be_any_function():
    assert fitted(torch.arange(10.0), lambda s: (s < 5).float()).tolist() == [1] * 5 + [0] * 5
    with pytest.raises(ValueError, match="outside"):
        fitted(torch.arange(10.0), lambda s: s)


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


def test_what_a_rule_computes_leaves_no_graph():
    scale = torch.ones((), requires_grad=True)
    weighter = SoftConfidentWeighter(10, rule=lambda s: scale * (s < 5))
    weighter.fit(torch.arange(10.0))
    assert not weighter.weights.requires_grad
    assert not weighter.threshold.requires_grad


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
