"""What users get wrong, and the sentence that they get for it."""

import pytest
import torch
from torch import nn

from comet_meta import (
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    IndexedDataset,
    SoftConfidentWeighter,
    collect_scores,
)
from wrapping import wrap

DATA = torch.randn(8, 3)


def make(**options) -> tuple[nn.Linear, CoMetOptimizerWrapper]:
    model = nn.Linear(3, 3)
    options.setdefault("weighter", SoftConfidentWeighter(8))
    return model, wrap(torch.optim.SGD(model.parameters(), lr=0.1), **options)


def losses(model, rows=slice(None)):
    return (model(DATA[rows]) - DATA[rows]).square().mean(dim=1)


INDEX = torch.arange(8)
NAN = torch.tensor([0.5, torch.nan, 0.1, 0.1, 0.1, torch.inf, 0.1, 0.1])

OBJECTIVE = {
    "index of floats": (lambda m: losses(m), INDEX.float(), TypeError, "expected integer"),
    "index of bools": (lambda m: losses(m), INDEX > 3, TypeError, "expected integer"),
    "index too high": (lambda m: losses(m), INDEX + 1, IndexError, "index 8 is out of range for 8"),
    "index negative": (lambda m: losses(m), INDEX - 1, IndexError, "index -1 is out of range"),
    "index as a table": (lambda m: losses(m), INDEX[None], ValueError, r"expected \(B,\)"),
    "no index": (lambda m: losses(m), None, ValueError, "IndexedDataset"),
    "index too short": (lambda m: losses(m), INDEX[:3], ValueError, "8 losses and 3 indices"),
    "scalar loss": (lambda m: losses(m).mean(), INDEX, ValueError, "reduction='none'"),
    "loss by pixel": (lambda m: m(DATA), INDEX, ValueError, "one loss per sample"),
    "integer losses": (lambda m: INDEX, INDEX, TypeError, "expected a floating-point tensor"),
    "a number": (lambda m: 0.5, INDEX, TypeError, "float; expected a floating-point tensor"),
    "empty batch": (lambda m: losses(m, []), INDEX[:0], ValueError, "the batch is empty"),
}


@pytest.mark.parametrize("case", OBJECTIVE)
def test_objective(case):
    compute, index, error, message = OBJECTIVE[case]
    model, optimizer = make()
    with pytest.raises(error, match=message):
        optimizer.objective(compute(model), index)


STEP = {
    "index of floats": (INDEX.float(), losses, TypeError, "expected integer"),
    "index out of range": (INDEX + 5, losses, IndexError, "out of range"),
    "batch of one": (INDEX[:1], losses, ValueError, "drop_last=True"),
    "empty batch": (INDEX[:0], losses, ValueError, "the batch is empty"),
    "scalar loss": (INDEX, lambda m, r: losses(m, r).mean(), ValueError, "one loss per sample"),
    "all rows": (INDEX, lambda m, r: losses(m), ValueError, "8 losses for"),
}


@pytest.mark.parametrize("case", STEP)
@pytest.mark.parametrize("meta", ["mldg", "fomaml", "maml", "reptile"])
def test_step(case, meta):
    index, compute, error, message = STEP[case]
    model = nn.Linear(3, 3)
    optimizer = wrap(
        torch.optim.SGD(model.parameters(), lr=0.1),
        weighter=SoftConfidentWeighter(8),
        meta=meta,
        model=model,
    )
    before = model.weight.detach().clone()
    with pytest.raises(error, match=message):
        optimizer.step(lambda rows: compute(model, rows), index)
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_a_batch_of_one_is_fine_without_a_meta_step():
    model, optimizer = make(meta="none", regularizer=CovarianceMetaRegularizer())
    optimizer.step(lambda rows: losses(model, rows), INDEX[:1])
    optimizer.objective(losses(model, [0]), INDEX[:1]).backward()


def test_step_without_a_closure_and_without_anything_to_train():
    model, optimizer = make()
    with pytest.raises(TypeError, match="needs a closure"):
        optimizer.step(None, INDEX)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        optimizer.step(lambda rows: losses(model, rows), INDEX)


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


