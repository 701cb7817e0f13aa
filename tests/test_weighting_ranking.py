"""The ranking: the least confident first, equal ones by score, those without a score last."""

import torch

from comet_meta import SoftConfidentWeighter


def test_ranking_puts_the_least_confident_first_and_breaks_ties_by_score():
    scores = torch.tensor([1.0, 8.0, 1.5, 1.2, 9.0, 1.1, 1.7, 1.3, 1.6, 1.4])
    weighter = SoftConfidentWeighter(10, rule="hard")
    weighter.fit(scores)
    assert weighter.ranking(4).tolist() == [4, 1, 6, 8]
    assert len(weighter.ranking()) == 10


def test_the_ranking_goes_by_the_score_whatever_the_rule_says():
    weighter = SoftConfidentWeighter(10, rule=lambda s: (s >= 5) * 0.5)
    weighter.fit(torch.arange(10.0))
    assert weighter.ranking().tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert weighter.ranking(3).tolist() == [9, 8, 7]


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
