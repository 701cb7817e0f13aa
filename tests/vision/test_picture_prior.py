"""The prior from frozen features: how closely it looks, and what it then finds."""

import pytest
import torch

from comet_meta import MemoryScorer
from comet_meta.vision.backbones import load_backbone
from comet_meta.vision.features import PatchFeatures, PyramidFeatures
from comet_meta.vision.picture_prior import (
    memory_part_prior,
    memory_prior,
    strangest_features,
)


class Recorder(MemoryScorer):
    """Remembers the shapes of the features that it scored."""

    def score_parts(self, features):
        self.shapes = [*getattr(self, "shapes", []), tuple(features.shape)]
        return super().score_parts(features)


@pytest.mark.parametrize(
    ("count", "level", "grids"),
    [
        (20, (16, 16), [16 * 16, 6 * 6]),
        (50, (30, 30), [20 * 20, 6 * 6]),
        (50, (30, 4), [20 * 4, 6 * 4]),
        (600, (16, 16), [12 * 12, 6 * 6]),
        (600, (6, 5), [6 * 5]),
        (3000, (16, 16), [6 * 6]),
    ],
)
def test_patches_are_as_fine_as_their_number_allows_and_coarse_besides(count, level, grids):
    recorder = Recorder(draws=1, max_patches=50)
    memory_prior([[torch.randn(count, 2, *level)]], count, recorder)
    assert recorder.shapes == [(count, patches, 2) for patches in grids]


def test_a_small_defect_is_found_in_fine_patches_alone():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, 24, 24, generator=generator)
    features[:3, :, 11, 7] += 5  # one of 576 positions
    fine = MemoryScorer()(features.flatten(2).transpose(1, 2))
    assert sorted(fine.topk(3).indices.tolist()) == [0, 1, 2]
    # In patches of 4 x 4 positions it is lost.
    coarse = memory_prior([[features]], 50_000)
    assert sorted(coarse.topk(3).indices.tolist()) != [0, 1, 2]


def test_a_small_defect_is_found_on_both_grids_together():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, 20, 20, generator=generator)
    features[:3, :, 11, 7] += 6  # one of 400 positions
    scores = memory_prior([[features]], 30)
    assert sorted(scores.topk(3).indices.tolist()) == [0, 1, 2]
    # In patches of about 4 x 4 positions it is lost.
    assert sorted(memory_prior([[features]], 50_000).topk(3).indices.tolist()) != [0, 1, 2]


def test_a_large_defect_is_found_on_the_coarse_grid():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, 18, 18, generator=generator)
    features[:3, :, 6:12, 3:9] += 1.2  # four coarse patches, weak in every position
    scores, patch_scores = memory_part_prior([[features]], 30)
    assert sorted(scores.topk(3).indices.tolist()) == [0, 1, 2]
    # No single patch of the fine grid gives it away.
    fine = MemoryScorer()(features.flatten(2).transpose(1, 2))
    assert sorted(fine.topk(3).indices.tolist()) != [0, 1, 2]
    assert patch_scores.shape == (30, 18, 18)


def test_the_score_is_the_mean_over_both_grids_in_medians():
    features = torch.randn(25, 3, 12, 12, generator=torch.Generator().manual_seed(0)).double()

    def score(patches):  # (N, C, h, w)
        mean = patches.mean(dim=(0, 2, 3), keepdim=True)
        scaled = (patches - mean) / patches.std(dim=(0, 2, 3), correction=0, keepdim=True)
        found = MemoryScorer()(scaled.flatten(2).transpose(1, 2))
        return found / found.median()

    coarse = features.unflatten(2, (6, 2)).unflatten(4, (6, 2)).mean(dim=(3, 5))
    expected = (score(features) + score(coarse)) / 2
    torch.testing.assert_close(
        memory_prior([[features.float()]], 25), expected, rtol=1e-4, atol=1e-4
    )


def test_the_prior_does_not_depend_on_the_detector():
    generator = torch.Generator().manual_seed(0)
    images = 255 * torch.rand(12, 3, 64, 64, generator=generator)
    backbone = load_backbone("resnet10t", "random")
    priors = [
        memory_prior([extractor(backbone).eval()(images)], len(images))
        for extractor in (PatchFeatures, PyramidFeatures)
    ]
    torch.testing.assert_close(*priors)


def test_what_is_strange_about_a_picture_is_the_mean_of_its_five_strangest_patches():
    features = torch.randn(30, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    features[3, 0, 0, 0] = torch.nan
    features[7, :, 1, :] += torch.tensor([8.0, 0, 0, 0])[:, None]
    batches = [[features[:20]], [features[20:]]]
    _, patch_scores = memory_part_prior(batches, 30)
    strange = strangest_features(batches, patch_scores)
    # The five patches of the middle row.
    torch.testing.assert_close(strange[7], features[7, :, 1, :].mean(dim=1))
    known = torch.arange(30) != 3
    torch.testing.assert_close(strange[3], strange[known].mean(dim=0))
    assert int(strange[:, 0].argmax()) == 7
