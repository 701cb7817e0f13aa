"""Rival ways to train, against values by hand and brute force."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_experiment import experiment

import rivals
from comet_examples.detectors import FastFlow, SimpleNet
from comet_examples.training import FeatureRows, TrainingSettings
from grid import Trial, curation_figures
from memory_bank import (
    greedy_coreset,
    memory_bank,
    outlier_factors,
    random_memory,
    soft_patch,
)
from rivals import (
    Exposed,
    filter_and_retrain,
    highest,
    latent_outlier_exposure,
    loss_pair,
    numbered,
    trimming,
    warm_up,
)
from timed import TimedWeighter


@pytest.fixture(scope="module", params=["simplenet", "fastflow"])
def trial(request, tmp_path_factory) -> Trial:
    made = experiment(tmp_path_factory.mktemp("tiny"), request.param)
    return Trial(made, made.split(0.2, seed=100), TrainingSettings("plain", epochs=12))


def test_the_highest_are_as_many_as_the_rate_says():
    scores = torch.tensor([3.0, 9.0, 1.0, 5.0, 4.0])
    assert highest(scores, 0.4).tolist() == [False, True, False, True, False]
    assert not highest(scores, 0).any()


def test_trimming_with_the_true_rate_leaves_out_the_bad_and_no_other(trial):
    figures = trimming(None)(trial)
    assert figures["weight of bad"] == 0
    assert figures["weight of good"] == 1
    assert figures["I-AUROC"] > 0.9


def test_trimming_with_a_guess_leaves_out_that_many(trial):
    figures = trimming(0.1)(trial)
    bad, count = int(trial.bad.sum()), len(trial.bad)
    left_out = count - figures["weight of bad"] * bad - figures["weight of good"] * (count - bad)
    assert left_out == pytest.approx(round(0.1 * count))


def test_a_timed_weighter_waits():
    weighter = TimedWeighter(10, start=2, rule=lambda scores: (scores < scores.max()).float())
    for epoch in range(1, 6):
        weighter.fit(torch.arange(10.0).roll(epoch))
        left_out = (weighter() == 0).nonzero().flatten().tolist()
        assert left_out == {1: [], 2: [1], 3: [2], 4: [3], 5: [4]}[epoch]


def test_a_timed_weighter_that_never_starts_keeps_its_weights():
    weighter = TimedWeighter(10, start=math.inf)
    weighter.fit(torch.arange(10.0))
    assert weighter().tolist() == [1] * 10
    assert weighter.scores.isnan().all()


def test_a_timed_weighter_takes_scores_of_another_source():
    weighter = TimedWeighter(10, source=lambda: torch.arange(10.0))
    weighter.fit(torch.zeros(10))
    assert weighter.scores.tolist() == list(range(10))


NORMAL = torch.tensor([1.0, 2.0, 3.0, 4.0])
ANOMALOUS = torch.tensor([4.0, 3.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("label", "rate", "losses"),
    [
        (1.0, 0.5, [1.0, 2.0, 1.0, 0.5]),
        (0.5, 0.5, [1.0, 2.0, 2.0, 2.25]),
        (1.0, 0.25, [1.0, 2.0, 3.0, 0.5]),
        (0.5, 0.0, [1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_losses_of_latent_outlier_exposure(label, rate, losses):
    def pair(_, features):
        rows = features[0].flatten().long()
        return NORMAL[rows], ANOMALOUS[rows]

    exposed = Exposed(SimpleNet([1], (1, 1)), 4, pair)
    data = numbered(FeatureRows([torch.arange(4.0).reshape(4, 1, 1, 1)], torch.arange(4)))
    assert exposed.scores_of_training(data, "cpu").tolist() == [-3.0, -1.0, 2.0, 3.5]
    exposed.relabel(exposed.scores_of_training(data, "cpu"), rate, label)
    order = torch.tensor([2, 0, 3, 1])
    batch = [torch.stack([data[i][level] for i in order]) for level in range(2)]
    assert exposed.losses(batch).tolist() == [losses[i] for i in order]


def test_numbered_pictures_carry_their_position_in_the_training_set():
    rows = torch.tensor([5, 2, 7])
    data = numbered(FeatureRows([torch.arange(8.0).reshape(8, 1, 1, 1)], rows))
    (levels,) = data.batches()
    assert levels[0].flatten().tolist() == [5, 2, 7]
    assert levels[1].flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "detector",
    [SimpleNet([6], (8, 8), hidden=8, patches=5), FastFlow([6, 4], (8, 8), steps=2)],
)
def test_the_loss_of_normal_pictures_is_the_detectors_own(detector):
    for parameter in detector.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    features = [torch.randn(4, channels, 3, 3) for channels in detector.scaler.channels]
    torch.manual_seed(1)
    expected = detector.losses(features)
    torch.manual_seed(1)
    normal, anomalous = loss_pair(detector, features)
    torch.testing.assert_close(normal, expected)
    assert anomalous.shape == (4,)


def test_simplenet_takes_labelled_pictures_for_noise():
    detector = SimpleNet([3], (4, 4), margin=0.5)
    detector.discriminator = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.ones_(detector.discriminator.weight)
    features = torch.tensor([[1.0, 1, 1], [-1, 0, 0], [-0.25, 0, 0]]).reshape(3, 3, 1, 1)
    _, anomalous = loss_pair(detector, [features])
    assert anomalous.tolist() == [3.5, 0.0, 0.25]


def test_fastflow_wants_latents_of_labelled_pictures_far_from_their_mode():
    detector = FastFlow([2], (4, 4), steps=2)  # untrained flows only shuffle
    features = torch.tensor([[1.0, 1], [3, 1]]).reshape(2, 2, 1, 1)
    _, anomalous = loss_pair(detector, [features])
    assert anomalous.tolist() == pytest.approx([1.0, 1 / 5])


@pytest.mark.parametrize("label", [1.0, 0.5])
def test_latent_outlier_exposure_labels_the_bad(trial, label):
    figures = latent_outlier_exposure(label, None)(trial)
    assert figures["weight of bad"] == pytest.approx(1 - label, abs=0.2)
    assert figures["curation AUROC"] > 0.9
    assert figures["I-AUROC"] > 0.9


def test_no_labels_before_the_warm_up_is_over(trial):
    assert [warm_up(epochs) for epochs in (2, 8, 16, 120)] == [1, 1, 2, 15]
    short = replace(trial, settings=TrainingSettings("plain", epochs=1))
    figures = latent_outlier_exposure(1.0, None)(short)
    assert figures["weight of bad"] == figures["weight of good"] == 1


def test_filter_and_retrain_drops_the_bad(trial):
    figures = filter_and_retrain()(trial)
    assert figures["weight of bad"] < 0.2
    assert figures["weight of good"] > 0.8
    assert figures["I-AUROC"] > 0.9


def test_filter_and_retrain_trains_only_on_what_is_left(trial, monkeypatch):
    sizes = []

    def train(build, data, *args, **options):
        sizes.append(len(data))
        return original(build, data, *args, **options)

    original = rivals.train
    monkeypatch.setattr("rivals.train", train)
    filter_and_retrain()(trial)
    assert sizes[0] == len(trial.split.train)
    assert len(sizes) == 3
    assert max(sizes[1:]) < sizes[0]


def test_curation_figures():
    bad = torch.tensor([True, False, True, False]).numpy()
    figures = curation_figures(
        torch.tensor([0.0, 1, 0.5, 0.8]).numpy(), bad, torch.tensor([4.0, 1, 2, 3]).numpy()
    )
    assert figures == pytest.approx(
        {
            "curation AUROC": 0.75,
            "curation precision@k": 0.5,
            "weight of bad": 0.25,
            "weight of good": 0.9,
        }
    )
    assert curation_figures(bad, ~bad & bad) == {}


def test_the_greedy_coreset_is_that_of_brute_force():
    points = torch.randn(60, 5, generator=torch.Generator().manual_seed(3))
    found = greedy_coreset(points, 12, seed=7).tolist()
    expected = found[:1]
    while len(expected) < 12:
        apart = [min(math.dist(p, points[c]) for c in expected) for p in points]
        expected.append(max(range(60), key=apart.__getitem__))
    assert found == expected


def test_the_greedy_coreset_takes_no_point_twice_though_all_are_equal():
    assert sorted(greedy_coreset(torch.ones(6, 3), 6, seed=0).tolist()) == list(range(6))


def test_more_channels_than_the_projection_has():
    # Points at the corners of a simplex with copies nearby: one of each cluster comes first.
    points = 10 * torch.eye(150)[:5].repeat(4, 1) + 0.01 * torch.randn(20, 150)
    assert sorted(i % 5 for i in greedy_coreset(points, 5, seed=0).tolist()) == list(range(5))


def test_soft_patch_drops_a_planted_patch_and_keeps_the_factors():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(40, 4, 3, generator=generator)
    patches[11, 2] += 30
    factors = outlier_factors(patches)
    assert factors.shape == (40, 4)
    assert factors.argmax() == 11 * 4 + 2
    assert 0.9 < factors.median() < 1.2
    memory = soft_patch(patches, seed=0)
    assert not memory.kept[11, 2]
    assert int((~memory.kept).sum()) == 0.15 * 160
    assert memory.patches.norm(dim=1).max() < 30
    assert len(memory.patches) == round(0.1 * 0.85 * 160)
    for patch, weight in zip(memory.patches, memory.weights, strict=True):
        place = (patches == patch).all(dim=2).nonzero()[0]
        assert weight == factors[tuple(place)]


def test_outlier_factors_are_within_a_position():
    # A patch that is common elsewhere but strange at its own position.
    patches = torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(0))
    patches[:, 1] += 20
    patches[5, 0] += 20
    assert outlier_factors(patches).argmax() == 10


def test_random_memories_differ_by_seed_only():
    patches = torch.randn(10, 5, 3)
    memory = random_memory(patches, 1)
    assert len(memory.patches) == 5
    assert torch.equal(memory.patches, random_memory(patches, 1).patches)
    assert not torch.equal(memory.patches, random_memory(patches, 2).patches)
    assert torch.equal(memory.weights, torch.ones(5))


@pytest.mark.parametrize("choose", [random_memory, soft_patch])
def test_memory_banks_find_the_bad_test_pictures(trial, choose):
    clean = replace(trial, split=trial.experiment.clean)
    figures = memory_bank(choose)(clean)
    assert figures["I-AUROC"] > 0.9
    assert not any("curation" in name for name in figures)


def test_soft_patch_judges_its_denoising(trial):
    figures = memory_bank(soft_patch)(trial)
    assert figures["curation AUROC"] > 0.5
    assert figures["weight of bad"] < figures["weight of good"]
