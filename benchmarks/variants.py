"""Two ways to speed up a full step that the library leaves to you, or leaves out.

*Compiled*: the same full step with ``torch.compile`` on the model. *vmap*: a first-order MAML step
of four tasks with one inner step, the tasks batched by ``torch.func.vmap`` over copies of the
parameters (which excludes batch norm in training mode), against the library's loop over tasks.
"""

import argparse
from collections.abc import Callable

import torch
from comet_examples.report import table
from overhead import Times, interleaved, quartiles
from runs import machine
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from comet_meta import CoMetOptimizerWrapper
from comet_meta.meta.first_order import first_order
from comet_meta.tasks import Task

_TASKS = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"{machine()}; medians [quartiles] of {options.rounds} rounds\n")
    rows = []
    for name, (build, shape) in MODELS.items():
        for batch in (8, 64):
            torch.manual_seed(0)
            data = torch.randn(batch, *shape, device=device)
            ratios = {
                "compiled / eager": compiled(build, data, options.rounds),
                "vmap / loop": batched(build, data, options.rounds),
            }
            rows.append({"model": name, "batch": str(batch), **ratios})
    print(table(rows))


def perceptron() -> nn.Module:
    """An autoencoder of two linear layers."""
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))


def convolutions() -> nn.Module:
    """An autoencoder of four convolutions, without batch norm."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 2, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 3, 2, stride=2),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (256,)),
    "convolutions": (convolutions, (3, 32, 32)),
}


def compiled(build: Callable[[], nn.Module], data: Tensor, rounds: int) -> str:
    """Full steps with a compiled model over the same without."""

    def full_step(compile_it: bool) -> Callable[[], object]:
        model = build().to(data.device)
        forward = torch.compile(model, dynamic=True) if compile_it else model
        optimizer = CoMetOptimizerWrapper(
            torch.optim.AdamW(model.parameters(), lr=1e-4), meta="mldg"
        )
        index = torch.arange(len(data), device=data.device)

        def losses(rows: Tensor) -> Tensor:
            found: Tensor = (forward(data[rows]) - data[rows]).square().flatten(1).mean(dim=1)
            return found

        return lambda: optimizer.step(losses, index)

    eager, fast = interleaved([full_step(False), full_step(True)], rounds, data.device)
    return both(fast, eager)


def batched(build: Callable[[], nn.Module], data: Tensor, rounds: int) -> str:
    """Meta-gradients of four tasks with ``vmap`` over those with a loop."""
    model = build().to(data.device)
    parameters = dict(model.named_parameters())
    rows = torch.arange(len(data), device=data.device).reshape(_TASKS, -1)
    support, query = rows[:, rows.shape[1] // 2 :], rows[:, : rows.shape[1] // 2]
    tasks = [Task(*parts) for parts in zip(support, query, strict=True)]

    def loss(values: dict[str, Tensor], pictures: Tensor) -> Tensor:
        found: Tensor = (functional_call(model, values, (pictures,)) - pictures).square().mean()
        return found

    def of_a_task(values: dict[str, Tensor], support: Tensor, query: Tensor) -> dict[str, Tensor]:
        inner = grad(loss)(values, support)
        moved = {key: values[key] - 1e-3 * inner[key] for key in values}
        found: dict[str, Tensor] = grad(loss)(moved, query)
        return found

    def with_vmap() -> list[Tensor]:
        values = {key: value.detach() for key, value in parameters.items()}
        found = vmap(of_a_task, in_dims=(None, 0, 0))(values, data[support], data[query])
        return [gradient.mean(dim=0) for gradient in found.values()]

    def with_loop() -> list[Tensor | None]:
        return first_order(
            lambda rows: (model(data[rows]) - data[rows]).square().mean(),
            list(parameters.values()),
            tasks,
            mode="fomaml",
            inner="sgd",
            inner_lr=1e-3,
            inner_steps=1,
        ).gradients

    for ours, reference in zip(with_loop(), with_vmap(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-5)
    loop, fast = interleaved([with_loop, with_vmap], rounds, data.device)
    return both(fast, loop)


def both(ours: Times, theirs: Times) -> str:
    """Ratio on the wall, and of processor time."""
    wall = quartiles(ours.wall / theirs.wall)
    return f"{wall}, processor {quartiles(ours.processor / theirs.processor)}"


if __name__ == "__main__":
    main()
