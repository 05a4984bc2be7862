"""diagnose: how accurate and how expensive is each estimator?"""

from __future__ import annotations

import math
import textwrap
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mlo.errors import ConfigError, GraphError, MloError
from mlo.hypergradient import Darts, Estimator, Exact, Forward, OneStep, Unrolled, build_estimator
from mlo.levels.state import in_precision
from mlo.ops.vectors import Vector, add, all_finite, dot, norm
from mlo.options import registry
from mlo.steps.operators import WITHOUT_SECOND
from mlo.training.engine import Engine
from mlo.training.finite import refuse_looking_ahead

EXACT = Unrolled()
WIDTH = 120  # characters of a line of a printed table
NOISY = 0.2  # relative error of a finite-difference product above which there is a warning


@dataclass(frozen=True)
class Row:
    """One estimator's hypergradient compared with the exact one.

    Attributes:
        estimator: its registered name.
        error: |estimate - exact| / |exact|; None if it could not be computed, or if the exact one is 0.
        cosine: the cosine of the angle between them; None if one of them is 0.
        residual: the residual that the estimator reports, the largest if it goes through several problems; None for
            estimators without one. It is relative to the right-hand side (cg, nystrom) or to the first term of the
            series (neumann).
        passes: forward passes of the lower problems' modules, including their next steps.
        milliseconds: wall-clock time of one hypergradient, including the lower steps; the median of three.
        peak: peak memory of tensors, in bytes, beyond those that existed before.
        note: the error if there is no hypergradient, or a warning.
    """

    estimator: str
    error: float | None = None
    cosine: float | None = None
    residual: float | None = None
    passes: int | None = None
    milliseconds: float | None = None
    peak: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`diagnose`. ``print`` shows it as a table."""

    rows: Sequence[Row]

    def __str__(self) -> str:
        lines = [["estimator", "error", "cosine", "residual", "passes", "ms", "peak MB"]]
        lines += [
            [
                row.estimator,
                _shown(row.error, "{:.2e}"),
                _shown(row.cosine, "{:.4f}"),
                _shown(row.residual, "{:.2e}"),
                _shown(row.passes, "{}"),
                _shown(row.milliseconds, "{:.1f}"),
                _shown(None if row.peak is None else row.peak / 2**20, "{:.1f}"),
            ]
            for row in self.rows
        ]
        first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
        table = []
        for (name, *numbers), note in zip(lines, ["note", *(row.note for row in self.rows)], strict=True):
            cells = [name.ljust(first), *(text.rjust(width) for text, width in zip(numbers, others, strict=True)), ""]
            columns = "  ".join(cells)
            wrapped = textwrap.wrap(note, max(20, WIDTH - len(columns)))
            table += [columns + line for line in wrapped[:1]] or [columns]
            table += [" " * len(columns) + line for line in wrapped[1:]]
        return "\n".join(line.rstrip() for line in table)


def diagnose(engine: Engine, name: str | None = None, estimators: Sequence[object] | None = None) -> Diagnosis:
    """Compare estimators at the engine's current state: their accuracy, time and memory.

    The exact hypergradient is the derivative through all next steps of the lower problems, by double backward, in
    float64. It includes the inner paths of nested levels, whether or not the engine does.

    Args:
        engine: in any state; it is not changed.
        name: the upper problem; None: the last in the engine's list.
        estimators: names or options of estimators; None: all registered ones, with their defaults.

    Raises:
        NonFiniteLossError: if a loss, gradient or buffer is not finite.
    """
    top = name or engine.graph.names[-1]
    exact = _exact(engine, top)
    if isinstance(estimators, str):
        estimators = [estimators]
    asked = list(registry.entries(registry.ESTIMATORS)) if estimators is None else estimators
    return Diagnosis([_row(engine, top, option, exact) for option in asked])


def _exact(engine: Engine, top: str) -> Vector:
    try:
        with _every(engine, EXACT, inner_path=True) as exactly:
            found = exactly.hypergradient(top, torch.float64)
            exact = tuple(found.values())
            if not all_finite(exact):
                refuse_looking_ahead(exactly, top, found)
    except (ConfigError, GraphError) as error:
        if WITHOUT_SECOND not in str(error):
            raise
        needs = "diagnose compares with an exact derivative, which needs second derivatives; use mlo.check instead"
        raise type(error)(str(error).replace(WITHOUT_SECOND, needs)) from error
    return exact


def _row(engine: Engine, top: str, option: object, exact: Vector) -> Row:
    title = repr(option) if isinstance(option, Estimator) else str(option)
    try:
        with _every(engine, option) as one:
            found = tuple(in_precision(g, torch.float64) for g in one.hypergradient(top).values())
            reports = one._gradients.latest.items()
            residuals = [float(value) for name, value in reports if name.endswith("/residual")]
            passes = sum(n for problem, kinds in one.passes.items() for n in kinds.values() if problem != top)
            times = []
            for _ in range(3):
                start = time.perf_counter()
                one.hypergradient(top)
                if one.device.type == "cuda":
                    torch.cuda.synchronize(one.device)
                times.append(1e3 * (time.perf_counter() - start))
            with _PeakMemory() as memory:
                one.hypergradient(top)
    except (MloError, RuntimeError, ValueError) as error:
        return Row(title, note=str(error).partition("\n")[0])
    residual = max(residuals, key=lambda value: (math.isnan(value), value), default=None)
    warning = _noise(engine, top, option, found)
    sizes = norm(found).item(), norm(exact).item()
    if not sizes[1]:
        warning = f"the exact hypergradient is 0 (is a learning rate 0?), and this one is of size {sizes[0]:.2g}"
        return Row(title, None, None, residual, passes, median(times), memory.peak, warning)
    cosine = (dot(found, exact) / (norm(found) * norm(exact))).item() if sizes[0] else None
    return Row(title, _error(found, exact), cosine, residual, passes, median(times), memory.peak, warning)


def _noise(engine: Engine, top: str, option: object, found: Vector) -> str:
    """A warning if finite-difference products are far off, compared with the same estimator and exact products."""
    estimator = build_estimator(option)
    product = getattr(estimator, "product", None)
    if isinstance(estimator, Darts):
        twin: Estimator = OneStep()
    elif product is not None and not isinstance(product, Exact | Forward):
        twin = estimator.model_copy(update={"product": Exact()})
    else:
        return ""
    with _every(engine, twin) as one:
        off = _error(found, tuple(one.hypergradient(top, torch.float64).values()))
    return f"the finite difference is off by {off:.0%}: use product 'exact'" if off > NOISY else ""


def _error(found: Vector, exact: Vector) -> float:
    return (norm(add(found, exact, -1.0)) / norm(exact)).item()


class _PeakMemory(TorchDispatchMode):
    """A context that measures the peak memory, in bytes, of tensors created inside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._alive = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._alive -= size


@contextmanager
def _every(engine: Engine, option: object, inner_path: bool | None = None) -> Iterator[Engine]:
    """An engine with the same problems that uses one estimator for all of them."""
    problems = list(engine.problems.values())
    own = [problem.hypergradient for problem in problems]
    try:
        for problem in problems:
            problem.hypergradient = None
        with warnings.catch_warnings():
            # the engine itself has warned already
            warnings.filterwarnings("ignore", message="the gradient of .* itself runs through")
            warnings.filterwarnings("ignore", message="problem .*: the linear system of .* is not solved")
            inner = engine.inner_path if inner_path is None else inner_path
            yield Engine(problems, option, inner_path=inner, tf32=engine.tf32, device=engine.device)
    finally:
        for problem, hypergradient in zip(problems, own, strict=True):
            problem.hypergradient = hypergradient


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
