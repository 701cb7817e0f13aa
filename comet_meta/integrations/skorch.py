"""skorch: nets that train on data that nobody has cleaned."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from skorch import NeuralNet
from skorch.callbacks import Callback
from skorch.dataset import unpack_data
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self, override

from comet_meta.comet import CoMet
from comet_meta.data import IndexedDataset
from comet_meta.identity import sample_identity
from comet_meta.weights.weighter import SoftConfidentWeighter


class CoMetCallback(Callback):  # type: ignore[misc]
    """Weighs the losses of a skorch net by the confidence in its samples.

    The net needs a criterion with ``reduction="none"``. While it trains, the callback puts a
    :class:`~comet_meta.CoMet` in the place of its training iterator and takes the loss from there;
    the validation loss is the plain mean.

    Args:
        scores: Anomaly scores of a batch, (net, batch) -> (B,), the module in eval mode. By default
            the criterion's losses.
        weighter: Weights of the samples; by default one with the default rule.
        warm_up: Number of epochs before the first fit of the weights, >= 1.

    Attributes:
        comet: The :class:`~comet_meta.CoMet` object, from the start of training on:
            ``callback.comet.suspects()``. Positions are those in the training part if the net
            splits a validation part off; pass ``train_split=None`` to train on all. A pickled net
            keeps the weights, and has the object again when ``partial_fit`` goes on.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> rows = torch.randn(64, 3)
        >>> net = NeuralNet(
        ...     nn.Linear, nn.MSELoss, criterion__reduction="none", module__in_features=3,
        ...     module__out_features=3, train_split=None, max_epochs=3, verbose=0,
        ...     callbacks=[("comet", CoMetCallback())])
        >>> net = net.fit(rows, rows)
        >>> dict(net.callbacks_)["comet"].comet.suspects(5).shape
        torch.Size([5])
    """

    def __init__(
        self,
        scores: Callable[[NeuralNet, Any], Tensor] | None = None,
        weighter: SoftConfidentWeighter | None = None,
        warm_up: int = 1,
    ) -> None:
        self.scores = scores
        self.weighter = weighter
        self.warm_up = warm_up

    _previous: CoMet | None = None
    _kept: tuple[str, dict[str, Any]] | None = None  # samples and state of an earlier training

    @override
    def initialize(self) -> Self:
        """Start a training from the beginning."""
        self._previous = self._kept = None
        return super().initialize()  # type: ignore[no-any-return]

    @override
    def on_train_begin(self, net: NeuralNet, X: Any = None, y: Any = None, **_: Any) -> None:
        """Take the place of the net's iterator and loss."""
        # partial_fit goes on with the weights, if it is with the same samples.
        self._kept = self._state_to_keep()
        # No local functions: a checkpoint may pickle the net in the middle of its training.
        net.get_iterator = partial(self._iterator, net)
        net.get_loss = partial(self._loss, net)

    def _iterator(
        self, net: NeuralNet, dataset: Dataset[Any], training: bool = False, **settings: Any
    ) -> Any:
        """As the net's, with a CoMet for training."""
        loader: DataLoader[Any] = type(net).get_iterator(net, dataset, training, **settings)
        if not training:
            return loader
        if isinstance(loader.dataset, IndexedDataset):
            raise TypeError(
                "the callback knows the positions of the samples itself; give the net the data set "
                "without its IndexedDataset"
            )
        self.comet = CoMet(
            loader,
            [getattr(net, f"{name}_") for name in net._optimizers],
            scores=partial(self._score, net),
            model=net.module_,
            weighter=self.weighter,
            warm_up=self.warm_up,
        )
        if self._kept is not None and self._kept[0] == sample_identity(loader.dataset):
            self.comet.load_state_dict(self._kept[1])
        self._previous = self.comet
        return self.comet

    def _loss(self, net: NeuralNet, *args: Any, training: bool = False, **kwargs: Any) -> Tensor:
        """As the net's, weighted in training."""
        losses: Tensor = type(net).get_loss(net, *args, training=training, **kwargs)
        return self.comet.loss(losses) if training else losses.mean()

    def _score(self, net: NeuralNet, batch: Any) -> Tensor:
        if self.scores is not None:
            return self.scores(net, batch)
        inputs, targets = unpack_data(batch)
        losses: Tensor = type(net).get_loss(
            net, net.infer(inputs), targets, X=inputs, training=False
        )
        return losses.flatten(1).mean(dim=1) if losses.dim() > 1 else losses

    def _state_to_keep(self) -> tuple[str, dict[str, Any]] | None:
        if self._previous is None:
            return self._kept
        return sample_identity(self._previous.dataset), copy.deepcopy(self._previous.state_dict())

    def __getstate__(self) -> dict[str, Any]:
        """Without the CoMet object, which holds the training data; its state stays."""
        kept = {k: v for k, v in vars(self).items() if k not in ("comet", "_previous")}
        return {**kept, "_kept": self._state_to_keep()}

    @override
    def on_train_end(self, net: NeuralNet, X: Any = None, y: Any = None, **_: Any) -> None:
        """Give the net its own iterator and loss back."""
        for name in ("get_iterator", "get_loss"):
            vars(net).pop(name, None)
