"""One pure evaluation of a loss: parameters and buffers substituted, random state replayed, passes counted."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mlo.errors import GraphError
from mlo.levels.problem import Problem, State
from mlo.levels.read_cache import ReadCache, add_to
from mlo.levels.substitution import OwnSubstitute, ReadSubstitute, loss_with
from mlo.ops.autocast import lowered
from mlo.ops.compiler import SMALL_GRAPH, STEPS, Compiler
from mlo.ops.differentiable import twice_differentiable
from mlo.ops.rng import Randomness, outside_state, replay, same_outside
from mlo.steps import sgd
from mlo.steps.autograd_graph import SavedBytes, leaves_of
from mlo.steps.gradient_functions import Pass, Segment, pass_function, segment_function, unscaled


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation of a problem's loss gave.

    Attributes:
        loss: the scalar, with its graph.
        buffers: the module's buffers after it (running statistics, say); the module's own are untouched.
    """

    loss: Tensor
    buffers: Mapping[str, Tensor]


class Evaluator:
    """Evaluates losses of a set of problems, and counts the passes.

    Attributes:
        passes: {problem: {kind: forward passes of its module}}; kinds are "step" (a real step), "virtual" (a step of
            lookahead), "product" (a curvature product) and "read" (another problem's loss read it).
        dependences: (problem, problem that it reads) pairs of which it is known that the loss depends on what it reads.
        graph_bytes: {problem: memory of its gradient's graph, beyond states and batch}, once such a graph was kept.
    """

    def __init__(self, problems: Mapping[str, Problem], device: torch.device, compiler: Compiler | None = None) -> None:
        self.problems = problems
        self.device = device
        self.passes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.graph_bytes: dict[str, int] = {}
        self.dependences: set[tuple[str, str]] = set()
        self.compiler = compiler
        self._searched: set[str] = set()
        self._torch_only: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """What is known about the losses, and decides how later passes are run."""
        return {"torch_only": sorted(self._torch_only), "graph_bytes": dict(self.graph_bytes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._torch_only, self.graph_bytes = set(state["torch_only"]), dict(state["graph_bytes"])

    def compilation(self, name: str) -> tuple[tuple[str, ...], dict[str, str]]:
        """The compiled functions of a problem that have run so far, and {function that cannot be compiled: reason}."""
        if self.compiler is None:
            return (), {}
        ran = {_described(key) for key in self.compiler.ran if key[0] == name}
        failed = {_described(key): reason for key, reason in self.compiler.failed.items() if key[0] == name}
        if name in self.compiler.refused:
            failed["everything"] = self.compiler.refused[name]
        return tuple(sorted(ran)), failed

    def draws_outside(self, names: Collection[str]) -> bool:
        """Whether the loss of one of these may draw from NumPy's or Python's generators: until it has not, once."""
        return not self._torch_only.issuperset(names)

    def capture(self, name: str) -> Randomness:
        """The random state that the loss of ``name`` would draw from now."""
        return Randomness.capture(self.device, self.draws_outside((name,)))

    def evaluate(
        self,
        name: str,
        states: Mapping[str, State],
        batch: Any,
        *,
        kind: str,
        through: Collection[str] = (),
        read_cache: ReadCache | None = None,
        moving: Collection[str] = (),
        autocast: bool = True,
        randomness: Randomness | None = None,
        step: int | None = None,
    ) -> Evaluation:
        """The loss of problem ``name`` where it and all that it reads are in ``states``.

        Args:
            kind: what the pass is for, as it is counted.
            through: problems whose parameters the loss is to be differentiated for; the other reads are constants.
            read_cache: keeps the outputs of the problems read, for further evaluations of the same loss.
            moving: problems read whose states differ between those evaluations, so that nothing of them is kept.
            autocast: under the problem's own autocast, if it has one.
            randomness: drawn from instead of the present random state, which is then left alone.
            step: how many steps the problem had taken before the one that is evaluated; None: as many as it has.

        Raises:
            GraphError: if the loss is not a scalar tensor.
        """
        problem = self.problems[name]
        own = OwnSubstitute(states[name], self.passes[name], kind)
        substitutes: dict[str, OwnSubstitute | ReadSubstitute] = {name: own}
        for read in problem.node.reads:
            kept = None if read in moving else read_cache
            substitutes[read] = ReadSubstitute(
                states[read], self.passes[read], "read", read in through, kept, self.device
            )
        if read_cache is not None:
            read_cache.begin()
        outside = outside_state() if self.draws_outside((name,)) else None
        with (
            nullcontext() if randomness is None else replay(randomness, self.device),
            nullcontext() if step is None else problem.at_step(step),
            self._lowered(problem, autocast),
        ):
            try:
                loss = loss_with(self.problems, name, substitutes, batch)
            except (TypeError, ValueError) as error:
                if batch is None:
                    error.add_note(f"(problem {name!r} was given no data, so the batch of its loss is None)")
                elif isinstance(batch, Tensor):
                    error.add_note(
                        f"(the batch of problem {name!r} is a tensor of shape {tuple(batch.shape)}: each item of its "
                        "data is one batch; write data=[(x, y)] for one batch of two tensors)"
                    )
                raise
            if outside is not None and randomness is None:
                self._note_draws(name, outside)
        return Evaluation(loss, own.buffers)

    def differentiate(
        self,
        name: str,
        states: Mapping[str, State],
        batch: Any,
        *,
        of: Sequence[str],
        kind: str,
        leaves: bool = False,
        keep_graph: bool = False,
        read_cache: ReadCache | None = None,
        scale: float = 1.0,
        **options: Any,
    ) -> Pass:
        """The loss of problem ``name`` and its gradients; one pass.

        Args:
            of: problems (itself among them or not) for whose variables in ``states`` it is differentiated.
            leaves: differentiate for the outputs that ``read_cache`` cuts out of the graph, too.
            keep_graph: keep the gradients' own graph, for second derivatives.
            scale: of the loss while gradients are taken; they are divided by it.
            batch, kind, read_cache, options: as for :meth:`evaluate`.
        """
        reads = [read for read in of if read != name]
        through = {*options.pop("through", ()), *reads}
        if self.compiler is not None:
            compiled = {"kind": kind, "through": through, "keep_graph": keep_graph, "scale": scale, **options}
            done = self._compiled(name, states, batch, of, **compiled)
            if done is not None:
                return done
        measured = keep_graph and name not in self.graph_bytes and not self._recast(name, states)
        saved = SavedBytes(states.values(), batch) if measured else nullcontext()
        with twice_differentiable() if keep_graph else nullcontext(), saved:
            evaluation = self.evaluate(
                name, states, batch, kind=kind, through=through, read_cache=read_cache, **options
            )
            inputs = [states[n].parameters[v] for n in of for v in self.problems[n].variables]
            if leaves and read_cache is not None:
                inputs += read_cache.leaves
            gradients: dict[Tensor, Tensor] = {}
            searchable = not states[name].live and not options.get("moving")  # inner steps read what they recorded
            if searchable and name not in self._searched:
                self._searched.add(name)
                self._warn_of_strays(name, evaluation.loss, states)
            if not all(tensor.requires_grad for tensor in inputs):
                raise GraphError(
                    f"problem {name!r}: a parameter that its optimizer held at the start no longer requires gradients; "
                    "freeze parameters before the problem is made, or put them in a group with learning rate 0"
                )
            if inputs and evaluation.loss.requires_grad:
                loss = evaluation.loss if scale == 1.0 else evaluation.loss * scale
                found = self._gradients(name, loss, inputs, keep_graph)
                add_to(gradients, inputs, found)
        if isinstance(saved, SavedBytes):
            self.graph_bytes[name] = saved.total
        return Pass(evaluation.loss.detach(), unscaled(gradients, scale), evaluation.buffers)

    def _gradients(
        self, name: str, loss: Tensor, inputs: Sequence[Tensor], keep_graph: bool
    ) -> tuple[Tensor | None, ...]:
        try:
            return torch.autograd.grad(loss, inputs, allow_unused=True, create_graph=keep_graph)
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise GraphError(
                f"problem {name!r}: the graph of its loss is freed before its gradient is computed; return it without "
                "calling .backward() on it, and compute all of it in the call, without tensors from earlier calls"
            ) from error

    def product(
        self,
        name: str,
        states: Mapping[str, State],
        batch: Any,
        vector: Sequence[Tensor],
        *,
        of: Sequence[str],
        through: Collection[str] = (),
        **options: Any,
    ) -> dict[Tensor, Tensor] | None:
        """The derivative of <gradient in its own variables, vector> for the variables of the problems ``of``.

        It is compiled as a whole, with nothing kept and the gradient itself not computed where it does not count; None
        where that cannot be.
        """
        done = self._compiled(name, states, batch, (name,), through=through, vector=vector, second=of, **options)
        return None if done is None else done.gradients

    def at_once(self, name: str, states: Mapping[str, State], wanted: int) -> int:
        """How many of the next ``wanted`` steps of a problem :meth:`segment` takes; 0: none."""
        if name not in self._torch_only or wanted < 2:
            return 0
        if not self._compiles(name, states):
            return wanted
        if self.problems[name].asks_steps_taken:
            return 0
        return STEPS if wanted >= STEPS and self.graph_bytes[name] <= SMALL_GRAPH else 0

    def segment(
        self,
        name: str,
        states: Mapping[str, State],
        batches: Sequence[Any],
        groups: sgd.Groups,
        slots: sgd.Slots,
        *,
        kind: str,
        through: Collection[str],
    ) -> Segment | None:
        """As many steps of problem ``name``, by torch's SGD, as there are batches; a pass for each.

        Args:
            groups, slots: the hyperparameters of all steps, and what momentum there is before the first.
            kind, through: as for :meth:`evaluate`.

        Returns:
            None where they can only be taken one by one: their batches are not of one form, and so have no common code;
            or a step's loss reaches none of the problem's variables.
        """
        problem, before = self.problems[name], states[name]
        start = {n: p.detach().requires_grad_(n in problem.variables) for n, p in before.parameters.items()}
        begun = {n: {k: _leaf(value) for k, value in slot.items()} for n, slot in slots.items()}
        parameters = {name: start, **{read: states[read].parameters for read in problem.node.reads}}
        buffers = {n: states[n].buffers for n in parameters}
        reads = tuple((read, read in through) for read in problem.node.reads)
        numbers = sgd.group_numbers(problem)
        function = segment_function(self.problems, name, reads, numbers, self.device)
        with twice_differentiable(), problem.at_step(None):
            if self._compiles(name, states) and kind != "step":
                done = self._at_once(
                    name, function, (reads, *numbers.items()), parameters, buffers, batches, begun, groups
                )
            else:
                done = function(parameters, buffers, batches, begun, groups)
        if done is None or not done[0]:
            return None
        _, end, left, after, calls, losses = done
        for n, count in calls.items():
            self.passes[n][kind if n == name else "read"] += count
        return Segment(tuple(start[v] for v in problem.variables), begun, tuple(end), left, after, losses)

    def _at_once(
        self,
        name: str,
        function: Callable[..., Any],
        key: tuple[Any, ...],
        parameters: Any,
        buffers: Any,
        batches: Sequence[Any],
        slots: sgd.Slots,
        groups: sgd.Groups,
    ) -> Any:
        """A segment by compiled code; None if it cannot be."""
        assert self.compiler is not None
        aliased, forms = zip(*map(_aliased, batches), strict=True)
        if any(form != forms[0] for form in forms):
            return None
        full = (name, f"{len(batches)} steps as one", *key, None)
        if full not in self.compiler:
            self.compiler.add(full, function, leaves_graph=True)
        rates = tuple({**group, "lr": torch.tensor(group["lr"], dtype=torch.float64)} for group in groups)
        return self.compiler.call(full, parameters, buffers, aliased, slots, rates, spare=True)

    def _compiles(self, name: str, states: Mapping[str, State]) -> bool:
        """Whether passes of a problem are compiled if possible; not in an evaluation in another precision."""
        return self.compiler is not None and name not in self.compiler.refused and not self._recast(name, states)

    def _compiled(
        self,
        name: str,
        states: Mapping[str, State],
        batch: Any,
        of: Sequence[str],
        *,
        kind: str,
        through: Collection[str],
        keep_graph: bool = False,
        vector: Sequence[Tensor] | None = None,
        scale: float = 1.0,
        second: Sequence[str] = (),
        moving: Collection[str] = (),
        autocast: bool = True,
        randomness: Randomness | None = None,
        step: int | None = None,
        read_cache: ReadCache | None = None,  # what is compiled shares nothing with other evaluations
    ) -> Pass | None:
        """:meth:`differentiate`, or :meth:`product` with a ``vector``, by compiled code; None if it cannot be."""
        problem, compiler = self.problems[name], self.compiler
        known = name in self._torch_only and (name in self.graph_bytes or not keep_graph)  # by a pass without
        if compiler is None or moving or not known or not self._compiles(name, states):
            return None
        lowered = problem.autocast if autocast else None
        what = "product" if second else "gradient with its graph" if keep_graph else "gradient"
        key = (name, what, tuple(of), tuple(second), tuple(sorted(through)), lowered)
        if key not in compiler:
            reads = tuple((read, read in through) for read in problem.node.reads)
            first, then = (tuple((n, v) for n in names for v in self.problems[n].variables) for names in (of, second))
            function = pass_function(self.problems, name, reads, first, then, keep_graph, self.device, lowered)
            compiler.add(key, function, leaves_graph=keep_graph)
        names = (name, *problem.node.reads)
        wanted = {*of, *second}
        parameters: dict[str, Mapping[str, Tensor]] = {
            # without a kept graph, pass fresh leaves, so that live parameters and copies share one compiled function
            n: states[n].parameters if keep_graph else _leaves(states[n].parameters, n in wanted)
            for n in names
        }
        buffers = {n: states[n].buffers for n in names}
        with (
            nullcontext() if randomness is None else replay(randomness, self.device),
            problem.at_step(step),
            twice_differentiable() if keep_graph or second else nullcontext(),
        ):
            by = None if scale == 1.0 else torch.tensor(scale, device=self.device)
            begun = self.capture(name)
            done = compiler.call(key, parameters, buffers, batch, vector, by)
            if done is None:  # it may have drawn before it failed
                begun.restore(self.device)
        if done is None:
            return None
        loss, found, after, calls = done
        for n, count in calls.items():
            self.passes[n][kind if n == name else "read"] += count
        gradients: dict[Tensor, Tensor] = {}
        add_to(gradients, [states[n].parameters[v] for n in second or of for v in self.problems[n].variables], found)
        return Pass(loss, unscaled(gradients, scale), after)

    def _warn_of_strays(self, name: str, loss: Tensor, states: Mapping[str, State]) -> None:
        """Warn of a loss that uses a module's own parameters instead of the substituted ones."""
        used = {id(p) for state in states.values() for p in state.parameters.values()}
        named = [(n, v, p) for n, problem in self.problems.items() for v, p in problem.variables.items()]
        own = {id(p): f"{v!r} of the module of {n!r}" for n, v, p in named}
        strays = sorted(own[i] for i in leaves_of(loss) if i in own and i not in used)
        if not strays:
            return
        reason = f"its loss uses {', '.join(strays)} directly, which is treated as a constant"
        warnings.warn(f"problem {name!r}: {reason}; call the problem, or use its .params[name]", stacklevel=2)
        if self.compiler is not None:
            self.compiler.refuse(name, reason)

    def _note_draws(self, name: str, before: tuple[Any, Any]) -> None:
        if same_outside(before, outside_state()):
            self._torch_only.add(name)
        elif self.compiler is not None and name not in self.compiler.refused:
            self.compiler.refuse(name, "its loss draws from NumPy's or Python's random generator; use torch's")

    def _recast(self, name: str, states: Mapping[str, State]) -> bool:
        """Whether a problem is evaluated in another precision than its own."""
        variables = self.problems[name].variables.items()
        return any(states[name].parameters[n].dtype != p.dtype for n, p in variables)

    def _lowered(self, problem: Problem, wanted: bool) -> AbstractContextManager[Any]:
        """The problem's autocast, or none at all; an engine is in none."""
        dtype = problem.autocast if wanted else None
        return nullcontext() if dtype is None else lowered(self.device.type, dtype)


def _described(key: Sequence[Hashable]) -> str:
    """What a compiled function computes, which its key begins with, and in which precision, with which it ends."""
    what, lowered = key[1], key[-1]
    return f"{what} in {str(lowered).removeprefix('torch.')}" if lowered is not None else str(what)


def _leaves(parameters: Mapping[str, Tensor], wanted: bool) -> dict[str, Tensor]:
    """Aliases, which require gradients where the parameters do and these are ``wanted``."""
    return {n: p.detach().requires_grad_(wanted and p.requires_grad) for n, p in parameters.items()}


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) else value


def _aliased(batch: Any) -> tuple[Any, tuple[Any, ...]]:
    """The batch with aliases of its tensors, so that compiled code does not depend on shared batches, and its form."""
    parts, structure = tree_flatten(batch)
    form = tuple((p.shape, p.dtype) if isinstance(p, Tensor) else type(p) for p in parts)
    return tree_unflatten([p.detach() if isinstance(p, Tensor) else p for p in parts], structure), (structure, *form)
