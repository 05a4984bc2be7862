"""Steps that are not torch's own, but of a user's subclass of an optimizer: what they may not do, and who checks it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from mlo.errors import ConfigError
from mlo.levels.problem import Problem
from mlo.ops.lost_graphs import LostGraphs
from mlo.ops.writes import Values

#: {class: its step}, where that is known to be torch's
_TORCHS: dict[type[Optimizer], Any] = {}
#: what a copy of an optimizer does not share with it
COPIED = frozenset(
    ("param_groups", "state", "defaults", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "step")
)


def has_torch_step(optimizer: Optimizer) -> bool:
    """Whether a step is that of a class of ``torch.optim``, wrapped at most by torch, as by a scheduler."""
    kind = type(optimizer)
    if _TORCHS.get(kind) is not kind.step:
        if not (kind.__module__.startswith("torch.optim.") and all(map(_is_torchs, _layers(kind.step)))):
            return False
        _TORCHS[kind] = kind.step
    return "step" not in vars(optimizer) or not is_replaced(optimizer)


def is_replaced(optimizer: Optimizer) -> bool:
    """Whether the user has set another ``step`` on the instance."""
    own = vars(optimizer).get("step")
    if own is None:
        return False
    of_class = [*_layers(type(optimizer).step)]
    return not all(_is_torchs(function) for function in _layers(own) if function not in of_class)


def _layers(step: Any) -> Iterator[Any]:
    """A function, and those that it wraps."""
    while step is not None:
        step = getattr(step, "__func__", step)
        yield step
        step = getattr(step, "__wrapped__", None)


def _is_torchs(function: Any) -> bool:
    return bool(getattr(function, "__globals__", {}).get("__name__", "").startswith("torch."))


def check_unchanged(problem: Problem, shadow: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ConfigError if a step on a copy has changed what the next one would not know of.

    Args:
        shadow: the copy, after the step.
        groups: its hyperparameters before.
    """
    optimizer = problem.optimizer
    for before, after in zip(groups, shadow.param_groups, strict=True):
        for key, value in before.items():
            if key not in _FLAGS and _differs(value, after.get(key)):
                raise ConfigError(
                    f"problem {problem.name!r}: {type(optimizer).__name__} changes its option {key!r} in its step, "
                    "which virtual steps and derivatives cannot follow; use a scheduler of torch.optim.lr_scheduler, "
                    "or compute the value in the step from a count in self.state"
                )
    own = vars(optimizer)
    for key, value in vars(shadow).items():
        if key not in COPIED | _OF_TORCH and (key not in own or _differs(own[key], value)):
            raise ConfigError(
                f"problem {problem.name!r}: {type(optimizer).__name__} changes its attribute {key!r} in its step, "
                "which virtual steps and derivatives cannot follow; keep what a step needs of earlier ones in "
                "self.state[parameter]"
            )


def _differs(one: Any, other: Any) -> bool:
    return one is not other and (isinstance(one, Tensor) or isinstance(other, Tensor) or bool(one != other))


class Held:
    """What an optimizer refers to besides its state: its parameters, and lists and the like among its attributes."""

    def __init__(self, optimizer: Optimizer) -> None:
        attributes = {key: value for key, value in vars(optimizer).items() if key not in COPIED}
        self._tensors = [p for group in optimizer.param_groups for p in group["params"]]
        self._tensors += [t for t in tree_leaves([*attributes.values()]) if isinstance(t, Tensor)]
        self._values = Values(self._tensors)
        self._containers = [(k, v, _copied(v)) for k, v in attributes.items() if isinstance(v, dict | list | set)]

    def restored(self) -> str | None:
        """What has changed since, which is set to what it was; None if nothing has."""
        changed = "the tensors" if any(self._values.put_back()) else None
        for key, value, before in self._containers:
            if [*map(id, tree_leaves(value))] != [*map(id, tree_leaves(before))]:
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(before)
                changed = f"the attribute {key!r}"
        return changed


def _copied(container: Any) -> Any:
    """A copy of it, and of the containers in it; what they hold is the same."""
    inside = tree_map(lambda leaf: leaf, container)
    return copy(container) if inside is container else inside


def check_graphs(
    problem: Problem, seen: LostGraphs, moved: Sequence[Tensor], slots: Sequence[Mapping[str, Any]]
) -> None:
    """Raise a ConfigError if a step on a copy has moved a variable or a slot without a graph.

    Args:
        seen: the context that the step ran in.
        moved, slots: the variables and the slots after it.
    """
    what, where = "", seen.read
    for name, variable, slot in zip(problem.variables, moved, slots, strict=True):
        found = {f"state {key!r} of {name!r}": seen.where(v) for key, v in slot.items() if isinstance(v, Tensor)}
        for each, at in ({repr(name): seen.where(variable)} | found).items():
            if at is not None and not what:
                what, where = each, at
    if where is None:
        return
    raise ConfigError(
        f"problem {problem.name!r}: {type(problem.optimizer).__name__} changes {what or 'its parameters'} in its step "
        f"without a graph, by {where}, so its step cannot be differentiated; compute it by operators with a graph, "
        "without torch.no_grad (instead: torch.set_grad_enabled(self.defaults['differentiable'])), .data, detach and "
        ".item(); or pass hypergradient='cg', 'neumann' or 'first_order', which do not differentiate optimizer steps"
    )


_FLAGS = frozenset(("differentiable", "foreach", "fused", "capturable"))
#: attributes that torch's own steps set
_OF_TORCH = frozenset(("_warned_capturable_if_run_uncaptured", "_need_device_dtype_check_for_fused", "_opt_called"))
