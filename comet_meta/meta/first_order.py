"""The meta-step: inner steps on the support rows, the meta-gradient from the query rows."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

from comet_meta.distributed import is_sharded, local, sharded_like
from comet_meta.gradients import (
    Gradients,
    MetaGradient,
    add_gradients,
    backward,
    empty_gradients,
    filled,
    gradients_of,
    real,
    unscaled,
)
from comet_meta.restore import copies, copy_values, restored
from comet_meta.tasks import Task

InnerOptimizer = Literal["sgd", "adam"]
FirstOrderMode = Literal["fomaml", "mldg", "reptile"]
Objective = Callable[[Tensor], Tensor]
"""The loss of some rows of the batch: rows (R,) -> scalar, at the parameters' current values."""


def first_order(
    objective: Objective,
    parameters: Sequence[Tensor],
    tasks: Sequence[Task],
    *,
    mode: FirstOrderMode,
    inner: InnerOptimizer,
    inner_lr: float,
    inner_steps: int,
    buffers: Sequence[Tensor] = (),
    scale: Tensor | None = None,
) -> MetaGradient:
    """Meta-gradient without derivatives of the inner steps.

    With theta' the parameters after the inner steps:

    - ``"fomaml"``: gradient of the query rows at theta' (first-order MAML, Finn et al. 2017).
    - ``"mldg"``: gradients of the support rows at theta and of the query rows at theta', in
      proportion to their numbers (Li et al. 2018): the whole batch is learned from, and as
      inner_lr goes to 0 it becomes the plain gradient of the batch.
    - ``"reptile"``: (theta - theta') / (inner_lr * inner_steps), the mean direction of the inner
      steps (Nichol et al. 2018); the query rows are judged, not learned from.

    Each is a gradient to descend along.

    Args:
        objective: Loss of some rows, shape (), at the parameters' current values.
        parameters: Leaf tensors that require grad. They are moved and put back, bit for bit.
        tasks: Support and query rows.
        mode: Which of the gradients above.
        inner: Rule of the inner steps.
        inner_lr: Their step size > 0.
        inner_steps: Their number >= 1.
        buffers: Module buffers that ``objective`` changes (batch norm). They keep what the first
            pass, at theta, made of them; the later passes leave no trace.
        scale: What the gradient is multiplied by, shape (), > 0: losses are multiplied before
            their backward pass, so that float16 gradients don't underflow, and inner steps divide
            by it again. If a gradient of theirs overflows, the meta-gradient isn't finite either.

    Returns:
        The gradients and the losses, averaged over tasks; the losses unscaled.
    """
    losses = []
    after_first_pass: list[Tensor] = []
    values = [local(parameter.detach()) for parameter in parameters]
    with empty_gradients(parameters), restored(values) as origin, restored(buffers):
        for number, task in enumerate(tasks):
            if number > 0:
                copy_values(values, origin)
            query_share = len(task.query) / (len(task.support) + len(task.query))
            descent = _Descent(parameters, values, inner, inner_lr, scale)
            for k in range(inner_steps):
                support_loss = objective(task.support)
                if k == 0:
                    losses.append(support_loss.detach())
                    after_first_pass = after_first_pass or copies(buffers)
                if k == 0 and mode == "mldg":
                    descent(support_loss, keep=(1 - query_share) / len(tasks))
                else:
                    descent(support_loss)
            factor = descent.verdict / len(tasks)
            if mode == "reptile":
                # FSDP2 puts gathered parameters away only in a backward pass.
                gathered = is_sharded(parameters[0])
                with torch.set_grad_enabled(gathered):
                    query_loss = objective(task.query)
                if gathered:
                    gradients_of(query_loss, parameters)
                with torch.no_grad():
                    moved = torch._foreach_sub(origin, values)
                    torch._foreach_mul_(moved, factor / (inner_lr * inner_steps))
                    whole = [sharded_like(m, p) for m, p in zip(moved, parameters, strict=True)]
                    add_gradients(parameters, _where_used(whole, descent.used))
            else:
                query_loss = objective(task.query)
                share = query_share if mode == "mldg" else 1
                backward(query_loss * (factor * share), parameters)
            losses.append(query_loss.detach())
        gradients: list[Tensor | None] = [parameter.grad for parameter in parameters]
    copy_values(buffers, after_first_pass)
    return MetaGradient(gradients, *mean_losses(losses))


class _Descent:
    """The inner steps of a task, on the parameters in place.

    Attributes:
        used: Which of the parameters had a gradient so far.
        verdict: ``scale`` (1 where there is none), NaN once a gradient has overflowed.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        values: list[Tensor],
        inner: InnerOptimizer,
        inner_lr: float,
        scale: Tensor | None,
    ) -> None:
        self.used = [False] * len(parameters)
        self.verdict: Tensor | float = 1.0 if scale is None else scale
        self._parameters = list(parameters)
        self._values = values  # this process's part of them
        self._lr = inner_lr
        self._scale = scale
        self._adam = _AdamState(values) if inner == "adam" else None

    def __call__(self, loss: Tensor, keep: float = 0.0) -> None:
        """Take a step, and add ``keep`` times the scaled gradient to ``.grad``."""
        factor = keep or 1.0
        scaled = loss * factor if self._scale is None else loss * (self._scale * factor)
        found = gradients_of(scaled, self._parameters)
        self.used = [
            used or gradient is not None for used, gradient in zip(self.used, found, strict=True)
        ]
        parts = [None if gradient is None else local(gradient) for gradient in found]
        self._move(filled(parts, self._values), factor)
        if keep:
            add_gradients(self._parameters, found)

    def _move(self, gradients: Gradients, factor: float) -> None:
        if self._scale is not None:
            gradients, finite = unscaled(gradients, self._scale * factor)
            self.verdict = torch.where(finite, self.verdict, torch.nan)
            factor = 1.0
        if self._adam is None:
            torch._foreach_add_(self._values, gradients, alpha=-self._lr / factor)
        else:
            if factor != 1:
                gradients = list(torch._foreach_div(gradients, factor))
            self._adam.step(self._values, gradients, self._lr)
        # Inside autocast, torch keeps low-precision copies of the weights: they are stale now.
        torch.clear_autocast_cache()


class _AdamState:
    """torch's own Adam, on gradients that aren't in ``.grad``."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._mean = [torch.zeros_like(parameter) for parameter in real(parameters)]
        self._square = [torch.zeros_like(parameter) for parameter in real(parameters)]
        self._fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
        # Where torch has no fused kernel, it reads the number of steps: that must be on the CPU.
        self._steps = [
            torch.zeros((), device=parameter.device if self._fused else "cpu")
            for parameter in parameters
        ]

    def step(self, parameters: list[Tensor], gradients: Gradients, lr: float) -> None:
        adam(
            real(parameters),
            real(gradients),
            self._mean,
            self._square,
            [],
            self._steps,
            fused=self._fused,
            foreach=not self._fused,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


def _where_used(gradients: Sequence[Tensor], used: Sequence[bool]) -> list[Tensor | None]:
    return [g if was_used else None for g, was_used in zip(gradients, used, strict=True)]


def mean_losses(losses: Sequence[Tensor]) -> Tensor:
    """Support and query losses in turn, averaged over tasks, shape (2,)."""
    return torch.stack(list(losses)).view(-1, 2).mean(dim=0)
