"""A level of a multi-level problem: module, optimizer, data, and a loss whose signature names what it reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mlo.errors import CheckpointError, ConfigError
from mlo.levels.batches import Data, open_stream
from mlo.levels.graph import Node
from mlo.levels.places import Places
from mlo.levels.state import State
from mlo.levels.structure import Structure
from mlo.levels.validation import arguments_of, fault_of_name, faults_of_numbers, faults_of_parts

_HOOKS = attrgetter("_backward_hooks")


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
        step_in_round: ``steps_taken % steps``, the position of the current step in its round. A loss that asks for it,
            and not for ``steps_taken``, can be captured (``Engine(capture=True)``).
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
        self.arguments = arguments_of(name, self.loss, reads or {})
        self.node = Node(name, tuple(dict.fromkeys(self.arguments.values())), _names(held), _names(sometimes))
        self.stream = open_stream(data, name)
        self.step_number = 0
        self.asks_steps_taken = self.asks_total = False
        self.substitute: Substitute | None = None
        owned = {id(p): group for group, of in enumerate(optimizer.param_groups) for p in of["params"]}
        self.variables = {n: p for n, p in module.named_parameters() if id(p) in owned and p.requires_grad}
        self.group_numbers = [owned[id(p)] for p in self.variables.values()]
        self.places = Places(name, module, self.variables)
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
        self.structure = Structure(self)

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
        """See :class:`Problem`; that a loss has asked is remembered, since compiled and captured steps cannot count."""
        if self.substitute is not None and not self.asks_total:
            self.asks_steps_taken = self.asks_total = True
        return self.step_number

    @steps_taken.setter
    def steps_taken(self, count: int) -> None:
        self.step_number = count

    @property
    def step_in_round(self) -> int:
        """See :class:`Problem`; compiled steps cannot count, but all captured rounds have the same steps."""
        if self.substitute is not None and not self.asks_steps_taken:
            self.asks_steps_taken = True
        return self.step_number % self.steps

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
        if self.substitute is None:
            state = self.live_state()
            return self.places.named_parameters((*state.variables, *state.constants))
        return self.places.named_parameters(self.substitute.parameters)

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
        """The module's own parameters and buffers; aliases of variables with hooks, which torch would run on them."""
        tensors = self.places.held()
        first, second = len(self.variables), self.places.parameters
        variables, live = tensors[:first], not has_hooks(self.variables)
        if not live:
            variables = tuple([variable.detach().requires_grad_(variable.requires_grad) for variable in variables])
        return State(variables, tensors[first:second], tensors[second:], live=live)

    def state_with(self, parameters: Mapping[str, Tensor]) -> State:
        """The live state with other parameters of these names.

        Raises:
            ConfigError: if it has no parameter of a name.
        """
        live, names = self.live_state(), self.places.names[: self.places.parameters]
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
        of, found = self.optimizer.state, list[Mapping[str, Any]]()
        for variable in self.variables.values():
            found.append({**of[variable]} if variable in of else {})
        return tuple(found)

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
        """Continue from what :meth:`state_dict` returned, but for the position in the data.

        :mod:`mlo.training.state_checks` checks it before, and sets the position.

        Raises:
            CheckpointError: if the module or the optimizer does not accept its state.
        """
        try:
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"problem {self.name!r} does not match the checkpoint: {error}") from error
        for name, buffer in self._other_buffers().items():
            buffer.copy_(state["buffers"][name])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.steps_taken = state["steps_taken"]

    def _other_buffers(self) -> dict[str, Tensor]:
        """Buffers that are not in the module's state_dict (non-persistent ones)."""
        saved = self.module.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.module.named_buffers() if name not in saved}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, reads={list(self.node.reads)})"


def has_hooks(variables: Mapping[str, Tensor]) -> bool:
    """Whether one of the variables has a hook of ``Tensor.register_hook``, which changes its gradient."""
    return any(map(_HOOKS, variables.values()))


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
