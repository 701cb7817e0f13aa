"""Weights belong to samples and to a fit: identities, second data sets, positions that collide."""

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

from comet_meta import (
    CoMet,
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    IndexedDataset,
    SoftConfidentWeighter,
    collect_scores,
)
from comet_meta.identity import sample_identity

N = 20
DATA = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))


class Files(Dataset):
    """Lists its files as torchvision's ImageFolder does."""

    def __init__(self, paths):
        self.samples = [(path, 0) for path in paths]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, k):
        return float(k)


class Opaque(Dataset):
    """Tells its length alone."""

    def __init__(self, rows):
        self._rows = rows

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, k):
        return self._rows[k]


PATHS = [f"/data/pictures/{k // 5}/{k:02}.png" for k in range(N)]
RENAMED = [*PATHS[:7], "/data/pictures/1/zebra.png", *PATHS[8:]]


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        (Files(PATHS), Files(PATHS), True),
        (Files(PATHS), Files(RENAMED), False),
        (Files(PATHS), Files(PATHS[::-1]), False),
        (Files(PATHS), Files([p.replace("/data", "/mnt/other") for p in PATHS]), True),
        (Files(PATHS), Files([Path(p) for p in PATHS]), True),
        (Files(["a/é.png", "a/b.png"]), Files(["a/e\u0301.png", "a/b.png"]), True),
        (Files(PATHS), IndexedDataset(Files(PATHS)), True),
        (Subset(Files(PATHS), range(5)), Subset(Files(PATHS), range(5, 10)), False),
        (ConcatDataset([Files(PATHS), Files(RENAMED)]), ConcatDataset([Files(RENAMED)] * 2), False),
        (DATA, DATA.clone(), True),
        (DATA, DATA.flip(0), False),
        (TensorDataset(DATA), TensorDataset(DATA + 1), False),
        (DATA.numpy(), DATA.numpy().copy(), True),
        (Opaque(DATA), Opaque(DATA), True),
        (Opaque(DATA), Opaque(DATA[:-1]), False),
        (["a.png"], ["b.png"], False),
    ],
)
def test_identities_differ_where_samples_do(first, second, equal):
    assert (sample_identity(first) == sample_identity(second)) is equal


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=8))
def test_any_names_have_an_identity_that_repeats(names):
    assert sample_identity(Files(names)) == sample_identity(Files(list(names)))
    assert sample_identity(Files(names)).startswith(f"{len(names)} samples:")


def fitted(dataset) -> SoftConfidentWeighter:
    weighter = SoftConfidentWeighter(N, rule="hard")
    weighter.identify(dataset)
    scores = torch.arange(float(N))
    scores[-1] = 100
    weighter.fit(scores)
    return weighter


def test_saved_weights_are_refused_for_other_samples():
    state = copy.deepcopy(fitted(Files(PATHS)).state_dict())
    again = SoftConfidentWeighter(N, rule="hard")
    again.identify(Files([p.replace("/data", "/elsewhere") for p in PATHS]))
    again.load_state_dict(state)
    assert again.weights[-1] == 0
    other = SoftConfidentWeighter(N, rule="hard")
    other.identify(Files(RENAMED))
    with pytest.raises(ValueError, match="the weights belong to other samples"):
        other.load_state_dict(state)
    assert other.weights.min() == 1
    # In the other order too: loaded first, and then told the data set.
    late = SoftConfidentWeighter(N, rule="hard")
    late.load_state_dict(state)
    with pytest.raises(ValueError, match="the weights belong to other samples"):
        late.identify(Files(RENAMED))
    with pytest.raises(ValueError, match="the weighter is for 20 samples, the data set has 3"):
        late.identify(Files(PATHS[:3]))


def test_a_resumed_comet_refuses_other_rows():
    theta = nn.Parameter(torch.ones(3))
    state = CoMet(DataLoader(DATA, 4), torch.optim.SGD([theta], lr=0.1)).state_dict()
    CoMet(DataLoader(DATA.clone(), 4)).load_state_dict(state)
    with pytest.raises(ValueError, match="the weights belong to other samples"):
        CoMet(DataLoader(DATA.flip(0), 4)).load_state_dict(state)


