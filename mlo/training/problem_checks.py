"""What a user may change between the calls of an engine, and what would then be wrong without an error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from mlo.errors import ConfigError
from mlo.hypergradient import Estimator
from mlo.levels.problem import Problem, has_hooks
from mlo.ops.writes import Values
from mlo.steps.hooks import refuse_module_hooks
from mlo.steps.trials import check_own_step
from mlo.steps.written import refusal, refuse_max_norm

_PLAIN = frozenset((int, float, bool, type(None), str))
_HOOKS = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")
_MODULE_HOOKS = attrgetter("_backward_hooks", "_backward_pre_hooks")


class Checks:
    """Checks problems when an engine is made, on its device, and before each of its calls.

    What costs more than a comparison is checked at first, and after a change.

    Args:
        problems: by name.
        estimators: {problem: the estimator with which it is differentiated through}, for those that are.
        virtual: the problems whose steps may be virtual.
    """

    def __init__(
        self, problems: Mapping[str, Problem], estimators: Mapping[str, Estimator], virtual: Collection[str]
    ) -> None:
        self._problems, self._estimators, self._virtual = problems, estimators, virtual
        self._differentiated = {read for name in estimators for read in (name, *problems[name].node.reads)}
        self._modules = {name: [*problem.module.modules()] for name, problem in problems.items()}
        self._seen: dict[str, Any] = {}
        for problem in problems.values() if len(problems) > 1 else ():
            refuse_max_norm(problem)

    def run(self) -> None:
        """Raise a GraphError or ConfigError for what is not supported."""
        for name, problem in self._problems.items():
            problem.structure.check()
            _refuse_learned(problem)
            step = vars(problem.optimizer).get("step"), type(problem.optimizer).step
            seen = step, hooks_of(problem, self._modules[name])
            if seen != self._seen.get(name):
                self._check(name, problem)
                self._seen[name] = seen

    @contextmanager
    def unwritten(self) -> Iterator[None]:
        """A context after which all parameters have the values of before.

        Raises:
            GraphError: at its end, if one of them had another value.
        """
        held = [
            (problem, name, p) for problem in self._problems.values() for name, p in problem.module.named_parameters()
        ]
        tensors = [parameter for _, _, parameter in held]
        values, written = Values(tensors), list[bool]()
        try:
            yield
        finally:
            written = values.put_back()
        if any(written):
            problem, name, _ = held[written.index(True)]
            raise refusal(problem.name, problem, name, restored=True)
        self.run()

    def _check(self, name: str, problem: Problem) -> None:
        _refuse_sparse_state(problem)
        if name in self._virtual:
            _refuse_step_hooks(problem)
            check_own_step(problem)
        if name in self._differentiated:
            refuse_module_hooks(problem)
        if name in self._estimators:
            self._estimators[name].check(problem)
        if problem.accumulate > 1 and (has_hooks(problem.variables) or _post_hooks(problem)):
            raise ConfigError(
                f"problem {name!r}: hooks on its parameters (register_hook, register_post_accumulate_grad_hook) would "
                "see the gradient of all batches of a step, not of each; pass accumulate=1, or remove the hooks"
            )


def hooks_of(problem: Problem, modules: Iterable[nn.Module]) -> list[tuple[int, ...]]:
    """The numbers of all hooks that act when gradients are computed, or a step of the optimizer is taken."""
    optimizer = problem.optimizer
    found = [*chain.from_iterable(map(_HOOKS, problem.variables.values()))]
    found += chain.from_iterable(map(_MODULE_HOOKS, modules))
    found += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    found += [_global_optimizer_pre_hooks, _global_optimizer_post_hooks]
    return [*map(tuple, filter(None, found))]


def _refuse_learned(problem: Problem) -> None:
    """Raise a ConfigError if a hyperparameter requires gradients: nothing is differentiated for it."""
    for group in problem.optimizer.param_groups:
        for key, value in group.items():
            if type(value) in _PLAIN or key == "params":
                continue
            values = value if isinstance(value, tuple | list) else (value,)
            if any([isinstance(each, Tensor) and each.requires_grad for each in values]):
                raise ConfigError(
                    f"problem {problem.name!r}: the option {key!r} of its {type(problem.optimizer).__name__} is a "
                    "tensor that requires gradients, but no gradient flows through options of an optimizer; pass a "
                    "number (.item()) or .detach(). Instead, write the step as part of the upper loss; or learn a "
                    "factor of the loss, which acts like a learning rate with SGD, but hardly with Adam and others "
                    "that divide by the size of gradients"
                )


def _post_hooks(problem: Problem) -> list[str]:
    return [name for name, variable in problem.variables.items() if variable._post_accumulate_grad_hooks]


def _refuse_sparse_state(problem: Problem) -> None:
    for name, slot in zip(problem.variables, problem.optimizer_slots(), strict=True):
        for key, value in slot.items():
            if isinstance(value, Tensor) and value.is_sparse:
                raise ConfigError(
                    f"problem {problem.name!r}: the state {key!r} of its optimizer for the parameter {name!r} is "
                    "sparse, as earlier steps with sparse gradients made it; write it as "
                    f"optimizer.state[parameter][{key!r}] = value.to_dense(), or make the optimizer anew"
                )


def _refuse_step_hooks(problem: Problem) -> None:
    name, optimizer = problem.name, problem.optimizer
    why = "but its steps may be virtual or differentiated, and a hook runs in real steps only"
    if _post_hooks(problem):
        raise ConfigError(
            f"problem {name!r}: its parameter {', '.join(map(repr, _post_hooks(problem)))} has a hook that runs after "
            f"its gradient is accumulated, {why}; use Tensor.register_hook with a hook that returns the new gradient"
        )
    found = {
        "register_step_pre_hook": optimizer._optimizer_step_pre_hooks,
        "register_step_post_hook": optimizer._optimizer_step_post_hooks,
        "torch's register_optimizer_step_pre_hook": _global_optimizer_pre_hooks,
        "torch's register_optimizer_step_post_hook": _global_optimizer_post_hooks,
    }
    for kind, hooks in found.items():
        if hooks:
            raise ConfigError(
                f"problem {name!r}: its optimizer has a hook of {kind}, {why}; change gradients by "
                "Tensor.register_hook on parameters, change weights in step of a subclass of the optimizer, and log in "
                "a callback of Engine.run"
            )
