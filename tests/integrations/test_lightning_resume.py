"""Trainings that resume or go on keep their weights; those on other data start fresh."""

import pytest
import torch
from lightning_training import (
    BATCH,
    DATA,
    EPOCHS,
    Module,
    N,
    assert_same,
    callback,
    fit,
    loader,
)
from torch.utils.data import DataLoader, Dataset

from comet_meta import IndexedDataset
from comet_meta.integrations.lightning import CoMetCallback

pl = pytest.importorskip("lightning.pytorch", reason='needs pip install "comet-meta[lightning]"')

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402


class Resumable(DataLoader):
    """Knows how far its epoch has come, which Lightning needs to resume in the middle of one."""

    done = 0

    def __iter__(self):
        start = self.done
        for k, batch in enumerate(super().__iter__()):
            if k >= start:
                self.done = (k + 1) % len(self)
                yield batch

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state_dict):
        self.done = state_dict["done"]


@pytest.mark.parametrize("meta", ["none", "mldg"])
@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_train_steps": 6}])
def test_resume_from_a_checkpoint_is_exact(tmp_path, meta, every):
    whole, weights = Module(), callback(meta=meta)
    checkpoints = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, **every)
    data = Resumable(IndexedDataset(DATA), batch_size=BATCH)
    fit(whole, weights, data=data, callbacks=[checkpoints], enable_checkpointing=True)
    # By epochs: after the third of four; by steps: in the middle of the second epoch.
    path = sorted(tmp_path.glob("*.ckpt"))[2 if "every_n_epochs" in every else 0]

    torch.manual_seed(99)
    resumed, again = Module(), callback(meta=meta)
    data = Resumable(IndexedDataset(DATA), batch_size=BATCH)
    trainer = fit(resumed, again, data=data, ckpt_path=path)
    assert trainer.current_epoch == EPOCHS
    assert_same(resumed, whole.net)
    assert torch.equal(again.weighter.scores, weights.weighter.scores)
    assert torch.equal(again.regularizer.pairs, weights.regularizer.pairs)


class Files(Dataset):
    """Rows with the names of files."""

    def __init__(self, names: list[str]) -> None:
        self.samples = [(name, 0) for name in names]

    def __len__(self) -> int:
        return N

    def __getitem__(self, k: int) -> torch.Tensor:
        return DATA[k]


def test_a_checkpoint_is_refused_after_a_file_was_renamed(tmp_path):
    names = [f"/pictures/{k:02}.png" for k in range(N)]
    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(Module(), callback(), data=loader(Files(names)), callbacks=[saving],
        enable_checkpointing=True)  # fmt: skip
    moved = [name.replace("/pictures", "/moved/pictures") for name in names]
    again = callback()
    fit(Module(), again, data=loader(Files(moved)), epochs=5, ckpt_path=tmp_path / "last.ckpt")
    assert again.weighter().min() == 0
    names[7] = "/pictures/zebra.png"
    with pytest.raises(ValueError, match="the weights belong to other samples"):
        fit(Module(), callback(), data=loader(Files(names)), epochs=5,
            ckpt_path=tmp_path / "last.ckpt")  # fmt: skip


@pytest.mark.parametrize("own", [True, False])
def test_one_callback_over_two_data_sets_starts_fresh(own):
    first = callback() if own else CoMetCallback()
    seen = []

    class Watches(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 0:
                seen.append((first.weighter().min(), first.weighter.scores.isnan().all()))

    for rows in (DATA, DATA.flip(0)):
        fit(Module(), first, data=loader(rows), callbacks=[Watches()])
        assert first.weighter().min() < 1
    assert [(float(weight), bool(unknown)) for weight, unknown in seen] == [(1, True)] * 2
    if not own:  # also of another size
        fit(Module(), first, data=loader(DATA[:18]))
        assert len(first.weighter.scores) == 18


def test_a_trainer_that_goes_on_keeps_the_weights():
    module, comet = Module(), callback()
    trainer = fit(module, comet)
    weights = comet.weighter().clone()
    trainer.fit_loop.max_epochs = EPOCHS + 1
    comet.warm_up = 9  # fits no more
    trainer.fit(module, loader())
    assert torch.equal(comet.weighter(), weights)
