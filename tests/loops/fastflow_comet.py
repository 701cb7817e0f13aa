"""The model's forward returns its loss, and the loader drops its last batch."""

import torch
from data import rows
from torch import nn
from torch.utils.data import DataLoader
from comet_meta import CoMet


class FastFlow(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(4))
        self.mix = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))

    def forward(self, x):
        ret = {}
        output = self.mix(x) * self.scale.exp()
        log_jac_det = self.scale.sum()
        loss = 0.5 * torch.sum(output**2, dim=1) - log_jac_det
        ret["loss"] = loss
        if not self.training:
            ret["anomaly_map"] = output.square().sum(dim=1)
        return ret


def train_one_epoch(dataloader, model, optimizer):
    model.train()
    for data in dataloader:
        ret = model(data)
        loss = dataloader.loss(ret["loss"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


torch.manual_seed(0)
model = FastFlow()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-5)
loader = DataLoader(rows(), batch_size=32, shuffle=True, drop_last=True)
loader = CoMet(loader, optimizer, scores=lambda x: model(x)["anomaly_map"], model=model, warm_up=5)
for _ in range(30):
    train_one_epoch(loader, model, optimizer)
