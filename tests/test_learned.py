"""A prior that learns from the samples that a person looked at."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score

from comet_meta import (
    SoftConfidentWeighter,
    choose_for_review,
    learn_from_review,
    share_from_review,
)
from comet_meta.weights import learned as learned_module
from comet_meta.weights.learned import carry_over, falling, probability_by_rank
from comet_meta.weights.review import Review, known_labels


def two_kinds(count=600, seed=0):
    """Rows of which a tenth are bad and a tenth odd but good; the prior suspects both alike."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 6, generator=generator)
    bad, odd = torch.arange(count) % 10 == 0, torch.arange(count) % 10 == 1
    rows[bad, 0] += 5
    rows[odd, 1] += 5
    prior = torch.randn(count, generator=generator) + 3 * (bad | odd)
    look_at = choose_for_review(prior)
    return rows, prior, bad, odd, look_at


def test_what_resembles_a_bad_sample_is_suspect_and_what_resembles_a_good_one_is_not():
    rows, prior, bad, odd, look_at = two_kinds()
    learned = learn_from_review(prior, rows, (look_at, bad[look_at]))
    unseen = torch.ones(len(rows), dtype=torch.bool)
    unseen[look_at] = False
    assert roc_auc_score(bad[unseen], prior[unseen]) < 0.96
    assert roc_auc_score(bad[unseen], learned.prior[unseen]) > 0.99
    told = SoftConfidentWeighter(prior=prior, review=(look_at, bad[look_at]), precaution=0.0)
    taught = SoftConfidentWeighter(prior=learned.prior, review=learned.review, precaution=0.0)
    assert told.weights[odd & unseen].mean() < 0.6
    assert taught.weights[odd & unseen].mean() > 0.9
    assert taught.weights[bad].mean() < 0.1 < told.weights[bad].mean()
    assert taught.contamination_ == told.contamination_


def test_the_share_is_that_of_the_first_prior_or_what_the_review_brings():
    rows, prior, bad, _, look_at = two_kinds()
    found = learn_from_review(prior, rows, (look_at, bad[look_at])).review
    assert found.share == share_from_review(prior, look_at, bad[look_at])
    assert torch.equal(found.looked_at, look_at)
    # Chosen by another ranking, and not spread over this one.
    highest = prior.topk(20).indices
    given = Review(highest, bad[highest], found.share)
    assert learn_from_review(prior, rows, given).review.share == found.share
    with pytest.raises(ValueError, match="take those that choose_for_review names"):
        learn_from_review(prior, rows, (highest, bad[highest]))


def test_without_a_bad_sample_seen_training_is_plain_and_the_order_the_priors():
    rows, prior, _, _, look_at = two_kinds()
    learned = learn_from_review(prior, rows, (look_at, torch.zeros(len(look_at))))
    assert torch.equal(learned.prior.argsort(), prior.argsort())
    weighter = SoftConfidentWeighter(prior=learned.prior, review=learned.review)
    assert bool((weighter.weights == 1).all())


def test_features_that_say_nothing_leave_the_order_of_the_unseen_to_the_prior():
    _, prior, bad, _, look_at = two_kinds()
    learned = learn_from_review(prior, torch.ones(600, 3), (look_at, bad[look_at]))
    assert torch.equal(learned.prior.argsort(), prior.argsort())


