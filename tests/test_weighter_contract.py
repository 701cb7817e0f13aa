"""What every named rule promises, whatever is behind it."""

import threading
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_meta import SoftConfidentWeighter
from comet_meta.weights.rules import RuleName

RULES = get_args(RuleName)
SHIFTING = "ratio"  # the paper's rule depends on where the scores' zero lies
any_scores = st.lists(
    st.floats(-1e4, 1e4, width=32).map(lambda x: round(x, 3)), min_size=1, max_size=80
).map(torch.tensor)
# On a grid of powers of two, so that scaling and shifting them is exact.
grid_scores = st.lists(st.integers(-400, 400), min_size=8, max_size=60).map(
    lambda xs: torch.tensor(xs, dtype=torch.float32) / 16
)


def fitted(scores: torch.Tensor, rule: str) -> SoftConfidentWeighter:
    weighter = SoftConfidentWeighter(len(scores), rule=rule)
    weighter.fit(scores)
    return weighter


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40, deadline=None)
@given(scores=any_scores)
def test_weights_are_in_the_unit_interval_and_never_rise_with_the_score(rule, scores):
    weights = fitted(scores, rule)()
    assert weights.shape == scores.shape
    assert ((weights >= 0) & (weights <= 1)).all()
    assert (weights[scores.argsort()].diff() <= 1e-6).all()
    for score in scores.unique():  # equal scores, equal weights
        same = weights[scores == score]
        assert (same == same[0]).all()


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=25, deadline=None)
@given(scores=any_scores, seed=st.integers(0, 99))
def test_a_permutation_of_the_samples_permutes_the_weights(rule, scores, seed):
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(fitted(scores[order], rule)(), fitted(scores, rule)()[order])


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != SHIFTING])
@settings(max_examples=25, deadline=None)
@given(
    scores=grid_scores,
    scale=st.sampled_from([2.0**-10, 1.0, 2.0**10]),
    shift=st.sampled_from([-64.0, 0.0, 32.0]),
)
def test_weights_do_not_depend_on_offset_and_scale(rule, scores, scale, shift):
    moved = fitted(scale * (scores + shift), rule)()
    torch.testing.assert_close(moved, fitted(scores, rule)(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=15, deadline=None)
@given(scores=grid_scores, scale=st.sampled_from([2.0**-10, 2.0**10]))
def test_no_rule_depends_on_the_scale_of_scores_that_are_not_negative(rule, scores, scale):
    scores = scores - scores.min()
    moved = fitted(scale * scores, rule)()
    torch.testing.assert_close(moved, fitted(scores, rule)(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 40), value=st.floats(-1e6, 1e6, width=32))
def test_equal_scores_tell_nothing(rule, count, value):
    weighter = fitted(torch.full((count,), value), rule)
    assert (weighter() == 1).all()
    assert weighter.threshold == torch.inf


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", range(1, 8))
def test_too_few_scores_tell_nothing(rule, count):
    assert fitted(torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 99.0])[-count:], rule)().min() == 1


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=25, deadline=None)
@given(scores=any_scores, sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), data=st.data())
def test_streaming_equals_batch_in_any_order_and_any_batches(rule, scores, sizes, data):
    order = torch.tensor(data.draw(st.permutations(range(len(scores)))))
    streaming = SoftConfidentWeighter(len(scores), rule=rule)
    start, k = 0, 0
    while start < len(order):
        index = order[start : start + sizes[k % len(sizes)]]
        streaming.update(index, scores[index])
        start, k = start + len(index), k + 1
    batch = fitted(scores, rule)
    assert torch.equal(streaming(), batch())
    assert torch.equal(streaming.threshold, batch.threshold)
    assert torch.equal(streaming.ranking(), batch.ranking())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_scores_of_every_type_are_taken(rule, dtype):
    scores = torch.cat([torch.linspace(0, 1, 60), torch.linspace(8, 9, 6)]).to(dtype)
    weighter = fitted(scores, rule)
    torch.testing.assert_close(weighter(), fitted(scores.float(), rule)())
    assert weighter().dtype == torch.float32


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("rule", RULES)
def test_scores_of_any_magnitude_are_taken(rule, scale):
    scores = torch.cat([torch.linspace(1, 2, 60), torch.linspace(8, 9, 6)])
    expected = fitted(scores, rule)()
    torch.testing.assert_close(fitted(scores * scale, rule)(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=25, deadline=None)
@given(scores=any_scores)
def test_the_threshold_parts_the_suspects_and_the_ranking_is_whole(rule, scores):
    weighter = fitted(scores, rule)
    ranking = weighter.ranking()
    assert sorted(ranking.tolist()) == list(range(len(scores)))
    assert (weighter()[ranking].diff() >= 0).all()
    above = scores > weighter.threshold
    if above.any():
        assert weighter()[above].max() <= weighter()[~above].min()


# Threads: any number of readers, one writer at a time (docs/reliability.md).


def test_a_weighter_serves_readers_while_one_thread_fits():
    weighter = SoftConfidentWeighter(4000, rule="hard")
    low, high = torch.rand(4000), torch.rand(4000)
    low[:100] += 50
    high[-100:] += 50
    stop, odd, reads = threading.Event(), [], []

    def read() -> None:
        while not stop.is_set():
            found = weighter(torch.arange(0, 4000, 7))
            reads.append(1)
            # A refit may be halfway, but a weight is always one: never rubbish.
            if not ((found == 0) | (found == 1)).all():
                odd.append(found)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for k in range(100):
        weighter.fit((low, high)[k % 2])
    stop.set()
    for reader in readers:
        reader.join()
    assert reads
    assert not odd
    assert torch.equal(weighter(), fitted(high, "hard")())


def test_batches_from_several_threads_are_all_counted_when_a_lock_lets_one_in_at_a_time():
    scores = torch.rand(3000)
    weighter, lock = SoftConfidentWeighter(3000, rule="hard"), threading.Lock()

    def stream(part: torch.Tensor) -> None:
        for index in part.split(37):
            with lock:
                weighter.update(index, scores[index])

    threads = [
        threading.Thread(target=stream, args=(part,)) for part in torch.randperm(3000).chunk(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(weighter(), fitted(scores, "hard")())
