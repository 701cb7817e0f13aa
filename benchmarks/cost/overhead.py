"""What confident meta-learning adds to a training step, in time and memory.

Steps that are compared run next to each other, in an order that changes from round to round, and
what counts is the median of the ratios within rounds: load on the machine hits both sides alike.
Ratios of processor time (all threads of this process) stand beside those of time on the wall: they
hold on a busy machine too, if idle threads don't spin (``OMP_WAIT_POLICY=passive``).

A full step is held against two things: a plain step, and its own floor, which is the
forward and backward passes that the method is made of (inner steps on the support rows, then the
query rows; forward only for reptile) and the one update of the outer optimizer.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cases import CASES, NUM_SAMPLES, Case
from comet_examples.report import machine, table
from comet_meta import (
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    MetaStep,
    SoftConfidentWeighter,
)
from comet_meta.meta.step import MetaMode
from comet_meta.tasks import split_tasks

Step = Callable[[], object]


class Times(NamedTuple):
    """Seconds of a step in each round, shape (rounds,).

    Attributes:
        wall: On the wall.
        processor: Used by all threads of this process.
    """

    wall: np.ndarray
    processor: np.ndarray


def main() -> None:
    """Measure and print."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"{machine()}; medians [quartiles] of {options.rounds} rounds")
    for name in options.cases:
        print(f"\n### {name}: {(CASES[name].__doc__ or '').splitlines()[0]}\n", flush=True)
        rows = [drop_in(name, device, options.rounds, penalty) for penalty in (False, True)]
        for mode, k in itertools.product(options.modes, options.inner_steps):
            if mode != "none" or k == 1:  # it has no inner steps
                rows.append(full(name, device, options.rounds, mode, k))
        print(table(rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--modes", nargs="+", default=["none", "mldg", "fomaml", "reptile"])
    parser.add_argument("--inner-steps", nargs="+", type=int, default=[1, 3, 5])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def drop_in(name: str, device: torch.device, rounds: int, penalty: bool) -> dict[str, str | float]:
    """A row of the table: objective, backward and step against a plain step."""
    steps = [plain_step(build(name, device)), drop_in_step(build(name, device), penalty)]
    plain, ours = interleaved(steps, rounds, device)
    return {
        "step": "drop-in with penalty" if penalty else "drop-in",
        **columns(plain, ours, None),
        "extra memory": extra_memory(steps, build(name, device), device),
    }


def full(
    name: str, device: torch.device, rounds: int, mode: MetaMode, inner_steps: int
) -> dict[str, str | float]:
    """A row of the table: the full step against a plain step and against its floor."""
    steps = [
        plain_step(build(name, device)),
        full_step(build(name, device), mode, inner_steps),
        floor_step(build(name, device), mode, inner_steps),
    ]
    return {
        "step": mode if mode == "none" else f"{mode}, K = {inner_steps}",
        **columns(*interleaved(steps, rounds, device)),
        "extra memory": extra_memory(steps, build(name, device), device),
    }


def columns(plain: Times, ours: Times, floor: Times | None) -> dict[str, str | float]:
    """The ratios of a row."""
    return {
        "plain, ms": f"{1e3 * np.median(plain.wall):.0f}",
        "/ plain": quartiles(ours.wall / plain.wall),
        "/ floor": "" if floor is None else quartiles(ours.wall / floor.wall),
        "processor / plain": quartiles(ours.processor / plain.processor),
        "processor / floor": "" if floor is None else quartiles(ours.processor / floor.processor),
        "floor / plain": ""
        if floor is None
        else f"{np.median(floor.processor / plain.processor):.2f}",
    }


def build(name: str, device: torch.device) -> Case:
    """The same case every time."""
    torch.manual_seed(0)
    return CASES[name](device)


def plain_step(case: Case) -> Step:
    """What a loop without the library does."""
    rows = torch.arange(len(case.index), device=case.index.device)

    def step() -> None:
        for optimizer in case.optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(case.losses(rows).mean())
        for optimizer in case.optimizers:
            optimizer.step()

    return step


def drop_in_step(case: Case, penalty: bool) -> Step:
    """Level 1 of the library."""
    device = case.index.device
    rows = torch.arange(len(case.index), device=device)
    optimizer = CoMetOptimizerWrapper(
        case.optimizers,
        weighter=fitted_weighter(device),
        regularizer=CovarianceMetaRegularizer(1e-4).to(device) if penalty else None,
    )

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(optimizer.objective(case.losses(rows), case.index))
        optimizer.step()

    return step


def full_step(case: Case, mode: MetaMode, inner_steps: int) -> Step:
    """Level 2 of the library."""
    optimizer = CoMetOptimizerWrapper(
        case.optimizers,
        weighter=fitted_weighter(case.index.device),
        meta=MetaStep(mode, inner_steps=inner_steps),
        model=case.model,
    )

    def step() -> None:
        optimizer.step(case.losses, case.index)

    return step


def floor_step(case: Case, mode: MetaMode, inner_steps: int) -> Step:
    """The passes that the method is made of, and the outer update, without anything in between."""
    (task,) = split_tasks(len(case.index), 1, 0.3, torch.Generator().manual_seed(0))
    support, query = (rows.to(case.index.device) for rows in task)
    every = torch.arange(len(case.index), device=case.index.device)

    def passed(rows: Tensor) -> None:
        for optimizer in case.optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(case.losses(rows).mean())

    def step() -> None:
        for _ in range(0 if mode == "none" else inner_steps):
            passed(support)
        if mode == "none":
            passed(every)
        elif mode == "reptile":
            with torch.no_grad():
                case.losses(query)
        else:
            passed(query)
        for optimizer in case.optimizers:
            optimizer.step()

    return step


def fitted_weighter(device: torch.device) -> SoftConfidentWeighter:
    """Weights that differ from sample to sample."""
    weighter = SoftConfidentWeighter(NUM_SAMPLES, rule=lambda scores: 1 - scores / scores.max())
    weighter.fit(torch.arange(float(NUM_SAMPLES)))
    return weighter.to(device)


def interleaved(
    steps: Sequence[Step], rounds: int, device: torch.device, warm_up: int = 3
) -> list[Times]:
    """Times of each step in each round."""
    seconds = np.empty((len(steps), 2, rounds))
    for step in steps:
        for _ in range(warm_up):
            step()
    for number in range(rounds):
        order = np.roll(np.arange(len(steps)), number)
        for which in order if number % 2 else order[::-1]:
            synchronize(device)
            wall, processor = time.perf_counter(), time.process_time()
            steps[which]()
            synchronize(device)
            seconds[which, :, number] = (
                time.perf_counter() - wall,
                time.process_time() - processor,
            )
    return [Times(*own) for own in seconds]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_memory(steps: Sequence[Step], case: Case, device: torch.device) -> str:
    """Peak of the second step above the first's, in copies of the trained parameters."""
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    plain, ours = (peak_bytes(step, device) for step in steps[:2])
    return f"{(ours - plain) / sum(p.nbytes for p in parameters):+.2f}"


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most bytes that tensors take during a step, above what they take before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # what other steps have left would count as freed by this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(changes)]).max())


def quartiles(ratios: np.ndarray) -> str:
    """``median [lower quartile, upper quartile]``."""
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return f"{median:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
