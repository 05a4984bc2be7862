"""The workloads by hand in JAX, each round one function under ``jax.jit``; the data and initial weights are torch's."""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

# one thread, like torch; read when JAX starts
os.environ["NPROC"] = "1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import torch
from jax import Array
from torch import Tensor

from benchmarks.peers.catalogue import ITERATIONS
from benchmarks.peers.libraries import Runner
from benchmarks.peers.workloads import RADIUS, RIDGE, Bilevel, Task, Teaching

Tree = Any


def build(task: Task, estimator: str) -> Runner:
    """See :mod:`benchmarks.peers.libraries`."""
    network = task.teacher if isinstance(task, Teaching) else task.model
    jax.config.update("jax_enable_x64", next(network.parameters()).dtype == torch.float64)
    if isinstance(task, Teaching):
        return _Teach(task, estimator)
    return (_Reweighting if task.trains else _Cleaning)(task, estimator)


class _Cleaning:
    """The hypergradient after T steps of SGD, always from the same start."""

    def __init__(self, task: Bilevel, estimator: str) -> None:
        self._given = [_arrays(task.model), _arrays(task.weights), _array(task.lower[0]), _array(task.upper[0])]
        if estimator == "product":
            self._given[3] = _array(task.direction(task.model.parameters()))
            compute = _product
        elif estimator in ("unrolled", "recomputed"):
            compute = partial(_unrolled, steps=task.steps, lr=task.lr, keep=estimator == "unrolled")
        else:
            compute = partial(_implicit, steps=task.steps, lr=task.lr, solve=SOLVERS[estimator])
        self._compute = jax.jit(compute)

    def gradient(self) -> list[Tensor]:
        return _tensors(self._compute(*self._given))

    def round(self) -> None:
        jax.block_until_ready(self._compute(*self._given))


class _Trained(ABC):
    """Rounds of training; subclasses define one as a function of the state and the batches.

    The function returns the hypergradient and the state after the round.
    """

    def __init__(self, state: Tree, batches: list[list[Any]]) -> None:
        self._state = state
        self._batches = zip(*(itertools.cycle(map(_array, part)) for part in batches), strict=False)
        self._round = jax.jit(self.trained)

    @abstractmethod
    def trained(self, state: Tree, *batches: Tree) -> tuple[Tree, Tree]:
        """The hypergradient, and the state after the round."""

    def gradient(self) -> list[Tensor]:
        return _tensors(self._round(self._state, *next(self._batches))[0])

    def round(self) -> None:
        self._state = jax.block_until_ready(self._round(self._state, *next(self._batches))[1])


class _Reweighting(_Trained):
    """Meta-weight-net: one SGD step of the model with momentum, then one Adam step of the weight net."""

    def __init__(self, task: Bilevel, estimator: str) -> None:
        self._task, self._estimator = task, estimator
        p, hyper = _arrays(task.model), _arrays(task.weights)
        super().__init__((p, _zeros(p), hyper, _adam_state(hyper)), [task.lower, task.upper])

    def trained(self, state: Tree, lower: Tree, upper: Tree) -> tuple[Tree, Tree]:
        before, buffers, hyper, adam = state

        def step(hyper: Tree) -> tuple[Tree, Tree]:
            found = jax.grad(_lower)(before, hyper, lower)
            moved = _combined(found, buffers, self._task.momentum)
            return _combined(before, moved, -self._task.lr), moved

        if self._estimator == "one_step":
            found, (after, moved) = jax.grad(lambda h: _with(_upper, step(h), upper), has_aux=True)(hyper)
        else:
            after, moved = step(hyper)
            v = jax.grad(_upper)(after, upper)
            if self._estimator == "darts":
                on_hyper = jax.grad(_lower, argnums=1)
                found = _difference(lambda p: on_hyper(p, hyper, lower), before, v, -self._task.lr)
            else:
                found = _pulled(after, hyper, lower, v, SOLVERS[self._estimator], self._task.lr)
        hyper, adam = _adam(hyper, found, adam, self._task.upper_lr)
        return found, (after, moved, hyper, adam)


