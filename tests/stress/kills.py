"""Kill trainings with kill -9 at random moments, resume them, and compare the bits.

    python tests/stress/kills.py --kills 200

Each training (SimpleNet on made-up features, a checkpoint after every epoch) is killed at a moment
drawn uniformly from its duration, resumed, killed once more in half of the cases, and resumed to
its end. Detector, optimizers, weights and loss history must then be those of a training that nobody
killed. A training that had ended before its first kill must be, too, but isn't counted as killed.
"""

import os

os.environ["TQDM_DISABLE"] = "1"

import argparse
import hashlib
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from comet_examples.detectors import SimpleNet
from comet_examples.report import machine
from comet_examples.training import FeatureRows, Method, Training, TrainingSettings, train
from comet_meta.vision.files import sole_writer

_EPOCHS = 6
_TOO_LATE = "nothing: it had ended"


def trained(method: Method, file: Path | None) -> Training:
    """A small training, from where the file left it."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 6, 3, 3, generator=generator)
    features[:4] += 4
    return train(
        lambda: SimpleNet([6], (12, 12), hidden=16),
        FeatureRows([features], torch.arange(30)),
        TrainingSettings(method, _EPOCHS, strength=0.001),
        checkpoint=file,
        resume=True,
    )


def digest(training: Training) -> str:
    """Names every bit that a training left behind."""
    found = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            found.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                found.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for part in value:
                add(part)
        else:
            found.update(repr(value).encode())

    detector = cast("nn.Module", training.detector)
    add([detector.state_dict(), training.optimizer.state_dict(), training.history])
    return found.hexdigest()


def in_a_child(body: Callable[[], None], kill_after: float | None = None) -> bool:
    """Whether a process that runs the body lived to its end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code > 0:
        raise RuntimeError("a training failed that wasn't killed")
    return code == 0


def kill_and_resume(method: Method, folder: Path, moments: list[float]) -> tuple[str, str]:
    """Kill a training at some moments of its life and let it end.

    Args:
        method: What to train.
        folder: An empty folder.
        moments: When to kill it, in seconds after each start.

    Returns:
        The digest of the outcome, and what the first kill met.
    """
    file, outcome = folder / "run.pt", folder / "digest"

    def body() -> None:
        with sole_writer(folder):
            outcome.write_text(digest(trained(method, file)))

    met = ""
    for moment in moments:
        if in_a_child(body, moment):
            met = met or _TOO_LATE
            break
        half_written = list(folder.glob("*.partial"))
        met = met or (
            "a checkpoint half written"
            if half_written
            else "a training with a checkpoint"
            if file.exists()
            else "a training without a checkpoint yet"
        )
    in_a_child(body)
    return outcome.read_text(), met


def main(kills: int, seed: int) -> Counter[str]:
    """Kill as many trainings.

    Returns:
        How often a training's first kill met what.

    Raises:
        SystemExit: If a resumed training ended in other bits.
    """
    # A fork takes no thread along, but the locks that they hold; and a process that is killed would
    # keep the lock that tqdm shares among processes.
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    draw = random.Random(seed)
    expected, duration = {}, {}
    for method in get_args(Method):
        trained(method, None)  # warm
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            expected[method] = digest(trained(method, Path(folder) / "run.pt"))
        duration[method] = time.perf_counter() - start
    met: Counter[str] = Counter()
    while (killed := met.total() - met[_TOO_LATE]) < kills:
        method = get_args(Method)[killed % len(get_args(Method))]
        moments = [draw.uniform(0, duration[method]) for _ in range(draw.choice([1, 2]))]
        with tempfile.TemporaryDirectory() as folder:
            found, what = kill_and_resume(method, Path(folder), moments)
        met[what] += 1
        if found != expected[method]:
            raise SystemExit(f"{method} killed after {moments} s ended in other bits")
        print(f"\r{killed + (what != _TOO_LATE)} killed", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return met


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcome = main(options.kills, options.seed)
    for what, count in outcome.most_common():
        print(f"{count:4d} met {what}")
    print(f"all {outcome.total()} resumed trainings ended in the bits of one that nobody killed")
    print(machine())
