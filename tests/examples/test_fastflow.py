"""FastFlow against its definition: an exact inverse, autograd's Jacobian, known densities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm
from sklearn.metrics import roc_auc_score
from torch import nn

from comet_examples.detectors import FastFlow
from comet_examples.detectors.fastflow import Coupling, Flow
from comet_examples.training import FeatureRows, TrainingSettings, predict, train
from comet_meta import CoMetOptimizerWrapper, MetaStep

CHANNELS = [6, 5]


def randomised(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """An untouched flow is a mere shuffle, of which nearly every claim holds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, scale, generator=generator)
    return module


def levels(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(count, 6, 8, 4, generator=generator),
        torch.randn(count, 5, 4, 2, generator=generator),
    ]


def detector(**options) -> FastFlow:
    torch.manual_seed(0)
    return randomised(FastFlow(CHANNELS, (32, 16), **{"steps": 3, **options}))


# --- the flow


@settings(max_examples=25, deadline=None)
@given(
    channels=st.integers(2, 9),
    steps=st.integers(1, 8),
    ratio=st.sampled_from([0.1, 0.5, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_the_inverse_is_exact(channels, steps, ratio, seed):
    torch.manual_seed(seed)
    flow = randomised(Flow(channels, steps, hidden_ratio=ratio), seed).double()
    x = torch.randn(2, channels, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        z, log_determinant = flow(x)
        assert log_determinant.abs().min() > 0  # not a mere shuffle
        torch.testing.assert_close(flow.inverse(z), x, rtol=0, atol=1e-5)
        torch.testing.assert_close(flow(flow.inverse(x))[0], x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [7, 8])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_inverse_of_a_coupling_is_exact_in_single_precision(channels, kernel_size):
    torch.manual_seed(0)
    coupling = randomised(Coupling(channels, kernel_size))
    x = torch.randn(2, channels, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(coupling.inverse(coupling(x)[0]), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("channels", "steps"), [(2, 1), (4, 2), (5, 3), (3, 8)])
def test_the_log_determinant_is_that_of_the_jacobian(channels, steps):
    torch.manual_seed(0)
    flow = randomised(Flow(channels, steps), scale=0.5).double()
    pictures = torch.randn(2, channels, 3, 2, dtype=torch.float64)
    together = flow(pictures)[1]
    assert together.shape == (2, 3, 2)
    for x, found in zip(pictures.split(1), together, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v)[0], x)
        sign, expected = torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))
        assert sign.abs() == 1
        torch.testing.assert_close(found.sum(), expected, rtol=1e-9, atol=1e-9)


def test_steps_alternate_between_neighbourhoods_and_positions():
    kernels = [coupling.network[0].kernel_size for coupling in Flow(4, 5).couplings]
    assert kernels == [(3, 3), (1, 1), (3, 3), (1, 1), (3, 3)]


def test_log_scales_are_bounded():
    coupling = randomised(Coupling(4, 3, clamp=0.7), scale=100)
    _, log_determinant = coupling(torch.randn(1, 4, 5, 5))
    # Two channels are scaled.
    assert log_determinant.abs().max() <= 2 * 0.7 + 1e-6
    assert log_determinant.abs().max() > 2 * 0.7 - 1e-3


def test_a_flow_starts_as_the_standard_normal_density():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    found = Flow(5, 8).double().log_likelihood(x)
    torch.testing.assert_close(found, torch.from_numpy(norm.logpdf(x.numpy()).sum(axis=1)))


def test_the_density_of_a_known_gaussian():
    # Channels 3 and 0 stay; 2 becomes x / 2 + 1 and 1 becomes 3 x - 0.5. So 2 has mean -2 and
    # deviation 2, 1 has mean 1/6 and deviation 1/3, the others are standard normal.
    coupling = Coupling(4, 3, clamp=2.0).double()
    coupling.order.copy_(torch.tensor([3, 0, 2, 1]))
    log_scale = torch.tensor([0.5, 3.0], dtype=torch.float64).log()
    with torch.no_grad():
        coupling.network[-1].bias.copy_(
            torch.cat([2 * (log_scale / 2).atanh(), torch.tensor([1.0, -0.5])])
        )
    flow = Flow(4, 1).double()
    flow.couplings[0] = coupling
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    expected = multivariate_normal([0, 1 / 6, -2, 0], [1, 1 / 9, 4, 1]).logpdf(
        x.movedim(1, -1).numpy()
    )
    torch.testing.assert_close(flow.log_likelihood(x), torch.from_numpy(expected))


def test_a_single_channel_is_refused():
    with pytest.raises(ValueError, match="needs 2 or more, not 1"):
        Flow(1, 8)


# --- the detector


def test_losses_are_per_sample():
    net, features = detector(), levels(4)
    together = net.losses(features)
    assert together.shape == (4,)
    alone = torch.cat([net.losses([x[i : i + 1] for x in features]) for i in range(4)])
    torch.testing.assert_close(together, alone)
    leaves = [x.requires_grad_() for x in features]
    for gradient in torch.autograd.grad(net.losses(leaves)[2], leaves):
        assert gradient[2].abs().min() > 0
        assert gradient[[0, 1, 3]].abs().sum() == 0


def test_the_loss_is_in_nats_per_feature_value_over_all_levels():
    net, features = detector(), levels(3)
    fine, coarse = (
        -flow.log_likelihood(x).sum(dim=(1, 2)) for flow, x in zip(net.flows, features, strict=True)
    )
    values = 6 * 8 * 4 + 5 * 4 * 2
    torch.testing.assert_close(net.losses(features), (fine + coarse) / values)
    # Standard normal features under the untrained flow: the entropy of the normal distribution.
    many = levels(400)
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    assert FastFlow(CHANNELS, (32, 16)).losses(many).mean().item() == pytest.approx(
        entropy, abs=0.01
    )


def test_losses_of_weighted_patches_by_hand():
    net, features = detector(), levels(3)
    assert torch.equal(net.losses(features, torch.ones(3, 4, 2)), net.losses(features))
    weights = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0))
    fine, coarse = (-flow.log_likelihood(x) for flow, x in zip(net.flows, features, strict=True))
    doubled = weights.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    expected = (doubled * fine).sum(dim=(1, 2)) + (weights * coarse).sum(dim=(1, 2))
    found = net.losses(features, weights)
    torch.testing.assert_close(found, expected / (6 * 8 * 4 + 5 * 4 * 2))
    assert torch.equal(net.loss_pairs(features, weights)[0], found)
    assert torch.equal(net.loss_pairs(features, weights)[1], net.loss_pairs(features)[1])


