"""Arithmetic on many tensors at once gives what it gives tensor by tensor."""

from __future__ import annotations

import pytest
import torch

from mlo.ops import vectors
from mlo.steps.clipping import clip

NAN = float("nan")


def mixed() -> list[torch.Tensor]:
    """Small and large tensors of several dtypes, layouts and shapes."""
    torch.manual_seed(0)
    return [
        torch.randn(3, 4),
        torch.randn(vectors.SMALL + 1),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(5, dtype=torch.float64),
        torch.randn(4, 6).t(),
        torch.randn(2, 9)[:, ::2],
        torch.randn(()),
        torch.zeros(0),
        torch.tensor(7),
        torch.tensor([True, False]),
    ]


def test_a_copy_has_the_values_and_layouts_in_memory_of_its_own() -> None:
    before = mixed()
    before[0].requires_grad_()
    copies = vectors.copied(before)
    for copy, tensor in zip(copies, before, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.dtype == tensor.dtype
        assert not copy.requires_grad
        assert copy.numel() == 0 or copy.data_ptr() != tensor.data_ptr()
    assert copies[2].stride() == before[2].stride()


@pytest.mark.parametrize("condition", [True, False])
def test_values_are_selected_on_the_device_even_where_the_others_are_not_finite(condition: bool) -> None:
    targets, values = mixed(), [t.clone() if not t.is_floating_point() else t + 1 for t in mixed()]
    bad = targets if condition else values
    for tensor in bad:
        if tensor.is_floating_point():
            tensor.fill_(NAN)
    expected = [t.clone() for t in (values if condition else targets)]
    addresses = [t.data_ptr() for t in targets]
    vectors.select_(torch.tensor(condition), targets, values)
    assert [t.data_ptr() for t in targets] == addresses
    assert all(map(torch.equal, targets, expected))


def test_a_copy_into_other_dtypes_casts() -> None:
    targets = [torch.zeros(2, dtype=torch.float64), torch.zeros(2), torch.zeros(2, 2).t()]
    values = [torch.tensor([0.1, 0.2]), torch.tensor([3.0, 4.0]), torch.arange(4.0).view(2, 2)]
    vectors.copy_(targets, values)
    assert all(torch.equal(t, v.to(t.dtype)) for t, v in zip(targets, values, strict=True))


def test_gradients_have_the_strides_of_their_variables_and_mostly_their_own_memory() -> None:
    variables = [torch.zeros(6, 1, 3, 3), torch.zeros(8, 4, 1, 1), torch.zeros(4, 3, 3, 3), torch.zeros(3)]
    gradients = [
        torch.randn(v.shape).to(memory_format=torch.channels_last) if v.dim() == 4 else None for v in variables
    ]
    found = vectors.aligned(gradients, variables)
    for before, after, variable in zip(gradients, found, variables, strict=True):
        assert (before is None) == (after is None)
        if before is not None and after is not None:
            assert after.stride() == variable.stride()
            assert torch.equal(before, after)
    shared = [a.data_ptr() == b.data_ptr() for a, b in zip(gradients, found, strict=True) if a is not None]
    assert shared == [True, True, False]


def test_a_sparse_gradient_stays_as_it_is() -> None:
    sparse = torch.eye(3).to_sparse()
    assert vectors.aligned([sparse], [torch.zeros(3, 3)])[0] is sparse


def test_the_inner_product_of_small_and_large_tensors() -> None:
    one = [t.double() for t in mixed() if t.is_floating_point()]
    other = [t.cos() for t in one]
    expected = sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))
    assert vectors.dot(one, other).item() == pytest.approx(expected, rel=1e-12)
    assert vectors.dot(one[:1], other[:1]).item() == pytest.approx(float((one[0] * other[0]).sum()), rel=1e-12)


