"""The supernet against one written edge by edge: values, derivatives, running statistics, number of operators."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.edge_by_edge import EdgeByEdge, load_edges
from benchmarks.supernet import OperatorCount
from problems.nas import DARTS, P_DARTS, PC_DARTS, Architecture, ArchitectureLogits, SearchSpace, Supernet

pytestmark = pytest.mark.usefixtures("float64")
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def pair(seed=0, **options):
    """A supernet and one written edge by edge, with the same weights and the same random running statistics."""
    torch.manual_seed(seed)
    options = {"channels": 4, "cells": 3, "classes": 5, "image_channels": 2} | options
    ours, theirs = Supernet(**options), EdgeByEdge(**options)
    for name, tensor in ours.edge_tensors().items():
        if "running" in name:
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    load_edges(theirs, ours)
    return ours, theirs


def by_edge(net, values):
    """Rearrange values, one for each parameter, as {name of an edge's parameter: value}."""
    if isinstance(net, Supernet):
        copied = copy.deepcopy(net)
        with torch.no_grad():
            for parameter, value in zip(copied.parameters(), values, strict=True):
                parameter.copy_(value)
        return {name: tensor for name, tensor in copied.edge_tensors().items() if name.endswith(("weight", "bias"))}
    return {name: value for (name, _), value in zip(net.named_parameters(), values, strict=True)}


def derivatives(net, direction, size):
    """The loss, its gradient, a Hessian-vector product along the weights of `direction`, and running statistics."""
    torch.manual_seed(1)
    shape = net.space.shape
    logits, tangents = torch.randn(2, *shape).requires_grad_().unbind(), torch.randn(2, *shape)
    loss = F.cross_entropy(net(torch.randn(4, 2, *size), ArchitectureLogits(*logits)), torch.arange(4))
    inputs = [*logits, *net.parameters()]
    gradient = torch.autograd.grad(loss, inputs, create_graph=True)
    vectors = [*tangents, *(parameter.detach() for parameter in direction.parameters())]
    product = torch.autograd.grad(gradient, inputs, vectors)
    buffers = net.edge_tensors() if isinstance(net, Supernet) else net.state_dict()
    statistics = {name: value for name, value in buffers.items() if "running" in name}
    first, second = ({"loss": loss.detach()} | by_edge(net, vector[2:]) for vector in (gradient, product))
    return gradient[:2], first, product[:2], second, statistics


def narrowed():
    """A space with 3 random operations on each edge."""
    logits = torch.randn(2, 14, 8, generator=torch.Generator().manual_seed(0))
    return P_DARTS.narrow(ArchitectureLogits(*logits), 5)


CASES = {
    "even": ((8, 8), {}),
    "odd": ((9, 6), {"space": replace(DARTS, nodes=2)}),
    "all odd": ((7, 5), {"cells": 4, "channels": 3, "space": replace(DARTS, nodes=2)}),
    "three operations": ((6, 6), {"space": SearchSpace(("skip_connect", "sep_conv_5x5", "max_pool_3x3"), nodes=2)}),
    "one operation": ((6, 6), {"space": SearchSpace(("dil_conv_5x5",), nodes=1)}),
    "PC-DARTS": ((8, 8), {"space": PC_DARTS, "channels": 8}),
    "K of 2": ((7, 6), {"space": replace(PC_DARTS, partial=2)}),
    "no edge weights": ((6, 7), {"space": replace(PC_DARTS, edge_weights=False, nodes=3)}),
    "only edge weights": ((6, 6), {"space": replace(PC_DARTS, partial=1)}),
    "P-DARTS": ((7, 6), {"space": narrowed()}),
}


@pytest.mark.parametrize(("size", "options"), CASES.values(), ids=CASES)
def test_values_derivatives_and_statistics(size, options):
    """In training mode, with derivatives with respect to weights and architecture together."""
    results = [derivatives(*nets, size) for nets in zip(pair(**options), pair(seed=2, **options), strict=True)]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_evaluation_uses_the_running_statistics():
    ours, theirs = pair()
    images, logits = torch.randn(3, 2, 8, 8), ArchitectureLogits(*torch.randn(2, 14, 8))
    torch.testing.assert_close(ours.eval()(images, logits), theirs.eval()(images, logits), rtol=1e-10, atol=1e-10)
    alone = ours(images[:1], logits)
    torch.testing.assert_close(alone, theirs(images, logits)[:1], rtol=1e-10, atol=1e-10)


def test_single_precision_too():
    torch.set_default_dtype(torch.float32)
    ours, theirs = pair(channels=8)
    images, logits = torch.randn(4, 2, 16, 16), Architecture()()
    torch.testing.assert_close(ours(images, logits), theirs(images, logits), rtol=1e-3, atol=1e-4)


def test_weights_can_be_loaded_edge_by_edge():
    ours, theirs = pair()
    trained = pair(seed=3)[1].state_dict()
    theirs.load_state_dict(trained)
    for name, tensor in ours.edge_tensors().items():
        tensor.copy_(trained[name])
    images, logits = torch.randn(3, 2, 8, 8), ArchitectureLogits(*torch.randn(2, 14, 8))
    torch.testing.assert_close(ours.eval()(images, logits), theirs.eval()(images, logits), rtol=1e-10, atol=1e-10)


def test_initial_weights_have_the_distribution_of_a_single_edge():
    """Uniform in +-1 / sqrt(fan in), with the fan in of one edge."""
    torch.manual_seed(0)
    net = Supernet(channels=16, cells=2)
    for name, tensor in net.edge_tensors().items():
        if ".edges." in name and tensor.ndim > 1:
            bound = tensor[0].numel() ** -0.5
            assert 0.8 * bound < tensor.abs().max() <= bound
            assert abs(tensor.mean()) < 5 * bound / (3 * tensor.numel()) ** 0.5


def test_a_forward_pass_dispatches_few_operators():
    torch.set_default_dtype(torch.float32)
    counts = []
    for net in pair(channels=8, cells=8):
        with OperatorCount() as counter:
            net(torch.randn(2, 2, 16, 16), Architecture()())
        counts.append(counter.count)
    assert counts[0] <= 0.4 * counts[1]
