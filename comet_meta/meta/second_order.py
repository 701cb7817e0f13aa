"""The meta-gradient of second order: derivatives through the inner steps (MAML)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from comet_meta.gradients import (
    Gradients,
    MetaGradient,
    as_real,
    set_gradients_aside,
    unscale,
    zeros_for_none,
)
from comet_meta.meta.first_order import InnerOptimizer, mean_of_first_passes, mean_over_tasks
from comet_meta.restore import copy_values, restore_on_exit
from comet_meta.tasks import Task


class AdamDirection:
    """Adam's update direction with torch's default betas, differentiable in the gradients."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self._betas = betas
        self._eps = eps
        self._steps = 0
        self._mean: Gradients = []
        self._square: Gradients = []

    def __call__(self, gradients: Gradients) -> Gradients:
        """Adam's direction: mean / (root of mean square + eps), both bias-corrected."""
        given = gradients
        gradients = as_real(given)
        self._steps += 1
        first, second = self._betas
        squares = torch._foreach_mul(gradients, gradients)
        if not self._mean:
            self._mean = list(torch._foreach_mul(gradients, 1 - first))
            self._square = list(torch._foreach_mul(squares, 1 - second))
        else:
            self._mean = list(torch._foreach_lerp(self._mean, gradients, 1 - first))
            self._square = list(torch._foreach_lerp(self._square, squares, 1 - second))
        mean = torch._foreach_div(self._mean, 1 - first**self._steps)
        square = torch._foreach_div(self._square, 1 - second**self._steps)
        # The clamp keeps the derivative of the root finite where a gradient is 0.
        root = torch._foreach_sqrt(torch._foreach_clamp_min(square, self._eps**2))
        directions = torch._foreach_div(mean, torch._foreach_add(root, self._eps))
        return [
            torch.view_as_complex(direction) if gradient.is_complex() else direction
            for direction, gradient in zip(directions, given, strict=True)
        ]


def second_order(
    closure: Callable[[Tensor], Tensor],
    objective: Callable[[Tensor, Sequence[Tensor]], Tensor],
    model: nn.Module,
    parameters: Sequence[Tensor],
    tasks: Sequence[Task],
    *,
    inner: InnerOptimizer,
    inner_lr: float,
    inner_steps: int,
    scale: Tensor | None = None,
) -> MetaGradient:
    """Gradient of the query loss at theta' with respect to theta, through the inner steps.

    Args:
        closure: Weighted losses of some rows, rows (R,) -> (R,), computed with ``model``.
        objective: (losses (R,), parameters) -> scalar.
        model: The module whose parameters are replaced while ``closure`` runs.
        parameters: Leaf tensors that require grad, all of them parameters of ``model``.
        tasks: Support and query rows.
        inner: Rule of the inner steps.
        inner_lr: Step size of the inner steps, > 0.
        inner_steps: Number of inner steps, >= 1.
        scale: As for :func:`~comet_meta.meta.first_order.first_order`.

    Returns:
        Gradients, support and query loss, averaged over tasks; the losses without the scale. The
        model's parameters don't change. Its buffers get the mean over tasks of their values after
        the first pass, at theta.

    Raises:
        ValueError: If a parameter isn't one of the model's.

    Source: Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks,
    ICML 2017.
    """
    closure_module = _ClosureModule(model, closure)
    names = _names(closure_module, parameters)
    buffers = list(model.buffers())
    losses = []
    first_passes: list[Tensor] = []

    def loss_at(values: Sequence[Tensor], rows: Tensor) -> Tensor:
        replaced = dict(zip(names, values, strict=True))
        losses: Tensor = functional_call(closure_module, replaced, (rows,), tie_weights=True)
        return objective(losses, values)

    with set_gradients_aside(parameters), restore_on_exit(buffers) as before:
        for number, task in enumerate(tasks):
            if number > 0:
                copy_values(buffers, before)
            direction = AdamDirection() if inner == "adam" else list
            theta = list(parameters)
            outer_scale: Tensor | float = 1.0 if scale is None else scale
            # 5b) Inner steps on the support loss, from theta to theta', with their graph.
            for k in range(inner_steps):
                loss = loss_at(theta, task.support)
                if k == 0:
                    losses.append(loss.detach())
                    first_passes = mean_of_first_passes(first_passes, buffers, number)
                found = torch.autograd.grad(
                    loss if scale is None else loss * scale,
                    theta,
                    create_graph=True,
                    allow_unused=True,
                )
                gradients = zeros_for_none(found, theta)
                if scale is not None:
                    gradients, finite = unscale(gradients, scale)
                    outer_scale = torch.where(finite, outer_scale, torch.nan)
                # theta - inner_lr * direction
                theta = list(torch._foreach_add(theta, direction(gradients), alpha=-inner_lr))
            # 5c) The query loss at theta'.
            query_loss = loss_at(theta, task.query)
            losses.append(query_loss.detach())
            # 5d) Its gradient with respect to the parameters before the inner steps.
            torch.autograd.backward(
                query_loss * (outer_scale / len(tasks)), inputs=list(parameters)
            )
        summed: list[Tensor | None] = [parameter.grad for parameter in parameters]
    copy_values(buffers, first_passes)
    return MetaGradient(summed, *mean_over_tasks(losses))


class _ClosureModule(nn.Module):
    """A module whose forward is a closure, so that ``functional_call`` can replace parameters."""

    def __init__(self, model: nn.Module, closure: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._closure = closure

    def forward(self, rows: Tensor) -> Tensor:
        return self._closure(rows)


def _names(module: nn.Module, parameters: Sequence[Tensor]) -> list[str]:
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    foreign = [tuple(p.shape) for p in parameters if id(p) not in name_of]
    if foreign:
        raise ValueError(
            f"the optimizer owns {len(foreign)} parameters that are not the model's (shapes "
            f"{foreign[:4]}); pass model= a module that holds all of them"
        )
    return [name_of[id(parameter)] for parameter in parameters]
