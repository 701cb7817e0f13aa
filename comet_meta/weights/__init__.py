"""Weights of the samples: rules, evidence of contamination, the weighter and its prior."""
