"""The README's snippets run as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

README = (Path(__file__).parents[1] / "README.md").read_text()


def snippet(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```\n<!-- /{name} -->", README, re.DOTALL)
    assert found, f"the README has no snippet {name}"
    return found.group(1)


class Model(nn.Module):
    """A linear autoencoder of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4))

    def losses(self, images: torch.Tensor) -> torch.Tensor:
        return (self.body(images) - images).square().mean(dim=1)

    scores = losses


@pytest.fixture
def namespace() -> dict:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(1000, 1, generator=generator) * torch.tensor([1.0, 2.0, -1.0, 0.5])
    data += 0.1 * torch.randn(1000, 4, generator=generator)
    data[:100] = 3 * torch.randn(100, 4, generator=generator)
    names = {"torch": torch, "DataLoader": DataLoader, "train_set": data, "model": Model()}
    return names | {"epochs": 20, "warm_up": 10}


def test_adoption_finds_the_bad_samples(namespace):
    exec(compile(snippet("adoption"), "README.md", "exec"), namespace)
    suspects = namespace["suspects"]
    assert len(suspects) == 20
    assert suspects.max() < 100
    weights = namespace["weighter"]()
    assert weights[:100].mean() < 0.1 < 0.9 < weights[100:].mean()


def test_the_full_step_runs(namespace):
    namespace["epochs"] = 1
    exec(compile(snippet("adoption"), "README.md", "exec"), namespace)
    exec(compile(snippet("full"), "README.md", "exec"), namespace)
    assert torch.isfinite(namespace["report"].objective)


def test_the_two_commands_stand_in_the_readme():
    assert 'pip install -e ".[examples]" && python examples/simplenet_mvtec.py' in README
    assert 'pip install -e ".[dev]" && pytest' in README
