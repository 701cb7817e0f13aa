"""Suspects that are held out until the model, which hasn't seen them, can judge them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from comet_meta import CoMet, SoftConfidentWeighter
from comet_meta.weights.held_out import (
    REFERENCE,
    SUSPECT,
    TRAINED,
    choose_held_out,
    judge,
    leave_out_more,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=300),
    st.floats(0.01, 0.5),
    st.randoms(use_true_random=False),
)
def test_suspects_are_the_highest_and_the_reference_is_drawn_from_all_others(values, fraction, rng):
    prior = torch.tensor([float(value) for value in values])
    roles = choose_held_out(prior, fraction)
    suspects, others = prior[roles == SUSPECT], prior[roles != SUSPECT]
    assert len(suspects) <= math.ceil(fraction * len(prior))
    count = int((roles == REFERENCE).sum())
    assert (count == 0) == (len(suspects) == 0)
    assert len(prior) >= 100 or count == 0
    if len(suspects):
        assert suspects.min() > others.max()  # equal samples share their part
        expected = max(round(0.1 * len(others)), 40)
        assert count == min(expected, len(others) // 3)
    order = list(range(len(values)))
    rng.shuffle(order)
    moved = choose_held_out(prior[order], fraction)
    assert torch.equal(moved == SUSPECT, (roles == SUSPECT)[order])
    assert torch.equal(
        prior[order][moved == REFERENCE].sort().values, prior[roles == 1].sort().values
    )


def test_the_reference_is_spread_over_the_prior_by_hand():
    roles = choose_held_out(torch.arange(400.0), 0.3)
    assert (roles == SUSPECT).nonzero().flatten().tolist() == list(range(280, 400))
    # 40 of 280, since a tenth would be fewer: the middle of each seven.
    assert (roles == REFERENCE).nonzero().flatten().tolist() == list(range(3, 280, 7))


@pytest.mark.parametrize("prior", [torch.ones(100), torch.arange(99.0), torch.zeros(1)])
def test_nothing_is_held_out_of_equal_or_few_samples(prior):
    assert (choose_held_out(prior, 0.3) == TRAINED).all()
    weighter = SoftConfidentWeighter(prior=prior, hold_out=0.3)
    assert weighter.hold_out is None
    assert not weighter.needs_scores
    assert torch.equal(weighter(), SoftConfidentWeighter(prior=prior)())


def test_the_fences_by_hand():
    roles = torch.tensor([REFERENCE] * 5 + [SUSPECT] * 4 + [TRAINED])
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 6.75, 9.0, -50.0, 100.0])
    # Q1 = 1, Q3 = 3: the fences are 3 + 1.5 * 2 = 6 and 3 + 3 * 2 = 9.
    assert judge(roles, scores).tolist() == [1.0] * 6 + [0.75, 0.0, 1.0, 1.0]
    # With kappa = 1: 5 and 7.
    assert judge(roles, scores, 1.0).tolist() == [1.0] * 5 + [0.5, 0.125, 0.0, 1.0, 1.0]


def test_a_reference_of_equal_scores_has_both_fences_in_one_place():
    roles = torch.tensor([REFERENCE] * 4 + [SUSPECT] * 3)
    scores = torch.tensor([2.0] * 4 + [2.0, 1.0, 2.1])
    assert judge(roles, scores).tolist() == [1.0] * 6 + [0.0]


@settings(deadline=None)
@given(st.floats(0.01, 100), st.floats(-100, 100), st.integers(0, 1000))
def test_scale_and_offset_of_the_scores_are_of_no_matter(scale, offset, seed):
    roles = choose_held_out(normal(100, seed=seed), 0.3)
    scores = 3 * normal(100, seed=seed + 1).double()
    torch.testing.assert_close(judge(roles, scores), judge(roles, scale * scores + offset))


def rejected_suspects(count: int, suspects: int, rejected: float) -> tuple[torch.Tensor, ...]:
    """Roles and weights of samples, the last of which are suspects, the very last rejected."""
    roles = torch.full((count,), TRAINED)
    roles[count - suspects :] = SUSPECT
    weights = torch.ones(count)
    weights[count - int(rejected) :] = 0
    return roles, weights


def test_how_many_more_are_left_out_by_hand():
    roles, weights = rejected_suspects(200, suspects=40, rejected=20)
    ranking = torch.arange(200.0).flip(0)  # the rejected ones have the lowest
    more = leave_out_more(weights, roles, ranking)
    # r = 1/2: 10 of the 180 others, the ramp from 7.5 to 12.5 of them.
    assert float((1 - more[:180]).sum()) == pytest.approx(10, abs=1e-4)
    assert (more[:7] == 0).all()
    assert (more[13:180] == 1).all()
    assert (more[180:] == 0).all()


def test_no_more_are_left_out_where_no_suspect_is_rejected_or_there_are_none():
    roles, weights = rejected_suspects(50, suspects=10, rejected=0)
    assert torch.equal(leave_out_more(weights, roles, torch.arange(50.0)), weights)
    roles.fill_(TRAINED)
    assert torch.equal(leave_out_more(weights, roles, torch.arange(50.0)), weights)


def test_more_than_half_is_never_left_out():
    roles, weights = rejected_suspects(100, suspects=40, rejected=40)
    more = leave_out_more(weights, roles, torch.arange(100.0))
    assert float((1 - more).sum()) == pytest.approx(50, abs=1e-4)  # not 40 (1 + 1)
    roles, weights = rejected_suspects(100, suspects=50, rejected=50)
    assert torch.equal(leave_out_more(weights, roles, torch.arange(100.0)), weights)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=12, max_size=120),
    st.integers(0, 12),
    st.randoms(use_true_random=False),
)
def test_what_is_left_out_besides_follows_the_ranking(values, rejected, rng):
    ranking = torch.tensor([float(value) for value in values])
    roles, weights = rejected_suspects(len(values), suspects=12, rejected=rejected)
    more = leave_out_more(weights, roles, ranking)
    assert ((more >= 0) & (more <= weights)).all()
    rate = rejected / 12
    expected = min(rejected * (1 + rate), max(rejected, len(values) / 2))
    assert float((1 - more).sum()) == pytest.approx(expected, abs=1e-3)
    kept = weights > 0
    by_rank = more[kept][ranking[kept].argsort(stable=True)]
    assert (by_rank.diff() <= 1e-6).all()  # never rises with the ranking
    order = list(range(len(values)))
    rng.shuffle(order)
    torch.testing.assert_close(
        leave_out_more(weights[order], roles[order], ranking[order]), more[order]
    )


def even(count: int) -> torch.Tensor:
    """Scores without a tail, in an order of their own."""
    return torch.rand(count, generator=torch.Generator().manual_seed(1))


def weighter_of(bad: int = 10, count: int = 100) -> tuple[SoftConfidentWeighter, torch.Tensor]:
    """The prior takes half of the bad samples, the last ones, for the most suspect of all."""
    prior = normal(count).abs()
    prior[-bad:] += 2
    return SoftConfidentWeighter(prior=prior, hold_out=0.3), prior


def test_bad_suspects_stay_out_and_others_come_back_but_for_the_highest_of_the_ranking():
    weighter, prior = weighter_of()
    assert weighter.needs_scores
    held = weighter() == 0
    assert held.sum() == 30 + 23  # suspects and reference
    scores = even(100)
    scores[-10:] += 20
    weighter.fit(scores)
    assert not weighter.needs_scores
    assert weighter()[-10:].sum() == 0
    # A third of the suspects is rejected: 10/3 more are left out.
    assert float((1 - weighter()[:-10]).sum()) == pytest.approx(10 / 3, abs=1e-4)
    ranking = weighter.ranking().tolist()
    assert (weighter()[ranking[:12]] == 0).all()
    assert (weighter()[ranking[15:]] == 1).all()
    judged = weighter()
    weighter.fit(normal(100, seed=2))  # later scores are for the ranking alone
    assert torch.equal(weighter(), judged)
    assert torch.equal(weighter.prior, prior)


def test_a_bad_sample_that_the_prior_does_not_suspect_stays():
    weighter, prior = weighter_of()
    scores = even(100)
    scores[int(prior.argmin())] = 1000.0
    weighter.fit(scores)
    assert (weighter() == 1).all()


def exponential(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(count).exponential_(generator=generator)


@pytest.mark.parametrize("draw", [torch.randn, torch.rand, exponential])
@pytest.mark.parametrize("count", [100, 500, 5000])
def test_scores_that_do_not_tell_suspects_from_others_cost_next_to_nothing(draw, count):
    """The model's scores have nothing to do with the prior: next to nobody is left out."""
    left_out = []
    for seed in range(40):
        weighter = SoftConfidentWeighter(prior=normal(count, seed=seed).exp(), hold_out=0.15)
        weighter.fit(draw(count, generator=torch.Generator().manual_seed(1000 + seed)))
        left_out.append(float((1 - weighter()).mean()))
    # 4.8 % of exponential scores lie above the inner fence, more with few samples to draw it by.
    assert sum(left_out) / len(left_out) < 0.15 * 0.06


