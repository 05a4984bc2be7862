"""The evaluation network: drop-path, auxiliary head."""

import pytest
import torch

from problems.nas import PUBLISHED, Choice, EvaluationNetwork
from problems.nas.drop_path import apply_drop_path
from problems.nas.evaluation_network import GenotypeEdge
from problems.nas.skeleton import CellPlan

IMAGENET = {"channels": 48, "cells": 14, "classes": 1000, "stem": "imagenet"}


def parameter_count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def small(**options):
    torch.manual_seed(0)
    return EvaluationNetwork(PUBLISHED["DARTS_V2"], **{"channels": 4, "cells": 3, "image_channels": 1} | options)


@pytest.mark.parametrize(
    ("options", "parameters", "size"),
    [({}, 476_426, 32), ({"classes": 100}, 545_636, 32), (IMAGENET, 1_260_776, 224)],
)
def test_auxiliary_head(options, parameters, size):
    with torch.device("meta"):
        network = EvaluationNetwork(PUBLISHED["PC_DARTS_cifar"], auxiliary=True, **options)
        assert parameter_count(network.auxiliary) == parameters
        outputs = {}
        network.cells[2 * len(network.cells) // 3].register_forward_hook(lambda *call: outputs.update(cell=call[2]))
        network.auxiliary.register_forward_hook(lambda *call: outputs.update(head=call[1][0]))
        logits, auxiliary = network.train()(torch.empty(2, 3, size, size))
        assert logits.shape == auxiliary.shape == (2, options.get("classes", 10))
        assert outputs.pop("cell") is outputs.pop("head")
        assert network.eval()(torch.empty(2, 3, size, size)).auxiliary is None
        assert "head" not in outputs


def test_auxiliary_head_rejects_small_images_only_in_training():
    network = small(auxiliary=True)
    with pytest.raises(ValueError, match=r"at least 8x8 .*32x32.* got 2x2; .*auxiliary=False"):
        network(torch.randn(2, 1, 8, 8))
    assert network.eval()(torch.randn(2, 1, 8, 8)).logits.shape == (2, 10)


def test_auxiliary_head_accepts_larger_images():
    assert small(auxiliary=True)(torch.randn(2, 1, 48, 48)).auxiliary.shape == (2, 10)


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    features = torch.rand(4000, 3, 2, 2) + 0.5
    dropped = apply_drop_path(features, 0.3)
    kept = dropped.flatten(1).any(1)
    torch.testing.assert_close(dropped[kept], features[kept] / 0.7)
    assert not dropped[~kept].any()
    assert abs(kept.float().mean() - 0.7) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    torch.testing.assert_close(apply_drop_path(features, torch.tensor(0.0)), features)


@pytest.mark.parametrize(
    ("operation", "reduces", "drops"),
    [("skip_connect", False, False), ("skip_connect", True, True), ("max_pool_3x3", False, True)],
)
def test_drop_path_applies_only_in_training_and_not_to_the_identity(operation, reduces, drops):
    torch.manual_seed(0)
    edge = GenotypeEdge(Choice(operation, 1), CellPlan((4, 4), 4, reduces, follows_reduction=False))
    states = [torch.zeros(()), torch.rand(64, 4, 4, 4) + 0.1]
    output = edge(states, torch.tensor(0.5))
    assert output.flatten(1).any(1).all() == (not drops)
    assert edge.eval()(states, torch.tensor(0.5)).flatten(1).any(1).all()


def test_drop_path_is_an_argument_of_each_forward_pass():
    images = torch.randn(8, 1, 8, 8)
    network = small()
    assert not torch.equal(network(images, 0.5).logits, network(images, 0.5).logits)
    assert torch.equal(network(images).logits, network(images).logits)
    network.eval()
    assert torch.equal(network(images, 0.5).logits, network(images, 0.5).logits)
    with pytest.raises(ValueError, match=r"\[0, 1\), not 1.0"):
        network(images, drop_path=1.0)


def test_node_sums_its_two_edges_and_cell_concatenates_its_nodes():
    network = small().double().eval()
    cell = network.cells[0]
    before = last = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    states = cell.inputs(before, last)
    for node, choices in enumerate(PUBLISHED["DARTS_V2"].normal):
        edges = cell.edges[2 * node], cell.edges[2 * node + 1]
        states.append(sum(edge.operation(states[choice.source]) for edge, choice in zip(edges, choices, strict=True)))
    torch.testing.assert_close(cell(before, last, 0.0), torch.cat(states[2:], 1))


def test_every_parameter_gets_a_gradient_and_double_backward_works():
    network = small(image_channels=3, auxiliary=True)
    logits, auxiliary = network(torch.randn(4, 3, 32, 32), drop_path=0.1)
    parameters = list(network.parameters())
    loss = logits.logsumexp(1).sum() + 0.4 * auxiliary.logsumexp(1).sum()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), parameters, allow_unused=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "cifr"}, "'cifr' is not a stem; valid: cifar, imagenet"),
        ({"cells": 0}, "at least 1 cell"),
    ],
)
def test_invalid_arguments_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
