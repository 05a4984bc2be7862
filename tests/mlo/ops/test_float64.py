"""Programs that ask for float32, evaluated in float64: what they compute, and what stays as it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlo.ops.float64 import InFloat64, in_float64

X = torch.linspace(0.1, 2.0, 6, dtype=torch.float64).reshape(2, 3)
HALF = torch.tensor([0.1, 0.7, 0.3])  # in float32


def filled():
    new = torch.zeros(2, 3)
    new[:] = X / 3
    return new


def written_out():
    new = torch.empty(2, 3)
    torch.div(X, 3, out=new)
    return new


PROGRAMS = {
    "float": (lambda: (X / 3).float(), lambda: X / 3),
    "half": (lambda: (X / 3).half(), lambda: X / 3),
    "bfloat16": (lambda: (X / 3).bfloat16(), lambda: X / 3),
    "to": (lambda: (X / 3).to(torch.float32), lambda: X / 3),
    "to of a keyword": (lambda: (X / 3).to(dtype=torch.bfloat16), lambda: X / 3),
    "to as another": (lambda: (X / 3).to(HALF), lambda: X / 3),
    "type": (lambda: (X / 3).type(torch.float32), lambda: X / 3),
    "type as another": (lambda: (X / 3).type_as(HALF), lambda: X / 3),
    "softmax": (lambda: F.softmax(X, -1, dtype=torch.float32), lambda: F.softmax(X, -1)),
    "sum": (lambda: X.sum(dtype=torch.float32), lambda: X.sum()),
    "complex": (lambda: torch.view_as_complex(X[:, :2].float()).abs(), lambda: X[:, :2].norm(dim=1)),
    "polar": (lambda: torch.polar(torch.ones(3), X[0].float()).real, lambda: X[0].cos()),
    "matrix product": (lambda: X @ HALF, lambda: X @ HALF.double()),
    "layer": (lambda: F.linear(X, HALF[None], HALF[:1]), lambda: F.linear(X, HALF[None].double(), HALF[:1].double())),
    "list": (lambda: torch.cat([X[0], HALF]), lambda: torch.cat([X[0], HALF.double()])),
    "filled": (filled, lambda: X / 3),
    "written out": (written_out, lambda: X / 3),
    "numbers": (lambda: torch.tensor([0.5, 0.25]) / 3, lambda: torch.tensor([0.5, 0.25]).double() / 3),
    "range": (lambda: torch.arange(3.0) / 3, lambda: torch.arange(3.0).double() / 3),
    "mask": (lambda: (X > 1).float() / 3, lambda: (X > 1).double() / 3),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_compute_in_float64(program):
    asked, plain = PROGRAMS[program]
    expected = plain()
    with InFloat64():
        found = asked()
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)


P = torch.linspace(0.1, 0.9, 40)
ROWS = torch.ones(8, 5).t()  # not contiguous
DRAWS = {
    "rand": lambda x: torch.rand(40),
    "randn": lambda x: torch.randn(40),
    "randn of float32": lambda x: torch.randn(40, dtype=torch.float32),
    "randn of the dtype": lambda x: torch.randn(40, dtype=x.dtype),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randn_like of float32": lambda x: torch.randn_like(x, dtype=torch.float32),
    "randint_like": lambda x: torch.randint_like(x, 9),
    "new_empty": lambda x: x.new_empty(40).normal_(),
    "normal": lambda x: torch.normal(x, 1.0),
    "normal of a shape": lambda x: torch.normal(0.0, 1.0, (40,)),
    "normal_": lambda x: x.clone().normal_(),
    "normal_ of columns": lambda x: (x[0] * ROWS.to(x.dtype)).normal_(),
    "normal_ of a column": lambda x: x.clone().reshape(20, 2)[:, 1].normal_(),
    "normal of an expanded mean": lambda x: torch.normal(x[:1].expand(40), 1.0),
    "new zeros": lambda x: torch.zeros(40).normal_(),
    "uniform_": lambda x: x.clone().uniform_(),
    "exponential_": lambda x: x.clone().exponential_(),
    "cauchy_": lambda x: x.clone().cauchy_(),
    "log_normal_": lambda x: x.clone().log_normal_(),
    "geometric_": lambda x: x.clone().geometric_(0.3),
    "random_": lambda x: x.clone().random_(100),
    "bernoulli": torch.bernoulli,
    "bernoulli_": lambda x: x.clone().bernoulli_(0.4),
    "bernoulli_ of a tensor": lambda x: x.clone().bernoulli_(x),
    "multinomial": lambda x: torch.multinomial(x, 40, replacement=True),
    "poisson": lambda x: torch.poisson(x * 3),
    "out": lambda x: torch.randn(40, out=torch.empty_like(x)),
    "dropout": lambda x: F.dropout(torch.ones_like(x), 0.5),
    "native_dropout": lambda x: torch.native_dropout(torch.ones_like(x), 0.5, True)[0],
    "dropout1d": lambda x: F.dropout1d(torch.ones_like(x)[None, :, None], 0.5),
    "gumbel_softmax": lambda x: F.gumbel_softmax(torch.zeros_like(x), hard=True),
    "Normal": lambda x: torch.distributions.Normal(x, 1.0).rsample(),
    "vmap": lambda x: torch.vmap(lambda p: p + torch.randn_like(p), randomness="different")(x.reshape(4, 10)),
}


@pytest.mark.parametrize("program", DRAWS)
def test_random_numbers_are_those_of_training(program):
    torch.manual_seed(0)
    expected, after = DRAWS[program](P), torch.rand(1)
    torch.manual_seed(0)
    with in_float64(torch.float64):
        found = DRAWS[program](P.double())
    torch.testing.assert_close(found, expected.double() if found.is_floating_point() else expected)
    assert torch.equal(torch.rand(1), after)
    assert found.dtype in (torch.float64, torch.int64)


def test_a_training_in_float64_draws_in_float64():
    torch.manual_seed(0)
    expected = torch.randn_like(X)
    torch.manual_seed(0)
    with in_float64(torch.float64, torch.float64):
        assert torch.equal(torch.randn_like(X), expected)


def test_dropout_is_computed_in_float64():
    for dropped in (lambda x: F.dropout(x, 0.3), lambda x: torch.native_dropout(x, 0.3, True)[0]):
        with in_float64(torch.float64):
            found = dropped(X)
        assert torch.all((found == 0) | ((found * 0.7 - X).abs() < 1e-15))
    with in_float64(torch.float64):
        assert torch.equal(torch.native_dropout(X, 0.3, False)[0], X)
        assert not torch.native_dropout(X, 1.0, True)[0].any()


def test_what_is_no_less_than_float64_stays():
    held = torch.zeros(3)
    with InFloat64():
        assert (X > 1).dtype == torch.bool
        assert torch.tensor([1, 2]).dtype == torch.int64
        assert X[0].view(torch.int64).dtype == torch.int64
        assert HALF.view(torch.int32).dtype == torch.int32
        held.add_(X[0])  # in place: the tensor is the user's
        held[0] = X[0, 0]
        assert torch.ones(2, requires_grad=True).is_leaf
    assert held.dtype == torch.float32
    torch.testing.assert_close(held, X[0].float())


def test_a_cast_is_a_copy():
    x = X.clone()
    with InFloat64():
        for cast in (x.float(), x.to(torch.float32), x.type(torch.float32), x.half()):
            cast.zero_()
        assert x.to("cpu") is x
    assert torch.equal(x, X)


def test_derivatives_of_any_order_are_those_of_float64():
    layer = nn.Linear(3, 2).double()

    def second(lowered: bool) -> torch.Tensor:
        h = layer(X)
        h = h.float().sin().to(h.dtype) if lowered else h.sin()
        (g,) = torch.autograd.grad(h.exp().sum(), layer.weight, create_graph=True)
        return torch.autograd.grad(g.square().sum(), layer.weight)[0]

    with InFloat64():
        found = second(True)
    torch.testing.assert_close(found, second(False), rtol=1e-15, atol=0)


def test_only_float64_is_computed_throughout():
    for dtype in (None, torch.float32, torch.bfloat16):
        with in_float64(dtype):
            assert X.float().dtype == torch.float32
    with in_float64(torch.float64):
        assert X.float().dtype == torch.float64
