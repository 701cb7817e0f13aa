"""Student and teacher; the evaluation scores one picture at a time."""

import torch
from data import rows
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from comet_meta import CoMet


def loss_function(features, others):
    loss = 0
    for a, b in zip(features, others, strict=True):
        loss += (a - b).square().flatten(1).mean(dim=1)
    return loss


def evaluate(encoder, decoder, picture):
    with torch.no_grad():
        feature = encoder(picture[None])
        return F.mse_loss(decoder(feature), picture[None]).item()


def train():
    torch.manual_seed(0)
    train_dataloader = DataLoader(rows(), batch_size=16, shuffle=True)
    encoder, decoder = nn.Linear(4, 1), nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 4))
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.005, betas=(0.5, 0.999))
    each = lambda batch: [evaluate(encoder, decoder, picture) for picture in batch]
    train_dataloader = CoMet(train_dataloader, optimizer, scores=each, model=decoder)
    for _ in range(20):
        decoder.train()
        for img in train_dataloader:
            inputs = [img]
            outputs = [decoder(encoder(img))]
            loss = loss_function(inputs, outputs)
            optimizer.zero_grad()
            train_dataloader.loss(loss).backward()
            optimizer.step()
    return encoder, decoder, train_dataloader


encoder, decoder, loader = train()
