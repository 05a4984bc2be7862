"""`convolve` equals `F.conv2d` in values and in derivatives of first and second order."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from problems.nas.cpu_convolution import convolve

CASES = [(3, 1, 4), (5, 1, 4), (7, 1, 4), (3, 2, 4), (5, 2, 4), (3, 3, 4), (1, 1, 2), (1, 1, 1), (3, 1, 2)]


def case(kernel, groups, dtype, size=(3, 4), channels=4, outputs=4):
    torch.manual_seed(0)
    features = torch.randn(2, channels, *size, dtype=dtype, requires_grad=True)
    weight = torch.randn(outputs, channels // groups, kernel, kernel, dtype=dtype, requires_grad=True)
    return features, weight


def plain(features, weight, dilation, groups):
    return F.conv2d(features, weight, None, 1, dilation * (weight.shape[-1] // 2), dilation, groups)


@pytest.mark.parametrize(("kernel", "dilation", "groups"), CASES)
def test_derivatives_of_first_and_second_order(kernel, dilation, groups):
    inputs = case(kernel, groups, torch.float64, outputs=8 if groups == 2 else 4)

    def function(features, weight):
        return convolve(features, weight, dilation, groups)

    torch.testing.assert_close(function(*inputs), plain(*inputs, dilation, groups))
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "dilation", "groups"), CASES)
def test_single_precision_uses_other_kernels(kernel, dilation, groups, memory_format):
    features, weight = case(kernel, groups * 16, torch.float32, size=(9, 8), channels=64, outputs=64)
    inputs = features.detach().contiguous(memory_format=memory_format).requires_grad_(), weight

    def derivatives(function):
        output = function(*inputs, dilation, groups * 16)
        first = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
        return output, *first, *torch.autograd.grad(sum(gradient.sin().sum() for gradient in first), inputs)

    for ours, theirs in zip(derivatives(convolve), derivatives(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_autocast_computes_in_the_lower_precision():
    features, weight = case(3, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = convolve(features, weight, groups=4)
    assert output.dtype == torch.bfloat16
    for gradient, value in zip(torch.autograd.grad(output.sum(), (features, weight)), (features, weight), strict=True):
        assert gradient.dtype == value.dtype == torch.float32
