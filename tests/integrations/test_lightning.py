"""The Lightning callback against the same training written as a plain loop."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from comet_meta import (
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    IndexedDataset,
    MetaStep,
    SoftConfidentWeighter,
    collect_scores,
)

pl = pytest.importorskip("lightning.pytorch", reason='needs pip install "comet-meta[lightning]"')

from lightning.fabric import Fabric  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from comet_meta.integrations._batches import take_rows  # noqa: E402
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


def drop_in(comet, net, index, batch) -> None:
    comet.zero_grad()
    comet.objective(net.losses(batch), index).backward()
    comet.step()


def test_drop_in_equals_a_plain_loop():
    module = Module()
    fit(module, callback())
    assert_same(module, by_hand(drop_in))


def test_the_full_method_equals_a_plain_loop():
    module = Module()
    fit(module, callback(meta=MetaStep("mldg", inner_lr=0.1)))

    def step(comet, net, index, batch):
        comet.step(lambda rows: net.losses(batch[rows]), index)

    assert_same(module, by_hand(step, meta=MetaStep("mldg", inner_lr=0.1)), rtol=1e-5, atol=1e-6)


class Paired(Module):
    """Says also what a sample's loss is if it is anomalous."""

    @staticmethod
    def pairs(losses: torch.Tensor) -> torch.Tensor:
        return torch.stack([losses, (50 - losses).relu()])

    def training_step(self, batch, batch_idx):
        return self.pairs(self.net.losses(batch))


@pytest.mark.parametrize("scores", [True, False])
def test_pairs_of_losses_equal_a_plain_loop(scores):
    module = Paired()
    fit(module, callback() if scores else callback(scores=None))
    seen = []

    def step(comet, net, index, batch):
        losses = net.losses(batch)
        comet.zero_grad()
        comet.objective(Paired.pairs(losses), index).backward()
        comet.step()
        seen.append(losses.detach())
        if not scores and len(seen) % 4 == 0 and len(seen) > 4:
            comet.weighter.fit(torch.cat(seen[-4:]))

    net = by_hand(step, scores=scores)
    assert_same(module, net)
    # The second row has had a say.
    assert any(
        not torch.equal(ours, theirs)
        for ours, theirs in zip(net.parameters(), by_hand(drop_in).parameters(), strict=True)
    )


def test_training_losses_serve_as_scores():
    module = Module()
    fit(module, callback(scores=None))
    seen = []

    def step(comet, net, index, batch):
        losses = net.losses(batch)
        comet.zero_grad()
        comet.objective(losses, index).backward()
        comet.step()
        seen.append(losses.detach())
        if len(seen) % 4 == 0 and len(seen) > 4:
            comet.weighter.fit(torch.cat(seen[-4:]))

    assert_same(module, by_hand(step, scores=False))