def test_the_learned_prior_is_the_sum_of_three_parts():
    rows, prior, bad, _, look_at = two_kinds()
    learned = learn_from_review(prior, rows, (look_at, bad[look_at])).prior
    p = probability_by_rank(prior, known_labels(Review(look_at, bad[look_at]), 600)).numpy()
    wide = rows.double().numpy()
    scaled = (wide - wide.mean(axis=0)) / wide.std(axis=0)
    variances, directions = np.linalg.eigh(np.cov(scaled.T, bias=True))
    whitened = scaled @ directions / np.sqrt(variances + variances.mean())
    seen, carried = look_at.numpy(), []
    for view in (scaled, whitened):
        between = np.linalg.norm(view[seen, None] - view[None, seen], axis=-1)
        distances = np.sort(between[between > 0])
        process = GaussianProcessRegressor(
            Matern(distances[(len(distances) - 1) // 2], nu=0.5), alpha=0.1, optimizer=None
        )
        residuals = bad[look_at].numpy() - p[seen]
        carried.append(process.fit(view[seen], residuals).predict(view))
    place = prior.argsort().argsort().numpy() / 599  # 1 for the most suspect
    np.testing.assert_allclose(learned, p + np.mean(carried, axis=0) + 0.1 * place, atol=1e-5)


def test_it_follows_a_permutation_and_ignores_the_scale_of_the_features():
    rows, prior, bad, _, look_at = two_kinds()
    learned = learn_from_review(prior, rows, (look_at, bad[look_at])).prior
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    moved = order.argsort()[look_at]
    again = learn_from_review(prior[order], 1e3 + 0.1 * rows[order], (moved, bad[look_at])).prior
    torch.testing.assert_close(again, learned[order], rtol=0, atol=1e-3)


def test_the_residuals_are_carried_over_by_a_gaussian_process():
    generator = np.random.default_rng(0)
    view = generator.normal(size=(80, 4))
    seen = generator.permutation(80)[:20]
    residuals = generator.uniform(-1, 1, 20)
    between = np.linalg.norm(view[seen, None] - view[None, seen], axis=-1)
    # torch's median is the lower of the two middle ones.
    h = np.sort(between[between > 0])[(20 * 19 - 1) // 2]
    process = GaussianProcessRegressor(Matern(h, nu=0.5), alpha=0.1, optimizer=None)
    expected = process.fit(view[seen], residuals).predict(view)
    found = carry_over(*(torch.from_numpy(values) for values in (view, seen, residuals)))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 30)), min_size=1, max_size=8))
def test_the_falling_shares_are_those_of_an_isotonic_regression(blocks):
    values, counts = (np.array(column) for column in zip(*blocks, strict=True))
    expected = IsotonicRegression(increasing=False).fit_transform(
        np.arange(len(values)), values, sample_weight=counts
    )
    np.testing.assert_allclose(falling(values, counts), expected, atol=1e-9)


@given(st.integers(8, 400), st.integers(0, 2**32 - 1))
def test_the_probability_falls_down_the_ranking(count, seed):
    generator = torch.Generator().manual_seed(seed)
    scores, bad = torch.randn(2, count, generator=generator)
    look_at = choose_for_review(scores, looks=20)
    labels = known_labels(Review(look_at, bad[look_at] > 0), count)
    found = probability_by_rank(scores, labels)
    assert bool(((found >= 0) & (found <= 1)).all())
    assert bool((found[scores.argsort()].diff() >= 0).all())


def test_many_columns_are_not_whitened():
    rows, prior, bad, _, look_at = two_kinds()
    wide = torch.cat([rows] + [rows[:, :1]] * 2100, dim=1)
    found = learn_from_review(prior, wide, (look_at, bad[look_at])).prior
    assert roc_auc_score(bad, found) > 0.99


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.ones(600), ValueError, r"expected \(600, C\)"),
        (torch.ones(599, 2), ValueError, r"shape \(599, 2\) for 600 samples"),
        (torch.full((600, 2), torch.nan), ValueError, "NaN or infinite; fill them in first"),
        (torch.ones(600, 2, dtype=torch.int64), TypeError, "features"),
    ],
)
def test_what_is_wrong_is_said(features, error, message):
    _, prior, bad, _, look_at = two_kinds()
    with pytest.raises(error, match=message):
        learn_from_review(prior, features, (look_at, bad[look_at]))


def test_a_review_of_nothing_teaches_nothing():
    rows, prior, bad, _, look_at = two_kinds()
    share = share_from_review(prior, look_at, bad[look_at])
    with pytest.raises(ValueError, match="the review has no sample"):
        learn_from_review(prior, rows, Review([], [], share))


def test_many_rows_are_taken_in_parts(monkeypatch):
    rows, prior, bad, _, look_at = two_kinds()
    whole = learn_from_review(prior, rows, (look_at, bad[look_at])).prior
    monkeypatch.setattr(learned_module, "_CHUNK_ROWS", 7)
    parts = learn_from_review(prior, rows, (look_at, bad[look_at])).prior
    torch.testing.assert_close(parts, whole)
