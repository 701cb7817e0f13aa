"""Runs a snippet of docs/integrations/distributed.md in one of two processes."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from snippets import run

PAGE = "docs/integrations/distributed.md"


class Autoencoder(nn.Module):
    """Losses (B,) of samples (B, 4), which lie on a line where they are good."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) - x).square().mean(dim=1)


def namespace() -> dict:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(400, 1, generator=generator) * torch.tensor([1.0, 2.0, -1.0, 0.5])
    data += 0.1 * torch.randn(400, 4, generator=generator)
    data[:20] = 3 * torch.randn(20, 4, generator=generator)
    names = {"torch": torch, "train_set": data, "model": Autoencoder()}
    return names | {"epochs": 20, "warm_up": 10}


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    space = namespace()
    if names != ["accelerate"]:
        dist.init_process_group("gloo")
    space["path"] = folder / "checkpoint.pt"
    for name in names:
        run(PAGE, name, space)
    if "accelerator" in space:
        space["accelerator"].save_state(folder / "state")
    weighter = space["weighter"]
    found = {"weights": weighter(), "scores": weighter.scores, "suspects": weighter.ranking(20)}
    found["parameters"] = [
        p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
        for p in space["model"].parameters()
    ]
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
