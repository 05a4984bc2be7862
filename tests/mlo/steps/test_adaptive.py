"""Adaptive optimizers as formulas: torch's own bits, and the transpose that autograd finds of torch's own step."""

from __future__ import annotations

import inspect

import pytest
import torch
from named_steps import optimizer_state, pull, step
from torch import Tensor, nn

import mlo
from mlo.steps.adaptive import formula_of
from mlo.steps.clipping import clip, transpose_clip

OPTIONS = [
    ("Adam", {"lr": 0.1}),
    ("Adam", {"lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.95)}),
    ("Adam", {"lr": 0.1, "amsgrad": True, "maximize": True, "weight_decay": 0.2}),
    ("AdamW", {"lr": 0.1, "weight_decay": 0.2}),
    ("AdamW", {"lr": 0.1, "weight_decay": 0.2, "amsgrad": True, "maximize": True, "eps": 0.1}),
    ("RMSprop", {"lr": 0.1, "weight_decay": 0.2}),
    ("RMSprop", {"lr": 0.1, "centered": True, "maximize": True}),
    ("RMSprop", {"lr": 0.1, "centered": True, "momentum": 0.7, "weight_decay": 0.2, "alpha": 0.8}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.2}),
    ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5, "maximize": True, "eps": 0.1}),
]
IDS = [f"{name}-{'-'.join(options)}" for name, options in OPTIONS]


class Plain(mlo.Problem):
    def loss(self, batch):
        return self(batch).square().mean()


def problem(name: str, options: dict, taken: tuple[int, int], dtype: torch.dtype = torch.float64) -> mlo.Problem:
    """A problem whose optimizer has taken so many steps with both parameters, and so many more with the first alone."""
    torch.manual_seed(1)
    module = nn.Linear(3, 2).to(dtype)
    optimizer = getattr(torch.optim, name)(module.parameters(), **options)
    for number in range(sum(taken)):
        module.weight.grad = torch.randn_like(module.weight)
        module.bias.grad = torch.randn_like(module.bias) if number < taken[0] else None
        optimizer.step()
    optimizer.zero_grad()
    return Plain("plain", module=module, optimizer=optimizer)


def torchs(made: mlo.Problem, parameters: dict, gradients: dict, slots: dict) -> tuple[list[Tensor], dict]:
    """The step by a new optimizer of the same class, with ``differentiable=True``: its graph is torch's own."""
    group = made.optimizer.param_groups[0]
    allowed = inspect.signature(type(made.optimizer)).parameters
    options = {k: group[k] for k in allowed if k in group and k not in ("params", "foreach", "fused", "capturable")}
    moved = {name: parameter.clone() for name, parameter in parameters.items()}
    optimizer = type(made.optimizer)([*moved.values()], **options | {"differentiable": True})
    for name, tensor in moved.items():
        tensor.grad = gradients[name]
        if name in slots:
            optimizer.state[tensor] = {key: value.clone() for key, value in slots[name].items()}
            optimizer.state[tensor]["step"] = slots[name]["step"].to(torch.float64, copy=True)
    optimizer.step()
    return [*moved.values()], {name: optimizer.state[tensor] for name, tensor in moved.items()}


@pytest.mark.parametrize("taken", [(0, 0), (3, 0), (2, 2)], ids=["first step", "with state", "other counts"])
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=IDS)
def test_the_transpose_is_that_of_torchs_own_step(kind, options, taken, float64):
    made = problem(kind, options, taken)
    assert formula_of(made.optimizer, made.optimizer.param_groups) is not None
    at = optimizer_state(made)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in made.variables.items()}
    gradients = {n: torch.randn_like(p).requires_grad_() for n, p in parameters.items()}
    keys = {n: [k for k in slots if k != "step"] for n, slots in at.slots.items()}
    for name, slots in at.slots.items():
        slots.update({k: slots[k].requires_grad_() for k in keys[name]})
    moved, after = torchs(made, parameters, gradients, at.slots)
    cotangents = tuple(torch.randn_like(p) for p in moved)
    slots = {n: {k: torch.randn_like(v) for k, v in s.items() if k != "step"} for n, s in after.items()}
    ends = [*moved, *(after[n][k] for n in slots for k in slots[n])]
    given = [*cotangents, *(slots[n][k] for n in slots for k in slots[n])]
    begun = [at.slots[n][k] for n in keys for k in keys[n]]
    inputs = [*gradients.values(), *parameters.values(), *begun]
    wanted = torch.autograd.grad(ends, inputs, given)

    pulled = pull(made, parameters, gradients, at, cotangents, slots)
    found = [*pulled.gradient, *pulled.parameters, *(pulled.slots[n][k] for n in keys for k in keys[n])]
    torch.testing.assert_close(found, [*wanted], rtol=1e-10, atol=1e-12)
    assert not any(tensor.requires_grad for tensor in found)
    alone = pull(made, parameters, gradients, at, cotangents).gradient
    without = torch.autograd.grad(torchs(made, parameters, gradients, at.slots)[0], [*gradients.values()], cotangents)
    torch.testing.assert_close([*alone], [*without], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
def test_steps_are_torchs_to_the_bit(name, options, dtype):
    """Also where one parameter has taken fewer steps, and one has no gradient."""
    made = problem(name, options, (2, 2), dtype)
    for reached in (("weight", "bias"), ("weight",), ("bias",)):
        gradients = {n: torch.randn_like(p) if n in reached else None for n, p in made.variables.items()}
        moved, after = step(made, made.variables, gradients, optimizer_state(made))
        for n, p in made.variables.items():
            p.grad = gradients[n]
        made.optimizer.step()
        for n, p in made.variables.items():
            assert torch.equal(moved[n], p), n
            for key, value in made.optimizer.state[p].items():
                assert torch.equal(after.slots[n][key], value), (n, key)
                assert after.slots[n][key].dtype == value.dtype


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
def test_gradients_of_zero_pass_on_what_a_difference_finds(name, options):
    """Where the root is zero its derivative is infinite, and what it is multiplied with is zero."""
    options = {**options, "eps": 0.1, "weight_decay": 0.0}
    made = problem(name, options, (0, 0))
    parameters = {n: p.detach() for n, p in made.variables.items()}
    zeros = {n: torch.zeros_like(p) for n, p in parameters.items()}
    ones = tuple(torch.ones_like(p) for p in parameters.values())
    pulled = pull(made, parameters, zeros, optimizer_state(made), ones, {})
    small = 1e-7
    sides = [
        step(made, parameters, {n: z + s * small for n, z in zeros.items()}, optimizer_state(made))[0] for s in (1, -1)
    ]
    wanted = [(a - b).detach() / (2 * small) for a, b in zip(*(side.values() for side in sides), strict=True)]
    torch.testing.assert_close([*pulled.gradient], wanted, rtol=1e-5, atol=0)


def test_groups_of_several_precisions_and_gradients_whose_squares_are_rounded_to_zero():
    module = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float64, torch.float32)])
    for name in ("Adam", "AdamW", "RMSprop", "Adagrad"):
        made = Plain("plain", module=module, optimizer=getattr(torch.optim, name)(module.parameters(), lr=0.1, eps=0.1))
        for size in (0.0, 1e-25):
            gradients = {n: torch.full_like(p, size) for n, p in made.variables.items()}
            ones = tuple(torch.ones_like(p) for p in made.variables.values())
            found = pull(made, made.variables, gradients, optimizer_state(made), ones).gradient
            torch.testing.assert_close(found[1].double(), found[0], rtol=1e-6, atol=0)
            assert found[0].isfinite().all()
            assert found[0].all()


