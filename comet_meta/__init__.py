"""Confident meta-learning: train anomaly detectors on data that nobody has cleaned."""

from typing import TYPE_CHECKING, Any

from comet_meta.comet import CoMet
from comet_meta.data import IndexedDataset, collect_scores
from comet_meta.losses import per_sample
from comet_meta.optimizer import CoMetOptimizerWrapper
from comet_meta.penalty import CovarianceMetaRegularizer
from comet_meta.sampler import ConfidenceSampler
from comet_meta.step_report import StepReport
from comet_meta.weights.learned import learn_from_review
from comet_meta.weights.prior import MemoryScorer, RowScorer
from comet_meta.weights.review import choose_for_review, share_from_review
from comet_meta.weights.weighter import SoftConfidentWeighter

if TYPE_CHECKING:
    from comet_meta.meta.step import MetaStep

__version__ = "0.1.0"

__all__ = [
    "CoMet",
    "CoMetOptimizerWrapper",
    "ConfidenceSampler",
    "CovarianceMetaRegularizer",
    "IndexedDataset",
    "MemoryScorer",
    "MetaStep",
    "RowScorer",
    "SoftConfidentWeighter",
    "StepReport",
    "choose_for_review",
    "collect_scores",
    "learn_from_review",
    "per_sample",
    "share_from_review",
]


def __getattr__(name: str) -> Any:
    """Import MetaStep on first use, so that a plain step needs nothing of ``meta``."""
    if name == "MetaStep":
        from comet_meta.meta.step import MetaStep

        return MetaStep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