def test_one_weighter_over_two_data_sets_starts_fresh():
    weighter = SoftConfidentWeighter(N, rule="hard")
    regularizer = CovarianceMetaRegularizer()
    for rows in (DATA, DATA.flip(0)):
        comet = CoMet(DataLoader(rows, 5), weighter=weighter, regularizer=regularizer)
        assert bool((weighter() == 1).all())
        assert bool(weighter.scores.isnan().all())
        assert regularizer.count == 0
        theta = torch.ones(3, requires_grad=True)
        for batch in comet:
            comet.loss((batch * theta).square().sum(dim=1) + 100 * (comet.index == 3)).backward()
        assert weighter().min() == 0
        assert regularizer.count == 4


def test_what_was_set_before_the_first_fit_stays():
    weighter = fitted(DATA)
    comet = CoMet(DataLoader(DATA, 5), weighter=weighter)
    assert comet.weighter.weights[-1] == 0
    # To go on elsewhere, with another loader over the same samples:
    state = copy.deepcopy(comet.state_dict())
    later = CoMet(DataLoader(DATA, 10), weighter=weighter)
    assert later.weighter.weights.min() == 1
    later.load_state_dict(state)
    assert later.weighter.weights[-1] == 0


def test_a_prior_is_not_carried_to_another_data_set():
    weighter = SoftConfidentWeighter(prior=torch.arange(float(N)))
    weights = weighter().clone()
    for _ in range(2):
        CoMet(DataLoader(DATA, 5), weighter=weighter)
        assert torch.equal(weighter(), weights)
    with pytest.raises(ValueError, match="the weights belong to other samples"):
        CoMet(DataLoader(DATA.flip(0), 5), weighter=weighter)


def test_validation_losses_are_not_weighted_by_training_samples():
    theta = torch.ones(3, requires_grad=True)
    optimizer = CoMetOptimizerWrapper(
        torch.optim.SGD([theta], lr=0.1),
        weighter=fitted(DATA),
        regularizer=CovarianceMetaRegularizer(),
    )
    validation = torch.tensor([4.0, 5.0, 9.0])
    with torch.no_grad():
        plain = validation.mean() + optimizer.regularizer.penalty([theta])
        # Positions in the validation set, of which the last has weight 0 in training, or of more.
        for index in (torch.tensor([17, 18, 19]), torch.tensor([30, 31, 32]), None):
            assert torch.equal(optimizer.objective(validation, index), plain)
        pairs = torch.stack([validation, torch.ones(3)])
        assert torch.equal(optimizer.objective(pairs), plain)
    assert optimizer.regularizer.count == 0
    comet = CoMet(DataLoader(DATA, 5), weighter=fitted(DATA))
    with torch.no_grad():
        assert comet.loss({"a": validation, "b": torch.ones(3, 2)}) == 7
    assert bool(comet.epoch_loss.isnan())


class TestJoinedDataSets:
    parts = IndexedDataset(DATA[:8]), IndexedDataset(DATA[8:])

    def test_a_sum_has_the_positions_of_the_whole(self):
        joined = self.parts[0] + self.parts[1]
        index = torch.cat([index for index, _ in DataLoader(joined, batch_size=6)])
        assert index.tolist() == list(range(N))
        with pytest.raises(TypeError, match="index the whole"):
            self.parts[0] + DATA

    @pytest.mark.parametrize(
        ("dataset", "advice"),
        [
            (ConcatDataset(parts), r"IndexedDataset\(ConcatDataset"),
            (Subset(parts[0], [1, 2]), r"IndexedDataset\(Subset"),
            (Subset(ConcatDataset(parts), [1, 2]), r"IndexedDataset\(ConcatDataset"),
        ],
    )
    def test_parts_that_carry_positions_are_refused(self, dataset, advice):
        with pytest.raises(TypeError, match=advice):
            collect_scores(lambda batch: batch.sum(dim=1), DataLoader(dataset))
        with pytest.raises(TypeError, match=advice):
            SoftConfidentWeighter().identify(dataset)
        with pytest.raises(TypeError, match=advice):
            CoMet(DataLoader(dataset))

    def streamed(self, caplog, loader: DataLoader, passes: int = 3) -> list[str]:
        """What a bare loop that streams its scores is told."""
        weighter = SoftConfidentWeighter(N)
        for _ in range(passes):
            for index, batch in loader:
                weighter.update(index, batch.sum(dim=1))
        return [record.message for record in caplog.records]

    @pytest.mark.parametrize("batch", [1, 3, 4])
    def test_a_bare_loop_that_streams_its_scores_is_told_once(self, caplog, batch):
        loader = DataLoader(ConcatDataset(self.parts), batch_size=batch, shuffle=True)
        (message,) = self.streamed(caplog, loader)
        missing = max(map(len, self.parts))
        assert f"for {N} samples, and none for the samples from {missing} on" in message
        assert "IndexedDataset(ConcatDataset([first, second]))" in message

    @pytest.mark.parametrize(
        "settings",
        [
            {"shuffle": True},
            {"drop_last": True},
            {"shuffle": True, "drop_last": True},
            {"sampler": RandomSampler(range(N), replacement=True, num_samples=10 * N)},
        ],
    )
    def test_other_loops_are_told_nothing(self, caplog, settings):
        assert not self.streamed(caplog, DataLoader(IndexedDataset(DATA), batch_size=7, **settings))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_an_unknown_number_of_samples_is_known_after_the_first_pass(shuffle, batch):
    scores = torch.arange(float(N))
    scores[3] = 1000
    weighter = SoftConfidentWeighter(rule="hard")
    torch.manual_seed(0)

    def one_pass():
        order = torch.randperm(N) if shuffle else torch.arange(N)
        for index in order.split(batch):
            before = weighter().clone()
            weighter.update(index, scores[index])
            yield before

    assert all(bool((before == 1).all()) for before in one_pass())
    fits = [bool((before == 0).any()) for before in one_pass()]
    assert fits == [False, *[True] * (len(fits) - 1)]  # as soon as the first sample comes again
    assert weighter().argmin() == 3


