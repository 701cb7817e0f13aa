"""The wrapper that turns an existing optimizer into confident meta-learning."""

import logging
from collections import ChainMap
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from typing_extensions import Self, override

from comet_meta import distributed
from comet_meta.batch import BatchGradient, MetaMode
from comet_meta.data import as_index
from comet_meta.gradients import add_gradients
from comet_meta.losses import Closure, check_losses, finite_samples, weighted_losses
from comet_meta.nonfinite import StepGuard
from comet_meta.penalty import CovarianceMetaRegularizer
from comet_meta.tasks import splits, support_query
from comet_meta.weights.weighter import SoftConfidentWeighter

if TYPE_CHECKING:
    from comet_meta.meta.step import MetaStep

_QUERY_FRACTION = 0.3
_LOGGER = logging.getLogger(__name__)


class StepReport(NamedTuple):
    """What one full step did, as detached tensors of shape (); reading one waits for its device.

    The losses of a batch that was left out are NaN.

    Attributes:
        objective: Weighted loss plus penalty of the whole batch; support and query losses in
            proportion to their rows, the latter at the adapted parameters.
        support_loss: The part on the support rows, at the parameters before the step.
        query_loss: The part on the query rows, which the inner steps have not seen.
        loss: The objective without its penalty, divided by the mean weight: the mean loss of the
            samples that count. Monitor this one; the objective falls when weights fall. NaN where
            all weights are 0.
        strength: lambda(Sigma) that the step used; 0 without a regularizer.
        mean_weight: Mean confidence of the batch, in [0, 1].
        min_weight: Least confidence in the batch, in [0, 1].
        dropped: Number of samples left out because their loss was NaN or infinite; the whole batch
            if none of it could be learned from.
    """

    objective: Tensor
    support_loss: Tensor
    query_loss: Tensor
    loss: Tensor
    strength: Tensor
    mean_weight: Tensor
    min_weight: Tensor
    dropped: Tensor


