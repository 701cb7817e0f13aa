"""The meta-gradient of second order: through the inner steps."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from comet_meta.gradients import Gradients, MetaGradient, empty_gradients, filled, real, unscaled
from comet_meta.meta.first_order import InnerOptimizer, mean_losses
from comet_meta.restore import copies, copy_values, restored
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
        """Bias-corrected mean over bias-corrected root mean square, one for each gradient."""
        given = gradients
        gradients = real(given)
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
        # The clamp keeps the derivative of the root finite where a gradient is exactly 0.
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
    """Gradient of the query loss through the inner steps.

    Args:
        closure: Per-sample losses of some rows, rows (R,) -> (R,), by way of ``model``.
        objective: (losses (R,), parameters) -> scalar.
        model: The module whose parameters are replaced while ``closure`` runs.
        parameters: Leaf tensors that require grad, all of them parameters of ``model``.
        tasks: Support and query rows.
        inner: Rule of the inner steps.
        inner_lr: Their step size > 0.
        inner_steps: Their number >= 1.
        scale: As for :func:`first_order`.

    Returns:
        The gradients and the losses, averaged over tasks; the losses unscaled. The model's own
        parameters never change; its buffers keep what the first pass, at theta, made of them.

    Raises:
        ValueError: If a parameter isn't one of the model's.

    Source: Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks,
    ICML 2017.
    """
    harness = _ClosureModule(model, closure)
    names = _names(harness, parameters)
    buffers = list(model.buffers())
    losses = []
    after_first_pass: list[Tensor] = []

    def loss_at(values: Sequence[Tensor], rows: Tensor) -> Tensor:
        replaced = dict(zip(names, values, strict=True))
        losses: Tensor = functional_call(harness, replaced, (rows,), tie_weights=True)
        return objective(losses, values)

    with empty_gradients(parameters), restored(buffers):
        for task in tasks:
            direction = AdamDirection() if inner == "adam" else list
            fast = list(parameters)
            factor: Tensor | float = 1.0 if scale is None else scale
            for k in range(inner_steps):
                loss = loss_at(fast, task.support)
                if k == 0:
                    losses.append(loss.detach())
                    after_first_pass = after_first_pass or copies(buffers)
                found = torch.autograd.grad(
                    loss if scale is None else loss * scale,
                    fast,
                    create_graph=True,
                    allow_unused=True,
                )
                gradients = filled(found, fast)
                if scale is not None:
                    gradients, finite = unscaled(gradients, scale)
                    factor = torch.where(finite, factor, torch.nan)
                fast = list(torch._foreach_add(fast, direction(gradients), alpha=-inner_lr))
            query_loss = loss_at(fast, task.query)
            losses.append(query_loss.detach())
            torch.autograd.backward(query_loss * (factor / len(tasks)), inputs=list(parameters))
        summed: list[Tensor | None] = [parameter.grad for parameter in parameters]
    copy_values(buffers, after_first_pass)
    return MetaGradient(summed, *mean_losses(losses))


class _ClosureModule(nn.Module):
    """Lets ``functional_call`` reach a model that a closure uses."""

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
