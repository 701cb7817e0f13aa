"""Drawing samples by confidence, for loops whose loss can't be weighted."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, RandomSampler, Sampler

_GOLDEN = (5**0.5 - 1) / 2


class ConfidenceSampler(Sampler[int]):
    """Draws each sample as often as it can be trusted, in random order.

    For loops that can't be edited, or have only a scalar loss: with any DataLoader, in the place
    of ``shuffle=True``. In the mean over epochs a sample is drawn N w_i / sum(w) times an epoch,
    in each of them that number rounded down or up: a sample of weight 0 never, and with equal
    weights each exactly once, in the order of torch's ``RandomSampler`` bit for bit (in several
    processes, of ``DistributedSampler``).

    An epoch has as many samples as the data set, whatever the weights: step counts and learning
    rate schedules stay as they are. Good samples take the places of the bad ones, so a step is as
    long as ever, where a weighted loss makes it shorter in a batch full of suspects. Batch norm
    sees only what is drawn, so samples of weight 0 don't enter its statistics.

    Args:
        weights: Confidence in each sample, shape (N,), in [0, 1]; or a function that gives it,
            called at the start of every epoch: a :class:`~comet_meta.SoftConfidentWeighter`, or one
            of your own that scores the set first. It must not draw from torch's random numbers if
            the order has to be that of a plain run.
        num_samples: Size N of the data set; needed with a function of one's own.
        generator: Source of the order, as of ``RandomSampler``; for one process.
        num_replicas: Number of processes that share an epoch; each gets ceil(N / num_replicas)
            samples.
        rank: This process's number, in [0, num_replicas).
        seed: Of the order in several processes, the same in all of them.

    Attributes:
        epoch: Number of the epoch, from 0. It goes up by one with every pass; call ``set_epoch``
            as for a ``DistributedSampler`` to go on elsewhere.

    Raises:
        ValueError: If the rank is out of range, a generator is given with several processes, or
            the size isn't known. At the start of an epoch: if the weights are not (N,), negative,
            NaN or all 0.

    Example:
        >>> weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
        >>> drawn = list(ConfidenceSampler(weights))
        >>> len(drawn), 1 in drawn
        (5, False)

    Source: systematic resampling, as in Kitagawa: Monte Carlo filter and smoother for non-Gaussian
    nonlinear state space models, 1996.
    """

    def __init__(
        self,
        weights: Tensor | Callable[[], Tensor],
        num_samples: int | None = None,
        *,
        generator: torch.Generator | None = None,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank is {rank}; expected one in [0, {num_replicas})")
        if generator is not None and num_replicas > 1:
            raise ValueError(
                "several processes draw from one order: pass seed=, the same in all of them, "
                "instead of a generator"
            )
        self.weights = weights
        self.generator = generator
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.epoch = 0
        if isinstance(weights, Tensor):
            num_samples = len(self._checked(weights, len(weights)))
        elif num_samples is None:
            num_samples = getattr(weights, "num_samples", None)
        if num_samples is None:
            raise ValueError("a function doesn't tell the set's size: pass num_samples")
        self._size = num_samples

    def __len__(self) -> int:
        """Number of samples that an epoch has on this process."""
        return -(-self._size // self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next.

        Args:
            epoch: Its number, >= 0.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Positions of the epoch's samples in the data set."""
        weights = self.weights if isinstance(self.weights, Tensor) else self.weights()
        # An offset that is spread evenly over the epochs, so that counts even out soon.
        drawn = systematic(
            self._checked(weights, self._size), offset=self.epoch * _GOLDEN % 1
        ).tolist()
        places = range(self._size)
        order: Sampler[int]
        if self.num_replicas == 1:
            order = RandomSampler(places, generator=self.generator)
        else:
            order = DistributedSampler(
                places,  # type: ignore[arg-type]
                num_replicas=self.num_replicas,
                rank=self.rank,
                seed=self.seed,
            )
            order.set_epoch(self.epoch)
        self.epoch += 1
        for place in order:
            yield drawn[place]

    @staticmethod
    def _checked(weights: Tensor, size: int) -> Tensor:
        if weights.shape != (size,):
            raise ValueError(
                f"weights have shape {tuple(weights.shape)}; expected ({size},), one weight in "
                "[0, 1] for each sample"
            )
        if not bool((weights >= 0).all()) or not bool(weights.any()):
            raise ValueError(
                "weights are negative, NaN or all 0: nothing can be drawn by them; expected values "
                "in [0, 1]"
            )
        return weights


def systematic(weights: Tensor, offset: float = 0.0) -> Tensor:
    """N positions in which each sample comes N w_i / sum(w) times, rounded down or up.

    Args:
        weights: Shape (N,), >= 0, not all 0.
        offset: In [0, 1). Uniformly random, it makes the expected numbers exact.

    Returns:
        Positions in ascending order, shape (N,), on the CPU.

    Example:
        >>> systematic(torch.tensor([1.0, 0.0, 0.5, 0.5]))
        tensor([0, 0, 2, 3])
    """
    share = weights.detach().to("cpu", torch.float64)
    ends = (share.cumsum(0) * (len(share) / share.sum())) + offset
    # Rounding in the sum must not cost a sample its place where weights are equal.
    passed = (ends + 1e-9).floor().to(torch.int64)
    passed[-1] = len(share)
    return torch.arange(len(share)).repeat_interleave(passed.diff(prepend=passed.new_zeros(1)))
