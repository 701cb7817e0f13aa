"""What one of two processes does in test_distributed.py: ``torchrun --nproc_per_node=2 ranks.py``.

Each function trains on this process's rows of every global batch and returns what the test compares
with a single process.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from comet_meta import (
    CoMet,
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    IndexedDataset,
    SoftConfidentWeighter,
    collect_scores,
)
from comet_meta.meta import step as meta_step
from wrapping import wrap

N = 21
DATA = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)).double()
SCORES = torch.linspace(0, 1, N).square()
# The rows of each process, step by step: equal parts, then an uneven last batch.
EVEN = [(range(0, 4), range(4, 8)), (range(8, 12), range(12, 16))]
UNEVEN = [*EVEN, (range(16, 20), range(20, 21))]

Batches = list[tuple[range, ...]]


class Model(nn.Module):
    """An autoencoder with a layer that nothing uses and one that only some rows use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.first = nn.Parameter(torch.ones(3).double())
        self.unused = nn.Parameter(torch.ones(2).double())

    def forward(self, rows: Tensor) -> Tensor:
        x = DATA[rows]
        y = self.body(x)
        if 0 in rows:  # only the first process, and only in the first step
            y = torch.where((rows == 0).unsqueeze(1), y * self.first, y)
        return (y - x).square().mean(dim=1)


def falling(scores: Tensor) -> Tensor:
    """Weights that differ for all samples, between 1/4 and 1."""
    return 1 / (1 + 3 * scores)


def wrapped(parameters: Any, **settings: Any) -> CoMetOptimizerWrapper:
    weighter = SoftConfidentWeighter(N, rule=falling)
    weighter.fit(SCORES)
    # gamma=0: the random split of the loss history would otherwise differ from one process's.
    regularizer = CovarianceMetaRegularizer(gamma=0.0)
    settings = {"weighter": weighter, "regularizer": regularizer} | settings
    return wrap(torch.optim.Adam(parameters, lr=0.05), **settings)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def outcome(comet: CoMetOptimizerWrapper) -> dict[str, Any]:
    parameters = [p for group in comet.param_groups for p in group["params"]]
    return {
        "parameters": [whole(p.detach()) for p in parameters],
        "ungraded": [p.grad is None for p in parameters],
        "pairs": [] if comet.regularizer is None else comet.regularizer.pairs,
        "weights": comet.weighter(),
        "random": comet.generator.get_state(),
    }


def mine(batch: tuple[range, ...]) -> Tensor:
    if dist.is_initialized():
        return torch.tensor(list(batch[dist.get_rank()]))
    return torch.tensor([row for part in batch for row in part])


def drop_in(model: nn.Module, batches: Batches, **settings: Any) -> dict[str, Any]:
    comet = wrapped(model.parameters(), **settings)
    for batch in batches:
        index = mine(batch)
        comet.zero_grad()
        comet.objective(model(index), index).backward()
        comet.step()
    return outcome(comet)


def full(model: nn.Module, batches: Batches, **settings: Any) -> dict[str, Any]:
    comet = wrapped(model.parameters(), **settings)
    for batch in batches:
        index = mine(batch)
        comet.step(lambda rows, index=index: model(index[rows]), index)
    return outcome(comet)