def test_gradient_clipping_and_accumulation():
    def step(comet, net, index, batch):
        comet.objective(net.losses(batch), index).div(2).backward()
        step.count += 1
        if step.count % 2 == 0:
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            comet.step()
            comet.zero_grad()

    step.count = 0
    net = by_hand(step)
    module = Module()
    fit(module, callback(), accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert_same(module, net)


def test_the_full_method_accumulates_too():
    def step(comet, net, index, batch):
        step.batches.append((index, batch))
        if len(step.batches) == 2:
            total = [torch.zeros_like(p) for p in net.parameters()]
            for index, batch in step.batches:
                for group in comet.param_groups:
                    group["lr"] = 0.0
                state = copy.deepcopy(comet.optimizers[0].state_dict())
                comet.step(lambda rows, batch=batch: net.losses(batch[rows]), index)
                comet.optimizers[0].load_state_dict(state)
                for sum_, p in zip(total, net.parameters(), strict=True):
                    sum_ += p.grad / 2
            for sum_, p in zip(total, net.parameters(), strict=True):
                p.grad = sum_
            for group in comet.param_groups:
                group["lr"] = 0.02
            comet.optimizers[0].step()
            step.batches.clear()

    step.batches = []
    net = by_hand(step, meta=MetaStep("mldg", inner_lr=0.1))
    module = Module()
    fit(module, callback(meta=MetaStep("mldg", inner_lr=0.1)), accumulate_grad_batches=2)
    assert_same(module, net, rtol=1e-4, atol=1e-5)


def test_manual_optimisation_with_two_optimizers():
    module = Manual()
    fit(module, callback())

    def optimizers(net):
        return [torch.optim.Adam(net.body[k].parameters(), lr=0.02) for k in (0, 3)]

    def step(comet, net, index, batch):
        net.body[1].requires_grad_(False)  # batch norm is nobody's
        for ours, other in ((0, 3), (3, 0)):
            net.body[ours].requires_grad_(True)
            net.body[other].requires_grad_(False)
            comet.zero_grad()
            comet.objective(net.losses(batch), index).backward()
            comet.optimizers[(0, 3).index(ours)].step()

    assert_same(module, by_hand(step, optimizers=optimizers))


@pytest.mark.parametrize("meta", ["none", "mldg"])
def test_bf16_mixed_precision(meta):
    module = Module()
    comet = callback(meta=meta)
    fit(module, comet, precision="bf16-mixed")
    assert module.net.body[0].weight.dtype == torch.float32
    assert comet.weighter()[24:].max() < comet.weighter()[:24].mean()

    def step(comet, net, index, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if meta == "none":
                objective = comet.objective(net.losses(batch), index)
            else:
                comet.step(lambda rows: net.losses(batch[rows]), index)
        if meta == "none":
            comet.zero_grad()
            objective.backward()
            comet.step()

    assert_same(module, by_hand(step, meta=meta), rtol=0.1, atol=0.05)


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


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Lightning's own DDP: the weights and the parameters are the same on both."""
    pytest.importorskip("torch.distributed")
    from test_distributed import torchrun

    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch\n"
        "import test_lightning as t\n"
        "module, comet = t.Module(), t.callback()\n"
        "trainer = t.fit(module, comet, strategy='ddp', devices=2)\n"
        "state = {'weights': comet.weighter(), 'scores': comet.weighter.scores,\n"
        "         'parameters': [p.detach() for p in module.parameters()]}\n"
        "torch.save(state, f'{sys.argv[1]}/{trainer.global_rank}.pt')\n"
    )
    torchrun(script, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["weights"], second["weights"])
    assert not first["scores"].isnan().any()
    assert first["weights"].min() < 0.5
    for ours, theirs in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(ours, theirs)


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


def quiet(callback: CoMetCallback, folder: Path, **settings) -> "pl.Trainer":
    return pl.Trainer(
        callbacks=[callback], max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        default_root_dir=folder, **settings,
    )  # fmt: skip


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


def test_a_batch_that_is_changed_after_its_transfer_keeps_its_positions(tmp_path):
    class Changed(Evaluated):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            index, rows = batch
            return index, rows + 1

    callback = CoMetCallback()
    quiet(callback, tmp_path).fit(Changed())
    assert callback.weighter.scores.isfinite().all()


# What other people's data and loops do.


def broken(rows: torch.Tensor = DATA) -> torch.Tensor:
    rows = rows.clone()
    rows[5] = torch.nan
    return rows


class Plain(Module):
    """Without batch norm, which spreads a NaN over its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net.body[1] = nn.Identity()


@pytest.mark.parametrize("scores", [None, lambda module, batch: module.net.losses(batch)])
@pytest.mark.parametrize("kind", [Plain, Module])
def test_one_sample_with_nan_is_named_and_costs_its_batch_alone(kind, scores, caplog):
    module, comet = kind(), CoMetCallback(scores=scores)
    fit(module, comet, data=loader(broken()))
    assert all(torch.isfinite(value).all() for value in module.net.state_dict().values())
    named = (
        "samples [0, 1, 2, 3, 4, 5, 6, 7]" if kind is Module and scores is None else "samples [5"
    )
    assert named in caplog.text
    assert "step skipped" in caplog.text
    known = comet.weighter.scores.isfinite()
    assert known[8:].all()
    if scores is not None:
        assert comet.weighter.ranking(30)[:7].tolist().count(5) == 1  # as suspect as the worst
    # The other batches' steps are those of a training that never met this one.
    if kind is Plain and scores is None:
        other, ones = Plain(), SoftConfidentWeighter(N, rule=torch.ones_like)
        fit(other, CoMetCallback(ones), data=loader(broken()), epochs=1)
        by_hand = Plain()
        optimizer = by_hand.configure_optimizers()
        for rows in DATA.split(BATCH)[1:]:
            optimizer.zero_grad()
            by_hand.net.losses(rows).mean().backward()
            optimizer.step()
        assert_same(other, by_hand.net)


@pytest.mark.parametrize("meta", ["none", "mldg"])
def test_manual_steps_and_meta_steps_survive_nan_too(meta):
    module = Manual() if meta == "none" else Module()
    fit(module, callback(meta=meta), data=loader(broken()))
    assert all(torch.isfinite(value).all() for value in module.net.state_dict().values())


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


def test_a_training_step_may_return_nothing():
    class Skips(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    for settings in ({"scores": None}, {"meta": "mldg"}):
        module, comet = Skips(), callback(**settings)
        fit(module, comet)
        assert comet.weighter.scores.isfinite().sum() >= N - BATCH
        assert all(torch.isfinite(p).all() for p in module.parameters())


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


def test_a_wrapper_of_ones_own_in_manual_optimisation():
    """Lightning's optimizer calls the closure of a step itself; the two halves go through it."""

    class Own(Module):
        def __init__(self, way: str) -> None:
            super().__init__()
            self.way = way
            self.automatic_optimization = False

        def configure_optimizers(self):
            return CoMetOptimizerWrapper(
                torch.optim.Adam(self.net.parameters(), lr=0.02),
                weighter=SoftConfidentWeighter(N),
                model=self.net,
            )

        def training_step(self, pair, batch_idx):
            index, batch = pair
            optimizer = self.optimizers()

            def losses(rows):
                return self.net.losses(batch[rows])

            if self.way == "by name":
                optimizer.step(losses, index=index)
            elif self.way == "by position":
                optimizer.step(losses, index)
            else:
                optimizer.zero_grad()
                optimizer.backward(losses, index)
                optimizer.step()

    module = Own("two halves")
    fit(module)
    net, comet = Net(), None
    comet = CoMetOptimizerWrapper(
        torch.optim.Adam(net.parameters(), lr=0.02), weighter=SoftConfidentWeighter(N), model=net
    )
    for _ in range(EPOCHS):
        for index, batch in loader():
            comet.step(lambda rows, batch=batch: net.losses(batch[rows]), index)
    assert_same(module, net)
    for way in ("by name", "by position"):
        with pytest.raises(TypeError, match=r"without rows; call optimizer.backward"):
            fit(Own(way), epochs=1)


def test_fabric_takes_the_two_halves_of_a_step():
    fabric = Fabric(accelerator="cpu", devices=1)
    trained, reference = Net(), Net()

    def wrapped(net: Net) -> CoMetOptimizerWrapper:
        adam = torch.optim.Adam(net.parameters(), lr=0.02)
        return CoMetOptimizerWrapper(adam, weighter=SoftConfidentWeighter(N), model=net)

    _, optimizer = fabric.setup(trained, wrapped(trained))
    plain = wrapped(reference)
    for index, batch in loader():
        optimizer.zero_grad()
        optimizer.backward(lambda rows, batch=batch: trained.losses(batch[rows]), index)
        optimizer.step()
        plain.step(lambda rows, batch=batch: reference.losses(batch[rows]), index)
    for ours, theirs in zip(trained.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(TypeError, match=r"without rows; call optimizer.backward"):
        optimizer.step(trained.losses, index)
