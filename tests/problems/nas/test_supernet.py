"""The supernet against published counts, a brute-force mixture, and known values of a second-order gradient."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from problems.nas import DARTS, P_DARTS, PC_DARTS, Architecture, ArchitectureLogits, SearchSpace, Supernet
from problems.nas.cell_edges import GroupedEdges


def parameter_count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def with_operations(*names):
    """P-DARTS' space with these operations on every edge."""
    return replace(P_DARTS, normal=(names,) * 14, reduce=(names,) * 14)


STAGE_2 = with_operations("skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
STAGE_3 = with_operations("skip_connect", "sep_conv_3x3", "sep_conv_5x5")
IMAGENET = {"space": replace(PC_DARTS, partial=2), "classes": 1000, "stem": "imagenet"}


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1_930_618),
        ({"classes": 100}, 1_953_748),
        ({"channels": 4, "cells": 4}, 118_742),
        ({"space": P_DARTS, "cells": 5}, 1_275_834),
        ({"space": STAGE_2, "cells": 11}, 2_585_146),
        ({"space": STAGE_3, "cells": 17}, 2_685_946),
        ({"space": PC_DARTS}, 299_578),
        ({"space": PC_DARTS, "classes": 100}, 322_708),
        (IMAGENET, 956_512),
    ],
)
def test_parameter_counts(options, count):
    with torch.device("meta"):
        assert parameter_count(Supernet(**options)) == count


@pytest.mark.parametrize(("space", "count"), [(DARTS, 300_255_744), (PC_DARTS, 56_596_992)])
def test_multiply_accumulates(space, count):
    """Papers count convolutions and the classifier; the matrix products that mix shared operations are left out."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Supernet(space)(torch.empty(1, 3, 32, 32), Architecture(space)())
    by_operator = counter.get_flop_counts()["Global"]
    assert by_operator[torch.ops.aten.convolution] + by_operator[torch.ops.aten.addmm] == 2 * count


def test_the_architecture_starts_small_and_has_no_other_state():
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

    def position(item):
        part, index, *_ = item[0].split(".")
        return ("stem", "cells", "classifier").index(part), int(index) if part == "cells" else 0

    ordered = sorted(net.edge_tensors().items(), key=position)
    return [tensor for name, tensor in ordered if name.endswith((".weight", ".bias"))]


def brute_force(net, cells, images, logits):
    """The supernet in training mode, written out from its definition."""
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


@pytest.mark.parametrize("space", [DARTS, PC_DARTS, STAGE_3], ids=["DARTS", "PC-DARTS", "P-DARTS"])
def test_every_architecture_logit_of_the_space_gets_a_gradient(space):
    torch.manual_seed(0)
    net, architecture = Supernet(space, channels=4, cells=3, image_channels=1), Architecture(space)
    loss = F.cross_entropy(net(torch.randn(4, 1, 8, 8), architecture()), torch.arange(4))
    used = torch.tensor([name in space.choices("normal")[0] for name in space.operations] + [True])
    for gradient in torch.autograd.grad(loss, list(architecture.parameters())):
        assert gradient.shape == space.shape
        assert torch.equal(gradient != 0, used[: space.shape[1]].expand(space.shape))


def test_imagenet_stem_divides_the_resolution_by_eight():
    net = Supernet(**IMAGENET | {"channels": 4, "cells": 1})
    shapes = []
    net.cells[0].register_forward_hook(lambda *call: shapes.append(call[2].shape))
    assert net(torch.randn(2, 3, 64, 64), Architecture(PC_DARTS)()).shape == (2, 1000)
    assert shapes == [(2, 32, 4, 4)]  # the only cell is a reduction cell


def skip_connections(stride):
    """Two edges from one state, each a skip-connection, and their outputs as a function of the dropout probability."""
    torch.manual_seed(0)
    group = GroupedEdges({0: ("skip_connect",), 1: ("skip_connect",)}, ("skip_connect",), 4, stride)
    state = torch.rand(8, 4, 16, 16) + 1
    return group, state, lambda probability: group(state, torch.tensor([[1.0], [2.0]]), probability)


def test_dropout_after_skip_connections():
    """In training each edge drops different values and scales up the others; in evaluation it does neither."""
    group, state, run = skip_connections(stride=1)
    pixels = state.permute(0, 2, 3, 1)
    (first,), (second,) = run(0.25)
    for weight, output in ((1, first), (2, second)):
        kept = output != 0
        torch.testing.assert_close(output[kept], weight * pixels[kept] / 0.75)
        assert abs(kept.float().mean() - 0.75) < 4 * (0.1875 / kept.numel()) ** 0.5
    assert not torch.equal(first == 0, second == 0)
    group.eval()
    for weight, (output,) in zip((1, 2), run(0.25), strict=True):
        torch.testing.assert_close(output, weight * pixels)


def test_skip_connections_of_stride_2_have_no_dropout():
    _, _, run = skip_connections(stride=2)
    assert torch.equal(run(0.5)[0][0], run(0.0)[0][0])


def test_skip_dropout_can_be_changed_at_any_time():
    torch.manual_seed(0)
    net, images, logits = Supernet(channels=4, cells=1), torch.randn(4, 3, 8, 8), Architecture()()
    plain = net(images, logits)
    net.skip_dropout = 0.5
    assert not torch.allclose(net(images, logits), plain)
    net.skip_dropout = 0.0
    assert torch.equal(net(images, logits), plain)
    net.skip_dropout = 1.0
    with pytest.raises(ValueError, match=r"skip_dropout must be in \[0, 1\), not 1.0"):
        net(images, logits)


@pytest.mark.parametrize("space", [DARTS, PC_DARTS])
def test_the_memory_format_is_that_of_the_features_and_changes_no_result(space, float64):
    supernet, weights = Supernet(space, channels=4, cells=3), Architecture(space)()
    images, found, strides = torch.randn(2, 3, 8, 8), [], []
    supernet.stem.register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0].stride(1)))
    for supernet.memory_format in (Supernet.memory_format, torch.contiguous_format):
        loss = supernet(images, weights).square().sum()
        found.append([loss, *torch.autograd.grad(loss, [*supernet.parameters()])])
    assert strides == [1, 64]
    torch.testing.assert_close(found[0], found[1])


def test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match="at least 1 cell"):
        Supernet(cells=0)
    with pytest.raises(ValueError, match=r"6 channels cannot be split into the 4 equal parts .*; use a multiple of 4"):
        Supernet(PC_DARTS, channels=6)
    with pytest.raises(ValueError, match="'cifr' is not a stem; valid: cifar, imagenet"):
        Supernet(stem="cifr")
    other = Architecture(SearchSpace(DARTS.operations, nodes=3))
    with pytest.raises(ValueError, match="14 edges"):
        Supernet(channels=2, cells=1)(torch.randn(2, 3, 8, 8), other())


def golden_weights(net):
    """Set the weights of each edge to sin(1), sin(2), ... times sqrt(2 / fan in), and return all weights."""
    for name, tensor in net.edge_tensors().items():
        if tensor.ndim > 1:
            value = torch.arange(1.0, tensor.numel() + 1, dtype=torch.float64).sin()
            tensor.copy_(value.view_as(tensor) * math.sqrt(2 / tensor[0].numel()))
        elif name.endswith("bias"):
            tensor.zero_()
    return dict(net.named_parameters())


def test_the_second_order_gradient_has_its_golden_value():
    """Through one virtual SGD step (rate 0.025, weight decay 3e-4). Two other implementations give these values."""
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
