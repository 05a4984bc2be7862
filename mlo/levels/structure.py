"""What a problem was made with: the parameters of its module and the groups of its optimizer. It may not change."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, getitem, is_, itemgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mlo.errors import GraphError

if TYPE_CHECKING:
    from mlo.levels.problem import Problem

_REQUIRES_GRAD, _PARAMS = attrgetter("requires_grad"), itemgetter("params")
_RAISE = " (later, raise it in optimizer.param_groups, and with a scheduler also in scheduler.base_lrs)"
_AGAIN = "or make the problem and its engine again after the change (mlo.Problem, mlo.Engine)"


class Structure:
    """The parameters and submodules of a problem's module, and the parameters that its optimizer holds, as they were.

    What a problem trains is found once. A parameter that joins later would silently never move.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._note_module()
        groups = problem.optimizer.param_groups
        self._sizes = [len(group["params"]) for group in groups]
        self._params = [p for group in groups for p in group["params"]]
        self._flags = [*map(_REQUIRES_GRAD, self._params)]

    def _note_module(self) -> None:
        module = self._problem.module
        parts = [*module.modules()]
        dictionaries: list[dict[str, Any]] = [d for part in parts for d in (part._parameters, part._modules)]
        self._dictionaries, self._count = dictionaries, sum(map(len, dictionaries))
        places = [(holder, key) for holder in dictionaries for key, held in holder.items() if held is not None]
        self._holders, self._keys = [holder for holder, _ in places], [key for _, key in places]
        self._held = [holder[key] for holder, key in places]
        self._names = dict(module.named_parameters(remove_duplicate=False))
        self._modules = dict(module.named_modules(remove_duplicate=False))

    def check(self) -> None:
        """Raise a GraphError if it has changed."""
        try:
            same = all(map(is_, map(getitem, self._holders, self._keys), self._held))
        except KeyError:
            same = False
        if not (same and sum(map(len, self._dictionaries)) == self._count):
            self._check_module()
        groups = [*map(_PARAMS, self._problem.optimizer.param_groups)]
        if [*map(len, groups)] != self._sizes or not all(map(is_, chain.from_iterable(groups), self._params)):
            self._refuse_groups()
        if [*map(_REQUIRES_GRAD, self._params)] != self._flags:
            self._refuse_flags()

    def _check_module(self) -> None:
        """Raise an error for a change that matters; others (constants that are replaced, or are new) are noted."""
        problem, module = self._problem, self._problem.module
        problem.places.held()  # says what is gone
        modules = dict(module.named_modules(remove_duplicate=False))
        for path, part in self._modules.items():
            if modules.get(path) is not part:
                raise GraphError(
                    f"problem {problem.name!r}: {path!r} of its module is another submodule than when the problem was "
                    f"made, so virtual steps would not move its parameters; change the module first, {_AGAIN}"
                )
        variables = {id(p): name for name, p in problem.variables.items()}
        for name, tensor in module.named_parameters(remove_duplicate=False):
            before = self._names.get(name)
            if before is not tensor and (id(before) in variables or id(tensor) in variables):
                raise GraphError(
                    f"problem {problem.name!r}: the parameter {name!r} of its module is another tensor than when the "
                    "problem was made, so training would not move it; write into the parameter (parameter.data.copy_, "
                    f"module.load_state_dict) instead of replacing it, {_AGAIN}"
                )
        self._note_module()

    def _refuse_groups(self) -> None:
        now = [p for group in self._problem.optimizer.param_groups for p in group["params"]]
        known = {*map(id, self._params)}
        added = [self._name(p) for p in now if id(p) not in known]
        what = f"holds the parameter {', '.join(added)} by now" if added else "holds its parameters in other groups"
        raise GraphError(
            f"problem {self._problem.name!r}: its optimizer {what}, unlike when the problem was made; make it with all "
            f"groups from the start, with learning rate 0 for those that are not trained yet{_RAISE}, {_AGAIN}"
        )

    def _refuse_flags(self) -> None:
        for parameter, before in zip(self._params, self._flags, strict=True):
            if before and not parameter.requires_grad:
                raise GraphError(
                    f"problem {self._problem.name!r}: a parameter that its optimizer held at the start no longer "
                    f"requires gradients: {self._name(parameter)}; freeze parameters before the problem is made, or "
                    "put them in a group with learning rate 0"
                )
            if parameter.requires_grad and not before:
                raise GraphError(
                    f"problem {self._problem.name!r}: the parameter {self._name(parameter)} requires gradients by now, "
                    "but did not when the problem was made, so it would never move; let it require them from the "
                    f"start, in a group of the optimizer with learning rate 0 until it is trained{_RAISE}, {_AGAIN}"
                )

    def _name(self, parameter: Tensor) -> str:
        return next((repr(n) for n, p in self._problem.module.named_parameters() if p is parameter), "of no module")
