"""Weights of the training samples: rules, the mixture fit, the weighter and its prior."""
