"""Loader helpers."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from comet_meta import IndexedDataset, collect_scores


def test_items_keep_their_structure():
    dataset = IndexedDataset(TensorDataset(torch.arange(6.0), torch.arange(6) % 2))
    assert len(dataset) == 6
    index, (values, labels) = next(iter(DataLoader(dataset, batch_size=4)))
    assert index.tolist() == [0, 1, 2, 3]
    assert values.tolist() == [0, 1, 2, 3]
    assert labels.tolist() == [0, 1, 0, 1]


def test_scores_come_back_by_sample_whatever_the_order():
    data = torch.randn(37)
    for workers in (0, 2):
        loader = DataLoader(IndexedDataset(data), batch_size=5, shuffle=True, num_workers=workers)
        assert torch.equal(collect_scores(lambda batch: 2 * batch, loader), 2 * data)


def test_scores_carry_no_graph():
    theta = torch.ones(1, requires_grad=True)
    loader = DataLoader(IndexedDataset(torch.randn(6)), batch_size=3)
    assert not collect_scores(lambda batch: theta * batch, loader).requires_grad


def test_a_score_that_is_not_finite_is_the_most_suspect(caplog):
    scores = torch.tensor([1.0, torch.nan, 3.0, torch.inf, -torch.inf, 2.0])
    loader = DataLoader(IndexedDataset(scores), batch_size=4)
    assert collect_scores(lambda batch: batch, loader).tolist() == [1, 3, 3, 3, 3, 2]
    assert "scores of 3 of 6 samples are NaN or infinite" in caplog.text
    assert "samples [1, 3, 4]" in caplog.text
    with pytest.raises(ValueError, match="no sample's score is finite"):
        collect_scores(lambda batch: batch * torch.nan, loader)


class Pictures(Dataset):
    """As they are in other people's loops: with attributes, and a batched fetch of its own."""

    imagesize = 288

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return index * 10

    def __getitems__(self, indices):
        raise AssertionError("goes past IndexedDataset")


def test_an_indexed_data_set_has_the_attributes_of_its_own_but_not_the_batched_fetch():
    indexed = IndexedDataset(Pictures())
    assert indexed.imagesize == 288
    assert [tuple(part.tolist() for part in batch) for batch in DataLoader(indexed, batch_size=3)]
    with pytest.raises(AttributeError, match="colour"):
        _ = indexed.colour
    assert pickle.loads(pickle.dumps(indexed)).imagesize == 288
