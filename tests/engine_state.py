"""Everything that a step could change, by value, and its comparison."""

from __future__ import annotations

import copy
import random

import numpy as np
import torch

import mlo


def snapshot(stack: list[mlo.Problem]) -> object:
    """Everything that a step could change, by value."""
    return copy.deepcopy(
        [
            [
                {n: p.detach() for n, p in problem.module.named_parameters()},
                dict(problem.module.named_buffers()),
                problem.optimizer.state_dict(),
                problem.stream.state_dict(),
                {n: p.grad for n, p in problem.module.named_parameters()},
                problem.module.training,
            ]
            for problem in stack
        ]
        + [torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []]
        + [torch.get_rng_state(), list(np.random.get_state()), random.getstate()]
    )


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other
