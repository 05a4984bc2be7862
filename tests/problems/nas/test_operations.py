"""The candidate operations: output shapes, search and evaluation variants, arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from problems.nas.operation_names import BUILDABLE, NONE, OPERATIONS
from problems.nas.operations import FactorizedReduce, make_operation

USEFUL = [name for name in OPERATIONS if name != NONE]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", USEFUL)
def test_an_operation_keeps_the_channels_and_divides_the_resolution_by_its_stride(name, stride, affine):
    operation = make_operation(name, 4, stride, affine)
    for size in (8, 7):
        output = operation(torch.randn(2, 4, size, size))
        assert output.shape == (2, 4, -(-size // stride), -(-size // stride))


@pytest.mark.parametrize("name", USEFUL)
def test_only_evaluation_operations_have_affine_batch_norms(name):
    for affine in (True, False):
        norms = [m for m in make_operation(name, 4, 2, affine).modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(norm.affine == affine for norm in norms)
        assert bool(norms) == (not affine or "pool" not in name)


def test_only_search_pools_have_a_batch_norm():
    images = torch.randn(3, 4, 6, 6)
    average = F.avg_pool2d(F.pad(images, (1, 1, 1, 1)), 3, 1) * 9
    average = average / F.avg_pool2d(F.pad(torch.ones_like(images), (1, 1, 1, 1)), 3, 1) / 9
    for name, pooled in (("max_pool_3x3", F.max_pool2d(images, 3, 1, 1)), ("avg_pool_3x3", average)):
        torch.testing.assert_close(make_operation(name, 4, 1, affine=True)(images), pooled)
        normalized = make_operation(name, 4, 1, affine=False)(images)
        torch.testing.assert_close(normalized, F.batch_norm(pooled, None, None, training=True))


def test_factorized_reduce_reads_every_pixel_of_an_even_image_and_pads_an_odd_one():
    reduce = FactorizedReduce(1, 2, affine=False).eval()
    nn.init.ones_(reduce.aligned.weight)
    nn.init.ones_(reduce.shifted.weight)
    for size in (4, 5):
        images = torch.arange(1.0, size * size + 1).reshape(1, 1, size, size)
        aligned, shifted = reduce(images)[0] * (1 + reduce.norm.eps) ** 0.5
        torch.testing.assert_close(aligned, images[0, 0, ::2, ::2])
        side = size // 2
        torch.testing.assert_close(shifted[:side, :side], images[0, 0, 1::2, 1::2])
        assert not shifted[side:].any()
        assert not shifted[:, side:].any()


@pytest.mark.parametrize(
    ("name", "answer"), [("sep_conv_3x4", "nearest is 'sep_conv_3x3'"), (NONE, "means the absence of an edge")]
)
def test_the_error_for_an_unknown_operation_lists_the_valid_ones(name, answer):
    with pytest.raises(ValueError, match=answer) as error:
        make_operation(name, 4, 1, affine=True)
    assert all(valid in str(error.value) for valid in USEFUL)


def test_every_name_that_is_buildable_has_a_module():
    assert all(isinstance(make_operation(name, 4, 1, affine=True), nn.Module) for name in BUILDABLE)
