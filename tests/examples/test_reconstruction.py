"""Feature reconstruction."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_examples.detectors import DETECTORS, Exposable, Reconstruction
from comet_examples.training import FeatureRows, TrainingSettings, predict, train
from comet_meta.vision.backbones import load_backbone

CHANNELS = [5, 7]


def levels(count: int = 12, seed: int = 0) -> list[torch.Tensor]:
    """Every position of a picture is a multiple of one vector, so a width of 4 suffices."""
    generator = torch.Generator().manual_seed(seed)
    amplitude = torch.randint(2, (count, 1, 1, 1), generator=generator) * 2.0 - 1
    fine = amplitude * torch.linspace(-1, 1, CHANNELS[0]).reshape(1, -1, 1, 1)
    coarse = amplitude * torch.linspace(1, 2, CHANNELS[1]).reshape(1, -1, 1, 1)
    return [
        level + 0.05 * torch.randn(count, level.shape[1], side, side, generator=generator)
        for level, side in ((fine, 8), (coarse, 4))
    ]


def build(**options) -> Reconstruction:
    torch.manual_seed(0)
    return Reconstruction(CHANNELS, (32, 24), **({"width": 4, "top": 2} | options))


def trained(steps: int = 100, **options) -> Reconstruction:
    data = FeatureRows(levels(), torch.arange(12))
    settings = TrainingSettings("plain", steps=steps, batch_size=6, schedule="cosine")
    options = {"dropout": 0.0, "width": 8, "learning_rate": 0.01} | options
    return train(lambda: build(**options), data, settings).detector


def test_shapes_and_ranges():
    detector = build().eval()
    features = levels(3)
    assert detector.losses(features).shape == (3,)
    assert [x.shape for x in detector.distances(features)] == [(3, 8, 8), (3, 4, 4)]
    assert detector.scores(features).shape == (3,)
    assert detector.maps(features).shape == (3, 32, 24)
    assert all(0 <= x.min() <= x.max() <= 2 for x in detector.distances(features))
    assert DETECTORS["reconstruction"] is Reconstruction
    assert not isinstance(detector, Exposable)


def test_the_distance_is_one_minus_the_cosine_by_hand():
    detector = build().eval()
    features = levels(2)
    rebuilt = detector._rebuilt(detector.scaler(features))
    for own, other, distance in zip(features, rebuilt, detector.distances(features), strict=True):
        product = (own * other).sum(dim=1)
        norms = own.square().sum(dim=1).sqrt() * other.square().sum(dim=1).sqrt()
        torch.testing.assert_close(distance, 1 - product / norms)
    mean = [x.mean(dim=(1, 2)) for x in detector.distances(features)]
    torch.testing.assert_close(detector.losses(features), (mean[0] + mean[1]) / 2)


def test_losses_of_weighted_patches_by_hand():
    detector, features = build().eval(), levels(2)
    assert torch.equal(detector.losses(features, torch.ones(2, 4, 4)), detector.losses(features))
    weights = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    fine, coarse = detector.distances(features)
    doubled = weights.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    expected = ((doubled * fine).mean(dim=(1, 2)) + (weights * coarse).mean(dim=(1, 2))) / 2
    torch.testing.assert_close(detector.losses(features, weights), expected)


def test_patches_of_weight_zero_have_no_gradient():
    detector = build(blocks=1).eval()  # it looks two coarse positions around
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(2, width, side, side, generator=generator).requires_grad_()
        for width, side in zip(CHANNELS, (16, 8), strict=True)
    ]
    weights = torch.ones(2, 8, 8)
    weights[0, :, :6] = 0
    fine, coarse = torch.autograd.grad(detector.losses(leaves, weights).sum(), leaves)
    assert (coarse[0, ..., :4] == 0).all()
    assert (fine[0, ..., :8] == 0).all()
    assert (coarse[0, ..., 6:] != 0).any()
    assert (coarse[1, ..., :4] != 0).any()


def test_it_learns_what_is_normal_and_marks_what_is_not():
    detector = trained()
    good = levels(4, seed=1)
    before = build(dropout=0.0, width=8).eval()
    assert detector.losses(good).mean() < 0.5 * before.losses(good).mean()
    bad = [x.clone() for x in good]
    bad[0][:, :, :2, :2] = torch.tensor([1.0, -1, 0, -1, 1]).reshape(1, -1, 1, 1)  # orthogonal
    assert detector.scores(bad).min() > detector.scores(good).max()
    difference = (detector.patch_scores(bad) - detector.patch_scores(good)).mean(dim=0)
    row, column = divmod(int(difference.argmax()), 8)
    assert max(row, column) < 3


def test_dropout_hides_parts_in_training_only():
    features = levels(3)
    detector = build(dropout=0.5)
    assert not torch.equal(detector.losses(features), detector.losses(features))
    detector.eval()
    assert torch.equal(detector.losses(features), detector.losses(features))
    whole = build(dropout=0.0)
    assert torch.equal(whole.losses(features), whole.losses(features))


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(4)), factor=st.floats(0.1, 10))
def test_samples_are_apart_and_scale_does_not_matter(order, factor):
    features = levels(4)
    detector = build().eval()
    losses = detector.losses(features)
    torch.testing.assert_close(detector.losses([x[order] for x in features]), losses[order])
    scaled = build().eval()
    for one, other in ((detector, features), (scaled, [factor * x for x in features])):
        one.fit_statistics([other])
    again = scaled.losses([factor * x for x in features])
    torch.testing.assert_close(again, detector.losses(features), rtol=1e-3, atol=1e-4)


def test_every_parameter_is_trained():
    detector = build(dropout=0.0)
    (optimizer,) = detector.optimizers()
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in detector.parameters()}
    detector.losses(levels()).sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in detector.parameters())


def test_the_same_seed_gives_the_same_bits():
    first, again = trained(20), trained(20)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )


def test_a_vit_is_a_backbone(tmp_path):
    """With weights from a file, on pictures of another size than those it was made for."""
    name = "vit_tiny_patch16_224"
    torch.manual_seed(3)
    vit = timm.create_model(name, num_classes=5).eval()
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    backbone = load_backbone(name, tmp_path / "vit.pth")
    pictures = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 255
    features = backbone(pictures)
    with torch.no_grad():
        normalised = (pictures - backbone.mean) / backbone.std
        expected = vit.forward_intermediates(
            normalised, indices=[4, 8], intermediates_only=True, norm=False
        )
    for level, own in zip(features, expected, strict=True):
        torch.testing.assert_close(level, own)
    small = backbone(pictures[..., :64, :48])
    assert [x.shape for x in small] == [(4, 192, 4, 3)] * 2
    data = FeatureRows(small, torch.arange(4))

    def built() -> Reconstruction:
        return Reconstruction(backbone.channels, (64, 48), width=16)

    settings = TrainingSettings("comet", steps=20, batch_size=4)
    trained = train(built, data, settings)
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    assert predict(trained.detector, data)[1].shape == (4, 64, 48)


@pytest.mark.parametrize("wrong", [[torch.zeros(2, 5, 8, 8)], [torch.zeros(2, 4, 8, 8)] * 2])
def test_other_levels_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected \(B, C, h, w\) with C = \[5, 7\]"):
        build().losses(wrong)
