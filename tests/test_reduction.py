"""One loss per sample."""

import pytest
import torch

from comet_meta import per_sample


def test_shapes():
    pixels = torch.arange(24.0).view(2, 3, 4)
    assert per_sample(pixels, 2).tolist() == [5.5, 17.5]
    assert per_sample(pixels.view(2, 12), 2).tolist() == [5.5, 17.5]  # (2, P) with B = 2
    assert per_sample(pixels.flatten(), 2).tolist() == [5.5, 17.5]
    losses = torch.rand(5)
    assert per_sample(losses, 5) is losses
    both = per_sample({"a": pixels, "b": torch.tensor([1.0, 2.0])}, 2)
    assert both.tolist() == [6.5, 19.5]


def test_the_graph_is_kept():
    losses = torch.ones(6, requires_grad=True)
    per_sample(losses, 3)[1].backward()
    assert losses.grad.tolist() == [0, 0, 0.5, 0.5, 0, 0]


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (torch.tensor(1.0), ValueError, "reduction='none'.*ConfidenceSampler"),
        ({"kl": torch.tensor(1.0)}, ValueError, r"losses\['kl'\] is a scalar"),
        (torch.ones(2, 7), ValueError, "anomalous=losses"),
        (torch.ones(7, 3), ValueError, r"\(7, 3\).*3 samples first"),
        (torch.ones(7), ValueError, "3 samples first"),
        (torch.ones(0), ValueError, "empty"),
        ({}, ValueError, "at least one term"),
        (1.0, TypeError, "float"),
        (torch.ones(3, dtype=torch.int64), TypeError, "int64"),
    ],
)
def test_what_cannot_be_told_apart(losses, error, message):
    with pytest.raises(error, match=message):
        per_sample(losses, 3)
