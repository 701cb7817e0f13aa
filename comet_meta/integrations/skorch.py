"""skorch: nets that train on data that nobody has cleaned."""

import copy
from collections.abc import Callable
from typing import Any

from skorch import NeuralNet
from skorch.callbacks import Callback
from skorch.dataset import unpack_data
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self, override

from comet_meta.comet import CoMet
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
            splits a validation part off; pass ``train_split=None`` to train on all.

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

    @override
    def initialize(self) -> Self:
        """Start a training from the beginning."""
        self._previous: CoMet | None = None
        return super().initialize()  # type: ignore[no-any-return]

    @override
    def on_train_begin(self, net: NeuralNet, X: Any = None, y: Any = None, **_: Any) -> None:
        """Take the place of the net's iterator and loss."""
        get_iterator, get_loss = net.get_iterator, net.get_loss
        # partial_fit goes on with the weights, if it is with the same samples.
        previous = self._previous
        goes_on = None
        if previous is not None:
            goes_on = previous.dataset, copy.deepcopy(previous.state_dict())

        def scores(batch: Any) -> Tensor:
            if self.scores is not None:
                return self.scores(net, batch)
            inputs, targets = unpack_data(batch)
            losses: Tensor = get_loss(net.infer(inputs), targets, X=inputs, training=False)
            return losses.flatten(1).mean(dim=1) if losses.dim() > 1 else losses

        def iterator(dataset: Dataset[Any], training: bool = False) -> Any:
            loader: DataLoader[Any] = get_iterator(dataset, training=training)
            if not training:
                return loader
            self.comet = CoMet(
                loader,
                [getattr(net, f"{name}_") for name in net._optimizers],
                scores=scores,
                model=net.module_,
                weighter=self.weighter,
                warm_up=self.warm_up,
            )
            if goes_on is not None and _same_samples(goes_on[0], loader.dataset):
                self.comet.load_state_dict(goes_on[1])
            self._previous = self.comet
            return self.comet

        def loss(*args: Any, training: bool = False, **kwargs: Any) -> Tensor:
            losses: Tensor = get_loss(*args, training=training, **kwargs)
            return self.comet.loss(losses) if training else losses.mean()

        net.get_iterator, net.get_loss = iterator, loss

    @override
    def on_train_end(self, net: NeuralNet, X: Any = None, y: Any = None, **_: Any) -> None:
        """Give the net its own iterator and loss back."""
        for name in ("get_iterator", "get_loss"):
            vars(net).pop(name, None)


def _same_samples(first: Any, second: Any) -> bool:
    return sample_identity(first) == sample_identity(second)
