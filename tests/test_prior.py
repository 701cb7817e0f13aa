"""Memory scores: golden values, invariants, and what they are for."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from comet_meta import MemoryScorer
from comet_meta.weights import prior as memory_module
from comet_meta.weights.rules import standardize, trimmed_weights


def test_two_samples_judge_each_other_by_hand():
    # Each is scored against the other. Nearest distances of the patches (0, 0) and (3, 4) to the
    # other's patches are 1 and 4, of (0, 1) and (3, 0) they are 1 and 3.
    features = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[0.0, 1.0], [3.0, 0.0]]])
    scores, patch_scores = MemoryScorer(draws=1, fraction=0.5, top_patches=2).score_parts(features)
    # By place the (lower) medians are 1 and 3, of all distances 1.
    torch.testing.assert_close(patch_scores, torch.tensor([[1 / 2, 4 / 4], [1 / 2, 3 / 4]]))
    # The quartile of either sample's own distances is 1, so the mean of both patches is left.
    assert scores.tolist() == pytest.approx([0.75, 0.625])


def test_scores_equal_an_independent_nearest_neighbour_search():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 5, 3, generator=generator)
    features = features[memory_module._random_sums(features.flatten(1))[:, 0].argsort()]
    scorer = MemoryScorer(draws=1, fraction=0.5, top_patches=3, scale=1.5, seed=4)
    choices = torch.Generator().manual_seed(4)
    totals, seen = np.zeros((12, 5)), np.zeros((12, 1))
    while (seen == 0).any():
        order = torch.randperm(12, generator=choices).numpy()
        inside, outside = order[:6], order[6:]
        search = NearestNeighbors(n_neighbors=1).fit(features[inside].flatten(0, 1).numpy())
        totals[outside] += [search.kneighbors(features[i].numpy())[0].ravel() for i in outside]
        seen[outside] += 1
    distances = totals / seen
    # the lower of the two in the middle, of twelve and of sixty
    places = np.sort(distances, axis=0)[5] + np.sort(distances, axis=None)[29]
    own = np.sort(distances, axis=1)[:, 2:3]  # three of five are no larger
    scale = (own + 1.5 * np.sort(own, axis=None)[5]) / 2.5
    expected = np.sort(distances / places / scale, axis=1)[:, -3:].mean(axis=1)
    scores, patch_scores = scorer.score_parts(features)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(patch_scores.numpy(), distances / places, rtol=1e-4)


def test_a_place_that_varies_in_all_samples_hides_no_defect_elsewhere():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 16, 8, generator=generator)
    features[:, 0] *= 6  # an edge
    bad = torch.arange(200) < 20
    features[bad, 9] += 9 * torch.nn.functional.normalize(
        torch.randn(20, 8, generator=generator), dim=1
    )
    scores, patch_scores = MemoryScorer(top_patches=1).score_parts(features)
    assert roc_auc_score(bad, scores) > 0.95
    assert roc_auc_score(bad, patch_scores[:, 9]) > 0.95
    # The edge alone would rank by chance.
    assert roc_auc_score(bad, patch_scores[:, 0]) < 0.65


def test_chunks_change_nothing(monkeypatch):
    features = torch.randn(30, 4, 6, generator=torch.Generator().manual_seed(0))
    whole = MemoryScorer()(features)
    monkeypatch.setattr(memory_module, "_CHUNK_VALUES", 100)
    torch.testing.assert_close(MemoryScorer()(features), whole)


def test_the_same_seed_gives_the_same_scores_and_another_does_not():
    features = torch.randn(30, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(MemoryScorer()(features), MemoryScorer()(features))
    assert not torch.equal(MemoryScorer(seed=1)(features), MemoryScorer()(features))


@pytest.mark.parametrize("max_patches", [8192, 20])
def test_the_order_of_the_samples_is_of_no_matter(max_patches):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 4, 6, generator=generator)
    features[7] = features[3]  # a copy
    order = torch.randperm(60, generator=generator)
    scorer = MemoryScorer(max_patches=max_patches)
    # Rounding, as of features that were computed in other batches, changes next to nothing either.
    rounded = features[order] * (1 + 1e-7 * torch.randn(60, 4, 6, generator=generator))
    rounded[order == 7] = rounded[order == 3]
    expected = scorer(features)[order]
    for found in (scorer(features[order]), scorer(rounded)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_bad_samples_are_found_however_many_as_long_as_they_differ(share):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 9, 16, generator=generator)
    bad = torch.arange(200) < share * 200
    # One patch each, in a direction of its own.
    features[bad, 0] += 8 * torch.nn.functional.normalize(
        torch.randn(int(bad.sum()), 16, generator=generator), dim=1
    )
    assert roc_auc_score(bad, MemoryScorer()(features)) > 0.95


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_a_rare_variant_keeps_its_weight_and_bad_samples_of_both_lose_theirs(share):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 16, 8, generator=generator)
    # Pictures of one product are not equally even: on solar cells the median distance of a
    # picture's patches varies by a quarter.
    features *= (0.25 * torch.randn(200, 1, 1, generator=generator)).exp()
    variant = torch.arange(200) < round(200 * share)
    features[variant] += 4  # another product, different everywhere
    bad = torch.arange(200) % 20 == 0
    features[bad, :3] += 12 * torch.nn.functional.normalize(
        torch.randn(int(bad.sum()), 3, 8, generator=generator), dim=2
    )
    # Of the twentieth that is bad, and no more: those left out on top are good in any case.
    weights = 1 - trimmed_weights(MemoryScorer()(features), 0.05).p_bad
    assert weights[variant & ~bad].mean() > 0.9
    assert weights[~variant & ~bad].mean() > 0.9
    assert weights[bad].mean() < 0.2
    # By the set's usual distance alone the variant would stand out further.
    scaled, plain = MemoryScorer()(features), MemoryScorer(scale=math.inf)(features)
    by_either = [standardize(scores)[variant & ~bad].mean() for scores in (scaled, plain)]
    assert by_either[0] < by_either[1]


def test_copies_of_one_picture_are_no_division_by_zero():
    features = torch.ones(20, 6, 3)
    assert MemoryScorer()(features).tolist() == [0] * 20
    features[4, 2] = 5
    assert int(MemoryScorer()(features).argmax()) == 4


def test_a_single_patch_scores_its_distance_by_the_usual_one():
    assert MemoryScorer(fraction=0.5)(torch.tensor([[0.0], [3.0]])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("count", "size"), [(2, 1), (3, 1), (48, 24), (60, 30), (100, 30), (120, 30), (400, 100)]
)
def test_a_memory_holds_a_quarter_but_at_least_30_samples_or_half(count, size):
    sizes = set()

    class Recorder(MemoryScorer):
        def _memory(self, features, inside, generator):
            sizes.add(len(inside))
            return super()._memory(features, inside, generator)

    Recorder()(torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(0)))
    assert sizes == {size}


def test_a_variant_of_a_small_set_is_less_suspect_by_larger_memories(monkeypatch):
    def variants_among_the_first_ten():
        found = 0
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            features = torch.randn(48, 12, 8, generator=generator)
            features[:6] += 2  # strange in every patch, but like each other
            for i in range(4):  # each strange in a patch of its own
                features[8 + i, 3 * i] += 4 * torch.randn(8, generator=generator).sign()
            first = MemoryScorer()(features).topk(10).indices.tolist()
            assert sorted(first[:4]) == [8, 9, 10, 11]
            found += len({*first} & {*range(6)})
        return found

    ours = variants_among_the_first_ten()
    monkeypatch.setattr(memory_module, "_LEAST_SAMPLES", 1)
    assert ours < variants_among_the_first_ten()


def test_a_memory_holds_no_more_patches_than_it_may(monkeypatch):
    sizes = []
    nearest = MemoryScorer._nearest
    monkeypatch.setattr(
        MemoryScorer,
        "_nearest",
        lambda self, x, memory: sizes.append(len(memory)) or nearest(x, memory),
    )
    features = torch.randn(30, 4, 6, generator=torch.Generator().manual_seed(0))
    scorer = MemoryScorer(max_patches=7)
    scores = scorer(features)
    assert set(sizes) == {7}
    torch.manual_seed(1)  # of no matter: its choices are its own
    assert torch.equal(scorer(features), scores)


def test_scores_carry_no_graph():
    assert not MemoryScorer()(torch.randn(10, 3, requires_grad=True)).requires_grad


def test_features_of_samples_need_no_patches():
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(MemoryScorer()(features), MemoryScorer()(features.unsqueeze(1)))


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.ones(4, 2, dtype=torch.int64), TypeError, "floating-point"),
        (torch.ones(1, 2), ValueError, "N >= 2"),
        (torch.ones(4), ValueError, "expected"),
        (torch.tensor([[0.0], [torch.nan], [1.0]]), ValueError, r"1 samples are NaN.*\[1\]"),
    ],
)
def test_bad_features_get_a_sentence(features, error, message):
    with pytest.raises(error, match=message):
        MemoryScorer()(features)


@pytest.mark.parametrize(
    "option",
    [
        {"draws": 0},
        {"fraction": 0.0},
        {"fraction": 1.0},
        {"top_patches": 0},
        {"scale": 0},
        {"max_patches": 0},
    ],
)
def test_bad_settings_get_a_sentence(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is"):
        MemoryScorer(**option)
