"""A default step runs without the code of meta-steps."""

import subprocess
import sys

import pytest
import torch

import comet_meta
from comet_meta import CoMetOptimizerWrapper, MetaStep

TRAINING = """
import sys

class NoMeta:
    def find_spec(self, name, path=None, target=None):
        if name == "comet_meta.meta" or name.startswith("comet_meta.meta."):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, NoMeta())
import torch
from comet_meta import CoMetOptimizerWrapper, CovarianceMetaRegularizer, SoftConfidentWeighter

torch.manual_seed(0)
model, data, index = torch.nn.Linear(3, 3), torch.randn(16, 3), torch.arange(16)
weighter = SoftConfidentWeighter(16, rule="hard")
optimizer = CoMetOptimizerWrapper(
    torch.optim.SGD(model.parameters(), lr=0.1),
    weighter=weighter,
    regularizer=CovarianceMetaRegularizer(),
)
losses = lambda rows: (model(data[rows]) - data[rows]).square().mean(dim=1)
before = losses(index).mean().item()
for _ in range(5):
    optimizer.zero_grad()
    optimizer.objective(losses(index), index).backward()
    optimizer.step()
    weighter.fit(losses(index).detach())
    optimizer.step(losses, index)
assert losses(index).mean().item() < before
try:
    CoMetOptimizerWrapper(torch.optim.SGD(model.parameters(), lr=0.1), meta="mldg")
except ImportError as error:
    print(error)
"""


def test_a_default_step_imports_no_meta_step():
    done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is blocked" in done.stdout  # the block is there: a meta-step does need the code


def test_the_name_of_a_mode_stands_for_its_default_settings():
    def wrapped(meta):
        theta = torch.ones(2, requires_grad=True)
        return CoMetOptimizerWrapper(torch.optim.SGD([theta], lr=0.1), meta=meta)

    assert wrapped("fomaml").meta == wrapped(MetaStep("fomaml")).meta == MetaStep("fomaml")
    assert wrapped("none").meta is None
    assert wrapped(MetaStep("none", query_fraction=0.5)).query_fraction == 0.5


def test_settings_cannot_change_behind_the_wrapper():
    with pytest.raises(AttributeError):
        MetaStep().tasks = 2  # type: ignore[misc]


def test_an_unknown_name_is_still_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Metastep'"):
        comet_meta.Metastep  # noqa: B018
