"""CoMet for anomalib: a callback that lets its models train on folders nobody has sorted."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from comet_meta import CovarianceMetaRegularizer, SoftConfidentWeighter, distributed

try:
    from anomalib.models.components import AnomalibModule, MemoryBankMixin
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"comet_meta.integrations.anomalib needs the package {error.name!r}: "
        'pip install "comet-meta[anomalib]"'
    ) from error

from lightning.pytorch import LightningModule, Trainer

from comet_meta.integrations import lightning
from comet_meta.integrations._batches import take_rows, training_loader

_LOGGER = logging.getLogger(__name__)


class CoMetCallback(lightning.CoMetCallback):
    """Trains an anomalib model with CoMet: ``Engine(callbacks=[CoMetCallback()])``.

    Samples are known by their paths. Once an epoch the training set is scored with the model's own
    ``pred_score``, and the samples' weights follow from that. anomalib's models reduce their losses
    over the batch, so the weights come in by one of two ways:

    - ``by="losses"``, for models with a loss module (``model.loss``, as Fastflow has it): the
      network runs once on the batch, as ever; then the loss module is evaluated sample by sample on
      the network's outputs. The model trains on its own loss less what distrusted samples add to
      it: sum_i w_i L_i / B for a loss that is a mean over samples, sum_i w_i L_i for a sum, and
      exactly its own loss where all weights are 1. It costs B evaluations of the loss module, none
      of the network.
    - ``by="rows"``, for models that compute the loss inside the network (EfficientAd) or in
      ``training_step`` (Cflow): sample i stays in the batch with probability w_i, and the loss of
      those that stay counts K / B for K of B. On average that is the weighted gradient of a loss
      that is a mean over samples; it costs nothing. A batch of which nothing stays is skipped.

    Models that only fill a memory bank (Patchcore, Padim) take no gradient steps and are refused.

    Args:
        weighter: Confidence in each sample; by default with the default rule.
        regularizer: The penalty lambda(Sigma) ||theta||^2; without one there is none. Needs
            ``by="losses"``.
        warm_up: Number of epochs before the first weights, >= 1: they mean nothing before the
            model has learned something.
        by: How the weights come in; by default by losses where the model has a loss module.

    Attributes:
        by: How the weights come in, once training has started.

    Raises:
        ValueError: If ``by`` or ``warm_up`` is out of range.

    Example:
        >>> from anomalib.engine import Engine
        >>> comet = CoMetCallback(warm_up=10)
        >>> engine = Engine(callbacks=[comet], max_epochs=40)
    """

    def __init__(
        self,
        weighter: SoftConfidentWeighter | None = None,
        regularizer: CovarianceMetaRegularizer | None = None,
        *,
        warm_up: int = 1,
        by: Literal["losses", "rows"] | None = None,
    ) -> None:
        if by not in (None, "losses", "rows"):
            raise ValueError(f"by is {by!r}; expected 'losses', 'rows' or None")
        super().__init__(
            weighter, regularizer, scores=_predicted_scores, index=self._index, warm_up=warm_up
        )
        self.by: Literal["losses", "rows"] | None = by
        self._paths: list[str] = []
        self._position: dict[str, int] = {}
        self._hooks: list[Any] = []
        self._kept = 1.0
        self._compared = False
        self._factor = torch.ones(())  # B for a loss that is a sum over samples

    @property
    def paths(self) -> list[str]:
        """Paths of the training images; log messages give positions in this list."""
        return self._paths

    def suspects(self, k: int | None = None) -> list[str]:
        """Paths of the training images that fit in least, least confident first.

        Args:
            k: How many; None for all.
        """
        if self.weighter is None:
            raise RuntimeError("nothing has been trained yet: call Engine.fit first")
        return [self._paths[position] for position in self.weighter.ranking(k).tolist()]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the model's loss, and every image's position."""
        if not isinstance(pl_module, AnomalibModule) or isinstance(pl_module, MemoryBankMixin):
            raise TypeError(
                f"{type(pl_module).__name__} isn't a gradient-trained anomalib model: there's no "
                "loss that weights could act on"
            )
        dataset: Any = training_loader(trainer).dataset
        self._paths = [str(path) for path in dataset.samples["image_path"]]
        self._position = {path: position for position, path in enumerate(self._paths)}
        losses = _loss_modules(pl_module)
        self.by = self.by or ("losses" if losses else "rows")
        if self.by == "losses" and not losses:
            raise ValueError(f"{type(pl_module).__name__} has no loss module; use by='rows'")
        if self.by == "rows" and self.regularizer is not None:
            raise ValueError(
                f"the regularizer needs losses by sample, and {type(pl_module).__name__} trains "
                "by='rows'; leave it out"
            )
        _LOGGER.info("%s: weights act on %s", type(pl_module).__name__, self.by)
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the place of the model's loss, for this batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.by == "losses":
            self._hooks = [
                loss.register_forward_hook(self._weigh, with_kwargs=True)
                for loss in _loss_modules(pl_module)
            ]

    @override
    def _withdraw(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super()._withdraw()

    def _index(self, batch: Any) -> Tensor:
        return torch.tensor([self._position[str(path)] for path in batch.image_path])

    @override
    def _training_step(
        self, module: Any, original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self._positions = self._index(batch)
        self._steps += 1
        if self.by == "losses":
            return original(batch, *args, **kwargs)
        self._weighed += 1
        rows = self._draw(self._positions)
        if not len(rows):
            return None
        self._kept = len(rows) / len(self._positions)
        if len(rows) < len(self._positions):
            batch = take_rows(batch, rows, len(self._positions))
        self._positions = self._positions[rows]
        output = original(batch, *args, **kwargs)
        if output is None or not module.automatic_optimization:
            return output  # skipped, or its losses have passed by manual_backward
        loss = output["loss"] if isinstance(output, Mapping) else output
        self._watch(loss)
        return (
            {**output, "loss": loss * self._kept}
            if isinstance(output, Mapping)
            else loss * self._kept
        )

    @override
    def _manual_backward(
        self, _: Any, original: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self.by == "rows":
            self._watch(loss)
            loss = loss * self._kept
        return original(loss, *args, **kwargs)

    def _draw(self, index: Tensor) -> Tensor:
        """Rows of the batch that stay, each with the probability that its weight is, shape (K,)."""
        comet, weighter = self._started()
        weights: Tensor = weighter(index)
        generator = distributed.process_generator(comet.generator)
        weights = weights.cpu()
        rows = (torch.rand(len(weights), generator=generator) < weights).nonzero().flatten()
        if not len(rows) and distributed.world_size() > 1:  # every process has to take its step
            rows = weights.argmax().unsqueeze(0)
        return rows

    def _weigh(
        self, loss: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The loss module's own value less what distrusted samples add to it."""
        comet, weighter = self._started()
        if not loss.training or not torch.is_grad_enabled():
            return output
        self._weighed += 1
        size = len(self._positions)
        all_trusted = self.regularizer is None and bool((weighter(self._positions) == 1).all())
        # This waits for the device; so do the models, which log their loss right away.
        finite = bool(torch.isfinite(output.detach()).all())
        if all_trusted and finite:
            comet.watch(output, self._positions)
            return output
        losses = torch.stack(
            [
                loss.forward(*_of_sample(args, row, size), **_of_sample(kwargs, row, size))
                for row in range(size)
            ]
        ).flatten()
        # A sum over samples rather than a mean is size times as large.
        if finite:
            total = losses.detach().sum()
            is_sum = (output - total).abs() < (output - total / size).abs()
            self._factor = torch.where(is_sum, size, 1).detach()
            if not self._compared:
                _compare(loss, output.detach(), total / size * self._factor)
                self._compared = True
        losses = losses * self._factor
        objective: Tensor = self._objective(losses)
        return output + objective - losses.mean() if finite else objective


def _loss_modules(module: nn.Module) -> list[nn.Module]:
    """The module's own losses; not those that are parts of its network or of other losses."""
    return [child for child in module.children() if type(child).__name__.endswith("Loss")]


def _compare(loss: nn.Module, own: Tensor, by_sample: Tensor) -> None:
    """Say so where a loss isn't made up of its samples' losses."""
    if not torch.allclose(own, by_sample, rtol=0.01):
        _LOGGER.warning(
            "%s is %.4g on the batch and %.4g put together from its samples: it is neither their "
            "mean nor their sum, so weights act on it approximately (and not at all while all are "
            "1). CoMetCallback(by='rows') is the alternative.",
            type(loss).__name__,
            own.item(),
            by_sample.item(),
        )


def _of_sample(arguments: Any, row: int, size: int) -> Any:
    """What belongs to one sample in the arguments of a loss.

    Tensors have one entry for each sample, or several, one behind the other (SuperSimpleNet makes
    an anomalous copy of the batch).
    """
    if isinstance(arguments, Tensor):
        if not arguments.dim() or len(arguments) % size:
            raise ValueError(
                f"an argument of the loss has shape {tuple(arguments.shape)} for {size} samples, "
                "so it can't be told apart by sample; use CoMetCallback(by='rows')"
            )
        return arguments[row::size]
    if isinstance(arguments, Mapping):
        return {name: _of_sample(value, row, size) for name, value in arguments.items()}
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(_of_sample(value, row, size) for value in arguments)
    return arguments


def _predicted_scores(module: Any, batch: Any) -> Tensor:
    """Image-level anomaly scores as the model itself gives them, before normalisation, (B,)."""
    if module.pre_processor is not None:
        module.pre_processor.on_validation_batch_start(module.trainer, module, batch, 0)
    prediction = module.model(batch.image)
    score: Tensor | None = prediction.pred_score
    if score is None:
        score = prediction.anomaly_map.flatten(1).amax(dim=1)
    return score.reshape(len(batch.image))
