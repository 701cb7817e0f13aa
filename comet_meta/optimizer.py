"""The optimizer wrapper: confident meta-learning for an existing training loop."""

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from typing_extensions import Self, override

from comet_meta import distributed
from comet_meta.arguments import resolve_meta, seeded_generator
from comet_meta.batch_gradient import BatchGradient
from comet_meta.data import as_batch_index, as_index
from comet_meta.losses import Closure, check_losses, finite_mask, weigh_losses
from comet_meta.penalty import CovarianceMetaRegularizer
from comet_meta.resume import ResumableOptimizers
from comet_meta.step_report import StepReport, step_report
from comet_meta.tasks import can_split, support_query_losses
from comet_meta.weights.weighter import SoftConfidentWeighter
from comet_meta.wrapped import refuse_index, with_own_hooks

if TYPE_CHECKING:
    from comet_meta.meta.step import MetaMode, MetaStep

_LOGGER = logging.getLogger(__name__)


class CoMetOptimizerWrapper(ResumableOptimizers):
    """Makes an existing training loop robust to bad training samples.

    It wraps one optimizer, or several that step together, and takes their place in the loop: it has
    their ``param_groups`` and ``state``, so schedulers, gradient scalers and clipping work as
    before.

    For a batch of B samples with parameters theta, a step does the following:

    1. Look up the weight w_i and P(bad)_i of each sample. The weighter sets them from anomaly
       scores, before the step.
    2. Take the per-sample losses L_i. A sample whose loss is NaN or infinite is left out.
    3. Weigh the losses: w_i L_i (soft confident learning). Where the losses come in pairs, add
       exposure * P(bad)_i * A_i, where A_i is the loss of the sample taken as anomalous. Take the
       mean over the batch.
    4. Add the penalty lambda(Sigma) ||theta||^2 (model uncertainty).
    5. Compute the gradient of this objective; with a meta-step, the meta-gradient:
       (a) split the batch into support and query, (b) take inner steps on the support loss from
       theta to theta', (c) take the query loss at theta', (d) combine the gradients, and put theta
       back.
    6. Record the support loss and the query loss as training and validation loss: their covariance
       Sigma gives the next lambda(Sigma).
    7. Step the wrapped optimizers, unless a gradient is NaN or infinite.

    There are two ways to use it. Level 1, drop-in: :meth:`objective` does 1 to 4 and 6, the loop
    calls ``backward()``, and :meth:`step` does 7. Level 2, the full method: ``step(closure,
    index)`` does 1 to 7, with the meta-step of ``meta``.

    Pairs of losses (2, B) teach the detector what bad samples look like, from those that the
    weighter is sure of. The detector has to define the loss of a sample taken as anomalous, for
    instance a hinge on its anomaly score.

    A sample that is left out in 2 is named in a warning (logging). So is a step that is skipped in
    7; parameters and optimizer state then stay as they are. On CUDA, losses are checked after the
    backward pass was queued, so that the device never waits.

    Args:
        optimizer: The optimizer to wrap, or a sequence of them. LBFGS is refused, because it
            re-evaluates its closure.
        weighter: Weights of the training samples; without one all weights are 1.
        regularizer: The penalty lambda(Sigma) ||theta||^2; without one there is none.
        exposure: Factor on the loss of a sample taken as anomalous, >= 0, where losses come in
            pairs. It is multiplied by P(bad).
        meta: The meta-step of ``step(closure, index)``: a :class:`comet_meta.MetaStep`, the name of
            its mode, or ``"none"`` for a plain weighted step.
        model: The module that the closure uses. Needed for ``meta="maml"``, and for modules with
            buffers (batch norm), so that the inner steps don't change them.
        generator: Source of the random split of a batch (on the CPU). By default a new one, seeded
            with ``torch.initial_seed()``, so that wrapping a loop doesn't change its other random
            numbers.

    Raises:
        TypeError: If ``optimizer`` isn't a torch optimizer, or is LBFGS.
        ValueError: If an argument is out of range.

    Example:
        >>> from comet_meta import SoftConfidentWeighter
        >>> _ = torch.manual_seed(0)
        >>> data = torch.randn(20, 3)
        >>> model = nn.Linear(3, 3)
        >>> def losses(rows): return (model(data[rows]) - data[rows]).square().mean(dim=1)
        >>> optimizer = CoMetOptimizerWrapper(
        ...     torch.optim.SGD(model.parameters(), lr=0.1), weighter=SoftConfidentWeighter(20))
        >>> before = losses(torch.arange(20)).mean()
        >>> for _ in range(10):
        ...     report = optimizer.step(losses, torch.arange(20))
        >>> bool(losses(torch.arange(20)).mean() < before)
        True

    Source: Aqeel, Sharifi, Cristani, Setti: Towards Real Unsupervised Anomaly Detection Via
    Confident Meta-Learning, ICCV 2025. :meth:`paper` has the paper's settings.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        weighter: SoftConfidentWeighter | None = None,
        regularizer: CovarianceMetaRegularizer | None = None,
        exposure: float = 0.5,
        meta: "MetaMode | MetaStep" = "none",
        model: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            weighter=weighter,
            regularizer=regularizer,
            model=model,
            generator=seeded_generator() if generator is None else generator,
        )
        if not exposure >= 0:
            raise ValueError(f"exposure is {exposure}; expected a factor >= 0")
        self.exposure = exposure
        self.meta, self.query_fraction = resolve_meta(meta, model)
        self._last_objective: tuple[Tensor, Tensor] | None = None  # weighted losses, weights
        if self.meta is not None and model is None:
            _LOGGER.info(
                "no model= given: batch-norm statistics and other buffers see the inner passes too"
            )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Look after the step of Lightning's and Fabric's optimizers.

        Each of them stands in for the optimizer that it holds, by a class made at run time in which
        its own ``step(closure)`` comes before the wrapper's.
        """
        super().__init_subclass__(**kwargs)
        parameters = inspect.signature(cls.step).parameters.values()
        if not any(p.name == "index" or p.kind is p.VAR_POSITIONAL for p in parameters):
            cls.step = refuse_index(cls.step)  # type: ignore[method-assign]

    @classmethod
    def paper(
        cls, optimizer: Optimizer | Sequence[Optimizer], num_samples: int, **changes: Any
    ) -> Self:
        """The published method: its formulas and settings, without the faults of its public code.

        Weights min(1, tau / s) with tau = Q3 + 1.5 IQR; lambda(Sigma) with lambda_0 = 0.005,
        gamma = 0.5 and a window of 5; batches split into 4 tasks, each with 70 % support and 30 %
        query; 5 inner Adam steps with learning rate 1e-4; first-order gradient of the query loss at
        theta'. The outer learning rate is the optimizer's (paper: 2e-4). This preset is for
        comparison; the defaults of this class gave better results. Of a batch of 8, each task has
        one sample in its support and one in its query. lambda_0 counts in units of the loss: for a
        loss of another scale give ``regularizer=``, see :class:`CovarianceMetaRegularizer`.

        Args:
            optimizer: The optimizer to wrap, or a sequence of them.
            num_samples: Size of the training set.
            **changes: Arguments of the class that replace those of the preset.

        Returns:
            The wrapper.

        Example:
            >>> model = nn.Linear(3, 3)
            >>> adam = torch.optim.Adam(model.parameters(), lr=2e-4)
            >>> CoMetOptimizerWrapper.paper(adam, num_samples=100).meta.inner_steps
            5
        """
        from comet_meta.meta.paper import paper_settings

        return cls(optimizer, **(paper_settings(num_samples) | changes))

    def objective(self, losses: Tensor, index: Tensor | Sequence[int] | None = None) -> Tensor:
        """Weighted mean of the losses plus penalty (steps 1 to 4); call ``backward()`` on it.

        The mean is sum_i w_i L_i / B, over the whole batch, so that a batch full of suspects moves
        the model little. With a regularizer, the losses of a random ``query_fraction`` of the batch
        count as its validation losses.

        Samples whose loss is NaN or infinite don't count: the result is that of the batch without
        them. Their gradients may still be NaN if NaN values entered the model. :meth:`step` then
        skips the step.

        Args:
            losses: Per-sample losses with their graph, shape (B,), or pairs, (2, B). For losses
                without a graph nothing is left out and nothing is recorded. Under
                ``torch.no_grad()``, as in validation, they aren't those of training samples: the
                result is then their plain mean plus penalty, whatever the index.
            index: Positions of the samples in the data set, shape (B,); needed with a weighter.

        Returns:
            The objective, shape ().

        Raises:
            TypeError: If losses or index have a wrong dtype.
            ValueError: If losses are not (B,) or (2, B) or are empty, or index is missing; or if no
                loss is finite because the parameters aren't.
            IndexError: If a position lies outside the data set.
        """
        check_losses(losses)
        batch_size = losses.shape[-1]
        parameters = self.trained_parameters()
        if not torch.is_grad_enabled():
            # A validation loss: the weights are those of the training samples.
            own = losses if losses.dim() == 1 else losses[0]
            return own.mean() + self._penalty(parameters, self._strength(parameters))
        index = as_batch_index(
            index, batch_size, self._num_samples, needed=self.weighter is not None
        )
        self._check_recorded_batches()
        # 1) Weights w_i and exposure * P(bad)_i.
        weights = self._weights(index, batch_size)
        # 2) Losses that are finite.
        finite = finite_mask(losses.detach())
        # 3) w_i L_i + exposure P(bad)_i A_i.
        weighted = weigh_losses(losses, weights)
        # 4) lambda(Sigma) ||theta||^2.
        penalty = self._penalty(parameters, self._strength(parameters))
        if not losses.requires_grad:
            return weighted.mean() + penalty
        kept = torch.where(finite, weighted, 0)
        self._last_objective = kept.detach(), weights[0].to(finite.device) * finite
        # The mean over the samples kept; the factor is exactly 1 if all losses are finite.
        count = finite.sum()
        ratio = distributed.batch_size_ratio(count, losses.device)
        mean = kept.mean() * (batch_size / count.clamp_min(1) * ratio).to(losses)
        # 6) Training and validation loss.
        pair = None
        if self.regularizer is not None and can_split(batch_size):
            with torch.no_grad():
                split = support_query_losses(kept, self.query_fraction, self.generator)
                pair = split * ratio + penalty
        self._record_batch(finite, index, pair)
        # 5) The gradient: the loop's own backward().
        return mean + penalty

    @overload  # type: ignore[override]
    def step(self, closure: Callable[[], float] | None = None) -> float | None: ...
    @overload
    def step(self, closure: Closure, index: Tensor | Sequence[int]) -> StepReport: ...
    @override
    @with_own_hooks
    def step(
        self,
        closure: Callable[[], float] | Closure | None = None,
        index: Tensor | Sequence[int] | None = None,
    ) -> float | StepReport | None:
        """Take a step.

        Without ``index`` (level 1): step the wrapped optimizers with the gradients in ``.grad``.
        With ``index`` (level 2): clear the gradients, compute the gradient of the batch
        (:meth:`backward`) and step. To clip this gradient, register a step pre-hook on a wrapped
        optimizer, or call ``backward`` and ``step()`` yourself.

        If a loss isn't finite, the closure is called once more for all rows, with ``model`` in eval
        mode, to find the samples. The gradient is then computed again without them. If it still
        isn't finite, or fewer than two samples are left to split, the step is skipped. If the
        closure raises, parameters, optimizer state, the generator and (with ``model``) buffers are
        as before.

        Args:
            closure: With ``index``, a function from rows of the batch, shape (R,), to their losses
                at the current parameters, shape (R,), or pairs, (2, R). It is called several times,
                with each row either in the support or in the query. Without ``index``, as for any
                torch optimizer: it computes the gradients. One wrapped optimizer gets it, so that
                SAM and the like can call it as often as they need; several step after one call.
            index: Positions of the batch's samples in the data set, shape (B,), B >= 2 unless
                ``meta="none"``. Rows come on its device.

        Returns:
            Without ``index``, what the wrapped optimizer returns; with it, a report.

        Raises:
            TypeError: If losses or index have a wrong dtype, or the closure is missing.
            ValueError: If the batch is empty or of one sample, losses are not (R,), or the
                parameters are NaN or infinite.
            IndexError: If a position lies outside the data set.
        """
        if index is None:
            return self._step_optimizers(cast("Callable[[], float] | None", closure))
        if closure is None:
            raise TypeError(
                "step(closure, index) needs a closure from rows of the batch to their losses"
            )
        self.zero_grad()
        report = self.backward(cast("Closure", closure), index)
        self._step_optimizers()
        return report

    def watch(self, loss: Tensor, index: Tensor | Sequence[int]) -> None:
        """Let :meth:`allows_step` count a loss that isn't weighted, such as another's batch mean.

        Args:
            loss: Shape ().
            index: Positions of the batch's samples in the data set, shape (B,).
        """
        index = as_index(index, self._num_samples)
        finite = torch.isfinite(loss.detach()).expand(len(index))
        self._guard.record_batch(finite, index, None)

    @property
    def loss(self) -> Tensor:
        """Weighted mean of the losses of the last :meth:`objective`: sum(w L) / sum(w), shape ().

        Monitor this one. The objective falls when weights fall, which misleads a scheduler that
        waits for a plateau, or the choice of a best epoch. Reading it waits for its device. NaN
        before the first training step, and where all weights are 0.
        """
        if self._last_objective is None:
            return torch.tensor(torch.nan)
        losses, weights = self._last_objective
        return losses.sum() / weights.to(losses).sum()

    @torch.enable_grad()
    def backward(
        self,
        closure: Closure,
        index: Tensor | Sequence[int],
        *,
        factor: float = 1.0,
        scaler: GradScaler | None = None,
    ) -> StepReport:
        """Add the gradient of a batch to ``.grad`` (steps 1 to 6), as ``loss.backward()`` does.

        ``step(closure, index)`` is ``zero_grad``, ``backward`` and ``step``. Call them one by one
        for gradient accumulation, clipping or a ``GradScaler``. With a scaler, enter autocast
        inside the closure, and go on with ``scaler.unscale_``, ``scaler.step`` and
        ``scaler.update`` as in any loop. A step whose inner or outer gradients overflow is skipped.

        Args:
            closure: From rows of the batch, shape (R,), to their losses, (R,) or (2, R); see
                :meth:`step`.
            index: Positions of the batch's samples in the data set, shape (B,).
            factor: Factor on the gradient, > 0: 1 / n where n batches make up one step.
            scaler: Scales the losses for float16 autocast; inner steps use unscaled gradients.

        Returns:
            The report; its losses include neither the factor nor the scale.

        Raises:
            TypeError: If losses or index have a wrong dtype.
            ValueError: If the batch is empty or of one sample, losses are not (R,), the parameters
                are NaN or infinite, or ``factor`` isn't > 0. Gradients are then as before.
            IndexError: If a position lies outside the data set.

        Example:
            Two batches to a step:

            >>> data, model = torch.randn(16, 3), nn.Linear(3, 3)
            >>> optimizer = CoMetOptimizerWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
            >>> for batch in torch.arange(16).split(8):
            ...     def losses(rows): return (model(data[batch[rows]]) - 1).square().mean(dim=1)
            ...     report = optimizer.backward(losses, batch, factor=1 / 2)
            >>> optimizer.step()
            >>> optimizer.zero_grad()
        """
        index = as_index(index, self._num_samples)
        if not factor > 0:
            raise ValueError(f"factor is {factor}; expected 1 / n where n batches make up a step")
        parameters = self.trained_parameters()
        if not parameters:
            raise ValueError("none of the optimizer's parameters requires grad: nothing to train")
        # 1) Weights w_i and exposure * P(bad)_i.
        weights = self._weights(index, len(index))
        strength = self._strength(parameters)
        # 2) to 5) The gradient of the batch.
        batch_gradient = BatchGradient(
            meta=self.meta,
            query_fraction=self.query_fraction,
            model=self.model,
            generator=self.generator,
            penalty=partial(self._penalty, strength=strength),
        )
        result = batch_gradient.add(closure, index, weights, parameters, factor, scaler)
        self._guard.record_gradient(usable=result.usable)
        # 6) Training and validation loss.
        if result.usable and self.regularizer is not None and can_split(len(index)):
            self._record_losses(result.pair)
        with torch.no_grad():
            penalty = self._penalty(parameters, strength)
        return step_report(
            result.support_loss,
            result.query_loss,
            self.query_fraction,
            result.weights,
            penalty,
            strength,
            result.dropped,
        )

    @property
    def _num_samples(self) -> int | None:
        return None if self.weighter is None else self.weighter.num_samples

    def _weights(self, index: Tensor | None, batch_size: int) -> Tensor:
        """Weights of the losses as normal and as anomalous samples, (2, B), on the index's device.

        The first row is w_i, the second exposure * P(bad)_i.
        """
        if self.weighter is None or index is None:
            weights = torch.zeros(2, batch_size, device=None if index is None else index.device)
            weights[0] = 1
            return weights
        weights = self.weighter(index)
        p_bad = self.weighter.p_bad[index.to(weights.device)]
        return torch.stack([weights, self.exposure * p_bad]).to(index.device)

    def _strength(self, parameters: Sequence[Tensor]) -> Tensor:
        """lambda(Sigma), shape (); 0 without a regularizer."""
        device = parameters[0].device if parameters else None
        if self.regularizer is None:
            return torch.zeros((), device=device)
        return self.regularizer.strength.to(device)

    def _penalty(self, parameters: Sequence[Tensor], strength: Tensor) -> Tensor:
        """lambda(Sigma) ||theta||^2, shape (); 0 without a regularizer."""
        if self.regularizer is None:
            return strength
        return self.regularizer.penalty(parameters, strength)

    def _record_losses(self, pair: Tensor) -> None:
        """Record training and validation loss (2,), averaged over the processes, for Sigma."""
        if self.regularizer is not None:
            self.regularizer.update(*distributed.average(pair.detach()))

    @override
    def __repr__(self) -> str:
        wrapped = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
        return (
            f"{type(self).__name__}({wrapped}, meta={self.meta or 'none'!r}, "
            f"weighter={self.weighter}, regularizer={self.regularizer})"
        )
