"""Whether an engine can continue from a state: checked as a whole, before anything is loaded."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD

from mlo.errors import CheckpointError
from mlo.levels.problem import Problem
from mlo.levels.state import COUNTERS
from mlo.ops.rng import Randomness
from mlo.steps import torch_step
from mlo.training.checkpoint import OWN, of_this_process
from mlo.training.forms import count, same_form, same_names, wrong

SKIPPED = "skipped"  # in the state of an engine that may skip rounds
SIDE = 2  # of the small parameters that show what an optimizer keeps
EXTRA = "_extra_state"  # how torch names what a module's get_extra_state returned


def checked_state(
    state: Mapping[str, Any], own: Mapping[str, Any], problems: Mapping[str, Problem]
) -> Mapping[str, Any]:
    """The state for this process, if an engine can continue from it.

    Args:
        state: what :meth:`mlo.Engine.state_dict` returned.
        own: the same of the engine that should continue: it has every part, but less in it before the first round.
        problems: of that engine.

    Raises:
        CheckpointError: names the part that is missing or that does not fit.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("problems"), Mapping):
        held = ", ".join(map(str, state)) if isinstance(state, Mapping) and state else "nothing"
        raise CheckpointError(f"this is not the state of an engine; it holds {held}")
    if list(state["problems"]) != list(problems):
        raise CheckpointError(
            f"the checkpoint is of the problems {list(state['problems'])}, and the engine has {list(problems)}"
        )
    where = "the checkpoint does not match the engine: "
    for name, part in state["problems"].items():
        if not isinstance(part, Mapping):
            wrong(f"{where}problems.{name}", part, "a mapping")
    _check_others(state, tuple(problems), where)
    state = of_this_process(state)
    same_names(state, own, where, also=("others", SKIPPED))
    same_form(state.get(SKIPPED, [0, 0]), [0, 0], f"{where}{SKIPPED}")
    for number in state.get(SKIPPED, ()):
        count(number, f"{where}{SKIPPED}")
    same_names(state["levels"], own["levels"], f"{where}levels.")
    count(state["rounds"], f"{where}rounds")
    for name, problem in problems.items():
        _check_problem(state["problems"][name], own["problems"][name], problem)
        _check_level(state["levels"][name], own["levels"][name], f"{where}levels.{name}")
    _check_scalars(state["losses"], f"{where}losses")
    _check_scalars(state["reports"], f"{where}reports")
    stepped = [name for name in problems if state["problems"][name]["steps_taken"]]
    same_names(state["losses"], stepped, f"{where}losses.", also=tuple(problems))
    _check_warm(state["warm"], problems, f"{where}warm")
    _check_random(state["random"], f"{where}random")
    cuda, mine = state["cuda_random"], own["cuda_random"]  # a run may move from a CPU to a GPU, or back
    if cuda is not None and (mine is not None or not isinstance(cuda, Tensor)):
        same_form(cuda, torch.empty(0) if mine is None else mine, f"{where}cuda_random")
    return state


def load_problems(problems: Mapping[str, Problem], states: Mapping[str, Any]) -> None:
    """Load checked states into all problems, or into none.

    What can still fail is the user's code: data that ends too early, and the extra state of a module. So the positions
    in the data come first, then the modules with extra state, which are copied before.
    """
    data = {name: problem.stream.state_dict() for name, problem in problems.items()}
    held: dict[str, Any] = {}
    try:
        for name, problem in problems.items():
            problem.stream.load_state_dict(states[name]["data"])
        extra = [name for name in problems if any(key.endswith(EXTRA) for key in states[name]["module"])]
        for name in dict.fromkeys([*extra, *problems]):
            if name in extra:
                held[name] = copy.deepcopy(problems[name].state_dict())
            problems[name].load_state_dict(states[name])
    except BaseException:
        for name, state in held.items():
            problems[name].load_state_dict(state)
        for name, position in data.items():
            problems[name].stream.load_state_dict(position)
        raise


