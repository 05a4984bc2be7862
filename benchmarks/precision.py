"""What TensorFloat-32 and bfloat16 do to the hypergradient of an architecture: the tables in docs/precision.md.

    python -m benchmarks.precision

A small search by second-order DARTS on the digits of scikit-learn, on a CPU. TensorFloat-32 is emulated: the inputs of
convolutions and matrix products are rounded to 10 bits of mantissa, and the sums are in float32. The reference is the
exact hypergradient in float64. bfloat16 is torch's autocast.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mlo
from benchmarks.measuring import replace_table
from mlo.ops.tf32 import Tf32
from mlo.options.config import parse
from problems.jobs.lbt import LbtJob

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution, aten.convolution_backward, aten.mkldnn_convolution)
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)


class Rounded(TorchDispatchMode):
    """Rounds inputs as TensorFloat-32 does.

    Args:
        everywhere: in all convolutions, as in a loop by hand under torch's defaults; if not, where torch's settings
            allow it at that moment, as an engine changes them.
    """

    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        self.everywhere = everywhere

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run an operator, on rounded inputs if it is to be."""
        allowed = func.overloadpacket in CONVOLUTIONS and (self.everywhere or torch.backends.cudnn.allow_tf32)
        if func.overloadpacket in PRODUCTS:
            allowed = torch.backends.cuda.matmul.allow_tf32
        return func(*(map(rounded, args) if allowed else args), **(kwargs or {}))


def rounded(value: Any) -> Any:
    """A float32 tensor rounded to 10 bits of mantissa, to the nearest, ties to even; anything else as it is."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    bits = value.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class Precision(NamedTuple):
    """How an architecture gradient is computed: what is rounded, autocast of losses and of products, dtype, batches."""

    rounding: AbstractContextManager[Any] = nullcontext()
    autocast: torch.dtype | None = None
    products: bool = False
    dtype: torch.dtype | None = None
    ahead: int = 0


PRECISIONS = {
    "float64, on the next batches": Precision(dtype=torch.float64, ahead=1),
    "float64": Precision(dtype=torch.float64),
    "float32": Precision(),
    "TF32 in all convolutions, as in a loop by hand": Precision(Rounded(everywhere=True)),
    "TF32 in the convolutions of steps (the default of mlo)": Precision(Rounded(everywhere=False)),
    "bfloat16 in steps": Precision(autocast=torch.bfloat16),
    "bfloat16 in steps and products": Precision(autocast=torch.bfloat16, products=True),
}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "precision.md"
COLUMNS = ("first-order gradient", "second-order part, exact", "second-order part, DARTS' difference")


def search(cells: int, channels: int = 4, rounds: int = 1, seed: int = 0) -> mlo.Engine:
    """A search by DARTS for so many rounds, about to begin."""
    torch.manual_seed(seed)
    options = {"channels": channels, "cells": cells, "batch_size": 16}
    job = parse(LbtJob, {"device": "cpu", "seed": seed, "search": options, "steps": rounds})
    return job.search_engine("plain")


def gradient(engine: mlo.Engine, estimator: object, indirect: bool, precision: Precision) -> Tensor:
    """The architecture gradient of the next round; only the part through the teacher's training, if ``indirect``."""
    arch, problems = engine.problems["arch"], [*engine.problems.values()]

    def detached(batch: Any, teacher: mlo.Problem) -> Tensor:
        images, labels = batch
        logits = arch()
        return F.cross_entropy(teacher(images, type(logits)(*[each.detach() for each in logits])), labels)

    if indirect:
        arch.loss = detached
    try:
        for problem in problems:
            problem.autocast = precision.autocast
            problem.batches_ahead = partial(_later, problem, precision.ahead)
        with mock.patch("mlo.training.engine.Tf32", lambda steps, _: Tf32(steps)):  # torch's settings as on a GPU
            one = mlo.Engine(problems, estimator, lookahead=True, device="cpu")
        with precision.rounding:
            found = one.hypergradient("arch", precision.dtype)
    finally:
        vars(arch).pop("loss", None)
        for problem in problems:
            problem.autocast = None
            vars(problem).pop("batches_ahead", None)
    return torch.cat([part.flatten() for part in found.values()]).double()


def _later(problem: mlo.Problem, more: int, ahead: int = 0) -> tuple[Any, ...]:
    return type(problem).batches_ahead(problem, ahead + more)


def errors(engine: mlo.Engine) -> dict[str, list[tuple[float, float]]]:
    """{precision: for each of ``COLUMNS`` the relative error in norm, and the cosine}, at the next round."""
    double = PRECISIONS["float64"]
    first, second = gradient(engine, "first_order", False, double), gradient(engine, "one_step", True, double)
    found = {}
    for name, precision in PRECISIONS.items():
        exact, difference = (
            {"kind": "one_step", "product": {"kind": kind, "autocast": precision.products}}
            for kind in ("exact", "central")
        )
        rows = [first, second]
        if precision is not double:
            rows = [gradient(engine, "first_order", False, precision), gradient(engine, exact, True, precision)]
        rows.append(gradient(engine, difference, True, precision))
        found[name] = [
            (((a - b).norm() / b.norm()).item(), F.cosine_similarity(a, b, dim=0).item())
            for a, b in zip(rows, (first, second, second), strict=True)
        ]
    return found


def measured(cells: int, channels: int, rounds: Sequence[int], seeds: int) -> str:
    """A table for each number of rounds, of medians over the seeds."""
    points: list[list[dict[str, list[tuple[float, float]]]]] = [[] for _ in rounds]
    for seed in range(seeds):
        engine = search(cells, channels, max(*rounds, 1), seed)
        for at, found in zip(rounds, points, strict=True):
            engine.run(at - engine.rounds)
            found.append(errors(engine))
            print(f"{cells} cells, seed {seed}, round {at}: {found[-1]}", file=sys.stderr)
    lines = []
    for at, found in zip(rounds, points, strict=True):
        title = f"{cells} cells, after {at} rounds" if at else f"{cells} cells, before the first round"
        lines += [f"| {title} | {' | '.join(COLUMNS)} |", "| --- " * (1 + len(COLUMNS)) + "|"]
        for name in PRECISIONS:
            columns = range(len(COLUMNS))
            row = [[median(each[name][column][part] for each in found) for part in (0, 1)] for column in columns]
            lines.append(f"| {name} | {' | '.join(f'{error:.2g} ({cosine:.2f})' for error, cosine in row)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Print the tables, and write them into the page."""
    torch.set_num_threads(1)
    tables = "\n".join(measured(cells, 4, (0, 50), seeds) for cells, seeds in ((3, 3), (8, 2)))
    print(tables)
    replace_table(PAGE, "measured", tables.rstrip())


if __name__ == "__main__":
    main()
