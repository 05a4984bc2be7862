"""Values whose gradient a loss stops: held constant where a loss is evaluated elsewhere, as autograd takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

from mlo.levels.problem import Problem
from mlo.levels.state import State
from mlo.levels.substitution import Substitute
from mlo.ops.activation_checkpointing import RUNNING


class StoppedGradients:
    """What the losses of problems stop gradients of, recorded in one run of steps, and the same in others.

    A finite difference sees how a detached value changes; autograd does not. A value that a loss computes from its own
    variables, and detaches, is meant as a constant; so is what a module detaches inside, and a problem among the
    ``held`` of the one that reads it. Other values that a loss detaches change, if they are computed from what it
    reads: there, it hides a part of the hypergradient.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self._problems = {problem.name: problem for problem in problems}
        self._tapes: dict[tuple[str, int, int], list[Any]] = {}
        self._seen: Counter[tuple[str, int]] = Counter()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A context in which they are recorded, if it is the first; in later ones they are as they were there."""
        self._seen.clear()
        own = {name: vars(problem).get("loss") for name, problem in self._problems.items()}
        for problem in self._problems.values():
            vars(problem)["loss"] = partial(self._loss, problem, problem.loss)
        try:
            yield
        finally:
            for name, problem in self._problems.items():
                del vars(problem)["loss"]
                if own[name] is not None:
                    vars(problem)["loss"] = own[name]

    def _loss(self, problem: Problem, loss: Callable[..., Tensor], batch: Any, **reads: Any) -> Tensor:
        position = problem.name, problem.step_number
        key = *position, self._seen[position]  # a step may have several evaluations
        self._seen[position] += 1
        known = key in self._tapes
        tape = _Tape(self._tapes.setdefault(key, []), known)
        moving = list[Tensor]()
        for name in problem.node.reads:
            other = self._problems[name]
            if name in problem.node.held:
                other.substitute = tape.held(other)
            elif other.substitute is not None:
                moving += other.substitute.parameters
        with _Evaluation(tape, moving):
            return loss(batch, **reads)


class _Tape:
    """The constants of one evaluation, in their order.

    Args:
        values: the list of them.
        known: whether they were recorded before.
    """

    def __init__(self, values: list[Any], known: bool) -> None:
        self._values, self._known, self._next = values, known, 0

    def constant(self, value: Any) -> Any:
        """The value that was recorded in its place; itself, if none was, or one of another kind."""
        if not self._known:
            self._values.append(value.detach().clone() if isinstance(value, Tensor) else value)
            return value
        index, self._next = self._next, self._next + 1
        old = self._values[index] if index < len(self._values) else None
        if isinstance(value, Tensor):
            return old.clone() if isinstance(old, Tensor) and old.shape == value.shape else value
        return old if isinstance(old, float) else value

    def held(self, problem: Problem) -> Substitute:
        """What runs instead of the problem's module: it, with the tensors that were recorded."""
        assert isinstance(problem.substitute, Substitute)
        parameters = [self.constant(tensor.detach()) for tensor in problem.substitute.parameters]
        buffers = tuple([self.constant(tensor) for tensor in problem.substitute.buffers])
        count = len(problem.variables)
        return Substitute(problem, State(tuple(parameters[:count]), tuple(parameters[count:]), buffers), False)


class _Evaluation(TorchFunctionMode):
    """A context in which one loss is evaluated.

    Args:
        tape: records constants, or has them.
        moving: tensors whose detached values change all the same, and those of what is computed from them.
    """

    def __init__(self, tape: _Tape, moving: Sequence[Tensor]) -> None:
        super().__init__()
        self._tape = tape
        self._moving = {id(tensor): tensor for tensor in moving}
        self._off = self._off_outside = not torch.is_grad_enabled()
        self._running = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``; what it returns, or the constant that is held in its place."""
        kwargs = kwargs or {}
        if len(RUNNING) != self._running:
            self._running, self._off_outside = len(RUNNING), self._off
        if func is torch._C._set_grad_enabled:  # not called for the forward of an autograd function
            self._off = not args[0]
        if func is torch.nn.functional.gumbel_softmax:
            with self:
                return _gumbel_softmax(*args, **kwargs)
        result = func(*args, **kwargs)
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        moves = any([id(tensor) in self._moving for tensor in given])
        stops = self._off or (func in _STOPS and torch.is_grad_enabled())
        of_module = self._running and not self._off_outside
        if given and stops and (of_module or not moves):
            parts, structure = tree_flatten(result)
            result = tree_unflatten([self._constant(part, given) for part in parts], structure)
        if moves:
            made = [value for value in tree_iter(result) if isinstance(value, Tensor)]
            self._moving |= {id(tensor): tensor for tensor in (*made, *given[:1] * (result is None))}
        return result

    def _constant(self, value: Any, given: Sequence[Tensor]) -> Any:
        if not isinstance(value, float) and not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        if isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
            return value  # of a transform of torch.func, after which it does not exist
        constant = self._tape.constant(value)
        if isinstance(value, Tensor) and any([value is tensor for tensor in given]):
            return value if constant is value else value.copy_(constant)
        return constant


def _gumbel_softmax(logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Tensor:
    """Torch's, whose detached value a mode does not see."""
    noise = -torch.empty_like(logits).exponential_().log()
    soft = ((logits + noise) / tau).softmax(dim)
    if not hard:
        return soft
    return torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0) - soft.detach() + soft


_STOPS = {
    Tensor.__float__,
    vars(torch._C.TensorBase)["data"].__get__,
    Tensor.detach,
    Tensor.detach_,
    Tensor.item,
    Tensor.tolist,
}
