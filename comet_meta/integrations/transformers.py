"""Hugging Face: a Trainer for data that nobody has cleaned."""

import logging
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from typing_extensions import override

from comet_meta.losses import per_sample
from comet_meta.optimizer import CoMetOptimizerWrapper
from comet_meta.weights.weighter import SoftConfidentWeighter
from comet_meta.wrapped import SteppedByTheLoop

KEY = "sample_index"
FILE = "comet_meta.pt"
_LOGGER = logging.getLogger(__name__)


class WithPositions(Dataset[dict[str, Any]]):
    """A data set of dictionaries with each sample's position under ``"sample_index"``.

    Args:
        dataset: A map-style data set of dictionaries.

    Example:
        >>> WithPositions([{"x": 1.0}, {"x": 2.0}])[1]
        {'x': 2.0, 'sample_index': 1}
    """

    def __init__(self, dataset: Any) -> None:
        if not isinstance(dataset, Sized):
            raise TypeError(
                f"{type(dataset).__name__} has no positions; expected a data set with a length"
            )
        self.dataset: Any = dataset

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The sample and where it stands."""
        return {**self.dataset[position], KEY: position}


class CoMetTrainer(Trainer):
    """A Trainer that trusts each training sample as far as its losses allow.

    The weights are saved in the Trainer's checkpoints. A step whose losses or gradients a sample
    made NaN or infinite isn't taken.

    The model returns its losses by sample, ``{"losses": ...}``, of any shape that
    :func:`comet_meta.per_sample` takes. The losses of the training steps serve as anomaly scores,
    and the weights are refitted about once an epoch. Evaluation gets the plain mean. Everything
    else is the Trainer's. ``remove_unused_columns`` must be off, so that positions reach the loss.

    Args:
        *args: Of the Trainer.
        weighter: Confidence in each sample; by default one with the default rule.
        warm_up: Epochs before the first weights, >= 1.
        **kwargs: Of the Trainer.

    Attributes:
        weighter: ``trainer.weighter.ranking(20)`` are the samples to look at.

    Raises:
        ValueError: If ``remove_unused_columns`` is on, or ``warm_up`` less than 1.
    """

    def __init__(
        self,
        *args: Any,
        weighter: SoftConfidentWeighter | None = None,
        warm_up: int = 1,
        **kwargs: Any,
    ) -> None:
        if warm_up < 1:
            raise ValueError(f"warm_up is {warm_up}; expected at least 1 epoch before the weights")
        super().__init__(*args, **kwargs)
        if self.args.remove_unused_columns:
            raise ValueError(
                "the Trainer would remove the samples' positions from the batches; pass "
                "TrainingArguments(remove_unused_columns=False)"
            )
        if self.train_dataset is not None:
            self.train_dataset = WithPositions(self.train_dataset)
        self.weighter = SoftConfidentWeighter() if weighter is None else weighter
        if weighter is None and self.train_dataset is not None:
            self.weighter = SoftConfidentWeighter(len(self.train_dataset))
        self.warm_up = warm_up
        self._comet: CoMetOptimizerWrapper | None = None
        self.add_callback(_Guard(self))
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
        self.can_return_loss = True  # evaluation needs no labels for it

    @override
    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, with fresh weights or with those of a checkpoint.

        Args:
            resume_from_checkpoint: As for the Trainer; the weights come back with it.
            *args: As for the Trainer.
            **kwargs: As for the Trainer.

        Returns:
            What the Trainer returns.

        Raises:
            ValueError: If the checkpoint's weights belong to other samples.
        """
        self._comet = None
        dataset: Any = self.train_dataset
        self.weighter.begin_fit(dataset)
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(str(self.args.output_dir))  # type: ignore[no-untyped-call]
        if isinstance(folder, str):
            file = Path(folder) / FILE
            if file.exists():
                self.weighter.load_state_dict(torch.load(file, weights_only=True))
            else:
                _LOGGER.warning("%s has no weights of samples; they start from 1", folder)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def comet(self) -> CoMetOptimizerWrapper:
        """What weighs the losses of this training."""
        if self._comet is None:
            optimizer: Any = self.optimizer
            self._comet = CoMetOptimizerWrapper(
                SteppedByTheLoop([optimizer]), weighter=self.weighter, model=self.model
            )
        return self._comet

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:
        """The weighted mean of a training batch's losses; the mean of another's.

        Args:
            model: Returns a mapping with ``"losses"``.
            inputs: A batch.
            return_outputs: Whether to return the model's outputs too.
            num_items_in_batch: Ignored: the loss is a mean over samples.

        Returns:
            The loss, shape (), or the loss and the outputs.
        """
        index = inputs.get(KEY)
        outputs = model(**{name: value for name, value in inputs.items() if name != KEY})
        if not isinstance(outputs, Mapping) or "losses" not in outputs:
            raise ValueError(
                'the model returned no losses by sample; expected a mapping with "losses" of '
                "shape (B,) or (B, ...)"
            )
        losses: Tensor = outputs["losses"]
        if index is None or not model.training:
            loss = losses.mean()
        else:
            loss = self._weighted(per_sample(losses, len(index)), index.cpu())
        return (loss, {"loss": loss, **outputs}) if return_outputs else loss

    def _weighted(self, losses: Tensor, index: Tensor) -> Tensor:
        loss = self.comet.objective(losses, index)
        if (self.state.epoch or 0) >= self.warm_up - 1:
            self.weighter.update_finite(index, losses)
        return loss


class _Guard(TrainerCallback):
    """Keeps the optimizer from steps that can't be taken, and the weights in checkpoints."""

    def __init__(self, trainer: CoMetTrainer) -> None:
        self.trainer = trainer

    @override
    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if not self.trainer.comet.allows_step():
            optimizer: Any = self.trainer.optimizer
            optimizer.zero_grad()

    @override
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            torch.save(self.trainer.weighter.state_dict(), folder / FILE)
