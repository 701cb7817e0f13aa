"""Meta-gradients of first order: inner steps without a graph, in place."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

from comet_meta.distributed import is_sharded, local_part, shard_like
from comet_meta.gradients import (
    Gradients,
    MetaGradient,
    add_gradients,
    as_real,
    backward,
    compute_gradients,
    set_gradients_aside,
    unscale,
    zeros_for_none,
)
from comet_meta.restore import copy_tensors, copy_values, restore_on_exit
from comet_meta.tasks import Task

InnerOptimizer = Literal["sgd", "adam"]
FirstOrderMode = Literal["fomaml", "mldg", "reptile"]
Objective = Callable[[Tensor], Tensor]
"""The objective of some rows of the batch: rows (R,) -> scalar, at the current parameters."""


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

    theta are the parameters before the inner steps, theta' those after them. The gradient is, as a
    mean over tasks:

    - ``"fomaml"``: the gradient of the query loss at theta' (first-order MAML, Finn et al. 2017).
    - ``"mldg"``: the gradients of the support loss at theta and of the query loss at theta', in
      proportion to their numbers of samples (Li et al. 2018). All samples of the batch count, and
      as inner_lr goes to 0 it becomes the plain gradient of the batch.
    - ``"reptile"``: (theta - theta') / (inner_lr * inner_steps), the mean direction of the inner
      steps (Nichol et al. 2018). The query loss is only reported.

    An optimizer descends along it, as along any gradient.

    Args:
        objective: Objective of some rows, shape (), at the current parameters.
        parameters: Leaf tensors that require grad. They are changed and restored, bit for bit.
        tasks: Support and query rows.
        mode: Which of the gradients above.
        inner: Rule of the inner steps.
        inner_lr: Step size of the inner steps, > 0.
        inner_steps: Number of inner steps, >= 1.
        buffers: Module buffers that ``objective`` changes (batch norm). Each task starts from their
            values before the step, and in the end they have the mean over tasks of those after the
            first pass, at theta. Other passes leave no trace.
        scale: Factor on the gradient, shape (), > 0. Losses are multiplied by it before their
            backward pass, so that float16 gradients don't underflow; inner steps divide by it. If
            a gradient of an inner step overflows, the meta-gradient is NaN.

    Returns:
        Gradients, support and query loss, averaged over tasks; the losses without the scale.
    """
    losses = []
    first_passes: list[Tensor] = []
    values = [local_part(parameter.detach()) for parameter in parameters]
    with (
        set_gradients_aside(parameters),
        restore_on_exit(values) as theta,
        restore_on_exit(buffers) as before,
    ):
        for number, task in enumerate(tasks):
            if number > 0:
                copy_values(values, theta)
                copy_values(buffers, before)
            query_fraction = len(task.query) / (len(task.support) + len(task.query))
            steps = _InnerSteps(parameters, values, inner, inner_lr, scale)
            # 5b) Inner steps on the support loss, from theta to theta'.
            for k in range(inner_steps):
                support_loss = objective(task.support)
                if k == 0:
                    losses.append(support_loss.detach())
                    first_passes = mean_of_first_passes(first_passes, buffers, number)
                if k == 0 and mode == "mldg":
                    steps.take(support_loss, outer_factor=(1 - query_fraction) / len(tasks))
                else:
                    steps.take(support_loss)
            # 5c) The query loss at theta'.  5d) Add the outer gradient to .grad.
            outer_scale = steps.outer_scale / len(tasks)
            if mode == "reptile":
                query_loss = _loss_alone(objective, task.query, parameters)
                with torch.no_grad():
                    direction = torch._foreach_sub(theta, values)
                    torch._foreach_mul_(direction, outer_scale / (inner_lr * inner_steps))
                    whole = [shard_like(d, p) for d, p in zip(direction, parameters, strict=True)]
                    add_gradients(parameters, steps.of_used_parameters(whole))
            else:
                query_loss = objective(task.query)
                outer_factor = query_fraction if mode == "mldg" else 1
                backward(query_loss * (outer_scale * outer_factor), parameters)
            losses.append(query_loss.detach())
        gradients: list[Tensor | None] = [parameter.grad for parameter in parameters]
    # theta is restored here.
    copy_values(buffers, first_passes)
    return MetaGradient(gradients, *mean_over_tasks(losses))


