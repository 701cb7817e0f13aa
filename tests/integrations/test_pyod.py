"""PyOD's detectors through the adapter."""

import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("pyod.models.deep_svdd", reason='needs pip install "comet-meta[pyod]"')

from pyod.models.ae1svm import AE1SVM
from pyod.models.auto_encoder import AutoEncoder
from pyod.models.deep_svdd import DeepSVDD
from pyod.models.iforest import IForest
from pyod.models.vae import VAE
from sklearn.base import clone

from comet_meta import RowScorer, SoftConfidentWeighter
from comet_meta.integrations import pyod as adapter
from comet_meta.integrations.pyod import CoMetDetector
from snippets import run, snippet

N, BAD = 250, 15


def rows() -> np.ndarray:
    generator = np.random.default_rng(0)
    data = generator.normal(size=(N, 2)) @ generator.normal(size=(2, 6))
    data += 0.1 * generator.normal(size=(N, 6))
    data[:BAD] = 2.5 * generator.normal(size=(BAD, 6))
    return data


DETECTORS = {
    "AutoEncoder": lambda: AutoEncoder(epoch_num=6, hidden_neuron_list=[16, 2], verbose=0),
    "VAE": lambda: VAE(epoch_num=6, capacity=0.5, verbose=0),
    "DeepSVDD": lambda: DeepSVDD(
        n_features=6, epochs=6, learning_rate=1e-2, random_state=0, verbose=0
    ),
    "AE1SVM": lambda: AE1SVM(epochs=6, kernel_approx_features=64),
}


def seeded() -> None:
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002


def model_of(detector) -> torch.nn.Module:
    return getattr(detector, "model_", None) or detector.model


