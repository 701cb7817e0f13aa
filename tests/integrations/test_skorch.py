"""skorch nets with the callback."""

import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

pytest.importorskip("skorch", reason='needs pip install "comet-meta[skorch]"')

from skorch import NeuralNet
from skorch.callbacks import Callback

from comet_meta import IndexedDataset, SoftConfidentWeighter
from comet_meta.integrations.skorch import CoMetCallback
from snippets import run

LINE = torch.tensor([1.0, 2.0, -1.0, 0.5])


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(300, 1, generator=generator) * LINE
    data[:15] = torch.tensor([2.0, -1.0, 2.0, 2.0]) * torch.randn(15, 1, generator=generator).sign()
    return data + 0.1 * torch.randn(300, 4, generator=generator)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4))

    def forward(self, batch):
        return self.body(batch)


def net(callback, reduction, **settings) -> NeuralNet:
    return NeuralNet(
        Autoencoder, nn.MSELoss, criterion__reduction=reduction, max_epochs=3, lr=0.1, verbose=0,
        iterator_train__shuffle=True, callbacks=callback and [("comet", callback)], **settings,
    )  # fmt: skip


def trained(callback, reduction, **settings):
    torch.manual_seed(4)
    return net(callback, reduction, **settings).fit(rows(), rows())


@pytest.mark.parametrize("split", [{}, {"train_split": None}])
def test_unit_weights_train_as_skorch_alone(split):
    size = 300 if split else 240
    unit = SoftConfidentWeighter(size, rule=torch.ones_like)
    ours = trained(CoMetCallback(weighter=unit), "none", **split)
    theirs = trained(None, "mean", **split)
    for a, b in zip(ours.module_.parameters(), theirs.module_.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    if not split:
        assert ours.history[-1]["valid_loss"] == pytest.approx(theirs.history[-1]["valid_loss"])
    assert "get_loss" not in vars(ours)


def test_weights_reach_the_training():
    none = SoftConfidentWeighter(300, rule=lambda scores: (scores < 0).float())
    ours = trained(CoMetCallback(weighter=none), "none", train_split=None)
    losses = ours.history[:, "train_loss"]
    assert losses[0] > 0
    assert losses[1:] == [0, 0]


def test_the_page():
    torch.manual_seed(0)
    names = {"X": rows(), "Autoencoder": Autoencoder}
    names = run("docs/integrations/skorch.md", "skorch", names)
    assert (names["suspects"][:15] < 15).sum() >= 13
    weights = names["weighter"].weights
    assert weights[:15].mean() < 0.3 < 0.98 < weights[15:].mean()


def test_a_row_with_nan_takes_no_step_away_from_the_others(caplog):
    data = rows()
    data[5] = torch.nan
    ours = net(CoMetCallback(), "none", train_split=None).fit(data, data)
    assert all(torch.isfinite(p).all() for p in ours.module_.parameters())
    assert "samples [5]" in caplog.text
    comet = dict(ours.callbacks_)["comet"].comet
    assert comet.weighter.scores.isfinite().all()


def test_state_belongs_to_a_fit_and_partial_fit_goes_on():
    ours = net(CoMetCallback(weighter=SoftConfidentWeighter(300, rule="hard")), "none",
               train_split=None)  # fmt: skip
    ours.fit(rows(), rows())
    comet = dict(ours.callbacks_)["comet"].comet
    assert (comet.rounds, bool(comet.weighter().min() < 1)) == (3, True)
    ours.partial_fit(rows(), rows())
    assert dict(ours.callbacks_)["comet"].comet.rounds == 6
    other = rows().flip(0)
    ours.set_params(max_epochs=0)
    ours.partial_fit(other, other)  # other rows: from the beginning
    ours.set_params(max_epochs=1)
    ours.fit(other, other)
    assert dict(ours.callbacks_)["comet"].comet.rounds == 1


class Pickles(Callback):
    """Pickles the net after its second epoch, in the middle of its training."""

    def on_epoch_end(self, net, **_):
        if len(net.history) == 2:
            self.content = pickle.dumps({k: v for k, v in vars(net).items() if k != "callbacks_"})
            self.callback = pickle.dumps(dict(net.callbacks_)["comet"])


def test_a_pickled_net_keeps_its_weights():
    weighter = SoftConfidentWeighter(300, rule="hard")
    torch.manual_seed(4)
    ours = net(CoMetCallback(weighter=weighter), "none", train_split=None).fit(rows(), rows())
    again = pickle.loads(pickle.dumps(ours))
    assert not hasattr(dict(again.callbacks_)["comet"], "comet")  # which holds the data
    assert torch.equal(again.forward(rows()), ours.forward(rows()))
    before = ours.module_.state_dict()["body.0.weight"].clone()
    for each in (ours, again):
        torch.manual_seed(5)
        each.partial_fit(rows(), rows())
        assert dict(each.callbacks_)["comet"].comet.rounds == 6
    after = ours.module_.state_dict()["body.0.weight"]
    assert not torch.equal(after, before)
    assert torch.equal(again.module_.state_dict()["body.0.weight"], after)


def test_a_net_is_pickled_in_the_middle_of_its_training():
    pickles = Pickles()
    ours = net(CoMetCallback(), "none", train_split=None)
    ours.callbacks.append(("pickles", pickles))
    ours.fit(rows(), rows())
    pickles = dict(ours.callbacks_)["pickles"]
    assert pickle.loads(pickles.content)["module_"] is not None
    kept = pickle.loads(pickles.callback)
    assert not hasattr(kept, "comet")
    assert kept._kept[1]["round"][0] == 2


def test_an_indexed_data_set_is_not_needed():
    data = IndexedDataset(TensorDataset(rows(), rows()))
    with pytest.raises(TypeError, match="without its IndexedDataset"):
        net(CoMetCallback(), "none", train_split=None).fit(data, None)