class _InnerSteps:
    """The inner steps of a task: they change the parameters in place.

    Attributes:
        outer_scale: ``scale`` (1 where there is none); NaN after a gradient has overflowed.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        values: list[Tensor],
        inner: InnerOptimizer,
        inner_lr: float,
        scale: Tensor | None,
    ) -> None:
        self.outer_scale: Tensor | float = 1.0 if scale is None else scale
        self._used = [False] * len(parameters)
        self._parameters = list(parameters)
        self._values = values  # this process's part of the parameters
        self._lr = inner_lr
        self._scale = scale
        self._adam = _Adam(values) if inner == "adam" else None

    def take(self, loss: Tensor, outer_factor: float = 0.0) -> None:
        """Take a step; add ``outer_factor`` times its scaled gradient to ``.grad``."""
        # One backward pass for both: the gradient comes out times this factor.
        factor = outer_factor or 1.0
        scaled = loss * factor if self._scale is None else loss * (self._scale * factor)
        found = compute_gradients(scaled, self._parameters)
        self._used = [
            used or gradient is not None for used, gradient in zip(self._used, found, strict=True)
        ]
        parts = [None if gradient is None else local_part(gradient) for gradient in found]
        self._move(zeros_for_none(parts, self._values), factor)
        if outer_factor:
            add_gradients(self._parameters, found)

    def of_used_parameters(self, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients, None for parameters that no inner step has used."""
        return [g if used else None for g, used in zip(gradients, self._used, strict=True)]

    def _move(self, gradients: Gradients, factor: float) -> None:
        """Move the parameters along gradients that were multiplied by scale and factor."""
        if self._scale is not None:
            gradients, finite = unscale(gradients, self._scale * factor)
            self.outer_scale = torch.where(finite, self.outer_scale, torch.nan)
            factor = 1.0
        if self._adam is None:
            # theta - inner_lr * gradient
            torch._foreach_add_(self._values, gradients, alpha=-self._lr / factor)
        else:
            if factor != 1:
                gradients = list(torch._foreach_div(gradients, factor))
            self._adam.step(self._values, gradients, self._lr)
        # Inside autocast, torch caches low-precision copies of the parameters, now out of date.
        torch.clear_autocast_cache()


class _Adam:
    """torch's own Adam with its default settings, for gradients that aren't in ``.grad``."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._mean = [torch.zeros_like(parameter) for parameter in as_real(parameters)]
        self._square = [torch.zeros_like(parameter) for parameter in as_real(parameters)]
        self._fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
        # Without a fused kernel, torch reads the number of steps on the CPU.
        self._steps = [
            torch.zeros((), device=parameter.device if self._fused else "cpu")
            for parameter in parameters
        ]

    def step(self, parameters: list[Tensor], gradients: Gradients, lr: float) -> None:
        """Change the parameters in place."""
        adam(
            as_real(parameters),
            as_real(gradients),
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


def _loss_alone(objective: Objective, rows: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The objective of some rows, without its gradient."""
    # FSDP2 frees gathered parameters only in a backward pass, so there must be one.
    gathered = is_sharded(parameters[0])
    with torch.set_grad_enabled(gathered):
        loss = objective(rows)
    if gathered:
        compute_gradients(loss, parameters)
    return loss


@torch.no_grad()
def mean_of_first_passes(
    mean: Sequence[Tensor], buffers: Sequence[Tensor], number: int
) -> list[Tensor]:
    """Take the buffers of one more task, after its first pass, into their mean over tasks.

    Args:
        mean: That of the tasks before.
        buffers: Those of the model, now.
        number: Number of the task, from 0.

    Returns:
        The new mean, in tensors of its own. Of buffers of integers, the latest values.
    """
    now = copy_tensors(buffers)
    if number == 0:
        return now
    # Equal values stay as they are, infinite ones too.
    return [
        torch.where(old == new, old, old + (new - old) / (number + 1))
        if new.is_floating_point() or new.is_complex()
        else new
        for old, new in zip(mean, now, strict=True)
    ]


def mean_over_tasks(losses: Sequence[Tensor]) -> Tensor:
    """Mean support and query loss, shape (2,), of losses that alternate between the two."""
    return torch.stack(list(losses)).view(-1, 2).mean(dim=0)
