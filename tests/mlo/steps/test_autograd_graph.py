"""What is found in an autograd graph."""

from __future__ import annotations

import torch

from mlo.levels.state import State
from mlo.steps.autograd_graph import leaves_of, nodes_towards, saved_bytes


def test_each_storage_counts_once_and_what_is_known_not_at_all():
    x, batch = torch.randn(10, requires_grad=True), torch.randn(10)
    root = x.exp()  # saved by exp, and twice by the square
    loss = (root * root * batch * x).sum()  # the last product saves the one before it
    assert saved_bytes([loss], [State((x,))], batch) == 2 * root.nbytes
    assert saved_bytes([loss], [State((x,))], None) == 2 * root.nbytes + batch.nbytes


def test_only_nodes_between_the_ends_depend_on_a_leaf():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    loss = (x.sin() + y.cos()).sum()
    names = {node.name() for node in nodes_towards(loss, [x])}
    assert names == {"torch::autograd::AccumulateGrad", "SinBackward0", "AddBackward0", "SumBackward0"}
    assert leaves_of(loss) == {id(x), id(y)}
