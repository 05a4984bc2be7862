"""Hooks of parameters: the same in real steps, virtual steps and derivatives as in a loop written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import mlo
from tests.plain_loop import Factors, Low, Middle, Top, batches, derivative, engine, linear, trained, values

MASK = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
MIX = torch.tensor([[1.0, 0.5, 0, 0], [0, 1, 0, 0], [0, -0.3, 2, 0], [0.1, 0, 0, 1]], dtype=torch.float64)


OTHER = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)


def in_place(gradient: Tensor) -> None:
    gradient.mul_(MASK)


def not_linear_in_place(gradient: Tensor) -> None:
    gradient.mul_(1 + gradient)


HOOKS = {
    "mask": lambda g: g * MASK,
    "mask in place": in_place,
    "not linear, in place": not_linear_in_place,
    "clamp": lambda g: g.clamp(-0.4, 0.4),
    "scale": lambda g: 0.3 * g,
    "unit norm": lambda g: g / (g.norm() + 1e-3),
    "not symmetric": lambda g: g @ MIX,
    "centralized": lambda g: g - g.mean(),
    "shrunk": lambda g: torch.where(g.norm() > 0.2, 0.5 * g, g),
    "constant": lambda g: torch.full_like(g, 0.1),
    "of another tensor": lambda g: OTHER * MASK,
    "only looks": lambda g: print(g.norm().item(), g.tolist(), g.detach().numpy()),
}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
}


def hooked(*hooks, optimizer="SGD"):
    def make():
        module = linear()
        for hook in hooks:
            module.weight.register_hook(hook)
        return module, OPTIMIZERS[optimizer](module.parameters())

    return make


@pytest.mark.parametrize(
    "optimizer", ["SGD", "Adam", *[pytest.param(name, marks=pytest.mark.slow) for name in ("momentum", "NAdam")]]
)
@pytest.mark.parametrize("hook", HOOKS)
def test_unrolled_steps_with_a_hook_have_the_derivative_of_a_plain_loop(hook, optimizer):
    make = hooked(HOOKS[hook], optimizer=optimizer)
    found = engine(make, "unrolled").hypergradient("factors")["logs"]
    torch.testing.assert_close(found, derivative(make), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("product", ["exact", "forward", "central", "one_sided"])
@pytest.mark.parametrize("kind", ["one_step", "unrolled"])
def test_every_product_is_of_the_hooked_step(kind, product):
    make, steps = hooked(HOOKS["not symmetric"]), 1 if kind == "one_step" else 2
    found = engine(make, {"kind": kind, "product": product}, steps).hypergradient("factors")["logs"]
    exact = product in ("exact", "forward", "central")  # the loss is quadratic
    torch.testing.assert_close(found, derivative(make, steps), rtol=1e-8 if exact else 0.05, atol=1e-10)


@pytest.mark.parametrize("estimator", ["darts", "sama", {"kind": "truncated", "steps": 3}, "one_step"])
def test_other_estimators_along_steps_see_hooks(estimator):
    make, steps = hooked(HOOKS["mask"]), 3 if isinstance(estimator, dict) else 1
    found = engine(make, estimator, steps).hypergradient("factors")["logs"]
    if estimator == "sama":  # curvature at the solution
        assert not torch.allclose(found, engine(hooked(), estimator, steps).hypergradient("factors")["logs"], rtol=0.1)
    else:
        torch.testing.assert_close(found, derivative(make, steps), rtol=1e-6, atol=1e-10)


def test_several_hooks_run_in_turn_and_before_clipping():
    make = hooked(HOOKS["clamp"], HOOKS["not symmetric"], HOOKS["scale"])
    made = engine(make, "unrolled", clip_norm=0.05)
    torch.testing.assert_close(made.hypergradient("factors")["logs"], derivative(make, clip=0.05), rtol=1e-8, atol=0)
    made.run(2)
    data = batches(3)
    expected = trained(make, Factors().logs.detach(), [*data, *data], clip=0.05)
    torch.testing.assert_close([*made.problems["model"].module.parameters()], [*expected.parameters()])


@pytest.mark.parametrize("estimator", ["one_step", "unrolled", "darts"])
@pytest.mark.parametrize("hook", ["mask in place", "clamp", "not symmetric"])
def test_real_rounds_are_those_of_a_plain_loop(hook, estimator):
    make, data = hooked(HOOKS[hook], optimizer="Adam"), batches(3)
    made = engine(make, estimator)
    made.run(2)
    expected = trained(make, Factors().logs.detach(), [*data, *data])
    torch.testing.assert_close([*made.problems["model"].module.parameters()], [*expected.parameters()])


def test_a_hook_does_not_run_on_the_cotangent_of_what_is_read():
    """The gradient of an upper loss in lower variables is no gradient of a step."""
    seen = []
    made = engine(hooked(lambda g: seen.append(g) or g), "one_step", steps=1)
    assert len(seen) == 3, "with any gradient, to see whether it repeats itself, and can be differentiated"
    seen.clear()
    made.step()
    module = linear()
    trained(lambda: (module, torch.optim.SGD(module.parameters(), 0.0)), Factors().logs.detach(), batches(1))
    for gradient in seen:
        torch.testing.assert_close(gradient.detach(), module.weight.grad)
    assert seen


def test_a_hook_of_an_upper_parameter_sees_its_whole_hypergradient():
    made = engine(hooked(), "one_step", steps=1, top_rate=1.0)
    logs, seen = made.problems["factors"].module.logs, []
    before = logs.detach().clone()
    logs.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    expected = engine(hooked(), "one_step", steps=1).hypergradient("factors")["logs"]
    made.step()
    torch.testing.assert_close(seen, [expected])
    torch.testing.assert_close(logs.detach(), before - 2 * expected)


def test_hooks_of_a_middle_level_are_differentiated_with_its_inner_path():
    def made() -> mlo.Engine:
        torch.manual_seed(0)
        modules = [nn.Linear(3, 2).double() for _ in range(3)]
        data = [torch.randn(4, 3, dtype=torch.float64)]

        for module in modules[:2]:
            module.weight.register_hook(lambda g: g.clamp(-0.05, 0.05) @ MIX[:3, :3])
        problems = [
            cls(cls.__name__.lower(), module=m, optimizer=torch.optim.SGD(m.parameters(), lr=0.5), data=data, steps=2)
            for cls, m in zip((Low, Middle, Top), modules, strict=True)
        ]
        return mlo.Engine(problems, "unrolled", inner_path=True, device="cpu")

    mlo.check(made(), "top")


def test_a_hook_that_is_added_or_removed_later_counts():
    made = engine(hooked(), "unrolled")
    plain = made.hypergradient("factors")["logs"]
    handle = made.problems["model"].module.weight.register_hook(HOOKS["mask"])
    masked = made.hypergradient("factors")["logs"]
    torch.testing.assert_close(masked, derivative(hooked(HOOKS["mask"])), rtol=1e-8, atol=1e-10)
    handle.remove()
    assert torch.equal(made.hypergradient("factors")["logs"], plain)


def under_no_grad(g: Tensor) -> Tensor:
    with torch.no_grad():
        return g * MASK


def by_data(g: Tensor) -> None:
    g.data.clamp_(-0.1, 0.1)


REFUSED = {
    "under no_grad": under_no_grad,
    "by data": by_data,
    "detached": lambda g: g.detach() * MASK,
    "partly detached": lambda g: g / g.norm().detach(),
    "by NumPy": lambda g: torch.from_numpy(g.detach().numpy() * 0.5),
    "by NumPy in part": lambda g: g + torch.from_numpy(g.detach().numpy() * 0.5),
    "by a NumPy function": lambda g: torch.from_numpy(np.clip(np.asarray(g.detach()), -0.1, 0.1)),
    "by a list": lambda g: torch.tensor(g.tolist()) * 0.5,
    "by a number of a list": lambda g: g * g.tolist()[0][0],
    "by DLPack": lambda g: torch.from_numpy(np.from_dlpack(g.detach()) * 0.5),
    "by a number": lambda g: g * min(1.0, 0.1 / g.norm().item()),
}


@pytest.mark.parametrize("hook", REFUSED)
def test_a_hook_without_a_graph_is_refused_when_the_engine_is_made(hook):
    with pytest.raises(mlo.ConfigError, match=r"'model': a hook on its parameter 'weight' .*line \d+ of test_hooks.py"):
        engine(hooked(REFUSED[hook]), "one_step")
    made = engine(hooked(), "one_step")
    made.problems["model"].module.weight.register_hook(REFUSED[hook])
    for call in (made.step, lambda: made.hypergradient("factors")):
        with pytest.raises(mlo.ConfigError, match="'model': a hook on its parameter 'weight'"):
            call()


def counting():
    calls = []
    return lambda module: module.weight.register_hook(lambda g: calls.append(0) or g / len(calls))


ELSEWHERE = torch.ones((), dtype=torch.float64, requires_grad=True)
NOT_OF_THE_GRADIENT = {
    "a count": (counting(), "another gradient the second time"),
    "a decay": (lambda m: m.weight.register_hook(lambda g: g + 0.1 * m.weight), "reads the parameter 'weight' itself"),
    "a decay by data": (lambda m: m.weight.register_hook(lambda g: g + 0.1 * m.weight.data), "reads .*'weight'"),
    "another parameter": (
        lambda m: m.weight.register_hook(lambda g: g * ELSEWHERE),
        "depends on a tensor that requires",
    ),
}


@pytest.mark.parametrize("name", NOT_OF_THE_GRADIENT)
@pytest.mark.parametrize("estimator", ["one_step", "unrolled", "darts"])
def test_a_hook_that_is_no_function_of_the_gradient_is_refused(name, estimator):
    register, what = NOT_OF_THE_GRADIENT[name]
    module = linear()
    register(module)
    before = values(module.parameters())
    with pytest.raises(mlo.ConfigError, match=f"'model': a hook on its parameter 'weight' .*{what}"):
        engine(lambda: (module, torch.optim.SGD(module.parameters(), 0.1)), estimator)
    assert all(map(torch.equal, module.parameters(), before))


def test_a_hook_may_draw_random_numbers():
    engine(hooked(lambda g: g + torch.randn_like(g)), "one_step").step()


@pytest.mark.parametrize("estimator", ["cg", "neumann", "nystrom", "penalty"])
def test_estimators_at_a_minimum_refuse_hooks(estimator):
    with pytest.raises(mlo.ConfigError, match=r"'model': its parameter 'weight' has a hook .*'unrolled'"):
        engine(hooked(HOOKS["mask"]), estimator)
    made = engine(hooked(), estimator)
    made.step()
    made.problems["model"].module.weight.register_hook(HOOKS["mask"])
    before = values(made.problems["model"].module.parameters())
    with pytest.raises(mlo.ConfigError, match="has a hook"):
        made.step()
    assert all(map(torch.equal, made.problems["model"].module.parameters(), before))


def test_a_hook_that_returns_another_shape_is_reported():
    with pytest.raises(mlo.ConfigError, match=r"of shape \(1, 4\), returns a gradient of shape \(1, 1\)"):
        engine(hooked(lambda g: g.sum(1, keepdim=True)), "one_step")


def test_hooks_with_accumulated_batches_are_refused():
    with pytest.raises(mlo.ConfigError, match=r"'model': hooks on its parameters .*accumulate=1"):
        engine(hooked(HOOKS["mask"]), "one_step", accumulate=2)


class Sum(mlo.Problem):
    def loss(self, batch):
        return (self.params["one"] + self.params["other"] - batch).square().sum()


def test_hooks_after_accumulation_have_gradients_of_their_own():
    """As in torch: the gradient of a sum is one tensor for all its terms, and a hook may write into ``.grad``."""
    module = nn.ParameterDict({name: nn.Parameter(torch.zeros(2)) for name in ("one", "other", "unused")})
    module["one"].register_post_accumulate_grad_hook(lambda parameter: parameter.grad.zero_())
    module["unused"].register_post_accumulate_grad_hook(lambda parameter: pytest.fail("it has no gradient"))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    mlo.Engine(Sum("sum", module=module, optimizer=optimizer, data=[torch.ones(2)]), device="cpu").step()
    assert {name: parameter.tolist() for name, parameter in module.items()} == {
        "one": [0, 0],
        "other": [1, 1],
        "unused": [0, 0],
    }


def test_pruned_weights_are_exact():
    def make():
        module = linear()
        prune.custom_from_mask(module, "weight", MASK)
        return module, torch.optim.Adam(module.parameters(), lr=0.1)

    class Fit(mlo.Problem):
        def loss(self, batch, factors):
            return factors()[0] * (self(batch[0]) - batch[1]).square().mean() + factors()[1] * self.module.weight.sum()

    class Judge(mlo.Problem):
        def loss(self, batch, model):
            return (model(batch[0]) - batch[1]).square().mean()

    module, optimizer = make()
    top, data = Factors(), batches(2)
    made = mlo.Engine(
        [
            Fit("model", module=module, optimizer=optimizer, data=data, steps=2),
            Judge("factors", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.0), data=data),
        ],
        "unrolled",
        device="cpu",
    )
    mlo.check(made)
    made.step()
    module, optimizer = make()
    for x, y in data:
        optimizer.zero_grad()
        output = module(x)
        factors = top().detach()
        (factors[0] * (output - y).square().mean() + factors[1] * module.weight.sum()).backward()
        optimizer.step()
    torch.testing.assert_close([*made.problems["model"].module.parameters()], [*module.parameters()])