def unit(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(scores)


def by_value(values: np.ndarray) -> SoftConfidentWeighter:
    return SoftConfidentWeighter(prior=values.max(axis=1), part_prior=values)


def test_an_autoencoders_losses_are_weighted_value_by_value():
    # The only batch of the only epoch, so what the model learned from shows in its first step.
    seen: list[torch.Tensor] = []

    class Watched(AutoEncoder):
        def training_forward(self, batch_data):
            self.optimizer.zero_grad()
            x = batch_data[0] if isinstance(batch_data, (tuple, list)) else batch_data
            rebuilt = self.model(x).detach().requires_grad_()
            self.criterion(x, rebuilt).backward()
            seen.append(torch.cat([x, rebuilt.grad], dim=1))
            return super().training_forward(batch_data)

    data = rows().astype(np.float32)
    values = np.abs(data) + 1e-6 * np.arange(data.size).reshape(data.shape)
    weighter = by_value(values)
    weights = weighter.part_weights().numpy() * weighter.weights.numpy()[:, None]
    assert 0 < (weights == 0).mean() < 0.2
    detector = Watched(
        epoch_num=1, hidden_neuron_list=[4], preprocessing=False, verbose=0, batch_size=N
    )
    CoMetDetector(detector, weighter=weighter).fit(data)
    read, gradients = np.split(seen[0].numpy(), 2, axis=1)
    order = [int(np.abs(data - row).sum(axis=1).argmin()) for row in read]
    assert sorted(order) == list(range(N))
    # A value of weight 0 has no gradient, every other one has.
    np.testing.assert_array_equal(gradients == 0, weights[order] == 0)


def test_weights_of_values_that_cannot_be_used_are_refused():
    values = np.abs(rows())
    for name in ("VAE", "DeepSVDD", "AE1SVM"):
        with pytest.raises(TypeError, match="isn't a mean over a row's values"):
            CoMetDetector(DETECTORS[name](), weighter=by_value(values)).fit(rows())
    with pytest.raises(ValueError, match=r"shape \(250, 4\); expected .*\(250, 6\)"):
        CoMetDetector(DETECTORS["AutoEncoder"](), weighter=by_value(values[:, :4])).fit(rows())


@pytest.mark.parametrize("name", DETECTORS)
def test_unit_weights_train_to_the_same_bits_as_pyod_alone(name):
    def seeded_detector():
        seeded()
        return DETECTORS[name]()

    alone = seeded_detector()
    seeded()
    torch.manual_seed(42)
    alone = clone(alone)  # as the adapter does: some detectors set the seed when they are made
    alone.fit(rows())
    robust = CoMetDetector(seeded_detector(), weighter=SoftConfidentWeighter(N, rule=unit))
    seeded()
    torch.manual_seed(42)
    robust.fit(rows())
    pairs = zip(
        model_of(alone).state_dict().values(),
        model_of(robust.detector_).state_dict().values(),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    assert np.array_equal(alone.decision_scores_, robust.decision_scores_)
    assert np.array_equal(alone.labels_, robust.labels_)
    assert alone.threshold_ == robust.threshold_


@pytest.mark.parametrize("name", DETECTORS)
def test_weights_reach_the_training(name):
    def trained(rule):
        seeded()
        return CoMetDetector(DETECTORS[name](), weighter=SoftConfidentWeighter(N, rule=rule)).fit(
            rows()
        )

    def without_the_bad(scores):
        return (torch.arange(N) >= BAD).float()

    plain, robust = trained(unit), trained(without_the_bad)
    assert not np.array_equal(plain.decision_scores_, robust.decision_scores_)
    assert robust.weights_[:BAD].sum() == 0

    def contrast(detector):
        scores = detector.decision_scores_
        return scores[:BAD].mean() / scores[BAD:].mean()

    if name != "AE1SVM":  # whose score is signed
        assert contrast(robust) > contrast(plain)


@pytest.mark.parametrize("name", ["AutoEncoder", "VAE"])
def test_losses_by_sample_make_up_the_plain_loss(name, monkeypatch):
    """Weights a hair below 1 take the other branch, and come to nearly the same model."""
    seeded()
    plain = CoMetDetector(DETECTORS[name](), weighter=SoftConfidentWeighter(N, rule=unit))
    plain.fit(rows())
    seeded()
    near = SoftConfidentWeighter(N, rule=lambda scores: torch.full_like(scores, 1 - 1e-7))
    detector = DETECTORS[name]()
    if name == "VAE":
        plain = CoMetDetector(VAE(epoch_num=6, verbose=0), weighter=plain.weighter).fit(rows())
        detector = VAE(epoch_num=6, verbose=0)
    robust = CoMetDetector(detector, weighter=near).fit(rows())
    assert np.allclose(plain.decision_scores_, robust.decision_scores_, rtol=1e-2)
    assert not np.array_equal(plain.decision_scores_, robust.decision_scores_)


def test_it_is_an_estimator_as_others_are():
    robust = CoMetDetector(DETECTORS["AutoEncoder"](), contamination=0.05, warm_up=2)
    assert clone(robust).get_params()["contamination"] == 0.05
    assert clone(robust).set_params(detector__epoch_num=3).detector.epoch_num == 3
    data = rows()
    robust.fit(data)
    assert abs(robust.labels_.sum() - 0.05 * N) <= 1
    assert np.array_equal(robust.labels_ == 1, robust.decision_scores_ > robust.threshold_)
    assert np.array_equal(robust.decision_function(data), robust.decision_scores_)
    assert robust.predict(data[:4]).shape == (4,)
    assert robust.predict_proba(data[:4]).shape == (4, 2)
    loaded = pickle.loads(pickle.dumps(robust))
    assert np.array_equal(loaded.decision_function(data), robust.decision_scores_)
    assert not hasattr(robust.detector, "model")  # it was a clone that was fitted


@pytest.mark.parametrize("name", DETECTORS)
def test_by_default_the_weights_come_from_a_prior_of_the_rows(name):
    def fitted(weighter):
        seeded()
        return CoMetDetector(DETECTORS[name](), weighter=weighter).fit(rows())

    ours = fitted(None)
    prior = RowScorer()(rows())
    assert np.array_equal(ours.weights_, SoftConfidentWeighter(prior=prior).weights.numpy())
    assert ours.weights_[:BAD].mean() < 0.3 < 0.98 < ours.weights_[BAD:].mean()
    theirs = fitted(SoftConfidentWeighter(prior=prior))
    assert np.array_equal(ours.decision_scores_, theirs.decision_scores_)


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(TypeError, match="ConfidenceSampler"):
        CoMetDetector(IForest()).fit(rows())
    with pytest.raises(ValueError, match="warm_up is 0"):
        CoMetDetector(DETECTORS["VAE"](), warm_up=0)
    with pytest.raises(ValueError, match="contamination"):
        CoMetDetector(DETECTORS["VAE"](), contamination=0.7)
    assert adapter.DataLoader is torch.utils.data.DataLoader


def test_the_page(monkeypatch):
    names = run("docs/integrations/pyod.md", "pyod", {"X": rows()})
    assert names["labels"].sum() >= 10
    assert snippet("docs/integrations/pyod.md", "svdd")
    names = run("docs/integrations/pyod.md", "svdd", names)
    assert names["detector"].weights_.shape == (N,)
    names = run("docs/integrations/pyod.md", "review", names | {"is_bad": lambda i: i < BAD})
    weights = names["detector"].weights_
    assert weights[:BAD].max() < 0.1 < 0.85 < weights[BAD:].mean()
    names = run("docs/integrations/pyod.md", "values", names)
    assert names["weighter"].has_parts
    assert names["detector"].decision_scores_.shape == (N,)


def beyond_single_precision(name: str) -> CoMetDetector:
    data = rows()
    data[20] = 1e25  # its square is infinite
    detector = DETECTORS[name]()
    detector.preprocessing = False  # which would scale it
    return CoMetDetector(detector, weighter=SoftConfidentWeighter(N, rule=unit)).fit(data)


def test_a_row_beyond_single_precision_costs_the_others_nothing(caplog):
    robust = beyond_single_precision("AutoEncoder")
    assert all(torch.isfinite(p).all() for p in model_of(robust.detector_).parameters())
    assert "1 of 32 losses are NaN or infinite and left out: samples [20]" in caplog.text


def test_a_row_that_spoils_the_centre_gets_a_sentence(caplog):
    with pytest.raises(ValueError, match="no sample's score is finite"):
        beyond_single_precision("DeepSVDD")
    assert "step skipped" in caplog.text


@pytest.mark.parametrize(
    "kind", [lambda x: np.ascontiguousarray(x[::-1])[::-1], lambda x: x.astype(">f8")]
)
@pytest.mark.parametrize("name", ["AutoEncoder", "AE1SVM"])
def test_arrays_whose_memory_torch_cannot_share(name, kind):
    def fitted(data):
        seeded()
        return CoMetDetector(DETECTORS[name]()).fit(data)

    ours, theirs = fitted(kind(rows())), fitted(rows())
    assert np.array_equal(ours.decision_scores_, theirs.decision_scores_)
    assert np.array_equal(ours.decision_function(kind(rows())), theirs.decision_function(rows()))


def test_rows_of_another_width_get_a_sentence():
    seeded()
    detector = CoMetDetector(AutoEncoder(epoch_num=1, verbose=0)).fit(rows())
    with pytest.raises(ValueError, match="have 3 columns; the detector was fitted with 6"):
        detector.decision_function(rows()[:, :3])


def test_too_few_rows_for_a_batch_get_a_sentence():
    with pytest.raises(ValueError, match="the 20 rows don't fill a batch of 32"):
        CoMetDetector(AutoEncoder(epoch_num=1, verbose=0)).fit(rows()[:20])
