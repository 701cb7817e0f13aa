"""CoMet for Lightning: a callback that weighs the training samples of any LightningModule."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from comet_meta import (
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    IndexedDataset,
    SoftConfidentWeighter,
    collect_scores,
)
from comet_meta.integrations._batches import take_rows, training_loader
from comet_meta.loaders import RecordingLoader, scoring_loader
from comet_meta.restore import eval_mode, same_random_numbers
from comet_meta.wrapped import SteppedByTheLoop

if TYPE_CHECKING:
    from comet_meta.meta.step import MetaMode, MetaStep

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"comet_meta.integrations.lightning needs the package {error.name!r}: "
        'pip install "comet-meta[lightning]"'
    ) from error

Index = Callable[[Any], Tensor]
"""Positions of a batch's samples in the training set: batch -> (B,)."""
Scores = Callable[[Any, Any], Tensor]
"""Anomaly scores of a batch, higher = more anomalous: (module, batch) -> (B,)."""


class CoMetCallback(Callback):
    """Trains a LightningModule with CoMet; the module and the Trainer stay as they are.

    The module has to let the callback have its losses sample by sample:

    - *Automatic optimisation*: ``training_step`` returns ``{"loss": ..., "losses": ...}`` with
      ``losses (B,)``, or just the ``(B,)`` losses. The callback puts the weighted objective in
      place of ``"loss"``. With the dictionary, the module also trains without the callback.
    - *Manual optimisation*, with any number of optimizers: hand ``self.manual_backward`` the
      ``(B,)`` losses; scalars go through unweighted. With a ``regularizer``, its penalty is in each
      such call, on the parameters that require grad then (``toggle_optimizer``).

    Batches have to carry the samples' positions: ``DataLoader(IndexedDataset(train_set), ...)``
    (the callback takes the positions off before ``training_step`` sees the batch), or ``index``.

    Everything else is Lightning's: precision, gradient clipping and accumulation, schedulers,
    devices. Weights, loss history and random state are saved in Lightning's checkpoints.

    Args:
        weighter: Confidence in each sample; by default with the default rule.
        regularizer: The penalty lambda(Sigma) ||theta||^2; without one there is none.
        scores: Anomaly scores of a batch, (module, batch) -> (B,), for instance
            ``lambda module, batch: module.scores(batch)``. Once an epoch the training set is
            scored with it, the module in eval mode; with a prior, whose weights stay, once after
            the training, for the ranking. By default the losses of the epoch's training steps
            serve as scores, at no cost (drop-in steps and automatic optimisation only).
        index: Positions of a batch's samples, batch -> (B,), where batches carry them in some
            other way than :class:`comet_meta.IndexedDataset`.
        warm_up: Number of epochs before the first weights, >= 1: they mean nothing before the
            module has learned something.
        meta: ``"none"``, the drop-in step: one forward and backward pass, as without CoMet.
            A :class:`comet_meta.MetaStep`, or the name of its mode, takes a meta-step; then
            ``training_step`` is called on parts of the batch, several times.
        **settings: Further arguments of :class:`comet_meta.CoMetOptimizerWrapper`, such as
            ``exposure``.

    Attributes:
        weighter: The weighter; ``callback.weighter.ranking(20)`` are the samples to look at.

    Raises:
        ValueError: If ``warm_up`` is less than 1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = CoMetCallback(scores=lambda module, batch: module.scores(batch), warm_up=10)
        >>> trainer = Trainer(callbacks=[callback], max_epochs=40, logger=False)
    """

    def __init__(
        self,
        weighter: SoftConfidentWeighter | None = None,
        regularizer: CovarianceMetaRegularizer | None = None,
        *,
        scores: Scores | None = None,
        index: Index | None = None,
        warm_up: int = 1,
        meta: "MetaMode | MetaStep" = "none",
        **settings: Any,
    ) -> None:
        if warm_up < 1:
            raise ValueError(f"warm_up is {warm_up}; expected at least 1 epoch before the weights")
        self.weighter = weighter
        self._default_weighter = weighter is None
        self.regularizer = regularizer
        self.scores = scores
        self.index = index
        self.warm_up = warm_up
        self.meta = meta
        self.settings = settings
        self._comet: CoMetOptimizerWrapper | None = None
        self._saved: dict[str, Any] = {}
        self._scoring: tuple[DataLoader[Any], RecordingLoader] | None = None
        self._positions = torch.empty(0, dtype=torch.int64)  # of the batch
        self._steps = 0
        self._weighed = 0
        self._replaced: list[tuple[LightningModule, str, Any]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the positions off the batches of the Tuner's trial runs, which have no callbacks."""
        tuners = (BatchSizeFinder, LearningRateFinder)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and any(isinstance(each, tuners) for each in callbacks):
            for name in ("training_step", "validation_step"):
                self._replace(pl_module, name, self._trial_step)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its methods back."""
        self._withdraw()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get ready to take the place of the module's loss."""
        self._withdraw()
        self._check(trainer, pl_module)
        self._begin(trainer)
        self._comet = CoMetOptimizerWrapper(
            SteppedByTheLoop(trainer.optimizers),
            weighter=self.weighter,
            regularizer=self.regularizer,
            meta=self.meta,
            model=pl_module,
            **self.settings,
        )
        if self._saved:
            self._comet.load_method_state_dict(self._saved)
            self._saved = {}

    def _begin(self, trainer: Trainer) -> None:
        """Start with fresh weights, unless the trainer goes on with an earlier training."""
        dataset: Any = training_loader(trainer).dataset
        goes_on = trainer.global_step > 0 and not self._saved
        if self.weighter is None or (self._default_weighter and not goes_on):
            self.weighter = SoftConfidentWeighter(len(dataset))
        if goes_on:
            self.weighter.identify(dataset)
            return
        self.weighter.begin_fit(dataset)
        if self.regularizer is not None:
            self.regularizer.reset()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Keep the optimizer from a step on gradients that a sample made NaN or infinite."""
        if self._comet is not None and not self._comet.allows_step():
            optimizer.zero_grad()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the place of the module's loss, for this batch.

        Between batches the module is itself, so that checkpoints and copies of it are, too.
        """
        self._withdraw()
        self._replace(pl_module, "training_step", self._training_step)
        self._replace(pl_module, "manual_backward", self._manual_backward)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the module its methods back."""
        self._withdraw()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refresh the weights from the scores of the training set."""
        if self._steps and not self._weighed:
            raise ValueError(
                "no per-sample losses came in during this epoch: with manual optimisation, hand "
                "self.manual_backward(...) the losses of shape (B,) instead of their mean"
            )
        self._steps, self._weighed = 0, 0
        _, weighter = self._started()
        if trainer.current_epoch + 1 < self.warm_up:
            return
        if self.scores is None:
            weighter.fit()
        elif weighter.needs_scores:
            weighter.fit(self._collect(self.scores, trainer, pl_module))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the training set for the ranking, where the weights needed no scores."""
        _, weighter = self._started()
        if self.scores is not None and not weighter.needs_scores:
            weighter.fit(self._collect(self.scores, trainer, pl_module))

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Take the positions off batches of an indexed loader, as in training."""
        self._unpack(pl_module, "validation_step", trainer.val_dataloaders)

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Take the positions off batches of an indexed loader, as in training."""
        self._unpack(pl_module, "test_step", trainer.test_dataloaders)

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Take the positions off batches of an indexed loader, as in training."""
        self._unpack(pl_module, "predict_step", trainer.predict_dataloaders)

    @override
    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Give the module its methods back."""
        self._withdraw()

    @override
    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        """Give the module its methods back."""
        self._withdraw()

    @override
    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        """Give the module its methods back."""
        self._withdraw()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the module its methods back."""
        self._withdraw()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Weights, loss history and random state; the optimizers' state is Lightning's to save."""
        return self._saved if self._comet is None else self._comet.method_state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved, once training starts."""
        self._saved = dict(state_dict)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        training_loader(trainer)
        if self._takes_meta_step and not pl_module.automatic_optimization:
            raise ValueError(
                f"meta={self.meta!r} takes the module's whole step, which manual optimisation "
                "takes itself; use meta='none'"
            )
        if self.scores is None and (self._takes_meta_step or not pl_module.automatic_optimization):
            raise ValueError(
                "with a meta-step or manual optimisation, training losses can't serve as scores; "
                "pass scores=lambda module, batch: ... (B,) anomaly scores"
            )

    @property
    def _takes_meta_step(self) -> bool:
        return (self.meta if isinstance(self.meta, str) else self.meta.mode) != "none"

    def _started(self) -> tuple[CoMetOptimizerWrapper, SoftConfidentWeighter]:
        """Wrapper and weighter."""
        if self._comet is None or self.weighter is None:
            raise RuntimeError("training hasn't started: on_train_start wraps the optimizers")
        return self._comet, self.weighter

    def _replace(self, module: LightningModule, name: str, by: Callable[..., Any]) -> None:
        original = getattr(module, name)

        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            return by(module, original, *args, **kwargs)

        self._replaced.append((module, name, vars(module).get(name)))
        setattr(module, name, method)

    def _unpack(self, module: LightningModule, name: str, loaders: Any) -> None:
        """Have a step called without positions, where all its loaders are indexed."""
        self._withdraw()
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        if all(isinstance(getattr(each, "dataset", None), IndexedDataset) for each in loaders):
            self._replace(module, name, self._without_positions)

    def _trial_step(
        self, _: Any, original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A step of the Tuner, on a batch without positions; its loss is the plain mean."""
        if self.index is None and _is_indexed(batch):
            batch = batch[1]
        output = original(batch, *args, **kwargs)
        return output.mean() if isinstance(output, Tensor) else output

    @staticmethod
    def _without_positions(
        _: Any, original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        return original(batch[1], *args, **kwargs)

    def _withdraw(self) -> None:
        for module, name, own in reversed(self._replaced):
            if own is None:  # the method is that of the class again
                delattr(module, name)
            else:
                setattr(module, name, own)
        self._replaced.clear()

    def _training_step(
        self, module: Any, original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        index, batch = self._split(batch)
        self._positions = index
        self._steps += 1
        if not module.automatic_optimization:
            return original(batch, *args, **kwargs)
        if self._takes_meta_step:
            return self._meta_step(lambda part: original(part, *args, **kwargs), index, batch)
        output = original(batch, *args, **kwargs)
        if output is None:  # Lightning skips the batch
            self._weighed += 1
            return None
        losses = _losses_of(output)
        objective = self._objective(losses)
        if self.scores is None and module.current_epoch + 1 >= self.warm_up:
            _, weighter = self._started()
            as_normal = losses if losses.dim() == 1 else losses[0]
            weighter.update_finite(index.cpu(), as_normal)
        return {**output, "loss": objective} if isinstance(output, Mapping) else objective

    def _manual_backward(
        self, _: Any, original: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if loss.dim():
            loss = self._objective(loss)
        else:
            self._watch(loss)
        return original(loss, *args, **kwargs)

    def _watch(self, loss: Tensor) -> None:
        comet, _ = self._started()
        comet.watch(loss, self._positions)

    def _objective(self, losses: Tensor) -> Tensor:
        comet, _ = self._started()
        self._weighed += 1
        return comet.objective(losses, self._positions)

    def _meta_step(self, step: Callable[[Any], Any], index: Tensor, batch: Any) -> Tensor | None:
        """The objective of the full method, with the meta-gradient as its gradient."""
        comet, _ = self._started()
        self._weighed += 1
        parameters = [p for group in comet.param_groups for p in group["params"]]
        earlier = [parameter.grad for parameter in parameters]  # with gradient accumulation

        def closure(rows: Tensor) -> Tensor:
            output = step(take_rows(batch, rows, len(index)))
            if output is None:
                raise _NoLosses
            return _losses_of(output)

        try:
            report = comet.step(closure, index)
        except _NoLosses:  # Lightning skips the batch
            for parameter, gradient in zip(parameters, earlier, strict=True):
                parameter.grad = gradient
            return None
        gradients = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, earlier, strict=True):
            parameter.grad = gradient
        objective: Tensor = _WithGradient.apply(report.objective, gradients, *parameters)
        return objective

    def _split(self, batch: Any) -> tuple[Tensor, Any]:
        if self.index is not None:
            return self.index(batch), batch
        if _is_indexed(batch):
            index, rest = batch
            return index, rest
        raise TypeError(
            f"a training batch is a {type(batch).__name__} without sample positions; expected "
            "(index, batch): build the loader as DataLoader(IndexedDataset(train_set), ...), or "
            "pass index=lambda batch: ... positions (B,)"
        )

    def _collect(self, scores: Scores, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        def score(batch: Any) -> Tensor:
            batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.forward_context():
                return scores(pl_module, batch if self.index is not None else self._split(batch)[1])

        loader = training_loader(trainer)
        if self._scoring is None or self._scoring[0] is not loader:
            self._scoring = loader, scoring_loader(loader)
        with eval_mode([pl_module]), same_random_numbers([pl_module]):
            return collect_scores(score, self._scoring[1])


class _NoLosses(Exception):  # noqa: N818
    """``training_step`` returned None."""


class _WithGradient(torch.autograd.Function):
    """A value whose gradients were computed beforehand, for loops that call ``backward``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *_: Tensor) -> Tensor:
        """The value, shape (); its gradients belong to the parameters that follow."""
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        """The gradients times the factor that the loop has put on the loss."""
        scaled = [None if gradient is None else gradient * scale for gradient in ctx.gradients]
        return None, None, *scaled


def _is_indexed(batch: Any) -> bool:
    """Whether a batch is a pair of positions (B,) and the rest."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return False
    index = batch[0]
    return isinstance(index, Tensor) and index.dtype == torch.int64 and index.dim() == 1


def _losses_of(output: Any) -> Tensor:
    losses = output.get("losses", output.get("loss")) if isinstance(output, Mapping) else output
    paired = isinstance(losses, Tensor) and losses.dim() == 2 and len(losses) == 2
    if not isinstance(losses, Tensor) or not (losses.dim() == 1 or paired):
        kind = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"training_step gave {kind} as losses; expected one for each sample: return "
            '{"loss": losses.mean(), "losses": losses} with losses of shape (B,)'
        )
    return losses
