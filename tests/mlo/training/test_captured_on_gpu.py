"""Captured rounds as CUDA graphs, which the other tests emulate: they end as rounds without capture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from recorded_levels import WARM_CG, Checkpointed, engines, levels, noisy_levels
from replaying import assert_same

import mlo

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run_both(make: Callable[..., list[mlo.Problem]], kind: Any, **options: Any) -> mlo.Engine:
    found = engines(make, kind, device="cuda", **options)
    ends = []
    for engine in found:
        torch.manual_seed(3)
        engine.run(12)
        ends.append(torch.cuda.get_rng_state())
    assert torch.equal(*ends)
    assert_same(*found, rtol=1e-9)
    return found[1]


@pytest.mark.parametrize("make", [levels, noisy_levels])
@pytest.mark.parametrize(
    "kind", ["darts", "unrolled", WARM_CG, {"kind": "nystrom", "rank": 2, "damping": 1.0}], ids=str
)
def test_replayed_rounds_are_the_same(make: Callable[..., list[mlo.Problem]], kind: Any) -> None:
    assert run_both(make, kind).report().replayed == 8


@pytest.mark.parametrize("kind", ["darts", "unrolled"])
def test_checkpointed_dropout_is_computed_again_with_the_same_numbers(kind: str) -> None:
    assert run_both(partial(noisy_levels, Checkpointed), kind).report().replayed == 8


@pytest.mark.kernels
@pytest.mark.parametrize("make", [levels, noisy_levels])
@pytest.mark.parametrize("kind", ["darts", {"kind": "unrolled"}], ids=str)
def test_replayed_rounds_of_compiled_passes_are_the_same(make: Callable[..., list[mlo.Problem]], kind: Any) -> None:
    captured = run_both(make, kind, compile=True)
    assert captured.report().replayed >= 4
    assert captured.report().problems["low"].compiled
