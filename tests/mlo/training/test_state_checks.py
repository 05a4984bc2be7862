"""A state with missing or wrong parts is refused before anything is loaded, and the message names the part."""

from __future__ import annotations

import copy
import random
import re

import numpy as np
import pytest
import torch
from small_lbt import noisy_lbt
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import mlo
from mlo.training import checkpoint


class Fit(mlo.Problem):
    def loss(self, batch, upper):
        x, y = batch["main"]
        return (self(x) - y).square().mean() + upper(x[:1, :1]).square().sum() * self.params["weight"].square().sum()


class Upper(mlo.Problem):
    def loss(self, batch, fit):
        x, y = batch
        return (fit(x) - y).square().mean()


class Custom(torch.optim.Optimizer):
    """An optimizer of a user's own."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    kept = self.state[p]
                    if not kept:
                        kept["mean"] = torch.zeros_like(p)
                    kept["mean"].lerp_(p.grad, 0.5)
                    p.data.sub_(group["lr"] * kept["mean"])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "custom": Custom,
}
SCHEDULERS = {
    "multi step": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 9)], milestones=[3]
    ),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
}


def engine_of(optimizer="adam", scheduler="multi step", estimator="cg", seed=0):
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.randn(6, 1)
    loader = DataLoader(TensorDataset(x, y), 2, shuffle=True, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    fit, upper = nn.Linear(3, 1), nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2, momentum=0.1), nn.Linear(2, 1))
    upper.eval()
    made = OPTIMIZERS[optimizer](fit.parameters())
    problems = [
        Fit("fit", module=fit, optimizer=made, scheduler=SCHEDULERS[scheduler](made), data={"main": loader}),
        Upper("upper", module=upper, optimizer=torch.optim.SGD(upper.parameters(), 0.01), data=[(x, y)]),
    ]
    kind = {"kind": "cg", "iterations": 2, "warm_start": True} if estimator == "cg" else estimator
    return mlo.Engine(problems, kind, device="cpu")


def parts(tree, path=()):
    """The paths of all parts of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in items:
        yield (*path, key)
        yield from parts(value, (*path, key))


def changed(tree, path, change):
    """A copy of the tree in which ``change`` was applied to the container of the last key."""
    if len(path) == 1:
        other = list(tree) if isinstance(tree, list | tuple) else copy.copy(tree)
        change(other, path[0])
        return type(tree)(other) if isinstance(tree, tuple) else other
    other = list(tree) if isinstance(tree, list | tuple) else copy.copy(tree)
    other[path[0]] = changed(tree[path[0]], path[1:], change)
    return type(tree)(other) if isinstance(tree, tuple) else other


def at(tree, path):
    return at(tree[path[0]], path[1:]) if path else tree


def put(value):
    def change(container, key):
        container[key] = value

    return change


def remove(container, key):
    del container[key]


def everything(engine):
    """All that loading could change, the generators of the process and of DataLoaders included."""
    return copy.deepcopy(engine.state_dict())


