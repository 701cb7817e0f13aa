"""What batch norm makes of samples of weight 0: in the batch, left out of it, or never drawn.

    python benchmarks/quality/batch_norm.py --seeds 10

Rows on a plane, of which 20 % lie beside it; an autoencoder with batch norm; weights known, so that
nothing but the way they are used differs. The figure is the AUROC of new rows on the plane against
new rows beside it, in eval mode, and the training time.
"""

import argparse
import statistics
import time

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader

from comet_meta import CoMet, ConfidenceSampler, SoftConfidentWeighter

N, FEATURES, BAD = 512, 16, 0.2
WAYS = ("plain", "weighted", "left out", "drawn", "clean")


def rows(bad: Tensor, seed: int) -> Tensor:
    """Rows (len(bad), F): on a plane, or where ``bad`` beside it and larger."""
    basis = torch.randn(2, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    good = torch.randn(len(bad), 2, generator=generator) @ basis
    beside = 4 + 2 * torch.randn(len(bad), FEATURES, generator=generator)
    noise = 0.2 * torch.randn(len(bad), FEATURES, generator=generator)
    return torch.where(bad[:, None], beside, good) + noise


def new_rows(seed: int) -> tuple[Tensor, Tensor]:
    """Rows on the plane and rows a little beside it, and which is which."""
    good = rows(torch.zeros(2000, dtype=torch.bool), seed + 1000)
    off = torch.arange(2000) % 2 == 1
    shift = torch.randn(2000, FEATURES, generator=torch.Generator().manual_seed(seed + 2000))
    return torch.where(off[:, None], good + 0.5 * shift, good), off


def run(way: str, seed: int, epochs: int) -> tuple[float, float]:
    """AUROC and seconds of one training."""
    bad = torch.arange(N) < BAD * N
    data = rows(bad, seed)
    if way == "clean":
        data, bad = data[~bad], bad[~bad]
    weights = torch.ones(len(bad)) if way == "plain" else (~bad).float()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(FEATURES, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2),
        nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, FEATURES),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def losses(batch: Tensor) -> Tensor:
        errors: Tensor = (model(batch) - batch).square().mean(dim=1)
        return errors

    weighter = SoftConfidentWeighter(len(data), rule=lambda _: weights)
    weighter.fit(torch.arange(float(len(data))))
    sampler = ConfidenceSampler(weights) if way == "drawn" else None
    loader: DataLoader[Tensor] = DataLoader(
        data,  # type: ignore[arg-type]
        batch_size=16,
        shuffle=sampler is None,
        sampler=sampler,
    )
    comet = CoMet(loader, optimizer, weighter=weighter, warm_up=epochs + 1)
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in comet if way in ("weighted", "left out") else loader:
            optimizer.zero_grad()
            if way == "weighted":
                loss = comet.loss(losses(batch))
            elif way == "left out":
                loss = comet.loss(lambda rows: losses(batch[rows]))  # noqa: B023
            else:
                loss = losses(batch).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    seconds = time.perf_counter() - start
    test, off = new_rows(seed)
    model.eval()
    with torch.no_grad():
        return float(roc_auc_score(off, losses(test))), seconds


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'way':>10}  AUROC (sd)      seconds")
    for way in WAYS:
        results = [run(way, seed, arguments.epochs) for seed in range(arguments.seeds)]
        figures, seconds = zip(*results, strict=True)
        spread = statistics.stdev(figures) if len(figures) > 1 else 0.0
        print(
            f"{way:>10}  {statistics.mean(figures):.4f} ({spread:.4f})  "
            f"{statistics.median(seconds):.2f}"
        )


if __name__ == "__main__":
    main()