def test_streamed_scores_decide_once_all_that_is_held_out_has_some():
    weighter, _ = weighter_of()
    held = (weighter() == 0).nonzero().flatten()
    scores = even(100)
    scores[-10:] += 20
    weighter.update(held[:-1], scores[held[:-1]])
    weighter.fit()
    assert weighter.needs_scores
    weighter.update(held[-1:], scores[held[-1:]])
    weighter.fit()
    assert not weighter.needs_scores
    assert weighter()[-10:].sum() == 0


@pytest.mark.parametrize("judged", [False, True])
def test_a_resumed_weighter_goes_on_where_it_was(judged):
    saved, _ = weighter_of()
    scores = even(100)
    scores[-10:] += 20
    if judged:
        saved.fit(scores)
    restored, _ = weighter_of()
    restored.load_state_dict(saved.state_dict())
    assert restored.needs_scores is not judged
    assert restored.rejected == saved.rejected == (10 if judged else 0)
    assert torch.equal(restored(), saved())
    saved.fit(-scores)
    restored.fit(-scores)
    assert torch.equal(restored(), saved())


def test_a_state_of_a_weighter_that_holds_nothing_out_is_refused():
    holding, _ = weighter_of()
    plain = SoftConfidentWeighter(prior=holding.prior)
    with pytest.raises(ValueError, match="was made without hold_out=, this one with"):
        holding.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="was made with hold_out=, this one without"):
        plain.load_state_dict(holding.state_dict())


