"""The evaluation phase: training a discrete architecture from scratch."""
