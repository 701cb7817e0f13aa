"""Steps, not epochs, on an endless stream of batches."""

import torch
from data import rows
from torch import nn
from torch.utils.data import DataLoader
from comet_meta import CoMet


def endless(loader):
    while True:
        yield from loader


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
loader = DataLoader(rows(), batch_size=16, shuffle=True, drop_last=True)
loader = CoMet(loader, optimizer, warm_up=2, every=20)
batches = endless(loader)
for step in range(300):
    batch = next(batches)
    losses = (model(batch) - batch).square()
    loss = loader.loss(losses)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
