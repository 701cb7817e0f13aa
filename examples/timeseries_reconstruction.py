"""A convolutional autoencoder of daily power curves, plain and with CoMet, 10 % wrong season.

Days of the summer half-year in a training set of the winter half-year, a real series: see
``power_demand``.
"""

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from comet_examples.rows import Contamination, Fitted, Weights, main, power_demand
from comet_meta import (
    CoMetOptimizerWrapper,
    IndexedDataset,
    RowScorer,
    SoftConfidentWeighter,
    collect_scores,
)

EPOCHS, WARM_UP = 50, 2


def fit(rows: Tensor, weights: Weights, contamination: Contamination) -> Fitted:
    """Train on series (N, 24)."""
    model = nn.Sequential(
        nn.Unflatten(1, (1, 24)),
        *(nn.Conv1d(1, 8, 5, stride=2, padding=2), nn.ReLU()),  # (B, 8, 12)
        *(nn.Conv1d(8, 8, 5, stride=2, padding=2), nn.ReLU()),  # (B, 8, 6)
        *(nn.Flatten(), nn.Linear(48, 3), nn.Linear(3, 48), nn.Unflatten(1, (8, 6))),
        *(nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.ConvTranspose1d(8, 1, 4, stride=2, padding=1), nn.Flatten()),
    )

    def errors(batch: Tensor) -> Tensor:  # (B, 24)
        return (model(batch) - batch).square()

    def scores(batch: Tensor) -> Tensor:  # (B,); squares have too heavy a tail
        return errors(batch).mean(dim=1).sqrt()

    loader = DataLoader(IndexedDataset(rows), batch_size=32, shuffle=True)  # 1
    prior, part_prior = RowScorer().score_parts(rows) if weights == "prior" else (None, None)
    weighter = None
    if weights != "none":
        weighter = SoftConfidentWeighter(
            len(rows), prior=prior, part_prior=part_prior, contamination=contamination
        )
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    optimizer = CoMetOptimizerWrapper(adam, weighter=weighter)  # 2
    for epoch in range(EPOCHS):
        for index, batch in loader:
            losses = errors(batch)
            if weighter is not None and weighter.has_parts:
                losses = weighter.part_weights(index) * losses  # weights of the hours
            optimizer.zero_grad()
            optimizer.objective(losses.mean(dim=1), index).backward()  # 3: not losses.mean()
            optimizer.step()
        if weighter is not None and epoch + 1 >= WARM_UP:
            weighter.fit(collect_scores(scores, loader))
    return Fitted(scores, weighter)


if __name__ == "__main__":
    try:
        days = power_demand()
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")
    main("autoencoder, winter's power curves, 10 % of the training days from summer", fit, days)
