"""Scores by position: the rule by hand and by numpy, robustness, saved state."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from comet_examples.detectors import DETECTORS, ScoresFittable
from comet_examples.detectors.positions import PositionScaler
from comet_examples.training import FeatureRows, TrainingSettings, predict, train


def scores(count: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 2, 3, 4, generator=torch.Generator().manual_seed(seed))


def fitted(*batches: torch.Tensor) -> PositionScaler:
    scaler = PositionScaler()
    scaler.fit(batches)
    return scaler


def test_nothing_changes_before_the_fit():
    assert torch.equal(PositionScaler()(scores()), scores())


@pytest.mark.parametrize("count", [20, 21, 41])
def test_numpy_gets_the_same(count):
    train = scores(count)
    low, middle, high = np.quantile(train.numpy(), [0.25, 0.5, 0.75], axis=0)
    spread = high - low + (high - low).mean(axis=(1, 2), keepdims=True)
    found = fitted(*train.split(7))(scores(5, seed=1))
    np.testing.assert_allclose(found, (scores(5, seed=1).numpy() - middle) / spread, rtol=1e-4)


def test_a_dozen_pictures_tell_no_quartiles():
    scaler = fitted(scores(19))
    assert torch.equal(scaler(scores(5, seed=1)), scores(5, seed=1))
    scaler.fit([scores(20)])
    assert not torch.equal(scaler(scores(5, seed=1)), scores(5, seed=1))
    scaler.fit([scores(19)])
    assert torch.equal(scaler(scores(5, seed=1)), scores(5, seed=1))


def test_large_sets_are_within_torchs_limits():
    train = torch.rand(20_000, 1, 30, 30)  # torch.quantile takes 16 million values at most
    scaler = fitted(train)
    assert scaler.median.shape == (1, 30, 30)
    assert (scaler.median - 0.5).abs().max() < 0.05


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10), seed=st.integers(0, 100))
def test_scale_and_shift_of_a_level_do_not_matter(scale, shift, seed):
    train, test = scores(seed=seed).double(), scores(5, seed=seed + 1).double()
    found = fitted(train * scale + shift)(test * scale + shift)
    torch.testing.assert_close(found, fitted(train)(test), rtol=1e-2, atol=1e-2)


def test_bad_pictures_with_one_defect_at_one_place_change_little():
    train, test = scores(200), scores(5, seed=1)
    dirty = train.clone()
    dirty[:30, :, 1, 1] += 100
    test[:, :, 1, 1] += 100
    clean, found = fitted(train)(test), fitted(dirty)(test)
    assert (found / clean)[:, :, 1, 1].min() > 0.7


def test_positions_that_never_change_do_not_drown_the_others():
    train = scores()
    train[:, :, 0] = 0.3
    test = scores(4, seed=1)
    test[:, :, 0] = 0.3 + 1e-6
    found = fitted(train)(test)
    assert found[:, :, 0].abs().max() < 1e-4
    everything = fitted(torch.full((20, 1, 2, 2), 0.3))(torch.full((1, 1, 2, 2), 1.3))
    torch.testing.assert_close(everything, torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_count_nothing(value):
    train = scores()
    broken = torch.cat([torch.full((1, 2, 3, 4), value), train])
    torch.testing.assert_close(fitted(broken)(scores()), fitted(train)(scores()))
    broken = scores()
    broken[:, 0, 1, 1] = value
    assert fitted(broken)(scores()).isfinite().all()
    assert fitted(torch.full((20, 1, 1, 1), value))(scores(1)[:, :1, :1, :1]).isfinite().all()


def test_a_saved_scaler_brings_its_shape():
    scaler = fitted(scores())
    other = PositionScaler()
    other.load_state_dict(scaler.state_dict())
    assert torch.equal(other(scores(5, 1)), scaler(scores(5, 1)))
    fitted_to_another_size = fitted(torch.rand(20, 1, 7, 7))
    fitted_to_another_size.load_state_dict(scaler.state_dict())
    assert torch.equal(fitted_to_another_size(scores(5, 1)), scaler(scores(5, 1)))
    other.load_state_dict(PositionScaler().state_dict())
    assert torch.equal(other(scores()), scores())


def a_seam(count: int, generator: torch.Generator) -> list[torch.Tensor]:
    """One level, of which a column differs from picture to picture, and the rest is alike."""
    level = 0.1 * torch.randn(count, 6, 8, 8, generator=generator)
    level[..., 3] += 3 * torch.randn(count, 6, 8, generator=generator)
    return [level]


def a_defect(features: list[torch.Tensor]) -> None:
    features[0][:, :, 5:7, 5:7] += 1.5  # half of what the seam does in any picture


def noise_above_a_pattern(count: int, generator: torch.Generator) -> list[torch.Tensor]:
    """A fine level that can't be rebuilt at all, and a coarse one of one vector, of any length."""
    length = 1 + torch.rand(count, 1, 4, 4, generator=generator)
    coarse = length * torch.linspace(-1, 1, 5).reshape(1, -1, 1, 1)
    fine = torch.randn(count, 4, 8, 8, generator=generator)
    return [fine, coarse + 0.05 * torch.randn(count, 5, 4, 4, generator=generator)]


def another_vector(features: list[torch.Tensor]) -> None:
    features[1][:, :, 1:3, 1] = torch.tensor([1.0, -1, 0, -1, 1]).reshape(1, -1, 1)


@pytest.mark.parametrize(
    ("name", "channels", "make", "spoil"),
    [
        ("fastflow", [6], a_seam, a_defect),
        ("reconstruction", [4, 5], noise_above_a_pattern, another_vector),
    ],
)
def test_detectors_see_defects_beside_what_is_hard_in_every_picture(name, channels, make, spoil):
    generator = torch.Generator().manual_seed(0)
    data, normal, strange = (make(count, generator) for count in (60, 40, 40))
    spoil(strange)

    def build():
        torch.manual_seed(0)
        return DETECTORS[name](channels, (16, 16))

    trained = train(
        build, FeatureRows(data, torch.arange(60)), TrainingSettings("plain", steps=60)
    ).detector
    assert isinstance(trained, ScoresFittable)
    both = [torch.cat(pair) for pair in zip(normal, strange, strict=True)]

    def quality() -> float:
        found, _ = predict(trained, FeatureRows(both, torch.arange(80)))
        return roc_auc_score([0] * 40 + [1] * 40, found)

    standardised = quality()
    trained.usual = PositionScaler()
    assert standardised > 0.95
    assert quality() < standardised - 0.05


def test_the_papers_fastflow_keeps_its_scores():
    detector = DETECTORS["fastflow"]([6], (16, 16), standardize_scores=False)
    data = a_seam(20, torch.Generator().manual_seed(0))
    before = detector.scores(data)
    detector.fit_scores([data])
    assert torch.equal(detector.scores(data), before)


@pytest.mark.parametrize("name", ["fastflow", "reconstruction"])
def test_a_finished_training_is_resumed_with_its_positions(name, tmp_path):
    data = FeatureRows(a_seam(20, torch.Generator().manual_seed(0)), torch.arange(20))

    def trained(**options) -> torch.Tensor:
        def build():
            torch.manual_seed(0)
            return DETECTORS[name]([6], (16, 16))

        how = TrainingSettings("plain", epochs=2)
        return predict(train(build, data, how, **options).detector, data)[0]

    whole = trained(checkpoint=tmp_path / "state.pt")
    assert torch.equal(trained(checkpoint=tmp_path / "state.pt", resume=True), whole)
    assert whole.median().abs() < 5  # standardised
