"""The meta-step: inner steps on the support rows, the meta-gradient from the query rows.

Gradients add up in ``.grad``, as those of backward passes do: that takes no copy of them, neither
in memory nor in time. What ``.grad`` held before is set aside meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.adam import adam

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
    saved = _copies(tensors)
    try:
        yield saved
    finally:
        _copy(tensors, saved)


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of a loss, apart from what ``.grad`` holds.

    Other than those of ``torch.autograd.grad``, they can be added to in place: no two of them are
    one tensor, and none has a stride of 0.

    Args:
        loss: Shape ().
        parameters: Leaf tensors that require grad.

    Returns:
        One for each parameter; None for one that the loss doesn't use.
    """
    with _empty_gradients(parameters):
        _backward(loss, parameters)
        return [parameter.grad for parameter in parameters]


def _backward(loss: Tensor, parameters: Sequence[Tensor]) -> None:
    """Add the gradients of a loss to ``.grad``, where possible of these parameters alone."""
    # FSDP2 computes with gathered copies; its hooks bring their gradients back to the shards.
    gathered = is_sharded(parameters[0])
    torch.autograd.backward(loss, inputs=None if gathered else list(parameters))


@torch.no_grad()
def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add to ``.grad``.

    Args:
        parameters: Leaf tensors.
        gradients: One for each, or None; they become ``.grad``, without a copy, where there's none.
    """
    held, more = [], []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            held.append(parameter.grad)
            more.append(gradient)
    if held:
        torch._foreach_add_(held, more)


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
        gradients = _real(given)
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
    with _empty_gradients(parameters), restored(values) as origin, restored(buffers):
        for number, task in enumerate(tasks):
            if number > 0:
                _copy(values, origin)
            query_share = len(task.query) / (len(task.support) + len(task.query))
            descent = _Descent(parameters, values, inner, inner_lr, scale)
            for k in range(inner_steps):
                support_loss = objective(task.support)
                if k == 0:
                    losses.append(support_loss.detach())
                    after_first_pass = after_first_pass or _copies(buffers)
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
                _backward(query_loss * (factor * share), parameters)
            losses.append(query_loss.detach())
        gradients: list[Tensor | None] = [parameter.grad for parameter in parameters]
    _copy(buffers, after_first_pass)
    return MetaGradient(gradients, *_mean(losses))


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
        self._move(_filled(parts, self._values), factor)
        if keep:
            add_gradients(self._parameters, found)

    @torch.no_grad()
    def _move(self, gradients: Gradients, factor: float) -> None:
        if self._scale is not None:
            gradients, finite = _unscaled(gradients, self._scale * factor)
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
        self._mean = [torch.zeros_like(parameter) for parameter in _real(parameters)]
        self._square = [torch.zeros_like(parameter) for parameter in _real(parameters)]
        self._fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
        # Where torch has no fused kernel, it reads the number of steps: that must be on the CPU.
        self._steps = [
            torch.zeros((), device=parameter.device if self._fused else "cpu")
            for parameter in parameters
        ]

    def step(self, parameters: list[Tensor], gradients: Gradients, lr: float) -> None:
        adam(
            _real(parameters),
            _real(gradients),
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
    scale: Tensor | None = None,
) -> MetaGradient:
    """Gradient of the query loss through the inner steps.

    Args:
        closure: Per-sample losses of some rows, rows (R,) -> (R,), by way of ``model``.
        objective: (losses (R,), rows (R,), parameters) -> scalar.
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
        return objective(losses, rows, values)

    with _empty_gradients(parameters), restored(buffers):
        for task in tasks:
            direction = AdamDirection() if inner == "adam" else list
            fast = list(parameters)
            factor: Tensor | float = 1.0 if scale is None else scale
            for k in range(inner_steps):
                loss = loss_at(fast, task.support)
                if k == 0:
                    losses.append(loss.detach())
                    after_first_pass = after_first_pass or _copies(buffers)
                found = torch.autograd.grad(
                    loss if scale is None else loss * scale,
                    fast,
                    create_graph=True,
                    allow_unused=True,
                )
                gradients = _filled(found, fast)
                if scale is not None:
                    gradients, finite = _unscaled(gradients, scale)
                    factor = torch.where(finite, factor, torch.nan)
                fast = list(torch._foreach_add(fast, direction(gradients), alpha=-inner_lr))
            query_loss = loss_at(fast, task.query)
            losses.append(query_loss.detach())
            torch.autograd.backward(query_loss * (factor / len(tasks)), inputs=list(parameters))
        summed: list[Tensor | None] = [parameter.grad for parameter in parameters]
    _copy(buffers, after_first_pass)
    return MetaGradient(summed, *_mean(losses))


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


def _filled(found: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Gradients:
    """Gradients, 0 for what wasn't used."""
    if any(gradient is not None and gradient.is_sparse for gradient in found):
        raise TypeError(
            "a parameter has a sparse gradient, which inner steps can't take; use meta='none', or "
            "sparse=False in the embedding"
        )
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, found, strict=True)
    ]


def _real(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Complex tensors as pairs of real ones, on the same memory; the others as they are."""
    return [torch.view_as_real(x) if x.is_complex() else x for x in tensors]


def _where_used(gradients: Sequence[Tensor], used: Sequence[bool]) -> list[Tensor | None]:
    return [g if was_used else None for g, was_used in zip(gradients, used, strict=True)]


def _unscaled(gradients: Gradients, scale: Tensor) -> tuple[Gradients, Tensor]:
    """Gradients over ``scale``, and whether all are finite, shape (); 0 where not."""
    unscaled = torch._foreach_div(gradients, scale)
    finite = torch.stack(torch._foreach_norm(unscaled)).isfinite().all()
    return [gradient.masked_fill(~finite, 0) for gradient in unscaled], finite


@contextmanager
def _empty_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Set ``.grad`` aside, and put it back on leaving."""
    held = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, held, strict=True):
            parameter.grad = gradient


def _mean(losses: Sequence[Tensor]) -> Tensor:
    """Support and query losses in turn, averaged over tasks, shape (2,)."""
    return torch.stack(list(losses)).view(-1, 2).mean(dim=0)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    _copy(copies, tensors)
    return copies


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
        torch.clear_autocast_cache()
