"""SimpleNet by hand and on a toy problem."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score
from torch.nn.functional import avg_pool2d

from comet_examples.detectors import SimpleNet
from comet_examples.presets import preset_for
from comet_meta.vision.backbones import PAPER_BACKBONE


def by_hand() -> SimpleNet:
    """No adaptor, D(x) = x_0, no noise to speak of."""
    net = SimpleNet([2], (4, 4), hidden=1, noise_std=1e-12, own_noise=0, margin=0.5, top=1)
    linear, _, _, last = net.discriminator
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0]]))
        linear.bias.zero_()
        last.weight.fill_(1.0)
    return net.eval()  # batch norm is then the identity, but for its epsilon


# Two pictures of two patches; channel 0 is D.
FEATURES = [torch.tensor([[[[1.0, 0.2]], [[9.0, 9.0]]], [[[3.0, 0.1]], [[7.0, 7.0]]]])]


def test_the_loss_by_hand():
    # max(0, .5 - D) + max(0, .5 + D): (0 + 1.5, .3 + .7) and (0 + 3.5, .4 + .6).
    expected = torch.tensor([(1.5 + 1.0) / 2, (3.5 + 1.0) / 2])
    torch.testing.assert_close(by_hand().losses(FEATURES), expected, rtol=1e-4, atol=1e-4)


def test_pairs_of_losses_by_hand():
    real = torch.tensor([[0.8, -0.2, 0.3, 0.6, -1.0]])
    fake = torch.full((1, 5), -0.7)
    detector = SimpleNet([4], (8, 8), exposed=0.4)
    detector._confidence = lambda features, part_weights: (real, fake, None)
    normal, anomalous = detector.loss_pairs([]).squeeze(1).tolist()
    assert normal == pytest.approx((0.7 + 0.2 + 1.5) / 5)
    # Two fifths of the patches, the most anomalous: D = -1 and -0.2.
    assert anomalous == pytest.approx((0 + 0.3) / 2)


def test_losses_of_weighted_patches_by_hand():
    # Of the first picture the first patch counts half, of the second only the second patch counts.
    weights = torch.tensor([[[0.5, 1.0]], [[0.0, 1.0]]])
    expected = torch.tensor([(0.75 + 1.0) / 2, 1.0 / 2])
    losses = by_hand().losses(FEATURES, weights)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(by_hand().losses(FEATURES, torch.ones(2, 1, 2)), by_hand().losses(FEATURES))


def test_weights_of_a_coarser_grid_reach_the_drawn_patches():
    detector = SimpleNet([6], (8, 8), patches=10).eval()
    features = [torch.randn(3, 6, 8, 8)]
    whole = detector.losses(features)
    weights = torch.ones(3, 2, 2)
    weights[1] = 0  # a picture without any weight, four patches of one that counts
    weights[2, 0, 0] = 0
    torch.manual_seed(0)
    losses = detector.losses(features, weights)
    assert losses[1] == 0
    assert whole[1] > 0
    torch.manual_seed(0)
    assert losses[2] < detector.losses(features)[2]


def test_the_first_of_a_pair_is_the_loss():
    detector = SimpleNet([6], (8, 8))
    features = [torch.randn(3, 6, 12, 12)]
    torch.manual_seed(1)
    losses = detector.losses(features)
    torch.manual_seed(1)
    assert torch.equal(detector.loss_pairs(features)[0], losses)


def test_the_score_is_the_maximum_of_the_patches_not_minus_the_maximum_of_d():
    net = by_hand()
    expected = torch.tensor([[[-1.0, -0.2]], [[-3.0, -0.1]]])
    torch.testing.assert_close(net.patch_scores(FEATURES), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        net.scores(FEATURES), torch.tensor([-0.2, -0.1]), rtol=1e-4, atol=1e-4
    )


def test_a_picture_is_scored_by_the_mean_of_its_highest_patches():
    net = by_hand()
    net.top = 2
    torch.testing.assert_close(
        net.scores(FEATURES), torch.tensor([-0.6, -1.55]), rtol=1e-4, atol=1e-4
    )
    net.top = 5  # a picture has two patches
    torch.testing.assert_close(
        net.scores(FEATURES), torch.tensor([-0.6, -1.55]), rtol=1e-4, atol=1e-4
    )


def test_a_loss_looks_at_patches_drawn_anew():
    torch.manual_seed(0)
    net = by_hand()
    net.patches = 1
    one, other = torch.tensor([1.5, 3.5]), torch.tensor([1.0, 1.0])  # of the two patches
    seen = {int(torch.allclose(net.losses(FEATURES), one, atol=1e-3)) for _ in range(20)}
    assert seen == {0, 1}
    for _ in range(20):
        losses = net.losses(FEATURES)
        assert any(torch.allclose(losses, patch, atol=1e-3) for patch in (one, other))
    torch.testing.assert_close(
        net.scores(FEATURES), torch.tensor([-0.2, -0.1]), rtol=1e-4, atol=1e-4
    )


def test_losses_are_per_sample():
    torch.manual_seed(0)
    net = SimpleNet([6], (8, 8), noise_std=1e-9, own_noise=0).eval()
    features = torch.randn(4, 6, 3, 3)
    together = net.losses([features])
    assert together.shape == (4,)
    alone = torch.cat([net.losses([features[i : i + 1]]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    # Without noise the two halves of the loss have opposite gradients.
    net.noise_std, net.own_noise = 0.3, 0.7
    gradient = torch.autograd.grad(net.losses([features.requires_grad_()])[2], features)[0]
    assert gradient[2].abs().sum() > 0
    assert gradient[[0, 1, 3]].abs().sum() == 0


def test_maps_have_the_pictures_size_and_the_papers_blur():
    torch.manual_seed(0)
    net, features = SimpleNet([6], (64, 48)).eval(), torch.randn(2, 6, 8, 6)
    with torch.no_grad():
        maps = net.maps([features])
        sharp = torch.nn.functional.interpolate(
            net.patch_scores([features])[:, None], size=(64, 48), mode="bilinear"
        )[:, 0]
    assert maps.shape == (2, 64, 48)
    expected = gaussian_filter(sharp[0].numpy(), sigma=4, mode="mirror")
    np.testing.assert_allclose(maps[0].numpy(), expected, atol=2e-3)


def test_the_parts_have_the_papers_settings():
    net = SimpleNet([1536], (288, 288), **preset_for("simplenet", PAPER_BACKBONE).detector)
    linear, norm, activation, last = net.discriminator
    assert (linear.out_features, norm.num_features, activation.negative_slope) == (1024, 1024, 0.2)
    assert last.bias is None
    assert (net.noise_std, net.own_noise, net.standardize) == (0.015, 0, False)
    assert (net.margin, net.blur_sigma) == (0.5, 4.0)
    adaptor, discriminator = net.optimizers()
    assert type(adaptor).__name__ == "AdamW"
    assert adaptor.param_groups[0]["lr"] == 1e-4
    assert type(discriminator).__name__ == "Adam"
    assert discriminator.param_groups[0]["lr"] == 2e-4
    assert discriminator.param_groups[0]["weight_decay"] == 1e-5
    owned = {p for o in (adaptor, discriminator) for g in o.param_groups for p in g["params"]}
    assert owned == set(net.parameters())


def test_there_is_no_adaptor_unless_one_is_asked_for():
    net = SimpleNet([6], (8, 8), learning_rate=3e-3)
    (optimizer,) = net.optimizers()
    assert optimizer.param_groups[0]["lr"] == 3e-3
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(net.parameters())
    features = torch.randn(5, 6, 2, 2)
    assert torch.equal(net._adapted([features]), features.permute(0, 2, 3, 1).flatten(0, 2))
    mapped = SimpleNet([6], (8, 8), adaptor=True)._adapted([features])
    assert not torch.allclose(mapped, features.permute(0, 2, 3, 1).flatten(0, 2), atol=0.1)


def test_standardisation_makes_the_scale_of_the_features_irrelevant():
    features = 3 + 0.01 * torch.randn(100, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    net = SimpleNet([6], (8, 8))
    net.fit_statistics([x] for x in features.split(7))
    deviation, mean = torch.std_mean(features, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(net.scaler.mean, mean)
    torch.testing.assert_close(net.scaler.std, deviation, rtol=1e-3, atol=0)
    raw = SimpleNet([6], (8, 8), standardize=False)
    raw.fit_statistics([x] for x in features.split(7))
    assert raw.scaler.mean.abs().sum() == 0


def test_most_of_the_noise_varies_as_the_features_do():
    torch.manual_seed(0)
    mixing = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    features = torch.randn(50_000, 3) @ mixing
    covariance = features.T.cov()
    net = SimpleNet([3], (4, 4), noise_std=0.3, own_noise=0.7)
    expected = 0.49 * covariance + 0.09 * torch.eye(3)
    torch.testing.assert_close(net._noise(features).T.cov(), expected, rtol=0.05, atol=0.02)
    independent = SimpleNet([3], (4, 4), noise_std=0.3, own_noise=0)._noise(features)
    torch.testing.assert_close(independent.T.cov(), 0.09 * torch.eye(3), rtol=0.05, atol=0.01)
    assert net._noise(features[:1]).abs().max() < 2  # a single patch has nothing to differ from


def test_a_picture_that_is_not_finite_makes_no_other_so():
    torch.manual_seed(0)
    net, features = SimpleNet([6], (8, 8)).eval(), torch.randn(4, 6, 3, 3)
    features[1, 2] = torch.nan
    features[3, 0] = torch.inf
    assert net.losses([features]).isfinite().tolist() == [True, False, True, False]


def test_features_of_another_backbone_are_refused():
    with pytest.raises(ValueError, match=r"expected \(B, C, h, w\) with C = \[6\]"):
        SimpleNet([6], (8, 8)).losses([torch.randn(2, 5, 3, 3)])


@pytest.mark.parametrize("adaptor", [False, True])
def test_it_learns_to_tell_strange_patches(adaptor):
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(8, 3, generator=generator) @ torch.randn(3, 8, generator=generator)

    def pictures(count):
        return torch.einsum(
            "nchw,dc->ndhw", torch.randn(count, 8, 4, 4, generator=generator), plane
        )

    torch.manual_seed(0)
    net = SimpleNet([8], (16, 16), hidden=64, noise_std=0.5, adaptor=adaptor)
    data = pictures(64)
    net.fit_statistics([[data]])
    optimizers = net.optimizers()
    for _ in range(60):
        for optimizer in optimizers:
            optimizer.zero_grad()
        net.losses([data]).mean().backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 5e-3
            optimizer.step()
    net.eval()
    normal, strange = pictures(40), pictures(40)
    strange[:, :, 1, 1] += 3 * torch.randn(40, 8, generator=generator)
    with torch.no_grad():
        scores = torch.cat([net.scores([normal]), net.scores([strange])])
    assert roc_auc_score([0] * 40 + [1] * 40, scores) > 0.9


def test_a_window_of_one_is_not_pooled(monkeypatch):
    features = torch.randn(3, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(avg_pool2d(features, 1), features)  # so nothing is missed

    def fail(*_: object) -> None:
        raise AssertionError("a pooling that changes nothing")

    monkeypatch.setattr(torch.nn.functional, "avg_pool2d", fail)
    detector = SimpleNet([6], (16, 16), hidden=8)
    assert detector.losses([features]).shape == (3,)
    with pytest.raises(AssertionError, match="changes nothing"):
        SimpleNet([6], (16, 16), hidden=8, pool=2).losses([features])


def test_pooling_averages_neighbouring_positions_first():
    torch.manual_seed(0)
    pooled = SimpleNet([6], (16, 16), pool=2, hidden=8).eval()
    plain = SimpleNet([6], (16, 16), hidden=8).eval()
    plain.load_state_dict(pooled.state_dict())
    features = torch.randn(3, 6, 8, 8)
    averaged = features.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    torch.testing.assert_close(pooled.patch_scores([features]), plain.patch_scores([averaged]))
    assert pooled.maps([features]).shape == (3, 16, 16)
