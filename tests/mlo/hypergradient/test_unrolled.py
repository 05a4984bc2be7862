"""Unrolled and truncated estimators against brute force through several steps, with the optimizer's state."""

from __future__ import annotations

import pytest
import torch
from brute_force import OPTIMIZERS, brute_force, small_lbt
from small_lbt import noisy_lbt
from torch import nn
from two_levels import Following, Judging

import mlo
from mlo.training.diagnostics import _PeakMemory

pytestmark = pytest.mark.usefixtures("float64")

OPTIONS = [{}, {"every": 2}, {"every": 3, "store_on": "cpu"}, {"product": "forward"}, {"graph_memory": 0.0}]


@pytest.mark.parametrize("rounds", [0, 2], ids=["first steps", "with optimizer state"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "adam", "adamw"])
def test_five_steps_agree_with_brute_force(optimizer, options, rounds, device):
    stack = small_lbt(optimizer, steps=5)
    engine = mlo.Engine(stack, {"kind": "unrolled", **options}, device=device)
    engine.run(rounds)
    expected = brute_force(stack)
    torch.testing.assert_close(engine.hypergradient("arch")["weights"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lookahead", [False, True])
def test_the_step_that_the_top_takes_is_along_that_hypergradient(lookahead, options):
    stack = small_lbt("momentum", steps=5, clip_norm=0.4)
    engine = mlo.Engine(stack, {"kind": "unrolled", **options}, lookahead=lookahead, device="cpu")
    for _ in range(2):
        expected = brute_force(stack)
        before = stack[2].optimizer.state[stack[2].module.weights].get("exp_avg", torch.zeros(2)).clone()
        engine.step()
        taken = (stack[2].optimizer.state[stack[2].module.weights]["exp_avg"] - 0.9 * before) / 0.1
        torch.testing.assert_close(taken, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("last", [1, 2, 4])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_truncation_differentiates_the_last_steps_alone(optimizer, last):
    stack = small_lbt(optimizer, steps=4)
    engine = mlo.Engine(stack, {"kind": "truncated", "steps": last}, device="cpu")
    engine.run(1)
    expected = brute_force(stack, last)
    torch.testing.assert_close(engine.hypergradient("arch")["weights"], expected, rtol=1e-9, atol=1e-12)
    if last < 4:
        assert (expected - brute_force(stack)).norm() > 1e-4 * expected.norm()


def test_one_truncated_step_is_one_step():
    stack = small_lbt("adam", steps=3)
    found = [
        mlo.Engine(stack, estimator, device="cpu").hypergradient("arch")["weights"]
        for estimator in ("one_step", {"kind": "truncated", "steps": 1})
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("memory", "every", "recomputed", "products"),
    [(0.0, 1, 0, 4), (0.0, 2, 2, 4), (0.0, 5, 4, 5), ("two", 1, 0, 2), (16.0, 1, 0, 0)],
)
def test_passes(memory, every, recomputed, products):
    """A step costs its product, but those whose graph is kept; thinned states one more pass for each of them."""
    stack = small_lbt("momentum", steps=5)
    sizes = mlo.Engine(stack, "unrolled", device="cpu")
    sizes.step()
    if memory == "two":
        memory = 2.5 * sizes.report().problems["teacher"].graph_bytes / 2**20
    options = {"kind": "unrolled", "every": every, "graph_memory": memory}
    engine = mlo.Engine(stack, options, device="cpu")
    engine.step()  # in which the size of a graph is found out
    before = dict(engine.passes["teacher"])
    engine.step()
    taken = {kind: count - before.get(kind, 0) for kind, count in engine.passes["teacher"].items()}
    assert taken.get("product", 0) == products
    assert taken.get("recompute", 0) == recomputed
    assert engine.pullbacks == {"teacher": 2, "student": 2}


@pytest.mark.parametrize(("memory", "products"), [(0.0, 4), (2.5, 2), (4.5, 0), (100.0, 0)])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov"])
def test_virtual_steps_in_one_graph_give_the_same_in_as_few_passes(optimizer, memory, products):
    """Of steps whose graphs fit into the memory, ``memory`` of them, all are taken in one graph."""
    stack = small_lbt(optimizer, steps=5)
    first = mlo.Engine(stack, "unrolled", device="cpu")
    first.step()
    memory *= first.report().problems["teacher"].graph_bytes / 2**20
    engine = mlo.Engine(stack, {"kind": "unrolled", "graph_memory": memory}, device="cpu")
    engine.step()  # in which the size of a graph is found out
    before, expected = dict(engine.passes["teacher"]), brute_force(stack)
    random = torch.get_rng_state()
    torch.testing.assert_close(engine.hypergradient("arch")["weights"], expected, rtol=1e-10, atol=1e-13)
    assert torch.equal(torch.get_rng_state(), random)
    taken = {kind: count - before.get(kind, 0) for kind, count in engine.passes["teacher"].items()}
    assert taken["virtual"] == 5
    assert taken.get("product", 0) == products


def test_steps_in_one_graph_are_pulled_back_for_several_upper_problems():
    """The middle problem's gradient runs through them, and so does the top's."""
    found = []
    for memory in (0.0, 16.0):
        torch.manual_seed(0)
        stack, data = [], [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(3)]
        for cls, name, steps in ((Both, "low", 4), (Weighed, "mid", 3), (Over, "top", 1)):
            module = nn.Linear(3, 2)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)
            stack.append(cls(name, module=module, optimizer=optimizer, data=data, steps=steps))
        with pytest.warns(UserWarning, match="inner path"):
            engine = mlo.Engine(stack, {"kind": "unrolled", "graph_memory": memory}, device="cpu")
        engine.run(2)
        found.append({name: engine.hypergradient(name)["weight"] for name in ("mid", "top")})
        assert engine.passes["low"]["virtual"] == 8
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)


def test_steps_in_one_graph_take_each_groups_options_and_move_buffers():
    found = []
    for memory in (0.0, 16.0):
        torch.manual_seed(0)
        low, top = nn.Sequential(nn.Linear(3, 2), Remembering()), nn.Linear(3, 2)
        groups = [
            {"params": [low[0].weight], "lr": 0.3, "momentum": 0.9, "nesterov": True},
            {"params": [low[0].bias], "lr": 0.05, "weight_decay": 0.1},
        ]
        data = [torch.randn(4, 3) for _ in range(3)]
        stack = [
            Following("low", module=low, optimizer=torch.optim.SGD(groups), data=data, steps=4),
            Judging("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.1), data=data),
        ]
        engine = mlo.Engine(stack, {"kind": "unrolled", "graph_memory": memory}, device="cpu")
        engine.run(2)
        begun = engine.passes["low"]["product"]
        found.append(engine.hypergradient("top")["weight"])
        assert engine.passes["low"]["product"] - begun == (0 if memory else 3)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)
    mlo.check(engine)


def test_a_parameter_frozen_later_is_reported_where_steps_are_in_one_graph_too():
    stack = small_lbt("sgd", steps=5)
    engine = mlo.Engine(stack, "unrolled", device="cpu")
    engine.run(2)
    stack[0].module.head.weight.requires_grad_(False)
    with pytest.raises(mlo.GraphError, match="no longer requires gradients"):
        engine.hypergradient("arch")


class Remembering(nn.Module):
    """Its output depends on a buffer, which every call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor(0.2))

    def forward(self, x):
        self.gain.mul_(0.9).add_(0.2)
        return x * self.gain


class Both(mlo.Problem):
    def loss(self, batch, mid, top):
        return (self(batch) - mid(batch) * top(batch)).square().mean()


class Weighed(mlo.Problem):
    def loss(self, batch, low, top):
        return (low(batch).tanh() - self(batch)).square().mean() + (self(batch) * top(batch)).mean()


class Over(mlo.Problem):
    def loss(self, batch, low, mid):
        return (low(batch) * mid(batch)).sin().square().mean()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_batch_norm_and_dropout_are_replayed_in_every_step(options):
    """Recomputed or stored, the same masks: all options agree to the last digits, though dropout is at work."""
    found = []
    for given in ({}, options):
        stack = noisy_lbt(student={"steps": 4})
        stack[0].steps = 3
        engine = mlo.Engine(stack, {"kind": "unrolled", **given}, device="cpu")
        torch.manual_seed(3)
        engine.run(2)
        found.append(engine.hypergradient("arch")["weights"])
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


@pytest.mark.parametrize("virtual", [False, True], ids=["real steps", "virtual steps"])
@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 1), ("momentum", 2), ("adam", 3)])
def test_memory_grows_by_the_stored_states_alone(optimizer, copies, every, virtual):
    """60 steps take the memory of one and of the stored states; momentum is part of one where steps are recomputed."""

    def peak(steps: int) -> int:
        torch.manual_seed(0)
        module, weights = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40)), nn.Linear(40, 40)
        make, options = OPTIMIZERS[optimizer]
        low = Following("low", module=module, optimizer=make(module.parameters(), **options), data=[rows], steps=steps)
        top = Judging("top", module=weights, optimizer=torch.optim.SGD(weights.parameters(), lr=0.1), data=[rows])
        options = {"kind": "unrolled", "graph_memory": 0.0, "every": every}
        engine = mlo.Engine([low, top], options, device="cpu")
        with _PeakMemory() as memory:
            engine.hypergradient("top") if virtual else engine.step()
        return memory.peak

    rows = torch.randn(400, 40)
    copies = 1 if optimizer == "momentum" and every == 1 else copies
    state = copies * 8 * 2 * (40 * 40 + 40)
    stored = 60 // every + (every if every > 1 else 0)
    one, many = peak(1), peak(60)
    assert many - one < 1.2 * stored * state + 2 * state
    assert one > 4 * state, "activations are what must not be kept"


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_what_is_kept_of_steps_fits_into_graph_memory(optimizer):
    """With tiny batches, the gradients and the variables that they were taken at need more than their graphs."""

    def peak(mebibytes: float) -> int:
        torch.manual_seed(0)
        module, weights = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))), nn.Linear(64, 64)
        make, options = OPTIMIZERS[optimizer]
        low = Following("low", module=module, optimizer=make(module.parameters(), **options), data=[rows], steps=40)
        top = Judging("top", module=weights, optimizer=torch.optim.SGD(weights.parameters(), lr=0.1), data=[rows])
        engine = mlo.Engine([low, top], {"kind": "unrolled", "graph_memory": mebibytes}, device="cpu")
        engine.step()  # in which the size of a graph is found out
        with _PeakMemory() as memory:
            engine.hypergradient("top")
        return memory.peak

    rows = torch.randn(2, 64)
    without, some, all_of_them = peak(0.0), peak(2.0), peak(100.0)
    assert some - without < 1.2 * 2 * 2**20
    assert all_of_them - without > 4 * 2**20 or optimizer == "momentum", "in one graph there are no states besides"


class TwoHeads(nn.Module):
    """Of which a step uses one: the optimizer leaves the other alone, weight decay and momentum included."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, head: int | None = None) -> torch.Tensor:
        return self.one(x) + self.two(x) if head is None else (self.one, self.two)[head](x)


class OneHead(mlo.Problem):
    def loss(self, batch, top):
        x, head = batch
        return (self(x, head) - top(x)).square().mean()


class BothHeads(mlo.Problem):
    def loss(self, batch, low):
        return low(batch[0]).sin().square().mean()


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"graph_memory": 0.0}], ids=str)
@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "adam"])
def test_parameters_that_a_step_does_not_reach(optimizer, options):
    torch.manual_seed(0)
    low, top = TwoHeads(), nn.Linear(3, 2)
    data = [(torch.randn(4, 3), head) for head in (0, 1, 1, 0, 1, 0, 0)]
    make, hyper = OPTIMIZERS[optimizer]
    stack = [
        OneHead(
            "low", module=low, optimizer=make(low.parameters(), **hyper | {"weight_decay": 0.3}), data=data, steps=4
        ),
        BothHeads("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.1), data=data),
    ]
    engine = mlo.Engine(stack, {"kind": "unrolled", **options}, device="cpu")
    for _ in range(2):
        mlo.check(engine)
        expected, before = engine.hypergradient("top")["weight"], top.weight.detach().clone()
        engine.step()
        torch.testing.assert_close((before - top.weight.detach()) / 0.1, expected, rtol=1e-9, atol=1e-13)
