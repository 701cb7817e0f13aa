"""The settings of the published method."""

from typing import Any

from comet_meta.meta.step import MetaStep
from comet_meta.penalty import CovarianceMetaRegularizer
from comet_meta.weights.weighter import SoftConfidentWeighter


def paper_settings(num_samples: int) -> dict[str, Any]:
    """The arguments that :meth:`comet_meta.CoMetOptimizerWrapper.paper` sets.

    Args:
        num_samples: Size of the training set.

    Returns:
        Weighter, regularizer and meta-step, by their argument's name.

    Source: Aqeel, Sharifi, Cristani, Setti: Towards Real Unsupervised Anomaly Detection Via
    Confident Meta-Learning, ICCV 2025, and its public code for the inner steps and the window.
    """
    return {
        "weighter": SoftConfidentWeighter(num_samples, rule="ratio", kappa=1.5),
        "regularizer": CovarianceMetaRegularizer(base_strength=0.005, gamma=0.5, window=5),
        "meta": MetaStep(
            "fomaml",
            inner_lr=1e-4,
            inner_steps=5,
            inner_optimizer="adam",
            query_fraction=0.3,
            tasks=4,
        ),
    }