class _Teach(_Trained):
    """LBT, with channels last as XLA prefers them, and without the running means of batch norm, which nothing reads."""

    def __init__(self, task: Teaching, estimator: str) -> None:
        self._task, self._estimator = task, estimator
        teacher, student, mix = _named(task.teacher), _named(task.student), _array(task.arch.mix)
        state = teacher, student, _zeros(teacher), _zeros(student), mix, _adam_state(mix)
        labeled = [[(_last(images), labels) for images, labels in part]
                   for part in (task.teacher_data, task.labeled, task.validation)]  # fmt: skip
        super().__init__(state, [*labeled, [_last(images) for images in task.unlabeled]])

    def trained(self, state: Tree, data: Tree, labeled: Tree, validation: Tree, unlabeled: Array) -> tuple[Tree, Tree]:
        teacher, student, teacher_buffers, student_buffers, mix, adam = state

        def teach(mix: Array) -> tuple[Tree, Tree]:
            return self._step(jax.grad(_teacher_loss)(teacher, mix, data), teacher, teacher_buffers)

        def learn(pseudo: Array) -> tuple[Tree, Tree]:
            return self._step(jax.grad(_student_loss)(student, pseudo, labeled, unlabeled), student, student_buffers)

        def through(mix: Array) -> tuple[Array, Tree]:
            taught = teach(mix)
            learned = learn(jax.nn.softmax(_teacher(taught[0], mix, unlabeled)))
            return _arch_loss(taught[0], mix, learned[0], validation), (taught, learned)

        if self._estimator == "one_step":
            found, (taught, learned) = jax.grad(through, has_aux=True)(mix)
        else:
            taught = teach(mix)
            pseudo, back = jax.vjp(lambda t, m: jax.nn.softmax(_teacher(t, m, unlabeled)), taught[0], mix)
            learned = learn(pseudo)
            v, total, v_student = jax.grad(_arch_loss, argnums=(0, 1, 2))(taught[0], mix, learned[0], validation)
            on_pseudo = jax.grad(_student_loss, argnums=1)
            to_teacher, direct = back(
                _difference(lambda s: on_pseudo(s, pseudo, labeled, unlabeled), student, v_student, -self._task.lr)
            )
            on_mix, v = jax.grad(_teacher_loss, argnums=1), _combined(v, to_teacher, 1.0)
            found = total + direct + _difference(lambda t: on_mix(t, mix, data), teacher, v, -self._task.lr)
        mix, adam = _adam(mix, found, adam, self._task.upper_lr)
        return found, (taught[0], learned[0], taught[1], learned[1], mix, adam)

    def _step(self, found: Tree, before: Tree, buffers: Tree) -> tuple[Tree, Tree]:
        moved = _combined(found, buffers, self._task.momentum)
        return _combined(before, moved, -self._task.lr), moved


def _teacher(p: Tree, mix: Array, images: Array) -> Array:
    found = jax.nn.relu(_normed(p, "stem.1", _convolved(images, p["stem.0.weight"])))
    for cell, (a, b, c) in enumerate(jax.nn.softmax(mix)):
        wide, narrow = (_convolved(found, p[f"{kind}.{cell}.weight"]) for kind in ("wide", "narrow"))
        mixed = a * wide + b * narrow + c * _pooled(found, 3, 1, "SAME")
        found = _pooled(jax.nn.relu(_normed(p, f"norms.{cell}", mixed)), 2, 2)
    return jnp.mean(found, (1, 2)) @ p["head.weight"].T + p["head.bias"]


def _student(p: Tree, images: Array) -> Array:
    found = _pooled(jax.nn.relu(_normed(p, "1", _convolved(images, p["0.weight"]))), 2, 2)
    found = jax.nn.relu(_normed(p, "5", _convolved(found, p["4.weight"])))
    return jnp.mean(found, (1, 2)) @ p["9.weight"].T + p["9.bias"]


