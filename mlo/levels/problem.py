"""A level of a multi-level problem: module, optimizer, data, and a loss whose signature names what it reads."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mlo.errors import CheckpointError, ConfigError
from mlo.levels.batches import Data, open_stream
from mlo.levels.buffer_checks import Unfilled, gone, refuse_filled
from mlo.levels.graph import Node
from mlo.levels.validation import fault_of_name, faults_of_numbers, faults_of_parts
from mlo.ops.activation_checkpointing import RecomputingWith


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


class Substitute(Protocol):
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
        steps_ahead: steps taken virtually, where an upper problem looks ahead; None: as many as ``steps``.
        accumulate: batches that each step takes the mean loss over, one after another, in the memory of one.
        warmup: rounds of the engine before the first step of this problem.
        clip_norm: the gradient's norm, over all parameters, is scaled down to this before each step.
        clip_ahead: whether it is in virtual steps, too.
        autocast: torch.bfloat16 or torch.float16 to evaluate this problem's loss under torch.autocast; None: as the
            tensors are. Curvature products are taken without it, unless they are told. Under float16 the loss is scaled
            while its gradient is taken, by a factor that adapts; a pass that overflows is taken again.
        hypergradient: how upper problems are differentiated through this one: an estimator's name, its options, or
            None for the engine's.
        reads: {parameter of loss: problem} where their names differ; {parameter: None} leaves out a parameter that
            has a default.
        held: problems (by name) that the loss reads as constants: no hypergradient flows through that read.
        sometimes: problems (by name) that the loss reads at some of its steps only. A declared read without a gradient
            is an error; of these, it is passed over.

    Attributes:
        looking_ahead: whether what is evaluated is a virtual step or its derivative; a loss may ask, and be another
            one then than in the real step.

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
        steps_ahead: int | None = None,
        accumulate: int = 1,
        warmup: int = 0,
        clip_norm: float | None = None,
        clip_ahead: bool = True,
        autocast: torch.dtype | None = None,
        hypergradient: object = None,
        reads: Mapping[str, str | None] | None = None,
        held: Sequence[str] = (),
        sometimes: Sequence[str] = (),
    ) -> None:
        faults = [*fault_of_name(name), *faults_of_parts(module, optimizer, scheduler)]
        faults += faults_of_numbers(steps, steps_ahead, accumulate, warmup, clip_norm, autocast)
        if faults:
            raise ConfigError("\n".join(f"problem {name!r}: {fault}" for fault in faults))
        self.name = name
        self.module = module
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.steps = steps
        self.steps_ahead = steps_ahead
        self.accumulate = accumulate
        self.warmup = warmup
        self.clip_norm = clip_norm
        self.clip_ahead = clip_ahead
        self.looking_ahead = False
        self.autocast = autocast
        self.hypergradient = hypergradient
        self.arguments = _arguments(self, reads or {})
        self.node = Node(name, tuple(dict.fromkeys(self.arguments.values())), _names(held), _names(sometimes))
        self.stream = open_stream(data, name)
        self.steps_taken = 0
        self._places = _places(module)
        self._aliases = _aliases(self._places)
        self._unfilled = Unfilled(module)
        self._stand: Substitute | None = None
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
    def steps_now(self) -> int:
        """Steps of a round, of virtual ones while :attr:`looking_ahead`."""
        return self.steps_ahead if self.looking_ahead and self.steps_ahead is not None else self.steps

    @property
    def clip_norm_now(self) -> float | None:
        """What the gradient's norm is scaled down to, in a virtual step while :attr:`looking_ahead`."""
        return self.clip_norm if self.clip_ahead or not self.looking_ahead else None

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The parameters in force, by name: for penalties and for distances between problems."""
        return self.live_state().parameters if self._stand is None else self._stand.parameters

    def run_with(self, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output with ``tensors`` in place of its parameters and buffers of those names; ties hold.

        Where the module assigns a new tensor to a buffer, ``tensors`` holds it afterwards.
        """
        every = tensors
        if self._aliases:
            every = tensors | {alias: tensors[name] for alias, name in self._aliases.items() if name in tensors}
        if torch.compiler.is_compiling():  # there, recomputations have the substituted tensors by themselves
            if not every:
                return self.module(*args, **kwargs)
            # every name of a tied tensor is given, so functional_call need not look for ties, which is slow
            output = functional_call(self.module, every, args, kwargs, tie_weights=False)
        else:
            with RecomputingWith(self.module, every):
                output = self._run_within(every, args, kwargs)
        if every is not tensors:
            tensors.update((name, every[name]) for name in tensors)
        return output

    def _run_within(self, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What functional_call does, in a third of its time: the places of the module's tensors are known."""
        own = []
        try:
            for name, tensor in tensors.items():
                owner, kind, key = self._places[name]
                place = getattr(owner, kind)
                own.append((name, place, key, place[key]))
                place[key] = tensor
            output = self.module(*args, **kwargs)
        finally:
            for name, place, key, tensor in own:
                tensors[name], place[key] = place.get(key), tensor
            filled = self._unfilled.filled(take_away=True)
        refuse_filled(self.name, filled)
        return output

    def substitute(self, stand: Substitute | None) -> None:
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
        tensors: dict[str, dict[str, Tensor]] = {"_parameters": {}, "_buffers": {}}
        for name, (owner, kind, key) in self._places.items():
            tensor = getattr(owner, kind).get(key)
            if tensor is None:
                raise gone(self.name, name)
            if name not in self._aliases:
                tensors[kind][name] = tensor
        refuse_filled(self.name, self._unfilled.filled())
        return State(tensors["_parameters"], tensors["_buffers"], live=True)

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
        self._refuse_other_optimizer(state["optimizer"])
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

    def _refuse_other_optimizer(self, state: Mapping[str, Any]) -> None:
        """Torch takes over the state of another class of optimizer, and fails in its next step."""
        mine = {option for group in self.optimizer.param_groups for option in group}
        strange = [option for group in state["param_groups"] for option in group if option not in mine]
        if strange:
            raise CheckpointError(
                f"problem {self.name!r}: the checkpoint is of another optimizer than {type(self.optimizer).__name__}: "
                f"it has {', '.join(dict.fromkeys(strange))}; resume with the one that the run began with"
            )

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


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _places(module: nn.Module) -> dict[str, tuple[nn.Module, str, str]]:
    """{name: the submodule that has the parameter or buffer, which kind it is, its key there}, each place once.

    A tied tensor has several places, a shared submodule's has one, by whatever names it is reached.
    """
    found: dict[tuple[nn.Module, str, str], str] = {}
    parameters = module.named_parameters(remove_duplicate=False)
    for kind, named in (("_parameters", parameters), ("_buffers", module.named_buffers(remove_duplicate=False))):
        for name, _ in named:
            path, _, key = name.rpartition(".")
            found.setdefault((module.get_submodule(path), kind, key), name)
    return {name: place for place, name in found.items()}


def _aliases(places: Mapping[str, tuple[nn.Module, str, str]]) -> dict[str, str]:
    """{name of a tied tensor's further place: the name of its first, which named_parameters and named_buffers give}."""
    first: dict[int, str] = {}
    tensors = {name: getattr(owner, kind)[key] for name, (owner, kind, key) in places.items()}
    return {name: first[id(tensor)] for name, tensor in tensors.items() if first.setdefault(id(tensor), name) != name}
