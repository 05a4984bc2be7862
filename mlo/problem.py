"""A level of a multi-level problem: module, optimizer, data, and a loss whose signature names what it reads."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mlo.errors import CheckpointError, ConfigError
from mlo.graph import Node
from mlo.recomputation import recomputing_with
from mlo.streams import Data, open_stream


@dataclass(frozen=True)
class State:
    """A module's parameters and buffers at one moment; ``live`` if they are the module's own tensors."""

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    live: bool = False

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(iter(self.parameters.values())).device


class Stand(Protocol):
    """What stands in for a problem's module while a loss is evaluated."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters in force."""

    def run(self, problem: Problem, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output under the parameters in force."""


class Problem(ABC):
    """One training job of a stack; subclass it and write :meth:`loss`.

    Args:
        name: what the losses of other problems call it; a Python identifier.
        module: the network; its parameters are moved, never replaced.
        optimizer: a ``torch.optim`` optimizer (or one of that form) over parameters of ``module``. Those that it does
            not hold are constants.
        data: an iterable of batches, a generator function, a mapping of such (its batches are dictionaries), or None
            where the loss needs no batch. Begun again when it ends.
        scheduler: a learning-rate scheduler over ``optimizer``, stepped once after each step of this problem.
        steps: steps taken in each round of the engine.
        accumulate: batches that each step takes the mean loss over, one after another, in the memory of one.
        warmup: rounds of the engine before the first step of this problem.
        clip_norm: the gradient's norm, over all parameters, is scaled down to this before each step.
        autocast: torch.bfloat16 or torch.float16 to evaluate this problem's loss under torch.autocast; None: as the
            tensors are. Curvature products are taken without it, unless they are told. Under float16 the loss is scaled
            while its gradient is taken, by a factor that adapts; a pass that overflows is taken again.
        hypergradient: how upper problems are differentiated through this one: an estimator's name, its options, or
            None for the engine's.
        reads: {parameter of loss: problem} where their names differ; {parameter: None} leaves out a parameter that
            has a default.
        held: problems (by name) that the loss reads as constants: no hypergradient flows through that read.

    Raises:
        ConfigError: if an argument does not fit, with the remedy.
    """

    def __init__(
        self,
        name: str,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data: Data = None,
        scheduler: LRScheduler | None = None,
        steps: int = 1,
        accumulate: int = 1,
        warmup: int = 0,
        clip_norm: float | None = None,
        autocast: torch.dtype | None = None,
        hypergradient: object = None,
        reads: Mapping[str, str | None] | None = None,
        held: Sequence[str] = (),
    ) -> None:
        faults = [*_fault_of_name(name), *_faults_of_parts(module, optimizer, scheduler)]
        faults += _faults_of_numbers(steps, accumulate, warmup, clip_norm, autocast)
        if faults:
            raise ConfigError("\n".join(f"problem {name!r}: {fault}" for fault in faults))
        self.name = name
        self.module = module
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.steps = steps
        self.accumulate = accumulate
        self.warmup = warmup
        self.clip_norm = clip_norm
        self.autocast = autocast
        self.hypergradient = hypergradient
        self.arguments = _arguments(self, reads or {})
        self.node = Node(
            name, tuple(dict.fromkeys(self.arguments.values())), (held,) if isinstance(held, str) else tuple(held)
        )
        self.stream = open_stream(data, name)
        self.steps_taken = 0
        self._aliases = _aliases(module)
        self._parameters, self._buffers = (_places(module, kind) for kind in ("_parameters", "_buffers"))
        self._stand: Stand | None = None
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.variables = {n: p for n, p in module.named_parameters() if id(p) in owned and p.requires_grad}
        if not self.variables:
            raise ConfigError(
                f"problem {name!r}: its optimizer holds none of its module's trainable parameters; "
                "construct it as torch.optim.<class>(module.parameters(), ...) with the very module passed here"
            )
        strangers = len(owned - {id(p) for p in module.parameters()})
        if strangers:
            raise ConfigError(
                f"problem {name!r}: its optimizer holds {strangers} parameter(s) that are not of its module; give each "
                "problem an optimizer over its own module's parameters alone"
            )

    @abstractmethod
    def loss(self, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The scalar that this problem minimizes, as a pure function of the parameters in force.

        Override it with a parameter for each problem that it reads, named as that problem is: ``loss(self, batch,
        teacher, arch)``. Call ``self(x)`` and ``teacher(x)`` to run the modules; never ``.backward()`` or a step.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the parameters that the present evaluation has put in its place."""
        if self._stand is None:
            return self.module(*args, **kwargs)
        return self._stand.run(self, args, kwargs)

    def metrics(self) -> Mapping[str, Tensor]:
        """What else is worth logging of the present state, {name: scalar tensor}; override it, nothing by default."""
        return {}

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The parameters in force, by name: for penalties and for distances between problems."""
        return self.live_state().parameters if self._stand is None else self._stand.parameters

    def run_with(self, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output with ``tensors`` in place of its parameters and buffers of those names; ties hold.

        Where the module assigns a new tensor to a buffer, ``tensors`` holds it afterwards.
        """
        tied = {alias: tensors[name] for alias, name in self._aliases.items() if name in tensors}
        every = {**tensors, **tied}
        compiling = torch.compiler.is_compiling()  # there, recomputations have the substituted tensors by themselves
        with nullcontext() if compiling else recomputing_with(self.module, every):
            if not every:
                return self.module(*args, **kwargs)
            # every name of a tied tensor is given, so functional_call need not look for ties, which is slow
            output = functional_call(self.module, every, args, kwargs, tie_weights=False)
        for name in tensors:
            tensors[name] = every[name]
        return output

    def stand_in(self, stand: Stand | None) -> None:
        """Let ``stand`` take the module's place (None: the module itself again)."""
        self._stand = stand

    def batches_ahead(self, ahead: int = 0) -> tuple[Any, ...]:
        """The batches of the ``ahead``-th next step, as many as it accumulates."""
        return tuple(self.stream.peek(ahead * self.accumulate + i) for i in range(self.accumulate))

    def advance(self) -> None:
        """Leave the batches of the next step behind."""
        for _ in range(self.accumulate):
            self.stream.next()

    def live_state(self) -> State:
        """The module's own parameters and buffers."""
        parameters, buffers = (
            {name: getattr(owner, kind)[key] for name, owner, key in places}
            for kind, places in (("_parameters", self._parameters), ("_buffers", self._buffers))
        )
        return State(parameters, buffers, live=True)

    def state_dict(self) -> dict[str, Any]:
        """All that this problem needs to go on to the bit: module, optimizer, scheduler, position in the data."""
        return {
            "module": self.module.state_dict(),
            "buffers": self._other_buffers(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "data": self.stream.state_dict(),
            "steps_taken": self.steps_taken,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            CheckpointError: if the module, the optimizer or the scheduler is not of the saved form.
        """
        if (state["scheduler"] is None) != (self.scheduler is None):
            raise CheckpointError(
                f"problem {self.name!r}: a scheduler is in only one of the checkpoint and the problem"
            )
        try:
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"problem {self.name!r} does not fit the checkpoint: {error}") from error
        for name, buffer in self._other_buffers().items():
            buffer.copy_(state["buffers"][name])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.stream.load_state_dict(state["data"])
        self.steps_taken = state["steps_taken"]

    def _other_buffers(self) -> dict[str, Tensor]:
        """Buffers that the module's own state leaves out."""
        saved = self.module.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.module.named_buffers() if name not in saved}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, reads={list(self.node.reads)})"


def _arguments(problem: Problem, renames: Mapping[str, str | None]) -> dict[str, str]:
    """{parameter of loss: name of the problem that it reads}."""
    parameters = list(inspect.signature(problem.loss).parameters.values())
    if not parameters or parameters[0].kind not in (parameters[0].POSITIONAL_OR_KEYWORD, parameters[0].POSITIONAL_ONLY):
        raise ConfigError(f"problem {problem.name!r}: write its loss as loss(self, batch, <problems that it reads>)")
    declared = {}
    for parameter in parameters[1:]:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(
                f"problem {problem.name!r}: its loss takes {parameter}; name each problem that it reads as a parameter"
            )
        name = renames.get(parameter.name, parameter.name)
        if name is not None:
            declared[parameter.name] = name
        elif parameter.default is parameter.empty:
            raise ConfigError(
                f"problem {problem.name!r}: reads={{{parameter.name!r}: None}} leaves out a parameter of loss that has "
                f"no default; write loss(self, batch, ..., {parameter.name}=None)"
            )
    unknown = [key for key in renames if key not in {p.name for p in parameters[1:]}]
    if unknown:
        raise ConfigError(
            f"problem {problem.name!r}: reads names {', '.join(map(repr, unknown))}, which its loss does not take; "
            f"it takes {', '.join(repr(p.name) for p in parameters[1:]) or 'nothing but the batch'}"
        )
    return declared


def _places(module: nn.Module, kind: str) -> list[tuple[str, nn.Module, str]]:
    """(name, the submodule that has it, its key there) of each parameter or buffer: asking a large module is slow."""
    named = module.named_parameters() if kind == "_parameters" else module.named_buffers()
    found = []
    for name, _ in named:
        path, _, key = name.rpartition(".")
        found.append((name, module.get_submodule(path), key))
    return found


def _aliases(module: nn.Module) -> dict[str, str]:
    """{further name of a tied parameter or buffer: the name that named_parameters and named_buffers give}."""
    first: dict[int, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: first[id(tensor)] for name, tensor in named if first.setdefault(id(tensor), name) != name}


def _fault_of_name(name: object) -> list[str]:
    if isinstance(name, str) and name.isidentifier():
        return []
    return ["its name must be a Python identifier (letters, digits and _), since losses name it as a parameter"]


def _faults_of_parts(module: object, optimizer: object, scheduler: object) -> list[str]:
    faults = []
    if not isinstance(module, nn.Module):
        faults.append(f"module is a {type(module).__name__}; pass a torch.nn.Module")
    if not isinstance(optimizer, Optimizer):
        faults.append(f"optimizer is a {type(optimizer).__name__}; pass a torch.optim optimizer")
    elif isinstance(optimizer, LBFGS):
        faults.append("LBFGS evaluates the loss several times in a step, which a level cannot; pass another optimizer")
    if scheduler is not None and not isinstance(scheduler, LRScheduler):
        faults.append(f"scheduler is a {type(scheduler).__name__}; pass a torch.optim.lr_scheduler scheduler")
    elif isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        faults.append(
            "ReduceLROnPlateau waits for a validation metric, which a step does not have; pass another scheduler"
        )
    elif scheduler is not None and scheduler.optimizer is not optimizer:
        faults.append("its scheduler drives another optimizer; construct the scheduler over the optimizer passed here")
    return faults


def _faults_of_numbers(
    steps: object, accumulate: object, warmup: object, clip_norm: object, autocast: object
) -> list[str]:
    faults = []
    for name, value in (("steps", steps), ("accumulate", accumulate)):
        if type(value) is not int or value < 1:
            faults.append(f"{name}={value!r}; pass a whole number, 1 or more")
    if type(warmup) is not int or warmup < 0:
        faults.append(f"warmup={warmup!r}; pass a whole number of rounds, 0 or more")
    if clip_norm is not None and not (isinstance(clip_norm, int | float) and clip_norm > 0):
        faults.append(f"clip_norm={clip_norm!r}; pass a number above 0, or None")
    if autocast not in (None, torch.bfloat16, torch.float16):
        faults.append(f"autocast={autocast!r}; pass torch.bfloat16, torch.float16, or None")
    return faults
