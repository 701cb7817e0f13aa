"""Confident meta-learning: train anomaly detectors on data that nobody has cleaned."""

from comet_meta.contrast import contrast_scores
from comet_meta.data import IndexedDataset, collect_scores
from comet_meta.memory import MemoryScorer
from comet_meta.optimizer import CoMetOptimizerWrapper, StepReport
from comet_meta.regularization import CovarianceMetaRegularizer
from comet_meta.weighting import SoftConfidentWeighter

__version__ = "0.1.0"

__all__ = [
    "CoMetOptimizerWrapper",
    "CovarianceMetaRegularizer",
    "IndexedDataset",
    "MemoryScorer",
    "SoftConfidentWeighter",
    "StepReport",
    "collect_scores",
    "contrast_scores",
]
