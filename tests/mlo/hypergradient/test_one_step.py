"""One-step responses against brute force: a hand-written optimizer step with its graph, on a small LBT."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import mlo
from problems.lbt import ArchValidate, StudentTeach, TeacherTrain

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.03, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.1}),
}


class MixedTeacher(nn.Module):
    """A small network mixed by architecture weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, images: Tensor, weights: Tensor) -> Tensor:
        mix = weights.softmax(dim=0)
        return self.head(torch.tanh(mix[0] * self.one(images) + mix[1] * torch.sin(self.two(images))))


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2))

    def forward(self) -> Tensor:
        return self.weights


def batches(count: int, *, labeled: bool = True) -> list:
    return [(torch.randn(4, 5), torch.randint(3, (4,))) if labeled else torch.randn(6, 5) for _ in range(count)]


def small_lbt(optimizer: str, *, seed: int = 0, steps: int = 1, **problem: object) -> list[mlo.Problem]:
    torch.manual_seed(seed)
    make, options = OPTIMIZERS[optimizer]
    teacher, student, arch = MixedTeacher(), nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), Weights()

    def built(module: nn.Module) -> dict[str, object]:
        return {"module": module, "optimizer": make(module.parameters(), **options), "steps": steps, **problem}

    return [
        TeacherTrain("teacher", data=batches(5), **built(teacher)),
        StudentTeach(
            "student",
            data={"labeled": batches(4), "unlabeled": batches(3, labeled=False)},
            pseudo_weight=0.7,
            **built(student),
        ),
        ArchValidate(
            "arch",
            module=arch,
            optimizer=torch.optim.Adam(arch.parameters(), lr=0.05),
            data=batches(2),
            student_weight=1.3,
        ),
    ]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def stepped(problem: mlo.Problem, loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's formula, written by hand, with its graph; the state before is read, never changed."""
    group = problem.optimizer.param_groups[0]
    gradients = dict(
        zip(parameters, torch.autograd.grad(loss, list(parameters.values()), create_graph=True), strict=True)
    )
    if problem.clip_norm is not None:
        size = torch.stack([g.norm() for g in gradients.values()]).norm()
        gradients = {n: g * torch.clamp(problem.clip_norm / (size + 1e-6), max=1.0) for n, g in gradients.items()}
    new = {}
    for name, w in parameters.items():
        state = problem.optimizer.state.get(problem.variables[name], {})
        g, lr, decay = gradients[name], group["lr"], group["weight_decay"]
        if isinstance(problem.optimizer, torch.optim.SGD):
            g = g + decay * w
            if group["momentum"]:
                buffer = group["momentum"] * state["momentum_buffer"] + g if state else g
                g = g + group["momentum"] * buffer if group["nesterov"] else buffer
            new[name] = w - lr * g
        else:
            if isinstance(problem.optimizer, torch.optim.AdamW):
                w = w * (1 - lr * decay)
            else:
                g = g + decay * w
            (b1, b2), step = group["betas"], float(state["step"]) + 1 if state else 1.0
            m = b1 * (state["exp_avg"] if state else 0) + (1 - b1) * g
            v = b2 * (state["exp_avg_sq"] if state else 0) + (1 - b2) * g * g
            new[name] = w - lr / (1 - b1**step) * m / (v.sqrt() / math.sqrt(1 - b2**step) + group["eps"])
    return new


def brute_force(stack: list[mlo.Problem]) -> Tensor:
    """Both virtual steps and the validation loss as one graph, differentiated by autograd."""
    teacher, student, arch = stack
    a = arch.module.weights.detach().clone().requires_grad_()
    w = {n: p.detach().clone().requires_grad_() for n, p in teacher.module.named_parameters()}
    s = {n: p.detach().clone().requires_grad_() for n, p in student.module.named_parameters()}
    x, y = teacher.stream.peek()
    w = stepped(teacher, F.cross_entropy(functional_call(teacher.module, w, (x, a)), y), w)
    (x, y), u = student.stream.peek()["labeled"], student.stream.peek()["unlabeled"]
    soft = functional_call(teacher.module, w, (u, a)).softmax(1)
    on_unlabeled = -(soft * functional_call(student.module, s, (u,)).log_softmax(1)).sum(1).mean()
    loss = F.cross_entropy(functional_call(student.module, s, (x,)), y) + student.pseudo_weight * on_unlabeled
    s = stepped(student, loss, s)
    x, y = arch.stream.peek()
    loss = F.cross_entropy(functional_call(teacher.module, w, (x, a)), y)
    loss = loss + arch.student_weight * F.cross_entropy(functional_call(student.module, s, (x,)), y)
    return torch.autograd.grad(loss, a)[0]


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
    """Recorded real steps (no lookahead) and virtual ones give the same: Adam's moment shows the gradient it got."""
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
    assert darts._plan.lookahead
    assert not same._plan.lookahead


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
