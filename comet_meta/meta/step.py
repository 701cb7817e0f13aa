"""The settings of a meta-step, and its gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from comet_meta import distributed
from comet_meta.gradients import MetaGradient
from comet_meta.losses import Closure
from comet_meta.meta.first_order import InnerOptimizer, first_order
from comet_meta.meta.second_order import second_order
from comet_meta.tasks import Task, split_tasks

MetaMode = Literal["none", "mldg", "fomaml", "maml", "reptile"]


@dataclass(frozen=True)
class MetaStep:
    """The settings of a meta-step.

    (a) The batch is split into tasks, and each task into support and query. (b) Inner steps on the
    support loss lead from the parameters theta to theta'. (c) The query loss is taken at theta'.
    (d) The outer gradient combines the two, depending on the mode.

    ``meta="mldg"`` is short for ``meta=MetaStep("mldg")``.

    Args:
        mode: ``"mldg"`` (support gradient at theta and query gradient at theta' together),
            ``"fomaml"`` (query gradient at theta'), ``"maml"`` (query gradient through the inner
            steps; needs the wrapper's ``model``), ``"reptile"`` (mean direction of the inner
            steps), or ``"none"`` (gradient of the whole batch, no inner steps). See
            :func:`~comet_meta.meta.first_order.first_order`.
        inner_lr: Step size of the inner steps, > 0.
        inner_steps: Number of inner steps, >= 1.
        inner_optimizer: ``"sgd"`` or ``"adam"`` (new in every task, as in the paper's code).
        query_fraction: Fraction of a task's samples in the query, in (0, 1). With ``"none"``, the
            fraction of the batch whose loss counts as validation loss for the regularizer.
        tasks: Number of tasks per batch, >= 1.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> MetaStep("fomaml", inner_lr=1e-4, inner_steps=5).tasks
        1

    Source: the paper's settings are those of :meth:`comet_meta.CoMetOptimizerWrapper.paper`.
    """

    mode: MetaMode = "mldg"
    inner_lr: float = 1e-3
    inner_steps: int = 1
    inner_optimizer: InnerOptimizer = "sgd"
    query_fraction: float = 0.3
    tasks: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, value, choices in (
            ("meta", self.mode, get_args(MetaMode)),
            ("inner_optimizer", self.inner_optimizer, get_args(InnerOptimizer)),
        ):
            if value not in choices:
                expected = ", ".join(map(repr, choices))
                raise ValueError(f"{name} is {value!r}; expected one of {expected}")
        if not self.inner_lr > 0:
            raise ValueError(f"inner_lr is {self.inner_lr}; expected a step size > 0")
        if not 0 < self.query_fraction < 1:
            raise ValueError(f"query_fraction is {self.query_fraction}; expected a share in (0, 1)")
        for name, count in (("inner_steps", self.inner_steps), ("tasks", self.tasks)):
            if count < 1:
                raise ValueError(f"{name} is {count}; expected at least 1")

    def gradient(
        self,
        weighted_losses: Closure,
        objective: Callable[[Tensor, Sequence[Tensor]], Tensor],
        weights: Tensor,
        parameters: list[Tensor],
        scale: Tensor | None,
        *,
        model: nn.Module | None,
        buffers: Sequence[Tensor],
        generator: torch.Generator,
    ) -> MetaGradient:
        """The meta-gradient of a batch.

        Args:
            weighted_losses: From rows of the batch (R,) to their weighted losses (R,).
            objective: (losses (R,), parameters) -> scalar.
            weights: Weights of the batch's losses, shape (2, B).
            parameters: Leaf tensors that require grad.
            scale: Factor on the gradient, shape (), > 0.
            model: The module that closures use; needed for ``"maml"``.
            buffers: Its buffers, which the inner steps must not change.
            generator: Source of the random split, in the same state on every process.

        Returns:
            Gradients, support and query loss, averaged over tasks.
        """
        generator = distributed.process_generator(generator)
        # 5a) Tasks of support and query. A non-blocking copy doesn't wait for the device.
        tasks = [
            Task(*(rows.to(weights.device, non_blocking=True) for rows in task))
            for task in split_tasks(weights.shape[1], self.tasks, self.query_fraction, generator)
        ]
        inner: dict[str, Any] = {
            "inner": self.inner_optimizer,
            "inner_lr": self.inner_lr,
            "inner_steps": self.inner_steps,
            "scale": scale,
        }
        if self.mode == "maml":
            module = cast("nn.Module", model)
            return second_order(weighted_losses, objective, module, parameters, tasks, **inner)
        return first_order(
            lambda rows: objective(weighted_losses(rows), parameters),
            parameters,
            tasks,
            mode=cast("Any", self.mode),
            buffers=buffers,
            **inner,
        )
