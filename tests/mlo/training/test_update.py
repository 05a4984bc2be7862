"""The guard on a device that must not be waited for, driven here on the CPU: updates undone, the news later."""

from __future__ import annotations

import pytest
import torch
from small_lbt import noisy_lbt

import mlo
from mlo.training.update import Updater


def deferred_engine(stack: list[mlo.Problem]) -> mlo.Engine:
    engine = mlo.Engine(stack, "one_step", device="cpu")
    engine._updater = Updater(torch.device("cpu"), deferred=True)
    return engine


def tensors(problem: mlo.Problem) -> list[torch.Tensor]:
    moments = [v for s in problem.optimizer.state.values() for k, v in s.items() if k != "step"]
    return [t.detach().clone() for t in [*problem.module.state_dict().values(), *moments]]


def test_a_good_run_is_the_same_to_the_bit():
    plain, guarded = noisy_lbt(), noisy_lbt()
    torch.manual_seed(1)
    mlo.Engine(plain, "one_step", device="cpu").run(5)
    torch.manual_seed(1)
    deferred_engine(guarded).run(5)
    for one, other in zip(plain, guarded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_nothing_moves_after_a_bad_loss_and_its_place_is_told():
    stack = noisy_lbt()
    engine = deferred_engine(stack)
    engine.run(2)
    good = tensors(stack[0])
    batches = [stack[0].stream.peek(i) for i in range(3)]
    batches[0][0].fill_(float("nan"))
    engine._updater.look = lambda: None
    engine.step()
    engine.step()
    kept = [tensors(problem) for problem in stack]
    assert all(torch.equal(a, b) for a, b in zip(kept[0], good, strict=True))
    assert all(t.isfinite().all() for part in kept for t in part)
    del engine._updater.look
    with pytest.raises(mlo.NonFiniteLossError, match="'teacher': its loss is nan at its step 3"):
        engine._updater.wait()


def test_the_first_step_ever_leaves_moments_at_zero():
    stack = noisy_lbt()
    stack[1].stream.peek()["labeled"][0].fill_(float("inf"))
    engine = deferred_engine(stack)
    with pytest.raises(mlo.NonFiniteLossError, match="'student'"):
        engine.step()
    moments = [v for s in stack[1].optimizer.state.values() for k, v in s.items() if k != "step"]
    assert moments
    assert all(not v.any() for v in moments)
