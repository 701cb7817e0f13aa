"""Patch losses of a discriminator on features with noise; two optimizers; nested methods."""

import torch
from data import rows
from torch import nn
from torch.utils.data import DataLoader
from comet_meta import CoMet


class Bags:
    """A data set of pictures of four patches, with an attribute that the loop reads."""

    imagesize = 4

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.rows = rows()[:, None] + 0.05 * torch.randn(256, 4, 4, generator=generator)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, position):
        return {"image": self.rows[position], "is_anomaly": 0}


class SimpleNet:
    def __init__(self):
        self.adaptor = nn.Linear(4, 4)
        self.discriminator = nn.Sequential(
            nn.Linear(4, 32), nn.BatchNorm1d(32), nn.LeakyReLU(0.2), nn.Linear(32, 1, bias=False)
        )
        self.adaptor_opt = torch.optim.AdamW(self.adaptor.parameters(), lr=1e-3)
        self.discriminator_opt = torch.optim.Adam(self.discriminator.parameters(), lr=5e-3)

    def predict(self, batch):
        patches = self.adaptor(batch["image"].flatten(0, 1))
        return -self.discriminator(patches).view(len(batch["image"]), -1).amax(dim=1)

    def train(self, training_data):
        print("pictures of", training_data.dataset.imagesize)
        for _ in range(30):
            self.train_discriminator(training_data)

    def train_discriminator(self, input_data):
        self.adaptor.train()
        self.discriminator.train()
        for data_item in input_data:
            self.adaptor_opt.zero_grad()
            self.discriminator_opt.zero_grad()
            true_feats = self.adaptor(data_item["image"].flatten(0, 1))
            fake_feats = true_feats + 0.5 * torch.randn_like(true_feats)
            scores = self.discriminator(torch.cat([true_feats, fake_feats]))
            true_scores, fake_scores = scores.chunk(2)
            true_loss = torch.clip(0.5 - true_scores, min=0)
            fake_loss = torch.clip(0.5 + fake_scores, min=0)
            loss = input_data.loss(true_loss[:, 0] + fake_loss[:, 0])
            loss.backward()
            self.adaptor_opt.step()
            self.discriminator_opt.step()


torch.manual_seed(0)
loader = DataLoader(Bags(), batch_size=16, shuffle=True, drop_last=True)
net = SimpleNet()
parts = [net.adaptor, net.discriminator]
loader = CoMet(loader, net.adaptor_opt, scores=net.predict, model=parts, warm_up=8)
net.train(loader)
