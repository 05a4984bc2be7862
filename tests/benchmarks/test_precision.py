"""The measurement of precisions: its rounding is TensorFloat-32's, and it tells the parts of a gradient apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks import precision


def test_a_number_is_rounded_to_ten_bits_to_the_nearest_even():
    step = 2**-10
    given = torch.tensor([1.0, 1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -1 - 0.51 * step, 3e30, 0.0])
    found = precision.rounded(given)
    expected = torch.tensor([1.0, 1.0, 1 + 2 * step, 1 + step, -1 - step, found[5], 0.0])
    assert torch.equal(found, expected)
    assert ((found - given).abs() <= given.abs() * 2**-11).all()
    assert precision.rounded(given.double()).dtype == torch.float64


@pytest.mark.parametrize(("everywhere", "allowed"), [(True, False), (False, False), (False, True)])
def test_convolutions_are_rounded_everywhere_or_where_torch_allows_it(everywhere, allowed):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5, requires_grad=True)
    exact = layer(x)
    expected = torch.autograd.grad(exact.square().sum(), x)[0]
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        with precision.Rounded(everywhere):
            found = layer(x)
            gradient = torch.autograd.grad(found.square().sum(), x)[0]
    finally:
        torch.backends.cudnn.allow_tf32 = True
    for a, b in ((found, exact), (gradient, expected)):
        assert torch.equal(a, b) == (not (everywhere or allowed))
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_products_are_in_float32_under_the_engine_alone(monkeypatch):
    names = ["float64", "TF32 in all convolutions, as in a loop by hand"]
    names += ["TF32 in the convolutions of steps (the default of mlo)"]
    monkeypatch.setattr(precision, "PRECISIONS", {name: precision.PRECISIONS[name] for name in names})
    engine = precision.search(cells=3, channels=1)
    double, by_hand, default = precision.errors(engine).values()
    assert double[:2] == [(0.0, pytest.approx(1.0)), (0.0, pytest.approx(1.0))]
    assert by_hand[0] == default[0], "steps are the same"
    assert 0 < default[1][0] < by_hand[1][0], "and products are not"
    assert all(math.isfinite(number) for row in (double, by_hand, default) for cell in row for number in cell)
    assert engine.rounds == 0
    assert not any({"loss", "batches_ahead"} & vars(problem).keys() for problem in engine.problems.values())


def test_the_tables_have_a_row_for_each_precision(monkeypatch):
    monkeypatch.setattr(precision, "errors", lambda engine: dict.fromkeys(precision.PRECISIONS, 3 * [(0.5, 0.25)]))
    lines = precision.measured(cells=3, channels=1, rounds=(0,), seeds=2).splitlines()
    assert lines[0].startswith("| 3 cells, before the first round | first-order gradient |")
    assert [line for line in lines if line.startswith("| float32")] == [
        "| float32 | 0.5 (0.25) | 0.5 (0.25) | 0.5 (0.25) |"
    ]
