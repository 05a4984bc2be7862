"""The supernet against published counts, a brute-force mixture, and golden values of a second-order gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from problems.nas import DARTS, Architecture, ArchitectureLogits, SearchSpace, Supernet


def parameter_count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 1_930_618), ({"classes": 100}, 1_953_748), ({"channels": 4, "cells": 4}, 118_742)],
)
def test_parameter_counts(options, count):
    with torch.device("meta"):
        assert parameter_count(Supernet(**options)) == count


def test_multiply_accumulates():
    """Of convolutions and the classifier, as they are counted; to mix what edges share is a product of matrices."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Supernet()(torch.empty(1, 3, 32, 32), Architecture()())
    by_operator = counter.get_flop_counts()["Global"]
    assert by_operator[torch.ops.aten.convolution] + by_operator[torch.ops.aten.addmm] == 2 * 300_255_744


def test_architecture_starts_small_and_is_its_only_state():
    torch.manual_seed(0)
    architecture = Architecture()
    assert {name: tuple(value.shape) for name, value in architecture.state_dict().items()} == {
        "normal": (14, 8),
        "reduce": (14, 8),
    }
    logits = architecture()
    assert logits.normal is architecture.normal
    assert logits.reduce is architecture.reduce
    for matrix in logits:
        assert 0.8e-3 < matrix.std() < 1.2e-3
        assert abs(matrix.mean()) < 3e-4


