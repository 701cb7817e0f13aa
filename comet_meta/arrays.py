"""Numbers that come as tensors, arrays or lists."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ArrayLike: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[float]


def as_tensor(values: Any) -> Tensor:
    """As :func:`torch.as_tensor`, also for arrays whose memory torch can't share.

    Args:
        values: Anything that ``torch.as_tensor`` takes, or an array that is reversed, read-only, of
            another byte order, wider than 64 bits, or masked (floats alone: NaN where masked).

    Returns:
        The tensor; it shares an array's memory where it can.

    Raises:
        TypeError: As from ``torch.as_tensor``, or if a masked array isn't of floats.
        ValueError: As from ``torch.as_tensor``.
        RuntimeError: As from ``torch.as_tensor``.

    Example:
        >>> as_tensor(np.array([1.0, 2.0], dtype=">f8")[::-1])
        tensor([2., 1.], dtype=torch.float64)
    """
    return torch.as_tensor(shareable(values) if isinstance(values, np.ndarray) else values)


def shareable(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An array's values in an array whose memory torch can share.

    Args:
        values: The array.

    Returns:
        The array itself, or a copy where torch can't take it as it is.

    Raises:
        TypeError: If entries of an array that isn't of floats are masked.
    """
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        values = values.filled(np.nan)
    dtype = values.dtype.newbyteorder("=")
    if dtype.kind == "f" and dtype.itemsize > 8:
        dtype = np.dtype(np.float64)
    return np.require(values, dtype, ["C", "W"])


def as_floats(values: ArrayLike, name: str) -> Tensor:
    """Return floating-point numbers as a tensor.

    Args:
        values: A tensor, an array, or a list of numbers or of tensors of shape ().
        name: Their name in the error.

    Returns:
        A floating-point tensor; a tensor as it is.

    Raises:
        TypeError: If they aren't floating-point numbers, or the rows of a list differ in length.

    Example:
        >>> as_floats([1.0, 2.5], "scores")
        tensor([1.0000, 2.5000])
    """
    kind: object = type(values).__name__
    tensor = values
    if not isinstance(values, Tensor) and isinstance(values, (np.ndarray, np.generic, list, tuple)):
        try:
            tensor = as_tensor(values)
        except (TypeError, ValueError, RuntimeError):
            kind = f"a {type(values).__name__} that is no table of numbers"
    if isinstance(tensor, Tensor):
        if tensor.is_floating_point() and tensor.layout == torch.strided:
            return tensor
        kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
    raise TypeError(
        f"{name} is {kind}; expected a floating-point tensor, or an array or a list of such numbers"
    )
