"""A middle problem whose own update contains a hypergradient, against brute force, with its inner path and without."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from named_steps import optimizer_state, step_with_graph
from torch import Tensor
from two_levels import Value

import mlo
from mlo.hypergradient import Central, Exact, Forward


def low_loss(low: Tensor, mid: Tensor, top: Tensor) -> Tensor:
    return (low * mid).sin().sum() + (low - top).square().sum() + (low * top * mid).sum()


def mid_loss(mid: Tensor, low: Tensor, top: Tensor) -> Tensor:
    return (mid - low.cos()).square().sum() + (low * mid * top).sum() + low.square().sum()


def top_loss(mid: Tensor, low: Tensor) -> Tensor:
    return mid.exp().sum() + (mid * low).sum()


class Low(mlo.Problem):
    def loss(self, batch, mid, top):
        return low_loss(self(), mid(), top())


class Mid(mlo.Problem):
    def loss(self, batch, low, top):
        return mid_loss(self(), low(), top())


class Top(mlo.Problem):
    def loss(self, batch, mid, low):
        return top_loss(mid(), low())


def stack(steps: int) -> list[mlo.Problem]:
    made = []
    for cls, name, value in ((Low, "low", (0.3, -0.7)), (Mid, "mid", (0.5, 0.2)), (Top, "top", (-0.4, 0.9))):
        module = Value(*value)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        made.append(cls(name, module=module, optimizer=optimizer, steps=steps if name == "low" else 1))
    return made


def brute_force(problems: list[mlo.Problem]) -> Tensor:
    low, mid, _ = problems
    theta, m, x = (p.module.value.detach().clone().requires_grad_() for p in problems)
    at = optimizer_state(low)
    variables = {"value": theta}
    for _ in range(low.steps):
        gradient = torch.autograd.grad(low_loss(variables["value"], m, x), variables["value"], create_graph=True)[0]
        variables, at = step_with_graph(low, variables, {"value": gradient}, at)
    theta = variables["value"]
    total = torch.autograd.grad(mid_loss(m, theta, x), m, create_graph=True)[0]
    moved, _ = step_with_graph(mid, {"value": m.detach()}, {"value": total}, optimizer_state(mid))
    return torch.autograd.grad(top_loss(moved["value"], theta), x)[0]


@pytest.mark.parametrize("estimator", ["unrolled", {"kind": "unrolled", "product": "forward"}], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_with_the_inner_path_it_is_exact(steps, estimator):
    problems = stack(steps)
    engine = mlo.Engine(problems, estimator, inner_path=True, device="cpu")
    for _ in range(3):
        expected = brute_force(problems)
        torch.testing.assert_close(engine.hypergradient("top")["value"], expected, rtol=1e-10, atol=1e-13)
        before = problems[2].optimizer.state[problems[2].module.value].get("momentum_buffer", torch.zeros(2)).clone()
        engine.step()
        taken = problems[2].optimizer.state[problems[2].module.value]["momentum_buffer"] - 0.9 * before
        torch.testing.assert_close(taken, expected, rtol=1e-10, atol=1e-13)


def test_steps_that_are_stored_on_the_cpu_are_taken_again_on_the_device(device):
    problems = stack(3)
    engine = mlo.Engine(problems, {"kind": "unrolled", "store_on": "cpu"}, inner_path=True, device=device)
    expected = brute_force(problems)
    torch.testing.assert_close(engine.hypergradient("top")["value"], expected, rtol=1e-10, atol=1e-13)


def test_a_difference_is_between_gradients_that_both_include_the_inner_path():
    """That of the step itself does not, so it is not reused for a one-sided difference."""
    found = []
    for product in ("exact", {"kind": "one_sided", "radius": 1e-6}):
        problems = stack(1)
        problems[1].steps = 2
        engine = mlo.Engine(problems, {"kind": "unrolled", "product": product}, inner_path=True, device="cpu")
        found.append(engine.hypergradient("top")["value"])
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_it_passes_the_check_that_users_have():
    mlo.check(mlo.Engine(stack(2), "unrolled", inner_path=True, device="cpu"), "top")


def test_without_it_the_engine_warns_and_is_off():
    problems = stack(1)
    with pytest.warns(UserWarning, match="the gradient of 'mid' itself runs through 'low'.*inner_path=True"):
        engine = mlo.Engine(problems, "one_step", device="cpu")
    expected = brute_force(problems)
    assert (engine.hypergradient("top")["value"] - expected).norm() > 0.01 * expected.norm()


def test_what_the_inner_path_cannot_go_through_raises():
    with pytest.raises(
        mlo.ConfigError, match=r"inner_path: 'low', below 'mid', has an estimator that does not differentiate steps"
    ):
        mlo.Engine(stack(1), "cg", inner_path=True, device="cpu")


class Below(mlo.Problem):
    def loss(self, batch, mid):
        return below_loss(self(), mid())


class Above(mlo.Problem):
    def loss(self, batch, mid):
        return mid().exp().sum()


def below_loss(low: Tensor, mid: Tensor) -> Tensor:
    return (low * mid).sin().sum() + low.square().sum()


def nested(estimator: object, steps: int) -> mlo.Engine:
    """Two steps of the lowest problem, which the gradient of the middle one runs through; without lookahead."""
    problems = []
    for cls, name, value in ((Below, "low", (0.3, -0.7)), (Mid, "mid", (0.5, 0.2)), (Above, "top", (-0.4, 0.9))):
        module = Value(*value)
        problems.append(cls(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1)))
    problems[0].hypergradient, problems[0].steps, problems[1].steps = "unrolled", 2, steps
    return mlo.Engine(problems, estimator, inner_path=True, lookahead=False, device="cpu")


def curvature(mid: Tensor, top: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of the middle problem's gradient, in which the lowest one's steps are taken from ``start``."""

    def slope(mid: Tensor, top: Tensor) -> Tensor:
        at = start.detach().requires_grad_()
        for _ in range(2):
            at = at - 0.1 * torch.autograd.grad(below_loss(at, mid), at, create_graph=True)[0]
        return torch.autograd.grad(mid_loss(mid, at, top), mid, create_graph=True)[0]

    return torch.autograd.functional.jacobian(slope, (mid.requires_grad_(), top.requires_grad_()))


