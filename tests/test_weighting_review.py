"""Weights after a person has looked at some of the samples."""

import pytest
import torch

from comet_meta import SoftConfidentWeighter, choose_for_review
from comet_meta.vision.estimate import in_words

GENERATOR = torch.Generator().manual_seed(0)
BAD = torch.rand(500, generator=GENERATOR) < 0.1
PRIOR = torch.randn(500, generator=GENERATOR) + 2.5 * BAD
LOOK_AT = choose_for_review(PRIOR)
REVIEW = (LOOK_AT, BAD[LOOK_AT])


def test_who_was_looked_at_has_a_known_weight():
    weighter = SoftConfidentWeighter(prior=PRIOR, review=REVIEW)
    assert torch.equal(weighter(LOOK_AT), 1 - REVIEW[1].float())
    assert torch.equal(weighter.p_bad[LOOK_AT], REVIEW[1].float())
    # Of the first fifty, some are good: the ranking alone would leave them out.
    assert int((weighter.weights[PRIOR.topk(50).indices] == 1).sum()) >= 2


def test_the_others_have_the_weights_of_the_share_that_the_look_tells():
    weighter = SoftConfidentWeighter(prior=PRIOR, review=REVIEW)
    share = weighter.contamination_.estimate
    assert share == pytest.approx(float(BAD.float().mean()), abs=0.04)
    told = SoftConfidentWeighter(prior=PRIOR, contamination=share)
    unseen = torch.ones(500, dtype=torch.bool)
    unseen[LOOK_AT] = False
    assert torch.equal(weighter.weights[unseen], told.weights[unseen])
    assert torch.equal(weighter.p_bad[unseen], told.p_bad[unseen])


def test_a_look_that_finds_none_leaves_all_weights_at_1():
    weighter = SoftConfidentWeighter(prior=PRIOR, review=(LOOK_AT, torch.zeros(len(LOOK_AT))))
    assert bool((weighter.weights == 1).all())
    assert str(weighter.contamination_) == "no evidence of bad samples"


def test_beside_a_given_share_any_samples_may_be_reviewed():
    weighter = SoftConfidentWeighter(prior=PRIOR, contamination=0.1, review=([3, 7], [True, False]))
    assert weighter([3, 7]).tolist() == [0.0, 1.0]
    assert weighter.reviewed == (2, 1)
    with pytest.raises(ValueError, match="was looked at; take those that choose_for_review names"):
        SoftConfidentWeighter(prior=PRIOR, review=([3, 7], [True, False]))


def test_more_than_half_bad_leaves_out_half_of_the_others():
    weighter = SoftConfidentWeighter(prior=PRIOR, review=(LOOK_AT, torch.ones(len(LOOK_AT))))
    assert weighter.contamination_.estimate == pytest.approx(1)
    unseen = torch.ones(500, dtype=torch.bool)
    unseen[LOOK_AT] = False
    assert float(weighter.weights[unseen].sum()) >= 200


def test_parts_of_a_good_sample_all_count():
    parts = torch.rand(500, 4, generator=torch.Generator().manual_seed(1))
    parts[LOOK_AT, 0] += 5  # what the twentieth would go for
    weighter = SoftConfidentWeighter(prior=PRIOR, part_prior=parts, review=REVIEW)
    good = LOOK_AT[~REVIEW[1]]
    assert bool((weighter.part_weights(good) == 1).all())
    told = SoftConfidentWeighter(
        prior=PRIOR, part_prior=parts, contamination=weighter.contamination_.estimate
    )
    assert not bool((told.part_weights(good) == 1).all())


def test_a_review_stays_through_fits_resets_and_a_resume():
    weighter = SoftConfidentWeighter(prior=PRIOR, review=REVIEW)
    before = weighter.weights.clone()
    weighter.fit(torch.rand(500))
    weighter.reset()
    assert torch.equal(weighter.weights, before)
    again = SoftConfidentWeighter(prior=PRIOR, review=REVIEW)
    again.load_state_dict(weighter.state_dict())
    again.fit()
    assert torch.equal(again.weights, before)


@pytest.mark.parametrize("other", [None, (LOOK_AT, ~REVIEW[1])])
def test_another_review_is_refused(other):
    saved = SoftConfidentWeighter(prior=PRIOR, review=REVIEW).state_dict()
    weighter = SoftConfidentWeighter(prior=PRIOR, review=other)
    with pytest.raises(ValueError, match="another review, or none"):
        weighter.load_state_dict(saved)
    with pytest.raises(ValueError, match="another review, or none"):
        SoftConfidentWeighter(prior=PRIOR, review=REVIEW).load_state_dict(weighter.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 500, "review": REVIEW}, "review needs a prior="),
        ({"prior": PRIOR, "review": REVIEW, "hold_out": 0.2}, "leave one of them out"),
        ({"prior": PRIOR, "review": LOOK_AT}, "expected a pair"),
        ({"prior": PRIOR, "review": (LOOK_AT, [True])}, r"bad has shape \(1,\); expected \(60,\)"),
    ],
)
def test_what_does_not_go_together_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        SoftConfidentWeighter(**options)


def test_the_estimate_says_what_it_comes_from():
    weighter = SoftConfidentWeighter(prior=PRIOR, review=REVIEW)
    share, low, high = (100 * value for value in weighter.contamination_)
    left_out = int((weighter.weights < 0.5).sum())
    assert in_words(weighter) == (
        f"Of 60 pictures that were looked at, {int(REVIEW[1].sum())} are bad: about {share:.0f} % "
        f"({low:.0f} to {high:.0f} %) of all. Training leaves out {left_out} of 500."
    )
    none = SoftConfidentWeighter(prior=PRIOR, review=(LOOK_AT, torch.zeros(60)))
    assert in_words(none).startswith("Of 60 pictures that were looked at, none is bad: about 0 %")
    assert in_words(none).endswith("Training leaves out none.")
