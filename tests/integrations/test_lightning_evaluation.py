"""Validation, tests, predictions and the Tuner, with the callback in place."""

import pytest
import torch
from lightning_training import DATA, Evaluated, N, quiet
from torch.utils.data import DataLoader

from comet_meta import IndexedDataset
from comet_meta.integrations.lightning import CoMetCallback

pl = pytest.importorskip("lightning.pytorch", reason='needs pip install "comet-meta[lightning]"')


@pytest.mark.parametrize("dataset", [IndexedDataset(DATA), DATA], ids=["indexed", "plain"])
def test_evaluation_on_an_indexed_loader_or_a_plain_one(tmp_path, dataset):
    module = Evaluated()
    trainer = quiet(CoMetCallback(), tmp_path)
    rows = DataLoader(dataset, batch_size=8)
    trainer.fit(module, val_dataloaders=rows)
    trainer.validate(module, rows, verbose=False)
    trainer.test(module, rows, verbose=False)
    assert {"validation", "test"} == set(module.seen)
    assert torch.cat(trainer.predict(module, rows)).shape == (N,)
    assert "validation_step" not in vars(module)


class Tuned(Evaluated):
    dataset = DATA  # the Tuner's trial runs leave the callbacks out

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(DATA, batch_size=8)


def test_the_tuner_scales_the_batch_before_the_training(tmp_path):
    from lightning.pytorch.tuner import Tuner

    module, callback = Tuned(), CoMetCallback()
    trainer = quiet(callback, tmp_path)
    Tuner(trainer).scale_batch_size(module, max_trials=3, steps_per_trial=2)
    assert module.batch_size == 8  # from 2, doubled
    module.dataset = IndexedDataset(DATA)
    quiet(callback, tmp_path).fit(module)
    assert callback.weighter.scores.isfinite().all()


def test_the_tuner_finds_the_same_learning_rate_with_and_without_the_callback(tmp_path):
    from lightning.pytorch.tuner import Tuner

    callback = CoMetCallback()
    modules = [Tuned(), Tuned()]
    trainers = [quiet(callback, tmp_path), quiet(pl.Callback(), tmp_path)]
    found = []
    for module, trainer in zip(modules, trainers, strict=True):
        before = [p.clone() for p in module.parameters()]
        finder = Tuner(trainer).lr_find(module, num_training=40, early_stop_threshold=None)
        found.append(finder.suggestion())
        assert module.lr == found[-1]
        assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert found[0] == found[1]
    assert 1e-8 < found[0] < 1
    modules[0].dataset = IndexedDataset(DATA)
    trainers[0].fit(modules[0])  # the same trainer goes on to train
    assert callback.weighter.scores.isfinite().all()
    assert float(callback.weighter.weights.min()) < 1


@pytest.mark.parametrize("what", ["lr_find", "scale_batch_size"])
def test_the_tuner_on_an_indexed_loader(tmp_path, what):
    from lightning.pytorch.tuner import Tuner

    class Tuned(Evaluated):
        def val_dataloader(self):
            return DataLoader(IndexedDataset(DATA), batch_size=8)

    module, comet = Tuned(), CoMetCallback()
    trainer = quiet(comet, tmp_path)
    if what == "lr_find":
        found = Tuner(trainer).lr_find(module, num_training=30, early_stop_threshold=None)
        assert 0 < found.suggestion() < 1
    else:
        assert Tuner(trainer).scale_batch_size(module, max_trials=3, steps_per_trial=1) == 8
    assert "training_step" not in vars(module)
    trainer.fit(module)
    assert comet.weighter.scores.isfinite().any()
