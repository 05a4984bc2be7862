"""Steps of torch.optim optimizers as functions: like the real step, and pulled back as finite differences say."""

from __future__ import annotations

import pytest
import torch
from named_steps import moved_to, optimizer_state, pull, recast, step
from torch import Tensor, nn

import mlo
from mlo.ops.vectors import dot

COUNTERS = {"step", "mu_product", "eta", "mu"}  # what the number of steps alone moves
DIFFERENTIABLE = {
    "SGD": {"lr": 0.1},
    "SGD momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "SGD dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
    "SGD nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 0.1, "weight_decay": 0.1},
    "Adam amsgrad": {"lr": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.1},
    "NAdam": {"lr": 0.1},
    "RAdam": {"lr": 0.1},
    "Adamax": {"lr": 0.1},
    "Adagrad": {"lr": 0.1},
    "Adadelta": {"lr": 1.0},
    "RMSprop": {"lr": 0.1, "momentum": 0.5, "centered": True},
    "ASGD": {"lr": 0.1},
    "Rprop": {"lr": 0.1},
}


class Plain(mlo.Problem):
    def loss(self, batch):
        return self(batch).square().mean()


def problem(name: str, steps: int, **options: object) -> mlo.Problem:
    torch.manual_seed(1)
    module = nn.Linear(3, 2).double()
    optimizer = getattr(torch.optim, name.split()[0])(module.parameters(), **options)
    for _ in range(steps):
        module(torch.randn(4, 3, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return Plain("plain", module=module, optimizer=optimizer)


def some(like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.randn_like(value) for name, value in like.items()}


@pytest.mark.parametrize("steps", [0, 7], ids=["first step", "with state"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_pullback_is_the_transposed_jacobian(name, steps):
    made = problem(name, steps, **DIFFERENTIABLE[name])
    parameters = {n: p.detach().clone() for n, p in made.variables.items()}
    gradients, direction, at = some(parameters), some(parameters), optimizer_state(made)
    cotangent = tuple(some(parameters).values())
    small = 1e-6

    def along(sign: float) -> tuple[Tensor, ...]:
        moved = {n: g + sign * small * direction[n] for n, g in gradients.items()}
        return tuple(p.detach() for p in step(made, parameters, moved, at)[0].values())

    forward = [(a - b) / (2 * small) for a, b in zip(along(1), along(-1), strict=True)]
    pulled = pull(made, parameters, gradients, at, cotangent).gradient
    expected = dot(tuple(forward), cotangent)
    torch.testing.assert_close(dot(pulled, tuple(direction.values())), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("steps", [0, 7], ids=["first step", "with state"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_step_is_differentiated_in_double_whatever_its_counters(name, steps, request):
    """Torch keeps them in the default precision, single here; 1 - beta^step and the like must not lose digits by it."""
    made = problem(name, steps, **DIFFERENTIABLE[name])
    parameters = {n: p.detach().clone() for n, p in made.variables.items()}
    gradients, cotangent, at = some(parameters), tuple(some(parameters).values()), optimizer_state(made)
    through = {n: {"exp_avg": torch.ones_like(p)} for n, p in parameters.items()} if "Adam" in name else {}

    def pulled() -> tuple[Tensor, ...]:
        done = pull(made, parameters, gradients, at, cotangent, through)
        assert all(COUNTERS.isdisjoint(slots) for slots in done.slots.values()), "they depend on no variable"
        return (*done.gradient, *done.parameters, *(slot for slots in done.slots.values() for slot in slots.values()))

    found = pulled()
    for slots in at.slots.values():
        slots.update({key: slots[key].double() for key in COUNTERS & slots.keys()})
    request.getfixturevalue("float64")
    torch.testing.assert_close(found, pulled(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", ["Adam", "NAdam", "ASGD"])
def test_counters_keep_their_precision_and_device(name):
    """When a problem is evaluated in another precision, and when states are stored on another device."""
    at = optimizer_state(problem(name, 3, **DIFFERENTIABLE[name]))
    for other, changed in (
        (recast(at, torch.bfloat16), lambda value: value.dtype == torch.bfloat16),
        (moved_to(at, torch.device("meta")), lambda value: value.is_meta),
    ):
        for variable, slots in other.slots.items():
            for key, value in slots.items():
                same = value is at.slots[variable][key]
                assert same if key in COUNTERS else changed(value), key


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "Adafactor"])
def test_a_virtual_step_is_the_real_one_and_changes_nothing(name, steps):
    made = problem(name, steps, **DIFFERENTIABLE.get(name, {}))
    before = {n: p.detach().clone() for n, p in made.variables.items()}
    state = {
        k: {n: torch.as_tensor(v).clone() for n, v in s.items() if v is not None}
        for k, s in made.optimizer.state.items()
    }
    gradients = some(before)
    moved, after = step(made, made.variables, gradients, optimizer_state(made))
    for n, p in made.variables.items():
        assert torch.equal(p, before[n])
        assert p.grad is None
    for k, slots in made.optimizer.state.items():
        assert all(torch.equal(torch.as_tensor(v), state[k][n]) for n, v in slots.items() if v is not None)
    for n, p in made.variables.items():
        p.grad = gradients[n]
    made.optimizer.step()
    for n, p in made.variables.items():
        assert torch.equal(p, moved[n])
        for key, value in made.optimizer.state[p].items():
            if value is not None:
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(after.slots[n][key])), key


def test_parameter_groups_keep_their_own_rates():
    module = nn.Linear(3, 2).double()
    optimizer = torch.optim.SGD([{"params": [module.weight], "lr": 1.0}, {"params": [module.bias], "lr": 0.1}], lr=9.0)
    made = Plain("plain", module=module, optimizer=optimizer)
    ones = {n: torch.ones_like(p) for n, p in made.variables.items()}
    pulled = pull(made, made.variables, ones, optimizer_state(made), tuple(ones.values())).gradient
    assert torch.equal(pulled[0], -ones["weight"])
    assert torch.equal(pulled[1], -0.1 * ones["bias"])


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_a_parameter_without_a_gradient_passes_nothing_on(name):
    made = problem(name, 2, lr=0.1)
    ones = {n: torch.ones_like(p) for n, p in made.variables.items()}
    pulled = pull(made, made.variables, {**ones, "bias": None}, optimizer_state(made), tuple(ones.values())).gradient
    assert torch.equal(pulled[1], torch.zeros_like(pulled[1]))
    assert pulled[0].abs().sum() > 0


def test_an_optimizer_without_a_differentiable_step_is_refused_before_training():
    class Low(mlo.Problem):
        def loss(self, batch, top):
            return (self(batch) - top(batch)).square().mean()

    class Top(mlo.Problem):
        def loss(self, batch, low):
            return low(batch).square().mean()

    data = [torch.randn(4, 3)]
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    low = Low("low", module=one, optimizer=torch.optim.Adafactor(one.parameters()), data=data)
    top = Top("top", module=two, optimizer=torch.optim.SGD(two.parameters(), lr=0.1), data=data)
    with pytest.raises(mlo.ConfigError, match=r"'low': a step of Adafactor cannot be differentiated.*'cg'"):
        mlo.Engine([low, top], "one_step", device="cpu")
    mlo.Engine([low, top], "cg", device="cpu").run(2)


def test_a_subclass_of_sgd_with_a_step_of_its_own_is_run():
    class Halved(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad = parameter.grad / 2
            return super().step(closure)

    module = nn.Linear(3, 2).double()
    made = Plain("plain", module=module, optimizer=Halved(module.parameters(), lr=1.0))
    ones = {n: torch.ones_like(p) for n, p in made.variables.items()}
    moved = step(made, made.variables, ones, optimizer_state(made))[0]
    torch.testing.assert_close(moved["bias"], module.bias - 0.5)
    pulled = pull(made, made.variables, ones, optimizer_state(made), tuple(ones.values())).gradient
    torch.testing.assert_close(pulled[1], -0.5 * ones["bias"])


def test_the_default_dtype_is_as_before():
    made = problem("Adam", 0, lr=0.1)
    ones = {n: torch.ones_like(p) for n, p in made.variables.items()}
    pull(made, made.variables, ones, optimizer_state(made), tuple(ones.values()), {})
    assert torch.get_default_dtype() == torch.float32


class Precisions(nn.Module):
    """Parameters of two dtypes, among them a scalar and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.randn(3, 2))
        self.high = nn.Parameter(torch.randn(2, dtype=torch.float64))
        self.scalar, self.empty = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.low.dtype) @ self.low).double() @ self.high * self.scalar + self.empty.sum()


class Factor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(0.5))

    def forward(self) -> Tensor:
        return self.log.exp()


class Fit(mlo.Problem):
    def loss(self, batch, scale):
        return (self(batch) - 1).square().mean() + scale() * self.params["scalar"].square()


class Scale(mlo.Problem):
    def loss(self, batch, fit):
        return fit(batch).square().mean()


@pytest.mark.parametrize("kind", ["one_step", "unrolled", "darts", "sama", "cg", "neumann", "penalty"])
def test_parameters_of_several_dtypes_keep_theirs(kind):
    torch.manual_seed(0)
    data, module, scale = [torch.randn(5, 3, dtype=torch.float64)], Precisions(), Factor()
    fit = torch.optim.Adam(module.parameters(), lr=0.01)
    problems = [
        Fit("fit", module=module, optimizer=fit, data=data, steps=2, clip_norm=0.5),
        Scale("scale", module=scale, optimizer=torch.optim.SGD(scale.parameters(), lr=0.1), data=data, clip_norm=0.1),
    ]
    engine = mlo.Engine(problems, kind, device="cpu")
    engine.run(2)
    assert [p.dtype for p in module.parameters()] == [torch.float32, torch.float64, torch.float32, torch.float32]
    found, exact = (engine.hypergradient("scale", dtype) for dtype in (None, torch.float64))
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-7, check_dtype=False)
