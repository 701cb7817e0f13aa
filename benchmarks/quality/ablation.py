"""The method with parts switched off, and with other scores to weight by."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader

from comet_examples.detectors import Detector, ScoresFittable
from comet_examples.training import FeatureRows, Method, TrainingSettings, wrap
from comet_meta import (
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    IndexedDataset,
    SoftConfidentWeighter,
    learn_from_review,
)
from comet_meta.gradients import backward
from comet_meta.meta.paper import paper_settings
from comet_meta.meta.step import MetaMode, MetaStep
from comet_meta.vision.picture_prior import (
    HOLD_OUT,
    PRECAUTION,
    memory_part_prior,
    memory_prior,
    strangest_features,
)
from comet_meta.weights.review import Review
from comet_meta.weights.rules import standardize
from grid import Trial, Variant, trained
from left_out import LeftOut, RejectedAlone, names
from reviewed import review_of
from runs import Figures
from timed import TimedWeighter

_PENALTY = 0.01
LAMBDA_0 = 0.005  # as published
PAPER_META: MetaStep = paper_settings(num_samples=1)["meta"]

Score = Callable[[Detector, list[Tensor]], Tensor]
"""Scores or losses (B,) of pictures, from a detector in eval mode and their features."""


def parts(weights: bool, meta: MetaMode, penalty: float) -> Variant:
    """Weights, meta-step and regulariser, each on or off.

    Args:
        weights: Those of the examples' ``"comet"``, or all 1.
        meta: The meta-step, ``"none"`` for a plain one.
        penalty: As a part of the loss before training; 0 for none. The published lambda_0 = .005 is
            twice the loss of SimpleNet's head on small features, and more of a larger network's.
    """

    def optimizer_for(
        detector: Detector, data: FeatureRows, settings: TrainingSettings
    ) -> CoMetOptimizerWrapper:
        strength = penalty * relative_strength(detector, data) if penalty else 0.0
        if weights:
            return wrap(detector, data, replace(settings, meta=meta, strength=strength))
        return CoMetOptimizerWrapper(
            detector.optimizers(),
            regularizer=CovarianceMetaRegularizer(strength) if penalty else None,
            meta=meta,
            model=cast("nn.Module", detector),
        )

    return lambda trial: trained(as_comet(trial) if weights else trial, optimizer_for)


@torch.no_grad()
def relative_strength(detector: Detector, data: FeatureRows) -> float:
    """The lambda at which the penalty is as large as the loss before training."""
    square = sum(float(p.square().sum()) for p in _parameters(detector))
    cast("nn.Module", detector).eval()
    loss = _scores(detector, data, _loss).mean()
    return abs(float(loss)) / square


def _parameters(detector: Detector) -> list[Tensor]:
    groups = [group for optimizer in detector.optimizers() for group in optimizer.param_groups]
    return [parameter for group in groups for parameter in group["params"]]


def chosen(
    *,
    contamination: float | Literal["auto", "true", "reviewed", "learned"] = "auto",
    exposure: float = 0.5,
    parts: bool = False,
) -> Variant:
    """The examples' ``"comet"`` with other settings.

    Args:
        contamination: What the weighter is told: a share, ``"auto"``, the true share, or what a
            look at sixty of the pictures shows, from which the prior may have learned too.
        exposure: What losses of likely bad pictures taken as anomalous count.
        parts: Whether patches have weights too.
    """

    def run(trial: Trial) -> Figures:
        def optimizer_for(
            detector: Detector, data: FeatureRows, settings: TrainingSettings
        ) -> CoMetOptimizerWrapper:
            scores, part_scores = memory_part_prior(data.batches(), len(data))
            told: float | Literal["auto"]
            review: Review | tuple[Tensor, Tensor] | None
            if contamination == "reviewed":
                told, review = "auto", review_of(scores, trial.bad)
            elif contamination == "learned":
                strange = strangest_features(data.batches(), part_scores)
                seen = review_of(scores, trial.bad)
                told, (scores, review) = "auto", learn_from_review(scores, strange, seen)
            else:
                told = float(trial.bad.mean()) if contamination == "true" else contamination
                review = None
            # As the examples do where nothing is chosen.
            judges = told == "auto" and review is None and not parts
            judges = judges and settings.judged_after(len(data)) is not None
            return CoMetOptimizerWrapper(
                detector.optimizers(),
                weighter=SoftConfidentWeighter(
                    prior=scores,
                    part_prior=part_scores if parts else None,
                    contamination=told,
                    review=review,
                    hold_out=HOLD_OUT if judges else None,
                    precaution=None if parts else PRECAUTION,
                ),
                exposure=exposure,
                model=cast("nn.Module", detector),
            )

        return trained(as_comet(trial), optimizer_for)

    return run


def with_weights(weighter_for: Callable[[FeatureRows], SoftConfidentWeighter]) -> Variant:
    """The examples' ``"comet"`` with other weights.

    Args:
        weighter_for: Makes the weighter from the features of the training set.
    """

    def optimizer_for(
        detector: Detector, data: FeatureRows, _: TrainingSettings
    ) -> CoMetOptimizerWrapper:
        return CoMetOptimizerWrapper(
            detector.optimizers(),
            weighter=weighter_for(data),
            model=cast("nn.Module", detector),
        )

    return lambda trial: trained(as_comet(trial), optimizer_for)


def summed_penalty(data: FeatureRows) -> CovarianceMetaRegularizer:
    """The published penalty, for a loss that is a mean where a published one is a sum.

    The strength is lambda_0 over the number of a picture's feature values. FastFlow's loss is their
    mean here, and their sum in other implementations, as in anomalib: this penalty has the same
    part in it as lambda_0 in the sum.

    Args:
        data: Features of the training set.
    """
    return CovarianceMetaRegularizer(LAMBDA_0 / values_of_a_picture(data))


def values_of_a_picture(data: FeatureRows) -> int:
    """How many feature values a picture has, in all levels."""
    return sum(level.numel() for level in data[0])


def published(
    batch_size: int | None = None,
    penalty: Callable[[FeatureRows], CovarianceMetaRegularizer] | None = None,
    **changes: Any,
) -> Variant:
    """The examples' ``"paper"`` with other settings, for as many optimizer steps.

    Args:
        batch_size: In place of the examples' 8, in which a task has two pictures.
        penalty: Makes the regularizer from the features of the training set.
        changes: Arguments of :meth:`CoMetOptimizerWrapper.paper`.
    """

    def optimizer_for(
        detector: Detector, data: FeatureRows, _: TrainingSettings
    ) -> CoMetOptimizerWrapper:
        model = cast("nn.Module", detector)
        optimizers = detector.optimizers()
        own = changes if penalty is None else {**changes, "regularizer": penalty(data)}
        return CoMetOptimizerWrapper.paper(optimizers, len(data), model=model, **own)

    return lambda trial: trained(_in_batches(trial, batch_size, "paper"), optimizer_for)


def adapted(inner_lr: float = PAPER_META.inner_lr) -> Variant:
    """The examples' ``"paper"``, tested after inner steps like those that it was trained for.

    The published meta-step makes the loss small after the inner steps, at theta'. Here the trained
    theta takes them once more before the test, each on a batch of the training set.

    Args:
        inner_lr: Their step size; 0 as a control, in which batch norm alone sees the batches.
    """

    def run(trial: Trial) -> Figures:
        settings = replace(trial.settings, method="paper")
        outcome = trial.experiment.run(trial.split, settings)
        training, data = outcome.training, trial.experiment.rows(trial.split.train)
        module = cast("nn.Module", training.detector)
        inner = Adam(_parameters(training.detector), lr=inner_lr)
        torch.manual_seed(settings.seed)
        loader = DataLoader(IndexedDataset(data), settings.batch_size, shuffle=True)
        device = trial.experiment.device
        module.train()
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        for index, features in itertools.islice(batches, PAPER_META.inner_steps):
            inner.zero_grad()
            losses = training.detector.losses([level.to(device) for level in features])
            objective = training.optimizer.objective(losses, index)
            backward(objective, _parameters(training.detector))
            inner.step()
        module.eval()
        if isinstance(training.detector, ScoresFittable):
            training.detector.fit_scores(data.batches(device))
        test = trial.split.test
        return trial.experiment.judge(trial.split, *trial.experiment.predict(training, test))

    return run


def plain_in_batches(batch_size: int) -> Variant:
    """Plain training in batches of another size, for as many optimizer steps."""
    return lambda trial: trained(_in_batches(trial, batch_size, "plain"))


def _in_batches(trial: Trial, batch_size: int | None, method: Method) -> Trial:
    batch_size = batch_size or trial.settings.batch_size
    settings = replace(trial.settings, method=method, batch_size=batch_size)
    return replace(trial, settings=settings)


def frontier(name: str) -> Variant:
    """A point of the frontier, see ``left_out.py``."""
    return with_weights(lambda data: LeftOut(name, *memory_part_prior(data.batches(), len(data))))


def rejected_alone(data: FeatureRows) -> SoftConfidentWeighter:
    """Leaves out nothing besides the suspects that the model rejects."""
    prior = memory_prior(data.batches(), len(data))
    return RejectedAlone(prior=prior, hold_out=HOLD_OUT, precaution=PRECAUTION)


def scored(*, prior: bool = True, start: float = 1) -> Variant:
    """The examples' ``"comet"``, weighted by the model's own scores, or their mean with the prior.

    Args:
        prior: Whether the prior from frozen features counts; it decides until the first fit.
        start: First epoch after which the model's own scores count.
    """

    def optimizer_for(
        detector: Detector, data: FeatureRows, _: TrainingSettings
    ) -> CoMetOptimizerWrapper:
        memory = standardize(memory_prior(data.batches(), len(data))) if prior else None

        def source() -> Tensor:
            own = _scores(detector, data, _score)
            return own if memory is None else (standardize(own) + memory) / 2

        weighter = TimedWeighter(len(data), start=start, source=source, precaution=PRECAUTION)
        if memory is not None:
            SoftConfidentWeighter.fit(weighter, memory)
        return CoMetOptimizerWrapper(
            detector.optimizers(), weighter=weighter, model=cast("nn.Module", detector)
        )

    return lambda trial: trained(as_comet(trial), optimizer_for)


def as_comet(trial: Trial) -> Trial:
    """The trial with the losses of ``"comet"``: pairs where the detector has them."""
    return replace(trial, settings=replace(trial.settings, method="comet"))


def _grid() -> dict[str, Variant]:
    """Weights, mldg and penalty, on or off; not plain training, nor the weights alone (comet)."""
    found: dict[str, Variant] = {}
    metas: tuple[MetaMode, ...] = ("none", "mldg")
    for weights, meta, penalty in itertools.product((False, True), metas, (0.0, _PENALTY)):
        if meta != "none" or penalty > 0:
            names = (
                ["weights"] * weights + ["mldg"] * (meta == "mldg") + ["penalty"] * (penalty > 0)
            )
            found["+".join(names)] = parts(weights, meta, penalty)
    return found


def _score(detector: Detector, levels: list[Tensor]) -> Tensor:
    return detector.scores(levels)


def _loss(detector: Detector, levels: list[Tensor]) -> Tensor:
    return detector.losses(levels)


@torch.no_grad()
def _scores(detector: Detector, data: FeatureRows, score: Score) -> Tensor:
    """Scores (N,) of a training set, on the CPU."""
    device = next(cast("nn.Module", detector).parameters()).device
    return torch.cat([score(detector, levels).cpu() for levels in data.batches(device)])


GRID = _grid()
# The model's own scores without the prior, and their mean with it.
SCORES: dict[str, Variant] = {
    "own": scored(prior=False),
    "own+warmup4": scored(prior=False, start=4),
    "both": scored(),
}
# Tasks of five pictures are those of the paper's public code.
PUBLISHED: dict[str, Variant] = {
    "paper-no-ratio": published(weighter=None),
    "paper-no-penalty": published(regularizer=None),
    "paper-summed": published(penalty=summed_penalty),
    "paper-no-meta": published(meta="none"),
    "paper-one-task": published(meta=replace(PAPER_META, tasks=1)),
    "paper-one-inner-step": published(meta=replace(PAPER_META, inner_steps=1)),
    "paper-adapted": adapted(),
    "paper-adapted-0": adapted(inner_lr=0.0),
    "paper-tasks-of-5": published(batch_size=20),
    "plain-batch-20": plain_in_batches(20),
}
FRONTIER: dict[str, Variant] = {name: frontier(name) for name in names()}
CHOICES: dict[str, Variant] = {
    "no-exposure": chosen(exposure=0.0),
    "rejected-alone": with_weights(rejected_alone),
    "contamination@true": chosen(contamination="true"),
    "reviewed": chosen(contamination="reviewed"),
    "learned": chosen(contamination="learned"),
    "patches": chosen(parts=True),
    "patches@true": chosen(contamination="true", parts=True),
    "false-alarm": chosen(contamination=0.2),
}
