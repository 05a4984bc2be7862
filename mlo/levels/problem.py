"""A level of a multi-level problem: module, optimizer, data, and a loss whose signature names what it reads."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """A module's parameters and buffers at one point of training; ``live`` if they are the module's own tensors."""

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    live: bool = False

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self.parameters.values())).device


class Substitute(Protocol):
    """What runs instead of a problem's module while a loss is evaluated: the module with other tensors."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The substituted parameters, by name."""

    def run(self, problem: Problem, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output with the substituted tensors."""


class Problem(ABC):
    """One level of a multi-level problem. Subclass it and write :meth:`loss`.

    Args:
        name: the name by which the losses of other problems refer to it; a Python identifier.
        module: the network. Its parameters are updated in place, never replaced.
        optimizer: a ``torch.optim`` optimizer (or a compatible one) over parameters of ``module``. Parameters that it
            does not hold are constants.
        data: an iterable of batches, a generator function, a mapping of these (then a batch is a dictionary), or None
            if the loss needs no batch. When it ends, it starts over.
        scheduler: a learning-rate scheduler over ``optimizer``, stepped once after each step of this problem.
        steps: number of optimizer steps in each round of the engine.
        steps_ahead: number of virtual steps in the lookahead of an upper problem; None: the same as ``steps``.
        accumulate: number of batches in each step. The loss is their mean; they are evaluated one after another, so
            that only one needs memory at a time.
        warmup: number of rounds of the engine before this problem takes its first step.
        clip_norm: maximum Euclidean norm of the gradient over all parameters; larger gradients are scaled down to it.
        clip_ahead: whether gradients are also clipped in virtual steps.
        autocast: torch.bfloat16 or torch.float16 evaluates this problem's loss under torch.autocast; None does not.
            Curvature products run without autocast, unless the product has the option ``autocast``. With float16, the
            gradient is computed with an adaptive loss scale, and computed again with a smaller one if it overflows.
        hypergradient: how upper problems are differentiated through this one: the name of an estimator, its options,
            or None for the estimator of the engine.
        reads: {parameter of loss: problem}, where their names differ. {parameter: None} means that a parameter with a
            default value is not a problem.
        held: names of problems that the loss reads as constants: no hypergradient flows through that read.
        sometimes: names of problems that the loss reads only at some of its steps. A missing gradient for them is
            ignored; for all other reads it is an error.

    Attributes:
        steps_taken: number of steps that this problem took before the current one, virtual ones included. If a step is
            evaluated again, to differentiate it, the number is the same as the first time.
        looking_ahead: True while a virtual step (lookahead) or its derivative is evaluated. A loss may use it to
            differ from the loss of the real step.

    Raises:
        ConfigError: if arguments are invalid. Each message says what to pass instead.
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
        self._steps_taken = 0
        self.asks_steps_taken = False
        self._slots = _slots(module)
        self._aliases = _aliases(self._slots)
        self._unfilled = Unfilled(module)
        self._substitute: Substitute | None = None
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.variables = {n: p for n, p in module.named_parameters() if id(p) in owned and p.requires_grad}
        if not self.variables:
            raise ConfigError(
                f"problem {name!r}: its optimizer holds none of its module's trainable parameters; "
                "construct it as torch.optim.<class>(module.parameters(), ...) with the same module that you pass here"
            )
        foreign = len(owned - {id(p) for p in module.parameters()})
        if foreign:
            raise ConfigError(
                f"problem {name!r}: its optimizer holds {foreign} parameter(s) that are not of its module; give each "
                "problem its own optimizer, over the parameters of its module only"
            )

    @abstractmethod
    def loss(self, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss that this problem minimizes: a scalar tensor, as a pure function of the batch and the parameters.

        Override it with one parameter for each problem that it reads, named after that problem: ``loss(self, batch,
        teacher, arch)``. Call ``self(x)`` and ``teacher(x)`` to run the modules. Do not call ``.backward()`` or
        ``optimizer.step()`` in it.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the parameters of the current evaluation."""
        if self._substitute is None:
            return self.module(*args, **kwargs)
        return self._substitute.run(self, args, kwargs)

    def metrics(self) -> Mapping[str, Tensor]:
        """Further values to log, as {name: scalar tensor}. Override it; the default is empty."""
        return {}

    @property
    def steps_taken(self) -> int:
        """See :class:`Problem`; that a loss has asked is remembered, since compiled steps cannot count."""
        if self._substitute is not None and not self.asks_steps_taken:
            self.asks_steps_taken = True
        return self._steps_taken

    @steps_taken.setter
    def steps_taken(self, count: int) -> None:
        self._steps_taken = count

    @contextmanager
    def at_step(self, count: int | None) -> Iterator[None]:
        """A context in which ``steps_taken`` is ``count``; None: as it is."""
        before = self._steps_taken
        self._steps_taken = before if count is None else count
        try:
            yield
        finally:
            self._steps_taken = before

    @property
    def steps_now(self) -> int:
        """Number of steps in a round: ``steps_ahead`` while :attr:`looking_ahead`, otherwise ``steps``."""
        return self.steps_ahead if self.looking_ahead and self.steps_ahead is not None else self.steps

    @property
    def clip_norm_now(self) -> float | None:
        """The maximum norm of the gradient now; None while :attr:`looking_ahead` if ``clip_ahead`` is False."""
        return self.clip_norm if self.clip_ahead or not self.looking_ahead else None

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The parameters of the current evaluation, by name: for penalties, and for distances between problems."""
        return self.live_state().parameters if self._substitute is None else self._substitute.parameters

    def run_with(self, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output with ``tensors`` instead of its parameters and buffers of those names.

        Tied tensors stay tied. If forward assigns a new tensor to a buffer, ``tensors`` contains it afterwards.
        """
        every = tensors
        if self._aliases:
            every = tensors | {alias: tensors[name] for alias, name in self._aliases.items() if name in tensors}
        if torch.compiler.is_compiling():  # compiled checkpointing recomputes with the substituted tensors anyway
            if not every:
                return self.module(*args, **kwargs)
            # all names of tied tensors are given, so functional_call need not search for ties, which is slow
            output = functional_call(self.module, every, args, kwargs, tie_weights=False)
        else:
            with RecomputingWith(self.module, every):
                output = self._run_within(every, args, kwargs)
        if every is not tensors:
            tensors.update((name, every[name]) for name in tensors)
        return output

    def _run_within(self, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As functional_call, in a third of its time, because the owners of all tensors are already known."""
        own = []
        try:
            for name, tensor in tensors.items():
                owner, kind, key = self._slots[name]
                held = getattr(owner, kind)
                own.append((name, held, key, held[key]))
                held[key] = tensor
            output = self.module(*args, **kwargs)
        finally:
            for name, held, key, tensor in own:
                tensors[name], held[key] = held.get(key), tensor
            filled = self._unfilled.filled(remove=True)
        refuse_filled(self.name, filled)
        return output

    def substitute(self, substitute: Substitute | None) -> None:
        """Run ``substitute`` instead of the module from now on (None: the module itself again)."""
        self._substitute = substitute

    def batches_ahead(self, ahead: int = 0) -> tuple[Any, ...]:
        """The ``accumulate`` batches of the step after ``ahead`` more steps; the position does not change."""
        return tuple(self.stream.peek(ahead * self.accumulate + i) for i in range(self.accumulate))

    def advance(self) -> None:
        """Move on past the batches of the next step."""
        for _ in range(self.accumulate):
            self.stream.next()

    def live_state(self) -> State:
        """The module's own parameters and buffers."""
        tensors: dict[str, dict[str, Tensor]] = {"_parameters": {}, "_buffers": {}}
        for name, (owner, kind, key) in self._slots.items():
            tensor = getattr(owner, kind).get(key)
            if tensor is None:
                raise gone(self.name, name)
            if name not in self._aliases:
                tensors[kind][name] = tensor
        refuse_filled(self.name, self._unfilled.filled())
        return State(tensors["_parameters"], tensors["_buffers"], live=True)

    def state_dict(self) -> dict[str, Any]:
        """The state needed to resume bit for bit: module, optimizer, scheduler and position in the data."""
        return {
            "module": self.module.state_dict(),
            "buffers": self._other_buffers(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "data": self.stream.state_dict(),
            "steps_taken": self.steps_taken,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            CheckpointError: if the module, the optimizer or the scheduler does not match the saved one.
        """
        if (state["scheduler"] is None) != (self.scheduler is None):
            raise CheckpointError(
                f"problem {self.name!r}: only one of the checkpoint and the problem has a scheduler; resume with the "
                "arguments that the run started with"
            )
        self._refuse_other_optimizer(state["optimizer"])
        try:
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"problem {self.name!r} does not match the checkpoint: {error}") from error
        for name, buffer in self._other_buffers().items():
            buffer.copy_(state["buffers"][name])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.stream.load_state_dict(state["data"])
        self.steps_taken = state["steps_taken"]

    def _refuse_other_optimizer(self, state: Mapping[str, Any]) -> None:
        """Raise an error for the state of another optimizer class, which torch would load and then fail on later."""
        mine = {option for group in self.optimizer.param_groups for option in group}
        unknown = [option for group in state["param_groups"] for option in group if option not in mine]
        if unknown:
            raise CheckpointError(
                f"problem {self.name!r}: the checkpoint is of another optimizer than {type(self.optimizer).__name__}: "
                f"it has {', '.join(dict.fromkeys(unknown))}; resume with the optimizer that the run started with"
            )

    def _other_buffers(self) -> dict[str, Tensor]:
        """Buffers that are not in the module's state_dict (non-persistent ones)."""
        saved = self.module.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.module.named_buffers() if name not in saved}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, reads={list(self.node.reads)})"


def _arguments(problem: Problem, renames: Mapping[str, str | None]) -> dict[str, str]:
    """{parameter of loss: name of the problem that it reads}, from the signature of loss."""
    parameters = list(inspect.signature(problem.loss).parameters.values())
    if not parameters or parameters[0].kind not in (parameters[0].POSITIONAL_OR_KEYWORD, parameters[0].POSITIONAL_ONLY):
        raise ConfigError(f"problem {problem.name!r}: write its loss as loss(self, batch, <problems that it reads>)")
    declared = {}
    for parameter in parameters[1:]:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(
                f"problem {problem.name!r}: its loss takes {parameter}; write one named parameter per problem"
            )
        name = renames.get(parameter.name, parameter.name)
        if name is not None:
            declared[parameter.name] = name
        elif parameter.default is parameter.empty:
            raise ConfigError(
                f"problem {problem.name!r}: reads={{{parameter.name!r}: None}}, but that parameter of loss has no "
                f"default value; write loss(self, batch, ..., {parameter.name}=None)"
            )
    unknown = [key for key in renames if key not in {p.name for p in parameters[1:]}]
    if unknown:
        raise ConfigError(
            f"problem {problem.name!r}: reads has {', '.join(map(repr, unknown))}, which is not a parameter of its "
            f"loss; its parameters are {', '.join(repr(p.name) for p in parameters[1:]) or 'the batch only'}"
        )
    return declared


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _slots(module: nn.Module) -> dict[str, tuple[nn.Module, str, str]]:
    """{name: (submodule, "_parameters" or "_buffers", key there)} of every parameter and buffer.

    A tied tensor has several entries; one of a shared submodule has a single entry, under its first name.
    """
    found: dict[tuple[nn.Module, str, str], str] = {}
    parameters = module.named_parameters(remove_duplicate=False)
    for kind, named in (("_parameters", parameters), ("_buffers", module.named_buffers(remove_duplicate=False))):
        for name, _ in named:
            path, _, key = name.rpartition(".")
            found.setdefault((module.get_submodule(path), kind, key), name)
    return {name: slot for slot, name in found.items()}


def _aliases(slots: Mapping[str, tuple[nn.Module, str, str]]) -> dict[str, str]:
    """{further name of a tied tensor: its first name, under which named_parameters and named_buffers list it}."""
    first: dict[int, str] = {}
    tensors = {name: getattr(owner, kind)[key] for name, (owner, kind, key) in slots.items()}
    return {name: first[id(tensor)] for name, tensor in tensors.items() if first.setdefault(id(tensor), name) != name}
