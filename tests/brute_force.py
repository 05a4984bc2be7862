"""A small LBT and its hypergradient by brute force: optimizer steps written by hand, all in one graph."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from small_lbt import Weights
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


State = dict[str, dict[str, object]]


def state_of(problem: mlo.Problem) -> State:
    """A copy of the optimizer's state by parameter name."""
    copy = {}
    for name, parameter in problem.variables.items():
        slots = problem.optimizer.state.get(parameter, {})
        copy[name] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in slots.items()}
    return copy


def stepped(
    problem: mlo.Problem, loss: Tensor, parameters: dict[str, Tensor], state: State
) -> tuple[dict[str, Tensor], State]:
    """The optimizer's formula, written by hand, with its graph; nothing is changed."""
    group = problem.optimizer.param_groups[0]
    found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    gradients = dict(zip(parameters, found, strict=True))
    if problem.clip_norm is not None:
        size = torch.stack([g.norm() for g in gradients.values()]).norm()
        gradients = {n: g * torch.clamp(problem.clip_norm / (size + 1e-6), max=1.0) for n, g in gradients.items()}
    new: dict[str, Tensor] = {}
    after: State = {}
    for name, w in parameters.items():
        g, lr, decay, slots = gradients[name], group["lr"], group["weight_decay"], state[name]
        if isinstance(problem.optimizer, torch.optim.SGD):
            g = g + decay * w
            if group["momentum"]:
                buffer = group["momentum"] * slots["momentum_buffer"] + g if slots else g
                after[name] = {"momentum_buffer": buffer}
                g = g + group["momentum"] * buffer if group["nesterov"] else buffer
            else:
                after[name] = {}
            new[name] = w - lr * g
        else:
            if isinstance(problem.optimizer, torch.optim.AdamW):
                w = w * (1 - lr * decay)
            else:
                g = g + decay * w
            (b1, b2), step = group["betas"], float(slots["step"]) + 1 if slots else 1.0
            m = b1 * (slots["exp_avg"] if slots else 0) + (1 - b1) * g
            v = b2 * (slots["exp_avg_sq"] if slots else 0) + (1 - b2) * g * g
            after[name] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
            new[name] = w - lr / (1 - b1**step) * m / (v.sqrt() / math.sqrt(1 - b2**step) + group["eps"])
    return new, after


def brute_force(stack: list[mlo.Problem], last: int | None = None) -> Tensor:
    """All virtual steps and the validation loss as one graph, differentiated by autograd.

    With ``last``, only that many of the last steps of each problem are in the graph.
    """
    teacher, student, arch = stack
    a = arch.module.weights.detach().clone().requires_grad_()
    w = {n: p.detach().clone().requires_grad_() for n, p in teacher.module.named_parameters()}
    s = {n: p.detach().clone().requires_grad_() for n, p in student.module.named_parameters()}
    w_state, s_state = state_of(teacher), state_of(student)
    for step in range(teacher.steps):
        x, y = teacher.stream.peek(step)
        w, w_state = stepped(teacher, F.cross_entropy(functional_call(teacher.module, w, (x, a)), y), w, w_state)
        if last is not None and step < teacher.steps - last:
            w, w_state = _cut(w, w_state)
    for step in range(student.steps):
        (x, y), u = student.stream.peek(step)["labeled"], student.stream.peek(step)["unlabeled"]
        soft = functional_call(teacher.module, w, (u, a)).softmax(1)
        on_unlabeled = -(soft * functional_call(student.module, s, (u,)).log_softmax(1)).sum(1).mean()
        loss = F.cross_entropy(functional_call(student.module, s, (x,)), y) + student.pseudo_weight * on_unlabeled
        s, s_state = stepped(student, loss, s, s_state)
        if last is not None and step < student.steps - last:
            s, s_state = _cut(s, s_state)
    x, y = arch.stream.peek()
    loss = F.cross_entropy(functional_call(teacher.module, w, (x, a)), y)
    loss = loss + arch.student_weight * F.cross_entropy(functional_call(student.module, s, (x,)), y)
    return torch.autograd.grad(loss, a)[0]


def _cut(parameters: dict[str, Tensor], state: State) -> tuple[dict[str, Tensor], State]:
    slots = {n: {k: v.detach() if isinstance(v, Tensor) else v for k, v in s.items()} for n, s in state.items()}
    return {n: p.detach().requires_grad_() for n, p in parameters.items()}, slots