def test_patches_of_weight_zero_have_no_gradient():
    net = randomised(FastFlow([4], (24, 24), steps=1))  # it looks two positions around
    level = torch.randn(2, 4, 12, 12, requires_grad=True)
    weights = torch.ones(2, 3, 3)
    weights[0, :, :2] = 0  # eight columns of positions
    (gradient,) = torch.autograd.grad(net.losses([level], weights).sum(), [level])
    assert (gradient[0, ..., :6] == 0).all()
    assert (gradient[0, ..., 8:] != 0).any()
    assert (gradient[1, ..., :6] != 0).any()


def test_noise_is_of_training_alone_and_in_units_of_the_standardised_features():
    # Noise that came before the scaler would drown features of 1/100 of a unit. An untouched flow
    # only shuffles, so latents are features and noise.
    level = 0.01 * torch.randn(40, 6, 16, 16)
    noisy = FastFlow([6], (16, 16), steps=1, noise_std=0.5)
    noisy.fit_statistics([[level]])
    (plain,) = noisy.eval().level_scores([level])
    (once,), (again,) = noisy.train().level_scores([level]), noisy.level_scores([level])
    assert not torch.equal(once, again)
    assert torch.equal(noisy.eval().level_scores([level])[0], plain)
    # Half the mean square has 1/2 of the features and 0.5² / 2 of the noise.
    assert plain.mean().item() == pytest.approx(0.5, rel=1e-3)
    assert once.mean().item() == pytest.approx(0.625, rel=0.02)
    quiet = FastFlow([6], (16, 16), steps=1)
    state = torch.get_rng_state()
    quiet.losses([level])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("noise_std", [-0.1, math.nan])
def test_noise_below_zero_is_refused(noise_std):
    with pytest.raises(ValueError, match="expected 0"):
        FastFlow([6], (16, 16), noise_std=noise_std)


def test_pairs_of_losses_by_hand():
    detector = FastFlow([4, 6], (8, 8), steps=2)
    features = [torch.randn(3, 4, 4, 4), torch.randn(3, 6, 2, 2)]
    detector.fit_statistics([features])
    normal, anomalous = detector.loss_pairs(features)
    torch.testing.assert_close(normal, detector.losses(features))
    # How much the highest tenth of the scores, two of 16 positions and one of 4, falls short of 2.
    fine, coarse = (level.flatten(1).sort().values for level in detector.level_scores(features))
    short = (2 - fine[:, -2:]).clamp(min=0).mean(dim=1) + (2 - coarse[:, -1]).clamp(min=0)
    torch.testing.assert_close(anomalous, short / 2)


