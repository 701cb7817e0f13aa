"""One object that knows the data of a training loop, and weighs its losses."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from comet_meta import distributed
from comet_meta.data import as_index, collect_scores
from comet_meta.loaders import RecordingLoader, eval_mode, same_random_numbers, scoring_loader
from comet_meta.optimizer import CoMetOptimizerWrapper
from comet_meta.penalty import CovarianceMetaRegularizer
from comet_meta.reduction import per_sample
from comet_meta.weights.weighter import SoftConfidentWeighter

Losses = Tensor | Mapping[str, Tensor]


class CoMet:
    """Takes the place of a training loop's loader and weighs the loop's losses.

    It yields the loader's own batches and remembers which samples they hold. ``loss`` makes of a
    batch's losses the one to call ``backward()`` on. The training set is scored and the weights
    are refitted once a round: an epoch, or ``every`` steps. Scoring goes over all samples in order,
    whatever the loader shuffles or drops, in eval mode; every module's mode and all random numbers
    are then as before.

    The optimizers stay the loop's own. Those that are named are kept from a step whose losses or
    gradients are NaN or infinite because of a sample; several may share parameters and take turns.

    Args:
        loader: The loop's DataLoader over a map-style data set; it may be endless. With ``index``,
            any iterable of batches.
        optimizers: The loop's optimizer or optimizers.
        scores: Anomaly scores of a batch: what the loader yields -> (B,), higher = more anomalous;
            a list of B numbers will do. By default the losses of the training steps serve, at no
            cost; but they come from a model that changes during the round.
        model: The module or modules that ``scores`` uses. Not needed where ``scores`` is a method
            of it, as ``model.scores`` is; ``[]`` for scores that see to the mode themselves.
        index: Positions of a batch's samples, batch -> (B,), for streams and loaders whose order
            isn't a DataLoader's. The losses then serve as scores.
        weighter: Confidence in each sample; by default one with the default rule. With a prior its
            weights hold from the first step, and nothing is refitted.
        regularizer: The penalty lambda(Sigma) ||theta||^2; without one there is none.
        exposure: What the loss of a bad sample taken as anomalous counts, >= 0; see
            :class:`~comet_meta.CoMetOptimizerWrapper`.
        warm_up: Rounds before the first weights, >= 1: they mean nothing before the model has
            learned something.
        every: Steps in a round, >= 1. By default a round is an epoch: a pass over the loader or,
            where passes don't end, as many samples as the set has.

    Attributes:
        weighter: The weighter: ``comet.weighter.weights`` are the weights (N,).
        loader: The loop's loader. Its attributes are also this object's: ``comet.dataset``.
        rounds: Number of rounds so far.

    Raises:
        TypeError: If positions can't be known, or an optimizer isn't one that can be guarded.
        ValueError: If an argument is out of range or doesn't go with another.

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
            self._recording = RecordingLoader(loader)  # type: ignore[arg-type]
            size = len(self._recording.dataset)  # type: ignore[arg-type]
        elif scores is not None:
            raise ValueError(
                "with index= there is no data set to score, so losses serve as scores: leave out "
                "either scores= or index="
            )
        if weighter is None:
            weighter = SoftConfidentWeighter(size)
        elif size is not None and weighter.num_samples not in (None, size):
            raise ValueError(
                f"the weighter is for {weighter.num_samples} samples, the loader's data set has "
                f"{size}"
            )
        self.weighter = weighter
        self._size = weighter.num_samples if size is None else size
        if self._size is None and every is None and not hasattr(loader, "__len__"):
            raise ValueError(
                "neither the loader's length nor the number of samples is known, so no epoch ends: "
                "pass every=, the number of steps between refits"
            )
        self._gate = _Gate(_guarded(optimizers, self._guard))
        self._wrapper = CoMetOptimizerWrapper(
            self._gate, weighter=weighter, regularizer=regularizer, exposure=exposure
        )
        self._index: Tensor | None = None  # of the current batch
        self._seen: list[tuple[Tensor, Tensor]] = []  # losses that serve as scores
        self._steps = self._samples = 0  # of the round
        self._stale = True  # whether the model has learned since it was scored
        self._unguarded = False  # whether there are losses since the last look at the gradients
        self._sums = torch.zeros(2)  # weighted losses and weights of the pass

    def __len__(self) -> int:
        """Number of batches in a pass."""
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """The loader's attributes."""
        if name.startswith("_") or name == "loader":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        """The loader's batches; between them, at the end of a round, the weights are refitted."""
        self._sums = torch.zeros(2)
        for index, batch in self._pairs():
            if self._round_is_over():
                self._end_round()
            self._index = index
            self._steps += 1
            self._samples += len(index) * distributed.world_size()
            yield batch
        self._index = None
        # What a loader drops at the end of a pass doesn't count; a pass of a few batches does not.
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
        """Weighted mean of the losses of the current or last pass, divided by its weights, ().

        Monitor this one: the loss that is minimised falls when weights fall. Reading it waits for
        its device. With several processes it is the mean over this one's samples. NaN before the
        first batch, and where all weights were 0.
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
            losses: Losses with their graph, of any shape that :func:`comet_meta.per_sample` takes:
                (B,), (B, P), (B, H, W), (B * P,), or a dictionary of such terms. Or a function from
                rows of the batch, shape (R,), to their losses: it is called with the rows of weight
                above 0, so that batch norm sees no others. A batch with fewer than two such rows is
                then left out.
            anomalous: The samples' losses if they are taken as anomalous, where the detector has
                such a loss; see :class:`~comet_meta.CoMetOptimizerWrapper`.
            index: Positions of the samples, shape (B,), where ``losses`` isn't of the batch drawn
                last, as with a loop that reads ahead.

        Returns:
            The loss, shape ().

        Raises:
            RuntimeError: If there's no current batch.
            TypeError: If losses aren't floating-point.
            ValueError: If losses can't be told apart by sample.
            IndexError: If a position lies outside the data set.
        """
        index = self.index if index is None else as_index(index, self._size)
        if callable(losses):
            if anomalous is not None:
                raise ValueError("anomalous losses need all rows: pass losses, not a function")
            rows = self.weighter(index).nonzero().flatten().to(index.device)
            if len(rows) < min(2, len(index)):
                return torch.zeros((), requires_grad=True)
            own = per_sample(losses(rows), len(rows))
            return self._objective(own, None, index[rows], share=len(rows) / len(index))
        own = per_sample(losses, len(index))
        if anomalous is None:
            return self._objective(own, None, index)
        return self._objective(own, per_sample(anomalous, len(index)), index)

    def suspects(self, k: int | None = 20) -> Tensor:
        """The training samples that fit in least, as the model sees them now.

        The set is scored for it if the model has learned since it was scored last: with several
        processes, all of them have to call it. Training isn't touched.

        Args:
            k: How many; None for all.

        Returns:
            Positions in the data set, most suspicious first, shape (min(k, N),).
        """
        weighter = self.weighter
        if self.scores is not None and self._stale:
            weighter = copy.deepcopy(weighter)
            weighter.fit(self._collect())
        return weighter.ranking(k)

    def refit(self) -> None:
        """Score the set and refit the weights now."""
        if self.scores is not None:
            self.weighter.fit(self._collect())
            self._stale = False
        elif self._seen:
            index = torch.cat([index for index, _ in self._seen])
            scores = torch.cat([losses for _, losses in self._seen])
            finite = scores.isfinite()
            self._seen.clear()
            if distributed.average(finite.any().float()) == 1:  # all processes update, or none
                finite = finite.cpu()
                self.weighter.update(index[finite], scores.cpu()[finite])
            self.weighter.fit()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's and the optimizers' own states.

        Returns:
            Tensors and plain containers only: ``torch.load(..., weights_only=True)`` reads it.
        """
        wrapper = self._wrapper.state_dict()
        return {
            **{name: wrapper[name] for name in ("weighter", "regularizer", "generator")},
            "round": [self.rounds, self._steps, self._samples],
            "seen": list(self._seen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved.

        Args:
            state: From an object of the same make-up.
        """
        parts = {name: state[name] for name in ("weighter", "regularizer", "generator")}
        self._wrapper.load_state_dict(self._wrapper.state_dict() | parts)
        self.rounds, self._steps, self._samples = state["round"]
        self._seen = list(state["seen"])
        self._stale = True

    def _objective(
        self, own: Tensor, anomalous: Tensor | None, index: Tensor, *, share: float = 1.0
    ) -> Tensor:
        """The objective of losses (B,), which are noted, and of which the rest of a batch is 0."""
        detached = own.detach()
        if own.requires_grad:
            self._stale = self._unguarded = True
            if self.scores is None and self.rounds + 1 >= self.warm_up:
                self._seen.append((index.cpu(), detached.float()))
        weights = self.weighter(index).to(detached)
        finite = detached.isfinite()
        sums = torch.stack([weights * detached.where(finite, 0), weights * finite]).sum(dim=1)
        self._sums = self._sums.to(sums) + sums
        losses = own * share if anomalous is None else torch.stack([own, anomalous])
        return self._wrapper.objective(losses, index)

    def _pairs(self) -> Iterable[tuple[Tensor, Any]]:
        if self.index_of is None:
            return self._recording
        of = self.index_of
        return ((as_index(of(batch), self._size).cpu(), batch) for batch in self.loader)

    def _round_is_over(self) -> bool:
        if self.every is not None:
            return self._steps >= self.every
        return self._size is not None and self._samples >= self._size

    def _end_round(self) -> None:
        self.rounds += 1
        self._steps = self._samples = 0
        scored_for_nothing = self.scores is not None and self.weighter.prior is not None
        if self.rounds >= self.warm_up and not scored_for_nothing:
            self.refit()

    def _collect(self) -> Tensor:
        scores = self.scores
        if scores is None:
            raise RuntimeError("there are no scores= to score the set with")
        loader: DataLoader[Any] = self.loader  # type: ignore[assignment]
        with eval_mode(self.models), same_random_numbers(self.models):
            return collect_scores(
                lambda batch: torch.as_tensor(scores(batch)), scoring_loader(loader)
            )

    def _guard(self, optimizer: Optimizer, *_: Any) -> None:
        """Take an optimizer's gradients away before a step that can't be taken."""
        if self._unguarded:
            self._gate.open = False
            self._wrapper.step()
            self._unguarded = False
        if not self._gate.open:
            optimizer.zero_grad()


class _Gate(Optimizer):
    """An optimizer that notes that a step may be taken; the loop's own take it."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__([{"params": parameters}], {})
        self.open = True

    @override
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Leave parameters and gradients as they are."""
        self.open = True


def _guarded(
    optimizers: Optimizer | Sequence[Optimizer], guard: Callable[..., None]
) -> list[Tensor]:
    """Have a function called before each step of the optimizers; their parameters, each once."""
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
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return list({id(p): p for group in groups for p in group["params"]}.values())


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
