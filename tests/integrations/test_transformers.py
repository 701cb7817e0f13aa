"""Hugging Face's Trainer with weights."""

import pytest
import torch

pytest.importorskip("transformers", reason='needs pip install "comet-meta[transformers]"')

from transformers import Trainer, TrainingArguments

from comet_meta import SoftConfidentWeighter
from comet_meta.integrations.transformers import CoMetTrainer, WithPositions
from snippets import run

LINE = torch.tensor([1.0, 2.0, -1.0, 0.5])


def samples() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(300, 1, generator=generator) * LINE
    data[:15] = torch.tensor([2.0, -1.0, 2.0, 2.0]) * torch.randn(15, 1, generator=generator).sign()
    data += 0.1 * torch.randn(300, 4, generator=generator)
    return [{"values": row} for row in data]


class Detector(torch.nn.Module):
    """As a user of the plain Trainer has it, with losses by sample beside their mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Linear(1, 4))

    def forward(self, values):
        losses = (self.body(values) - values).square().mean(dim=1)
        return {"loss": losses.mean(), "losses": losses}


def arguments(folder, **settings) -> TrainingArguments:
    return TrainingArguments(
        str(folder), learning_rate=1e-2, per_device_train_batch_size=16,
        report_to="none", disable_tqdm=True, use_cpu=True,
        **({"remove_unused_columns": False, "save_strategy": "no", "num_train_epochs": 3}
           | settings),
    )  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}])
def test_unit_weights_train_as_the_trainer_alone(tmp_path, settings):
    unit = SoftConfidentWeighter(300, rule=torch.ones_like)
    ours = CoMetTrainer(
        Detector(), arguments(tmp_path, **settings), train_dataset=samples(), weighter=unit
    )
    theirs = Trainer(Detector(), arguments(tmp_path, **settings), train_dataset=samples())
    for trainer in (ours, theirs):
        trainer.train()
    pairs = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in pairs)
    assert unit.scores.isfinite().all()


def test_weights_reach_the_training(tmp_path):
    none = SoftConfidentWeighter(300, rule=torch.zeros_like)
    none.fit(torch.arange(300.0))
    trainer = CoMetTrainer(
        Detector(), arguments(tmp_path), train_dataset=samples(), eval_dataset=samples(),
        weighter=none,
    )  # fmt: skip
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    pairs = zip(before, trainer.model.parameters(), strict=True)
    assert all(torch.equal(a, b.cpu()) for a, b in pairs)
    assert trainer.evaluate()["eval_loss"] > 0.1


def test_a_resumed_run_goes_on_with_its_weights(tmp_path):
    """Four epochs, of which the last two are repeated from a checkpoint by a fresh trainer."""

    def trainer(folder):
        settings = {"num_train_epochs": 4, "lr_scheduler_type": "constant"}
        settings |= {"save_strategy": "epoch"}
        return CoMetTrainer(
            Detector(), arguments(folder, **settings), train_dataset=samples(), warm_up=2
        )

    whole = trainer(tmp_path)
    whole.train()
    assert float(whole.weighter.weights.min()) < 1
    middle = tmp_path / "checkpoint-38"
    saved = torch.load(middle / "comet_weighter.pt", weights_only=True)
    assert not torch.equal(saved["scores"], whole.weighter.scores)
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(middle))
    ours, theirs = resumed.weighter.state_dict(), whole.weighter.state_dict()
    assert ours.pop("_extra_state") == theirs.pop("_extra_state")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, equal_nan=True)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    last = trainer(tmp_path)
    last.train(resume_from_checkpoint=True)
    assert torch.equal(last.weighter.weights, whole.weighter.weights)


def test_a_checkpoint_of_the_plain_trainer_has_no_weights(tmp_path, caplog):
    settings = {"num_train_epochs": 1, "save_strategy": "epoch"}
    plain = Trainer(Detector(), arguments(tmp_path, **settings), train_dataset=samples())
    plain.train()
    again = arguments(tmp_path, num_train_epochs=2)
    CoMetTrainer(Detector(), again, train_dataset=samples()).train(resume_from_checkpoint=True)
    assert "comet_weighter.pt is missing: the weights start anew" in caplog.text


def test_what_does_not_work_is_said(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        CoMetTrainer(Detector(), arguments(tmp_path, remove_unused_columns=True))
    with pytest.raises(ValueError, match="warm_up is 0"):
        CoMetTrainer(Detector(), arguments(tmp_path), warm_up=0)
    with pytest.raises(TypeError, match="no positions"):
        WithPositions(iter([]))

    class Scalar(Detector):
        def forward(self, values):
            return {"loss": super().forward(values)["loss"]}

    with pytest.raises(ValueError, match="no losses by sample"):
        CoMetTrainer(Scalar(), arguments(tmp_path), train_dataset=samples()).train()


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"train_set": samples(), "torch": torch, "__name__": "docs"}
    names = run("docs/integrations/transformers.md", "transformers", names)
    assert (names["suspects"][:15] < 15).sum() >= 13


def test_a_sample_with_nan_takes_no_step_away_from_the_others(tmp_path, caplog):
    data = samples()
    data[5]["values"] = data[5]["values"] * torch.nan
    trainer = CoMetTrainer(Detector(), arguments(tmp_path), train_dataset=data)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    after = list(trainer.model.parameters())
    assert all(torch.isfinite(p).all() for p in after)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert "samples [5]" in caplog.text
    assert trainer.weighter.scores.isfinite().sum() == 299


def test_checkpoints_hold_the_weights_and_know_their_samples(tmp_path):
    def trainer(data, epochs):
        settings = arguments(tmp_path)
        settings.save_strategy, settings.num_train_epochs = "epoch", epochs
        weighter = SoftConfidentWeighter(300, rule="hard")
        return CoMetTrainer(Detector(), settings, train_dataset=Rows(data), weighter=weighter)

    rows = torch.stack([sample["values"] for sample in samples()])
    trainer(rows, 2).train()
    again = trainer(rows, 2)
    again.train(resume_from_checkpoint=True)  # nothing is left to do
    assert again.weighter().min() == 0
    with pytest.raises(ValueError, match="the weights belong to other samples"):
        trainer(rows.flip(0), 3).train(resume_from_checkpoint=True)
    # A training that doesn't resume starts fresh, also with the same trainer.
    again.weighter.begin_fit(again.train_dataset)
    assert again.weighter().min() == 1


class Rows(torch.utils.data.Dataset):
    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, k):
        return {"values": self.data[k]}
