"""The memory bank that every training is compared with."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_examples.bank import MemoryBank, nearest_in, patched
from comet_examples.training import FeatureRows
from comet_meta.vision.features import patch_features


def features(count: int = 6, channels: int = 4, side: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, channels, side, side, generator=generator) * 3 + 7]


def fitted(levels: list[torch.Tensor], rows: list[int], **options) -> MemoryBank:
    bank = MemoryBank((20, 20), top=2)
    bank.fit(FeatureRows(levels, torch.tensor(rows)), **options)
    return bank


def test_distances_are_those_to_the_nearest_standardised_patch():
    levels = features()
    bank = fitted(levels, [0, 1, 2], share=1.0)
    train = levels[0][:3].double().transpose(0, 1).flatten(1)
    mean, std = train.mean(dim=1), train.std(dim=1, correction=0)
    scaled = (levels[0].double() - mean[:, None, None]) / std[:, None, None]
    memory = scaled[:3].permute(0, 2, 3, 1).flatten(0, 2)
    queries = scaled[3:].permute(0, 2, 3, 1).flatten(0, 2)
    expected = (queries[:, None] - memory).norm(dim=2).min(dim=1).values.reshape(3, 25)
    found = bank.patch_scores([levels[0][3:]]).double()
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-4, atol=1e-4)
    scores, maps = bank.predict(FeatureRows(levels, torch.tensor([3, 4, 5])))
    highest = expected.sort(dim=1, descending=True).values[:, :2].mean(dim=1)
    torch.testing.assert_close(scores.double(), highest, rtol=1e-4, atol=1e-4)
    assert maps.shape == (3, 20, 20)


@settings(max_examples=20, deadline=None)
@given(share=st.floats(0.01, 1), seed=st.integers(0, 5))
def test_the_memory_is_a_share_of_the_training_patches_drawn_by_seed(share, seed):
    levels = features()
    bank = fitted(levels, [0, 2, 4], share=share, seed=seed)
    assert len(bank.patches) == max(1, round(share * 75))
    whole = fitted(levels, [0, 2, 4], share=1.0).patches
    distances, nearest = nearest_in(whole, bank.patches)
    assert float(distances.max()) < 1e-2
    assert len(set(nearest.tolist())) == len(bank.patches)
    assert torch.equal(bank.patches, fitted(levels, [0, 2, 4], share=share, seed=seed).patches)


def test_other_seeds_draw_other_patches():
    first, other = (fitted(features(), [0, 1], share=0.2, seed=seed).patches for seed in (0, 1))
    assert not torch.equal(first, other)


def test_several_levels_become_patch_features():
    levels = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)]
    assert torch.equal(patched(levels)[0], patch_features(levels))
    assert patched(levels[:1])[0] is levels[0]
    bank = MemoryBank((16, 16))
    bank.fit(FeatureRows(levels, torch.arange(2)))
    assert bank.patch_scores(levels).shape == (2, 8, 8)
