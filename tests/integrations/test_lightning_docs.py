"""The snippets of docs/integrations/lightning.md run as they stand there."""

from functools import partial

import pytest
import torch

pytest.importorskip("lightning.pytorch", reason='needs pip install "comet-meta[lightning]"')

from snippets import run

run = partial(run, "docs/integrations/lightning.md")


@pytest.fixture
def namespace(tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)  # Lightning writes its logs here
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(400, 1, generator=generator) * torch.tensor([1.0, 2.0, -1.0, 0.5])
    data += 0.1 * torch.randn(400, 4, generator=generator)
    data[:20] = 3 * torch.randn(20, 4, generator=generator)
    torch.manual_seed(0)
    return run("train", run("module", {"train_set": data, "__name__": "docs"}))


def found(suspects: torch.Tensor) -> int:
    return len(set(suspects.tolist()) & set(range(20)))


def test_the_callback_finds_the_bad_samples(namespace):
    assert found(namespace["suspects"]) >= 17


@pytest.mark.parametrize("name", ["full", "manual", "prior"])
def test_the_other_ways_do_too(namespace, name):
    first = namespace["comet"]
    comet = run(name, namespace)["comet"]
    assert comet is not first
    assert found(comet.weighter.ranking(20)) >= 17
