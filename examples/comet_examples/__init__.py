"""Detectors, data sets, metrics and reports that the example scripts and benchmarks share."""
