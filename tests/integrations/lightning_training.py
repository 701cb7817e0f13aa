"""A small training under Lightning's Trainer, and the same one as a plain loop."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from comet_meta import (
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    IndexedDataset,
    SoftConfidentWeighter,
    collect_scores,
)

pl = pytest.importorskip("lightning.pytorch", reason='needs pip install "comet-meta[lightning]"')

from comet_meta.integrations.lightning import CoMetCallback  # noqa: E402

N, BATCH, EPOCHS = 30, 8, 4
GENERATOR = torch.Generator().manual_seed(0)
DATA = torch.cat([torch.randn(24, 4, generator=GENERATOR), torch.full((6, 4), 4.0)])


class Net(nn.Module):
    """A small autoencoder with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4))

    def losses(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) - x).square().mean(dim=1)


class Module(pl.LightningModule):
    """Automatic optimisation; trains also without the callback."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_idx):
        assert isinstance(batch, torch.Tensor)
        losses = self.net.losses(batch)
        self.log("train_loss", losses.mean())
        return {"loss": losses.mean(), "losses": losses}

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), lr=0.02)


class Manual(Module):
    """Two optimizers that take turns, each with its own half of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.net.losses(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        encoder, decoder = self.net.body[0], self.net.body[3]
        return [torch.optim.Adam(part.parameters(), lr=0.02) for part in (encoder, decoder)]


class Evaluated(Module):
    """Sees rows in every step, and asks for the learning rate and the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.02, 4
        self.seen: list[str] = []

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(IndexedDataset(DATA), batch_size=self.batch_size)

    def validation_step(self, batch, batch_idx):
        assert batch.shape[1:] == (4,)
        self.seen.append("validation")

    def test_step(self, batch, batch_idx):
        assert batch.shape[1:] == (4,)
        self.seen.append("test")

    def predict_step(self, batch, batch_idx):
        return self.net.losses(batch)


def loader(dataset: Dataset | torch.Tensor = DATA, **settings) -> DataLoader:
    return DataLoader(IndexedDataset(dataset), batch_size=BATCH, **settings)


def fit(module: pl.LightningModule, callback=None, *, data=None, epochs=EPOCHS, **settings):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    callbacks = [] if callback is None else [callback]
    callbacks += settings.pop("callbacks", [])
    path = settings.pop("ckpt_path", None)
    trainer = pl.Trainer(**(quiet | settings), callbacks=callbacks, max_epochs=epochs)
    trainer.fit(module, loader() if data is None else data, ckpt_path=path)
    return trainer


def quiet(callback: CoMetCallback, folder: Path, **settings) -> "pl.Trainer":
    return pl.Trainer(
        callbacks=[callback], max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        default_root_dir=folder, **settings,
    )  # fmt: skip


def scores_of(module: Module, batch: torch.Tensor) -> torch.Tensor:
    assert not module.training
    return module.net.losses(batch)


def callback(**settings) -> CoMetCallback:
    settings = {"scores": scores_of, "warm_up": 2} | settings
    weighter = settings.pop("weighter", SoftConfidentWeighter(N, rule="hard"))
    return CoMetCallback(weighter, CovarianceMetaRegularizer(), **settings)


def by_hand(step, *, optimizers=None, scores=True, **settings) -> Net:
    """The same training as a plain loop; ``step(comet, net, index, batch)`` is one of its steps."""
    net = Net()
    weighter = SoftConfidentWeighter(N, rule="hard")
    comet = CoMetOptimizerWrapper(
        torch.optim.Adam(net.parameters(), lr=0.02) if optimizers is None else optimizers(net),
        weighter=weighter,
        regularizer=CovarianceMetaRegularizer(),
        **({"meta": "none", "model": net} | settings),
    )
    for epoch in range(EPOCHS):
        net.train()
        for index, batch in loader():
            step(comet, net, index, batch)
        if epoch + 1 >= 2 and scores:
            net.eval()
            weighter.fit(collect_scores(net.losses, loader()))
    assert weighter().min() == 0  # the weights must have had a say
    return net


def assert_same(module: Module, net: Net, **tolerance) -> None:
    ours, theirs = module.net.state_dict(), net.state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **({"rtol": 0, "atol": 0} | tolerance))
