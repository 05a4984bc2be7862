"""Curvature products against each other and against what they cost."""

from __future__ import annotations

import pytest
import torch
from brute_force import brute_force, small_lbt
from small_lbt import noisy_lbt

import mlo

pytestmark = pytest.mark.usefixtures("float64")

ESTIMATORS = ["one_step", "unrolled", "cg", "neumann"]


def found(stack: list[mlo.Problem], **estimator: object) -> torch.Tensor:
    return mlo.Engine(stack, estimator, device="cpu").hypergradient("arch")["weights"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_forward_over_reverse_is_exact(estimator):
    stack = noisy_lbt()
    exact = found(stack, kind=estimator, product="exact")
    torch.testing.assert_close(found(stack, kind=estimator, product="forward"), exact, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("product", "order"), [("central", 2), ("one_sided", 1)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_differences_converge_at_their_order(estimator, product, order):
    """Ten times nearer points, ten or a hundred times less error, on smooth networks."""
    stack = small_lbt("momentum", steps=2)
    damped = {"damping": 1.0, "iterations": 5} if estimator == "cg" else {"rate": 0.3} if estimator == "neumann" else {}
    exact = found(stack, kind=estimator, **damped)
    errors = [
        (found(stack, kind=estimator, product={"kind": product, "radius": r}, **damped) - exact).norm()
        for r in (1e-3, 1e-4)
    ]
    assert errors[0] < 0.05 * exact.norm()
    assert errors[0] / errors[1] == pytest.approx(10**order, rel=0.3)


def test_a_one_sided_difference_costs_one_pass_and_uses_the_steps_own_gradient():
    stack = small_lbt("momentum")
    engine = mlo.Engine(stack, {"kind": "one_step", "product": "one_sided"}, device="cpu")
    engine.step()
    assert engine.passes["teacher"] == {"step": 1, "read": 2, "product": 1}
    assert engine.passes["student"] == {"step": 1, "read": 1, "product": 1}


def test_a_one_sided_difference_where_the_top_has_moved_meanwhile():
    """With two steps of the top a round, the second goes through a frozen copy, with a new cache."""
    taken = []
    for product in ("exact", {"kind": "one_sided", "radius": 1e-6}):
        stack = small_lbt("momentum")
        stack[2].steps = 2
        engine = mlo.Engine(stack, {"kind": "one_step", "product": product}, device="cpu")
        engine.step()
        taken.append(stack[2].module.weights.detach().clone())
    torch.testing.assert_close(*taken, rtol=1e-6, atol=1e-9)


def test_penalty_converges_to_the_implicit_hypergradient():
    """More steps and a smaller tilt bring it to what conjugate gradient finds at a strongly convex minimum."""
    from analytic import SHAPES, Quadratics

    for shape in SHAPES[:4]:
        quadratics = Quadratics.make(shape)
        expected = quadratics.closed_form("top")
        errors = [
            (
                mlo.Engine(
                    quadratics.problems(), {"kind": "penalty", "steps": n, "rate": 0.15}, device="cpu"
                ).hypergradient("top")["value"]
                - expected
            ).norm()
            / expected.norm()
            for n in (5, 50, 200)
        ]
        assert errors[2] < 1e-9
        assert errors[2] < errors[1] < errors[0]


def test_penalty_takes_no_second_derivative(monkeypatch):
    real = torch.autograd.grad

    def first_order(*args: object, **options: object) -> object:
        assert not options.get("create_graph")
        return real(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", first_order)
    engine = mlo.Engine(small_lbt("momentum"), {"kind": "penalty", "steps": 3}, device="cpu")
    engine.step()
    assert engine.passes["teacher"]["product"] == 2 * (3 + 1)


def test_sama_is_one_step_where_curvature_does_not_change():
    """On quadratics the point of the product does not matter, so SAMA and one_step agree."""
    from analytic import SHAPES, Quadratics

    quadratics = Quadratics.make(SHAPES[0])
    both = [
        mlo.Engine(quadratics.problems(), k, device="cpu").hypergradient("top")["value"] for k in ("sama", "one_step")
    ]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-12)


def test_sama_goes_through_adams_scaling():
    stack = small_lbt("adam")
    mlo.Engine(stack, "one_step", device="cpu").run(3)
    error = (found(stack, kind="sama", radius=1e-4) - brute_force(stack)).norm() / brute_force(stack).norm()
    assert error < 0.5
