"""The prior from frozen features: how closely it looks, and what it then finds."""

import pytest
import torch

from comet_meta import MemoryScorer
from comet_meta.vision.backbones import load_backbone
from comet_meta.vision.features import PatchFeatures, PyramidFeatures
from comet_meta.vision.picture_prior import memory_prior


class Recorder(MemoryScorer):
    """Remembers the features that it scored."""

    def score_parts(self, features):
        self.shape = tuple(features.shape)
        return super().score_parts(features)


@pytest.mark.parametrize(
    ("count", "level", "patches"),
    [(20, (16, 16), 16 * 16), (50, (30, 30), 20 * 20), (50, (30, 4), 20 * 4), (600, (16, 16), 36)],
)
def test_patches_are_as_fine_as_their_number_allows(count, level, patches):
    recorder = Recorder(draws=1, max_patches=50)
    memory_prior([[torch.randn(count, 2, *level)]], count, recorder)
    assert recorder.shape == (count, patches, 2)


def test_a_small_defect_is_found_in_a_small_set():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, 24, 24, generator=generator)
    features[:3, :, 11, 7] += 5  # one of 576 positions
    scores = memory_prior([[features]], 30)
    assert sorted(scores.topk(3).indices.tolist()) == [0, 1, 2]
    # In patches of 4 x 4 positions it is lost.
    assert sorted(memory_prior([[features]], 600).topk(3).indices.tolist()) != [0, 1, 2]


def test_the_prior_does_not_depend_on_the_detector():
    generator = torch.Generator().manual_seed(0)
    images = 255 * torch.rand(12, 3, 64, 64, generator=generator)
    backbone = load_backbone("resnet10t", "random")
    priors = [
        memory_prior([extractor(backbone).eval()(images)], len(images))
        for extractor in (PatchFeatures, PyramidFeatures)
    ]
    torch.testing.assert_close(*priors)
