"""Hand-written loops of the language model, in plain PyTorch, as a careful researcher would write them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.peers.by_hand import Vector, combined, conjugate_gradient, dot, implicit, leaves
from benchmarks.peers.catalogue import LANGUAGE_ITERATIONS
from benchmarks.peers.workloads import RADIUS, Batch, Language


@dataclass
class Moments:
    """The state of AdamW, and how many steps it has taken."""

    mean: Vector
    square: Vector
    count: int


@dataclass
class Step:
    """A step of AdamW: what its derivative takes."""

    batch: Batch
    before: Vector
    gradient: Vector
    after: Moments
    bottom: Vector


class Training:
    """Steps of the model with AdamW, then one Adam step of the weights, or the hypergradient from the same start."""

    def __init__(self, task: Language, estimator: str) -> None:
        self._task, self._estimator = task, estimator
        self._names = [name for name, _ in task.model.named_parameters()]
        self._hyper = list(task.weights.parameters())
        self._optimizer = torch.optim.Adam(self._hyper, lr=task.upper_lr)
        self._p: Vector = leaves(list(task.model.parameters()))
        self._moments = Moments(*task.moments, task.taken)
        self._batches = zip(itertools.cycle(task.lower), itertools.cycle(task.upper), strict=False)

    def round(self) -> None:
        """One round, which is timed."""
        self.gradient()
        if self._task.trains:
            self._optimizer.step()
            self._optimizer.zero_grad()

    def gradient(self) -> list[Tensor]:
        """The hypergradient; a training also takes the model's next step."""
        if not self._task.trains:
            return self._unrolled(keep=self._estimator != "recomputed")
        lower, upper = next(self._batches)
        step, p, self._moments = self._stepped(self._p, self._moments, lower, keep=self._estimator == "one_step")
        v = torch.autograd.grad(self._upper(p, upper), p)
        if self._estimator == "cg":
            found = implicit(self._lower(p, lower), p, self._hyper, v, self._solve, self._task.lr)
        else:
            u, *_ = self._transposed(step, v)
            if self._estimator == "one_step":
                found = list(torch.autograd.grad(step.gradient, self._hyper, u))
            else:
                found = self._difference(step.before if self._estimator == "darts" else p, u, lower)
        self._p = p
        for parameter, gradient in zip(self._hyper, found, strict=True):
            parameter.grad = gradient
        return found

    def _unrolled(self, keep: bool) -> list[Tensor]:
        """Through all steps, last first; with ``keep`` they keep the graphs of their gradients."""
        p, moments, steps = self._p, self._moments, []
        for batch in self._task.lower[: self._task.steps]:
            step, p, moments = self._stepped(p, moments, batch, keep)
            steps.append(step)
        c: Vector = torch.autograd.grad(self._upper(p, self._task.upper[0]), p)
        decay = 1 - self._task.lr * self._task.weight_decay
        beta, square_beta = self._task.betas
        to_mean: Vector | None = None
        to_square: Vector | None = None
        total = [torch.zeros_like(h) for h in self._hyper]
        while steps:
            step = steps.pop()
            g = step.gradient if keep else self._lower_gradient(step.before, step.batch, True)
            u, to_mean, to_square = self._transposed(step, c, to_mean, to_square)
            found = torch.autograd.grad(g, [*step.before, *self._hyper] if steps else self._hyper, u)
            total = combined(total, found[-len(total) :], 1.0)
            if steps:
                c = torch._foreach_add(found[: len(u)], c, alpha=decay)
                torch._foreach_mul_(to_mean, beta)
                torch._foreach_mul_(to_square, square_beta)
        return total

    def _stepped(self, p: Vector, moments: Moments, batch: Batch, keep: bool) -> tuple[Step, Vector, Moments]:
        """The parameters and moments after a step."""
        task, count = self._task, moments.count + 1
        gradient = self._lower_gradient(p, batch, keep)
        with torch.no_grad():
            g = [x.detach() for x in gradient]
            mean = torch._foreach_lerp(moments.mean, g, 1 - task.betas[0])
            square = torch._foreach_mul(moments.square, task.betas[1])
            torch._foreach_addcmul_(square, g, g, value=1 - task.betas[1])
            bottom = torch._foreach_sqrt(square)
            torch._foreach_div_(bottom, self._correction(count))
            torch._foreach_add_(bottom, task.eps)
            moved = torch._foreach_mul(p, 1 - task.lr * task.weight_decay)
            torch._foreach_addcdiv_(moved, mean, bottom, value=-self._rate(count))
        after = Moments(mean, square, count)
        return Step(batch, p, gradient, after, bottom), [x.requires_grad_() for x in moved], after

    def _transposed(
        self, step: Step, c: Vector, to_mean: Vector | None = None, to_square: Vector | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The Jacobian of a step in closed form: from cotangents after it to those of gradient and both moments."""
        beta, square_beta = self._task.betas
        with torch.no_grad():
            mean = list(torch._foreach_mul(c, -self._rate(step.after.count)))
            torch._foreach_div_(mean, step.bottom)
            square = list(torch._foreach_mul(mean, step.after.mean))
            torch._foreach_div_(square, step.bottom)
            torch._foreach_div_(square, torch._foreach_sqrt(step.after.square))
            torch._foreach_mul_(square, -0.5 / self._correction(step.after.count))
            if to_mean is not None and to_square is not None:
                torch._foreach_add_(mean, to_mean)
                torch._foreach_add_(square, to_square)
            gradient = list(torch._foreach_mul(mean, 1 - beta))
            torch._foreach_addcmul_(gradient, [g.detach() for g in step.gradient], square, value=2 * (1 - square_beta))
        return gradient, mean, square

    def _rate(self, count: int) -> float:
        return self._task.lr / (1 - self._task.betas[0] ** count)

    def _correction(self, count: int) -> float:
        return float((1 - self._task.betas[1] ** count) ** 0.5)

    def _difference(self, middle: Vector, u: Vector, batch: Batch) -> list[Tensor]:
        """A curvature product, by a central difference."""
        size = dot(u, u) ** 0.5
        found = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                p = combined(middle, u, sign * RADIUS / size)
            found.append(torch.autograd.grad(self._lower(p, batch), self._hyper))
        return [size / (2 * RADIUS) * (a - b) for a, b in zip(*found, strict=True)]

    def _solve(self, matvec: Callable[[Vector], Vector], v: Vector, lr: float) -> Vector:
        damping = self._task.damping
        return conjugate_gradient(lambda u: combined(matvec(u), u, damping), v, lr, LANGUAGE_ITERATIONS)

    def _lower_gradient(self, p: Vector, batch: Batch, keep: bool) -> Vector:
        return torch.autograd.grad(self._lower(p, batch), p, create_graph=keep)

    def _lower(self, p: Vector, batch: Batch) -> Tensor:
        return self._task.lower_loss(lambda tokens: self._model(p, tokens), self._task.weights, batch)

    def _upper(self, p: Vector, batch: Tensor) -> Tensor:
        return self._task.upper_loss(lambda tokens: self._model(p, tokens), batch)

    def _model(self, p: Vector, tokens: Tensor) -> Tensor:
        return functional_call(self._task.model, dict(zip(self._names, p, strict=True)), (tokens,))
