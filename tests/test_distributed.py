"""Two processes on the CPU against one."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from comet_meta import (
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    IndexedDataset,
    SoftConfidentWeighter,
    collect_scores,
)

DATA = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)).double()


def losses(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return (model(DATA[rows]) - DATA[rows]).square().mean(dim=1)


def steps(index: torch.Tensor) -> CoMetOptimizerWrapper:
    """Three full steps without a split, so that a process's half is half of the gradient."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    weighter = SoftConfidentWeighter(16)
    weighter.fit(torch.linspace(0, 1, 16).square())
    optimizer = CoMetOptimizerWrapper(
        torch.optim.Adam(model.parameters(), lr=0.05),
        weighter=weighter,
        regularizer=CovarianceMetaRegularizer(gamma=0.0),
        meta="none",
    )
    for _ in range(3):
        optimizer.step(lambda rows: losses(model, index[rows]), index)
    return optimizer


def parameters(optimizer: CoMetOptimizerWrapper) -> list[torch.Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    optimizer = steps(torch.arange(16)[rank::2])
    dataset = IndexedDataset(DATA[:15])  # uneven: the sampler repeats a sample
    loader = DataLoader(
        dataset, batch_size=3, sampler=DistributedSampler(dataset, 2, rank, shuffle=False)
    )
    scores = collect_scores(lambda batch: batch.sum(dim=1), loader)
    state = {
        "parameters": parameters(optimizer),
        "scores": scores,
        "pairs": optimizer.regularizer.pairs,
    }
    torch.save(state, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    whole = parameters(steps(torch.arange(16)))
    for ours, theirs, alone in zip(first["parameters"], second["parameters"], whole, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-8)
    assert torch.equal(first["scores"], second["scores"])
    torch.testing.assert_close(first["scores"], DATA[:15].sum(dim=1).float())
    assert torch.equal(first["pairs"], second["pairs"])
