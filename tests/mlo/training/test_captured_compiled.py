"""Captured rounds of compiled passes. Here they are compiled to operations that can be recorded, not to kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from recorded_levels import engines, levels
from replaying import assert_same

from mlo.ops import compiler as compiler_module

pytestmark = pytest.mark.usefixtures("as_on_gpu")


@pytest.fixture
def to_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {key: value for key, value in compiler_module._OPTIONS.items() if key != "options"}
    monkeypatch.setattr(compiler_module, "_OPTIONS", {**options, "backend": "aot_eager"})


@pytest.mark.usefixtures("to_operations")
@pytest.mark.parametrize("kind", ["one_step", "darts", "unrolled", {"kind": "cg", "iterations": 2, "tolerance": 0.0}], ids=str)
@pytest.mark.parametrize("low", [{}, {"steps": 5}], ids=str)
def test_a_replayed_round_of_compiled_passes_is_the_same(kind: Any, low: dict[str, Any]) -> None:
    plain, captured = engines(partial(levels, **low), kind, compile=True)
    for engine in (plain, captured):
        engine.run(10)
    assert_same(plain, captured)
    print(captured.report())
    assert captured.report().replayed > 2
