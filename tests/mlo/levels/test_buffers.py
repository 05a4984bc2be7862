"""Buffers that forward sets: virtual steps leave them unchanged, real steps update them, other changes are errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from analytic import Point
from torch import Tensor, nn

import mlo
from mlo.ops.tf32 import Tf32
from mlo.steps.level import levels_of
from mlo.steps.losses import loss_of

pytestmark = pytest.mark.usefixtures("float64")


class Setting(nn.Module):
    """Multiplies its value by what a buffer holds, which each call sets in one way or another."""

    def __init__(self, setting: Callable[[Setting], None], **calls: Tensor | None) -> None:
        super().__init__()
        self.setting, self.value = setting, nn.Parameter(torch.tensor([0.3, -0.2]))
        for name, buffer in calls.items():
            self.register_buffer(name, buffer)

    def forward(self) -> Tensor:
        self.setting(self)
        return self.value * (2 if self.calls is None else self.calls.sum())


class Inside(nn.Module):
    """A module in a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self) -> Tensor:
        return self.inner()


class Low(mlo.Problem):
    def loss(self, batch, top):
        return (self() - top()).square().sum()


class Top(mlo.Problem):
    def loss(self, batch, low):
        return (low() * self()).square().sum()


def engine(low: nn.Module | None = None, top: nn.Module | None = None, **options: object) -> mlo.Engine:
    modules = low or Point(torch.tensor([0.3, -0.2])), top or Point(torch.tensor([0.7, 0.4]))
    stack = [
        cls(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), steps=steps)
        for cls, name, module, steps in ((Low, "low", modules[0], 3), (Top, "top", modules[1], 1))
    ]
    return mlo.Engine(stack, "unrolled", device="cpu", **options)


def count(module: Setting) -> None:
    module.calls = torch.ones(1) if module.calls is None else module.calls + 1


def register(module: Setting) -> None:
    if not hasattr(module, "calls"):
        module.register_buffer("calls", torch.zeros(1), persistent=False)
    module.calls += 1


def forget(module: Setting) -> None:
    module.calls = None


def delete(module: Setting) -> None:
    del module.calls
    module.__dict__["calls"] = None


def grow(module: Setting) -> None:
    module.calls = torch.cat([module.calls, torch.ones(1)])


def fail(module: Setting) -> None:
    count(module)
    raise ZeroDivisionError


CALLS = {
    "hypergradient": lambda made: made.hypergradient("top"),
    "objective": lambda made: made.objective("top"),
    "check": mlo.check,
    "step": lambda made: made.step(),
}
FILLED = "forward sets the buffer 'inner.calls' of its module, which held no tensor when the problem was made"


def contents(module: nn.Module) -> list[object]:
    """The values of all parameters, and every part's buffers."""
    found = [[*part._parameters.items(), *part._buffers.items()] for part in module.modules()]
    return [[(name, tensor if tensor is None else tensor.tolist()) for name, tensor in part] for part in found]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["low", "top"])
@pytest.mark.parametrize(("setting", "buffers"), [(count, {"calls": None}), (register, {})], ids=["None", "no"])
def test_a_buffer_that_forward_fills_is_reported_and_left_empty(setting, buffers, name, call):
    module = Inside(Setting(setting, **buffers))
    made, before = engine(**{name: module}), contents(module)
    with pytest.raises(mlo.GraphError, match=f"problem '{name}': {FILLED}.*or call the module once before"):
        CALLS[call](made)
    assert contents(module) == before


@pytest.mark.parametrize("setting", [count, register])
def test_a_filled_buffer_is_changed_by_real_steps_only(setting):
    module = Inside(Setting(setting, **({"calls": None} if setting is count else {})))
    module()
    made = engine(module)
    for _ in range(2):
        before = contents(module)
        made.hypergradient("top")
        made.objective("top")
        assert contents(module) == before
        made.step()
    assert module.inner.calls == 7
    mlo.check(made)


def test_a_buffer_that_a_call_between_has_filled_is_reported():
    module = Inside(Setting(count, calls=None))
    made = engine(module)
    made.problems["low"]()
    with pytest.raises(mlo.GraphError, match=FILLED):
        made.step()
    assert module.inner.calls == 1


