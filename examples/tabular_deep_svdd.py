"""Deep SVDD on tabular data, plain and with CoMet, with 10 % wrong digits in the training set.

Each digit in turn is the normal one: see ``digits``.

Ruff et al.: Deep one-class classification, ICML 2018.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from comet_examples.rows import Contamination, Fitted, Weights, digits, main
from comet_meta import (
    CoMetOptimizerWrapper,
    IndexedDataset,
    RowScorer,
    SoftConfidentWeighter,
    collect_scores,
)

EPOCHS, WARM_UP = 30, 2


def fit(rows: Tensor, weights: Weights, contamination: Contamination) -> Fitted:
    """Train on rows (N, D)."""
    # No biases: with them, the network could send all rows to the centre.
    model = nn.Sequential(
        nn.Linear(rows.shape[1], 32, bias=False), nn.LeakyReLU(0.1), nn.Linear(32, 16, bias=False)
    )
    with torch.no_grad():
        centre = model(rows).mean(dim=0)

    def losses(batch: Tensor) -> Tensor:  # (B,): squared distance to the centre
        return (model(batch) - centre).square().sum(dim=1)

    def scores(batch: Tensor) -> Tensor:  # (B,); squares have too heavy a tail
        return losses(batch).sqrt()

    loader = DataLoader(IndexedDataset(rows), batch_size=32, shuffle=True)  # 1
    prior = RowScorer()(rows) if weights == "prior" else None
    weighter = None
    if weights != "none":
        weighter = SoftConfidentWeighter(len(rows), prior=prior, contamination=contamination)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer = CoMetOptimizerWrapper(adam, weighter=weighter)  # 2
    for epoch in range(EPOCHS):
        for index, batch in loader:
            optimizer.zero_grad()
            optimizer.objective(losses(batch), index).backward()  # 3: not losses(batch).mean()
            optimizer.step()
        if weighter is not None and epoch + 1 >= WARM_UP:
            weighter.fit(collect_scores(scores, loader))
    return Fitted(scores, weighter)


if __name__ == "__main__":
    main("Deep SVDD, mean over ten digits, 10 % of the training rows other digits", fit, digits())