def _check_others(state: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    """The parts of other processes, if several saved the state."""
    others = state.get("others", [])
    if not isinstance(others, list):
        wrong(f"{where}others", others, "a list")
    for number, other in enumerate(others):
        same_names(other, (*OWN, "data"), f"{where}others[{number}].")
        same_names(other["data"], names, f"{where}others[{number}].data.")


def _check_problem(state: Any, own: Mapping[str, Any], problem: Problem) -> None:
    where = f"problem {problem.name!r} does not match the checkpoint: "
    same_names(state, own, where)
    if (state["scheduler"] is None) != (problem.scheduler is None):
        raise CheckpointError(
            f"problem {problem.name!r}: only one of the checkpoint and the problem has a scheduler; resume with the "
            "arguments that the run started with"
        )
    count(state["steps_taken"], f"{where}steps_taken")
    same_names(state["module"], own["module"], f"{where}module.")
    for key, value in own["module"].items():
        if not key.endswith(EXTRA):
            same_form(state["module"][key], value, f"{where}module.{key}")
    same_form(state["buffers"], own["buffers"], f"{where}buffers")
    _check_groups(state["optimizer"], own["optimizer"], problem, where)
    _check_slots(state["optimizer"]["state"], problem, f"{where}optimizer.state")
    if problem.scheduler is not None:
        same_form(state["scheduler"], own["scheduler"], f"{where}scheduler", grows=True)
    _check_data(state["data"], own["data"], problem.name, f"{where}data")


def _check_groups(state: Any, own: Mapping[str, Any], problem: Problem, where: str) -> None:
    """The hyperparameters. Torch would load those of another optimizer class, and fail in the next step."""
    same_names(state, own, f"{where}optimizer.")
    groups, mine = state["param_groups"], own["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(mine):
        wrong(f"{where}optimizer.param_groups", groups, f"a list of {len(mine)}")
    for number, (group, expected) in enumerate(zip(groups, mine, strict=True)):
        unknown = [option for option in group if option not in expected] if isinstance(group, Mapping) else []
        if unknown:
            raise CheckpointError(
                f"problem {problem.name!r}: the checkpoint is of another optimizer than "
                f"{type(problem.optimizer).__name__}: it has {', '.join(map(str, unknown))}; resume with the optimizer "
                "that the run started with"
            )
        at = f"{where}optimizer.param_groups[{number}]"
        same_form(group, expected, at)


def _check_slots(state: Any, problem: Problem, where: str) -> None:
    """What the optimizer keeps for each parameter it has stepped; a parameter without gradients has nothing."""
    parameters = [p for group in problem.optimizer.param_groups for p in group["params"]]
    expected = dict(zip(map(id, problem.variables.values()), _slots_of_a_step(problem), strict=True))
    if not isinstance(state, Mapping):
        wrong(where, state, "a mapping")
    for index, slots in state.items():
        at = f"{where}[{index!r}]"
        if type(index) is not int or not 0 <= index < len(parameters):
            raise CheckpointError(f"{at} is of no parameter; there are {len(parameters)}")
        if not isinstance(slots, Mapping):
            wrong(at, slots, "a mapping")
        parameter = parameters[index]
        for key, kind in expected.get(id(parameter), {}).items() if slots else ():
            if key not in slots:
                raise CheckpointError(f"{at}.{key} is missing there")
            begun = slots[key] is not None or not isinstance(problem.optimizer, SGD)  # None: no momentum yet
            if isinstance(kind, Tensor) and begun:
                _check_slot(key, slots[key], kind, parameter, f"{at}.{key}")


def _check_slot(key: str, slot: Any, kind: Tensor, parameter: Tensor, where: str) -> None:
    """Whether a slot is a number or has the shape of the parameter, where a small parameter's does."""
    if not kind.ndim:
        fits = isinstance(slot, int | float) or (isinstance(slot, Tensor) and not slot.ndim)
        fits = fits and (key not in COUNTERS or bool(slot >= 0))
    elif kind.shape == (SIDE,) * parameter.ndim:
        fits = isinstance(slot, Tensor) and slot.shape == parameter.shape
    else:
        fits = isinstance(slot, Tensor)
    if not fits:
        wrong(where, slot, f"a number or a tensor of shape {tuple(parameter.shape)}")


def _slots_of_a_step(problem: Problem) -> Sequence[Mapping[str, Any]]:
    """What the optimizer would keep after a first step of small parameters; empty if it cannot step."""
    tiny = [p.detach().new_ones((SIDE,) * p.ndim) for p in problem.variables.values()]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in problem.optimizer.param_groups]
    empty: tuple[Mapping[str, Any], ...] = ({},) * len(tiny)
    try:
        with torch.no_grad():
            gradients = [tensor.clone() for tensor in tiny]
            return torch_step.step(problem, groups, tiny, gradients, empty, differentiable=False)[1]
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError):  # of a user's class
        return empty


