"""Tensor utilities: vectors, random state, autocast, loss scale, compilation, and distributed processes."""
