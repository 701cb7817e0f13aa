"""Model uncertainty: an L2 penalty whose strength follows training and validation loss."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from comet_meta.distributed import is_sharded, sum_of_squares

_DET_RANGE = (1e-6, 100.0)


def loss_covariance(pairs: Tensor, valid: Tensor | None = None) -> Tensor:
    """Covariance of z-normalised (training loss, validation loss) pairs.

    Args:
        pairs: Loss pairs, shape (W, 2).
        valid: Which of the pairs count, bool of shape (W,); all of them by default.

    Returns:
        Sigma, shape (2, 2), symmetric and positive semi-definite. The variance of a loss that
        doesn't vary is 0. With fewer than two pairs Sigma is 0.

    Example:
        >>> loss_covariance(torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]))
        tensor([[1., 1.],
                [1., 1.]])
    """
    # z = (pair - mean) / deviation; Sigma = z^T z / (W - 1)
    mask = pairs.new_ones(len(pairs), 1) if valid is None else valid.to(pairs.dtype).unsqueeze(1)
    degrees = (mask.sum() - 1).clamp_min(1)
    centred = (pairs - (pairs * mask).sum(dim=0) / mask.sum().clamp_min(1)) * mask
    deviation = (centred.square().sum(dim=0) / degrees).sqrt()
    # A deviation below the rounding error of the losses counts as 0.
    tiny = 4 * torch.finfo(pairs.dtype).eps * (pairs * mask).abs().sum(dim=0)
    z = torch.where(deviation > tiny, centred / deviation, 0.0)
    return z.T @ z / degrees


def model_uncertainty(covariance: Tensor) -> Tensor:
    """d(Sigma) = log(1 + clip(det Sigma, 1e-6, 100)) / log(101), in (0, 1].

    Args:
        covariance: Sigma, shape (2, 2).

    Returns:
        The model uncertainty, shape (). It is non-decreasing in det Sigma.

    Example:
        >>> round(float(model_uncertainty(torch.eye(2))), 4)
        0.1502
    """
    (a, b), (c, d) = covariance
    return torch.log1p((a * d - b * c).clamp(*_DET_RANGE)) / math.log(101)


class _SquaredNorm(torch.autograd.Function):
    """||theta||^2 of a list of tensors, shape ().

    It reads the parameters once and writes their gradient once; autograd's rules take several
    passes over memory. It is twice differentiable everywhere, also at 0, as MAML needs it.
    """

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return torch.stack(torch._foreach_norm(parameters)).square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        # No foreach: torch can't differentiate foreach products twice.
        factor = 2 * gradient
        return tuple(parameter * factor for parameter in ctx.saved_tensors)


class CovarianceMetaRegularizer(nn.Module):
    """The penalty lambda(Sigma) * ||theta||^2 of confident meta-learning.

    1. Sigma is the covariance of training and validation loss over the last ``window`` steps, each
       z-normalised over the window. The two losses must come from disjoint samples.
    2. d(Sigma) is the model uncertainty, see :func:`model_uncertainty`.
    3. lambda(Sigma) = lambda_0 * (1 + gamma * d(Sigma)).

    Because the pairs are z-normalised, det Sigma = 1 - r^2, where r is the correlation of the two
    losses. So lambda stays within [lambda_0, lambda_0 * (1 + 0.15 * gamma)]: lowest where training
    and validation loss move together.

    The loss pairs are a buffer: they move with ``.to(device)`` and are saved by ``state_dict``.

    Args:
        base_strength: lambda_0, >= 0: the strength of the penalty without uncertainty (paper:
            0.005). Choose it relative to your loss: beside a loss that is a mean over n values,
            the same strength weighs n times as much as beside their sum.
        gamma: How much uncertainty raises the strength, >= 0 (paper: 0.5).
        window: Number of recent loss pairs, >= 2 (public code: 5).
        exclude_1d: Whether to leave out parameters with fewer than two dimensions (biases, norm
            layers).

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> regularizer = CovarianceMetaRegularizer(base_strength=0.1, gamma=0.5, window=3)
        >>> for train_loss, validation_loss in [(1.0, 1.0), (0.5, 0.8), (0.2, 0.9)]:
        ...     regularizer.update(torch.tensor(train_loss), torch.tensor(validation_loss))
        >>> regularizer.covariance.shape
        torch.Size([2, 2])
        >>> weight = torch.ones(2, 2, requires_grad=True)
        >>> bool(regularizer.penalty([weight]) == 4 * regularizer.strength)
        True

    Source: Aqeel, Sharifi, Cristani, Setti: Towards Real Unsupervised Anomaly Detection Via
    Confident Meta-Learning, ICCV 2025 (model uncertainty).
    """

    pairs: Tensor
    count: Tensor

    def __init__(
        self,
        base_strength: float = 0.005,
        gamma: float = 0.5,
        window: int = 5,
        *,
        exclude_1d: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("base_strength", base_strength), ("gamma", gamma)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; expected a finite number >= 0")
        if window < 2:
            raise ValueError(f"window is {window}; expected at least 2 loss pairs for a covariance")
        self.base_strength = base_strength
        self.gamma = gamma
        self.window = window
        self.exclude_1d = exclude_1d
        self.register_buffer("pairs", torch.zeros(window, 2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def update(self, train_loss: Tensor | float, validation_loss: Tensor | float) -> None:
        """Append the losses of one step.

        Args:
            train_loss: Loss on the samples that the step trained on, shape ().
            validation_loss: Loss on other samples, shape ().

        Raises:
            ValueError: If a loss on the CPU is NaN or infinite. On other devices this check would
                wait for the device, so it is left to the optimizer wrapper.
        """
        losses = [torch.as_tensor(loss).detach().float() for loss in (train_loss, validation_loss)]
        pair = torch.stack([loss.reshape(()) for loss in losses])
        if pair.device.type == "cpu" and not torch.isfinite(pair).all():
            raise ValueError(f"training and validation loss are {pair.tolist()}; expected finite")
        # Shift the window by one, so that no position has to be kept on the host.
        self.pairs.copy_(self.pairs.roll(-1, dims=0))
        self.pairs[-1].copy_(pair)
        self.count.add_(1)

    def reset(self) -> None:
        """Forget the losses: a new training starts."""
        self.pairs.fill_(0)
        self.count.fill_(0)

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a saved state fits, before anything is loaded.

        Args:
            state_dict: The saved state.

        Raises:
            ValueError: If it is of another window.
        """
        if state_dict["pairs"].shape != self.pairs.shape:
            raise ValueError(
                f"the saved regularizer has window={len(state_dict['pairs'])}, this one "
                f"window={self.window}"
            )

    @property
    def covariance(self) -> Tensor:
        """Sigma (2, 2) over the current window; 0 before the second pair."""
        valid = torch.arange(self.window, 0, -1, device=self.pairs.device) <= self.count
        return loss_covariance(self.pairs, valid)

    @property
    def strength(self) -> Tensor:
        """lambda(Sigma), shape (), in [lambda_0, lambda_0 * (1 + gamma)]."""
        return self.base_strength * (1 + self.gamma * model_uncertainty(self.covariance))

    def penalty(self, parameters: Iterable[Tensor], strength: Tensor | None = None) -> Tensor:
        """lambda(Sigma) * ||theta||^2, shape ().

        Args:
            parameters: The tensors to penalise, of any shapes, on one device.
            strength: lambda(Sigma) if already computed, shape ().

        Returns:
            The penalty, differentiable in the parameters. 0 where there are none.
        """
        chosen = [p for p in parameters if p.dim() > 1 or not self.exclude_1d]
        if not chosen:
            return self.pairs.new_zeros(())
        sharded = is_sharded(chosen[0])
        square: Tensor = sum_of_squares(chosen) if sharded else _SquaredNorm.apply(*chosen)
        return (self.strength if strength is None else strength).to(square.device) * square

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"base_strength={self.base_strength}, gamma={self.gamma}, window={self.window}"
