"""Why an operation runs: the part of a round that asked for it, read from the call stack."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import CodeType, FrameType

import torch

ROOT, _TORCH = Path(__file__).resolve().parents[2], Path(torch.__file__).parent
FORWARD, BACKWARD, DATA, OPTIMIZER, GUARD, COPIES, PRODUCTS, TRANSFERS, OTHER = CAUSES = (
    "forward passes",
    "backward passes",
    "batches",
    "optimizer steps and their transposes",
    "guard against non-finite values",
    "copies of states",
    "products, and backward over the levels",
    "transfers to and from the host",
    "other",
)
_HELPERS = "helpers"  # what calls them is the cause
_PRODUCTS_BY_HAND = ("_sides", "_student_product", "_teacher_product", "_architecture_gradient")
_OF_FILES = (  # the first that fits
    ("torch/autograd/__init__.py", BACKWARD),
    ("torch/optim/", OPTIMIZER),
    ("mlo/ops/", _HELPERS),
    ("mlo/levels/places.py", FORWARD),
    ("mlo/levels/", COPIES),
    ("mlo/steps/losses.py", FORWARD),
    ("mlo/steps/", OPTIMIZER),
    ("mlo/hypergradient/", PRODUCTS),
    ("mlo/training/commit.py", GUARD),
    ("mlo/training/finite.py", GUARD),
    ("mlo/training/", OTHER),
    ("problems/data/", DATA),
    ("problems/", FORWARD),
    ("benchmarks/gpu/hand_optimizers.py:norm", _HELPERS),
    ("benchmarks/gpu/hand_optimizers.py:in_order_of", _HELPERS),
    ("benchmarks/gpu/hand_optimizers.py", OPTIMIZER),
    *[(f"benchmarks/gpu/hand_round.py:{name}", PRODUCTS) for name in _PRODUCTS_BY_HAND],
    ("benchmarks/gpu/hand_round.py", FORWARD),
)


def cause(frame: FrameType | None) -> tuple[str, str]:
    """The cause of an operation that was called in this frame, and the innermost "file:function" that belongs to it."""
    where = ""
    while frame is not None:
        of, name = _of_code(frame.f_code)
        if of:
            where = where or name
            if of != _HELPERS:
                return of, where
        frame = frame.f_back
    return OTHER, where


def line(frame: FrameType | None) -> str:
    """The innermost line that led to this frame and is neither torch's nor of this package."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent != Path(__file__).parent and not path.is_relative_to(_TORCH):
            return f"{_of_code(frame.f_code)[1]}, line {frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


@cache
def _of_code(code: CodeType) -> tuple[str, str]:
    """The cause that a function stands for, or an empty string; and its name."""
    path = Path(code.co_filename)
    inside = path.is_relative_to(ROOT) and ".venv" not in path.parts
    short = str(path.relative_to(ROOT)) if inside else "/".join(path.parts[-3:])
    name = f"{short}:{code.co_name}"
    return next((of for part, of in _OF_FILES if name.startswith(part)), ""), name
