"""Numbers that come as tensors, arrays or lists."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ArrayLike: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[float]


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
            tensor = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError):
            kind = f"a {type(values).__name__} that is no table of numbers"
    if isinstance(tensor, Tensor):
        if tensor.is_floating_point():
            return tensor
        kind = tensor.dtype
    raise TypeError(
        f"{name} is {kind}; expected a floating-point tensor, or an array or a list of such numbers"
    )
