"""The verdict on a case: what mlo says, compared with plain torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mlo

from .case import Case, whole
from .plain import (
    ALONG,
    START,
    Tensors,
    batches_of,
    by_autograd,
    by_difference,
    copied,
    default,
    module_of,
    seed,
    warm_up,
)

#: {column of the table: estimator, lower steps}
COLUMNS: dict[str, tuple[Any, int]] = {
    "`one_step`": ("one_step", 1),
    "`unrolled`": ("unrolled", 2),
    "product `forward`": ({"kind": "unrolled", "product": "forward"}, 2),
    "`darts`": ("darts", 1),
}
NEAR = 0.02  # what the finite difference of darts may be off, relative
#: errors from the depths, of which a user is to see none
RAW = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ArithmeticError)


@dataclass
class Found:
    """What a case shows.

    Attributes:
        verdicts: {column: verdict}.
        notes: {what else the table says: the columns that it is about}.
        faults: what should not be.
    """

    verdicts: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def verdict(case: Case) -> Found:
    """Compare the hypergradient of every column, and the real steps, with plain torch."""
    found, truths = Found(), dict[int, tuple[Tensor, Tensors]]()
    for column, (estimator, steps) in COLUMNS.items():
        if (
            estimator == "darts" and found.verdicts["`one_step`"] == case.word
        ):  # it is for what has no second derivative
            found.verdicts[column] = ""
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                taken = _by_mlo(case, estimator, steps, estimator != "darts" and steps not in truths)
            except RAW as error:
                found.verdicts[column] = f"fails with {type(error).__name__}"
                found.faults.append(f"{column}: {type(error).__name__}: {_gist(error)[:150]}")
                continue
        if taken.refusal is not None:
            found.verdicts[column] = "refused"
            found.notes.setdefault(_gist(taken.refusal), []).append(column)
            found.faults += [f"{column}: refused after a change of {name}" for name in taken.changed]
            continue
        warned = dict.fromkeys(_gist(w.message) for w in caught if str(w.message).startswith("problem "))
        for message in warned:
            found.notes.setdefault(f"warns: {message}", []).append(column)
        if steps not in truths:
            truths[steps] = (by_autograd if case.by_autograd else by_difference)(case, steps)
        tolerance, word = (NEAR, "approximate") if estimator == "darts" else (case.tolerance, case.word)
        wrong = list(_compare(taken, *truths[steps], tolerance))
        found.verdicts[column] = word
        if wrong:
            found.verdicts[column] = "not exact, warns" if warned else case.limits.get(column, "wrong")
            found.faults += [f"{column}: {what}" for what in wrong if not warned and column not in case.limits]
    return found


class _Taken(NamedTuple):
    """A hypergradient or a refusal, what asking for it has changed, and the module's tensors after a round."""

    gradient: Tensor
    changed: list[str]
    tensors: Tensors
    refusal: mlo.MloError | None = None


def _compare(taken: _Taken, along: Tensor, trained: Tensors, tolerance: float) -> Iterator[str]:
    """What differs."""
    found = taken.gradient @ ALONG
    if not (found - along).abs() <= tolerance * taken.gradient.norm() + 1e-10:
        yield f"the hypergradient along a direction is {found:.6e}, not {along:.6e}"
    if taken.changed:
        yield f"asking for a hypergradient changes {', '.join(taken.changed)}"
    if taken.tensors and (unlike := _differ(taken.tensors, trained, tolerance)):
        yield f"a round gives other values of {', '.join(unlike)} than plain torch"


class _Low(mlo.Problem):
    def __init__(self, name: str, *, case: Case, **problem: Any) -> None:
        super().__init__(name, **problem)
        self.case = case

    def loss(self, batch, top):
        return self.case.fit(self, top(), batch)


class _Top(mlo.Problem):
    def __init__(self, name: str, *, case: Case, **problem: Any) -> None:
        super().__init__(name, **problem)
        self.case = case

    def loss(self, batch, low):
        return self.case.judge(low, batch)


class _Upper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(START))

    def forward(self) -> Tensor:
        return self.s


def _by_mlo(case: Case, estimator: Any, steps: int, train: bool) -> _Taken:
    with default(case.dtype):
        module, upper, (first, second) = module_of(case), _Upper(), batches_of(case)
        optimizer = case.optimizer(module.parameters())
        warm_up(case, module, optimizer, first)
        schedule = {} if case.scheduler is None else {"scheduler": case.scheduler(optimizer)}
        rest: dict[str, Any] = {"optimizer": optimizer, "data": [first], "steps": steps, **schedule, **case.options}
        above = torch.optim.SGD(upper.parameters(), lr=1.0)
        before = copied(module)
        try:
            low = _Low("low", case=case, module=module, **rest)
            top = _Top("top", case=case, module=upper, optimizer=above, data=[second])
            engine = mlo.Engine([low, top], estimator, device="cpu")
            seed(2)
            random = torch.get_rng_state()
            found = engine.hypergradient("top", case.cast)["s"].double()
            changed = _differ(copied(module), before, 0)
            changed += [] if torch.equal(torch.get_rng_state(), random) else ["the random state"]
            if train or case.scheduler is not None:
                engine.step()
        except mlo.MloError as refusal:
            return _Taken(torch.zeros(2), _differ(copied(module), before, 0), {}, refusal)
    if case.scheduler is not None:
        found = torch.tensor(START) - upper.s.detach()  # of a round: a virtual step does not change the learning rate
    return _Taken(found, changed, copied(module) if train else {})


def _differ(some: Tensors, others: Tensors, tolerance: float) -> list[str]:
    """Names of the tensors that differ by more than a part of their size."""

    def same(one: Tensor, other: Tensor) -> bool:
        if whole(one) or not tolerance:
            return torch.equal(one, other)
        return bool((one.to(other.dtype) - other).norm() <= tolerance * other.norm() + 1e-12)

    return [name for name, other in others.items() if not same(some[name], other)]


def _gist(error: object) -> str:
    """The first statement of a message, without the name of the problem and the version of torch."""
    first = (str(error).strip().splitlines() or [""])[0].removeprefix("problem 'low': ").partition("; ")[0]
    return first.replace(f"torch {torch.__version__}", "torch")
