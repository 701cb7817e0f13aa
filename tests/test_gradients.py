"""The small parts under the meta-step: tasks, snapshots, gradients in and out of ``.grad``."""

import pytest
import torch
from torch import nn

from comet_meta.gradients import add_gradients, as_real, compute_gradients, unscale, zeros_for_none
from comet_meta.restore import copy_tensors, copy_values, restore_on_exit
from comet_meta.tasks import can_split, split_tasks, support_query_losses


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))]


# Tasks.


def test_the_split_is_the_generators_choice():
    untouched = torch.get_rng_state()
    first, second = split_tasks(50, 3, 0.3, seeded()), split_tasks(50, 3, 0.3, seeded())
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.support, other.support)
        assert torch.equal(one.query, other.query)
    assert torch.equal(torch.get_rng_state(), untouched)
    assert torch.cat([part for task in first for part in task]).diff().ne(1).any()


@pytest.mark.parametrize(
    ("size", "tasks", "fraction", "expected"),
    [
        (10, 1, 0.3, [(7, 3)]),
        (10, 2, 0.5, [(3, 2), (3, 2)]),  # 2.5 is rounded to the even number
        (11, 2, 0.4, [(4, 2), (3, 2)]),
        (3, 9, 0.5, [(1, 2)]),  # one task of at least two rows
        (4, 9, 0.5, [(1, 1), (1, 1)]),
        (5, 1, 0.01, [(4, 1)]),
        (5, 1, 0.99, [(1, 4)]),
        (2, 1, 0.3, [(1, 1)]),
    ],
)
def test_sizes_of_support_and_query(size, tasks, fraction, expected):
    dealt = split_tasks(size, tasks, fraction)
    assert [(len(task.support), len(task.query)) for task in dealt] == expected


def test_one_row_is_not_split():
    with pytest.raises(ValueError, match="a batch of one sample can't be split"):
        split_tasks(1, 1, 0.3)
    assert not can_split(1)
    assert can_split(2)


def test_mean_losses_of_a_random_support_and_query_part():
    losses = torch.arange(10.0)
    ((support, query),) = split_tasks(10, 1, 0.3, seeded())
    found = support_query_losses(losses, 0.3, seeded())
    assert found.tolist() == [losses[support].mean(), losses[query].mean()]
    assert support_query_losses(torch.tensor([4.0]), 0.3, seeded()).tolist() == [4, 4]


# Snapshots.


def test_values_come_back_from_a_body_that_raises():
    tensors = [torch.ones(2), torch.zeros(())]
    with pytest.raises(KeyError), restore_on_exit(tensors) as saved:  # noqa: PT012
        for tensor in tensors:
            tensor.add_(5)
        assert [value.tolist() for value in saved] == [[1, 1], 0]
        raise KeyError
    assert [tensor.tolist() for tensor in tensors] == [[1, 1], 0]


def test_copies_have_no_graph_and_no_common_memory():
    leaf = parameters()[0]
    for tensor in (leaf, leaf * 2):
        (copy,) = copy_tensors([tensor])
        assert not copy.requires_grad
        assert torch.equal(copy, tensor)
        assert copy.data_ptr() != tensor.data_ptr()
    assert copy_tensors([]) == []


def test_a_parameter_is_given_values_in_place():
    leaf = parameters()[0]
    copy_values([leaf], [torch.tensor([7.0, 8.0], requires_grad=True)])
    assert leaf.tolist() == [7, 8]
    assert leaf.is_leaf
    copy_values([], [])


# Gradients.


def test_gradients_leave_what_was_there_alone():
    a, b = parameters()
    held = a.grad = torch.tensor([5.0, 5.0])
    gradients = compute_gradients(a.square().sum(), [a, b])
    assert gradients[0].tolist() == [2, 4]
    assert gradients[1] is None
    assert a.grad is held
    assert held.tolist() == [5, 5]
    assert b.grad is None


def test_gradients_are_restored_after_an_error():
    (a, b) = parameters()
    held = a.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="does not require grad"):
        compute_gradients(torch.ones(()), [a, b])
    assert a.grad is held


def test_gradients_are_those_of_the_given_parameters_alone():
    a, b = parameters()
    compute_gradients(a.sum() * b.sum(), [a])
    assert b.grad is None


def test_gradients_can_be_added_to_in_place():
    a, c = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    first, second = compute_gradients(
        (a + c).sum(), [a, c]
    )  # autograd.grad gives one tensor, stride 0
    first.add_(1)
    assert first.tolist() == [2, 2, 2]
    assert second.tolist() == [1, 1, 1]


def test_gradients_add_up_without_a_copy_and_without_a_graph():
    a, b = parameters()
    new, more = torch.ones(2), torch.tensor([1.0, 2.0], requires_grad=True)
    add_gradients([a, b], [new, None])
    assert a.grad is new
    assert b.grad is None
    add_gradients([a, b], [more, torch.ones(1, 1)])
    assert a.grad is new
    assert a.grad.tolist() == [2, 3]
    assert b.grad.tolist() == [[1]]
    assert not a.grad.requires_grad
    with pytest.raises(ValueError, match="argument 2"):
        add_gradients([a, b], [new])


def test_unused_parameters_have_gradient_zero_and_sparse_ones_are_refused():
    a, b = parameters()
    gradient = torch.ones(2)
    found = zeros_for_none([gradient, None], [a, b])
    assert found[0] is gradient
    assert found[1].tolist() == [[0]]
    with pytest.raises(TypeError, match=r"^a parameter has a sparse gradient"):
        zeros_for_none([torch.eye(2).to_sparse()], [a])


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_scaled_gradients_are_divided_or_all_zero(bad):
    scale = torch.tensor(4.0)
    gradients, finite = unscale([torch.tensor([4.0, 8.0]), torch.tensor([[2.0]])], scale)
    assert [g.tolist() for g in gradients] == [[1, 2], [[0.5]]]
    assert finite
    assert finite.shape == ()
    gradients, finite = unscale([torch.tensor([4.0, 8.0]), torch.tensor([[bad]])], scale)
    assert [g.tolist() for g in gradients] == [[0, 0], [[0]]]
    assert not finite


def test_complex_tensors_are_seen_as_pairs_on_the_same_memory():
    tensors = [torch.tensor([1 + 2j]), torch.tensor([3.0])]
    seen = as_real(tensors)
    assert seen[0].tolist() == [[1, 2]]
    assert seen[1] is tensors[1]
    seen[0].add_(1)
    assert tensors[0].tolist() == [2 + 3j]
