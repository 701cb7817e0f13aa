"""What the callback reads of a batch: the positions of its samples, and the rows to score."""

import pytest
import torch
from lightning_training import (
    BATCH,
    DATA,
    EPOCHS,
    Evaluated,
    Module,
    N,
    callback,
    fit,
    loader,
    quiet,
    scores_of,
)
from torch.utils.data import DataLoader, Dataset

from comet_meta.integrations._batches import take_rows
from comet_meta.integrations.lightning import CoMetCallback

pl = pytest.importorskip("lightning.pytorch", reason='needs pip install "comet-meta[lightning]"')


def test_positions_can_come_from_the_batch():
    class Dictionaries(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, k):
            return {"image": DATA[k], "id": k}

    class Reads(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["image"], batch_idx)

    module = Reads()
    comet = callback(
        index=lambda batch: batch["id"], scores=lambda m, batch: scores_of(m, batch["image"])
    )
    # drop_last and an order of its own: every sample gets a score all the same
    fit(module, comet, data=DataLoader(Dictionaries(), batch_size=BATCH, drop_last=True))
    assert not comet.weighter.scores.isnan().any()


def test_a_batch_that_is_changed_after_its_transfer_keeps_its_positions(tmp_path):
    class Changed(Evaluated):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            index, rows = batch
            return index, rows + 1

    callback = CoMetCallback()
    quiet(callback, tmp_path).fit(Changed())
    assert callback.weighter.scores.isfinite().all()


def test_rows_are_taken_of_all_that_has_one_for_each_sample():
    batch = {"x": torch.arange(3), "names": ["a", "b", "c"], "pair": (torch.eye(3), 5), "t": "abc"}
    part = take_rows(batch, torch.tensor([2, 0]), 3)
    assert part["x"].tolist() == [2, 0]
    assert part["names"] == ["c", "a"]
    assert part["pair"][0].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert (part["pair"][1], part["t"]) == (5, "abc")


def test_scoring_leaves_the_random_numbers_alone():
    def trained(scores) -> torch.Tensor:
        torch.manual_seed(0)
        module = Module()
        torch.manual_seed(1)
        fit(module, callback(scores=scores, warm_up=EPOCHS), data=loader(shuffle=True))
        return torch.rand(3)

    def random_scores(module, batch):
        return torch.rand(len(batch))

    assert torch.equal(trained(scores_of), trained(random_scores))


def started(worker: int) -> None:
    torch.manual_seed(worker)


def test_the_scoring_loader_keeps_the_loaders_arguments():
    seen = []

    class Rows(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, k):
            return DATA[k]

    data = loader(
        Rows(), num_workers=1, worker_init_fn=started, multiprocessing_context="fork",
        prefetch_factor=3, persistent_workers=True,
    )  # fmt: skip
    comet = callback()

    class Looks(pl.Callback):
        def on_train_end(self, *_):
            seen.append(comet._scoring[1]._loader)

    fit(Module(), comet, data=data, callbacks=[Looks()], epochs=3)
    (scoring,) = seen
    for name in ("worker_init_fn", "multiprocessing_context", "prefetch_factor", "num_workers",
                 "persistent_workers", "collate_fn", "pin_memory"):  # fmt: skip
        assert getattr(scoring, name) is getattr(data, name), name
    assert comet.weighter.scores.isfinite().all()


def test_scores_see_batches_as_the_hooks_of_the_module_leave_them():
    class Changed(Module):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            index, rows = batch
            return index, rows + 1

    seen = []

    def scores(module, batch):
        seen.append(batch)
        return module.net.losses(batch)

    fit(Changed(), callback(scores=scores, warm_up=1), epochs=1)
    assert torch.equal(torch.cat(seen), DATA + 1)
