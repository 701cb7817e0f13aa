"""An autoencoder of tabular data, plain and with CoMet, on tumours of which 10 % are mislabelled.

Rows of malignant tumours in a training set of benign ones: see ``breast_cancer``.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from comet_examples.rows import Contamination, Fitted, Weights, breast_cancer, main
from comet_meta import (
    CoMetOptimizerWrapper,
    IndexedDataset,
    RowScorer,
    SoftConfidentWeighter,
    collect_scores,
)

EPOCHS, WARM_UP = 50, 2


def fit(rows: Tensor, weights: Weights, contamination: Contamination) -> Fitted:
    """Train on rows (N, D)."""
    dim = rows.shape[1]
    model = nn.Sequential(
        *(nn.Linear(dim, 16), nn.ReLU(), nn.Linear(16, 4)),
        *(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, dim)),
    )

    def errors(batch: Tensor) -> Tensor:  # (B, D)
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
                losses = weighter.part_weights(index) * losses  # weights of the columns
            optimizer.zero_grad()
            optimizer.objective(losses.mean(dim=1), index).backward()  # 3: not losses.mean()
            optimizer.step()
        if weighter is not None and epoch + 1 >= WARM_UP:
            weighter.fit(collect_scores(scores, loader))
    return Fitted(scores, weighter)


if __name__ == "__main__":
    main("autoencoder, breast cancer, 10 % of the training rows malignant", fit, breast_cancer())
