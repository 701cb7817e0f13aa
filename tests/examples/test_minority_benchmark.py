"""Folders with a variant of the product: who is in them, and what a detector is judged on."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import minority
from comet_examples.datasets import Sample, Split
from comet_examples.training import TrainingSettings
from comet_meta import SoftConfidentWeighter, choose_for_review


def cells(kind: str, label: int, count: int) -> tuple[Sample, ...]:
    return tuple(Sample(Path(f"{kind}/{label}/{i}"), label, None, "x") for i in range(count))


def a_split(kind: str) -> Split:
    test = cells(kind, 0, 40) + cells(kind, 1, 20)
    return Split(kind, cells(f"{kind}-train", 0, 90), test, has_masks=False)


def test_the_variant_is_the_same_share_of_the_training_and_of_good_and_bad_test_cells():
    seen = []

    def run(split, settings):
        seen.append(split)
        kind = [sample.path.parts[0] for sample in split.test]
        # All of the one kind are told apart, none of the other.
        scores = [
            float(s.label or 0) * (k == "many") for s, k in zip(split.test, kind, strict=True)
        ]
        weighter = SoftConfidentWeighter(100)
        weighter.weights[90:] = torch.tensor([0.0, 1.0]).repeat(5)
        training = SimpleNamespace(optimizer=SimpleNamespace(weighter=weighter))
        return SimpleNamespace(scores=torch.tensor(scores), training=training)

    settings = TrainingSettings("plain", epochs=1, seed=3)
    major, minor = a_split("many"), a_split("few")
    figures = minority.detection(SimpleNamespace(run=run), major, minor, 0.1, settings)
    (split,) = seen
    assert split.train[:90] == major.train
    assert len(split.train) == len(set(split.train)) == 100
    assert set(split.train[90:]) <= set(minor.train)
    assert split.test[:60] == major.test
    assert [sample.label for sample in split.test[60:]] == [0] * 4 + [1] * 2
    assert set(split.test[60:]) <= set(minor.test)
    assert figures["the others"] == 1.0
    assert figures["the variant"] == 0.5
    assert 0.5 < figures["all"] < 1.0
    assert figures["weight of the others"] == 1.0
    assert figures["of the variant"] == 0.5


def test_a_look_tells_the_training_which_of_sixty_cells_are_bad(monkeypatch):
    prior = torch.linspace(0, 1, 100)
    monkeypatch.setattr(minority, "memory_part_prior", lambda batches, count: (prior, None))
    seen = []

    def run(split, settings):
        seen.append(settings.review)
        weighter = SoftConfidentWeighter(100)
        weighter.weights[5] = 0.25
        training = SimpleNamespace(optimizer=SimpleNamespace(weighter=weighter))
        return SimpleNamespace(scores=torch.rand(len(split.test)), training=training)

    major, minor = a_split("many"), a_split("few")
    spoiled = (*major.train[:5], replace(major.train[5], label=1), *major.train[6:])
    experiment = SimpleNamespace(run=run, rows=lambda _: SimpleNamespace(batches=list))
    figures = minority.detection(
        experiment,
        replace(major, train=spoiled),
        minor,
        0.1,
        TrainingSettings("comet", epochs=1),
        look=True,
    )
    (review,) = seen
    assert 40 <= len(review.looked_at) <= 60
    assert review.looked_at.tolist() == choose_for_review(prior).tolist()
    assert set(review.looked_at[review.bad].tolist()) <= {5}
    assert figures["of the bad"] == 0.25
    assert figures["weight of the others"] == 1.0


def test_weights_and_detectors_are_about_the_same_cells():
    chosen = [minority.drawn(90, 90, 0.1, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 10
    assert max(chosen[0]) < 90


def test_figures_say_who_of_the_variant_is_taken_for_bad():
    prior = torch.cat([torch.linspace(-1, 1, 80), torch.linspace(9, 10, 20)])
    bad = torch.arange(100) >= 90
    minor = (torch.arange(100) >= 80) & (torch.arange(100) < 90)
    weighter = SoftConfidentWeighter(
        prior=prior, part_prior=prior.repeat(4, 1).T, contamination=0.2
    )
    figures = minority.figures(weighter, bad, minor)
    # Told that a fifth is bad, the weights take the variant and the bad ones for that fifth.
    assert figures["of the variant"] < 0.1
    assert figures["its P(bad)"] > 0.7
    assert figures["weight of the others"] > 0.9
    assert figures["AUROC"] == 1.0
