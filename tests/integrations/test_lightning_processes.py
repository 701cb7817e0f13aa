"""The Lightning callback in two processes."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning.pytorch", reason='needs pip install "comet-meta[lightning]"')


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
        "import lightning_training as t\n"
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
