"""Other ways to train on data with bad pictures in it, on the same detectors and features.

*Trimming* leaves the highest scores out, as many as a given rate says. *Latent outlier exposure*
(Qiu, Li, Kloft, Rudolph, Mandt: Latent outlier exposure for anomaly detection with contaminated
data, ICML 2022) trains them to look bad instead. Both need the share of bad pictures; they are
given the true one, or a guess. *Filter and retrain* needs none: it trains anew without what the
last training found suspect.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from comet_examples.detectors import Detector, FastFlow, SimpleNet
from comet_examples.training import FeatureRows, Training, TrainingSettings, predict, train
from comet_meta import CoMetOptimizerWrapper, SoftConfidentWeighter
from grid import Trial, Variant, curation_figures, trained
from runs import Figures
from timed import TimedWeighter

Pair = tuple[Tensor, Tensor]
"""Losses (B,) of pictures taken as normal, and taken as anomalous."""


def warm_up(epochs: int) -> int:
    """Epochs of plain training before a model's scores are worth anything: an eighth of all."""
    return max(1, epochs // 8)


def highest(scores: Tensor, rate: float) -> Tensor:
    """The round(rate * N) highest of scores (N,), as bool of shape (N,)."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.topk(round(rate * len(scores))).indices] = True
    return chosen


def trimming(rate: float | None) -> Variant:
    """Weight 0 for the highest scores of the last epoch, 1 for the others.

    Args:
        rate: Share that is left out; None for the true one.
    """

    def run(trial: Trial) -> Figures:
        share = _rate(trial, rate)

        def wrap(
            detector: Detector, data: FeatureRows, settings: TrainingSettings
        ) -> CoMetOptimizerWrapper:
            weighter = TimedWeighter(
                len(data),
                rule=lambda scores: (~highest(scores, share)).float(),
                start=warm_up(settings.epochs_for(len(data))),
            )
            return CoMetOptimizerWrapper(detector.optimizers(), weighter=weighter)

        return trained(trial, wrap)

    return run


def loss_pair(detector: Detector, features: Sequence[Tensor]) -> Pair:
    """The two losses of latent outlier exposure, L_n and L_a.

    L_n is the detector's own loss. *SimpleNet*: L_a takes a picture's patches for noisy ones,
    max(0, margin + D); the noise says nothing of the picture and is left out. *FastFlow*: the paper
    sets L_a = 1 / L_n for a squared distance to a centre (Deep SVDD), as the likelihood has it
    between latents and their mode; so L_a = 1 / mean(z^2), which is 1 for a typical normal picture.
    """
    if isinstance(detector, SimpleNet):
        real, fake, _ = detector._confidence(features)
        return detector._hinge(real, fake, None), F.relu(detector.margin + real).mean(dim=1)
    if isinstance(detector, FastFlow):
        scaled = detector.scaler(features)
        latents = [flow(x) for flow, x in zip(detector.flows, scaled, strict=True)]
        values = sum(x[0].numel() for x in scaled)
        squares = torch.stack([z.square().sum(dim=(1, 2, 3)) for z, _ in latents]).sum(dim=0)
        volumes = torch.stack([change.sum(dim=(1, 2)) for _, change in latents]).sum(dim=0)
        nats = 0.5 * (squares / values + math.log(2 * math.pi)) - volumes / values
        return nats, values / squares
    raise TypeError(f"no loss of anomalous pictures is known for {type(detector).__name__}")


class Exposed(nn.Module):
    """A detector with the loss (1 - y) L_n + y L_a.

    Features come with one more level, the pictures' positions in the training set, (B, 1, 1, 1).

    Args:
        detector: What to train.
        count: Pictures N.
        pair: Makes L_n and L_a.

    Attributes:
        labels: y, shape (N,), at first 0.
    """

    labels: Tensor

    def __init__(
        self,
        detector: Detector,
        count: int,
        pair: Callable[[Detector, Sequence[Tensor]], Pair] = loss_pair,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.pair = pair
        self.register_buffer("labels", torch.zeros(count))

    def fit_statistics(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Learn what the detector must know before training."""
        self.detector.fit_statistics(levels[:-1] for levels in batches)

    def losses(
        self,
        features: Sequence[Tensor],
        part_weights: Tensor | None = None,  # noqa: ARG002 - this rival has none
    ) -> Tensor:
        """Mixed losses, shape (B,)."""
        normal, anomalous = self.pair(self.detector, features[:-1])
        y = self.labels[features[-1].flatten().long()]
        return (1 - y) * normal + y * anomalous

    @torch.no_grad()
    def relabel(self, scores: Tensor, rate: float, label: float) -> None:
        """Set y to ``label`` for the highest of L_n - L_a, (N,), and to 0 for the others."""
        self.labels.copy_(label * highest(scores.cpu(), rate))

    @torch.no_grad()
    def scores_of_training(self, data: FeatureRows, device: str) -> Tensor:
        """L_n - L_a of the training set, shape (N,): what the labels are chosen by."""
        pairs = [self.pair(self.detector, levels[:-1]) for levels in data.batches(device)]
        return torch.cat([normal - anomalous for normal, anomalous in pairs])

    def optimizers(self) -> list[Optimizer]:
        """Those of the detector."""
        return self.detector.optimizers()


def numbered(data: FeatureRows) -> FeatureRows:
    """The same pictures with their position in the training set as one more level."""
    position = torch.full((len(data.features[0]), 1, 1, 1), -1.0)
    position[data.rows] = torch.arange(float(len(data))).reshape(-1, 1, 1, 1)
    return FeatureRows([*data.features, position], data.rows)


def latent_outlier_exposure(label: float, rate: float | None) -> Variant:
    """Labels and parameters in turn: y for the highest of L_n - L_a, then an epoch on the losses.

    The paper's block coordinate descent, with labels over the whole training set (in batches of 8
    a rate of 0.1 would be one in eight). They stay 0 for the first epochs.

    Args:
        label: y of the highest, 1 (hard) or 0.5 (soft).
        rate: Share of labelled pictures; None for the true one.
    """

    def run(trial: Trial) -> Figures:
        experiment, settings = trial.experiment, trial.settings
        data = numbered(experiment.rows(trial.split.train))
        share, epochs = _rate(trial, rate), settings.epochs_for(len(data))
        built: list[Exposed] = []

        def build() -> Detector:
            built.append(Exposed(experiment.build(), len(data)))
            return cast("Detector", built[0])

        def relabel(epoch: int, _: dict[str, float]) -> None:
            if warm_up(epochs) <= epoch < epochs:
                scores = built[0].scores_of_training(data, experiment.device)
                built[0].relabel(scores, share, label)

        train(build, data, settings, device=experiment.device, on_epoch=relabel)
        suspicion = built[0].scores_of_training(data, experiment.device).cpu().numpy()
        weights = 1 - built[0].labels.cpu().numpy()
        return judged(trial, built[0].detector) | curation_figures(weights, trial.bad, suspicion)

    return run


def filter_and_retrain(rounds: int = 3) -> Variant:
    """Train anew without the pictures whose last scores lie above the fence of a box plot.

    Args:
        rounds: Trainings in all, >= 2.
    """

    def run(trial: Trial) -> Figures:
        experiment, samples = trial.experiment, trial.split.train
        kept = torch.ones(len(samples), dtype=torch.bool)
        for _ in range(rounds):
            chosen = [sample for sample, keep in zip(samples, kept, strict=True) if keep]
            training: Training = train(
                experiment.build,
                experiment.rows(chosen),
                trial.settings,
                device=experiment.device,
            )
            used = kept
            scores = own_scores(training.detector, experiment.rows(samples), experiment.device)
            weighter = SoftConfidentWeighter(rule="hard")
            weighter.fit(scores)
            kept = weighter.weights >= 0.5
        return judged(trial, training.detector) | curation_figures(
            used.float().numpy(), trial.bad, scores.numpy()
        )

    return run


@torch.no_grad()
def own_scores(detector: Detector, data: FeatureRows, device: str) -> Tensor:
    """Scores (N,) of pictures by a detector in eval mode."""
    return torch.cat([detector.scores(levels).cpu() for levels in data.batches(device)])


def judged(trial: Trial, detector: Detector) -> Figures:
    """Figures of a trained detector on the test set."""
    experiment, test = trial.experiment, trial.split.test
    scores, maps = predict(detector, experiment.rows(test), experiment.device)
    return experiment.judge(trial.split, scores, maps)


def _rate(trial: Trial, rate: float | None) -> float:
    return float(trial.bad.mean()) if rate is None else rate
