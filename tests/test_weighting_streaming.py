"""Scores that come batch by batch: when the weights change, and who has none yet."""

import pytest
import torch

from comet_meta import SoftConfidentWeighter
from fitting import OUTLIER


def test_streaming_equals_batch():
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0))
    batch = SoftConfidentWeighter(40)
    batch.fit(scores)
    streaming = SoftConfidentWeighter(40)
    for index in torch.randperm(40).split(7):
        streaming.update(index, scores[index])
    assert torch.equal(streaming(), batch())
    assert torch.equal(streaming.threshold, batch.threshold)


def test_streaming_grows_with_a_data_set_of_unknown_size():
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0))
    streaming = SoftConfidentWeighter()
    for index in torch.arange(40).split(8):
        streaming.update(index, scores[index])
    streaming.fit()
    batch = SoftConfidentWeighter()
    batch.fit(scores)
    assert torch.equal(streaming(), batch())


def test_never_seen_samples_have_weight_one_and_rank_last():
    weighter = SoftConfidentWeighter(20, rule="hard")
    weighter.update(torch.arange(10), torch.tensor([1.0] * 4 + [1.1] * 5 + [9.0]))
    weighter.fit()
    assert weighter(torch.arange(10, 20)).tolist() == [1] * 10
    assert weighter().tolist().count(0) == 1
    assert weighter.ranking(1).tolist() == [9]
    assert sorted(weighter.ranking()[-10:].tolist()) == list(range(10, 20))


def test_a_sample_never_seen_has_weight_one_whatever_it_had():
    weighter = SoftConfidentWeighter(20, rule="hard")
    weighter.weights.fill_(0.5)
    weighter.update(torch.arange(10), OUTLIER)
    weighter.fit()
    assert weighter()[10:].tolist() == [1] * 10
    assert weighter()[:10].tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]


def test_a_fit_without_any_score_leaves_all_weights_one():
    for weighter in (SoftConfidentWeighter(5), SoftConfidentWeighter()):
        weighter.fit()
        assert (weighter() == 1).all()
        assert weighter.threshold == torch.inf
        assert weighter.ranking().tolist() == list(range(len(weighter())))


def test_weights_change_once_as_many_scores_have_come_as_there_are_samples():
    weighter = SoftConfidentWeighter(10, rule="hard")
    weighter.update(torch.arange(6), OUTLIER[:6])
    assert weighter().tolist() == [1] * 10
    weighter.update(torch.arange(6, 10), OUTLIER[6:])
    assert weighter().tolist().count(0) == 1
    higher = OUTLIER.clone()
    higher[0] = 99
    for part in (torch.arange(3), torch.arange(3, 6), torch.arange(6, 9)):  # nine of ten
        weighter.update(part, higher[part])
        assert weighter().nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    weighter.update([9], higher[9:])
    assert (weighter() == 0).nonzero().flatten().tolist() == [0, 4]
    weighter.update([1], torch.tensor([1.9]))
    weighter.fit()  # by hand, which begins a new account
    assert weighter._updates == 0


def test_momentum_keeps_a_share_of_the_old_score():
    weighter = SoftConfidentWeighter(10, momentum=0.75)
    weighter.fit(torch.full((10,), 4.0))
    weighter.fit(torch.full((10,), 8.0))
    assert weighter.scores.tolist() == [5.0] * 10  # 0.75 * 4 + 0.25 * 8


def test_a_streamed_batch_is_what_all_processes_bring_together(monkeypatch):
    monkeypatch.setattr(
        "comet_meta.weights.weighter.distributed.gather_batches",
        lambda index, scores: (torch.cat([index, index + 4]), torch.cat([scores, -scores])),
    )
    weighter = SoftConfidentWeighter(8)
    weighter.update(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert weighter.scores.tolist() == [1, 2, 3, 4, -1, -2, -3, -4]
    assert weighter._updates == 0  # all eight have come


def test_scores_bring_no_graph_along():
    weighter = SoftConfidentWeighter(10, rule="hard")
    weighter.fit(OUTLIER.clone().requires_grad_())
    weighter.update([0], torch.ones(1, requires_grad=True))
    assert not weighter.scores.requires_grad
    assert not weighter().requires_grad


def test_streamed_scores_that_are_not_finite_are_refused():
    weighter = SoftConfidentWeighter(20)
    with pytest.raises(ValueError, match="1 of 2 scores are NaN or infinite"):
        weighter.update([0, 1], torch.tensor([1.0, torch.nan]))
    with pytest.raises(TypeError, match="floating-point"):
        weighter.update([0, 1], torch.tensor([1, 2]))
