"""What the weights of pictures mean, in words."""

import pytest
import torch

from comet_meta import SoftConfidentWeighter
from comet_meta.vision.estimate import in_words


@pytest.mark.parametrize("size", [5, 40])
def test_words_without_evidence(size):
    weighter = SoftConfidentWeighter(size)
    weighter.fit(torch.erfinv(torch.linspace(-0.95, 0.95, size)))  # normally distributed
    words = in_words(weighter)
    assert words.startswith("No evidence" if size == 40 else "5 pictures are too few")
    assert words.endswith(
        "leaves out the 2 that fit in least." if size == 40 else "nothing was down-weighted."
    )
    unweighted = SoftConfidentWeighter(40, contamination=0.0)
    unweighted.fit(torch.arange(40.0))
    assert float(unweighted.weights.min()) == 1


def test_words_without_evidence_where_parts_have_weights():
    prior = torch.erfinv(torch.linspace(-0.95, 0.95, 40))
    part_prior = torch.arange(400.0).reshape(40, 10)
    told = in_words(SoftConfidentWeighter(prior=prior, part_prior=part_prior))
    assert told == (
        "No evidence of bad pictures: none is taken for bad. As a precaution, training leaves out "
        "the 5 % of their parts that fit in least."
    )
    few = SoftConfidentWeighter(prior=prior, part_prior=part_prior, precaution=0.004)
    assert "leaves out the 0.4 % of their parts" in in_words(few)
    # Equal patches say nothing, so none is left out.
    told = in_words(SoftConfidentWeighter(prior=prior, part_prior=torch.ones(40, 10)))
    assert told == "No evidence of bad pictures: nothing was down-weighted."
    few = SoftConfidentWeighter(prior=prior[:7], part_prior=part_prior[:7])
    assert in_words(few).endswith("nothing was down-weighted.")


def test_words_with_evidence():
    weighter = SoftConfidentWeighter(400)
    good = torch.erfinv(torch.linspace(-0.99, 0.99, 360))
    weighter.fit(torch.cat([good, torch.linspace(6, 8, 40)]))
    estimate, low, high = weighter.contamination_
    suspects = int((weighter.p_bad > 0.5).sum())
    assert 0.05 < low <= estimate <= 0.1
    assert in_words(weighter) == (
        f"About {100 * estimate:.0f} % ({100 * low:.0f} to {100 * high:.0f} %) of the pictures "
        f"look bad; {suspects} of 400 are more likely bad than good."
    )


def test_words_at_a_given_contamination():
    weighter = SoftConfidentWeighter(100, contamination=0.08)
    weighter.fit(torch.arange(100.0))
    assert in_words(weighter) == (
        "At the given contamination of 8 %, 8 of 100 pictures are taken for bad. As a precaution, "
        "training leaves out 10 more."
    )
    unweighted = SoftConfidentWeighter(100, contamination=0.0)
    unweighted.fit(torch.arange(100.0))
    assert in_words(unweighted) == (
        "At the given contamination of 0 %, 0 of 100 pictures are taken for bad."
    )


def test_words_about_what_is_held_out():
    prior = torch.erfinv(torch.linspace(-0.95, 0.95, 100))
    weighter = SoftConfidentWeighter(prior=prior, hold_out=0.2)
    assert in_words(weighter) == (
        "46 of 100 pictures, the most suspect ones and some to compare them with, are held out "
        "until the model can judge them."
    )
    scores = torch.linspace(0, 1, 100)
    scores[[97, 99]] = 9.0
    weighter.fit(scores)
    assert in_words(weighter) == (
        "2 of 100 pictures are left out: the model, which wasn't trained on them, finds them far "
        "stranger than others that it hadn't seen."
    )
    many = SoftConfidentWeighter(prior=prior, hold_out=0.2)
    many.fit(torch.cat([torch.linspace(0, 1, 90), torch.full((10,), 9.0)]))
    assert many.rejected == 10
    # Half of the suspects: 5 more.
    assert in_words(many) == (
        "10 of 100 pictures are left out: the model, which wasn't trained on them, finds them far "
        "stranger than others that it hadn't seen. Since no ranking finds all bad pictures, "
        "training also leaves out the next 5 of it."
    )
    usual = SoftConfidentWeighter(prior=prior, hold_out=0.2)
    usual.fit(torch.linspace(0, 1, 100))
    assert in_words(usual) == "No evidence of bad pictures: nothing was down-weighted."
    one = SoftConfidentWeighter(prior=prior, hold_out=0.2)
    scores[97] = 0.5
    one.fit(scores)
    assert in_words(one).startswith("1 of 100 pictures is left out")
    doubtful = SoftConfidentWeighter(prior=prior, hold_out=0.2)
    scores = torch.linspace(0, 1, 100)
    scores[85:] = 1.4  # between the fences, nearer to the inner one
    doubtful.fit(scores)
    assert doubtful.rejected == 0
    assert in_words(doubtful).startswith(
        "The model finds some suspects a little stranger than others that it hadn't seen: training "
        "leaves out"
    )


def test_words_of_a_proof_come_first():
    good = torch.erfinv(torch.linspace(-0.99, 0.99, 360))
    weighter = SoftConfidentWeighter(
        prior=torch.cat([good, torch.linspace(6, 8, 40)]), hold_out=0.2
    )
    weighter.fit(torch.linspace(0, 1, 400))
    assert "of the pictures look bad" in in_words(weighter)
