"""The gradient of a batch from a closure, without the samples whose loss isn't finite."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from comet_meta import distributed
from comet_meta.gradients import MetaGradient, add_gradients, all_finite, compute_gradients
from comet_meta.guard import DeferredFlag
from comet_meta.losses import Closure, check_losses, finite_mask, weigh_losses
from comet_meta.nonfinite import (
    check_parameters_finite,
    warn_of_batch_left_out,
    warn_of_samples_left_out,
)
from comet_meta.restore import eval_mode, undo_on_error
from comet_meta.tasks import can_split, support_query_losses

if TYPE_CHECKING:
    from comet_meta.meta.step import MetaStep


class BatchResult(NamedTuple):
    """What the gradient of a batch was computed from.

    Attributes:
        usable: Whether there is a gradient; False if too few samples had a finite loss.
        support_loss: Objective of the support samples, shape (); NaN without a gradient.
        query_loss: Objective of the query samples, shape (); NaN without a gradient.
        weights: Weights w_i of the samples that were used, shape (K,), K >= 0.
        dropped: Number of samples left out; the whole batch without a gradient.
        ratio: Factor with which the mean of the losses over the processes is that over all samples.
    """

    usable: bool
    support_loss: Tensor
    query_loss: Tensor
    weights: Tensor
    dropped: int
    ratio: Tensor | float

    @property
    def pair(self) -> Tensor:
        """Training and validation loss, shape (2,)."""
        return torch.stack([self.support_loss, self.query_loss]) * self.ratio


@dataclass(frozen=True)
class BatchGradient:
    """Computes the gradient of a batch: steps 2 to 5 of :class:`~comet_meta.CoMetOptimizerWrapper`.

    Attributes:
        meta: The meta-step; None for the gradient of the whole batch.
        query_fraction: Fraction of the batch whose loss counts as validation loss where there is
            no meta-step, in (0, 1).
        model: The module that closures use; needed for ``"maml"`` and to protect its buffers.
        generator: Source of the random split, in the same state on every process.
        penalty: lambda(Sigma) ||theta||^2: parameters -> scalar.
    """

    meta: "MetaStep | None"
    query_fraction: float
    model: nn.Module | None
    generator: torch.Generator
    penalty: Callable[[Sequence[Tensor]], Tensor]

    def add(
        self,
        closure: Closure,
        index: Tensor,
        weights: Tensor,
        parameters: list[Tensor],
        factor: float,
        scaler: GradScaler | None,
    ) -> BatchResult:
        """Add the gradient of the batch to ``.grad``, averaged over the processes.

        If a loss isn't finite, it is the gradient of the samples that are left.

        Args:
            closure: From rows of the batch (R,) to their losses (R,) or (2, R).
            index: Positions of the samples in the data set, shape (B,).
            weights: Weights of the losses as normal and as anomalous samples, shape (2, B).
            parameters: Leaf tensors that require grad.
            factor: Factor on the gradient, > 0.
            scaler: Scales the losses and checks the gradients, where there is one.

        Returns:
            Losses, and weights of the samples used. Without a gradient, and if the closure raises,
            buffers are as before.

        Raises:
            ValueError: If losses are not (R,), or the parameters aren't finite; or for ``"maml"``
                with sharded parameters.
        """
        sharded = distributed.is_sharded(parameters[0])
        if sharded and self.meta is not None and self.meta.mode == "maml":
            raise ValueError(
                "meta='maml' can't differentiate through sharded parameters (FSDP2); use a "
                "first-order mode such as 'mldg'"
            )
        scale = _gradient_scale(factor, scaler, parameters[0].device)
        result, weights = self._compute(
            closure, index, weights, parameters, scale, check_gradients=scaler is None
        )
        if result is None:
            if scaler is not None:  # it needs gradients, and skips the step if they are NaN
                add_gradients(parameters, [torch.full_like(p, torch.nan) for p in parameters])
            no_loss = torch.full((), torch.nan, device=parameters[0].device)
            return BatchResult(False, no_loss, no_loss, weights[0], len(index), 1.0)
        used = weights.shape[1]
        ratio = distributed.batch_size_ratio(used, index.device)
        _add_average(parameters, result.gradients, ratio)
        return BatchResult(
            True,
            result.support_loss,
            result.query_loss,
            weights[0],
            dropped=len(index) - used,
            ratio=1.0 if sharded else ratio,
        )

    def _compute(
        self,
        closure: Closure,
        index: Tensor,
        weights: Tensor,
        parameters: list[Tensor],
        scale: Tensor | None,
        *,
        check_gradients: bool,
    ) -> tuple[MetaGradient | None, Tensor]:
        """The gradient, None if there can't be one, and the weights (2, K) of the samples used."""
        with undo_on_error(self.generator, self._buffers()) as undo:
            result = self._attempt(closure, weights, parameters, scale, check_gradients)
            if result is not None:
                return result, weights
            # 2) Find the samples whose loss isn't finite, and start again without them.
            undo()
            kept = self._finite_rows(closure, index)
            undo()
            weights = weights[:, kept]
            reason = "too few samples of the batch have a finite loss"
            enough = len(kept) >= (1 if self.meta is None else 2)
            if distributed.all_agree(enough, parameters[0].device):
                # All processes start again, also one whose own samples are all finite.
                result = self._attempt(
                    lambda rows: closure(kept[rows]), weights, parameters, scale, check_gradients
                )
                reason = (
                    "losses that are finite at the parameters, or their gradients, are not so in "
                    "the course of the step; lower inner_lr or the learning rate"
                )
            if result is None:
                check_parameters_finite(parameters)
                warn_of_batch_left_out(reason)
                undo()
        return result, weights

    def _attempt(
        self,
        closure: Closure,
        weights: Tensor,
        parameters: list[Tensor],
        scale: Tensor | None,
        check_gradients: bool,
    ) -> MetaGradient | None:
        """The gradient of samples with weights (2, B); None if one of their losses isn't finite."""
        batch_size = weights.shape[1]
        device = parameters[0].device
        losses_are_finite: list[DeferredFlag] = []
        # FSDP2 averages gradients by itself, so the losses have to be scaled.
        sharded = distributed.is_sharded(parameters[0])
        ratio = distributed.batch_size_ratio(batch_size, weights.device) if sharded else 1.0

        def weighted_losses(rows: Tensor) -> Tensor:
            # 2) Per-sample losses L_i.
            losses = closure(rows)
            check_losses(losses, len(rows))
            # 3) w_i L_i + exposure P(bad)_i A_i.
            return weigh_losses(losses, weights[:, rows])

        def objective(losses: Tensor, theta: Sequence[Tensor]) -> Tensor:
            # 3), 4) Mean over the samples plus lambda(Sigma) ||theta||^2.
            loss = losses.mean() * ratio + self.penalty(theta)
            # A NaN or infinite loss shows in the mean, whatever its weight: 0 * inf is NaN.
            losses_are_finite.append(DeferredFlag(torch.isfinite(loss.detach())))
            return loss

        # 5) The gradient.
        single = batch_size == 1 and can_split(1)  # other processes have more samples
        if self.meta is None or single:
            losses = weighted_losses(torch.arange(batch_size, device=weights.device))
            loss = objective(losses, parameters)
            gradients = compute_gradients(loss if scale is None else loss * scale, parameters)
            with torch.no_grad():  # support and query loss for the report and for Sigma
                pair = support_query_losses(losses * ratio, self.query_fraction, self.generator)
                result = MetaGradient(gradients, *(pair + self.penalty(parameters)))
        else:
            result = self.meta.gradient(
                weighted_losses,
                objective,
                weights,
                parameters,
                scale,
                model=self.model,
                buffers=self._buffers(),
                generator=self.generator,
            )
        finite = all(losses_are_finite)
        # On other devices this check would wait for the backward pass.
        if check_gradients and device.type == "cpu":
            finite = finite and all_finite([g for g in result.gradients if g is not None])
        return result if distributed.all_agree(finite, device) else None

    @torch.no_grad()
    def _finite_rows(self, closure: Closure, index: Tensor) -> Tensor:
        """Rows of the batch whose loss is finite; a warning names the other samples.

        In eval mode, because batch norm would spread the NaN of one sample to all.
        """
        with eval_mode([] if self.model is None else [self.model]):
            losses = closure(torch.arange(len(index), device=index.device))
        check_losses(losses, len(index))
        finite = finite_mask(losses)
        warn_of_samples_left_out(finite, index)
        return finite.to(index.device).nonzero().flatten()

    def _buffers(self) -> list[Tensor]:
        return [] if self.model is None else list(self.model.buffers())


def _add_average(
    parameters: list[Tensor], gradients: list[Tensor | None], ratio: Tensor | float
) -> None:
    """Add gradients to ``.grad``, averaged over the processes."""
    earlier = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    distributed.average_gradients(parameters, ratio)
    add_gradients(parameters, earlier)


def _gradient_scale(
    factor: float, scaler: GradScaler | None, device: torch.device
) -> Tensor | None:
    """The factor on the gradient times the scaler's scale, shape (); None for 1."""
    if scaler is None and factor == 1:
        return None
    scale = torch.full((), factor, device=device)
    return scale if scaler is None else scaler.scale(scale)