def _check_data(state: Any, own: Mapping[str, Any], owner: str, where: str) -> None:
    """A position in the data, or one for each name."""
    if "start" not in own:
        same_names(state, own, f"{where}.")
        for name, part in own.items():
            _check_data(state[name], part, f"{owner}: {name}", f"{where}.{name}")
        return
    same_names(state, own, f"{where}.")
    count(state["index"], f"{where}.index")
    start, expected = state["start"], own["start"]
    if not isinstance(start, Mapping) or start.keys() != expected.keys():
        raise CheckpointError(f"problem {owner!r}: its data is of a different kind than in the checkpoint")
    if start:
        _check_random(start["global"], f"{where}.start.global")
        same_form(start["generators"], expected["generators"], f"{where}.start.generators")


def _check_level(state: Any, own: Mapping[str, Any], where: str) -> None:
    same_names(state, own, f"{where}.")
    for key in ("draws_outside", "reaches_all", "asks_steps_taken"):
        same_form(state[key], True, f"{where}.{key}")
    if state["graph_bytes"] is not None:
        count(state["graph_bytes"], f"{where}.graph_bytes")
    if own["scale"] is None and state["scale"] is not None:
        wrong(f"{where}.scale", state["scale"], "None, since the problem has no float16")
    same_form(state["scale"], own["scale"], f"{where}.scale")


def _check_scalars(state: Any, where: str) -> None:
    if not isinstance(state, Mapping):
        wrong(where, state, "a mapping")
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            wrong(f"{where}.{name}", value, "a tensor of one element")


def _check_warm(state: Any, problems: Mapping[str, Problem], where: str) -> None:
    same_names(state, (), f"{where}.", also=tuple(problems))
    for upper, solutions in state.items():
        same_names(solutions, (), f"{where}.{upper}.", also=tuple(problems))
        for name, solution in solutions.items():
            same_form(solution, [*problems[name].variables.values()], f"{where}.{upper}.{name}")


def _check_random(state: Any, where: str) -> None:
    """Whether all generators accept the state; tried on generators that nothing else uses."""
    same_form(
        state, {**Randomness.seeded(0).portable(), "python": [0, torch.empty(625, dtype=torch.int64), None]}, where
    )
    (position, has_gauss), gauss = state["numpy"][2:4], state["python"][2]
    for number in (position, has_gauss):
        count(number, f"{where}.numpy")
    if not 0 <= position <= len(state["numpy"][1]) or not isinstance(gauss, float | None):
        raise CheckpointError(f"{where} is no state of a random generator")
    try:
        found = Randomness.of(state)
        assert found.outside is not None
        torch.Generator().set_state(found.cpu)
        np.random.RandomState(0).set_state(found.outside[0])
        random.Random(0).setstate(found.outside[1])
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where} is no state of a random generator ({error})") from error
