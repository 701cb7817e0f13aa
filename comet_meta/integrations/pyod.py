"""PyOD's deep detectors, trained on data that nobody has cleaned."""

import copy
import types
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pyod.models.ae1svm import AE1SVM
from pyod.models.auto_encoder import AutoEncoder
from pyod.models.base import BaseDetector
from pyod.models.deep_svdd import DeepSVDD
from pyod.models.vae import VAE
from sklearn.base import clone
from sklearn.utils.validation import check_array, check_is_fitted
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from typing_extensions import Self, override

from comet_meta.arrays import shareable
from comet_meta.comet import CoMet
from comet_meta.data import finite_scores
from comet_meta.loaders import with_batches
from comet_meta.nonfinite import finite_steps_only
from comet_meta.restore import eval_mode, same_random_numbers
from comet_meta.sampler import ConfidenceSampler
from comet_meta.weights.prior import RowScorer
from comet_meta.weights.weighter import SoftConfidentWeighter

Array = npt.NDArray[Any]


class CoMetDetector(BaseDetector):  # type: ignore[misc]
    """A PyOD deep detector that gives little weight to the training rows that fit in least.

    The detector's own code trains it. ``AutoEncoder`` and ``VAE`` have a criterion, whose losses
    are weighted row by row. ``DeepSVDD`` and ``AE1SVM`` compute loss and optimizer inside one
    method, so their rows are drawn by confidence instead. With weights that are all 1, all four
    train to the same bits as PyOD alone.

    The weights come from the scores of :class:`~comet_meta.RowScorer`, before the first step. The
    KL term of a ``VAE`` is limited to ``capacity`` row by row, where PyOD limits its mean.

    Args:
        detector: An untrained PyOD detector; a clone of it is fitted.
        contamination: Share of the rows that ``labels_`` and ``threshold_`` take for outliers, in
            (0, 0.5]. None: the detector's own. The weights don't depend on it: pass ``weighter``
            with a ``contamination`` for that.
        weighter: Weights of the rows. None: ``SoftConfidentWeighter(prior=RowScorer()(rows))``. It
            is copied, so that ``fit`` can be called again. Without a prior, the weights follow the
            detector's own scores, once an epoch. With a ``part_prior`` (N, F), such as that of
            :meth:`RowScorer.score_parts <comet_meta.RowScorer.score_parts>`, an ``AutoEncoder``'s
            losses are weighted value by value as well.
        warm_up: Number of epochs before a weighter without a prior is first fitted, >= 1. Scores of
            an untrained detector mean nothing.

    Attributes:
        detector_: The fitted detector.
        weights_: How far each training row was trusted, its values included, shape (N,), in [0, 1].
        decision_scores_: Anomaly scores of the training rows, shape (N,).
        threshold_: The score above which a row is an outlier.
        labels_: 1 for outliers among the training rows, 0 for others, shape (N,).

    Raises:
        ValueError: If ``contamination`` or ``warm_up`` is out of range; in ``fit``, if the
            weighter's weights of parts don't fit the rows.
        TypeError: In ``fit``, if it isn't one of these detectors, or can't weight values.

    Example:
        >>> import numpy as np
        >>> from pyod.models.auto_encoder import AutoEncoder
        >>> rows = np.random.default_rng(0).normal(size=(200, 1)) * [1.0, 2.0, -1.0, 0.5]
        >>> rows[:10] = [3.0, -3.0, 3.0, 3.0]
        >>> detector = CoMetDetector(AutoEncoder(epoch_num=5, verbose=0), contamination=0.05)
        >>> int(detector.fit(rows).labels_[:10].sum())
        10
    """

    def __init__(
        self,
        detector: BaseDetector,
        contamination: float | None = None,
        weighter: SoftConfidentWeighter | None = None,
        warm_up: int = 1,
    ) -> None:
        share = detector.contamination if contamination is None else contamination
        super().__init__(contamination=share)
        if warm_up < 1:
            raise ValueError(f"warm_up is {warm_up}; expected at least 1 epoch before the weights")
        self.detector = detector
        self.weighter = weighter
        self.warm_up = warm_up

    @override
    def fit(self, X: Array, y: Any = None) -> Self:
        """Train on the rows.

        Args:
            X: Shape (N, F).
            y: Ignored.

        Returns:
            The detector itself.
        """
        rows = shareable(check_array(X))
        self.n_features_in_ = rows.shape[1]
        self._set_n_classes(y)
        detector = clone(self.detector)
        weighter = copy.deepcopy(self.weighter) or _default_weighter(rows)
        if weighter.has_parts:
            _check_parts(detector, weighter, rows)
        if isinstance(detector, (AutoEncoder, VAE)):
            _fit_weighted(detector, rows, weighter, self.warm_up)
        elif isinstance(detector, (DeepSVDD, AE1SVM)):
            _fit_drawn(detector, rows, weighter, self.warm_up)
        else:
            raise TypeError(
                f"how a {type(detector).__name__} trains isn't known here; expected an AutoEncoder,"
                " VAE, DeepSVDD or AE1SVM. Any other loop can draw its rows with "
                "comet_meta.ConfidenceSampler"
            )
        self.detector_ = detector
        self.weights_ = weighter.mean_weights().numpy()
        self.decision_scores_ = detector.decision_scores_
        self._process_decision_scores()
        return self

    @override
    def decision_function(self, X: Array) -> Array:
        """Anomaly scores of rows.

        Args:
            X: Shape (M, F).

        Returns:
            Higher = more anomalous, shape (M,).

        Raises:
            ValueError: If the rows aren't (M, F) with the F of ``fit``.
        """
        check_is_fitted(self, "detector_")
        rows = shareable(check_array(X))
        if rows.shape[1] != self.n_features_in_:
            raise ValueError(
                f"the rows have {rows.shape[1]} columns; the detector was fitted with "
                f"{self.n_features_in_}"
            )
        scores: Array = self.detector_.decision_function(rows)
        return scores


