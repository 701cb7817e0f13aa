"""The meta-step: inner steps on the support rows, the meta-gradient from the query rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from comet_meta.distributed import is_sharded, local, sharded_like

InnerOptimizer = Literal["sgd", "adam"]
FirstOrderMode = Literal["fomaml", "mldg", "reptile"]
Objective = Callable[[Tensor], Tensor]
"""The loss of some rows of the batch: rows (R,) -> scalar, at the parameters' current values."""
Gradients = list[Tensor]


class Task(NamedTuple):
    """Disjoint rows of one batch.

    Attributes:
        support: Rows that the inner steps learn from, shape (S,), S >= 1.
        query: Rows that judge the adapted parameters, shape (Q,), Q >= 1.
    """

    support: Tensor
    query: Tensor


class MetaGradient(NamedTuple):
    """Outcome of a meta-step, averaged over its tasks.

    Attributes:
        gradients: One for each parameter, in its shape; None for a parameter that no loss used.
        support_loss: Objective of the support rows before the inner steps, shape ().
        query_loss: Objective of the query rows after them, shape ().
    """

    gradients: list[Tensor | None]
    support_loss: Tensor
    query_loss: Tensor


def split_tasks(
    batch_size: int,
    tasks: int,
    query_fraction: float,
    generator: torch.Generator | None = None,
) -> list[Task]:
    """Deal the rows of a batch into tasks and cut each into support and query.

    Args:
        batch_size: Number of rows B >= 2.
        tasks: Number of tasks >= 1; a batch of fewer than two rows a task is dealt into fewer.
        query_fraction: Share of a task's rows that goes to the query, in (0, 1); both parts get at
            least one row.
        generator: Source of the random order.

    Returns:
        The tasks. Every row is in exactly one part of one task.

    Raises:
        ValueError: If there are fewer than two rows.

    Example:
        >>> [(len(task.support), len(task.query)) for task in split_tasks(10, 2, 0.3)]
        [(3, 2), (3, 2)]
    """
    if batch_size < 2:
        raise ValueError(
            "a batch of one sample can't be split into support and query: use drop_last=True in "
            "the DataLoader, a larger batch, or meta='none'"
        )
    order = torch.randperm(batch_size, generator=generator)
    dealt = []
    for rows in order.tensor_split(min(tasks, batch_size // 2)):
        queries = min(max(round(query_fraction * len(rows)), 1), len(rows) - 1)
        dealt.append(Task(support=rows[queries:], query=rows[:queries]))
    return dealt


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Give the tensors their values back on leaving, also by an exception.

    Args:
        tensors: Tensors that the body changes in place.

    Yields:
        Copies of the values on entry.
    """
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        yield saved
    finally:
        _copy(tensors, saved)


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
        return list(torch._foreach_div(mean, torch._foreach_add(root, self._eps)))


def _direction(inner: InnerOptimizer) -> Callable[[Gradients], Gradients]:
    return AdamDirection() if inner == "adam" else lambda gradients: gradients


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

    Returns:
        The gradients and the losses, averaged over tasks.
    """
    meta = _Accumulator(parameters)
    values = [local(parameter.detach()) for parameter in parameters]
    after_first_pass: list[Tensor] = []
    with restored(values) as origin, restored(buffers):
        for task in tasks:
            direction = _direction(inner)
            for k in range(inner_steps):
                loss = objective(task.support)
                gradients = meta.gradients_of(loss, parameters)
                if k == 0:
                    support_loss, support_gradients = loss.detach(), gradients
                    after_first_pass = after_first_pass or [b.clone() for b in buffers]
                _move(values, direction(gradients), -inner_lr)
            if mode == "reptile":
                # FSDP2 puts gathered parameters away only in a backward pass.
                gathered = is_sharded(parameters[0])
                with torch.set_grad_enabled(gathered):
                    query_loss = objective(task.query)
                if gathered:
                    meta.gradients_of(query_loss, parameters)
                moved = torch._foreach_sub(origin, values)
                gradients = list(torch._foreach_div(moved, inner_lr * inner_steps))
            else:
                query_loss = objective(task.query)
                gradients = meta.gradients_of(query_loss, parameters)
                if mode == "mldg":
                    share = len(task.query) / (len(task.support) + len(task.query))
                    gradients = list(torch._foreach_lerp(support_gradients, gradients, share))
            meta.add(gradients, support_loss, query_loss)
            _copy(values, origin)
    _copy(buffers, after_first_pass)
    return meta.mean()


def second_order(
    closure: Callable[[Tensor], Tensor],
    objective: Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor],
    model: nn.Module,
    parameters: Sequence[Tensor],
    tasks: Sequence[Task],
    *,
    inner: InnerOptimizer,
    inner_lr: float,
    inner_steps: int,
) -> MetaGradient:
    """Gradient of the query loss through the inner steps (MAML, Finn et al. 2017).

    Args:
        closure: Per-sample losses of some rows, rows (R,) -> (R,), by way of ``model``.
        objective: (losses (R,), rows (R,), parameters) -> scalar.
        model: The module whose parameters are replaced while ``closure`` runs.
        parameters: Leaf tensors that require grad, all of them parameters of ``model``.
        tasks: Support and query rows.
        inner: Rule of the inner steps.
        inner_lr: Their step size > 0.
        inner_steps: Their number >= 1.

    Returns:
        The gradients and the losses, averaged over tasks. The model's own parameters never change;
        its buffers keep what the first pass, at theta, made of them.

    Raises:
        ValueError: If a parameter isn't one of the model's.
    """
    harness = _ClosureModule(model, closure)
    names = _names(harness, parameters)
    buffers = list(model.buffers())
    meta = _Accumulator(parameters)
    after_first_pass: list[Tensor] = []

    def loss_at(values: Sequence[Tensor], rows: Tensor) -> Tensor:
        replaced = dict(zip(names, values, strict=True))
        losses: Tensor = functional_call(harness, replaced, (rows,), tie_weights=True)
        return objective(losses, rows, values)

    with restored(buffers):
        for task in tasks:
            direction = _direction(inner)
            fast = list(parameters)
            for k in range(inner_steps):
                loss = loss_at(fast, task.support)
                gradients = meta.gradients_of(loss, fast, create_graph=True)
                if k == 0:
                    support_loss = loss.detach()
                    after_first_pass = after_first_pass or [b.clone() for b in buffers]
                fast = list(torch._foreach_add(fast, direction(gradients), alpha=-inner_lr))
            query_loss = loss_at(fast, task.query)
            meta.add(meta.gradients_of(query_loss, parameters), support_loss, query_loss)
    _copy(buffers, after_first_pass)
    return meta.mean()


def gradients_of(
    loss: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False
) -> list[Tensor | None]:
    """Gradients of a loss that leave ``.grad`` as it is.

    Args:
        loss: Shape ().
        parameters: Leaf tensors that require grad, or non-leaves of the loss's graph.
        create_graph: Whether the gradients will be differentiated in turn.

    Returns:
        One for each parameter; None for one that the loss doesn't use.
    """
    if not any(is_sharded(parameter) for parameter in parameters):
        return list(
            torch.autograd.grad(
                loss, list(parameters), create_graph=create_graph, allow_unused=True
            )
        )
    # FSDP2 computes with gathered copies; only its hooks, which backward() runs, know how their
    # gradients come back to the shards.
    earlier = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    torch.autograd.backward(loss)
    found = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, earlier, strict=True):
        parameter.grad = gradient
    return found


