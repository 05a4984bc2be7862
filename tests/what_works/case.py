"""One member of the table: a tiny two-level problem, the derivative of plain torch training, and what mlo says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

import mlo

#: {column of the table: estimator, lower steps}
COLUMNS: dict[str, tuple[Any, int]] = {
    "`one_step`": ("one_step", 1),
    "`unrolled`": ("unrolled", 2),
    "product `forward`": ({"kind": "unrolled", "product": "forward"}, 2),
}
START = (0.875, 1.125)  # of the upper parameters; exact in every precision
SMALL = 1e-5  # of the central difference, in float64: its error is about 1e-9 of the derivative
ALONG = torch.tensor((0.6, -0.8), dtype=torch.float64)  # of the difference
TOLERANCE = 1e-6

Loss = Callable[..., Tensor]
Tensors = Mapping[str, Tensor]


def grid(*shape: int) -> Tensor:
    """Values that every precision represents exactly."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 5 % 16 - 7) / 8).to(torch.get_default_dtype()).reshape(shape)


def scaled(x: Any, factor: Tensor) -> Any:
    """What of ``x`` is floating-point times a number."""
    return tree_map(lambda t: t * factor if isinstance(t, Tensor) and not _whole(t) else t, x)


def flat(output: Any) -> Tensor:
    """The first tensor of an output, as a vector of real numbers."""
    tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def fit(model: Any, s: Tensor, x: Any) -> Tensor:
    """The lower loss: inputs and outputs depend on the upper parameters."""
    output = flat(model(*scaled(x, s[1])))
    return (s[0] * output - torch.arange(len(output)).sin()).square().mean()


def judge(model: Any, x: Any) -> Tensor:
    """The upper loss: it depends on the upper parameters only through the training of ``model``."""
    return (flat(model(*x)) - 0.3).square().mean()


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A member of a family, in a problem of its own.

    Attributes:
        module: makes the lower module.
        x: makes a batch; the default losses call the module with it as arguments.
        fit, judge: the lower and the upper loss, of the problem (or what stands for it), the upper parameters, a batch.
        optimizer: makes the lower optimizer, of the module's parameters.
        scheduler: makes its scheduler.
        options: further arguments of the lower problem.
        warm: plain steps before, so that the optimizer has a state.
        dtype: that of the problem; the derivative is always computed in float64.
        cast: the precision that the hypergradient is asked for.
        tolerance: relative, where the result is rounded, or an approximation.
        word: the verdict where it is within the tolerance.
        limits: {column: verdict if it is not exact there, and this is known}.
        by_autograd: compare with autograd through steps written out, where a difference would also see how values change
            that autograd holds constant.
        plain: makes the optimizer of the plain training, where torch cannot train with ``optimizer`` itself.
        note: what the table says besides.
    """

    family: str
    name: str
    module: Callable[[], nn.Module]
    x: Callable[[], Any] = lambda: (torch.randn(4, 3),)
    fit: Loss = fit
    judge: Loss = judge
    optimizer: Callable[[Any], Optimizer] = sgd
    scheduler: Callable[[Optimizer], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    warm: int = 0
    dtype: torch.dtype = torch.float64
    cast: torch.dtype | None = None
    tolerance: float = TOLERANCE
    word: str = "exact"
    limits: Mapping[str, str] = field(default_factory=dict)
    by_autograd: bool = False
    plain: Callable[[Any], Optimizer] | None = None
    note: str = ""


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
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                taken = _by_mlo(case, estimator, steps)
            except mlo.MloError as error:
                found.verdicts[column] = "refused"
                found.notes.setdefault(_gist(error), []).append(column)
                continue
            except Exception as error:  # noqa: BLE001: any other is a fault, whatever it is
                found.verdicts[column] = f"fails with {type(error).__name__}"
                found.faults.append(f"{column}: {type(error).__name__}: {_gist(error)[:150]}")
                continue
        warned = dict.fromkeys(_gist(w.message) for w in caught if str(w.message).startswith("problem "))
        for message in warned:
            found.notes.setdefault(f"warns: {message}", []).append(column)
        if steps not in truths:
            truths[steps] = _by_autograd(case, steps) if case.by_autograd else _by_torch(case, steps)
        wrong = list(_compare(case, taken, *truths[steps]))
        found.verdicts[column] = case.word
        if wrong:
            found.verdicts[column] = "not exact, warns" if warned else case.limits.get(column, "wrong")
            found.faults += [f"{column}: {what}" for what in wrong if not warned and column not in case.limits]
    return found


def _compare(case: Case, taken: _Taken, along: Tensor, trained: Tensors) -> Iterator[str]:
    """What differs."""
    found = taken.gradient @ ALONG
    if not (found - along).abs() <= case.tolerance * taken.gradient.norm() + 1e-10:
        yield f"the hypergradient along a direction is {found:.6e}, not {along:.6e}"
    if taken.changed:
        yield f"asking for a hypergradient changes {', '.join(taken.changed)}"
    if unlike := _differ(taken.tensors, trained, case.tolerance):
        yield f"a round gives other values of {', '.join(unlike)} than plain torch"


class _Taken(NamedTuple):
    """A hypergradient, which of the module's tensors asking for it has changed, and all of them after a round."""

    gradient: Tensor
    changed: list[str]
    tensors: Tensors


