"""Samples from a model, with what they scored."""