def _convolved(images: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _normed(p: Tree, name: str, images: Array) -> Array:
    mean, variance = jnp.mean(images, (0, 1, 2)), jnp.var(images, (0, 1, 2))
    return (images - mean) * jax.lax.rsqrt(variance + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def _pooled(images: Array, size: int, stride: int, padding: str = "VALID") -> Array:
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(images, 0.0, jax.lax.add, window, strides, padding) / size**2


def _teacher_loss(p: Tree, mix: Array, batch: Tree) -> Array:
    return jnp.mean(_losses(_teacher(p, mix, batch[0]), batch[1]))


def _student_loss(p: Tree, pseudo: Array, labeled: Tree, unlabeled: Array) -> Array:
    images, labels = labeled
    ours, theirs = jnp.split(_student(p, jnp.concatenate([images, unlabeled])), [len(images)])
    soft = jnp.sum(pseudo * jax.nn.log_softmax(theirs), 1)
    return jnp.mean(_losses(ours, labels)) - jnp.mean(soft)


def _arch_loss(teacher: Tree, mix: Array, student: Tree, batch: Tree) -> Array:
    return _teacher_loss(teacher, mix, batch) + jnp.mean(_losses(_student(student, batch[0]), batch[1]))


def _named(module: torch.nn.Module) -> dict[str, Array]:
    """The parameters by name; kernels have their channels last."""
    kernels = {n: p.permute(2, 3, 1, 0) if p.dim() == 4 else p for n, p in module.named_parameters()}
    return {n: _array(p) for n, p in kernels.items()}


def _last(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).contiguous()


def _with(loss: Callable[..., Array], stepped: tuple[Tree, Tree], batch: Tree) -> tuple[Array, tuple[Tree, Tree]]:
    return loss(stepped[0], batch), stepped


def _mlp(p: Tree, images: Array) -> Array:
    first, first_bias, second, second_bias = p
    return jax.nn.relu(images @ first.T + first_bias) @ second.T + second_bias


def _losses(logits: Array, labels: Array) -> Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]


def _weights(hyper: Tree, losses: Array) -> Array:
    if len(hyper) == 1:
        return jax.nn.sigmoid(hyper[0])
    return jax.nn.sigmoid(_mlp(hyper, losses[:, None]))[:, 0]


def _lower(p: Tree, hyper: Tree, batch: Tree) -> Array:
    losses = _losses(_mlp(p, batch[0]), batch[1])
    ridge = sum(jnp.sum(jnp.square(x)) for x in p)
    return jnp.mean(_weights(hyper, losses) * losses) + 0.5 * RIDGE * ridge


def _upper(p: Tree, batch: Tree) -> Array:
    return jnp.mean(_losses(_mlp(p, batch[0]), batch[1]))


def _stepped(p: Tree, hyper: Tree, batch: Tree, lr: float) -> Tree:
    return _combined(p, jax.grad(_lower)(p, hyper, batch), -lr)


def _trajectory(p: Tree, hyper: Tree, batch: Tree, steps: int, lr: float, keep: bool = True) -> Tree:
    """The parameters after the steps; in the backward pass, those not kept are computed again."""

    def body(p: Tree, _: None) -> tuple[Tree, None]:
        return _stepped(p, hyper, batch, lr), None

    return jax.lax.scan(body if keep else jax.checkpoint(body), p, length=steps)[0]


def _unrolled(p: Tree, hyper: Tree, lower: Tree, upper: Tree, steps: int, lr: float, keep: bool) -> Tree:
    return jax.grad(lambda h: _upper(_trajectory(p, h, lower, steps, lr, keep), upper))(hyper)


def _product(p: Tree, hyper: Tree, lower: Tree, direction: Tree) -> Tree:
    """The curvature product at the start, forward over reverse."""
    return jax.jvp(lambda p: jax.grad(_lower, argnums=(0, 1))(p, hyper, lower), (p,), (direction,))[1]


def _implicit(
    p: Tree, hyper: Tree, lower: Tree, upper: Tree, steps: int, lr: float, solve: Callable[..., Tree]
) -> Tree:
    p = _trajectory(p, hyper, lower, steps, lr)
    return _pulled(p, hyper, lower, jax.grad(_upper)(p, upper), solve, lr)


def _pulled(p: Tree, hyper: Tree, lower: Tree, v: Tree, solve: Callable[..., Tree], lr: float) -> Tree:
    """The implicit function theorem; all products share one linearization of the gradient."""
    _, matvec = jax.linearize(lambda p: jax.grad(_lower)(p, hyper, lower), p)
    solution = solve(matvec, v, lr)
    _, cross = jax.jvp(lambda p: jax.grad(_lower, argnums=1)(p, hyper, lower), (p,), (solution,))
    return jax.tree.map(jnp.negative, cross)


def _conjugate_gradient(matvec: Callable[[Tree], Tree], v: Tree, lr: float) -> Tree:
    return jax.scipy.sparse.linalg.cg(matvec, v, tol=0.0, maxiter=ITERATIONS)[0]


def _neumann(matvec: Callable[[Tree], Tree], v: Tree, lr: float) -> Tree:
    def body(_: int, so_far: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        term, total = so_far
        term = _combined(term, matvec(term), -lr)
        return term, _combined(total, term, 1.0)

    total = jax.lax.fori_loop(0, ITERATIONS - 1, body, (v, v))[1]
    return jax.tree.map(lambda x: lr * x, total)


SOLVERS = {"cg": _conjugate_gradient, "neumann": _neumann}


def _difference(evaluate: Callable[[Tree], Tree], middle: Tree, v: Tree, scale: float) -> Tree:
    """``scale`` times a curvature product with ``v``, by a central difference."""
    size = jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(v)))
    above, below = (evaluate(_combined(middle, v, sign * RADIUS / size)) for sign in (1.0, -1.0))
    return jax.tree.map(lambda a, b: scale * size / (2 * RADIUS) * (a - b), above, below)


def _combined(a: Tree, b: Tree, scale: float | Array) -> Tree:
    return jax.tree.map(lambda x, y: x + scale * y, a, b)


def _zeros(like: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, like)


def _adam_state(hyper: Tree) -> tuple[Tree, Tree, Array]:
    return _zeros(hyper), _zeros(hyper), jnp.zeros(())


def _adam(hyper: Tree, gradient: Tree, state: tuple[Tree, Tree, Array], lr: float) -> tuple[Tree, Tree]:
    """A step of Adam, with torch's defaults."""
    mean, square, count = state
    count = count + 1
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradient)
    square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, square, gradient)
    rate, correction = lr / (1 - 0.9**count), jnp.sqrt(1 - 0.999**count)
    moved = jax.tree.map(lambda h, m, s: h - rate * m / (jnp.sqrt(s) / correction + 1e-8), hyper, mean, square)
    return moved, (mean, square, count)


def _arrays(module: torch.nn.Module) -> list[Array]:
    return [_array(p) for p in module.parameters()]


def _array(tensors: Any) -> Tree:
    if isinstance(tensors, Tensor):
        return jnp.array(tensors.detach().numpy())
    return [_array(t) for t in tensors]


def _tensors(tree: Tree) -> list[Tensor]:
    return [torch.tensor(jax.device_get(x)) for x in jax.tree.leaves(tree)]
