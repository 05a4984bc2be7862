"""Reference hypergradients by brute force: plain autograd, in float64, through the steps that the estimators define."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp

from benchmarks.peers.catalogue import ITERATIONS, LANGUAGE_ITERATIONS
from benchmarks.peers.workloads import Bilevel, Language, Task, Teaching, make

Params = dict[str, Tensor]


def reference(workload: str, kind: str, size: str = "full") -> Tensor:
    """The first hypergradient of the workload as one vector; ``kind`` is a value of :data:`catalogue.REFERENCES`."""
    task: Task = make(workload, size, torch.float64)
    if isinstance(task, Teaching):
        return _teaching(task)
    if isinstance(task, Language):
        return _language(task, kind)
    if kind in ("one_step", "unrolled"):
        return _unrolled(task)
    if kind == "product":
        return _product(task)
    return _implicit(task, kind)


def flat(tensors: list[Tensor]) -> Tensor:
    """Concatenate the tensors to one float64 vector."""
    return torch.cat([t.detach().double().flatten() for t in tensors])


def _lower(task: Bilevel, parameters: Params, hyper: Params) -> Tensor:
    def model(x: Tensor) -> Tensor:
        return functional_call(task.model, parameters, (x,))

    def weigh(*args: Tensor) -> Tensor:
        return functional_call(task.weights, hyper, args)

    return task.lower_loss(model, weigh, parameters.values(), task.lower[0])


def _upper(task: Bilevel, parameters: Params) -> Tensor:
    return task.upper_loss(lambda x: functional_call(task.model, parameters, (x,)), task.upper[0])


def _unrolled(task: Bilevel) -> Tensor:
    hyper = dict(task.weights.named_parameters())
    parameters: Params = dict(task.model.named_parameters())
    for _ in range(task.steps):  # in the first step momentum has no effect
        found = torch.autograd.grad(_lower(task, parameters, hyper), list(parameters.values()), create_graph=True)
        parameters = {n: p - task.lr * g for (n, p), g in zip(parameters.items(), found, strict=True)}
    return flat(list(torch.autograd.grad(_upper(task, parameters), list(hyper.values()))))


def _product(task: Bilevel) -> Tensor:
    """The curvature product at the start, by forward-over-reverse differentiation."""
    hyper = {n: p.detach() for n, p in task.weights.named_parameters()}
    parameters = {n: p.detach() for n, p in task.model.named_parameters()}
    along = dict(zip(parameters, task.direction(parameters.values()), strict=True))
    of_own = jvp(lambda p: grad(lambda q: _lower(task, q, hyper))(p), (parameters,), (along,))[1]
    of_hyper = jvp(lambda p: grad(lambda h: _lower(task, p, h))(hyper), (parameters,), (along,))[1]
    return flat([*of_own.values(), *of_hyper.values()])


def _implicit(task: Bilevel, kind: str) -> Tensor:
    """CG or the Neumann series, with forward-over-reverse products on one vector."""
    hyper = {n: p.detach() for n, p in task.weights.named_parameters()}
    parameters = {n: p.detach() for n, p in task.model.named_parameters()}
    for _ in range(task.steps):
        found = grad(lambda p: _lower(task, p, hyper))(parameters)
        parameters = {n: p - task.lr * found[n] for n, p in parameters.items()}
    sizes = [p.numel() for p in parameters.values()]

    def named(vector: Tensor) -> Params:
        return {n: v.view_as(p) for (n, p), v in zip(parameters.items(), vector.split(sizes), strict=True)}

    def product(vector: Tensor) -> Tensor:
        moved = jvp(grad(lambda p: _lower(task, p, hyper)), (parameters,), (named(vector),))[1]
        return flat(list(moved.values()))

    target = flat(list(grad(lambda p: _upper(task, p))(parameters).values()))
    solution = _krylov(product, target) if kind == "cg" else _series(product, target, task.lr)
    _, cross = jvp(
        lambda p: grad(lambda h: _lower(task, p, h))(hyper), (parameters,), (named(solution),)
    )  # fmt: skip
    return -flat(list(cross.values()))


def _krylov(product: object, target: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """What conjugate gradient computes: the best solution (in energy) in the Krylov space, by a direct solve."""
    basis: list[Tensor] = []
    images: list[Tensor] = []
    vector = target / target.norm()
    for _ in range(iterations):
        basis.append(vector)
        images.append(product(vector))
        vector = images[-1]
        for _ in range(2):
            for other in basis:
                vector = vector - (vector @ other) * other
        vector = vector / vector.norm()
    space, image = torch.stack(basis, 1), torch.stack(images, 1)
    small = space.T @ image
    if torch.linalg.eigvalsh((small + small.T) / 2).min() <= 0:
        raise ValueError("the Hessian of the lower loss is not positive definite; increase RIDGE in workloads.py")
    return space @ torch.linalg.solve(small, space.T @ target)


def _series(product: object, target: Tensor, rate: float) -> Tensor:
    total = term = target
    for _ in range(ITERATIONS - 1):
        term = term - rate * product(term)
        total = total + term
    return rate * total


def _language(task: Language, kind: str) -> Tensor:
    """Autograd through AdamW's formula, over one vector of all parameters; double backward for products."""
    weigh, logits = task.weights, task.weights.logits
    parameters: Params = dict(task.model.named_parameters())
    sizes = [p.numel() for p in parameters.values()]

    def model(vector: Tensor) -> object:
        views = zip(parameters.items(), vector.split(sizes), strict=True)
        named = {n: v.view_as(p) for (n, p), v in views}
        return lambda tokens: functional_call(task.model, named, (tokens,))

    def gradient(vector: Tensor, batch: object) -> Tensor:
        return torch.autograd.grad(task.lower_loss(model(vector), weigh, batch), vector, create_graph=True)[0]

    at = flat(list(parameters.values())).requires_grad_()
    first, second = (flat(moments) for moments in task.moments)
    for count in range(task.steps):
        found = gradient(at, task.lower[count])
        first = task.betas[0] * first + (1 - task.betas[0]) * found
        second = task.betas[1] * second + (1 - task.betas[1]) * found**2
        mean, square = (
            m / (1 - beta ** (task.taken + count + 1)) for m, beta in zip((first, second), task.betas, strict=True)
        )
        at = at * (1 - task.lr * task.weight_decay) - task.lr * mean / (square.sqrt() + task.eps)
    loss = task.upper_loss(model(at), task.upper[0])
    if kind in ("one_step", "unrolled"):
        return flat(list(torch.autograd.grad(loss, logits)))
    target = torch.autograd.grad(loss, at, retain_graph=True)[0]
    solution = at.detach().requires_grad_()
    again = gradient(solution, task.lower[0])
    if kind == "sama":
        through_adam = torch.autograd.grad(at, found, target)[0]
        return flat(list(torch.autograd.grad(again, logits, through_adam)))

    def product(vector: Tensor) -> Tensor:
        return torch.autograd.grad(again, solution, vector, retain_graph=True)[0] + task.damping * vector

    return -flat(list(torch.autograd.grad(again, logits, _krylov(product, target, LANGUAGE_ITERATIONS))))


def _teaching(task: Teaching) -> Tensor:
    mix = task.arch.mix

    def stepped(module: torch.nn.Module, loss: object) -> object:
        parameters = dict(module.named_parameters())
        found = torch.autograd.grad(
            loss(lambda *args: functional_call(module, parameters, args)), list(parameters.values()), create_graph=True
        )
        moved = {n: p - task.lr * g for (n, p), g in zip(parameters.items(), found, strict=True)}
        return lambda *args: functional_call(module, moved, args)

    teacher = stepped(task.teacher, lambda run: task.teacher_loss(run, mix, task.teacher_data[0]))
    pseudo = teacher(task.unlabeled[0], mix).softmax(1)
    taught = stepped(task.student, lambda run: task.student_loss(run, pseudo, task.labeled[0], task.unlabeled[0]))
    loss = task.arch_loss(teacher, mix, taught, task.validation[0])
    return flat(list(torch.autograd.grad(loss, mix)))
