"""Random loaders, and torch's own optimizers, in a step or a sentence."""

import torch
from fuzzing import fuzz, is_a_sentence
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from comet_meta import CoMetOptimizerWrapper, IndexedDataset, SoftConfidentWeighter, collect_scores

OPTIMIZERS = [
    cls
    for name, cls in sorted(vars(torch.optim).items())
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name != "Optimizer"
]


@fuzz(0.03)
@given(
    st.sampled_from(OPTIMIZERS),
    st.sampled_from(["none", "mldg", "fomaml", "maml", "reptile"]),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_a_step_of_any_optimizer_is_finite_or_gets_a_sentence(cls, meta, count, number):
    torch.manual_seed(number)
    model = nn.Linear(3, 3)
    data = torch.randn(20, 3)
    weighter = SoftConfidentWeighter(20)
    weighter.fit(torch.rand(20))
    index = torch.randperm(20)[:count]

    def losses(rows: torch.Tensor) -> torch.Tensor:
        return (model(data[index][rows]) - data[index][rows]).square().mean(dim=1)

    fault = None
    try:
        inner = cls(model.parameters(), lr=1e-3)
        optimizer = CoMetOptimizerWrapper(inner, weighter=weighter, model=model, meta=meta)
        before = [p.detach().clone() for p in model.parameters()]
        report = optimizer.step(losses, index)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        fault = error
    if fault is not None:
        assert is_a_sentence(fault)
        return
    assert torch.isfinite(report.objective)
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@fuzz(0.03)
@given(st.integers(1, 40), st.integers(1, 50), st.booleans(), st.booleans(), st.integers(0, 99))
def test_scores_come_in_the_order_of_the_samples(count, batch_size, shuffle, drop_last, number):
    data = torch.randn(count, 2, generator=torch.Generator().manual_seed(number))
    loader = DataLoader(IndexedDataset(data), batch_size, shuffle=shuffle, drop_last=drop_last)
    complete = not drop_last or count % batch_size == 0
    fault = None
    try:
        scores = collect_scores(lambda batch: batch.sum(dim=1), loader)
    except ValueError as error:
        fault = error
    assert complete is (fault is None)
    if fault is not None:
        assert is_a_sentence(fault)
        return
    torch.testing.assert_close(scores, data.sum(dim=1))
