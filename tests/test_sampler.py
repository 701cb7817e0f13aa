"""Drawing by confidence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from comet_meta import ConfidenceSampler, SoftConfidentWeighter
from comet_meta.sampler import systematic_resample


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.0, 0.3])
@pytest.mark.parametrize("n", [1, 7, 1000])
def test_equal_weights_draw_the_bits_of_random_sampler(n, value):
    theirs = RandomSampler(range(n), generator=seeded())
    ours = ConfidenceSampler(torch.full((n,), value), generator=seeded())
    for _ in range(3):  # the generator goes on alike
        assert list(ours) == list(theirs)


def test_without_a_generator_a_loader_goes_on_with_the_same_random_numbers():
    def passes(**settings):
        torch.manual_seed(3)
        loader = DataLoader(torch.arange(20), batch_size=6, **settings)
        return [torch.cat(list(loader)).tolist() for _ in range(2)], torch.rand(())

    assert passes(shuffle=True) == passes(sampler=ConfidenceSampler(torch.ones(20)))


@pytest.mark.parametrize("n", [10, 11])
def test_in_several_processes_equal_weights_draw_as_distributed_sampler(n):
    for rank in range(3):
        theirs = DistributedSampler(range(n), num_replicas=3, rank=rank, seed=2)
        ours = ConfidenceSampler(torch.ones(n), num_replicas=3, rank=rank, seed=2)
        for epoch in range(3):
            theirs.set_epoch(epoch)
            ours.set_epoch(epoch)
            drawn = list(ours)
            assert drawn == list(theirs)
            assert len(drawn) == len(ours) == len(theirs)


@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=1, max_size=60).filter(any),
    st.floats(0, 1, exclude_max=True),
)
def test_each_sample_comes_as_often_as_its_weight_says_rounded_down_or_up(weights, offset):
    weights = torch.tensor(weights, dtype=torch.float64)
    drawn = systematic_resample(weights, offset)
    counts = torch.bincount(drawn, minlength=len(weights))
    expected = len(weights) * weights / weights.sum()
    assert len(drawn) == len(weights)
    assert (counts >= (expected - 1e-6).floor()).all()
    assert (counts <= (expected + 1e-6).ceil()).all()


def test_over_the_epochs_the_counts_even_out():
    weights = torch.rand(50, generator=seeded())
    weights[:5] = 0
    sampler = ConfidenceSampler(weights, generator=seeded())
    counts = sum(torch.bincount(torch.tensor(list(sampler)), minlength=50) for _ in range(200))
    expected = 50 * weights / weights.sum()
    assert (counts / 200 - expected).abs().max() < 0.05
    assert not counts[:5].any()


def test_processes_share_one_epoch():
    weights = torch.tensor([0.0, *[1.0] * 9])
    parts = [list(ConfidenceSampler(weights, num_replicas=2, rank=rank)) for rank in range(2)]
    together = torch.bincount(torch.tensor(parts).flatten(), minlength=10)
    assert together[0] == 0
    assert together.sum() == 10
    assert together[1:].min() >= 1


def test_a_weighter_is_asked_at_the_start_of_every_epoch():
    weighter = SoftConfidentWeighter(30, rule=lambda scores: (scores < 9).float())
    sampler = ConfidenceSampler(weighter)
    assert sorted(sampler) == list(range(30))
    weighter.fit(torch.arange(30.0) % 10)
    assert not {9, 19, 29} & set(sampler)


def test_a_loader_is_as_long_as_before():
    sampler = ConfidenceSampler(torch.rand(33, generator=seeded()))
    assert len(DataLoader(range(33), batch_size=8, sampler=sampler)) == 5
    assert len(list(DataLoader(range(33), batch_size=8, sampler=sampler))) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": torch.zeros(3)}, "all 0"),
        ({"weights": torch.tensor([1.0, torch.nan])}, "NaN"),
        ({"weights": torch.tensor([1.0, -1.0])}, "negative"),
        ({"weights": torch.ones(3, 2)}, "shape"),
        ({"weights": lambda: torch.ones(3)}, "num_samples"),
        ({"weights": torch.ones(3), "rank": 1}, "rank is 1"),
        ({"weights": torch.ones(3), "num_replicas": 2, "generator": seeded()}, "seed="),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConfidenceSampler(**arguments)


def test_a_function_whose_size_changes():
    with pytest.raises(ValueError, match="expected \\(4,\\)"):
        list(ConfidenceSampler(lambda: torch.ones(3), 4))
