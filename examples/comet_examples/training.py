"""One training loop for every detector and method, with checkpoints that resume bit-exactly."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from typing_extensions import override

from comet_examples.detectors import Detector, Exposable, ScoresFittable
from comet_meta import (
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    IndexedDataset,
    SoftConfidentWeighter,
    StepReport,
    collect_scores,
    learn_from_review,
)
from comet_meta.meta.step import MetaMode
from comet_meta.vision.files import replacing
from comet_meta.vision.picture_prior import (
    HOLD_OUT,
    PRECAUTION,
    memory_part_prior,
    strangest_features,
)
from comet_meta.weights.review import Review

Method = Literal["plain", "oracle", "paper", "comet"]
Schedule = Literal["constant", "cosine"]
_SCORING_BATCH = 16  # larger ones fall out of a CPU's cache
_EXPOSED_FROM = 20  # likely bad pictures: a handful of them would be learned by heart


class ResumeError(ValueError):
    """Earlier work that this run can't go on from; the message is one for the user."""


class FeatureRows(Dataset[tuple[Tensor, ...]]):
    """Some rows of the cached features of a category, without copying them.

    Args:
        features: Those of all pictures, levels (M, C, h, w), of any floating-point type.
        rows: Which of them, shape (N,).
    """

    def __init__(self, features: Sequence[Tensor], rows: Tensor) -> None:
        self.features = features
        self.rows = rows

    def __len__(self) -> int:
        """N."""
        return len(self.rows)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Features of one picture, float32 levels (C, h, w)."""
        return tuple(level[self.rows[index]].float() for level in self.features)

    def batches(self, device: torch.device | str = "cpu") -> Iterator[list[Tensor]]:
        """All features in order, in batches, float32 levels (B, C, h, w)."""
        for rows in self.rows.split(_SCORING_BATCH):
            yield [level[rows].to(device).float() for level in self.features]


@dataclass(frozen=True)
class TrainingSettings:
    """What decides how a detector is trained.

    Attributes:
        method: ``"plain"`` and ``"oracle"`` (all weights 1), ``"comet"`` (the library's defaults)
            or ``"paper"`` (the published formulas).
        epochs: Passes over the training set, >= 1. The last one is the result.
        batch_size: Pictures in a batch, >= 2.
        seed: Decides initialisation, order and noise.
        meta: Meta-step of ``"comet"``; None for the library's default.
        strength: lambda_0 of ``"comet"``; 0 for no penalty.
        steps: In place of ``epochs``: optimizer steps, >= 1, rounded up to whole epochs. The same
            number trains a small set and a large one equally long.
        schedule: Course of the learning rates: ``"cosine"`` lets them fall to 0 by the end,
            ``"constant"`` leaves them as the detector has them.
        contamination: Share of bad training pictures that ``"comet"`` is told, in [0, 0.5);
            ``"auto"``: it finds out.
        review: What a person saw who looked at some of the training pictures, for ``"comet"``.

    Raises:
        ValueError: If not exactly one of ``epochs`` and ``steps`` is given.
    """

    method: Method
    epochs: int | None = None
    batch_size: int = 8
    seed: int = 0
    meta: MetaMode | None = None
    strength: float = 0.0
    steps: int | None = None
    schedule: Schedule = "constant"
    contamination: float | Literal["auto"] = "auto"
    review: Review | None = None

    def __post_init__(self) -> None:
        """Exactly one length."""
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"epochs is {self.epochs} and steps is {self.steps}; give one of the two"
            )

    def steps_an_epoch(self, count: int) -> int:
        """Optimizer steps in a pass over ``count`` pictures.

        Args:
            count: Pictures in the training set, >= 2. A last batch of one picture is left out:
                there is nothing to split in it, and batch norm needs two.

        Example:
            >>> [TrainingSettings("plain", 1).steps_an_epoch(count) for count in (16, 17, 18)]
            [2, 2, 3]
        """
        whole, left = divmod(count, self.batch_size)
        return max(1, whole + (left > 1))

    def epochs_for(self, count: int) -> int:
        """Passes over ``count`` pictures.

        Args:
            count: Pictures in the training set, >= 2.

        Example:
            >>> settings = TrainingSettings("plain", steps=1000)
            >>> [settings.epochs_for(count) for count in (48, 300, 2331)]
            [167, 27, 4]
        """
        if self.epochs is not None:
            return self.epochs
        return math.ceil(cast("int", self.steps) / self.steps_an_epoch(count))

    def stretched(self, times: float) -> "TrainingSettings":
        """The settings of a training ``times`` as long.

        Args:
            times: Factor on ``epochs`` or ``steps``, > 0. At least one epoch or step is left.

        Raises:
            ValueError: If the factor isn't above 0.

        Example:
            >>> TrainingSettings("plain", steps=1000).stretched(5).steps
            5000
        """
        if not times > 0:
            raise ValueError(f"times is {times}; expected a factor > 0 on the length of training")
        if self.steps is None:
            return replace(self, epochs=max(1, round(times * cast("int", self.epochs))))
        return replace(self, steps=max(1, round(times * self.steps)))

    def judged_after(self, count: int) -> int | None:
        """Epochs after which the model judges the pictures that were held out: a quarter of them.

        Args:
            count: Pictures in the training set, >= 2.

        Returns:
            None in a training of one epoch, in which nothing can be held out.

        Example:
            >>> [TrainingSettings("comet", epochs).judged_after(100) for epochs in (1, 2, 40)]
            [None, 1, 10]
        """
        epochs = self.epochs_for(count)
        return max(1, round(epochs / 4)) if epochs > 1 else None


@dataclass(frozen=True)
class Training:
    """A trained detector and what became known of the training set on the way.

    Attributes:
        detector: In eval mode.
        optimizer: The wrapper, with the weighter where the method has one.
        history: One entry for each epoch: mean loss, mean weight, lambda(Sigma), and how many
            times a picture was left out because its loss wasn't finite.
    """

    detector: Detector
    optimizer: CoMetOptimizerWrapper
    history: list[dict[str, float]]


def wrap(
    detector: Detector, data: FeatureRows, settings: TrainingSettings
) -> CoMetOptimizerWrapper:
    """The optimizer of a method.

    Args:
        detector: What to train.
        data: Features of the training set.
        settings: Choose the method.

    Returns:
        The wrapped optimizers; for ``"plain"`` and ``"oracle"`` the wrapper does nothing.
    """
    optimizers = detector.optimizers()
    model = cast("nn.Module", detector)
    if settings.method in ("plain", "oracle"):
        return CoMetOptimizerWrapper(optimizers, meta="none")
    if settings.method == "paper":
        return CoMetOptimizerWrapper.paper(optimizers, len(data), model=model)
    options: dict[str, Any] = {} if settings.meta is None else {"meta": settings.meta}
    if settings.strength > 0:
        options["regularizer"] = CovarianceMetaRegularizer(settings.strength)
    judges = settings.contamination == "auto" and settings.review is None
    judges = judges and settings.judged_after(len(data)) is not None
    prior, patch_scores = memory_part_prior(data.batches(), len(data))
    review = settings.review
    if review is not None:
        strange = strangest_features(data.batches(), patch_scores)
        prior, review = learn_from_review(prior, strange, review)
    weighter = SoftConfidentWeighter(
        prior=prior,
        contamination=settings.contamination,
        review=review,
        hold_out=HOLD_OUT if judges else None,
        precaution=PRECAUTION,  # where nothing is held out
    )
    return CoMetOptimizerWrapper(optimizers, weighter=weighter, model=model, **options)


def scheduled(optimizer: Optimizer, schedule: Schedule, steps: int) -> LRScheduler:
    """The schedule of an optimizer's learning rates; one step of it follows each of its own.

    Args:
        optimizer: All its groups fall alike, each from its own rate.
        schedule: See :class:`TrainingSettings`.
        steps: Length of the whole training, >= 1.

    Returns:
        torch's scheduler.

    Example:
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
        >>> scheduler = scheduled(sgd, "cosine", 2)
        >>> rates = []
        >>> for _ in range(2):
        ...     sgd.step()
        ...     scheduler.step()
        ...     rates.append(round(sgd.param_groups[0]["lr"], 3))
        >>> rates
        [0.1, 0.0]
    """
    if schedule == "constant":
        return ConstantLR(optimizer, factor=1.0, total_iters=0)
    return CosineAnnealingLR(optimizer, T_max=steps)


Wrap = Callable[[Detector, FeatureRows, TrainingSettings], CoMetOptimizerWrapper]
"""Makes the optimizer of a training from detector, features and settings."""


def train(
    build: Callable[[], Detector],
    data: FeatureRows,
    settings: TrainingSettings,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    identity: str = "",
    resume: bool = False,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    wrap: Wrap = wrap,
) -> Training:
    """Train a detector.

    Every epoch starts from random numbers of its own, made from the seed and its number, and ends
    with a checkpoint; a run that was stopped at any point and resumed ends in the same bits as one
    that wasn't. The learning rates follow the settings' schedule over the whole length, so a
    checkpoint only goes on to the length that it was written for.

    Args:
        build: Makes the untrained detector.
        data: Features of the training set. No label comes with them.
        settings: How to train.
        device: Where to train.
        checkpoint: File to write after every epoch (atomically); None for none.
        identity: Names the data; a checkpoint of other data or settings is refused.
        resume: Continue from the checkpoint if there is one.
        on_epoch: Called after every epoch with its number, from 1, and its entry of the history.
        wrap: Makes the optimizer; by default the method's.

    Returns:
        The detector after the last epoch, and the state of its training.

    Raises:
        ResumeError: If the checkpoint is damaged or belongs to another run.
        ValueError: If there are fewer than two pictures, or no loss of an epoch was finite.
    """
    if len(data) < 2:
        raise ValueError(f"there are {len(data)} training pictures; expected at least 2")
    torch.manual_seed(settings.seed)
    detector = build()
    module = cast("nn.Module", detector)
    detector.fit_statistics(data.batches())
    module.to(device)
    optimizer = wrap(detector, data, settings)
    length = settings.epochs_for(len(data))
    scheduler = scheduled(optimizer, settings.schedule, length * settings.steps_an_epoch(len(data)))
    history: list[dict[str, float]] = []
    run = {"identity": identity, **asdict(settings)}
    # Of a training at constant rates, every length is the beginning of any longer one.
    run |= {"epochs": 0 if settings.schedule == "constant" else length, "steps": None}
    # As text: a checkpoint is read without any class of ours.
    run["review"] = None if settings.review is None else str(settings.review)
    if resume and checkpoint is not None and checkpoint.exists():
        state = _read(checkpoint, run)
        module.load_state_dict(state["detector"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        history = state["history"]
    loader = DataLoader(IndexedDataset(data), settings.batch_size, shuffle=True)
    scoring = DataLoader(IndexedDataset(data), _SCORING_BATCH)

    def score(features: Sequence[Tensor]) -> Tensor:
        return detector.scores([level.to(device) for level in features])

    judged_after = settings.judged_after(len(data))
    epochs = range(len(history), length)
    for epoch in tqdm(
        epochs, desc=settings.method, initial=len(history), total=length, unit="epoch"
    ):
        torch.manual_seed((settings.seed * 1_000_003 + epoch) % 2**63)
        module.train()
        weighter = optimizer.weighter
        losses = _losses(detector, weighter if settings.method == "comet" else None)
        reports = []
        for index, features in loader:
            if len(index) == 1:
                continue  # nothing to split, and batch norm needs two
            batch = [level.to(device) for level in features]
            weights = None
            if weighter is not None and weighter.has_parts:
                weights = weighter.part_weights(index).to(device)
            reports.append(optimizer.step(_rows_of(batch, weights, losses), index))
            scheduler.step()
        module.eval()
        last = epoch == epochs[-1]
        judges = (
            weighter is not None
            and weighter.hold_out is not None
            and weighter.needs_scores
            and epoch + 1 == judged_after
        )
        if (last or judges) and isinstance(detector, ScoresFittable):
            detector.fit_scores(data.batches(device))
        # A prior's weights stay but for what is held out: scores are for the ranking then.
        if weighter is not None and (weighter.prior is None or judges or last):
            weighter.fit(collect_scores(score, scoring))
        history.append(_summary(reports, epoch))
        if checkpoint is not None:
            _write(
                checkpoint,
                {
                    "run": run,
                    "detector": module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "history": history,
                },
            )
        if on_epoch is not None:
            on_epoch(len(history), history[-1])
    module.eval()
    return Training(detector, optimizer, history)


@torch.no_grad()
def predict(
    detector: Detector, data: FeatureRows, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Scores and maps of some pictures.

    Args:
        detector: In eval mode.
        data: Their features.
        device: Where the detector is.

    Returns:
        Scores (N,) and maps (N, H, W), on the CPU.
    """
    scores, maps = [], []
    for batch in data.batches(device):
        scores.append(detector.scores(batch).cpu())
        maps.append(detector.maps(batch).cpu())
    return torch.cat(scores), torch.cat(maps)


Losses = Callable[[Sequence[Tensor], Tensor | None], Tensor]
"""Features and weights of their patches to losses (B,), or to pairs (2, B)."""


def _losses(detector: Detector, weighter: SoftConfidentWeighter | None) -> Losses:
    """Pairs of losses where the detector has them and enough pictures are likely to be bad."""
    if (
        weighter is not None
        and isinstance(detector, Exposable)
        and float(weighter.p_bad.sum()) >= _EXPOSED_FROM
    ):
        return detector.loss_pairs
    return detector.losses


def _rows_of(
    batch: Sequence[Tensor], weights: Tensor | None, losses: Losses
) -> Callable[[Tensor], Tensor]:
    """The closure of a step: the losses of some rows of the batch."""
    if weights is None:
        return lambda rows: losses([level[rows] for level in batch], None)
    return lambda rows: losses([level[rows] for level in batch], weights[rows])


def _summary(reports: Sequence[StepReport], epoch: int) -> dict[str, float]:
    """An epoch's entry of the history; steps that were skipped have no losses."""
    rows = [[r.objective, r.mean_weight, r.strength] for r in reports]
    loss, weight, strength = torch.tensor(rows, device="cpu").nanmean(dim=0).tolist()
    if math.isnan(loss):
        raise ValueError(f"every step of epoch {epoch + 1} was skipped: no loss was finite")
    dropped = sum(int(r.dropped) for r in reports)
    return {"loss": loss, "mean_weight": weight, "strength": strength, "dropped": dropped}


def _write(path: Path, state: dict[str, Any]) -> None:
    # By way of memory: torch's own writer hides a full disk behind an error of its own.
    content = io.BytesIO()
    torch.save(state, content)
    with replacing(path) as aside:
        aside.write_bytes(content.getbuffer())


def _read(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["run"]
    except Exception as error:  # a damaged file raises many kinds of errors
        raise ResumeError(
            f"can't read the checkpoint {path}: {error}; remove it to start from the beginning"
        ) from error
    changed = [key for key in run if found.get(key) != run[key]]
    if changed:
        raise ResumeError(
            f"the checkpoint {path} is of another run: "
            + ", ".join(f"{key} was {found.get(key)!r}, is {run[key]!r}" for key in changed)
            + "; give another --out, or remove it to start from the beginning"
        )
    return state
