"""The gradient of a batch, from as many of its samples as can be learned from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from comet_meta import distributed
from comet_meta.gradients import MetaGradient, gradients_of
from comet_meta.losses import Closure, check_losses, finite_samples, weighted_losses
from comet_meta.nonfinite import (
    DeferredFlag,
    all_finite,
    check_parameters_finite,
    warn_of_batch_left_out,
    warn_of_samples_left_out,
)
from comet_meta.restore import eval_mode, undo_on_error
from comet_meta.tasks import splits, support_query

if TYPE_CHECKING:
    from comet_meta.meta.step import MetaStep

MetaMode = Literal["none", "mldg", "fomaml", "maml", "reptile"]


@dataclass(frozen=True)
class BatchGradient:
    """How the gradient of a batch is computed.

    Attributes:
        meta: The meta-step; None for the gradient of the whole batch.
        query_fraction: Fraction of the batch whose loss counts as validation loss where there is
            no meta-step, in (0, 1).
        model: The module that closures use; needed for ``"maml"`` and to protect its buffers.
        generator: Source of the random split, in the same state on every process.
        penalty: What is added to each loss: parameters -> scalar.
    """

    meta: "MetaStep | None"
    query_fraction: float
    model: nn.Module | None
    generator: torch.Generator
    penalty: Callable[[Sequence[Tensor]], Tensor]

    def gradient(
        self,
        closure: Closure,
        index: Tensor,
        weights: Tensor,
        parameters: list[Tensor],
        scale: Tensor | None,
        *,
        watched: bool,
    ) -> tuple[MetaGradient | None, Tensor]:
        """The gradient of the batch, or of the samples that are left if some losses aren't finite.

        Args:
            closure: From rows of the batch (R,) to their losses (R,) or (2, R).
            index: Positions of the samples in the data set, shape (B,).
            weights: Of their losses as normal and as anomalous samples, shape (2, B).
            parameters: Leaf tensors that require grad.
            scale: What the gradient is multiplied by, shape (), > 0.
            watched: Whether somebody else (a scaler) skips steps whose gradients aren't finite.

        Returns:
            The gradient, None if there can't be one, and the weights (2, K) of the samples used.
            Without a gradient, and if the closure raises, buffers are as before.

        Raises:
            ValueError: If losses are not (R,), or the parameters aren't finite.
        """
        with undo_on_error(self.generator, self._buffers()) as undo:
            result = self._attempt(closure, weights, parameters, scale, watched)
            if result is not None:
                return result, weights
            undo()
            kept = self._finite_rows(closure, index)
            undo()
            weights = weights[:, kept]
            reason = "too few samples of the batch have a finite loss"
            enough = len(kept) >= (1 if self.meta is None else 2)
            if distributed.all_agree(enough, parameters[0].device):
                # A process whose own samples are all fine goes along, with all of them.
                result = self._attempt(
                    lambda rows: closure(kept[rows]), weights, parameters, scale, watched
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
        watched: bool,
    ) -> MetaGradient | None:
        """The gradient of samples of weights (2, B); None if one of their losses isn't finite."""
        count = weights.shape[1]
        finite_losses: list[DeferredFlag] = []
        # Where the framework averages each gradient by itself, the losses have to be scaled.
        sharded = distributed.is_sharded(parameters[0])
        part = distributed.share(count, weights.device) if sharded else 1.0

        def losses_of(rows: Tensor) -> Tensor:
            losses = closure(rows)
            check_losses(losses, len(rows))
            return weighted_losses(losses, weights[:, rows])

        def objective(losses: Tensor, at: Sequence[Tensor]) -> Tensor:
            loss = losses.mean() * part + self.penalty(at)
            # A NaN or infinite loss shows in the mean, whatever its weight: 0 * inf is NaN.
            finite_losses.append(DeferredFlag(torch.isfinite(loss.detach())))
            return loss

        lone = count == 1 and splits(1)  # other processes have more of this batch
        if self.meta is None or lone:
            losses = losses_of(torch.arange(count, device=weights.device))
            loss = objective(losses, parameters)
            gradients = gradients_of(loss if scale is None else loss * scale, parameters)
            with torch.no_grad():  # told apart for the report alone
                pair = support_query(losses * part, self.query_fraction, self.generator)
                result = MetaGradient(gradients, *(pair + self.penalty(parameters)))
        else:
            result = self.meta.gradient(
                losses_of,
                objective,
                weights,
                parameters,
                scale,
                model=self.model,
                buffers=self._buffers(),
                generator=self.generator,
            )
        sound = all(finite_losses)
        device = parameters[0].device
        # Elsewhere it would mean waiting for the backward pass.
        if device.type == "cpu" and not watched:
            sound = sound and all_finite([g for g in result.gradients if g is not None])
        return result if distributed.all_agree(sound, device) else None

    @torch.no_grad()
    def _finite_rows(self, closure: Closure, index: Tensor) -> Tensor:
        """Rows of the batch whose loss is finite at the parameters; the others are named."""
        with eval_mode([] if self.model is None else [self.model]):
            losses = closure(torch.arange(len(index), device=index.device))
        check_losses(losses, len(index))
        finite = finite_samples(losses)
        warn_of_samples_left_out(finite, index)
        return finite.to(index.device).nonzero().flatten()

    def _buffers(self) -> list[Tensor]:
        return [] if self.model is None else list(self.model.buffers())
