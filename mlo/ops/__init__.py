"""Tensor utilities: vectors, random state, autocast, compilation, processes."""