class _Accumulator:
    """Averages the gradients of tasks; a parameter that no loss used ends with no gradient."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._used = [False] * len(parameters)
        self._total: Gradients = []
        self._losses: list[Tensor] = []

    def gradients_of(
        self, loss: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False
    ) -> Gradients:
        found = gradients_of(loss, parameters, create_graph=create_graph)
        self._used = [
            used or gradient is not None for used, gradient in zip(self._used, found, strict=True)
        ]
        return [
            torch.zeros_like(local(parameter)) if gradient is None else local(gradient)
            for parameter, gradient in zip(parameters, found, strict=True)
        ]

    def add(self, gradients: Gradients, support_loss: Tensor, query_loss: Tensor) -> None:
        if self._total:
            torch._foreach_add_(self._total, gradients)
        else:
            self._total = gradients
        self._losses.append(torch.stack([support_loss.detach(), query_loss.detach()]))

    def mean(self) -> MetaGradient:
        if len(self._losses) > 1:
            torch._foreach_div_(self._total, len(self._losses))
        gradients = [
            sharded_like(total, parameter) if used else None
            for total, parameter, used in zip(
                self._total, self._parameters, self._used, strict=True
            )
        ]
        support_loss, query_loss = torch.stack(self._losses).mean(dim=0)
        return MetaGradient(gradients, support_loss, query_loss)


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


@torch.no_grad()
def _move(targets: Sequence[Tensor], directions: Sequence[Tensor], length: float) -> None:
    torch._foreach_add_(list(targets), list(directions), alpha=length)
    torch.clear_autocast_cache()


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
        # Inside autocast, torch keeps low-precision copies of the weights: they are stale now.
        torch.clear_autocast_cache()