def test_the_first_pass_may_be_saved_and_resumed():
    scores = torch.arange(float(N))
    scores[3] = 1000
    weighter, resumed = SoftConfidentWeighter(rule="hard"), SoftConfidentWeighter(rule="hard")
    for each in torch.arange(N)[:12].split(4):
        weighter.update(each, scores[each])
    resumed.load_state_dict(copy.deepcopy(weighter.state_dict()))
    for each in [*torch.arange(N)[12:].split(4), torch.arange(4)]:
        for one in (weighter, resumed):
            one.update(each, scores[each])
    assert torch.equal(weighter(), resumed())
    assert resumed().min() == 0


class TestNumbersOfOtherKinds:
    """Arrays, lists and numbers where tensors are expected."""

    scores = (*np.linspace(0, 1, N - 1), 9.0)

    @pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, np.float32])
    def test_scores(self, kind):
        weighters = [SoftConfidentWeighter(N, rule="hard") for _ in range(3)]
        given_scores = kind(self.scores)
        weighters[0].fit(given_scores)
        weighters[1].update(np.arange(N), given_scores)
        weighters[2] = SoftConfidentWeighter(prior=given_scores, rule="hard")
        for each in weighters:
            assert each.weights.tolist() == [1.0] * (N - 1) + [0.0]
            assert each(np.array([N - 1])).item() == each([N - 1]).item() == 0

    @pytest.mark.parametrize(
        "kind",
        [
            lambda x: np.ascontiguousarray(x[::-1])[::-1],  # read backwards
            lambda x: x.astype(">f8"),
            lambda x: x.astype(np.longdouble),
            lambda x: np.broadcast_to(x, (1, N))[0],  # not to be written
            lambda x: np.stack([x, x], axis=1)[:, 1],
            lambda x: np.ma.masked_array(x, mask=np.zeros(N, dtype=bool)),
        ],
    )
    def test_arrays_whose_memory_torch_cannot_share(self, kind):
        weighter = SoftConfidentWeighter(N, rule="hard")
        with warnings.catch_warnings(action="error"):
            weighter.fit(kind(np.array(self.scores)))
        assert weighter.scores.tolist() == torch.tensor(self.scores).float().tolist()

    def test_masked_scores_are_none(self):
        scores = np.ma.masked_array(self.scores, mask=np.arange(N) == 3)
        with pytest.raises(ValueError, match=r"NaN or infinite \(first at positions \[3\]\)"):
            SoftConfidentWeighter(N).fit(scores)

    @pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64, ">i8", np.int16])
    def test_positions_of_every_integer_type(self, kind):
        weighter = SoftConfidentWeighter(N, rule="hard")
        weighter.fit(self.scores)
        index = np.array([N - 1, 0]).astype(kind)
        assert weighter(index).tolist() == [0, 1]
        assert weighter(index[::-1]).tolist() == [1, 0]
        with pytest.raises(IndexError, match=f"index {N} is out of range"):
            weighter(index + 1)

    @pytest.mark.parametrize("k", [-1, 2.0, "3"])
    def test_numbers_of_suspects_that_are_none(self, k):
        weighter = SoftConfidentWeighter(N)
        assert len(weighter.ranking(np.int64(2))) == 2
        with pytest.raises(ValueError, match="expected a number of samples"):
            weighter.ranking(k)

    @pytest.mark.parametrize("count", [5.0, "5", 0, -1])
    def test_sizes_that_are_none(self, count):
        with pytest.raises(ValueError, match="expected the set's size"):
            SoftConfidentWeighter(count)

    @pytest.mark.parametrize("returned", [None, ["a"] * N, torch.zeros(N, dtype=torch.complex64)])
    def test_what_a_score_function_returns(self, returned):
        loader = DataLoader(IndexedDataset(DATA), batch_size=N)
        with pytest.raises(TypeError, match="score_fn returned"):
            collect_scores(lambda _: returned, loader)
        backwards = collect_scores(lambda batch: batch[:, 0].numpy()[::-1], loader)
        assert backwards.tolist() == DATA[:, 0].flip(0).tolist()

    @pytest.mark.parametrize("keys", [["a", "b"], [("a", 1), ("b", 2)]])
    def test_samples_with_keys(self, keys):
        loader = DataLoader(dict.fromkeys(keys, DATA[0]), batch_sampler=[keys])
        with pytest.raises(TypeError, match="expected positions, integers from 0 on"):
            next(iter(CoMet(loader)))

    @pytest.mark.parametrize("wrong", ["ab", ["a", "b"], [[1.0], [1.0, 2.0]], None, [1, 2], {1: 2}])
    def test_what_cannot_be_read_gets_a_sentence(self, wrong):
        for name, call in (
            ("scores", SoftConfidentWeighter(2).fit),
            ("prior", lambda each: SoftConfidentWeighter(prior=each)),
        ):
            if wrong is None:
                continue
            with pytest.raises(TypeError, match=f"{name} is .*; expected a floating-point tensor"):
                call(wrong)
        with pytest.raises((TypeError, ValueError, IndexError), match=r"index|expected"):
            SoftConfidentWeighter(2)(["a", "b"])

    def test_features_weights_and_losses(self):
        from comet_meta import ConfidenceSampler, MemoryScorer, RowScorer

        rows = DATA.numpy()
        assert torch.equal(MemoryScorer()(rows), MemoryScorer()(DATA))
        assert torch.equal(RowScorer()(rows.tolist()), RowScorer()(torch.tensor(rows.tolist())))
        assert 1 not in list(ConfidenceSampler([1.0, 0.0, 1.0]))
        assert 1 not in list(ConfidenceSampler(np.array([1.0, 0.0, 1.0])))
        regularizer = CovarianceMetaRegularizer()
        regularizer.update(1.0, np.float64(2.0))
        assert regularizer.pairs[-1].tolist() == [1, 2]
        optimizer = CoMetOptimizerWrapper(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
        for losses in ([torch.ones(()), torch.ones(())], np.ones(2), 0.5):
            with pytest.raises(TypeError, match=r"carry no gradient; torch\.stack"):
                optimizer.objective(losses)

    def test_scores_from_a_function_may_be_arrays(self):
        loader = DataLoader(IndexedDataset(DATA), batch_size=6)
        expected = collect_scores(lambda batch: batch.sum(dim=1), loader)
        assert torch.equal(collect_scores(lambda batch: batch.sum(dim=1).numpy(), loader), expected)
        assert torch.equal(
            collect_scores(lambda batch: batch.sum(dim=1).tolist(), loader), expected
        )


@pytest.mark.parametrize("size", [1e25, 1e38])
def test_large_numbers_are_not_called_nan(size):
    from comet_meta import MemoryScorer, RowScorer

    with pytest.raises(ValueError, match=r"features reach \de\+\d+: their squares overflow"):
        MemoryScorer()(DATA * size)
    rows = RowScorer()(DATA.double() * size)
    torch.testing.assert_close(rows, RowScorer()(DATA.double()))
    scores = torch.cat([torch.linspace(0.1, 0.2, N - 1), torch.tensor([2.0])])
    for rule in ("hard", "trimmed", "ratio"):
        near, far = (SoftConfidentWeighter(N, rule=rule) for _ in range(2))
        near.fit(scores)
        far.fit(scores * size)
        torch.testing.assert_close(far(), near())
    with pytest.raises(ValueError, match="more than single precision holds"):
        SoftConfidentWeighter(N).fit(scores.double() * 1e300)
