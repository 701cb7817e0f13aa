"""Draw samples by their weights, for loops whose loss can't be weighted."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, RandomSampler, Sampler

from comet_meta.arrays import ArrayLike

_GOLDEN = (5**0.5 - 1) / 2


class ConfidenceSampler(Sampler[int]):
    """Draws samples in proportion to their weights, in random order.

    For loops that can't be edited, or have only a scalar loss: pass it to any DataLoader as
    ``sampler=``, in place of ``shuffle=True``. In an epoch a sample is drawn N w_i / sum(w) times,
    rounded down or up; over many epochs the mean is exact. A sample of weight 0 is never drawn.
    With equal weights each sample is drawn once, in the order of torch's ``RandomSampler``, bit for
    bit (in several processes, of ``DistributedSampler``).

    An epoch always has N samples, so the number of steps and learning rate schedules don't change.
    Good samples take the places of the bad ones, so a step keeps its size; a weighted loss makes
    the step of a batch full of suspects smaller. Batch norm doesn't see samples of weight 0.

    Args:
        weights: Weights of the samples, shape (N,), in [0, 1]; or a function that returns them,
            called at the start of every epoch: a :class:`~comet_meta.SoftConfidentWeighter`, or
            your own function that scores the set first. If the order has to be that of a plain
            run, the function must not draw from torch's random numbers.
        num_samples: Size N of the data set; needed with your own function.
        generator: Source of the order, as for ``RandomSampler``; for one process only.
        num_replicas: Number of processes that share an epoch; each gets ceil(N / num_replicas)
            samples.
        rank: Number of this process, in [0, num_replicas).
        seed: Seed of the order with several processes, the same in all of them.

    Attributes:
        epoch: Number of the epoch, from 0. It increases by one with every pass; call ``set_epoch``
            to continue at another one, as for a ``DistributedSampler``.

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
        weights: ArrayLike | Callable[[], ArrayLike],
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
        if not isinstance(weights, Tensor) and not callable(weights):
            weights = torch.as_tensor(weights)
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
        """Number of samples per epoch on this process."""
        return -(-self._size // self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch.

        Args:
            epoch: Number of the epoch, >= 0.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Positions of the epoch's samples in the data set."""
        weights = self.weights if isinstance(self.weights, Tensor) else self.weights()
        # Offsets that fill [0, 1) evenly over the epochs, so that the mean count converges fast.
        drawn = systematic_resample(
            self._checked(torch.as_tensor(weights), self._size), offset=self.epoch * _GOLDEN % 1
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


def systematic_resample(weights: Tensor, offset: float = 0.0) -> Tensor:
    """Draw N positions: each sample N w_i / sum(w) times, rounded down or up.

    Args:
        weights: Weights of the samples, shape (N,), >= 0, not all 0.
        offset: Start of the systematic draw, in [0, 1). If it is uniformly random, the expected
            counts are exact.

    Returns:
        Positions in ascending order, shape (N,), on the CPU.

    Example:
        >>> systematic_resample(torch.tensor([1.0, 0.0, 0.5, 0.5]))
        tensor([0, 0, 2, 3])
    """
    w = weights.detach().to("cpu", torch.float64)
    # Sample i is drawn once for each integer in (ends[i - 1], ends[i]].
    ends = (w.cumsum(0) * (len(w) / w.sum())) + offset
    # 1e-9, so that with equal weights no sample is lost by rounding of the sum.
    passed = (ends + 1e-9).floor().to(torch.int64).clamp_max(len(w))
    passed[-1] = len(w)
    return torch.arange(len(w)).repeat_interleave(passed.diff(prepend=passed.new_zeros(1)))