def test_scores_by_hand():
    # Untrained, without statistics: half the mean square of the features themselves.
    fine = torch.zeros(1, 2, 2, 2)
    fine[0, :, 0, 1] = torch.tensor([1.0, 3.0])
    coarse = torch.full((1, 2, 1, 1), 4.0)
    net = FastFlow([2, 2], (2, 2))
    expected = torch.tensor([[[0.0, 2.5], [0.0, 0.0]]])
    torch.testing.assert_close(net.level_scores([fine, coarse])[0], expected)
    torch.testing.assert_close(net.patch_scores([fine, coarse]), (expected + 8) / 2)
    torch.testing.assert_close(net.scores([fine, coarse]), torch.tensor([(5.25 + 3 * 4) / 4]))
    torch.testing.assert_close(net.maps([fine, coarse]), (expected + 8) / 2)


def test_the_score_is_the_mean_of_the_highest_patches():
    net, features = detector(), levels(3)
    with torch.no_grad():
        patches = net.patch_scores(features)
        assert patches.shape == (3, 8, 4)
        assert torch.allclose(
            net.scores(features), patches.flatten(1).sort(dim=1).values[:, -5:].mean(dim=1)
        )


def test_levels_are_averaged_on_the_finer_grid():
    net, features = detector(), levels(3)
    with torch.no_grad():
        fine, coarse = net.level_scores(features)
        assert (fine.shape, coarse.shape) == ((3, 8, 4), (3, 4, 2))
        found = 2 * net.patch_scores(features) - fine
    # Halfway between pixel centres, a bilinear weight is 3/4 to the nearer neighbour; corners
    # repeat. That of the finer pixel (1, 1) lies between the coarse (0, 0) and (1, 1).
    torch.testing.assert_close(found[:, 0, 0], coarse[:, 0, 0])
    expected = (
        9 * coarse[:, 0, 0] + 3 * coarse[:, 0, 1] + 3 * coarse[:, 1, 0] + coarse[:, 1, 1]
    ) / 16
    torch.testing.assert_close(found[:, 1, 1], expected)


def test_maps_have_the_pictures_size():
    sharp, soft = detector(), detector(blur_sigma=2.0)
    with torch.no_grad():
        maps, blurred = sharp.maps(levels(2)), soft.maps(levels(2))
    assert maps.shape == blurred.shape == (2, 32, 16)
    assert blurred.std() < 0.9 * maps.std()


def test_standardisation_is_of_each_channel_over_the_training_set():
    features = [3 + 0.01 * x for x in levels(40)]
    net = detector()
    net.fit_statistics([x[i : i + 7] for x in features] for i in range(0, 40, 7))
    for x in net.scaler(features):
        deviation, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros(x.shape[1]), rtol=0, atol=1e-3)
        torch.testing.assert_close(deviation, torch.ones(x.shape[1]), rtol=1e-3, atol=0)
    rescaled = detector()
    rescaled.fit_statistics([[100 * x - 7 for x in features]])
    torch.testing.assert_close(
        rescaled.losses([100 * x - 7 for x in features]),
        net.losses(features),
        rtol=1e-3,
        atol=1e-3,
    )


def test_a_constant_channel_does_not_drown_the_others():
    features = levels(20)
    features[0][:, 2], features[1][:, 0] = 0.0, 1e4 / 3
    net = FastFlow(CHANNELS, (32, 16))
    net.fit_statistics([[x[i : i + 3] for x in features] for i in range(0, 20, 3)])
    fine, coarse = net.scaler(features)
    assert fine[:, 2].abs().max() == 0
    assert coarse[:, 0].abs().max() < 1e-3
    moved = [features[0].clone(), features[1]]
    moved[0][:, 2] = 0.5
    # Half the mean square over six channels.
    torch.testing.assert_close(
        net.level_scores(moved)[0] - net.level_scores(features)[0],
        torch.full((20, 8, 4), 0.5 * 0.25 / 6),
    )


@pytest.mark.parametrize("wrong", [[6, 4], [6], [5, 6]])
def test_features_of_another_backbone_are_refused(wrong):
    features = [torch.randn(2, width, 4, 4) for width in wrong]
    for call in (detector().losses, detector().scores, lambda x: detector().fit_statistics([x])):
        with pytest.raises(ValueError, match=r"expected \(B, C, h, w\) with C = \[6, 5\]"):
            call(features)


def test_the_optimizer_has_the_papers_settings():
    net = FastFlow([8], (32, 32))
    assert len(net.flows[0].couplings) == 8
    (optimizer,) = net.optimizers()
    assert type(optimizer).__name__ == "Adam"
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 1e-5)
    assert set(group["params"]) == set(net.parameters())
    assert FastFlow([8], (32, 32), learning_rate=0.1).optimizers()[0].param_groups[0]["lr"] == 0.1


