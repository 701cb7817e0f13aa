"""Model uncertainty: an L2 penalty driven by the covariance of training and validation loss."""

import math
from collections.abc import Iterable
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
        Sigma (2, 2), symmetric and positive semi-definite. A loss that doesn't vary has variance 0
        in it; with fewer than two pairs it is 0.

    Example:
        >>> loss_covariance(torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]))
        tensor([[1., 1.],
                [1., 1.]])
    """
    mask = pairs.new_ones(len(pairs), 1) if valid is None else valid.to(pairs.dtype).unsqueeze(1)
    degrees = (mask.sum() - 1).clamp_min(1)
    centred = (pairs - (pairs * mask).sum(dim=0) / mask.sum().clamp_min(1)) * mask
    deviation = (centred.square().sum(dim=0) / degrees).sqrt()
    # Below rounding error of the losses themselves, a variation is no variation.
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

    It reads the parameters once and writes their gradient once, where autograd's own rules take
    several passes over memory. Twice differentiable everywhere, also at 0, as MAML needs it.
    """

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return torch.stack(torch._foreach_norm(parameters)).square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        # No foreach: torch can't differentiate its product with a tensor once more.
        factor = 2 * gradient
        return tuple(parameter * factor for parameter in ctx.saved_tensors)


class CovarianceMetaRegularizer(nn.Module):
    """The penalty lambda(Sigma) * ||theta||^2 of confident meta-learning.

    Sigma is the covariance of the training and the validation loss over the last ``window`` steps,
    each z-normalised over the window, and lambda(Sigma) = strength * (1 + gamma * d(Sigma)) with
    d of :func:`model_uncertainty`. The losses must come from disjoint samples. The state is a
    buffer: it moves with ``.to(device)`` and is saved by ``state_dict``.

    Because the pairs are z-normalised, det Sigma is 1 - r^2 for a correlation r of the two losses,
    so lambda stays within [strength, strength * (1 + 0.15 * gamma)]: highest where training and
    validation loss part ways, lowest where they move together.

    Args:
        strength: lambda_0 >= 0, the penalty where the uncertainty is 0 (paper: 0.005).
        gamma: How much uncertainty raises the penalty, >= 0 (paper: 0.5).
        window: Number of recent loss pairs, >= 2 (public code: 5).
        exclude_1d: Leave out parameters of fewer than two dimensions (biases, norm layers).

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> regularizer = CovarianceMetaRegularizer(strength=0.1, gamma=0.5, window=3)
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
        strength: float = 0.005,
        gamma: float = 0.5,
        window: int = 5,
        *,
        exclude_1d: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("strength", strength), ("gamma", gamma)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; expected a finite number >= 0")
        if window < 2:
            raise ValueError(f"window is {window}; expected at least 2 loss pairs for a covariance")
        self.base_strength = strength
        self.gamma = gamma
        self.window = window
        self.exclude_1d = exclude_1d
        self.register_buffer("pairs", torch.zeros(window, 2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def update(self, train_loss: Tensor, validation_loss: Tensor) -> None:
        """Append the losses of one step.

        Args:
            train_loss: Loss on the samples that the step trained on, shape ().
            validation_loss: Loss on other samples, shape ().

        Raises:
            ValueError: If a loss on the CPU is NaN or infinite (elsewhere looking at it would mean
                waiting for the device; the optimizer wrapper checks the losses themselves).
        """
        pair = torch.stack([train_loss.detach().float(), validation_loss.detach().float()])
        if pair.device.type == "cpu" and not torch.isfinite(pair).all():
            raise ValueError(f"training and validation loss are {pair.tolist()}; expected finite")
        # Roll instead of a ring pointer: no host-side position to keep in step with the buffer.
        self.pairs.copy_(self.pairs.roll(-1, dims=0))
        self.pairs[-1].copy_(pair.reshape(2))
        self.count.add_(1)

    @property
    def covariance(self) -> Tensor:
        """Sigma (2, 2) over the current window; 0 before the second pair."""
        filled = torch.arange(self.window, 0, -1, device=self.pairs.device) <= self.count
        return loss_covariance(self.pairs, filled)

    @property
    def strength(self) -> Tensor:
        """lambda(Sigma), shape (), in [strength, strength * (1 + gamma)]."""
        return self.base_strength * (1 + self.gamma * model_uncertainty(self.covariance))

    def penalty(self, parameters: Iterable[Tensor], strength: Tensor | None = None) -> Tensor:
        """lambda(Sigma) * ||theta||^2, shape ().

        Args:
            parameters: The tensors to penalise, of any shapes, on one device.
            strength: lambda(Sigma) where it is at hand, shape ().

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
        return f"strength={self.base_strength}, gamma={self.gamma}, window={self.window}"
