"""What users of the callback get wrong, and the module as it was after an error."""

import pytest
from lightning_training import BATCH, DATA, Manual, Module, callback, fit, loader
from torch.utils.data import DataLoader

pl = pytest.importorskip("lightning.pytorch", reason='needs pip install "comet-meta[lightning]"')


class TestErrors:
    """Each says what to change."""

    def test_a_scalar_loss(self):
        class Scalar(Module):
            def training_step(self, batch, batch_idx):
                return self.net.losses(batch).mean()

        with pytest.raises(ValueError, match=r'"losses": losses'):
            fit(Scalar(), callback())

    def test_scalars_in_manual_optimisation(self):
        class Scalars(Manual):
            def manual_backward(self, loss):
                super().manual_backward(loss.mean())

            def training_step(self, batch, batch_idx):
                self.manual_backward(self.net.losses(batch).mean())

        with pytest.raises(ValueError, match="manual_backward"):
            fit(Scalars(), callback())

    def test_no_positions(self):
        with pytest.raises(TypeError, match="IndexedDataset"):
            fit(Module(), callback(), data=DataLoader(DATA, batch_size=BATCH))

    def test_several_loaders(self):
        with pytest.raises(TypeError, match="one DataLoader"):
            fit(Module(), callback(), data=[loader(), loader()])

    def test_what_needs_scores(self):
        with pytest.raises(ValueError, match="pass scores="):
            fit(Manual(), callback(scores=None))
        with pytest.raises(ValueError, match="pass scores="):
            fit(Module(), callback(scores=None, meta="mldg"))

    def test_a_meta_step_in_manual_optimisation(self):
        with pytest.raises(ValueError, match="meta='none'"):
            fit(Manual(), callback(meta="mldg"))

    def test_no_warm_up(self):
        with pytest.raises(ValueError, match="warm_up is 0"):
            callback(warm_up=0)


class Looks(pl.Callback):
    """Looks at the module after every batch, where checkpoints are saved."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        assert "training_step" not in vars(pl_module)
        assert "manual_backward" not in vars(pl_module)


def test_the_module_is_itself_again_after_every_batch_and_after_an_error():
    module = Module()
    fit(module, callback(), callbacks=[Looks()])
    fit(module, data=DataLoader(DATA, batch_size=BATCH))  # and trains without the callback

    broken = callback(scores=lambda module, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(module, broken)
    assert "training_step" not in vars(module)