def test_an_error_of_forward_comes_through_and_leaves_the_buffer_empty():
    module = Inside(Setting(fail, calls=None))
    with pytest.raises(ZeroDivisionError):
        engine(module).step()
    assert module.inner.calls is None


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (forget, "sets .* 'inner.calls', .* to None"),
        (delete, "sets .* 'inner.calls', .* to None"),
        (grow, r"sets .*, of shape \(1,\), to a .* shape \(2,\)"),
    ],
)
def test_a_buffer_that_forward_empties_or_reshapes_is_reported_before_anything_moves(setting, message, call):
    module = Inside(Setting(setting, calls=torch.ones(1)))
    made, before = engine(module), contents(module)
    with pytest.raises(mlo.GraphError, match=f"problem 'low': forward {message}"):
        CALLS[call](made)
    assert contents(module) == before


def test_a_buffer_computed_from_a_parameter_keeps_no_graph():
    def follow(module: Setting) -> None:
        module.calls = 1 + module.value.square().sum().reshape(1)

    made = engine(Setting(follow, calls=torch.ones(1)))
    made.hypergradient("top")
    made.step()
    states = {name: problem.live_state() for name, problem in made.problems.items()}
    level = levels_of([*made.problems.values()], made.device, None, Tf32())["low"]
    _, (calls,), _ = loss_of(level, states, None, ("top",))
    assert not calls.requires_grad
    assert not made.problems["low"].module.calls.requires_grad


class Remembering(nn.Module):
    """Adds its last output, which it keeps in a buffer, to the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.register_buffer("last", torch.tensor([1.0, 2.0]))

    def forward(self) -> Tensor:
        self.last = (2 * self.value + self.last).sin()
        return self.last


class Twice(mlo.Problem):
    def loss(self, batch, top):
        self()
        return (self() * top()).sum()


def test_a_second_call_is_differentiated_through_what_the_first_one_kept():
    low, top = Remembering(), Point(torch.tensor([0.7, 0.4]))
    problem = Twice("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=0.1))
    made = mlo.Engine(
        [problem, Top("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.0))], "one_step", device="cpu"
    )
    for _ in range(2):
        value, last, weight = low.value.detach().clone().requires_grad_(), low.last.clone(), top.value.detach()
        for _ in range(2):
            last = (2 * value + last).sin()
        (gradient,) = torch.autograd.grad((last * weight).sum(), value)
        made.step()
        torch.testing.assert_close(low.value.detach(), (value - 0.1 * gradient).detach())
        torch.testing.assert_close(low.last, last.detach())


class Tied(nn.Module):
    """Counts its calls in a buffer that it has under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.constant = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("calls", torch.ones(2))
        self.register_buffer("same", self.calls)

    def forward(self) -> Tensor:
        self.calls.add_(1)
        return self.value * self.same


def test_a_tied_buffer_stays_tied():
    made = engine(low=Tied())
    low = made.problems["low"].module
    value, momentum, weight = low.value.detach().clone(), torch.zeros(2), made.problems["top"].module.value.detach()
    expected = []
    for calls in range(2, 5):
        momentum = 0.9 * momentum + 2 * calls * (calls * value - weight)
        value = value - 0.1 * momentum
        expected.append(value)
    made.step()
    torch.testing.assert_close(low.value.detach(), expected[-1])
    assert low.same is low.calls
    assert low.calls.tolist() == [4.0, 4.0]


class Alone(mlo.Problem):
    def loss(self, batch):
        return self().square().sum()


class Held(mlo.Problem):
    def loss(self, batch, top, other):
        assert not other().requires_grad
        return (self() - top() * other()).square().sum()


def test_what_is_held_has_no_graph():
    problems = []
    for cls, name, options in ((Alone, "other", {}), (Held, "low", {"held": "other"}), (Top, "top", {})):
        module = Point(torch.tensor([0.7, 0.4]))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        problems.append(cls(name, module=module, optimizer=optimizer, **options))
    made = mlo.Engine(problems, "one_step", lookahead=False, device="cpu")
    made.run(2)
    made.hypergradient("top")
