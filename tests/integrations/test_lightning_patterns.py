"""Patterns of Lightning's own tests of callbacks and checkpoints, with the CoMet callback in place.

With weights that are all 1 the module must come out as it does without the callback.
"""

import pytest
import torch
from lightning_training import BATCH, DATA, Module, fit, loader
from torch.utils.data import DataLoader

pl = pytest.importorskip("lightning.pytorch", reason='needs pip install "comet-meta[lightning]"')

from lightning.pytorch.callbacks import (  # noqa: E402
    BaseFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from comet_meta import SoftConfidentWeighter  # noqa: E402
from comet_meta.integrations.lightning import CoMetCallback  # noqa: E402


class Thaws(BaseFinetuning):
    """Adds a group to the optimizer in the middle of the training."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net.body[3])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.body[3], optimizer)


class Scheduled(Module):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
                "monitor": "train_loss",
            },
        }


PATTERNS = {
    "early stopping": lambda: {"callbacks": [EarlyStopping("train_loss", patience=1)]},
    "weight averaging": lambda: {"callbacks": [StochasticWeightAveraging(0.01, 0.5)]},
    "accumulation by schedule": lambda: {
        "callbacks": [GradientAccumulationScheduler({0: 1, 2: 2})]
    },
    "a group added later": lambda: {"callbacks": [Thaws()]},
    "clipping by value": lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "fast_dev_run": lambda: {"fast_dev_run": 2},
    "overfit_batches": lambda: {"overfit_batches": 2},
    "max_steps": lambda: {"max_steps": 7},
    "double precision": lambda: {"precision": "64-true"},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_unit_weights_train_as_without_the_callback(name):
    trained = []
    for ones in (None, CoMetCallback(SoftConfidentWeighter(len(DATA), rule=torch.ones_like))):
        module = Scheduled()
        data = DataLoader(DATA, batch_size=BATCH) if ones is None else loader()
        fit(module, ones, data=data, **PATTERNS[name]())
        trained.append(module.state_dict())
    for key, value in trained[0].items():
        torch.testing.assert_close(trained[1][key], value, rtol=0, atol=0)


def test_the_state_of_callbacks_is_saved_side_by_side(tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, monitor="train_loss", save_last=True)
    comet = CoMetCallback(SoftConfidentWeighter(len(DATA), rule="hard"))
    fit(Module(), comet, callbacks=[saving], enable_checkpointing=True)
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert comet.state_key in states
    assert torch.equal(states[comet.state_key]["weighter"]["weights"], comet.weighter())
    assert len(states) == 2


def test_the_learning_rate_is_logged_and_the_best_model_found(tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, monitor="train_loss")
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(
        Scheduled(), CoMetCallback(), callbacks=[saving, LearningRateMonitor()],
        enable_checkpointing=True, logger=logger, log_every_n_steps=1,
    )  # fmt: skip
    assert saving.best_model_path
    Module.load_from_checkpoint(saving.best_model_path)
