"""The method with parts switched off, and with other scores to weight by."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from comet_examples.detectors import Detector, FastFlow, SimpleNet
from comet_examples.training import FeatureRows, TrainingSettings, train, wrap
from grid import Trial, Variant, trained, weighting_figures
from rivals import judged
from runs import Figures
from timed import TimedWeighter
from torch import Tensor, nn
from torch.optim import Optimizer

from comet_meta import (
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    MemoryScorer,
    SoftConfidentWeighter,
)
from comet_meta.meta.step import MetaMode
from comet_meta.vision.picture_prior import memory_prior
from comet_meta.weights.rules import standardize

_PENALTY = 0.01

Score = Callable[[Detector, list[Tensor]], Tensor]
"""Scores (B,) of pictures to weight them by, from a detector in eval mode and their features."""


def parts(weights: bool, meta: MetaMode, penalty: float) -> Variant:
    """Weights, meta-step and regulariser, each on or off.

    Args:
        weights: Those of the examples' ``"comet"``, or all 1.
        meta: The meta-step, ``"none"`` for a plain one.
        penalty: Of the loss before training; 0 for none. The published lambda_0 = 0.005 is twice
            the loss of SimpleNet's head on small features, and more of a larger network's.
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
    parameters = [
        p
        for optimizer in detector.optimizers()
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    square = sum(float(p.square().sum()) for p in parameters)
    cast("nn.Module", detector).eval()
    loss = _scores(detector, data, _loss).mean()
    return abs(float(loss)) / square


class Patchwise(nn.Module):
    """SimpleNet whose likely bad pictures keep their least anomalous patches as normal ones.

    The second of a pair of losses is the first without the patches that the detector finds the
    most anomalous, as many as it would expose: with an exposure of 1 the objective has weight 1 for
    all other patches, and the weight of the picture for these.

    Args:
        detector: What to train.
    """

    def __init__(self, detector: SimpleNet) -> None:
        super().__init__()
        self.detector = detector

    def fit_statistics(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Learn what the detector must know before training."""
        self.detector.fit_statistics(batches)

    def losses(self, features: Sequence[Tensor]) -> Tensor:
        """Those of the detector, shape (B,)."""
        return self.detector.losses(features)

    def loss_pairs(self, features: Sequence[Tensor]) -> Tensor:
        """Losses over all patches, and over the least anomalous alone, shape (2, B)."""
        real, fake = self.detector._confidence(features)
        by_patch = F.relu(self.detector.margin - real) + F.relu(self.detector.margin + fake)
        patches = real.shape[1]
        kept = real.topk(patches - round(self.detector.exposed * patches), dim=1).indices
        return torch.stack([by_patch.mean(dim=1), by_patch.gather(1, kept).sum(dim=1) / patches])

    def scores(self, features: Sequence[Tensor]) -> Tensor:
        """Those of the detector, shape (B,)."""
        return self.detector.scores(features)

    def maps(self, features: Sequence[Tensor]) -> Tensor:
        """Those of the detector, shape (B, H, W)."""
        return self.detector.maps(features)

    def optimizers(self) -> list[Optimizer]:
        """Those of the detector."""
        return self.detector.optimizers()


def patchwise(trial: Trial) -> Figures:
    """The examples' ``"comet"`` with weights by patch, see :class:`Patchwise`."""
    experiment = trial.experiment

    def build() -> Detector:
        detector = experiment.build()
        if not isinstance(detector, SimpleNet):
            raise TypeError(f"{type(detector).__name__} has no losses of patches")
        return Patchwise(detector)

    def optimizer_for(
        detector: Detector, data: FeatureRows, _: TrainingSettings
    ) -> CoMetOptimizerWrapper:
        weighter = SoftConfidentWeighter(prior=memory_prior(data.batches(), len(data)))
        model = cast("nn.Module", detector)
        return CoMetOptimizerWrapper(
            detector.optimizers(), weighter=weighter, exposure=1.0, model=model
        )

    training = train(
        build,
        experiment.rows(trial.split.train),
        as_comet(trial).settings,
        device=experiment.device,
        wrap=optimizer_for,
    )
    weighter = cast("SoftConfidentWeighter", training.optimizer.weighter)
    return judged(trial, training.detector) | weighting_figures(weighter, trial.bad)


def chosen(
    scorer: MemoryScorer | None = None,
    *,
    contamination: float | Literal["auto"] | None = "auto",
    exposure: float = 0.5,
) -> Variant:
    """The examples' ``"comet"`` with other settings.

    Args:
        scorer: Makes the prior.
        contamination: What the weighter is told; None for the true share.
        exposure: What losses of likely bad pictures taken as anomalous count.
    """

    def run(trial: Trial) -> Figures:
        told = float(trial.bad.mean()) if contamination is None else contamination

        def optimizer_for(
            detector: Detector, data: FeatureRows, _: TrainingSettings
        ) -> CoMetOptimizerWrapper:
            prior = memory_prior(data.batches(), len(data), scorer)
            return CoMetOptimizerWrapper(
                detector.optimizers(),
                weighter=SoftConfidentWeighter(prior=prior, contamination=told),
                exposure=exposure,
                model=cast("nn.Module", detector),
            )

        return trained(as_comet(trial), optimizer_for)

    return run


def scored(
    score: Score | None = None,
    *,
    prior: bool = True,
    start: float = 1,
    every: int = 1,
    momentum: float = 0.0,
) -> Variant:
    """The examples' ``"comet"``, weighted by the model's own scores, or their mean with the prior.

    Args:
        score: Takes the place of the detector's score of a picture.
        prior: Whether the prior from frozen features counts; it decides until the first fit.
        start: First epoch after which the model's own scores count.
        every: Epochs from one fit of the weights to the next.
        momentum: Share of an earlier score that stays.
    """

    def optimizer_for(
        detector: Detector, data: FeatureRows, _: TrainingSettings
    ) -> CoMetOptimizerWrapper:
        memory = standardize(memory_prior(data.batches(), len(data))) if prior else None

        def source() -> Tensor:
            own = _scores(detector, data, score or _score)
            return own if memory is None else (standardize(own) + memory) / 2

        weighter = TimedWeighter(
            len(data), start=start, every=every, source=source, momentum=momentum
        )
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
    """Every combination of the parts, but the plain training that all of them off is."""
    found: dict[str, Variant] = {}
    metas: tuple[MetaMode, ...] = get_args(MetaMode)
    for weights, meta, penalty in itertools.product((False, True), metas, (0.0, _PENALTY)):
        names = ["weights"] * weights + [meta] * (meta != "none") + ["penalty"] * (penalty > 0)
        if names:
            found["+".join(names)] = parts(weights, meta, penalty)
    return found


def _mean(detector: Detector, levels: list[Tensor]) -> Tensor:
    if not isinstance(detector, SimpleNet | FastFlow):
        raise TypeError(f"{type(detector).__name__} has no scores of patches")
    return detector.patch_scores(levels).flatten(1).mean(dim=1)


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
_CHANGES: dict[str, dict[str, Any]] = {
    "loss": {"score": _loss},
    "mean": {"score": _mean},
    "warmup4": {"start": 4},
    "warmup8": {"start": 8},
    "every2": {"every": 2},
    "every4": {"every": 4},
    "momentum": {"momentum": 0.5},
}
# The model's own scores without the prior, and their mean with it.
SCORES: dict[str, Variant] = {
    f"{source}+{change}" if change else source: scored(prior=source == "both", **options)
    for source in ("own", "both")
    for change, options in {"": {}, **_CHANGES}.items()
}
CHOICES: dict[str, Variant] = {
    "no-exposure": chosen(exposure=0.0),
    "exposure-1": chosen(exposure=1.0),
    "contamination@true": chosen(contamination=None),
    "contamination@0.1": chosen(contamination=0.1),
    "false-alarm": chosen(contamination=0.2),
    "one-product": chosen(MemoryScorer(scale=math.inf)),
    "patches": patchwise,
}
