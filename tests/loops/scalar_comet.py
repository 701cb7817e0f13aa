"""The loss is a scalar, made out of reach: only the loader's construction can be changed."""

import torch
from data import rows
from torch import nn
from torch.utils.data import DataLoader
from comet_meta import ConfidenceSampler, MemoryScorer, SoftConfidentWeighter


class Package:
    """Somebody else's code."""

    def fit(self, loader, epochs=20):
        self.model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4))
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        for _ in range(epochs):
            for batch in loader:
                optimizer.zero_grad()
                nn.functional.mse_loss(self.model(batch), batch).backward()
                optimizer.step()


torch.manual_seed(0)
data = rows()
weighter = SoftConfidentWeighter(prior=MemoryScorer()(data))
loader = DataLoader(data, batch_size=16, sampler=ConfidenceSampler(weighter))
package = Package()
package.fit(loader)