def test_a_saved_detector_keeps_its_shuffles_and_statistics():
    net, features = detector(), levels(3)
    net.fit_statistics([features])
    torch.manual_seed(1)
    other = FastFlow(CHANNELS, (32, 16), steps=3)
    assert not torch.equal(other.losses(features), net.losses(features))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.losses(features), net.losses(features))
    assert torch.equal(other.maps(features), net.maps(features))


# --- training


def correlated(count: int, generator: torch.Generator, mix: torch.Tensor) -> torch.Tensor:
    """Channels that lie near a plane, (N, 8, 4, 4)."""
    plane = torch.randn(count, 3, 4, 4, generator=generator)
    noise = 0.1 * torch.randn(count, 8, 4, 4, generator=generator)
    return torch.einsum("nchw,dc->ndhw", plane, mix) + noise


def test_it_learns_to_tell_strange_patches():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(8, 3, generator=generator)
    data, normal, strange = (correlated(n, generator, mix) for n in (64, 60, 60))
    # One patch in which each channel is as it always is, but not with the others.
    strange[:, :, 1, 1] = torch.stack(
        [correlated(60, generator, mix)[:, i, 0, 0] for i in range(8)], 1
    )

    def quality(net: FastFlow) -> float:
        with torch.no_grad():
            scores = torch.cat([net.scores([normal]), net.scores([strange])])
        return roc_auc_score([0] * 60 + [1] * 60, scores)

    torch.manual_seed(0)
    net = FastFlow([8], (16, 16), learning_rate=5e-3, hidden_ratio=4.0)
    net.fit_statistics([[data]])
    before = quality(net)
    (optimizer,) = net.optimizers()
    for _ in range(60):
        optimizer.zero_grad()
        net.losses([data]).mean().backward()
        optimizer.step()
    assert before < 0.7
    assert quality(net) > 0.9


def build() -> FastFlow:
    return FastFlow([6, 4], (12, 12), steps=2)


def a_data_set(bad: int = 4) -> FeatureRows:
    generator = torch.Generator().manual_seed(0)
    fine, coarse = (
        torch.randn(30, 6, 4, 4, generator=generator),
        torch.randn(30, 4, 2, 2, generator=generator),
    )
    fine[:bad, :, 1, 1] += 4
    return FeatureRows([fine, coarse], torch.arange(30))


@pytest.mark.parametrize(
    ("method", "meta"),
    [
        ("plain", None),
        ("oracle", None),
        ("paper", None),
        *(("comet", meta) for meta in (None, "maml", "fomaml", "reptile", "none")),
    ],
)
def test_every_method_trains_it(method, meta):
    options = TrainingSettings(method, epochs=3, meta=meta, strength=0.001)
    trained = train(build, a_data_set(), options)
    again = train(build, a_data_set(), options)
    for (name, value), same in zip(
        trained.detector.state_dict().items(), again.detector.state_dict().values(), strict=True
    ):
        assert torch.equal(value, same), name
        assert value.isfinite().all(), name
    with torch.no_grad():
        untrained = build()
        untrained.load_state_dict(trained.detector.state_dict())
        for coupling in (c for flow in untrained.flows for c in flow.couplings):
            nn.init.zeros_(coupling.network[-1].weight)
            nn.init.zeros_(coupling.network[-1].bias)
        features = list(a_data_set().features)
        before, after = (net.losses(features)[4:] for net in (untrained, trained.detector))
    assert after.mean() < before.mean()
    scores, maps = predict(trained.detector, a_data_set())
    assert (scores.shape, maps.shape) == ((30,), (30, 12, 12))
    if method in ("paper", "comet"):
        weighter = trained.optimizer.weighter
        assert set(weighter.ranking(4).tolist()) == {0, 1, 2, 3}


def test_second_order_differentiates_through_the_inner_step():
    net, features = build(), list(a_data_set().features)
    randomised(net)
    parameters = list(net.parameters())
    gradients = {}
    for meta in ("maml", "fomaml"):
        wrapper = CoMetOptimizerWrapper(
            torch.optim.SGD(parameters, lr=0.0),
            meta=MetaStep(meta, inner_lr=0.05),
            model=net,
            generator=torch.Generator().manual_seed(0),
        )
        wrapper.step(lambda rows: net.losses([x[rows] for x in features]), torch.arange(30))
        gradients[meta] = torch.cat([p.grad.flatten() for p in parameters])
    difference = (gradients["maml"] - gradients["fomaml"]).norm() / gradients["fomaml"].norm()
    assert 1e-3 < difference < 1