def recorded(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The outcome, and the tasks that each step dealt."""
    dealt = []
    original = meta_step.split_tasks

    def split_tasks(*args: Any) -> Any:
        tasks = original(*args)
        dealt.append([(task.support, task.query) for task in tasks])
        return tasks

    meta_step.split_tasks = split_tasks
    try:
        return run() | {"tasks": dealt}
    finally:
        meta_step.split_tasks = original


def streamed() -> Tensor:
    """Scores by batches; weights are refitted when all N have come in, from both processes."""
    weighter = SoftConfidentWeighter(N, rule="hard")
    for batch in [*UNEVEN[:2], (range(16, 18), range(18, 21))]:
        index = mine(batch)
        weighter.update(index, SCORES[index])
    return torch.stack([weighter.scores, weighter()])


def collected() -> Tensor:
    dataset = IndexedDataset(DATA)  # 21 samples on two processes: the sampler repeats one
    sampler = DistributedSampler(dataset, shuffle=False)
    loader = DataLoader(dataset, batch_size=4, sampler=sampler)
    return collect_scores(lambda batch: batch.sum(dim=1), loader)


def resumed(folder: Path) -> dict[str, Any]:
    """Three steps, a checkpoint by the first process after two; the third on fresh objects too."""
    torch.manual_seed(dist.get_rank())  # processes that were not seeded alike
    model = Model()
    torch.manual_seed(dist.get_rank())
    settings = {"meta": "mldg", "regularizer": CovarianceMetaRegularizer()}
    comet = wrapped(model.parameters(), **settings)

    def step(batch: tuple[range, ...]) -> None:
        index = mine(batch)
        comet.step(lambda rows: model(index[rows]), index)

    for batch in EVEN:
        step(batch)
    file = folder / "checkpoint.pt"
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": comet.state_dict()}, file)
    step(UNEVEN[2])
    uninterrupted = outcome(comet)

    dist.barrier()
    saved = torch.load(file, weights_only=True)
    model = Model()
    torch.manual_seed(100 + dist.get_rank())
    comet = wrapped(model.parameters(), **settings)
    model.load_state_dict(saved["model"])
    comet.load_state_dict(saved["optimizer"])
    step(UNEVEN[2])
    return {"uninterrupted": uninterrupted, "resumed": outcome(comet)}


class Every(DistributedSampler):
    """Every sample once, in order: on one process the parts of two, batch by batch."""

    def __iter__(self):
        if dist.is_initialized():
            return iter(range(dist.get_rank(), EVERY, 2))
        return (i for start in range(0, EVERY, 8) for r in (0, 1) for i in whole_batch(start, r))

    def __len__(self) -> int:
        return EVERY // 2 if dist.is_initialized() else EVERY


EVERY = 20  # samples: ten for each of two processes, in batches of 4, 4 and 2


def whole_batch(start: int, rank: int) -> range:
    """What process ``rank`` has of the global batch that begins with ``start``."""
    return range(start + rank, min(start + 8, EVERY), 2)


def one_object(
    broken: int | None = None, scored: bool = True, lost: bool = False
) -> dict[str, Any]:
    """Four epochs with ``CoMet``, whose weights come from scores or from the steps' losses."""
    model = Plain()
    trained = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    loader = DataLoader(
        range(EVERY),
        batch_size=4 if dist.is_initialized() else 8,
        sampler=Every(range(EVERY), num_replicas=2, rank=0),
    )
    comet = CoMet(
        loader,
        optimizer,
        scores=model if scored else None,
        weighter=SoftConfidentWeighter(EVERY, contamination=0.3),
        warm_up=2,
    )
    taken = []
    for epoch in range(4):
        for rows in comet:
            losses = trained(rows)
            if broken is not None and epoch == 1:
                losses = losses * torch.ones(len(rows)).masked_fill(rows == broken, torch.nan)
            if lost:  # whatever the second process computes
                losses = losses.masked_fill(rows % 2 == 1, torch.nan)
            before = model.body[0].weight.detach().clone()
            optimizer.zero_grad()
            comet.loss(losses).backward()
            optimizer.step()
            taken.append(not torch.equal(before, model.body[0].weight))
    return {
        "parameters": [p.detach() for p in model.parameters()],
        "weights": comet.weighter(),
        "taken": taken,
        "suspects": comet.suspects(6),
        "scores": comet.weighter.scores,
    }


class Plain(Model):
    """Every parameter is used: FSDP2 gathers by module."""

    def __init__(self) -> None:
        super().__init__()
        del self.first, self.unused

    def forward(self, rows: Tensor) -> Tensor:
        x = DATA[rows]
        return (self.body(x) - x).square().mean(dim=1)


def sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Plain()
    fully_shard(model.body[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp() -> dict[str, Any]:
    results = {"drop_in": drop_in(sharded(), UNEVEN), "none": full(sharded(), UNEVEN, meta="none")}
    for meta, inner in (("mldg", "sgd"), ("fomaml", "adam"), ("reptile", "sgd")):
        settings = {"meta": meta, "inner_optimizer": inner, "inner_lr": 0.1, "inner_steps": 2}
        results[meta] = recorded(lambda s=settings: full(sharded(), EVEN, **s))
    try:
        model = sharded()
        comet = wrapped(model.parameters(), meta="maml", model=model)
        comet.step(model, mine(EVEN[0]))
    except ValueError as error:
        results["maml"] = str(error)
    return results


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    ddp = DistributedDataParallel(Model())
    results = {
        "drop_in": drop_in(ddp, UNEVEN),
        "none": full(Model(), UNEVEN, meta="none"),
        "no penalty": full(Model(), UNEVEN, meta="none", regularizer=None),
        "streamed": streamed(),
        "collected": collected(),
        "one object": one_object(),
        "one object, losses": one_object(scored=False),
        "one object, broken": one_object(broken=5),
        "one object, losses, broken": one_object(broken=5, scored=False),
        "one object, losses, lost": one_object(scored=False, lost=True),
        "resume": resumed(folder),
    }
    for name, batches in (("mldg", EVEN), ("mldg uneven", UNEVEN)):
        results[name] = recorded(
            lambda b=batches: full(Model(), b, meta="mldg", inner_lr=0.1, tasks=2)
        )
    if hasattr(torch.distributed, "fsdp") and os.environ.get("COMET_TEST_FSDP") == "1":
        results["fsdp"] = fsdp()
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
