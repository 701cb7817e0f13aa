"""What weights cost on very large training sets: fit, update and ranking, in time and memory."""

import argparse
import time
from collections.abc import Callable
from typing import get_args

import numpy as np
import torch

from comet_examples.report import machine, table
from comet_meta import SoftConfidentWeighter
from comet_meta.weights.rules import RuleName
from overhead import peak_bytes

_BATCH = 256


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--rules", nargs="+", choices=get_args(RuleName), default=["trimmed"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine()}; {options.samples} scores, median of {options.repeats}\n")
    print(table([row for rule in options.rules for row in measured(rule, options)]))
    print(f"\nupdate and weights wait for their device: {_waits()}")


def measured(rule: RuleName, options: argparse.Namespace) -> list[dict[str, str | float]]:
    """Rows of the table."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(options.samples, generator=generator)
    scores[: options.samples // 10] += 3
    weighter = SoftConfidentWeighter(options.samples, rule=rule)
    index = torch.randint(options.samples, (_BATCH,), generator=generator)
    batch = scores[index]
    calls: dict[str, Callable[[], object]] = {
        "fit": lambda: weighter.fit(scores),
        f"update, {_BATCH} samples": lambda: weighter.update(index, batch),
        f"weights, {_BATCH} samples": lambda: weighter(index),
        "ranking, first 100": lambda: weighter.ranking(100),
    }
    seconds = {
        name: np.median([_seconds(call) for _ in range(options.repeats)], axis=0)
        for name, call in calls.items()
    }
    return [
        {
            "rule": rule,
            "call": name,
            "milliseconds": f"{1e3 * seconds[name][0]:.3f}",
            "of processor": f"{1e3 * seconds[name][1]:.3f}",
            "peak / memory of the scores": f"{peak_bytes(call, scores.device) / scores.nbytes:.2f}",
        }
        for name, call in calls.items()
    ]


def _seconds(call: Callable[[], object]) -> tuple[float, float]:
    """On the wall, and of all threads of this process."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def _waits() -> str:
    """Whether a call looks at a value: on the meta device, where there are none, that raises."""
    answers = []
    weighter = SoftConfidentWeighter(1000).to("meta")
    index, scores = torch.empty(8, dtype=torch.int64, device="meta"), torch.empty(8, device="meta")
    for name, call in (
        ("update", lambda: weighter.update(index, scores)),
        ("weights", lambda: weighter(index)),
    ):
        try:
            call()
            answers.append(f"{name} no")
        except (RuntimeError, NotImplementedError) as error:
            answers.append(f"{name} yes ({str(error).splitlines()[0]})")
    return ", ".join(answers)


if __name__ == "__main__":
    main()
