"""The state of one level as a value: tensors by position, so that it is copied, cast, moved and compiled as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlo.ops import vectors
from mlo.ops.vectors import Vector

#: what an optimizer keeps for each variable: {"momentum_buffer": tensor}, {"exp_avg": ..., "step": ...} or {}
Slots = tuple[Mapping[str, Any], ...]
# scalars in optimizer states that depend only on the number of steps; they keep their precision and their device
COUNTERS = frozenset(("step", "mu_product", "eta", "mu"))


class State(NamedTuple):
    """The tensors of one level, each group of them in the order of its problem's names.

    Attributes:
        variables: the parameters that its optimizer trains.
        constants: the other parameters of its module.
        buffers: of its module.
        slots: what its optimizer keeps, for each variable; empty where nothing needs it.
        live: whether these are the module's own tensors.
    """

    variables: Vector
    constants: Vector = ()
    buffers: Vector = ()
    slots: Slots = ()
    live: bool = False

    @property
    def device(self) -> torch.device:
        """The device of the variables."""
        return self.variables[0].device


def leaves(tensors: Sequence[Tensor]) -> Vector:
    """Aliases of the tensors, as the leaves of a new graph."""
    return tuple([tensor.detach().requires_grad_() for tensor in tensors])


@torch.no_grad()
def copied(state: State, device: torch.device | None = None) -> State:
    """A copy of what training changes, on ``device``; the constants are the same tensors.

    The variables require gradients where those of the state do.
    """
    parts: list[Vector] = []
    for tensors in (state.variables, state.buffers):
        here = not tensors or device in (None, tensors[0].device)
        if not tensors:
            parts.append(())
            continue
        copies = vectors.copied(tensors) if here else tuple([t.to(device, copy=True) for t in tensors])
        for copy, tensor in zip(copies, tensors, strict=True):
            if tensor.requires_grad:
                copy.requires_grad_()
        parts.append(copies)
    slots = slots_on(state.slots, device or state.device, copy=True) if any(state.slots) else state.slots
    return State(parts[0], state.constants, parts[1], slots)


def slots_on(slots: Slots, device: torch.device, copy: bool = False) -> Slots:
    """The slots with their tensors on ``device``; counters stay on theirs."""
    return tuple(
        [{k: _moved(v, v.device if k in COUNTERS else device, copy) for k, v in slot.items()} for slot in slots]
    )


def cast(state: State, dtype: torch.dtype) -> State:
    """A copy of the state with floating-point tensors of ``dtype``."""
    variables, constants, buffers = (
        tuple([_cast(t.detach(), dtype).requires_grad_(t.requires_grad) for t in tensors]) for tensors in state[:3]
    )
    slots = [{k: v if k in COUNTERS else _cast(v, dtype) for k, v in slot.items()} for slot in state.slots]
    return State(variables, constants, buffers, tuple(slots))


def _moved(value: Any, device: torch.device, copy: bool) -> Any:
    return value.to(device, copy=copy) if isinstance(value, Tensor) else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return in_precision(value, dtype) if isinstance(value, Tensor) else value


def in_precision(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a floating-point precision; a complex one stays complex, and one of integers as it is."""
    if tensor.is_complex():
        return tensor.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
