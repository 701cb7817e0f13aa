"""Meta-gradients against TorchOpt, an independent library for differentiable optimization."""

import copy

import pytest
import torch
from torch import nn

from comet_meta.meta.first_order import first_order
from comet_meta.meta.second_order import second_order
from comet_meta.tasks import split_tasks

torchopt = pytest.importorskip("torchopt")

LR = 0.05
INNER = {
    "sgd": lambda model: torchopt.MetaSGD(model, lr=LR),
    # eps_root keeps the root differentiable at 0, as the library's clamp does.
    "adam": lambda model: torchopt.MetaAdam(model, lr=LR, eps_root=1e-16),
}


@pytest.fixture(autouse=True)
def double():
    """TorchOpt computes Adam's bias correction in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def losses(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) - x).square().mean(dim=1)


DATA = torch.randn(24, 3, generator=torch.Generator().manual_seed(1)).double()


def theirs(tasks, inner: str, steps: int, *, second: bool) -> list[torch.Tensor]:
    """The mean of the tasks' query gradients, by TorchOpt's inner optimizers."""
    total: list[torch.Tensor] = []
    for support, query in tasks:
        model = Net()
        origin = list(model.parameters())
        optimizer = INNER[inner](model)
        for _ in range(steps):
            optimizer.step(model.losses(DATA[support]).mean())
        if second:
            found = torch.autograd.grad(model.losses(DATA[query]).mean(), origin)
        else:
            adapted = Net()
            adapted.load_state_dict(copy.deepcopy(dict(model.state_dict())))
            loss = adapted.losses(DATA[query]).mean()
            found = torch.autograd.grad(loss, list(adapted.parameters()))
        total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
    return [gradient / len(tasks) for gradient in total]


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("inner", INNER)
def test_maml_equals_torchopt(inner, steps, tasks):
    model, dealt = Net(), split_tasks(24, tasks, 0.3, torch.Generator().manual_seed(2))
    ours = second_order(
        lambda rows: model.losses(DATA[rows]),
        lambda losses, parameters: losses.mean(),
        model,
        list(model.parameters()),
        dealt,
        inner=inner,
        inner_lr=LR,
        inner_steps=steps,
    )
    expected = theirs(dealt, inner, steps, second=True)
    for found, reference in zip(ours.gradients, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("inner", INNER)
def test_fomaml_equals_torchopt(inner, steps, tasks):
    model, dealt = Net(), split_tasks(24, tasks, 0.3, torch.Generator().manual_seed(2))
    ours = first_order(
        lambda rows: model.losses(DATA[rows]).mean(),
        list(model.parameters()),
        dealt,
        mode="fomaml",
        inner=inner,
        inner_lr=LR,
        inner_steps=steps,
    )
    expected = theirs(dealt, inner, steps, second=False)
    for found, reference in zip(ours.gradients, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-7, atol=1e-10)
