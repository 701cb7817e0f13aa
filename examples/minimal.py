"""The whole loop: an autoencoder for a table in which every tenth row is bad."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from comet_meta import CoMet, RowScorer, SoftConfidentWeighter

torch.manual_seed(0)


def make_rows(number: int, plane: Tensor) -> Tensor:
    """Rows of ten columns near a plane."""
    return torch.randn(number, 3) @ plane + 0.2 * torch.randn(number, 10)


good_plane, bad_plane = torch.randn(3, 10), torch.randn(3, 10)
train_set = torch.cat([make_rows(900, good_plane), make_rows(100, bad_plane)])
good, bad = make_rows(500, good_plane), make_rows(500, bad_plane)  # to test


def train(weighter: SoftConfidentWeighter) -> tuple[nn.Module, CoMet]:
    """An ordinary training loop, but for two lines with ``comet``."""
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 5), nn.Linear(5, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = comet = CoMet(DataLoader(train_set, 50, shuffle=True), optimizer, weighter=weighter)
    for _ in range(20):
        for batch in loader:
            losses = (model(batch) - batch).square().mean(dim=1)  # one per row
            optimizer.zero_grad()
            comet.loss(losses).backward()  # instead of losses.mean().backward()
            optimizer.step()
    return model, comet


@torch.no_grad()
def auroc(model: nn.Module) -> float:
    """How often a bad row has a higher error than a good one."""
    on_good, on_bad = ((model(rows) - rows).square().mean(dim=1) for rows in (good, bad))
    return float((on_bad.unsqueeze(1) > on_good).float().mean())


prior = RowScorer()(train_set)  # ranks the rows before any training
plain, _ = train(SoftConfidentWeighter(len(train_set), contamination=0))  # all weights are 1
robust, comet = train(SoftConfidentWeighter(prior=prior, contamination=0.1))

print(f"AUROC of plain training: {auroc(plain):.3f}")
print(f"AUROC with comet-meta:   {auroc(robust):.3f}")
suspects = comet.suspects(100)  # positions in train_set, the most suspect first
print(f"bad rows among the 100 suspects: {int((suspects >= 900).sum())}")
