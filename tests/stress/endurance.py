"""Many steps of a small model: does memory grow, do file handles leak?

    python tests/stress/endurance.py --steps 100000

Full steps (a meta-step, a regularizer, one bad sample in a thousand steps) in turn with drop-in
steps, and a weighter that is refitted. Memory is read every hundredth of the way; the slope is
fitted by least squares to the second half, when caches are warm.
"""

import argparse
import logging
import sys
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from comet_examples.report import machine
from comet_meta import CoMetOptimizerWrapper, CovarianceMetaRegularizer, SoftConfidentWeighter

_SAMPLES, _BATCH = 64, 8


class Usage(NamedTuple):
    """What a run took.

    Attributes:
        memory: Resident memory over the run, in bytes.
        slope: Its growth in the second half, in bytes a step.
        files: Open files and sockets at the start and at the end.
        threads: Threads at the start and at the end.
    """

    memory: list[int]
    slope: float
    files: tuple[int, int]
    threads: tuple[int, int]


def main(steps: int, seed: int = 0) -> Usage:
    """Take the steps.

    Args:
        steps: Their number, at least 200.
        seed: Decides data and batches.
    """
    torch.manual_seed(seed)
    data = torch.randn(_SAMPLES, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
    weighter = SoftConfidentWeighter(_SAMPLES)
    optimizer = CoMetOptimizerWrapper(
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        weighter=weighter,
        regularizer=CovarianceMetaRegularizer(1e-4),
        model=model,
    )

    def losses(x: Tensor) -> Tensor:
        rebuilt: Tensor = model(x)
        return (rebuilt - x).square().mean(dim=1)

    process = psutil.Process()
    before = process.num_fds(), process.num_threads()
    memory: list[int] = []
    for step in range(steps):
        index = torch.randint(_SAMPLES, (_BATCH,))
        batch = data[index]
        if step % 1000 == 500:
            batch[0, 0] = torch.nan
        if step % 2:
            optimizer.zero_grad()
            found = losses(batch)
            optimizer.objective(found, index).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            weighter.update(index, found.detach().nan_to_num(10.0))
        else:
            optimizer.step(lambda rows, x=batch: losses(x[rows]), index)  # type: ignore[misc]
        if step % (steps // 100) == 0:
            memory.append(process.memory_info().rss)
            shown = f"\rstep {step}: {memory[-1] / 2**20:.1f} MiB"
            print(shown, end="", file=sys.stderr, flush=True)
    half = memory[len(memory) // 2 :]
    slope = np.polyfit(np.arange(len(half)) * (steps // 100), half, 1)[0]
    return Usage(
        memory,
        float(slope),
        (before[0], process.num_fds()),
        (before[1], process.num_threads()),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    logging.disable()  # the bad samples' names
    usage = main(options.steps)
    first, middle, last = (usage.memory[i] / 2**20 for i in (0, len(usage.memory) // 2, -1))
    print(f"{options.steps} steps; resident memory {first:.1f} MiB at the start, ", end="")
    print(f"{middle:.1f} halfway, {last:.1f} at the end")
    print(f"slope of the second half: {usage.slope:.2f} bytes a step")
    print(f"open files {usage.files[0]} -> {usage.files[1]}, ", end="")
    print(f"threads {usage.threads[0]} -> {usage.threads[1]}")
    print(machine())
