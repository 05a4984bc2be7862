"""Operators in other forms are the same functions."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlo.ops.differentiable import ElementaryOperators, TwiceDifferentiable


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None, "eps": 0.1}], ids=str
)
@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (nn.BatchNorm1d, (5, 4)),
        (nn.BatchNorm2d, (3, 4, 2, 2)),
        (nn.InstanceNorm1d, (4, 5)),
        (nn.InstanceNorm2d, (3, 4, 2, 2)),
        (partial(nn.InstanceNorm1d, affine=True, track_running_stats=True), (3, 4, 5)),
    ],
    ids=["batch 1d", "batch 2d", "instance 1d", "instance 2d", "instance with running statistics"],
)
def test_batch_and_instance_norm_by_plain_operators_are_torchs(cls, shape, options, training, float64):
    torch.manual_seed(0)
    one = cls(4, **options).train(training)
    for parameter in one.parameters():
        nn.init.normal_(parameter)
    other = copy.deepcopy(one)
    for _ in range(3):
        x = 2 + 3 * torch.randn(*shape)
        with ElementaryOperators():
            found = other(x)
        torch.testing.assert_close(found, one(x))
        torch.testing.assert_close(other.state_dict(), one.state_dict())


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (nn.BatchNorm1d, (64, 4)),
        (nn.LayerNorm, (64, 4)),
        (partial(nn.InstanceNorm1d, affine=True, track_running_stats=True), (2, 4, 64)),
    ],
    ids=["batch", "layer", "instance"],
)
def test_in_half_precision_statistics_are_of_single_precision_as_torchs(cls, shape, autocast):
    torch.manual_seed(0)
    one = cls(4)
    other = copy.deepcopy(one)
    x = (200 + torch.randn(*shape)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with ElementaryOperators():
            found = other(x)
        expected = one(x)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(other.state_dict(), one.state_dict())


@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"bias": False, "eps": 0.1}], ids=str)
@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_layer_norm_by_plain_operators_is_torchs(shape, options, float64):
    torch.manual_seed(0)
    norm, x = nn.LayerNorm(shape, **options), 2 + 3 * torch.randn(5, 3, 4)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    with ElementaryOperators():
        found = norm(x)
    torch.testing.assert_close(found, norm(x))


@pytest.mark.parametrize(("shape", "dim"), [((4, 3), 0), ((4, 3), 1), ((4, 3), -1), ((4, 3, 2), 1), ((4, 3, 2), 2)])
def test_weight_norm_by_plain_operators_is_torchs_and_has_its_second_derivative(shape, dim, float64):
    torch.manual_seed(0)
    v = torch.randn(*shape, requires_grad=True)
    g = torch.randn_like(torch.norm_except_dim(v, 2, dim)).requires_grad_()
    expected, own = torch._weight_norm(v, g, dim), torch._weight_norm
    with TwiceDifferentiable():
        torch.testing.assert_close(torch._weight_norm(v, g, dim), expected)
        assert torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, dim), (v, g))
    assert torch._weight_norm is own
    assert torch.nn.utils.weight_norm.__globals__["_weight_norm"] is own, "where the older hooks look for it"


LOSSES = {"mse": F.mse_loss, "soft margin": F.soft_margin_loss, "huber": partial(F.huber_loss, delta=0.7)}
REDUCTIONS = [{"reduction": "mean"}, {"reduction": "sum"}, {"reduction": "none"}]
LEGACY = [{"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}]


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize(
    ("loss", "options"),
    [(loss, options) for loss in LOSSES for options in REDUCTIONS]
    + [(loss, options) for loss in ("mse", "soft margin") for options in LEGACY],
    ids=str,
)
def test_losses_by_plain_operators_are_torchs(loss, options, float64):
    x, y = torch.randn(5, 3), torch.randn(5, 3).sign()
    with ElementaryOperators():
        found = LOSSES[loss](x, y, **options)
    torch.testing.assert_close(found, LOSSES[loss](x, y, **options))


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
def test_weighted_losses_by_plain_operators_are_torchs(loss, options, float64):
    x, y, weight = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5, 3)
    with ElementaryOperators():
        found = LOSSES[loss](x, y, weight=weight, **options)
    torch.testing.assert_close(found, LOSSES[loss](x, y, weight=weight, **options))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_distances_by_plain_operators_are_torchs(p, float64):
    x, y = torch.randn(4, 3), torch.randn(5, 3)
    with ElementaryOperators():
        found = torch.cdist(x, y, p), F.pdist(x, p)
    torch.testing.assert_close(found, (torch.cdist(x, y, p), F.pdist(x, p)))


def test_a_hard_sigmoid_in_place_is_in_place():
    x = torch.linspace(-4, 4, 9)
    expected = F.hardsigmoid(x)
    with ElementaryOperators():
        F.hardsigmoid(x, inplace=True)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_norm_by_plain_operators_is_as_exact_in_half_precision(dtype):
    v, g = torch.full((2, 300), 5000.0, dtype=dtype), torch.ones(2, 1, dtype=dtype)
    expected = torch._weight_norm(v, g, 0)
    with TwiceDifferentiable():
        found = torch._weight_norm(v, g, 0)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_one_value_per_channel_is_refused_as_torch_does():
    with ElementaryOperators(), pytest.raises(ValueError, match="more than one value per channel"):
        nn.InstanceNorm1d(2, track_running_stats=True)(torch.ones(3, 2, 1))