@pytest.mark.parametrize("kind", ["Adam", "RMSprop", "SGD"])
def test_clipping_is_part_of_the_transpose(kind):
    options = {"lr": 0.1} if kind == "Adam" else {"lr": 0.1, "momentum": 0.5}
    made = problem(kind, options, (2, 0))
    made.clip_norm, at = 0.3, optimizer_state(made)
    parameters = {n: p.detach() for n, p in made.variables.items()}
    gradients = {n: torch.randn_like(p) for n, p in parameters.items()}
    along = {n: torch.randn_like(p) for n, p in parameters.items()}
    cotangents = tuple(torch.randn_like(p) for p in parameters.values())
    small = 1e-6
    ends = [
        step(made, parameters, {n: g + s * small * along[n] for n, g in gradients.items()}, at)[0].values()
        for s in (1, -1)
    ]
    measured = sum(((a - b) * c).sum() for a, b, c in zip(*ends, cotangents, strict=True)).detach() / (2 * small)
    for slots in (None, {}):
        pulled = pull(made, parameters, gradients, at, cotangents, slots).gradient
        predicted = sum((g * d).sum() for g, d in zip(pulled, along.values(), strict=True))
        torch.testing.assert_close(predicted, measured, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("flag", ["capturable", "differentiable", "fused"])
def test_what_has_no_formula_runs_torchs_own_step(flag):
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters())
    assert formula_of(optimizer, optimizer.param_groups) is not None
    optimizer.param_groups[0][flag] = True
    assert formula_of(optimizer, optimizer.param_groups) is None
    for options in ({"lr": torch.tensor(0.1)}, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}):
        optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters(), **options, foreach=False)
        assert formula_of(optimizer, optimizer.param_groups) is None
    for option in ("weight_decay", "eps"):
        optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters())
        optimizer.param_groups[0][option] = torch.tensor(0.1)
        assert formula_of(optimizer, optimizer.param_groups) is None
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    assert formula_of(optimizer, optimizer.param_groups) is not None  # as of its real and imaginary parts

    class Mine(torch.optim.Adam):
        pass

    optimizer = Mine(nn.Linear(2, 2).parameters())
    assert formula_of(optimizer, optimizer.param_groups) is None


@pytest.mark.parametrize("largest", [0.3, 100.0, None])
def test_clipping_is_torchs_and_its_transpose_autograds(largest):
    torch.manual_seed(0)
    gradients = [torch.randn(*shape).double().requires_grad_() for shape in ((3, 2), (4,))]
    clipped = [*clip([*gradients, None], largest)]
    assert clipped.pop() is None
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.detach().clone()
    torch.nn.utils.clip_grad_norm_(parameters, largest or float("inf"))
    torch.testing.assert_close(clipped, [p.grad for p in parameters], rtol=0, atol=0)
    cotangents = [torch.randn_like(g) for g in gradients]
    wanted = torch.autograd.grad(clipped, gradients, cotangents)
    found = transpose_clip(gradients, largest, cotangents)
    torch.testing.assert_close([*found], [*wanted], rtol=1e-12, atol=1e-14)


def test_a_real_step_clips_as_torch_does_to_the_bit():
    class Alone(mlo.Problem):
        def loss(self, batch):
            return self(batch).square().mean()

    torch.manual_seed(0)
    own, twin = nn.Linear(30, 20), nn.Linear(30, 20)
    twin.load_state_dict(own.state_dict())
    data = [torch.randn(8, 30) for _ in range(20)]
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    problem = Alone("alone", module=own, optimizer=torch.optim.SGD(own.parameters(), lr=0.1), data=data, clip_norm=0.05)
    mlo.Engine(problem, device="cpu").run(20)
    for batch in data:
        plain.zero_grad()
        twin(batch).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        plain.step()
    assert torch.equal(own.weight, twin.weight)