SHARED = nn.Parameter(torch.ones(1))
WRAPPER = {
    "not an optimizer": (lambda: [nn.Linear(1, 1)], {}, TypeError, "torch.optim.Optimizer"),
    "no optimizer": (lambda: [], {}, ValueError, "no optimizer to wrap"),
    "lbfgs": (lambda: torch.optim.LBFGS([SHARED]), {}, TypeError, "LBFGS re-evaluates"),
    "owned twice": (
        lambda: [torch.optim.SGD([SHARED], lr=1), torch.optim.SGD([SHARED], lr=1)],
        {},
        ValueError,
        "same parameter",
    ),
    "meta": (sgd, {"meta": "mamal"}, ValueError, "'mamal'; expected one of 'none', 'mldg'"),
    "inner optimizer": (sgd, {"inner_optimizer": "lion"}, ValueError, "'sgd', 'adam'"),
    "inner lr": (sgd, {"inner_lr": 0.0}, ValueError, "inner_lr is 0.0"),
    "inner steps": (sgd, {"inner_steps": 0}, ValueError, "inner_steps is 0"),
    "tasks": (sgd, {"tasks": 0}, ValueError, "tasks is 0"),
    "query fraction": (sgd, {"query_fraction": 1.0}, ValueError, r"share in \(0, 1\)"),
    "maml without model": (sgd, {"meta": "maml"}, ValueError, "pass model="),
}


@pytest.mark.parametrize("case", WRAPPER)
def test_wrapper(case):
    optimizer, options, error, message = WRAPPER[case]
    with pytest.raises(error, match=message):
        wrap(optimizer(), **options)


def test_maml_with_parameters_of_another_module():
    model, other = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = wrap(torch.optim.SGD(other.parameters(), lr=0.1), meta="maml", model=model)
    with pytest.raises(ValueError, match="2 parameters that are not the model's"):
        optimizer.step(lambda rows: losses(other, rows), INDEX)


def test_state_of_another_make_up():
    _, optimizer = make()
    _, bare = make(weighter=None)
    with pytest.raises(ValueError, match="load it into that optimizer before wrapping"):
        optimizer.load_state_dict(sgd().state_dict())
    with pytest.raises(ValueError, match="the saved state has no weighter"):
        optimizer.load_state_dict(bare.state_dict())
    double = wrap([sgd(), sgd()], weighter=SoftConfidentWeighter(8))
    with pytest.raises(ValueError, match="2 optimizers"):
        optimizer.load_state_dict(double.state_dict())
    with pytest.raises(ValueError, match=r"wrapper\.optimizers\[i\]"):
        double.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


WEIGHTER = {
    "no samples": (lambda: SoftConfidentWeighter(0), "num_samples is 0"),
    "rule": (lambda: SoftConfidentWeighter(8, rule="soft"), "'trimmed', 'hard', 'ratio'"),
    "kappa": (lambda: SoftConfidentWeighter(8, kappa=-1), "kappa is -1"),
    "contamination": (
        lambda: SoftConfidentWeighter(8, contamination=0.5),
        r"contamination is 0.5; expected a share in \[0, 0.5\), or 'auto'",
    ),
    "contamination by a word": (
        lambda: SoftConfidentWeighter(8, contamination="much"),
        r"contamination is 'much'; expected a share",
    ),
    "momentum": (lambda: SoftConfidentWeighter(8, momentum=1.0), "momentum is 1.0"),
    "patch scores": (
        lambda: SoftConfidentWeighter(8).fit(torch.randn(8, 4, 4)),
        r"reduce scores of parts .*\.amax",
    ),
    "wrong number": (lambda: SoftConfidentWeighter(8).fit(torch.randn(9)), "9 scores for 8"),
    "NaN": (lambda: SoftConfidentWeighter(8).fit(NAN), r"2 of 8 scores .* \[1, 5\]"),
    "unequal": (
        lambda: SoftConfidentWeighter(8).update(INDEX, torch.randn(3)),
        "3 scores and 8 indices",
    ),
    "window": (lambda: CovarianceMetaRegularizer(window=1), "at least 2 loss pairs"),
    "strength": (lambda: CovarianceMetaRegularizer(-0.1), "base_strength is -0.1"),
    "gamma": (lambda: CovarianceMetaRegularizer(gamma=float("nan")), "gamma is nan"),
}


@pytest.mark.parametrize("case", WEIGHTER)
def test_weighter_and_regularizer(case):
    make_it, message = WEIGHTER[case]
    with pytest.raises(ValueError, match=message):
        make_it()


def test_integer_scores():
    with pytest.raises(TypeError, match="floating-point"):
        SoftConfidentWeighter(8).fit(INDEX)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(DATA)


def test_loaders():
    with pytest.raises(TypeError, match="map-style"):
        IndexedDataset(Stream())
    with pytest.raises(TypeError, match="known length"):
        collect_scores(lambda batch: batch, iter([]))
    loader = torch.utils.data.DataLoader(IndexedDataset(DATA), batch_size=3, drop_last=True)
    with pytest.raises(ValueError, match=r"2 of 8 samples have no score .*drop_last"):
        collect_scores(lambda batch: batch.mean(dim=1), loader)
    with pytest.raises(ValueError, match="one anomaly score per sample"):
        collect_scores(lambda batch: batch, loader)
