"""Accelerate: the recipe of the documentation, in two processes and in one."""

import pytest
import torch

import docs_ranks
from comet_meta import CoMetOptimizerWrapper, SoftConfidentWeighter
from snippets import run
from test_distributed import torchrun

pytest.importorskip("accelerate", reason='needs pip install "comet-meta[accelerate]"')


def found(suspects: torch.Tensor) -> int:
    return len(set(suspects.tolist()) & set(range(20)))


@pytest.fixture
def fresh():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.slow
def test_two_processes(tmp_path, fresh):
    torchrun(docs_ranks.__file__, tmp_path, "accelerate")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["weights"], second["weights"])
    assert found(first["suspects"]) >= 17
    for ours, theirs in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(ours, theirs)

    # One process goes on from what the two have saved.
    space = docs_ranks.namespace() | {"epochs": 0}
    run(docs_ranks.PAGE, "accelerate", space)
    space["accelerator"].load_state(tmp_path / "state")
    assert torch.equal(space["weighter"](), first["weights"])
    for ours, theirs in zip(space["model"].parameters(), first["parameters"], strict=True):
        assert torch.equal(ours.detach(), theirs)


def test_one_process_equals_a_plain_loop(fresh):
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    data = docs_ranks.namespace()["train_set"][:64]
    scores = data.square().sum(dim=1)

    def trained(accelerated: bool) -> list[torch.Tensor]:
        model = docs_ranks.Autoencoder()
        weighter = SoftConfidentWeighter(64)
        weighter.fit(scores)
        comet = CoMetOptimizerWrapper(
            torch.optim.Adam(model.parameters(), lr=1e-2), weighter=weighter
        )
        scheduler = torch.optim.lr_scheduler.StepLR(comet, 1, gamma=0.5)
        optimizer, accelerator = comet, None
        if accelerated:
            plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
            accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
            model, optimizer, scheduler = accelerator.prepare(model, comet, scheduler)
        for step, index in enumerate(torch.arange(64).split(16)):
            objective = comet.objective(model(data[index]), index)
            if accelerator is None:
                (objective / 2).backward()
                if step % 2 == 0:
                    continue
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            else:
                with accelerator.accumulate(model):
                    accelerator.backward(objective)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
        assert weighter().min() < 0.5
        return [parameter.detach() for parameter in model.parameters()]

    for ours, theirs in zip(trained(True), trained(False), strict=True):
        assert torch.equal(ours, theirs)
