"""Autocast: steps in bfloat16, curvature products in the precision of their own choice."""

from __future__ import annotations

import pytest
import torch
from brute_force import brute_force, small_lbt

import mlo


def stack(autocast: torch.dtype | None) -> list[mlo.Problem]:
    problems = small_lbt("momentum", autocast=autocast)
    mlo.Engine(problems, "one_step", device="cpu").run(2)
    return problems


@pytest.mark.parametrize(("autocast", "bound"), [(False, 0.03), (True, 0.1)])
def test_exact_products_stay_near_brute_force(autocast, bound):
    """The cotangents are bfloat16's own; double backward under autocast adds little to that."""
    problems = stack(torch.bfloat16)
    engine = mlo.Engine(
        problems, {"kind": "one_step", "product": {"kind": "exact", "autocast": autocast}}, device="cpu"
    )
    found, expected = engine.hypergradient("arch")["weights"], brute_force(problems)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < bound


def test_a_difference_in_full_precision_beats_one_under_autocast():
    problems = stack(torch.bfloat16)
    expected = brute_force(problems)
    errors = {}
    for autocast in (False, True):
        product = {"kind": "central", "radius": 0.01, "autocast": autocast}
        engine = mlo.Engine(problems, {"kind": "one_step", "product": product}, device="cpu")
        errors[autocast] = (engine.hypergradient("arch")["weights"] - expected).norm() / expected.norm()
    assert errors[False] < 0.05
    assert errors[True] > 3 * errors[False]


def test_steps_are_taken_in_bfloat16():
    losses = []
    for autocast in (None, torch.bfloat16):
        problems = small_lbt("momentum", autocast=autocast)
        engine = mlo.Engine(problems, "one_step", device="cpu")
        engine.step()
        losses.append(engine.losses["teacher"].item())
        assert problems[0].module.head.weight.dtype == torch.float32
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)
