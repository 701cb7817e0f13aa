"""Manual optimisation and Fabric: optimizers that take turns, and a wrapper of one's own."""

import pytest
import torch
from lightning_training import (
    EPOCHS,
    Manual,
    Module,
    N,
    Net,
    assert_same,
    by_hand,
    callback,
    fit,
    loader,
)

from comet_meta import CoMetOptimizerWrapper, SoftConfidentWeighter

pytest.importorskip("lightning.pytorch", reason='needs pip install "comet-meta[lightning]"')

from lightning.fabric import Fabric


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
