"""What the first evaluation of a loss shows about its operators, and errors for those that cannot be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mlo.errors import GraphError
from mlo.levels.batch_trees import refuse_iterators
from mlo.ops import derivatives
from mlo.ops.derivatives import Fault, Mode
from mlo.ops.rng import Randomness
from mlo.ops.vectors import Vector
from mlo.steps.attributes import Attributes
from mlo.steps.autograd_graph import nodes_of, nodes_towards

if TYPE_CHECKING:
    from mlo.steps.evaluation import MicroBatch
    from mlo.steps.level import Level

_NESTED = "Nested forward mode AD"
#: the loss with its graph, its gradients, and the buffers afterwards
Taken = tuple[Tensor, Sequence[Tensor | None], Vector]


class Operators(NamedTuple):
    """What is to be done for the operators of a loss.

    Attributes:
        twice: whether its own gradient takes second derivatives, because it differentiates its model.
        elementary: whether second derivatives are taken with :class:`mlo.ops.differentiable.ElementaryOperators`.
        functions: the names of the autograd.Functions in it, for messages.
    """

    twice: bool = False
    elementary: bool = False
    functions: tuple[str, ...] = ()

    def needs_others(self, before: Operators, again: bool) -> bool:
        """Whether one with those of ``before`` was wrong, if its gradient is to be differentiated ``again``."""
        elementary = again and self.elementary and not before.elementary
        return elementary or (self.twice and not before.twice)


def operators_of(level: Level, loss: Tensor, variables: Sequence[Tensor]) -> Operators:
    """What the graph of a loss shows, where it depends on the level's ``variables``: only this is differentiated again.

    Raises:
        GraphError: if it has an operator whose second derivative, as the level's products take it, torch has not, or
            has wrong.
    """
    names, functions = set[str](), dict[str, type[torch.autograd.Function]]()
    for node in nodes_towards(loss, variables):
        name = derivatives.name_of(node)
        names.add(name)
        function = derivatives.custom_function(node)
        if function is not None:
            functions[name] = function
    replaced = set[str]()
    for mode in sorted(level.modes):
        faults = derivatives.FAULTS[mode]
        found = [faults[name] for name in sorted(names & faults.keys())]
        replaced |= names & derivatives.REPLACED[mode]
        found += [f for n in functions if n not in replaced and (f := derivatives.fault_of(functions[n], mode))]
        if found:
            raise refused(level, mode, found[0])
    known = level.operators
    if known.elementary and replaced:
        raise refused(level, "reverse", Fault(f"{replaced.pop()} by a private name", "call torch.nn.functional", True))
    # its second derivative is wrong; those of other layers are right, or they raise an error
    wrong = "WeightNormInterfaceBackward0" in names and derivatives.differentiates(names)
    return Operators(
        twice=known.twice or wrong,
        elementary=known.elementary or bool(replaced),
        functions=tuple(sorted({function.__name__ for function in functions.values()})),
    )


def first_evaluation(
    level: Level, take: Callable[[MicroBatch], Taken], micro: MicroBatch, variables: Sequence[Tensor], again: bool
) -> Taken:
    """``take(micro)`` for a level that was never evaluated: with other operators, if its loss turns out to need them.

    Args:
        take: evaluates the loss and its gradient; the first result is the loss with its graph.
        variables: of the level.
        again: whether the gradient will be differentiated.

    Raises:
        GraphError: if an operator cannot be differentiated as the level's products do, or if the loss has another value
            when it is evaluated again.
    """
    begun = None if micro.randomness else Randomness.capture(level.device, level.draws_outside)

    def repeated() -> Taken:
        if begun is not None:  # it draws what the first one drew, or would have drawn
            begun.restore(level.device)
        return take(micro)

    attributes = None
    if level.repeats:
        refuse_iterators(micro.batch, level.name)
        attributes = Attributes(level)
    try:
        with forward_ad.dual_level():  # forward-mode derivatives of the loss itself show here: they cannot be nested
            done = take(micro)
        before, level.operators = level.operators, operators_of(level, done[0], variables)
        complete = not level.operators.needs_others(before, again)
    except GraphError as error:  # it may differentiate its model, with operators that have only one derivative
        if not _differentiates(str(error.__cause__), level.modes):
            raise
        before, level.operators, complete = level.operators, Operators(twice=True, elementary=True), False
    if not complete:
        done = repeated()
        level.operators = operators_of(level, done[0], variables)
    elif level.operators.elementary and not before.elementary:  # as products will be taken, to see what is replaced
        with level.differentiable(again=True):
            operators_of(level, repeated()[0], variables)
    if attributes is not None and (attributes.hooked or attributes.changed()):
        first = done[0].detach()
        del done  # its graph, before the next one
        done = repeated()
        attributes.check(first, done[0].detach())
    level.seen = True
    if level.operators.elementary and level.compiler is not None:
        level.compiler.refuse(level.name, "its loss has operators that are replaced by elementary ones")
    return done


def _differentiates(message: str, modes: Collection[Mode]) -> bool:
    """Whether an error of torch shows that a loss differentiates its model, in a way that products allow."""
    if _NESTED in message:
        return "forward" not in modes
    found = derivatives.fault_in(message)
    return found is not None and found[0] == "reverse"


def needs_graph(loss: Tensor) -> bool:
    """Whether the gradient of a loss has a correct forward derivative only if it is taken with a graph of its own."""
    return any([node.name() in derivatives.NEEDS_GRAPH for node in nodes_of([loss])])


WITHOUT_SECOND = "use an estimator without second derivatives, such as 'darts'"


def refused(level: Level, mode: Mode, fault: Fault) -> GraphError:
    """The error for an operator that cannot be differentiated again."""
    derivative = "second derivative" if mode == "reverse" else "forward-mode derivative"
    found = f"whose {derivative} is wrong" if fault.wrong else f"which has no {derivative}"
    needed = "" if mode == "reverse" else ", but the product 'forward' needs it"
    without = f"; or {WITHOUT_SECOND}" if mode == "reverse" else ""
    return GraphError(
        f"problem {level.name!r}: its loss uses {fault.operator}{_where(level, fault.operator)}, {found} in torch "
        f"{torch.__version__}{needed}; {fault.instead}{without}"
    )


def reraise(level: Level, error: RuntimeError) -> NoReturn:
    """Raise an error of autograd in other words, if it is one that a user can correct; otherwise as it is."""
    found = _explained(level, error)
    if found is None:
        raise error
    raise found from error


def _explained(level: Level, error: RuntimeError) -> GraphError | None:
    if "backward through the graph a second time" in str(error):
        return GraphError(
            f"problem {level.name!r}: the graph of its loss is freed before its gradient is computed; return it "
            "without calling .backward() on it, and compute all of it in the call, without tensors from earlier calls"
        )
    if "modified by an inplace operation" in str(error):
        return GraphError(
            f"problem {level.name!r}: a tensor that the gradient of its loss needs was written into since it was used. "
            "Either the loss or a module uses a parameter itself, from an attribute, a list or a closure, which a real "
            "step moves; then call the problem, or use its .params[name] (in a module: self.layer.weight). Or an "
            "operation in place (x += y, x.mul_(y)) changes what another one needs; then write it without"
        )
    if _NESTED in str(error):
        return GraphError(
            f"problem {level.name!r}: its loss takes a forward-mode derivative (torch.func.jvp, jacfwd or hessian), "
            "inside of which the product 'forward' cannot take another; use the product 'exact'"
        )
    found = derivatives.fault_in(str(error))
    return None if found is None else refused(level, *found)


def _where(level: Level, operator: str) -> str:
    """The submodules that are of the operator, by their names."""
    wanted, found = operator.partition(" ")[0].replace("_", "").lower(), list[str]()
    for problem in (level.problem, *[read.problem for read in level.reads.values()]):
        named: Iterable[tuple[str, torch.nn.Module]] = problem.module.named_modules()
        for name, module in named:
            if type(module).__name__.lower().rstrip("123d") == wanted.rstrip("123d"):
                found.append(
                    f"{name!r} of the module of {problem.name!r}" if name else f"the module of {problem.name!r}"
                )
    return f" (in {', '.join(found)})" if found else ""
