"""What the anomalib callback costs: CPU time of a training step with weights and without.

``by="losses"`` evaluates the loss module sample by sample. The network's weights are random, which
changes no time. Needs the extra ``anomalib``.

    python benchmarks/cost/anomalib_cost.py --batch 8 --steps 10
"""

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import anomalib.models as models
import timm
import torch

from comet_meta import CoMetOptimizerWrapper, SoftConfidentWeighter
from comet_meta.integrations.anomalib import CoMetCallback, _loss_modules

SETTINGS: dict[str, dict[str, Any]] = {
    "Fastflow": {"pre_trained": False},
    "Stfpm": {},
    "ReverseDistillation": {"pre_trained": False, "backbone": "resnet18"},
    "Supersimplenet": {"backbone": "resnet18"},
}


def weighted(model: Any, size: int) -> CoMetCallback:
    """A callback as it is in training, every sample with weight 1/2."""
    comet = CoMetCallback(SoftConfidentWeighter(size, rule=lambda scores: scores * 0 + 0.5))
    assert comet.weighter is not None
    comet.weighter.fit(torch.arange(8 + size).float()[:size])
    comet._positions = torch.arange(size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    comet._comet = CoMetOptimizerWrapper(
        torch.optim.SGD(parameters, lr=0.0), weighter=comet.weighter, meta="none"
    )
    for loss in _loss_modules(model):
        loss.register_forward_hook(comet._weigh, with_kwargs=True)
    return comet


def step(model: Any, batch: Any) -> float:
    """CPU seconds of one forward and backward pass."""
    start = time.process_time()
    model.training_step(batch)["loss"].backward()
    seconds = time.process_time() - start
    model.zero_grad()
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    build = timm.create_model
    timm.create_model = lambda *args, **settings: build(*args, **(settings | {"pretrained": False}))

    print("| model | plain, s | with weights | ratio (quartiles) |\n|---|---|---|---|")
    for name, settings in SETTINGS.items():
        torch.manual_seed(0)
        pair = []
        for comet in (False, True):
            model = getattr(models, name)(evaluator=False, visualizer=False, **settings)
            model.log = lambda *_, **__: None
            model.train()
            if comet:
                weighted(model, options.batch)
            pair.append(model)
        images = torch.randn(options.batch, 3, options.size, options.size)
        batch = SimpleNamespace(
            image=images, gt_mask=None, gt_label=torch.zeros(options.batch, dtype=torch.bool)
        )
        times = [[step(model, batch) for model in pair] for _ in range(options.steps + 1)][1:]
        ratios = [ours / plain for plain, ours in times]
        low, middle, high = statistics.quantiles(ratios, n=4)
        plain, ours = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {plain:.2f} | {ours:.2f} | {middle:.3f} ({low:.3f}-{high:.3f}) |")


if __name__ == "__main__":
    main()
