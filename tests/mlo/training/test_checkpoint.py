"""Checkpoints: written atomically, loaded without executing code, and resumed bit for bit."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from brute_force import small_lbt
from small_lbt import noisy_lbt
from torch.optim import lr_scheduler

import mlo
from mlo.training import checkpoint


def rebuilt(**options: dict) -> list[mlo.Problem]:
    """The same problems over the same data, with other weights and other random state, as a new process has them."""
    stack = noisy_lbt(**options)
    torch.manual_seed(78)
    for problem in stack:
        for parameter in problem.variables.values():
            torch.nn.init.normal_(parameter)
    return stack


def everything(stack: list[mlo.Problem]) -> list[torch.Tensor]:
    tensors = []
    for problem in stack:
        tensors += problem.module.state_dict().values()
        tensors += [torch.as_tensor(v) for s in problem.optimizer.state.values() for v in s.values()]
    return tensors


@pytest.mark.parametrize("estimator", ["darts", "one_step", "cg", "unrolled"])
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_resumed_engine_ends_bit_identical(tmp_path, estimator, cut, device):
    unbroken = noisy_lbt(student={"steps": 2}, arch={"warmup": 2})
    torch.manual_seed(5)
    engine = mlo.Engine(unbroken, estimator, device=device)
    engine.run(cut)
    checkpoint.save(tmp_path / "c.pt", engine.state_dict())
    before = {name: dict(kinds) for name, kinds in engine.passes.items()}
    engine.run(11 - cut)
    taken = {n: {k: v - before[n].get(k, 0) for k, v in kinds.items()} for n, kinds in engine.passes.items()}
    resumed = rebuilt(student={"steps": 2}, arch={"warmup": 2})
    engine = mlo.Engine(resumed, estimator, device=device)
    engine.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
    engine.run(11 - cut)
    assert engine.rounds == 11
    assert {n: {k: v for k, v in kinds.items() if v} for n, kinds in taken.items()} == engine.passes
    for one, other in zip(everything(unbroken), everything(resumed), strict=True):
        assert torch.equal(one, other)
    assert unbroken[0].scheduler.get_last_lr() == resumed[0].scheduler.get_last_lr()


def test_every_part_of_the_state_is_needed(tmp_path):
    """Leaving out any part of a checkpoint makes the run end elsewhere: none is dead weight."""
    reference = noisy_lbt()
    engine = mlo.Engine(reference, "darts", device="cpu")
    engine.run(3)
    saved = engine.state_dict()
    checkpoint.save(tmp_path / "c.pt", saved)
    engine.run(4)
    for part in ("module", "optimizer", "scheduler", "data", "random"):
        other = rebuilt()
        engine = mlo.Engine(other, "darts", device="cpu")
        state, fresh = checkpoint.load(tmp_path / "c.pt"), engine.state_dict()
        if part == "random":
            state["random"] = fresh["random"]
        else:
            state["problems"]["teacher"][part] = fresh["problems"]["teacher"][part]
        engine.load_state_dict(state)
        engine.run(4)
        assert not all(torch.equal(a, b) for a, b in zip(everything(reference), everything(other), strict=True)), part


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 9)], milestones=[3]
        ),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    ],
    ids=["multi step", "one cycle", "sequential", "lambda"],
)
def test_schedulers_load_without_executing_anything(tmp_path, make):
    rates = []
    for resume in (False, True):
        stack = noisy_lbt()
        stack[2].scheduler = make(stack[2].optimizer)
        engine = mlo.Engine(stack, "one_step", device="cpu")
        if resume:
            engine.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
        else:
            engine.run(4)
            checkpoint.save(tmp_path / "c.pt", engine.state_dict())
        engine.run(3)
        rates.append(stack[2].optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1] != 0.01


def test_a_checkpoint_of_other_problems_is_refused(tmp_path):
    state = mlo.Engine(noisy_lbt(), "darts", device="cpu").state_dict()
    engine = mlo.Engine(noisy_lbt(), "darts", device="cpu")
    renamed = {**state, "problems": {"other": state["problems"]["teacher"]}}
    with pytest.raises(mlo.CheckpointError, match=r"of the problems \['other'\]"):
        engine.load_state_dict(renamed)
    state["problems"]["teacher"]["module"].pop("head.bias")
    with pytest.raises(mlo.CheckpointError, match=r"'teacher' does not match the checkpoint: (?s:.*)head\.bias"):
        engine.load_state_dict(state)


def test_a_checkpoint_of_another_optimizer_is_refused():
    """Torch would load it, and fail in the next step."""
    state, engine = (mlo.Engine(small_lbt(name), "one_step", device="cpu") for name in ("sgd", "adam"))
    before = copy.deepcopy(engine.state_dict())
    with pytest.raises(mlo.CheckpointError, match=r"'teacher': .*another optimizer than Adam: it has .*momentum"):
        engine.load_state_dict(state.state_dict())
    torch.testing.assert_close(engine.state_dict()["problems"], before["problems"])


def test_a_file_that_would_execute_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"state": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(mlo.CheckpointError, match="this file is not a readable checkpoint"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_what_is_missing_or_cut_short_is_reported(tmp_path):
    with pytest.raises(mlo.CheckpointError, match="this checkpoint does not exist"):
        checkpoint.load(tmp_path / "none.pt")
    checkpoint.save(tmp_path / "c.pt", {"x": torch.ones(1000)})
    with pytest.raises(mlo.CheckpointError, match="choose an existing folder"):
        checkpoint.save(tmp_path / "nowhere" / "c.pt", {})
    (tmp_path / "cut.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:700])
    with pytest.raises(mlo.CheckpointError, match="this file is not a readable checkpoint"):
        checkpoint.load(tmp_path / "cut.pt")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c.pt", {"x": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(mlo.CheckpointError, match="No space left"):
        checkpoint.save(tmp_path / "c.pt", {"x": 2})
    assert checkpoint.load(tmp_path / "c.pt") == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
