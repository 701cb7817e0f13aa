"""Confident meta-learning: train anomaly detectors on data that nobody has cleaned."""

from comet_meta.comet import CoMet
from comet_meta.data import IndexedDataset, collect_scores
from comet_meta.optimizer import CoMetOptimizerWrapper, StepReport
from comet_meta.penalty import CovarianceMetaRegularizer
from comet_meta.reduction import per_sample
from comet_meta.sampler import ConfidenceSampler
from comet_meta.weights.prior import MemoryScorer
from comet_meta.weights.weighter import SoftConfidentWeighter

__version__ = "0.1.0"

__all__ = [
    "CoMet",
    "CoMetOptimizerWrapper",
    "ConfidenceSampler",
    "CovarianceMetaRegularizer",
    "IndexedDataset",
    "MemoryScorer",
    "SoftConfidentWeighter",
    "StepReport",
    "collect_scores",
    "per_sample",
]