def _default_weighter(rows: Array) -> SoftConfidentWeighter:
    """Weights from a prior of the rows (N, F), which may be of any kind of number."""
    return SoftConfidentWeighter(prior=RowScorer()(rows.astype(np.float64)))


def _check_parts(detector: BaseDetector, weighter: SoftConfidentWeighter, rows: Array) -> None:
    if not isinstance(detector, AutoEncoder):
        raise TypeError(
            f"the weighter has weights of parts, but the loss of a {type(detector).__name__} isn't "
            "a mean over a row's values; leave part_prior out, or take an AutoEncoder"
        )
    shape = tuple(weighter.part_weights().shape)
    if shape != rows.shape:
        raise ValueError(
            f"the weighter's part_prior has the shape {shape}; expected a score for each value of "
            f"the rows, {rows.shape}"
        )


def _check_batches(loader: DataLoader[Any]) -> None:
    if len(loader) == 0:
        raise ValueError(
            f"the {len(loader.dataset)} rows don't fill a batch of {loader.batch_size}, "  # type: ignore[arg-type]
            "and PyOD leaves out what doesn't; give the detector a smaller batch_size"
        )


def _fit_weighted(
    detector: AutoEncoder | VAE, rows: Array, weighter: SoftConfidentWeighter, warm_up: int
) -> None:
    """Fit a detector whose ``train(loader)`` calls its ``criterion`` on each batch."""
    plain = detector.criterion

    def train(loader: DataLoader[Any]) -> None:
        _check_batches(loader)
        comet = CoMet(
            loader,
            detector.optimizer,
            scores=detector.evaluating_forward,
            model=detector.model,
            weighter=weighter,
            warm_up=warm_up,
        )

        def criterion(*tensors: Tensor, **settings: Any) -> Tensor:
            if not weighter.has_parts and bool((weighter(comet.index) == 1).all()):
                whole: Tensor = plain(*tensors, **settings)
                if bool(whole.isfinite()):  # PyOD reads it after the step anyway
                    comet.watch(whole)
                    return whole

            def loss_of(*single: Tensor) -> Tensor:
                loss: Tensor = plain(*(value[None] for value in single), **settings)
                return loss

            if not weighter.has_parts:
                return comet.loss(torch.vmap(loss_of)(*tensors))
            of_values: Tensor = torch.vmap(torch.vmap(loss_of))(*tensors)
            return comet.loss((weighter.part_weights(comet.index) * of_values).mean(dim=1))

        detector.criterion = criterion
        type(detector).train(detector, comet)

    detector.train = train
    try:
        detector.fit(rows)
    finally:
        del detector.train
        detector.criterion = plain


def _fit_drawn(
    detector: DeepSVDD | AE1SVM, rows: Array, weighter: SoftConfidentWeighter, warm_up: int
) -> None:
    """Fit a detector that makes a shuffling DataLoader of the rows, which has to be replaced."""
    model_name = "model_" if isinstance(detector, DeepSVDD) else "model"

    def weights() -> Tensor:
        if sampler.epoch >= warm_up and weighter.needs_scores:
            models = [getattr(detector, model_name)]
            with eval_mode(models), same_random_numbers(models):
                scores = torch.as_tensor(detector.decision_function(rows)).float()
                weighter.fit(finite_scores(scores))
        trust: Tensor = weighter()
        return trust

    sampler = ConfidenceSampler(weights, len(rows))
    with finite_steps_only():
        _fit_with(sampler, detector, rows)


def _fit_with(sampler: ConfidenceSampler, detector: DeepSVDD | AE1SVM, rows: Array) -> None:
    """Fit a detector with its rows drawn by a sampler."""
    if isinstance(detector, DeepSVDD):
        # DeepSVDD makes its loader inside fit. Run a copy of fit in which the name DataLoader
        # stands for a loader with our sampler.
        fit = type(detector).fit

        def loader_of(dataset: Any, batch_size: int, shuffle: bool) -> DataLoader[Any]:  # noqa: ARG001
            return DataLoader(dataset, batch_size=batch_size, sampler=sampler)

        names = {**fit.__globals__, "DataLoader": loader_of}
        types.FunctionType(fit.__code__, names, "fit", fit.__defaults__, fit.__closure__)(
            detector, rows
        )
        return

    def train(loader: DataLoader[Any]) -> None:
        _check_batches(loader)
        size, drop_last = loader.batch_size or 1, loader.drop_last
        drawn = with_batches(loader, BatchSampler(sampler, size, drop_last))
        type(detector)._train_autoencoder(detector, drawn)

    detector._train_autoencoder = train
    try:
        detector.fit(rows)
    finally:
        del detector._train_autoencoder
