"""Scores of parts from the priors: patches of pictures, values of rows."""

import numpy as np
import pytest
import torch

from comet_meta import MemoryScorer, RowScorer, SoftConfidentWeighter
from comet_meta.vision.picture_prior import memory_part_prior, memory_prior

# --- scores of patches


def patches(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 6, 8, generator=torch.Generator().manual_seed(0))


def test_the_memory_finds_the_strange_patch():
    features = patches()
    features[7, 2] += 9
    scores, patch_scores = MemoryScorer().score_parts(features)
    assert patch_scores.shape == (40, 6)
    assert divmod(int(patch_scores.argmax()), 6) == (7, 2)
    assert torch.equal(scores, MemoryScorer()(features))
    assert not patch_scores.requires_grad


def test_patch_scores_by_hand():
    # Each of two samples is scored against the other.
    features = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[0.0, 1.0], [3.0, 0.0]]])
    _, patch_scores = MemoryScorer(draws=4, fraction=0.5).score_parts(features)
    # Distances are (1, 4) and (1, 3); medians, the lower of two, are 1 and 3 by place, 1 of all.
    torch.testing.assert_close(patch_scores, torch.tensor([[0.5, 1.0], [0.5, 0.75]]))


def test_a_place_that_varies_in_all_samples_is_no_defect():
    features = patches()
    features[:, 4] *= 20  # an edge
    features[7, 2] += 9
    _, patch_scores = MemoryScorer().score_parts(features)
    assert divmod(int(patch_scores.argmax()), 6) == (7, 2)


@pytest.mark.parametrize("max_patches", [8192, 20])
def test_patch_scores_do_not_depend_on_the_order_of_the_samples(max_patches):
    features = patches()
    features[9] = features[3]  # a copy
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    scorer = MemoryScorer(max_patches=max_patches)
    _, expected = scorer.score_parts(features)
    _, found = scorer.score_parts(features[order])
    torch.testing.assert_close(found, expected[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expected[9], expected[3])
    assert expected[3].min() > 0  # no sample is explained by its copy


def test_equal_samples_and_samples_of_one_patch_have_patch_scores_too():
    scores, patch_scores = MemoryScorer().score_parts(torch.ones(10, 6, 3))
    assert (scores.tolist(), patch_scores.tolist()) == ([0] * 10, [[0] * 6] * 10)
    scores, patch_scores = MemoryScorer().score_parts(patches()[:, 0])
    # One place: twice the median divides all distances.
    torch.testing.assert_close(patch_scores, scores.unsqueeze(1) / (2 * scores.median()))


def test_a_picture_that_is_not_finite_gets_the_highest_scores():
    level = torch.randn(20, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    level[3, 1, 2, 2] = torch.nan
    scores, patch_scores = memory_part_prior([[level[:8]], [level[8:]]], 20)
    assert patch_scores.shape == (20, 6, 5)
    assert torch.isfinite(patch_scores).all()
    assert scores[3] == scores.max()
    assert (patch_scores[3] == patch_scores.max()).all()
    assert torch.equal(memory_prior([[level]], 20), scores)
    weighter = SoftConfidentWeighter(prior=scores, part_prior=patch_scores)
    assert weighter.part_weights([3]).mean() < weighter.part_weights().mean()


# --- scores of values


def plain_value_scores(table: np.ndarray, draws: int, size: int) -> np.ndarray:
    """Row by row: mean difference from the nearest of a few other rows, column by column."""
    deviation = table.std(axis=0)
    scaled = (table - table.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    generator = torch.Generator().manual_seed(0)
    totals, met = np.zeros_like(scaled), np.zeros(len(table))
    for _ in range(draws):
        chosen = torch.randperm(len(table), generator=generator)[:size].tolist()
        for i in range(len(table)):
            others = [j for j in chosen if j != i]
            nearest = min(others, key=lambda j: np.linalg.norm(scaled[i] - scaled[j]))
            totals[i] += np.abs(scaled[i] - scaled[nearest])
            met[i] += 1
    return totals / met[:, None]


def test_value_scores_equal_a_slow_search():
    table = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).double()
    table[:, 1] = 2.5  # constant
    scorer = RowScorer(draws=5, size=4)
    scores, value_scores = scorer.score_parts(table)
    expected = plain_value_scores(table.numpy(), draws=5, size=4)
    np.testing.assert_allclose(value_scores.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert value_scores[:, 1].tolist() == [0] * 40
    assert value_scores[:, [0, 2, 3]].min() > 0
    assert torch.equal(scores, scorer(table))
    assert value_scores.dtype == torch.float32


def test_a_value_is_not_explained_by_a_copy_of_its_row():
    table = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    table[7, 2] = 9
    _, value_scores = RowScorer().score_parts(torch.cat([table, table]))
    assert divmod(int(value_scores[:50].argmax()), 4) == (7, 2)
    assert torch.equal(value_scores[:50], value_scores[50:])
    assert RowScorer().score_parts(torch.ones(9, 3))[1].tolist() == [[0] * 3] * 9
