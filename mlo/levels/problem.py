"""A level of a multi-level problem: module, optimizer, data, and a loss whose signature names what it reads."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import islice, repeat
from operator import getitem, is_not
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
from mlo.levels.state import State
from mlo.levels.validation import fault_of_name, faults_of_numbers, faults_of_parts
from mlo.ops.activation_checkpointing import RUNNING


class Substitute(Protocol):
    """What runs instead of a problem's module while a loss is evaluated: the module with other tensors."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The substituted parameters: the variables, then the constants."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        self.step_number = 0
        self.asks_steps_taken = False
        self._unfilled = Unfilled(module)
        self.substitute: Substitute | None = None
        owned = {id(p): group for group, of in enumerate(optimizer.param_groups) for p in of["params"]}
        self.variables = {n: p for n, p in module.named_parameters() if id(p) in owned and p.requires_grad}
        self.group_numbers = [owned[id(p)] for p in self.variables.values()]
        self._places = _Places(module, self.variables)
        if not self.variables:
            raise ConfigError(
                f"problem {name!r}: its optimizer holds none of its module's trainable parameters; "
                "construct it as torch.optim.<class>(module.parameters(), ...) with the same module that you pass here"
            )
        foreign = len(owned.keys() - {id(p) for p in module.parameters()})
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
        if self.substitute is None:
            return self.module(*args, **kwargs)
        return self.substitute.run(args, kwargs)

    def metrics(self) -> Mapping[str, Tensor]:
        """Further values to log, as {name: scalar tensor}. Override it; the default is empty."""
        return {}

    @property
    def steps_taken(self) -> int:
        """See :class:`Problem`; that a loss has asked is remembered, since compiled steps cannot count."""
        if self.substitute is not None and not self.asks_steps_taken:
            self.asks_steps_taken = True
        return self.step_number

    @steps_taken.setter
    def steps_taken(self, count: int) -> None:
        self.step_number = count

    @property
    def steps_now(self) -> int:
        """Number of steps in a round: ``steps_ahead`` while :attr:`looking_ahead`, otherwise ``steps``."""
        return self.steps_ahead if self.looking_ahead and self.steps_ahead is not None else self.steps

    @property
    def clip_norm_now(self) -> float | None:
        """The maximum norm of the gradient now; None while :attr:`looking_ahead` if ``clip_ahead`` is False."""
        return self.clip_norm if self.clip_ahead or not self.looking_ahead else None

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """The names of the module's buffers."""
        return self._places.names[self._places.parameters :]

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The parameters of the current evaluation, by name: for penalties, and for distances between problems."""
        if self.substitute is None:
            state = self.live_state()
            return self._places.named_parameters((*state.variables, *state.constants))
        return self._places.named_parameters(self.substitute.parameters)

    def run_with(self, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output with ``tensors`` (variables, constants, buffers) instead of its own.

        With fewer tensors, they are the last ones, and the others stay. Tied tensors stay tied. If forward assigns a
        new tensor to a buffer, ``tensors`` contains it afterwards.
        """
        places = self._places
        if torch.compiler.is_compiling():  # compiled checkpointing recomputes with the substituted tensors anyway
            every = places.named(tensors)
            # all names of tied tensors are given, so functional_call need not search for ties, which is slow
            if not every:
                return self.module(*args, **kwargs)
            output = functional_call(self.module, every, args, kwargs, tie_weights=False)
            tensors[:] = [every[name] for name in places.names[len(places.names) - len(tensors) :]]
            return output
        # as functional_call, in a third of its time, because the owners of all tensors are already known
        begin = len(places.names) - len(tensors)
        own = places.exchange(begin, tensors) if tensors else None
        RUNNING.append((self.module, places, tensors))
        try:
            output = self.module(*args, **kwargs)
        finally:
            RUNNING.pop()
            if own is not None:
                tensors[:] = places.exchange(begin, own)
            filled = self._unfilled.filled(remove=True)
        if filled:
            refuse_filled(self.name, filled)
        return output

    def batches_ahead(self, ahead: int = 0) -> tuple[Any, ...]:
        """The ``accumulate`` batches of the step after ``ahead`` more steps; the position does not change."""
        first = ahead * self.accumulate
        if self.accumulate == 1:
            return (self.stream.peek(first),)
        return tuple([self.stream.peek(first + index) for index in range(self.accumulate)])

    def advance(self) -> None:
        """Move on past the batches of the next step."""
        for _ in range(self.accumulate):
            self.stream.next()

    def live_state(self) -> State:
        """The module's own parameters and buffers."""
        tensors = self._places.held()
        if missing := self._places.missing(tensors):
            raise gone(self.name, missing)
        if filled := self._unfilled.filled():
            refuse_filled(self.name, filled)
        first, second = len(self.variables), self._places.parameters
        return State(tensors[:first], tensors[first:second], tensors[second:], live=True)

    def state_with(self, parameters: Mapping[str, Tensor]) -> State:
        """The live state with other parameters of these names.

        Raises:
            ConfigError: if it has no parameter of a name.
        """
        live, names = self.live_state(), self._places.names[: self._places.parameters]
        unknown = [name for name in parameters if name not in names]
        if unknown:
            raise ConfigError(
                f"problem {self.name!r} has no parameter {', '.join(map(repr, unknown))}; "
                f"its parameters are {', '.join(map(repr, names))}"
            )
        held = zip(names, (*live.variables, *live.constants), strict=True)
        moved = [parameters[n].detach().requires_grad_() if n in parameters else tensor for n, tensor in held]
        count = len(live.variables)
        return State(tuple(moved[:count]), tuple(moved[count:]), live.buffers)

    def optimizer_slots(self) -> tuple[Mapping[str, Any], ...]:
        """What the optimizer keeps for each variable, in its own tensors."""
        of = self.optimizer.state
        return tuple([{**of[variable]} if variable in of else {} for variable in self.variables.values()])

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


