"""RowScorer: against an independent search, invariances, copies, and messages."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from comet_meta import RowScorer
from comet_meta.weights.prior import group_equal_rows


def rows(seed: int = 0, count: int = 200, columns: int = 6) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def test_scores_equal_an_independent_search():
    table = rows(count=40, columns=3).double()
    found = RowScorer(draws=5, size=4)(table).numpy()
    scaled = ((table - table.mean(0)) / table.std(0, correction=0)).numpy()
    variances, directions = np.linalg.eigh(scaled.T @ scaled / 40)
    views = [scaled, scaled @ directions / np.sqrt(variances + variances.mean())]
    expected = []
    for view in views:
        generator = torch.Generator().manual_seed(0)
        sums, met = np.zeros(40), np.zeros(40)
        for _ in range(5):
            chosen = torch.randperm(40, generator=generator)[:4].numpy()
            for i in range(40):
                others = [j for j in chosen if j != i]
                sums[i] += min(np.linalg.norm(view[i] - view[j]) for j in others)
                met[i] += 1
        mean = sums / met
        expected.append(mean / np.sort(mean)[19])  # torch's median is the lower one
    np.testing.assert_allclose(found, np.mean(expected, axis=0), rtol=1e-4)


def test_bad_rows_that_resemble_each_other_are_found():
    table = rows(count=300)
    table[:15] = 4 + 0.1 * table[:15]  # a tight group, among whose members neighbours are near
    bad = torch.arange(300) < 15
    assert roc_auc_score(bad, RowScorer()(table)) > 0.99


def test_offset_scale_and_constant_columns_change_nothing():
    table = rows().double()
    moved = torch.cat([1e5 + 3 * table, torch.full((200, 1), 1e5, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(RowScorer()(moved), RowScorer()(table), rtol=1e-3, atol=1e-4)


def test_a_row_is_not_explained_by_its_copy():
    table = rows(count=100)
    table[7] += 6
    alone = RowScorer()(table)
    twice = RowScorer()(torch.cat([table, table]))
    assert int(alone.argmax()) == 7
    assert set(twice.topk(2).indices.tolist()) == {7, 107}
    assert torch.equal(twice[:100], twice[100:])
    assert RowScorer()(torch.ones(9, 3)).tolist() == [0] * 9


def test_copies_are_numbered_by_their_first_rows():
    table = rows(count=5)[[0, 1, 0, 2, 1, 3]]
    group, first = group_equal_rows(table)
    assert group.tolist() == [0, 1, 0, 2, 1, 3]
    assert first.tolist() == [0, 1, 3, 5]


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (torch.ones(4, 2, dtype=torch.int64), TypeError, "floating-point"),
        ([["a"]], TypeError, "list"),
        (torch.ones(1, 2), ValueError, "N >= 2"),
        (torch.ones(4, 2, 2), ValueError, r"\(N, C\)"),
        (torch.tensor([[0.0], [torch.nan], [1.0]]), ValueError, r"1 rows have .*\[1\]"),
    ],
)
def test_bad_rows_get_a_sentence(table, error, message):
    with pytest.raises(error, match=message):
        RowScorer()(table)


@pytest.mark.parametrize("option", [{"draws": 0}, {"size": 0}])
def test_bad_settings_get_a_sentence(option):
    with pytest.raises(ValueError, match="expected at least 1"):
        RowScorer(**option)


@pytest.mark.parametrize("value", [1e25, 1e200, 1.7e308])
def test_a_value_whose_square_overflows_is_the_most_suspect(value):
    table = rows().double()
    table[7, 2] = value
    scores = RowScorer()(table)
    assert scores.isfinite().all()
    assert int(scores.argmax()) == 7


@pytest.mark.parametrize("exponent", [-1000.0, 900.0])
def test_a_scale_far_from_1_changes_no_digit(exponent):
    table = rows().double()
    assert torch.equal(RowScorer()(table * 2.0**exponent), RowScorer()(table))