class _Plain:
    """What a loss calls in plain torch instead of a problem."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.params = module, dict(module.named_parameters())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class _Functional(_Plain):
    """The same with other parameters."""

    def __init__(self, module: nn.Module, params: dict[str, Tensor]) -> None:
        self.module, self.params = module, params

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.module, self.params, args, kwargs)


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


def _seed(seed: int) -> None:
    """As torch.manual_seed, which takes a millisecond."""
    torch.default_generator.manual_seed(seed)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _module(case: Case) -> nn.Module:
    _seed(0)
    return case.module()


def _batches(case: Case) -> list[Any]:
    _seed(1)
    return [case.x(), case.x()]


def _step(case: Case, module: nn.Module, optimizer: Optimizer, s: Tensor, batch: Any) -> None:
    optimizer.zero_grad()
    case.fit(_Plain(module), s, batch).backward()
    optimizer.step()


def _by_mlo(case: Case, estimator: Any, steps: int) -> _Taken:
    with _default(case.dtype):
        module, upper, (first, second) = _module(case), _Upper(), _batches(case)
        optimizer = case.optimizer(module.parameters())
        for _ in range(case.warm):
            _step(case, module, optimizer, torch.ones(2), first)
        schedule = {} if case.scheduler is None else {"scheduler": case.scheduler(optimizer)}
        rest: dict[str, Any] = {"optimizer": optimizer, "data": [first], "steps": steps, **schedule, **case.options}
        above = torch.optim.SGD(upper.parameters(), lr=1.0)
        problems = [
            _Low("low", case=case, module=module, **rest),
            _Top("top", case=case, module=upper, optimizer=above, data=[second]),
        ]
        engine = mlo.Engine(problems, estimator, device="cpu")
        before = _copied(module)
        _seed(2)
        found = engine.hypergradient("top", case.cast)["s"]
        changed = _differ(_copied(module), before, 0)
        _seed(2)
        engine.step()
    if case.scheduler is not None:
        found = torch.tensor(START) - upper.s.detach()  # of a round: a virtual step does not change the learning rate
    return _Taken(found.double(), changed, _copied(module))


def _by_torch(case: Case, steps: int) -> tuple[Tensor, Tensors]:
    """The derivative of the upper loss along a direction, by a central difference, and the trained module's tensors."""

    def trained(s: Tensor) -> tuple[Tensor, Tensors]:
        with _default(case.dtype):
            module = _module(case)
        with _default(torch.float64):
            if case.dtype != torch.float64:
                module = module.double()
            first, second = _batches(case)
            optimizer = (case.plain or case.optimizer)(module.parameters())
            for _ in range(case.warm):
                _step(case, module, optimizer, torch.ones(2), first)
            scheduler = case.scheduler(optimizer) if case.scheduler else None
            _seed(2)
            for _ in range(steps):
                _step(case, module, optimizer, s, first)
                if scheduler is not None:
                    scheduler.step()
            tensors = _copied(module)
            _seed(2)  # a hypergradient begins where the training of the lower level did
            with torch.no_grad():
                return case.judge(_Plain(module), second).double(), tensors

    start = torch.tensor(START, dtype=torch.float64)
    (more, one), (less, other) = trained(start + SMALL * ALONG), trained(start - SMALL * ALONG)
    between = {name: t if _whole(t) else (t + other[name]) / 2 for name, t in one.items()}
    return (more - less) / (2 * SMALL), between


def _by_autograd(case: Case, steps: int) -> tuple[Tensor, Tensors]:
    """As :func:`_by_torch`, by autograd through steps of SGD."""
    with _default(torch.float64):
        module, (first, second) = _module(case), _batches(case)
        s = torch.tensor(START, requires_grad=True)
        parameters = dict(module.named_parameters())
        _seed(2)
        for _ in range(steps):
            loss = case.fit(_Functional(module, parameters), s, first)
            found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            parameters = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), found, strict=True)}
        _seed(2)
        (along,) = torch.autograd.grad(case.judge(_Functional(module, parameters), second), s)
    return along @ ALONG, {n: p.detach() for n, p in parameters.items()}


def _copied(module: nn.Module) -> Tensors:
    return {name: t.detach().clone() for name, t in module.state_dict().items() if isinstance(t, Tensor)}


def _differ(some: Tensors, others: Tensors, tolerance: float) -> list[str]:
    """Names of the tensors that differ by more than a part of their size."""

    def same(one: Tensor, other: Tensor) -> bool:
        if _whole(one) or not tolerance:
            return torch.equal(one, other)
        return bool((one.to(other.dtype) - other).norm() <= tolerance * other.norm() + 1e-12)

    return [name for name, other in others.items() if not same(some[name], other)]


def _whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _gist(error: object) -> str:
    """The first statement of a message, without the name of the problem."""
    return (str(error).strip().splitlines() or [""])[0].removeprefix("problem 'low': ").partition("; ")[0]


def cases(family: str, members: Mapping[str, Mapping[str, Any]]) -> list[Case]:
    """A case of each member: {name: arguments of a :class:`Case`}."""
    return [Case(family=family, name=name, **arguments) for name, arguments in members.items()]