class CoMetOptimizerWrapper(Optimizer):
    """Makes an existing training loop robust to bad training samples.

    It wraps one optimizer, or several that step together, and stands in for them: it shares their
    ``param_groups`` and ``state``, so schedulers, gradient scalers and clipping work as before.

    Level 1, drop-in: :meth:`objective` turns per-sample losses into the weighted, regularised
    objective; ``backward()`` and :meth:`step` stay the loop's own. Level 2, the full method:
    ``step(closure, index)`` also takes the meta-step of ``meta``.

    Losses may also come in pairs (2, B): of the samples taken as normal, as always, and taken as
    anomalous. A detector that learns what bad samples look like from those that the weighter is
    sure of gains more than one that only leaves them out. The detector has to say what a sample's
    loss is if it is anomalous: a hinge on its anomaly score, say.

    A sample whose loss is NaN or infinite is left out and named in a warning (logging). A step that
    can't be taken without it is skipped, and a warning says so; parameters and state of the wrapped
    optimizers are then untouched. On CUDA, losses are looked at when the backward pass is queued
    already, so that the device never waits.

    Args:
        optimizer: The optimizer to wrap, or a sequence of them. LBFGS is refused, because it
            re-evaluates its closure.
        weighter: Confidence in each training sample; without one every weight is 1.
        regularizer: The penalty lambda(Sigma) ||theta||^2; without one there is none.
        exposure: What the loss of a bad sample taken as anomalous counts, >= 0, relative to that of
            a good one taken as normal, where losses come in pairs. It is multiplied by the
            probability that the sample is bad.
        meta: What ``step(closure, index)`` does: ``"none"`` (a plain weighted step), or a meta-step
            by its settings, :class:`comet_meta.MetaStep`, or by the name of its mode.
        model: The module that the closure uses. Needed for ``meta="maml"``, and for modules with
            buffers (batch norm), which are then kept free of the inner passes.
        generator: Source of the random split of a batch (on the CPU). By default one of its own,
            seeded with ``torch.initial_seed()``, so that wrapping a loop doesn't change its
            other random numbers.

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
        # Optimizer.__init__ would make groups and state of its own; these are shared instead.
        self.optimizers = _checked_optimizers(optimizer)
        if not exposure >= 0:
            raise ValueError(f"exposure is {exposure}; expected a factor >= 0")
        settings = None if meta == "none" else _meta_settings(meta)
        self.query_fraction = _QUERY_FRACTION if settings is None else settings.query_fraction
        if settings is not None and settings.mode == "none":
            settings = None
        if settings is not None and settings.mode == "maml" and model is None:
            raise ValueError("meta='maml' differentiates through the model: pass model=")
        self.weighter = weighter
        self.regularizer = regularizer
        self.exposure = exposure
        self.meta: MetaStep | None = (
            None if settings is None or settings.mode == "none" else settings
        )
        self.model = model
        if generator is None:
            generator = torch.Generator()
            generator.manual_seed(distributed.agreed_seed(torch.initial_seed()))
        self.generator = generator
        self._guard = StepGuard()
        self._last: tuple[Tensor, Tensor] | None = None
        self.defaults = self.optimizers[0].defaults
        super().__setstate__({})  # the hooks and profiling that every torch optimizer has
        if self.meta is not None and model is None:
            _LOGGER.info(
                "no model= given: batch-norm statistics and other buffers see the inner passes too"
            )

    @classmethod
    def paper(
        cls, optimizer: Optimizer | Sequence[Optimizer], num_samples: int, **changes: Any
    ) -> Self:
        """The published method, with its faults in code put right but its formulas unchanged.

        Weights min(1, tau / s) with tau = Q3 + 1.5 IQR; lambda(Sigma) with lambda_0 = 0.005,
        gamma = 0.5 and a window of 5; batches dealt into 4 tasks, each split 70/30; 5 inner Adam
        steps of 1e-4; first-order gradient of the query loss at the adapted parameters. The outer
        learning rate is the optimizer's own (paper: 2e-4). The defaults of this class measure
        better; this preset is for comparison.

        Args:
            optimizer: The optimizer to wrap, or a sequence of them.
            num_samples: Size of the training set.
            **changes: Arguments of the class that take the place of the preset's.

        Returns:
            The wrapper.

        Example:
            >>> model = nn.Linear(3, 3)
            >>> adam = torch.optim.Adam(model.parameters(), lr=2e-4)
            >>> CoMetOptimizerWrapper.paper(adam, num_samples=100).meta.inner_steps
            5
        """
        from comet_meta.meta.step import MetaStep

        settings: dict[str, Any] = {
            "weighter": SoftConfidentWeighter(num_samples, rule="ratio", kappa=1.5),
            "regularizer": CovarianceMetaRegularizer(strength=0.005, gamma=0.5, window=5),
            "meta": MetaStep(
                "fomaml",
                inner_lr=1e-4,
                inner_steps=5,
                inner_optimizer="adam",
                query_fraction=0.3,
                tasks=4,
            ),
        }
        return cls(optimizer, **(settings | changes))

    def objective(self, losses: Tensor, index: Tensor | Sequence[int] | None = None) -> Tensor:
        """The weighted mean of the losses plus the penalty; call ``backward()`` on it.

        The mean is over the batch, sum_i w_i L_i / B, so that a batch full of suspects moves the
        model little. With a regularizer, the losses of a random ``query_fraction`` of the batch
        count as validation losses for its next value.

        Samples whose loss is NaN or infinite don't count, as if the batch had come without them.
        Their gradients may still be NaN where such values entered the model; :meth:`step` then
        skips the step.

        Args:
            losses: Per-sample losses with their graph, shape (B,), or pairs, (2, B). Without a
                graph, as in validation, nothing is left out or kept.
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
        size = losses.shape[-1]
        index = self._checked_index(index, size)
        self._settle()
        trained = self._trained()
        penalty = self._penalty(trained, self._strength(trained))
        weights = self._weights(index, size)
        weighted = weighted_losses(losses, weights)
        if not losses.requires_grad:
            return weighted.mean() + penalty  # nothing is learned from it
        finite = finite_samples(losses.detach())
        kept = torch.where(finite, weighted, 0)
        self._last = kept.detach(), weights[0].to(finite.device) * finite
        # The factor is exactly 1 where all losses are finite.
        rows = finite.sum()
        part = distributed.share(rows, losses.device)
        mean = kept.mean() * (len(finite) / rows.clamp_min(1) * part).to(losses)
        observed = None
        if self.regularizer is not None and splits(size):
            with torch.no_grad():
                parts = support_query(kept, self.query_fraction, self.generator)
                observed = parts * part + penalty
        self._guard.record_batch(finite, index, observed)
        if losses.device.type == "cpu":
            self._settle()
        return mean + penalty

    @overload  # type: ignore[override]
    def step(self, closure: Callable[[], float] | None = None) -> float | None: ...
    @overload
    def step(self, closure: Closure, index: Tensor | Sequence[int]) -> StepReport: ...
    @override
    def step(
        self,
        closure: Callable[[], float] | Closure | None = None,
        index: Tensor | Sequence[int] | None = None,
    ) -> float | StepReport | None:
        """Take a step.

        Without ``index``: step the wrapped optimizers on the gradients there are (level 1). With
        ``index``: clear the gradients, compute the meta-gradient (:meth:`backward`) and step
        (level 2). To clip it, register a step pre-hook on a wrapped optimizer, or call
        ``backward`` and ``step()`` yourself.

        If a loss turns out not to be finite, the closure gives all rows' losses once more, with
        ``model`` in eval mode, so that batch norm doesn't spread a NaN to the others. The step is
        then computed anew without the samples that were found. If that fails too (fewer than two
        are left to split, or inner steps or gradients diverge), it is skipped. Whatever the closure
        raises leaves parameters, optimizer state, the generator and (with ``model``) buffers as
        they were.

        Args:
            closure: With ``index``, a function from rows of the batch, shape (R,), to their losses
                at the parameters' current values, shape (R,), or pairs, (2, R). It is called
                several times, and never learns from a row in both support and query. Without
                ``index``, as for any torch optimizer.
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
            return self._plain_step(cast("Callable[[], float] | None", closure))
        if closure is None:
            raise TypeError(
                "step(closure, index) needs a closure from rows of the batch to their losses"
            )
        self.zero_grad()
        report = self.backward(cast("Closure", closure), index)
        self._plain_step(None)
        return report

    @property
    def loss(self) -> Tensor:
        """Weighted loss of the last :meth:`objective` of a training step, divided by its weights.

        Monitor this one: the objective falls when weights fall, which misleads a scheduler that
        waits for a plateau, or the choice of a best epoch. Shape (); reading it waits for its
        device. NaN before the first objective, and where all weights are 0.
        """
        if self._last is None:
            return torch.tensor(torch.nan)
        losses, weights = self._last
        return losses.sum() / weights.to(losses).sum()

    def _plain_step(self, closure: Callable[[], float] | None) -> float | None:
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._settle()
        if not self._guard.forbids_step(self._trained()):
            for optimizer in self.optimizers:
                optimizer.step()
        return loss

    @torch.enable_grad()
    def backward(
        self,
        closure: Closure,
        index: Tensor | Sequence[int],
        *,
        share: float = 1.0,
        scaler: GradScaler | None = None,
    ) -> StepReport:
        """Add the meta-gradient of a batch to ``.grad``, as ``loss.backward()`` adds a gradient.

        ``step(closure, index)`` is ``zero_grad``, ``backward`` and ``step``. Apart, they leave room
        for gradient accumulation, clipping and a ``GradScaler``. With a scaler, enter autocast
        inside the closure, and go on with ``scaler.unscale_``, ``scaler.step`` and
        ``scaler.update`` as in any loop: a step whose inner or outer gradients overflow is skipped.

        Args:
            closure: From rows of the batch, shape (R,), to their losses, (R,) or (2, R); see
                :meth:`step`.
            index: Positions of the batch's samples in the data set, shape (B,).
            share: What the gradient counts, > 0: 1 / n where n batches make up one step.
            scaler: Scales the losses for float16 autocast; inner steps use unscaled gradients.

        Returns:
            The report; its losses are neither scaled nor shared out.

        Raises:
            TypeError: If losses or index have a wrong dtype.
            ValueError: If the batch is empty or of one sample, losses are not (R,), the parameters
                are NaN or infinite, or ``share`` isn't > 0. Gradients are then as before.
            IndexError: If a position lies outside the data set.

        Example:
            Two batches to a step:

            >>> data, model = torch.randn(16, 3), nn.Linear(3, 3)
            >>> optimizer = CoMetOptimizerWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
            >>> for batch in torch.arange(16).split(8):
            ...     def losses(rows): return (model(data[batch[rows]]) - 1).square().mean(dim=1)
            ...     report = optimizer.backward(losses, batch, share=1 / 2)
            >>> optimizer.step()
            >>> optimizer.zero_grad()
        """
        index = as_index(index, self._num_samples)
        if not share > 0:
            raise ValueError(f"share is {share}; expected 1 / n where n batches make up a step")
        parameters = self._trained()
        if not parameters:
            raise ValueError("none of the optimizer's parameters requires grad: nothing to train")
        sharded = distributed.is_sharded(parameters[0])
        if sharded and self.meta is not None and self.meta.mode == "maml":
            raise ValueError(
                "meta='maml' can't differentiate through sharded parameters (FSDP2); use a "
                "first-order mode such as 'mldg'"
            )
        weights = self._weights(index, len(index))
        strength = self._strength(parameters)
        scale = None
        if scaler is not None or share != 1:
            scale = torch.full((), share, device=parameters[0].device)
            scale = scale if scaler is None else scaler.scale(scale)

        batch = BatchGradient(
            meta=self.meta,
            query_fraction=self.query_fraction,
            model=self.model,
            generator=self.generator,
            penalty=partial(self._penalty, strength=strength),
        )
        result, weights = batch.gradient(
            closure, index, weights, parameters, scale, watched=scaler is not None
        )
        self._guard.record_gradient(usable=result is not None)
        dropped = len(index) - weights.shape[1]
        if result is not None:
            earlier = [parameter.grad for parameter in parameters]
            for parameter, gradient in zip(parameters, result.gradients, strict=True):
                parameter.grad = gradient
            part = distributed.share(weights.shape[1], index.device)
            distributed.average_gradients(parameters, part)
            add_gradients(parameters, earlier)
            support_loss, query_loss = result.support_loss, result.query_loss
            if self.regularizer is not None and splits(len(index)):
                pair = torch.stack([support_loss, query_loss])
                self._observe(*(pair if sharded else pair * part))
        else:
            dropped = len(index)
            support_loss = query_loss = strength.new_full((), torch.nan)
            if scaler is not None:  # which asks for gradients, and skips the step for these
                add_gradients(parameters, [torch.full_like(p, torch.nan) for p in parameters])
        objective = torch.lerp(support_loss, query_loss, self.query_fraction)
        mean_weight = weights[0].mean() if weights.numel() else query_loss
        with torch.no_grad():
            penalty = self._penalty(parameters, strength)
        return StepReport(
            objective=objective,
            support_loss=support_loss,
            query_loss=query_loss,
            loss=(objective - penalty) / mean_weight.to(objective),
            strength=strength,
            mean_weight=mean_weight,
            min_weight=weights[0].min() if weights.numel() else query_loss,
            dropped=torch.tensor(dropped),
        )

    def _checked_index(
        self, index: Tensor | Sequence[int] | None, batch_size: int
    ) -> Tensor | None:
        if index is None:
            if self.weighter is not None:
                raise ValueError(
                    "weights belong to samples: pass objective(losses, index) the samples' "
                    "positions in the data set; comet_meta.IndexedDataset adds them to a loader"
                )
            return None
        index = as_index(index, self._num_samples)
        if len(index) != batch_size:
            raise ValueError(
                f"got {batch_size} losses and {len(index)} indices; expected one each. Losses of "
                "shape (2, B) are a pair, as normal and as anomalous; of patches or pixels, take "
                "comet_meta.per_sample(losses, batch_size)"
            )
        return index

    @property
    def _num_samples(self) -> int | None:
        return None if self.weighter is None else self.weighter.num_samples

    def _weights(self, index: Tensor | None, batch_size: int) -> Tensor:
        """Weights of losses as normal and as anomalous samples, (2, B), on the index's device."""
        if self.weighter is None or index is None:
            weights = torch.zeros(2, batch_size, device=None if index is None else index.device)
            weights[0] = 1
            return weights
        weights = self.weighter(index)
        anomalous = self.weighter.p_bad[index.to(weights.device)]
        return torch.stack([weights, self.exposure * anomalous]).to(index.device)

    def _strength(self, parameters: Sequence[Tensor]) -> Tensor:
        device = parameters[0].device if parameters else None
        if self.regularizer is None:
            return torch.zeros((), device=device)
        return self.regularizer.strength.to(device)

    def _penalty(self, parameters: Sequence[Tensor], strength: Tensor) -> Tensor:
        if self.regularizer is None:
            return strength  # 0
        return self.regularizer.penalty(parameters, strength)

    def _settle(self) -> None:
        """Look at the objective's batches that haven't been looked at."""
        for losses in self._guard.check_batches():
            self._observe(*losses)

    def _observe(self, train_loss: Tensor, validation_loss: Tensor) -> None:
        if self.regularizer is not None:
            pair = torch.stack([train_loss.detach(), validation_loss.detach()])
            self.regularizer.update(*distributed.average(pair))

    def _trained(self) -> list[Tensor]:
        """The parameters that the optimizers own and that require grad."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizers' own groups; changing one changes theirs."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> MutableMapping[Tensor, Any]:  # type: ignore[override]
        """The wrapped optimizers' own per-parameter state."""
        if len(self.optimizers) == 1:
            return self.optimizers[0].state
        return ChainMap(*(optimizer.state for optimizer in self.optimizers))

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters, as for any torch optimizer."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer.

        Args:
            param_group: As for any torch optimizer.

        Raises:
            ValueError: If several optimizers are wrapped.
        """
        if len(self.optimizers) > 1:
            raise ValueError(
                f"{len(self.optimizers)} optimizers are wrapped; add the group to the one it "
                "belongs to: wrapper.optimizers[i].add_param_group(...)"
            )
        self.optimizers[0].add_param_group(param_group)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: optimizers, weights, loss history, random state.

        Returns:
            Tensors and plain containers only: ``torch.load(..., weights_only=True)`` reads it.

        """
        self._settle()
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "weighter": None if self.weighter is None else self.weighter.state_dict(),
            "regularizer": None if self.regularizer is None else self.regularizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved; a resumed run then equals an uninterrupted one.

        Args:
            state_dict: From a wrapper of the same make-up.

        Raises:
            ValueError: If it comes from something else, or from a wrapper of another make-up.
        """
        if "optimizers" not in state_dict:
            raise ValueError(
                "this state was not saved by CoMetOptimizerWrapper.state_dict(); to continue from "
                "a plain optimizer's checkpoint, load it into that optimizer before wrapping it"
            )
        saved = state_dict["optimizers"]
        if len(saved) != len(self.optimizers):
            raise ValueError(
                f"the saved state is of {len(saved)} optimizers, this wrapper has "
                f"{len(self.optimizers)}"
            )
        for name, part in (("weighter", self.weighter), ("regularizer", self.regularizer)):
            if (part is None) != (state_dict[name] is None):
                here, there = ("no", "a") if part is None else ("a", "no")
                raise ValueError(f"the saved state has {there} {name}, this wrapper has {here}")
        for optimizer, state in zip(self.optimizers, saved, strict=True):
            optimizer.load_state_dict(state)
        if self.weighter is not None:
            self.weighter.load_state_dict(state_dict["weighter"])
        if self.regularizer is not None:
            self.regularizer.load_state_dict(state_dict["regularizer"])
        self.generator.set_state(state_dict["generator"].cpu())

    @override
    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        # Schedulers replace step on the instance by a wrapper that can't be copied.
        state.pop("step", None)
        state["_guard"] = StepGuard()
        state["generator"] = self.generator.get_state()
        return state

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator()
        generator.set_state(state["generator"])
        super().__setstate__({**state, "generator": generator})

    @override
    def __repr__(self) -> str:
        wrapped = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
        return (
            f"{type(self).__name__}({wrapped}, meta={self.meta or 'none'!r}, "
            f"weighter={self.weighter}, regularizer={self.regularizer})"
        )


def _checked_optimizers(optimizer: Optimizer | Sequence[Optimizer]) -> tuple[Optimizer, ...]:
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
    if not optimizers:
        raise ValueError("there's no optimizer to wrap; expected one or more")
    seen: set[int] = set()
    for wrapped in optimizers:
        if not isinstance(wrapped, Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer, got {type(wrapped).__name__}")
        if isinstance(wrapped, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS re-evaluates its closure while it steps, so neither weights nor a meta-step "
                "have a meaning there; wrap a first-order optimizer such as AdamW"
            )
        own = {id(p) for group in wrapped.param_groups for p in group["params"]}
        if own & seen:
            raise ValueError(
                "two of the wrapped optimizers own the same parameter, and would both step it. If "
                "they take turns, wrap each by itself, with one weighter for all, or let "
                "comet_meta.CoMet(loader, optimizers) guard them"
            )
        seen |= own
    return optimizers


def _meta_settings(meta: "MetaMode | MetaStep") -> "MetaStep":
    from comet_meta.meta.step import MetaStep  # a plain step does without

    return meta if isinstance(meta, MetaStep) else MetaStep(meta)