def assert_same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, others in zip(one, other, strict=True):
            assert_same(mine, others)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def refusal(engine, state):
    try:
        engine.load_state_dict(state)
    except mlo.CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "every"),
    [
        pytest.param("adam", "multi step", 1, marks=pytest.mark.slow),
        pytest.param("sgd", "sequential", 1, marks=pytest.mark.slow),
        pytest.param("custom", "one cycle", 1, marks=pytest.mark.slow),
        ("adam", "sequential", 5),
    ],
)
def test_no_part_can_be_missing_or_of_another_type(optimizer, scheduler, every):
    """Each part of the tree is removed, and replaced by other values: refused with its name, and nothing is loaded."""
    trained = engine_of(optimizer, scheduler, seed=1)
    trained.run(3)
    state = everything(trained)
    engine = engine_of(optimizer, scheduler, seed=2)
    engine.run(1)
    before = everything(engine)
    refused = loaded = 0
    for path in list(parts(state))[::every]:
        options = "scheduler" in path or "param_groups" in path  # may be any number
        for change in (
            remove,
            *map(put, [object(), "text", torch.ones(7, 7), None, [], {}, *([] if options else [-1])]),
        ):
            other = changed(state, path, change)
            if options and change is not remove and all(isinstance(at(tree, path), str) for tree in (state, other)):
                continue  # another text
            message = refusal(engine, other)
            if message:
                refused += 1
                named = "not the state of an engine" in message or any(str(key) in message for key in path)
                assert named, (path, message)
            else:
                loaded += 1
                engine.run(1)  # what was accepted can be used
                engine = engine_of(optimizer, scheduler, seed=2)
                engine.run(1)
        assert_same(everything(engine)["problems"], before["problems"])
    assert refused > 8 * loaded


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_an_optimizer_keeps_is_checked(optimizer):
    trained, engine = engine_of(optimizer, seed=1), engine_of(optimizer, seed=2)
    trained.run(2)
    state = everything(trained)
    engine.load_state_dict(state)
    engine.run(1)
    slots = state["problems"]["fit"]["optimizer"]["state"][0]
    for key in slots:
        path = ("problems", "fit", "optimizer", "state", 0, key)
        for change in (remove, put("text"), put({})) if len(slots) > 1 else (put("text"), put({})):
            with pytest.raises(mlo.CheckpointError, match=rf"'fit' .*optimizer\.state\[0\]\.{key} is"):
                engine.load_state_dict(changed(state, path, change))
        if slots[key].shape == (1, 3) and optimizer != "adafactor":
            with pytest.raises(mlo.CheckpointError, match=r"a float32 tensor of shape \(3, 1\) there"):
                engine.load_state_dict(changed(state, path, put(torch.ones(3, 1))))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_state_that_is_whole_is_loaded(tmp_path, scheduler):
    trained, engine = engine_of("sgd", scheduler, "unrolled", 1), engine_of("sgd", scheduler, "unrolled", 2)
    trained.run(5)
    checkpoint.save(tmp_path / "c.pt", trained.state_dict())
    engine.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
    trained.run(4)
    engine.run(4)
    assert_same(trained.state_dict(), engine.state_dict())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rounds",), -1, "rounds is -1 there, and should be a whole number"),
        (("rounds",), True, "rounds is True"),
        (("levels", "fit", "scale"), [1.0, 2], "levels.fit.scale is a list of 2 there, and should be None"),
        (("losses",), {}, "losses.fit is missing"),
        (("losses", "fit"), torch.ones(2), "losses.fit is a float32 tensor of shape"),
        (("warm", "upper", "other"), [], "warm.upper.other is in the checkpoint only"),
        (("random", "numpy", 2), 10**9, "random is no state of a random generator"),
        (("random", "numpy", 2), 1.5, "random.numpy is 1.5 there, and should be a whole number"),
        (("random", "numpy", 3), 0.5, "random.numpy is 0.5 there, and should be a whole number"),
        (("random", "torch"), torch.zeros(5056, dtype=torch.uint8), "random is no state of a random generator"),
        (("random", "python", 2), "x", "random is no state of a random generator"),
        (
            ("problems", "fit", "module", "weight"),
            torch.ones(3, 1),
            r"module.weight is .* and should be a float32 tensor",
        ),
        (("problems", "fit", "module", "weight"), torch.ones(1, 3).double(), "module.weight is a float64 tensor"),
        (("problems", "fit", "module", "more"), torch.ones(1), "module.more is in the checkpoint only"),
        (("problems", "fit", "optimizer", "state", 9), {}, r"optimizer.state\[9\] is of no parameter"),
        (("problems", "fit", "scheduler", "base_lrs"), [], "scheduler.base_lrs is a list of 0 there"),
        (("problems", "fit", "data", "main", "index"), 99, "the data ends after 3"),
        (("others",), [{}], r"others\[0\].random is missing"),
        (("others",), 3, "others is 3 there"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_the_message_names_the_part_and_nothing_is_loaded(path, value, message):
    trained, engine = engine_of(seed=1), engine_of(seed=2)
    trained.run(2)
    engine.run(1)
    state, before = everything(trained), everything(engine)
    outside = np.random.get_state()[1].copy(), random.getstate()
    with pytest.raises(mlo.CheckpointError, match=message):
        engine.load_state_dict(changed(state, path, put(value)))
    assert_same(everything(engine), before)
    assert np.array_equal(np.random.get_state()[1], outside[0])
    assert random.getstate() == outside[1]
    assert engine.rounds == 1


class Counted(nn.Linear):
    """A module with extra state, which it may refuse."""

    calls = 0
    refuses = False

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        if self.refuses and state["calls"] == 7:
            raise RuntimeError("not these calls")
        self.calls = state["calls"]


def test_extra_state_that_a_module_refuses_leaves_everything_as_before():
    def counted(seed, calls):
        engine = engine_of(seed=seed)
        module = engine.problems["upper"].module[2]  # after the others, which are loaded before
        module.__class__ = Counted
        module.calls = calls
        engine.run(1)
        return engine

    state, engine = everything(counted(1, 7)), counted(2, 3)
    before = everything(engine)
    engine.problems["upper"].module[2].refuses = True
    with pytest.raises(mlo.CheckpointError, match=r"'upper' does not match the checkpoint: (?s:.*)not these calls"):
        engine.load_state_dict(state)
    assert_same(everything(engine), before)
    engine.problems["upper"].module[2].refuses = False
    engine.load_state_dict(state)
    assert engine.problems["upper"].module[2].calls == 7


def test_a_float16_loss_scale_is_needed_where_there_is_one():
    stack = noisy_lbt()
    engine = mlo.Engine(stack, "one_step", device="cpu")
    state = everything(engine)
    for scale in ("text", [2.0]):
        with pytest.raises(mlo.CheckpointError, match=re.escape("levels.teacher.scale")):
            engine.load_state_dict(changed(state, ("levels", "teacher", "scale"), put(scale)))


@pytest.mark.parametrize("state", [{}, {"problems": 3}, {"x": 1}, [], 5])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(mlo.CheckpointError, match="this is not the state of an engine"):
        engine_of().load_state_dict(state)