def normalize(features):
    mean = features.mean((0, 2, 3), keepdim=True)
    return (features - mean) / (features.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()


def depthwise(features, weights, kernel, stride, dilation=1):
    padding = dilation * (kernel // 2)
    features = F.conv2d(features.relu(), next(weights), None, stride, padding, dilation, groups=features.shape[1])
    return normalize(F.conv2d(features, next(weights)))


def factorized_reduce(features, weights):
    features = features.relu()
    halves = F.conv2d(features, next(weights), None, 2), F.conv2d(features[:, :, 1:, 1:], next(weights), None, 2)
    return normalize(torch.cat(halves, 1))


def all_operations(features, weights, stride):
    """Apply all eight operations, "none" as a tensor of zeros, taking convolution weights in their order."""
    pooled = F.max_pool2d(features, 3, stride, 1)
    yield torch.zeros_like(pooled)
    yield normalize(pooled)
    yield normalize(F.avg_pool2d(features, 3, stride, 1, count_include_pad=False))
    yield features if stride == 1 else factorized_reduce(features, weights)
    for kernel in (3, 5):
        yield depthwise(depthwise(features, weights, kernel, stride), weights, kernel, 1)
    for kernel in (3, 5):
        yield depthwise(features, weights, kernel, stride, dilation=2)


def weights_in_order(net):
    """Stem, cell after cell (its inputs, then edge after edge), classifier."""

    def place(item):
        part, index, *_ = item[0].split(".")
        return ("stem", "cells", "classifier").index(part), int(index) if part == "cells" else 0

    ordered = sorted(net.edge_tensors().items(), key=place)
    return [tensor for name, tensor in ordered if name.endswith((".weight", ".bias"))]


def brute_force(net, cells, images, logits):
    """The supernet in training, written out from its definition."""
    weights = iter(weights_in_order(net))
    stem = normalize(F.conv2d(images, next(weights), padding=1))
    before = last = stem * next(weights).view(1, -1, 1, 1) + next(weights).view(1, -1, 1, 1)
    reduced_before = False
    for index in range(cells):
        reduces = index in (cells // 3, 2 * cells // 3)
        mixture = (logits.reduce if reduces else logits.normal).exp()
        mixture = mixture / mixture.sum(1, keepdim=True)
        if reduced_before:
            states = [factorized_reduce(before, weights)]
        else:
            states = [normalize(F.conv2d(before.relu(), next(weights)))]
        states.append(normalize(F.conv2d(last.relu(), next(weights))))
        row = 0
        for _ in range(4):
            node = 0
            for source, state in enumerate(states):
                stride = 2 if reduces and source < 2 else 1
                for column, output in enumerate(all_operations(state, weights, stride)):
                    node = node + mixture[row, column] * output
                row += 1
            states.append(node)
        before, last, reduced_before = last, torch.cat(states[2:], 1), reduces
    logits = F.linear(last.mean((2, 3)), next(weights), next(weights))
    assert next(weights, None) is None
    return logits


@pytest.mark.parametrize(("channels", "size", "cells"), [(1, 8, 4), (3, 16, 3)])
def test_output_is_the_brute_force_mixture(channels, size, cells):
    torch.manual_seed(1)
    net = Supernet(channels=2, cells=cells, classes=5, image_channels=channels).double()
    images = torch.randn(4, channels, size, size, dtype=torch.float64)
    logits = ArchitectureLogits(*torch.randn(2, 14, 8, dtype=torch.float64))
    torch.testing.assert_close(net(images, logits), brute_force(net, cells, images, logits))


def test_a_space_of_fewer_nodes_and_without_none():
    space = SearchSpace(("skip_connect", "dil_conv_3x3"), nodes=2)
    assert Supernet(space, channels=4, cells=2)(torch.randn(2, 3, 8, 8), Architecture(space)()).shape == (2, 10)


def test_every_architecture_logit_gets_a_gradient():
    torch.manual_seed(0)
    net, architecture = Supernet(channels=4, cells=3, image_channels=1), Architecture()
    loss = F.cross_entropy(net(torch.randn(4, 1, 8, 8), architecture()), torch.arange(4))
    for gradient in torch.autograd.grad(loss, list(architecture.parameters())):
        assert gradient.shape == (14, 8)
        assert gradient.all()


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="at least 1 cell"):
        Supernet(cells=0)
    other = Architecture(SearchSpace(DARTS.operations, nodes=3))
    with pytest.raises(ValueError, match="14 edges"):
        Supernet(channels=2, cells=1)(torch.randn(2, 3, 8, 8), other())


def golden_weights(net):
    """Deterministic weights: sin(1), sin(2), ... by tensor of an edge, scaled by sqrt(2 / fan in); return them."""
    for name, tensor in net.edge_tensors().items():
        if tensor.ndim > 1:
            value = torch.arange(1.0, tensor.numel() + 1, dtype=torch.float64).sin()
            tensor.copy_(value.view_as(tensor) * math.sqrt(2 / tensor[0].numel()))
        elif name.endswith("bias"):
            tensor.zero_()
    return dict(net.named_parameters())


def test_second_order_gradient_has_its_golden_value():
    """One virtual SGD step (0.025, weight decay 3e-4), differentiated twice; values from two other implementations."""
    net = Supernet(channels=4, cells=3).double()
    weights = golden_weights(net)
    index = torch.arange(112, dtype=torch.float64)
    logits = ArchitectureLogits(
        (0.1 * index.sin()).view(14, 8).requires_grad_(), (0.1 * index.cos()).view(14, 8).requires_grad_()
    )
    pixel = torch.arange(8 * 3 * 16 * 16, dtype=torch.float64)
    train, validation = (1.7 * pixel).sin().view(8, 3, 16, 16), (1.87 * pixel).cos().view(8, 3, 16, 16)
    train_labels, validation_labels = torch.arange(8), (3 * torch.arange(8) + 1) % 10

    def validation_loss(parameters):
        return F.cross_entropy(functional_call(net, parameters, (validation, logits)), validation_labels)

    def norms(loss):
        return [gradient.norm().item() for gradient in torch.autograd.grad(loss, logits)]

    assert norms(validation_loss(weights)) == pytest.approx([0.10155003464, 0.088171134126], rel=1e-10)
    loss = F.cross_entropy(functional_call(net, weights, (train, logits)), train_labels)
    assert loss.item() == pytest.approx(2.3319250819516735, rel=1e-12)
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    stepped = {
        name: weight - 0.025 * (gradient + 3e-4 * weight)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    loss = validation_loss(stepped)
    assert loss.item() == pytest.approx(2.260004025066869, rel=1e-12)
    assert norms(loss) == pytest.approx([0.20582802007, 0.20509562044], rel=1e-10)