def test_a_difference_takes_none_as_zero_and_fills_the_shorter_side() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 3.0])
    found = vectors.difference([a, None, a, None, b], [b, b, None, None], torch.tensor(2.0))
    expected = [2 * (a - b), -2 * b, 2 * a, None, 2 * b]
    for one, other in zip(found, expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_parts_of_limited_size_hold_everything_once() -> None:
    tensors = [torch.zeros(n) for n in (10, 2 * vectors.TOGETHER, 10, vectors.TOGETHER // 4, 10)]
    assert list(vectors.chunks([0, 1, 2, 3, 4], tensors)) == [[0, 1], [2, 3], [4]]
    assert list(vectors.chunks([], tensors)) == []


@pytest.mark.parametrize("condition", [True, False])
def test_values_in_another_layout_than_their_target_and_parts_of_larger_tensors_are_selected(condition: bool) -> None:
    large, other = torch.arange(24.0).view(2, 12), torch.arange(24.0).view(2, 12) + 100
    targets = [large[1], torch.arange(6.0).view(2, 3), large[0, ::2], torch.arange(4.0).view(2, 2).t()]
    values = [other[1], torch.arange(6.0).view(3, 2).t(), other[0, ::2], torch.ones(2, 2)]
    expected = [t.clone() for t in (values if condition else targets)]
    between = large[0, 1::2].clone()
    vectors.select_(torch.tensor(condition), targets, values)
    assert all(map(torch.equal, targets, expected))
    assert torch.equal(large[0, 1::2], between)


def test_whole_numbers_that_no_float_holds_are_selected() -> None:
    targets = [torch.tensor([2**24 + 1]), torch.zeros(2)]
    vectors.select_(torch.tensor(True), targets, [torch.tensor([2**24 + 3]), torch.ones(2)])
    assert targets[0].item() == 2**24 + 3


def test_the_gradient_of_a_part_of_a_larger_tensor_has_the_strides_of_its_variable() -> None:
    parts = torch.arange(48.0).view(2, 2, 3, 4, 1).to(torch.float64).unbind()
    like = [torch.zeros(2, 3, 4, 1).to(memory_format=torch.channels_last), torch.zeros(2, 3, 4, 1)]
    other = parts[1].as_strided((2, 3, 4, 1), (12, 4, 1, 7), parts[1].storage_offset())
    for gradient in (parts[1], other):
        for variable in like:
            found = vectors.aligned([gradient], [variable])[0]
            assert found is not None
            assert found.stride() == variable.stride()
            assert torch.equal(found, gradient)
            assert found.dtype == torch.float64
    pair = torch.arange(4.0).view(2, 2)
    found = vectors.aligned([pair.t()], [torch.zeros(2, 2)])[0]
    assert found is not None
    assert found.is_contiguous()
    assert torch.equal(found, pair.t())


def test_a_scaled_tensor_keeps_its_dtype_also_without_dimensions() -> None:
    tensors = [torch.tensor(3.0), torch.ones(2), torch.ones(2, dtype=torch.bfloat16)]
    for scale in (2.0, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64)):
        found = vectors.scaled(tensors, scale)
        assert [t.dtype for t in found] == [t.dtype for t in tensors]
        assert all(torch.equal(t, 2 * one) for t, one in zip(found, tensors, strict=True))
    assert vectors.scaled([], 2.0) == ()


def test_a_difference_with_a_longer_second_side() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 3.0])
    found = vectors.difference([a], [b, b], torch.tensor(2.0))
    assert [None if t is None else t.tolist() for t in found] == [[-8.0, -2.0], [-10.0, -6.0]]


def test_a_complex_vector_is_one_of_its_real_and_imaginary_parts():
    """Conjugated views included, of which torch's operators on lists know nothing."""
    torch.manual_seed(0)
    a, b = ((torch.randn(3, dtype=torch.complex128), torch.randn(2), torch.randn(2, 2).cdouble()) for _ in range(2))
    a = (a[0].conj(), *a[1:])
    real = [vectors.flat(v) for v in (a, b)]
    assert real[0].shape == (16,)
    torch.testing.assert_close(vectors.dot(a, b).double(), real[0] @ real[1])
    torch.testing.assert_close(vectors.norm(a).double(), real[0].norm())
    torch.testing.assert_close(vectors.shaped(real[0], a), a)
    for condition in (True, False):
        targets = tuple(t.clone().conj() if t.is_complex() else t.clone() for t in b)
        before = [t.clone() for t in targets]
        vectors.select_(torch.tensor(condition), targets, a)
        torch.testing.assert_close(targets, a if condition else tuple(before))
    targets = tuple(map(torch.zeros_like, a))
    vectors.copy_(targets, a)
    torch.testing.assert_close(targets, a)


def test_clipping_a_complex_gradient_in_a_graph():
    gradient = torch.randn(3, dtype=torch.complex128)
    by_parts = torch.view_as_real(gradient).clone().requires_grad_()
    whole = gradient.clone().requires_grad_()
    (expected,), (found,) = clip([by_parts], 0.5), clip([whole], 0.5)
    torch.testing.assert_close(torch.view_as_real(found), expected)
    (one,) = torch.autograd.grad(expected.square().sum(), by_parts)
    (other,) = torch.autograd.grad(found.abs().square().sum(), whole)
    torch.testing.assert_close(torch.view_as_real(other), one)
