"""The report of a full step."""

from typing import NamedTuple

import torch
from torch import Tensor


class StepReport(NamedTuple):
    """Losses and weights of one full step, as detached tensors of shape ().

    Reading a value waits for its device. The losses of a batch that was left out are NaN.

    Attributes:
        objective: Weighted loss plus penalty of the whole batch: support and query loss in
            proportion to their numbers of samples.
        support_loss: Objective of the support samples, at the parameters before the step.
        query_loss: Objective of the query samples, at the parameters after the inner steps.
        loss: The objective without its penalty, divided by the mean weight: the weighted mean of
            the losses. Monitor this one, because the objective falls when weights fall. NaN where
            all weights are 0.
        strength: lambda(Sigma) that the step used; 0 without a regularizer.
        mean_weight: Mean weight of the batch, in [0, 1].
        min_weight: Smallest weight of the batch, in [0, 1].
        dropped: Number of samples left out because their loss was NaN or infinite; the whole batch
            if no gradient could be computed from it.
    """

    objective: Tensor
    support_loss: Tensor
    query_loss: Tensor
    loss: Tensor
    strength: Tensor
    mean_weight: Tensor
    min_weight: Tensor
    dropped: Tensor


def step_report(
    support_loss: Tensor,
    query_loss: Tensor,
    query_fraction: float,
    weights: Tensor,
    penalty: Tensor,
    strength: Tensor,
    dropped: int,
) -> StepReport:
    """Put the report of a step together.

    Args:
        support_loss: Objective of the support samples, shape (); NaN if the batch was left out.
        query_loss: Objective of the query samples, shape (); NaN if the batch was left out.
        query_fraction: Fraction of the samples in the query, in (0, 1).
        weights: Weights w_i of the K samples that were used, shape (K,), K >= 0.
        penalty: lambda(Sigma) ||theta||^2, shape ().
        strength: lambda(Sigma), shape ().
        dropped: Number of samples that were left out.

    Returns:
        The report.
    """
    objective = torch.lerp(support_loss, query_loss, query_fraction)
    no_weight = torch.full_like(support_loss, torch.nan)
    mean_weight = weights.mean() if len(weights) else no_weight
    return StepReport(
        objective=objective,
        support_loss=support_loss,
        query_loss=query_loss,
        loss=(objective - penalty) / mean_weight.to(objective),
        strength=strength,
        mean_weight=mean_weight,
        min_weight=weights.min() if len(weights) else no_weight,
        dropped=torch.tensor(dropped),
    )
