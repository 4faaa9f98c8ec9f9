"""Finds what is wrong with the batch normalization layers of a checkpoint or a model."""