class _Places:
    """Where the tensors of a module are kept: its variables, then its other parameters, then its buffers.

    Attributes:
        names: of all of them, as named_parameters and named_buffers list them.
        parameters: how many of them are parameters.
    """

    def __init__(self, module: nn.Module, variables: Mapping[str, Tensor]) -> None:
        found: dict[tuple[int, str], tuple[str, dict[str, Any], str, int]] = {}
        named = [(name, "_parameters") for name, _ in module.named_parameters(remove_duplicate=False)]
        named += [(name, "_buffers") for name, _ in module.named_buffers(remove_duplicate=False)]
        for name, kind in named:
            path, _, key = name.rpartition(".")
            owner = getattr(module.get_submodule(path), kind)  # one of a shared submodule is listed once
            rank = 2 if kind == "_buffers" else name not in variables
            found.setdefault((id(owner), key), (name, owner, key, int(rank)))
        first = {id(owner[key]): name for name, owner, key, _ in reversed(found.values())}
        listed = [place for place in found.values() if first[id(place[1][place[2]])] == place[0]]
        listed.sort(key=lambda place: place[3])
        self.names = tuple([name for name, *_ in listed])
        self.parameters = sum(rank < 2 for *_, rank in listed)
        self._holders, self._keys = [holder for _, holder, _, _ in listed], [key for _, _, key, _ in listed]
        numbers = {name: number for number, name in enumerate(self.names)}
        #: further names of tied tensors: (name, holder, key, number of the tensor)
        self._ties = [
            (name, holder, key, numbers[first[id(holder[key])]])
            for name, holder, key, _ in found.values()
            if first[id(holder[key])] != name
        ]
        order = {name: rank for rank, (name, *_) in enumerate(found.values())}
        self._in_order = sorted(range(self.parameters), key=lambda number: order[self.names[number]])
        self._ordered = self._in_order == list(range(self.parameters))

    def held(self) -> tuple[Any, ...]:
        """The module's own tensors; None for one that is gone."""
        try:
            return tuple(map(getitem, self._holders, self._keys))
        except KeyError:
            return tuple([holder.get(key) for holder, key in zip(self._holders, self._keys, strict=True)])

    def missing(self, held: Sequence[Any]) -> str | None:
        """The name of a tensor that is gone, if there is one."""
        if all(map(is_not, held, repeat(None))) and all(
            [holder.get(key) is not None for _, holder, key, _ in self._ties]
        ):
            return None
        named = [*zip(self.names, held, strict=True), *[(name, holder.get(key)) for name, holder, key, _ in self._ties]]
        return next(name for name, tensor in named if tensor is None)

    def exchange(self, begin: int, tensors: Sequence[Any]) -> list[Any]:
        """Put ``tensors`` into the module, from the number ``begin`` on; what was there before."""
        before = []
        places = zip(islice(self._holders, begin, None), islice(self._keys, begin, None), tensors, strict=True)
        for holder, key, tensor in places:
            before.append(holder.get(key))
            holder[key] = tensor
        for _, holder, key, number in self._ties:
            if number >= begin:
                holder[key] = tensors[number - begin]
        return before

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The last tensors under all their names."""
        begin = len(self.names) - len(tensors)
        found = dict(zip(self.names[begin:], tensors, strict=True))
        return found | {name: tensors[number - begin] for name, _, _, number in self._ties if number >= begin}

    def named_parameters(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """{name: parameter}, in the order of the module."""
        if self._ordered:
            return dict(zip(self.names, tensors, strict=False))
        return {self.names[number]: tensors[number] for number in self._in_order}