@pytest.mark.parametrize("product", ["exact", "forward", "central"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_curvature_at_a_solution_takes_the_inner_steps_again_from_there(steps, product):
    """With an implicit estimator for the middle problem: they read its solution, and not what they had read."""
    engine = nested({"kind": "cg", "product": product}, steps)
    low, mid, top = (problem.module.value for problem in engine.problems.values())
    for _ in range(2):
        start, x = low.detach().clone(), top.detach().clone()
        engine.step()
        solution = mid.detach().clone()
        own, cross = curvature(solution, x, start)
        expected = -cross.T @ torch.linalg.solve(own.T, solution.detach().exp())
        taken = (x.detach() - top.detach()) / 0.1
        torch.testing.assert_close(taken, expected, rtol=1e-8 if product != "central" else 1e-3, atol=0)


class Columns(mlo.Estimator):
    """Notes the curvature at the first step of the round."""

    product: mlo.ProductOption
    columns: ClassVar[list[Tensor]] = []

    @property
    def recording(self):
        return mlo.Recording(last=None, before=True)

    def pull(self, steps, cotangent, targets, warm):
        at = self.product.before(steps[0], targets)
        self.columns[:] = [at((unit,), cross=False)[0][0] for unit in torch.eye(2, dtype=torch.float64)]
        return mlo.Pulled(at(cotangent, own=False)[1])


@pytest.mark.parametrize("product", [Exact(), Forward(), Central()])
def test_the_curvature_before_the_first_step_is_that_of_the_inner_steps_too(product):
    """For the estimators of mlo nothing lies before that step; an estimator of one's own may ask for it."""
    engine = nested(Columns(product=product), 2)
    low, mid, top = (problem.module.value.detach().clone() for problem in engine.problems.values())
    engine.step()
    expected = curvature(mid, top, low)[0]
    found = torch.stack(Columns.columns)
    torch.testing.assert_close(found, expected.T, rtol=1e-8 if not isinstance(product, Central) else 1e-3, atol=0)
