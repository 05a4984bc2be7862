"""One-step estimators against brute force: a hand-written optimizer step with its graph, on a small LBT."""

from __future__ import annotations

import pytest
import torch
from brute_force import OPTIMIZERS, brute_force, small_lbt
from torch import nn
from two_levels import Following, Judging

import mlo
from mlo.hypergradient import Exact
from mlo.training.diagnostics import _PeakMemory

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("rounds", [0, 3], ids=["first step", "with optimizer state"])
@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_agrees_with_brute_force(optimizer, lookahead, rounds, device):
    stack = small_lbt(optimizer)
    engine = mlo.Engine(stack, "one_step", lookahead=lookahead, device=device)
    engine.run(rounds)
    expected = brute_force(stack)
    torch.testing.assert_close(engine.hypergradient("arch")["weights"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lookahead", [False, True])
def test_the_step_that_the_top_takes_is_along_that_hypergradient(lookahead):
    """Recorded real steps (no lookahead) and virtual ones give the same: Adam's first moment shows the gradient."""
    stack = small_lbt("momentum")
    engine = mlo.Engine(stack, "one_step", lookahead=lookahead, device="cpu")
    for _ in range(3):
        expected = brute_force(stack)
        before = stack[2].optimizer.state[stack[2].module.weights].get("exp_avg", torch.zeros(2)).clone()
        engine.step()
        taken = (stack[2].optimizer.state[stack[2].module.weights]["exp_avg"] - 0.9 * before) / 0.1
        torch.testing.assert_close(taken, expected, rtol=1e-10, atol=1e-12)


def test_clipping_is_part_of_the_step():
    stack = small_lbt("momentum", clip_norm=0.05)
    engine = mlo.Engine(stack, "one_step", device="cpu")
    engine.run(2)
    expected = brute_force(stack)
    torch.testing.assert_close(engine.hypergradient("arch")["weights"], expected, rtol=1e-10, atol=1e-12)
    stack[0].clip_norm = stack[1].clip_norm = None
    assert (expected - brute_force(stack)).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("product", [{"kind": "central", "radius": r} for r in (1e-1, 1e-3)], ids=str)
def test_central_difference_converges_to_the_exact_product(product):
    stack = small_lbt("momentum")
    engine = mlo.Engine(stack, {"kind": "one_step", "product": product}, device="cpu")
    engine.run(2)
    expected = brute_force(stack)
    error = (engine.hypergradient("arch")["weights"] - expected).norm() / expected.norm()
    assert error < product["radius"] ** 2


def test_darts_is_one_step_by_central_difference_with_lookahead():
    stack = small_lbt("momentum")
    darts = mlo.Engine(stack, {"kind": "darts", "radius": 0.02}, device="cpu")
    found = darts.hypergradient("arch")["weights"]
    same = mlo.Engine(stack, {"kind": "one_step", "product": {"kind": "central", "radius": 0.02}}, device="cpu")
    assert torch.equal(found, same.hypergradient("arch")["weights"])
    assert darts.report().lookahead
    assert not same.report().lookahead


def test_a_scheduled_learning_rate_is_the_one_of_the_step():
    """The scheduler has moved on by the time the step is differentiated."""
    stack = small_lbt("sgd")
    for problem in stack[:2]:
        problem.scheduler = torch.optim.lr_scheduler.StepLR(problem.optimizer, step_size=1, gamma=0.1)
    engine = mlo.Engine(stack, "one_step", lookahead=False, device="cpu")
    expected = brute_force(stack)
    engine.step()
    taken = stack[2].optimizer.state[stack[2].module.weights]["exp_avg"] / 0.1
    torch.testing.assert_close(taken, expected, rtol=1e-10, atol=1e-12)


def test_a_gradient_of_exactly_zero_under_adam_gives_no_nan():
    """Autograd takes the derivative of Adam's root at zero as infinity times zero."""
    stack = small_lbt("adam")
    with torch.no_grad():
        stack[0].module.head.weight[:, 0] = 0.0
        stack[0].module.one.weight[0] = 0.0
        stack[0].module.two.weight[0] = 0.0
        stack[0].module.two.bias[0] = 0.0
        stack[0].module.one.bias[0] = 0.0
    found = mlo.Engine(stack, "one_step", device="cpu").hypergradient("arch")["weights"]
    assert found.isfinite().all()


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 4.5), ("momentum", 5.5), ("adamw", 8.0)])
def test_a_round_takes_few_copies_of_the_parameters(optimizer, copies):
    """Including what the optimizer's step touches: the parameters, and for AdamW two moments."""
    torch.manual_seed(0)
    module, weights, rows = (
        nn.Sequential(*(nn.Linear(256, 256) for _ in range(12))),
        nn.Linear(256, 256),
        torch.ones(2, 256),
    )
    make, options = OPTIMIZERS.get(optimizer, (torch.optim.AdamW, {"lr": 0.01}))
    low = Following("low", module=module, optimizer=make(module.parameters(), **options), data=[rows])
    top = Judging("top", module=weights, optimizer=torch.optim.SGD(weights.parameters(), lr=0.1), data=[rows])
    engine = mlo.Engine([low, top], "one_step", device="cpu")
    engine.run(2)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    with _PeakMemory() as memory:
        engine.step()
    assert memory.peak < copies * size


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("estimator", ["one_step", "unrolled", "cg"])
def test_frozen_parameters_are_not_copied(estimator, lookahead):
    """As the backbone under an adapter; both the lower and the upper level have one."""
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(256, 256).requires_grad_(False), nn.Linear(256, 2)) for _ in range(2)]
    rows, problems = torch.ones(2, 256), []
    for cls, name, module in zip((Following, Judging), ("low", "top"), modules, strict=True):
        optimizer = torch.optim.SGD(module[1].parameters(), lr=0.1)
        problems.append(cls(name, module=module, optimizer=optimizer, data=[rows]))
    problems[0].steps = 3
    engine = mlo.Engine(problems, estimator, lookahead=lookahead, device="cpu")
    engine.run(2)
    with _PeakMemory() as memory:
        engine.step()
    frozen = modules[0][0].weight
    assert memory.peak < 2.5 * frozen.numel() * frozen.element_size(), "the two that exist are counted"


class Careless(mlo.Estimator):
    """Asks for nothing, and gives something else than a Pulled."""

    uses_before: bool = False

    def pull(self, steps, cotangent, targets, warm):
        if self.uses_before:
            Exact().before(steps[-1], targets)
        return dict.fromkeys(targets, cotangent)


def test_what_an_own_estimator_forgets_is_said():
    stack = small_lbt("sgd")
    with pytest.raises(mlo.ConfigError, match=r"'student': pull of Careless returned a dict; return mlo.Pulled"):
        mlo.Engine(stack, Careless(), device="cpu").hypergradient("arch")
    with pytest.raises(mlo.ConfigError, match=r"'student': product.before needs .* mlo.Recording\(before=True\)"):
        mlo.Engine(stack, Careless(uses_before=True), device="cpu").hypergradient("arch")
