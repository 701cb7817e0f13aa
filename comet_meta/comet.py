"""CoMet: a wrapper of the training loop's loader that weighs the loop's losses."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from comet_meta import distributed
from comet_meta.data import as_index, collect_scores
from comet_meta.loaders import RecordingLoader, scoring_loader
from comet_meta.losses import per_sample
from comet_meta.optimizer import CoMetOptimizerWrapper
from comet_meta.penalty import CovarianceMetaRegularizer
from comet_meta.restore import eval_mode, same_random_numbers
from comet_meta.weights.weighter import SoftConfidentWeighter
from comet_meta.wrapped import SteppedByTheLoop

Losses = Tensor | Mapping[str, Tensor]


class CoMet:
    """Takes the place of a training loop's loader and weighs the loop's losses.

    1. Iterate over it: it yields the loader's batches and remembers the positions of their samples
       in the data set.
    2. Call ``loss`` with the losses of the batch, and ``backward()`` on its result.
    3. After each round (an epoch, or ``every`` steps) it scores the whole training set and refits
       the weights. Scoring reads all samples in order, also those that the loader drops, in eval
       mode. Afterwards each module is in its earlier mode, and the random numbers of torch, NumPy
       and Python continue as without scoring.

    The loop keeps its optimizers. An optimizer passed as ``optimizers`` doesn't step if a sample
    made the losses or gradients NaN or infinite. Several optimizers may share parameters and take
    turns.

    Args:
        loader: The loop's DataLoader over a map-style data set; it may be endless. With ``index``,
            any iterable of batches.
        optimizers: The loop's optimizer or optimizers.
        scores: Anomaly scores of a batch: what the loader yields -> (B,), higher = more anomalous,
            as a tensor or a list. By default the losses of the training steps are the scores. They
            cost nothing, but come from a model that changes during the round.
        model: The module or modules that ``scores`` uses, to set them to eval mode. Not needed if
            ``scores`` is a method of the module, as ``model.scores`` is. ``[]`` if ``scores`` sets
            the mode itself. Batch norm in it survives a batch with NaN.
        index: Positions of a batch's samples in the data set, batch -> (B,), for streams and for
            loaders that aren't DataLoaders. The losses are then the scores.
        weighter: Weights of the samples; by default one with the default rule. With a prior its
            weights hold from the first step, and are never refitted. Without one, a weighter that
            has served another CoMet object starts from the beginning; to go on with its weights,
            load that object's state.
        regularizer: The penalty lambda(Sigma) ||theta||^2; without one there is none.
        exposure: Factor on the loss of a sample taken as anomalous, >= 0; see
            :class:`~comet_meta.CoMetOptimizerWrapper`.
        warm_up: Number of rounds before the first fit of the weights, >= 1. Scores of an untrained
            model mean nothing.
        every: Number of steps in a round, >= 1. By default a round is an epoch: a pass over the
            loader, or as many samples as the set has if passes don't end.

    Attributes:
        weighter: The weighter: ``comet.weighter.weights`` are the weights (N,).
        loader: The loop's loader. Its attributes are also this object's: ``comet.dataset``.
        rounds: Number of rounds so far.

    Raises:
        TypeError: If positions can't be known, or an object isn't a first-order torch optimizer.
        ValueError: If an argument is out of range, or two arguments exclude each other.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> data = torch.randn(64, 1) * torch.tensor([1.0, 2.0, -1.0])
        >>> data[:4] = torch.tensor([3.0, -3.0, 3.0])
        >>> model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 3))
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        >>> def errors(batch): return (model(batch) - batch).square()
        >>> loader = DataLoader(data, batch_size=16, shuffle=True)
        >>> loader = comet = CoMet(
        ...     loader, optimizer, scores=lambda batch: errors(batch).mean(dim=1), model=model)
        >>> for epoch in range(20):
        ...     for batch in loader:
        ...         optimizer.zero_grad()
        ...         comet.loss(errors(batch)).backward()
        ...         optimizer.step()
        >>> sorted(comet.suspects(4).tolist())
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        loader: Iterable[Any],
        optimizers: Optimizer | Sequence[Optimizer] = (),
        *,
        scores: Callable[[Any], Any] | None = None,
        model: nn.Module | Sequence[nn.Module] | None = None,
        index: Callable[[Any], Tensor] | None = None,
        weighter: SoftConfidentWeighter | None = None,
        regularizer: CovarianceMetaRegularizer | None = None,
        exposure: float = 0.5,
        warm_up: int = 1,
        every: int | None = None,
    ) -> None:
        for name, count in (("warm_up", warm_up), ("every", every)):
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}; expected at least 1")
        self.loader = loader
        self.scores = scores
        self.index_of = index
        self.warm_up = warm_up
        self.every = every
        self.rounds = 0
        self.models = _models(scores, model)
        size = None
        if index is None:
            self._recording_loader = RecordingLoader(loader)  # type: ignore[arg-type]
            size = len(self._recording_loader.dataset)  # type: ignore[arg-type]
        elif scores is not None:
            raise ValueError(
                "with index= there is no data set to score, so losses serve as scores: leave out "
                "either scores= or index="
            )
        if weighter is None:
            weighter = SoftConfidentWeighter(size)
        weighter.begin_fit(None if size is None else self._recording_loader.dataset)  # type: ignore[arg-type]
        if regularizer is not None:
            regularizer.reset()
        self.weighter = weighter
        self._size = weighter.num_samples if size is None else size
        if self._size is None and every is None and not hasattr(loader, "__len__"):
            raise ValueError(
                "neither the loader's length nor the number of samples is known, so no epoch ends: "
                "pass every=, the number of steps between refits"
            )
        self._wrapper = CoMetOptimizerWrapper(
            SteppedByTheLoop(_register_guard(optimizers, self._guard)),
            weighter=weighter,
            regularizer=regularizer,
            exposure=exposure,
            model=nn.ModuleList(self.models),
        )
        self._scoring_loader: RecordingLoader | None = None
        self._index: Tensor | None = None  # positions of the current batch's samples
        self._losses_as_scores: list[tuple[Tensor, Tensor]] = []  # positions and losses
        self._steps = self._samples = 0  # in this round
        self._model_changed = True  # since the set was scored
        self._asked: set[int] = set()  # optimizers that have stepped since the last losses
        self._sums = torch.zeros(2)  # sum of weighted losses and sum of weights in this pass

    def __len__(self) -> int:
        """Number of batches in a pass."""
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """The loader's attributes."""
        if name.startswith("_") or name == "loader":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        """Yield the loader's batches. At the end of a round the weights are refitted."""
        self._sums = torch.zeros(2)
        for index, batch in self._indexed_batches():
            if self._round_is_over():
                self._end_round()
            self._index = index
            self._steps += 1
            self._samples += len(index) * distributed.world_size()
            yield batch
        self._index = None
        # A pass is a round also where the loader drops samples at its end, but not if the loop
        # left it after a few batches.
        passed = self._samples > 0 if self._size is None else 2 * self._samples > self._size
        if self._round_is_over() or (self.every is None and passed):
            self._end_round()

    @property
    def index(self) -> Tensor:
        """Positions of the current batch's samples in the data set, shape (B,).

        Raises:
            RuntimeError: If there's no current batch.
        """
        if self._index is None:
            raise RuntimeError(
                "there's no current batch: draw batches from the CoMet object, one at a time "
                "(itertools.cycle keeps copies of the first pass; use a loop of passes instead)"
            )
        return self._index

    @property
    def epoch_loss(self) -> Tensor:
        """Weighted mean of the losses of the current or last pass: sum(w L) / sum(w), shape ().

        Monitor this one, because the loss that is minimised falls when weights fall. Reading it
        waits for its device. With several processes it is the mean over the samples of this one.
        NaN before the first batch, and where all weights are 0.
        """
        return self._sums[0] / self._sums[1]

    def loss(
        self,
        losses: Losses | Callable[[Tensor], Losses],
        *,
        anomalous: Losses | None = None,
        index: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """The current batch's loss, sum_i w_i L_i / B plus the penalty; call ``backward()`` on it.

        Args:
            losses: Losses with their graph, in any shape that :func:`comet_meta.per_sample` takes:
                (B,), (B, P), (B, H, W), (B * P,), or a dictionary of such terms. Under
                ``torch.no_grad()``, as in validation, their plain mean counts. Or a function from
                rows of the batch, shape (R,), to their losses: it is called with the rows whose
                weight is above 0, so that batch norm sees no others. A batch with fewer than two
                such rows is then left out.
            anomalous: Losses of the samples taken as anomalous, if the detector has such a loss;
                see :class:`~comet_meta.CoMetOptimizerWrapper`.
            index: Positions of the samples in the data set, shape (B,), if ``losses`` don't belong
                to the batch drawn last, as in a loop that reads ahead.

        Returns:
            The loss, shape ().

        Raises:
            RuntimeError: If there's no current batch.
            TypeError: If losses aren't floating-point.
            ValueError: If losses can't be reduced to one per sample.
            IndexError: If a position lies outside the data set.
        """
        if not torch.is_grad_enabled() and not callable(losses):  # validation: no weights
            return self._wrapper.objective(per_sample(losses, _batch_size(losses)))
        index = self.index if index is None else as_index(index, self._size)
        if callable(losses):
            if anomalous is not None:
                raise ValueError("anomalous losses need all rows: pass losses, not a function")
            if self.scores is None and self.weighter.prior is not None:
                self._check_that_none_waits()
            rows = self.weighter(index).nonzero().flatten().to(index.device)
            if len(rows) < min(2, len(index)):
                return torch.zeros((), requires_grad=True)
            own = per_sample(losses(rows), len(rows))
            return self._objective(own, None, index[rows], factor=len(rows) / len(index))
        own = per_sample(losses, len(index))
        if anomalous is None:
            return self._objective(own, None, index)
        return self._objective(own, per_sample(anomalous, len(index)), index)

    def suspects(self, k: int | None = 20) -> Tensor:
        """The most suspect training samples.

        The set is scored anew if the model has changed since the last scoring. With several
        processes, all of them must call this. The weights in training don't change.

        Args:
            k: Number of samples; None for all.

        Returns:
            Positions in the data set, most suspect first, shape (min(k, N),).

        Raises:
            RuntimeError: If no sample has a score or a prior yet.
        """
        weighter = self.weighter
        if self.scores is not None and self._model_changed:
            weighter = copy.deepcopy(weighter)
            weighter.fit(self._score_set())
        if bool(weighter.ranking_scores().isnan().all()):
            raise RuntimeError(
                "no sample has a score yet, so none is more suspect than another; train for "
                f"warm_up={self.warm_up} whole rounds (epochs) first, or pass scores= or a "
                "weighter with prior="
            )
        return weighter.ranking(k)

    def refit(self) -> None:
        """Score the set and refit the weights now."""
        if self.scores is not None:
            self.weighter.fit(self._score_set())
            self._model_changed = False
        elif self._losses_as_scores:
            index = torch.cat([index for index, _ in self._losses_as_scores])
            scores = torch.cat([losses for _, losses in self._losses_as_scores]).cpu()
            self._losses_as_scores.clear()
            self.weighter.update_finite(index, scores)
            self.weighter.fit()

    def allows_step(self) -> bool:
        """Whether the gradients can be used; see :meth:`CoMetOptimizerWrapper.allows_step`.

        For loops whose optimizers aren't passed as ``optimizers``.
        """
        return self._wrapper.allows_step()

    def watch(self, loss: Tensor) -> None:
        """Let :meth:`allows_step` count a loss of the current batch that doesn't go through here.

        Args:
            loss: The batch's loss, unweighted, shape ().
        """
        self._model_changed = True
        self._asked.clear()
        self._wrapper.watch(loss, self.index)

    def state_dict(self) -> dict[str, Any]:
        """The state of a run, without the states of model and optimizers.

        Returns:
            Tensors and plain containers only: ``torch.load(..., weights_only=True)`` reads it.
        """
        return {
            **self._wrapper.method_state_dict(),
            "round": [self.rounds, self._steps, self._samples],
            "seen": list(self._losses_as_scores),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved.

        Args:
            state: The saved state, from an object with the same components.

        Raises:
            ValueError: If it has other components or belongs to other samples. Nothing has changed
                then.
        """
        self._wrapper.load_method_state_dict(state)
        self.rounds, self._steps, self._samples = state["round"]
        self._losses_as_scores = list(state["seen"])
        self._model_changed = True

    def _objective(
        self, own: Tensor, anomalous: Tensor | None, index: Tensor, *, factor: float = 1.0
    ) -> Tensor:
        """The objective of losses (B,), multiplied by a factor; records them as scores."""
        detached = own.detach()
        if own.requires_grad:
            self._model_changed = True
            self._asked.clear()
            if self.scores is None and self.rounds + 1 >= self.warm_up:
                self._losses_as_scores.append((index.cpu(), detached.float()))
        weights = self.weighter(index).to(detached)
        finite = detached.isfinite()
        sums = torch.stack([weights * detached.where(finite, 0), weights * finite]).sum(dim=1)
        self._sums = self._sums.to(sums) + sums
        losses = own * factor if anomalous is None else torch.stack([own, anomalous])
        return self._wrapper.objective(losses, index)

    def _indexed_batches(self) -> Iterable[tuple[Tensor, Any]]:
        if self.index_of is None:
            return self._recording_loader
        index_of = self.index_of
        return ((as_index(index_of(batch), self._size).cpu(), batch) for batch in self.loader)

    def _round_is_over(self) -> bool:
        if self.every is not None:
            return self._steps >= self.every
        return self._size is not None and self._samples >= self._size

    def _end_round(self) -> None:
        self.rounds += 1
        self._steps = self._samples = 0
        # With a prior, scores change the weights only while samples are held out.
        scores_unused = self.scores is not None and not self.weighter.needs_scores
        if self.rounds >= self.warm_up and not scores_unused:
            self.refit()

    def _check_that_none_waits(self) -> None:
        """Refuse losses of some rows alone where they are to judge what is held out."""
        if self.weighter.needs_scores:
            raise ValueError(
                "samples are held out until the model has judged them, and a function gives no "
                "losses of these: pass scores=, so that CoMet can score the set"
            )

    def _score_set(self) -> Tensor:
        """Anomaly scores of the whole training set, shape (N,)."""
        scores = self.scores
        if scores is None:
            raise RuntimeError("there are no scores= to score the set with")
        loader: DataLoader[Any] = self.loader  # type: ignore[assignment]
        if self._scoring_loader is None:  # kept, with its workers if they are persistent
            self._scoring_loader = scoring_loader(loader)
        with eval_mode(self.models), same_random_numbers(self.models):
            return collect_scores(scores, self._scoring_loader)

    def _guard(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before an optimizer's step: clear its gradients if the step can't be taken."""
        if id(optimizer) not in self._asked and not self.allows_step():
            optimizer.zero_grad()
        self._asked.add(id(optimizer))
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return None
        return (optimizer,), {**kwargs, "closure": self._wrapper.guarded(closure)}


def _register_guard(
    optimizers: Optimizer | Sequence[Optimizer], guard: Callable[..., None]
) -> list[Optimizer]:
    """Call ``guard`` before each step of the optimizers. Returns them as a list."""
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS re-evaluates its closure while it steps, so weights have no meaning there; "
                "use a first-order optimizer such as AdamW"
            )
        if isinstance(optimizer, CoMetOptimizerWrapper):
            raise TypeError(
                "CoMet takes the optimizer itself: it does what CoMetOptimizerWrapper does. For "
                "the full method, pass the wrapper comet.weighter and its step comet.index"
            )
    for optimizer in optimizers:
        optimizer.register_step_pre_hook(guard)
    return optimizers


def _batch_size(losses: Losses) -> int:
    """B of losses (B, ...), or of the first term."""
    first = next(iter(losses.values()), None) if isinstance(losses, Mapping) else losses
    return len(first) if isinstance(first, Tensor) and first.dim() else 1


def _models(
    scores: Callable[[Any], Any] | None, model: nn.Module | Sequence[nn.Module] | None
) -> list[nn.Module]:
    if model is not None:
        return [model] if isinstance(model, nn.Module) else list(model)
    owner = scores if isinstance(scores, nn.Module) else getattr(scores, "__self__", None)
    if isinstance(owner, nn.Module):
        return [owner]
    if scores is not None:
        raise ValueError(
            "scores= isn't a method of a module, so it isn't known what to put in eval mode: pass "
            "model=, the module or modules that it uses"
        )
    return []
