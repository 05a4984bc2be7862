"""Applies updates, and stops at the first non-finite loss, gradient or buffer; on a GPU without synchronizing.

Gradient clipping is in :mod:`mlo.steps.clipping`, the loss scale for float16 in :mod:`mlo.ops.loss_scale`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer, Rprop

from mlo.levels.problem import Problem
from mlo.levels.state import State
from mlo.ops import distributed
from mlo.ops.vectors import Vector, copied, copy_, select_
from mlo.steps import sgd
from mlo.steps.clipping import clip
from mlo.steps.hooks import accumulated, hooked
from mlo.steps.losses import Found
from mlo.steps.optimizer import hyperparameters, virtual_step
from mlo.steps.own_step import has_torch_step
from mlo.steps.scan import Joined
from mlo.training.finite import LOSS, Seen, Watch, check

ROUNDS_BEHIND = 2  # after which several processes check the losses of a round: by then a GPU has usually sent them


class Updater:
    """Updates problems, and raises an error where something is NaN or infinite, keeping the last good state.

    Checked are the loss, the gradient, and the buffers after the step (:class:`mlo.training.finite.Watch`).

    On the CPU the loss is checked before the update. On a GPU that would synchronize. There, each update is undone on
    the device unless all losses and gradients so far were finite. The CPU finds this out about a round later, from an
    asynchronous copy. By then the counters (optimizer steps, schedulers, position in the data) have advanced, but
    parameters, buffers and optimizer states have not changed since the last good step.

    Args:
        device: the device of the problems.
        deferred: whether to undo bad updates on the device, as described for the GPU.

    Attributes:
        device, deferred: as given.
        waiting: what is to be checked of this round's deferred updates.
        watched: {problem: what is checked of its steps}.
        recorded: whether the updates become part of a CUDA graph. Torch's SGD, which would read its learning rate on
            the host, is then replaced by its formula.
    """

    def __init__(self, device: torch.device, deferred: bool) -> None:
        self.device = device
        self.deferred = deferred
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self.waiting: list[Seen] = []
        self.watched: dict[str, Watch] = {}
        self.recorded = False
        self._sent: deque[_Sent] = deque()

    def update(self, problem: Problem, loss: Tensor, gradients: Found, buffers: Vector) -> None:
        """Take one step of the problem's optimizer and scheduler, and set its module's new buffers.

        Raises:
            NonFiniteLossError: if not deferred, before anything is changed.
        """
        gradients = hooked(problem, gradients)
        watch = self.watched[problem.name]
        if not self.deferred:
            watch.refuse(problem, loss, gradients, buffers)
            _take_step(problem, gradients, buffers)
            return
        self.waiting.append(watch.seen(problem, loss, gradients, buffers))
        self._finite.logical_and_(torch.isfinite(self.waiting[-1].values).all())  # in place, as a CUDA graph needs it
        held = _tensors(problem, self.device)
        before = dict(zip(map(id, held), copied(held), strict=True))
        _take_step(problem, gradients, buffers, self.recorded)
        held = _tensors(problem, self.device)  # with those that the optimizer made in its first step
        old = [before[id(t)] if id(t) in before else torch.zeros_like(t) for t in held]
        select_(~self._finite, held, old)

    def note(self, virtual: Sequence[tuple[Problem, int, Tensor]], reached: Mapping[str, State]) -> None:
        """Before a real step, if deferred: the losses of the virtual steps before it, and where these led.

        If something of that step is not finite, the first virtual step of which this is so is to blame.
        """
        ends = {problem.name: (problem, number) for problem, number, _ in virtual}
        for problem, number, loss in virtual:
            self.waiting.append(Seen(problem.name, number, [LOSS], loss[None], virtual=True))
            if ends[problem.name] == (problem, number):
                end = self.watched[problem.name].reached(problem, number, reached[problem.name])
                self.waiting.append(end._replace(virtual=True))

    def commit(self, problem: Problem, joined: Joined) -> bool:
        """Set variables, momentum and buffers to where several steps led.

        The loss of each step is checked, and instead of gradients the variables after the last step.

        Returns:
            False, with nothing changed, if not deferred and something is NaN or infinite.
        """
        watch, targets, values = self.watched[problem.name], *zip(*_targets(problem, joined.end), strict=True)
        if self.deferred:
            seen = watch.joined(problem, joined)
            self.waiting += seen
            self._finite.logical_and_(torch.isfinite(torch.cat([each.values for each in seen])).all())
            select_(self._finite, targets, values)
        elif watch.accepts(joined):
            copy_(targets, values)
        else:
            return False
        for variable in problem.variables.values():
            variable.grad = None
        return True

    def check_arrived(self) -> None:
        """After a round: start copying its losses to the CPU, and check those of earlier rounds that have arrived.

        Raises:
            NonFiniteLossError: for the first loss or gradient that was not finite.
        """
        if self.waiting:
            self._sent.append(_Sent(self.waiting, self.device))
            self.waiting = []
        while self._sent and self._is_due():
            self._sent.popleft().check()

    def _is_due(self) -> bool:
        """Whether to check the oldest losses now. Several processes must all do so in the same round."""
        return self._sent[0].arrived() if distributed.world() == 1 else len(self._sent) > ROUNDS_BEHIND

    def forget(self) -> None:
        """What was not finite is undone: all that was to be checked counts no more."""
        self._finite.fill_(True)
        self.waiting = []
        self._sent.clear()

    def wait(self) -> None:
        """Synchronize with the device and check all losses; raises like :meth:`check_arrived`."""
        self.check_arrived()
        while self._sent:
            self._sent.popleft().check()


class _Sent:
    """What was seen of the steps of one round, while it is copied to the CPU."""

    def __init__(self, seen: list[Seen], device: torch.device) -> None:
        self._seen = seen
        values = torch.cat([each.values for each in seen])
        on_gpu = device.type == "cuda"
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_gpu)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event() if on_gpu else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    def check(self) -> None:
        if self._event is not None:
            self._event.synchronize()
        check(self._seen, self._values.tolist())


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
