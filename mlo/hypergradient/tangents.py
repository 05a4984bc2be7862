"""The forward-mode derivative of a gradient, for the product ``forward``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

from mlo.levels.state import leaves
from mlo.ops.vectors import Vector
from mlo.steps.evaluation import evaluate
from mlo.steps.losses import Found, loss_of
from mlo.steps.operators import needs_graph
from mlo.steps.point import Point, states_at


def tangents(point: Point, targets: Sequence[str], vector: Vector, own: bool, cross: bool) -> Found:
    """The derivative of the gradient along ``vector``: for the level's variables, the targets', and at the cache."""
    base = leaves(point.state.variables)
    assert point.cache is not None
    with forward_ad.dual_level(), point.level.differentiable(again=True):
        if point.apart:
            zeros = map(torch.zeros_like, base)
            at = point.at(base)._replace(shift=tuple(map(forward_ad.make_dual, zeros, vector)))
        else:
            at = point.at(tuple(map(forward_ad.make_dual, base, vector)))
        states, _ = states_at(at, at.micro[0])
        point.cache.begin()
        loss, _, _ = evaluate(
            loss_of,
            point.level,
            states,
            at.micro[0],
            {*targets, *point.inner}.difference(point.level.problem.node.held),
            point.cache,
            point.inner,
            kind="product",
            count=point.step_number,
            autocast=point.autocast,
        )
        reads = [v for target in targets for v in point.reads[target].variables] if cross else []
        inputs = [*(base if own else ()), *reads, *(point.cache.leaves if cross else ())]
        found: Found = [None] * len(inputs)
        if inputs:
            found = torch.autograd.grad(loss, inputs, create_graph=needs_graph(loss), allow_unused=True)
        along = [None if g is None else forward_ad.unpack_dual(g).tangent for g in found]
    return [None if tangent is None else tangent.detach() for tangent in along]
