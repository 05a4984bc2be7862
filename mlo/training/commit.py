"""Applies updates, and stops at the first non-finite loss or gradient; on a GPU without synchronizing.

Gradient clipping is in :mod:`mlo.steps.clipping`, the loss scale for float16 in :mod:`mlo.ops.loss_scale`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer, Rprop

from mlo.errors import NonFiniteLossError
from mlo.levels.problem import Problem
from mlo.levels.state import State
from mlo.ops import distributed
from mlo.ops.vectors import Vector, copied, copy_, norm, select_
from mlo.steps import sgd
from mlo.steps.clipping import clip
from mlo.steps.hooks import accumulated, hooked
from mlo.steps.losses import Found
from mlo.steps.optimizer import hyperparameters, virtual_step
from mlo.steps.own_step import has_torch_step
from mlo.steps.scan import Joined

ROUNDS_BEHIND = 2  # after which several processes check the losses of a round: by then a GPU has usually sent them


class Updater:
    """Updates problems, and raises an error at a loss or gradient that is NaN or infinite, keeping the last good state.

    On the CPU the loss is checked before the update. On a GPU that would synchronize. There, each update is undone on
    the device unless all losses and gradients so far were finite. The CPU finds this out about a round later, from an
    asynchronous copy. By then the counters (optimizer steps, schedulers, position in the data) have advanced, but
    parameters, buffers and optimizer states have not changed since the last good step.

    Args:
        device: the device of the problems.
        deferred: whether to undo bad updates on the device, as described for the GPU.

    Attributes:
        waiting: (problem, its steps before, its loss and the gradient's norm) of this round's deferred updates.
        recorded: whether the updates become part of a CUDA graph. Torch's SGD, which would read its learning rate on
            the host, is then replaced by its formula.
    """

    def __init__(self, device: torch.device, deferred: bool) -> None:
        self._device = device
        self._deferred = deferred
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self.waiting: list[tuple[str, int, Tensor]] = []
        self.recorded = False
        self._sent: deque[_Sent] = deque()

    def update(self, problem: Problem, loss: Tensor, gradients: Found, buffers: Vector) -> None:
        """Take one step of the problem's optimizer and scheduler, and set its module's new buffers.

        Raises:
            NonFiniteLossError: if not deferred, before anything is changed.
        """
        gradients = hooked(problem, gradients)
        found = [gradient for gradient in gradients if gradient is not None]
        size = norm(found) if found else torch.zeros_like(loss)  # a loss may read a problem only sometimes
        if not self._deferred:
            seen = [loss.item(), size.item()]
            if not (math.isfinite(seen[0]) and math.isfinite(seen[1])):
                _check(problem.name, problem.step_number, seen)
            _take_step(problem, gradients, buffers)
            return
        sent = torch.stack([loss.double(), size.double()])
        self.waiting.append((problem.name, problem.step_number, sent))
        self._finite.logical_and_(torch.isfinite(sent).all())  # in place, as a CUDA graph needs it
        held = _tensors(problem, self._device)
        before = dict(zip(map(id, held), copied(held), strict=True))
        _take_step(problem, gradients, buffers, self.recorded)
        held = _tensors(problem, self._device)  # with those that the optimizer made in its first step
        old = [before[id(t)] if id(t) in before else torch.zeros_like(t) for t in held]
        select_(~self._finite, held, old)

    def commit(self, problem: Problem, joined: Joined) -> bool:
        """Set variables, momentum and buffers to where several steps led.

        The loss of each step is checked, and instead of gradients the norm of the variables after the last step.

        Returns:
            False, with nothing changed, if not deferred and a loss or a variable is NaN or infinite.
        """
        seen = torch.stack([*joined.losses]).double().unsqueeze(1).repeat(1, 2)
        seen[-1, 1] = norm([end.detach() for end in joined.end.variables])
        finite = torch.isfinite(seen).all()
        if self._deferred:
            self.waiting += [(problem.name, problem.step_number + index, each) for index, each in enumerate(seen)]
            finite = self._finite.logical_and_(finite)
        elif not finite:
            return False
        targets, values = zip(*_targets(problem, joined.end), strict=True)
        if self._deferred:
            select_(finite, targets, values)
        else:
            copy_(targets, values)
        for variable in problem.variables.values():
            variable.grad = None
        return True

    def check_arrived(self) -> None:
        """After a round: start copying its losses to the CPU, and check those of earlier rounds that have arrived.

        Raises:
            NonFiniteLossError: for the first loss or gradient that was not finite.
        """
        if self.waiting:
            self._sent.append(_Sent(self.waiting, self._device))
            self.waiting = []
        while self._sent and self._is_due():
            self._sent.popleft().check()

    def _is_due(self) -> bool:
        """Whether to check the oldest losses now. Several processes must all do so in the same round."""
        return self._sent[0].arrived() if distributed.world() == 1 else len(self._sent) > ROUNDS_BEHIND

    def wait(self) -> None:
        """Synchronize with the device and check all losses; raises like :meth:`check_arrived`."""
        self.check_arrived()
        while self._sent:
            self._sent.popleft().check()


class _Sent:
    """The losses of one round, while they are copied to the CPU."""

    def __init__(self, losses: list[tuple[str, int, Tensor]], device: torch.device) -> None:
        self._labels = [(name, step) for name, step, _ in losses]
        values = torch.stack([seen for _, _, seen in losses])
        on_gpu = device.type == "cuda"
        self._values = torch.empty(values.shape, dtype=torch.float64, pin_memory=on_gpu)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event() if on_gpu else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    def check(self) -> None:
        if self._event is not None:
            self._event.synchronize()
        for (name, step), value in zip(self._labels, self._values.tolist(), strict=True):
            _check(name, step, value)


def _targets(problem: Problem, end: State) -> Iterator[tuple[Tensor, Tensor]]:
    """The problem's own tensors with the values that steps by torch's SGD gave them; momentum begins at zero."""
    yield from zip(problem.variables.values(), end.variables, strict=True)
    for variable, slot in zip(problem.variables.values(), end.slots, strict=True):
        for key, value in slot.items():
            if value is not None:
                state = problem.optimizer.state[variable]
                if state.get(key) is None:
                    state[key] = torch.zeros_like(value, requires_grad=False)
                yield state[key], value
    if end.buffers:
        yield from zip(problem.live_state().buffers, end.buffers, strict=True)


def _take_step(problem: Problem, gradients: Found, buffers: Vector, recorded: bool = False) -> None:
    variables, largest = problem.variables.values(), problem.clip_norm_now
    if recorded and sgd.applies(problem.optimizer, groups := hyperparameters(problem)):
        state = problem.live_state()._replace(slots=problem.optimizer_slots(), buffers=())
        copy_(*zip(*_targets(problem, virtual_step(problem, state, gradients, groups)), strict=True))
    else:
        gradients = accumulated(problem, gradients)
        if largest is not None:
            clipped = clip(gradients, largest)
        elif _writes_gradients(problem.optimizer):
            clipped = [None if gradient is None else gradient.clone() for gradient in gradients]
        else:
            clipped = gradients
        for variable, gradient in zip(variables, clipped, strict=True):
            variable.grad = gradient
        problem.optimizer.step()
        for variable in variables:
            variable.grad = None
    if buffers:
        copy_(problem.live_state().buffers, buffers)
    if problem.scheduler is not None:
        problem.scheduler.step()
    problem.step_number += 1


def _writes_gradients(optimizer: Optimizer) -> bool:
    """Whether a step may write into gradients, which several variables may share, and which records may keep.

    Of torch's optimizers, Rprop does, and SGD with Nesterov momentum.
    """
    if not has_torch_step(optimizer) or isinstance(optimizer, Rprop):
        return True
    return any([group.get("nesterov") for group in optimizer.param_groups])


def _tensors(problem: Problem, device: torch.device) -> list[Tensor]:
    """All tensors of the problem that a step changes and that are on the device."""
    found = [*problem.variables.values(), *problem.module.buffers()]
    for slots in problem.optimizer.state.values():
        found += [v for v in slots.values() if isinstance(v, Tensor) and v.device.type == device.type]
    return found


def _check(name: str, step: int, seen: list[float]) -> None:
    """Raise a NonFiniteLossError unless ``seen``, the loss and the norm of its gradient, is finite."""
    for what, value in zip(("loss", "gradient's norm"), seen, strict=True):
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"problem {name!r}: its {what} is {value} at its step {step + 1}; that step was not taken, and the "
                "state is the one before it. Lower the learning rate, set clip_norm, or check the batch for bad values"
            )