def test_a_second_training_holds_out_again():
    weighter, _ = weighter_of()
    weighter.begin_fit()
    before = weighter()
    weighter.fit(even(100))
    assert not torch.equal(weighter(), before)
    weighter.begin_fit()
    assert weighter.needs_scores
    assert torch.equal(weighter(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hold_out": 0.0}, r"hold_out is 0.0; expected a fraction in \(0, 0.5\]"),
        ({"hold_out": 0.6}, "hold_out is 0.6"),
        ({"hold_out": "0.3"}, "hold_out is '0.3'"),
        ({"hold_out": 0.3, "prior": None}, "hold_out needs a prior="),
        ({"hold_out": 0.3, "contamination": 0.1}, "contamination='auto'"),
        ({"hold_out": 0.3, "rule": "hard"}, "rule='trimmed'"),
        ({"hold_out": 0.3, "part_prior": normal(30, 2)}, "hold_out is for whole samples"),
    ],
)
def test_what_does_not_go_together_gets_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        SoftConfidentWeighter(30, **{"prior": normal(30), **arguments})


@pytest.mark.parametrize(("count", "left_out"), [(100, 0.0), (99, 9.9)])
def test_a_precaution_is_for_samples_that_no_model_judges(count, left_out):
    weighter = SoftConfidentWeighter(prior=normal(count), hold_out=0.3, precaution=0.1)
    weighter.fit(even(count))
    assert float((1 - weighter()).sum()) == pytest.approx(left_out, abs=1e-3)


def test_a_loop_gives_back_what_its_model_knows_and_leaves_out_what_it_does_not():
    """An ordinary loop: of the suspects, rare good rows come back, bad ones stay out."""
    torch.manual_seed(0)
    position = torch.randn(200, 2)
    position[:10] *= 2.2 / position[:10].norm(dim=1, keepdim=True)  # rare, but in the plane
    rows = position @ torch.randn(2, 6) + 0.3 * torch.randn(200, 6)
    rows[10:20] += 4 * torch.randn(10, 6)  # bad: off the plane of all others
    prior = position.norm(dim=1)
    prior[10:20] += 2
    model = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def errors(batch):
        return (model(batch) - batch).square()

    weighter = SoftConfidentWeighter(prior=prior, hold_out=0.3)
    assert weighter()[:20].sum() == 0
    loader = comet = CoMet(
        DataLoader(rows, batch_size=20, shuffle=True),
        optimizer,
        scores=lambda batch: errors(batch).mean(dim=1),
        model=model,
        weighter=weighter,
        warm_up=20,
    )
    for epoch in range(25):
        for batch in loader:
            optimizer.zero_grad()
            comet.loss(errors(batch)).backward()
            optimizer.step()
        assert weighter.needs_scores is (epoch < 19)
    assert weighter()[10:20].sum() <= 1
    assert weighter()[:10].sum() >= 9
    assert weighter()[20:].mean() > 0.97


def test_losses_of_some_rows_alone_can_not_judge():
    rows = normal(100, 3)
    model = nn.Linear(3, 3)
    weighter = SoftConfidentWeighter(prior=rows.norm(dim=1), hold_out=0.2)
    loader = DataLoader(rows, batch_size=20)
    comet = CoMet(loader, torch.optim.SGD(model.parameters(), 0.1), weighter=weighter)
    batch = next(iter(comet))
    with pytest.raises(ValueError, match="samples are held out until the model has judged them"):
        comet.loss(lambda chosen: (model(batch[chosen]) - batch[chosen]).square().mean(dim=1))
    comet.loss((model(batch) - batch).square().mean(dim=1)).backward()


def test_losses_of_all_rows_judge_after_the_warm_up():
    rows = normal(100, 3)
    rows[:5] += 30
    model = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    prior = normal(100, seed=5).abs()
    prior[:5] += 5
    weighter = SoftConfidentWeighter(prior=prior, hold_out=0.2)
    loader = comet = CoMet(
        DataLoader(rows, batch_size=20, shuffle=True), optimizer, weighter=weighter, warm_up=3
    )
    for epoch in range(4):
        for batch in loader:
            optimizer.zero_grad()
            comet.loss((model(batch) - batch).square().mean(dim=1)).backward()
            optimizer.step()
        assert weighter.needs_scores is (epoch < 2)
    assert weighter()[:5].sum() == 0
    assert weighter().mean() > 0.9
