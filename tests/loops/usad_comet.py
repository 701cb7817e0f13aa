"""Two optimizers share the encoder and take turns, each on a loss of its own."""

import torch
from data import rows
from torch import nn
from torch.utils.data import DataLoader
from comet_meta import CoMet


class UsadModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder1, self.decoder2 = (
            nn.Linear(4, 1),
            nn.Linear(1, 4),
            nn.Linear(1, 4),
        )

    def training_step(self, batch, n):
        w1 = self.decoder1(self.encoder(batch))
        w2 = self.decoder2(self.encoder(batch))
        w3 = self.decoder2(self.encoder(w1))
        loss1 = 1 / n * ((batch - w1) ** 2) + (1 - 1 / n) * ((batch - w3) ** 2)
        loss2 = 1 / n * ((batch - w2) ** 2) - (1 - 1 / n) * ((batch - w3) ** 2)
        return loader.loss(loss1), loader.loss(loss2)


def testing(model, batch, alpha=0.5, beta=0.5):
    w1 = model.decoder1(model.encoder(batch))
    w2 = model.decoder2(model.encoder(w1))
    return alpha * ((batch - w1) ** 2).mean(dim=1) + beta * ((batch - w2) ** 2).mean(dim=1)


def training(epochs, model, train_loader):
    optimizer1 = torch.optim.Adam([*model.encoder.parameters(), *model.decoder1.parameters()], 1e-2)
    optimizer2 = torch.optim.Adam([*model.encoder.parameters(), *model.decoder2.parameters()], 1e-2)
    for epoch in range(epochs):
        for batch in train_loader:
            loss1, loss2 = model.training_step(batch, epoch + 1)
            loss1.backward()
            optimizer1.step()
            optimizer1.zero_grad()

            loss1, loss2 = model.training_step(batch, epoch + 1)
            loss2.backward()
            optimizer2.step()
            optimizer2.zero_grad()


torch.manual_seed(0)
model = UsadModel()
loader = DataLoader(rows(), batch_size=16, shuffle=True)
loader = CoMet(loader, scores=lambda batch: testing(model, batch), model=model)
training(8, model, loader)
