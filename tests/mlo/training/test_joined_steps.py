"""Several real steps in one graph: the same run as one by one, and one by one where something must see each step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import mlo
from mlo.training.commit import Updater


class Fit(mlo.Problem):
    def loss(self, batch, top):
        return (top() * (self(batch) - batch.sum(1, keepdim=True)).square()).mean()


class Judge(mlo.Problem):
    def loss(self, batch, low):
        return low(batch).square().mean()


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(0.3))

    def forward(self) -> Tensor:
        return self.log.exp()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 1))


def engine(
    fit: type[mlo.Problem] = Fit, memory: float = 16.0, *, tops: int = 1, make=None, **low: object
) -> mlo.Engine:
    """Four lower steps a round; without ``memory`` for graphs they are taken one by one."""
    torch.manual_seed(0)
    module, make = network(), make or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1))
    data = [torch.linspace(-1.0, 1.0, 24).reshape(6, 4) + 0.1 * index for index in range(3)]
    problems = [fit("low", module=module, optimizer=make(module.parameters()), data=data, steps=4, **low)]
    for name in ("top", "other")[:tops]:
        weight = Weight()
        problems.append(Judge(name, module=weight, optimizer=torch.optim.SGD(weight.parameters(), lr=0.5), data=data))
    return mlo.Engine(problems, {"kind": "unrolled", "graph_memory": memory}, device="cpu")


def everything(made: mlo.Engine) -> list[Tensor]:
    found = []
    for problem in made.problems.values():
        found += [*problem.module.parameters(), *problem.module.buffers()]
        for slots in problem.optimizer.state.values():
            found += [value for value in slots.values() if isinstance(value, Tensor)]
    return [tensor.detach() for tensor in found]


def commits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each call of commit has taken at once, as they come."""
    seen, own = [], Updater.commit

    def counted(self: Updater, problem: mlo.Problem, segment: object) -> bool:
        seen.append(len(segment.losses))
        return own(self, problem, segment)

    monkeypatch.setattr(Updater, "commit", counted)
    return seen


@pytest.mark.usefixtures("float64")
def test_a_run_is_the_same_as_one_by_one(monkeypatch):
    seen = commits(monkeypatch)
    runs = []
    for memory in (16.0, 0.0):
        made = engine(memory=memory)
        torch.manual_seed(1)
        made.run(4)
        runs.append((made, made.hypergradient("top")["log"], torch.rand(3)))
    (joined, *found), (single, *expected) = runs
    assert seen == [4] * 3, "the first round measures how large a graph is"
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(everything(joined), everything(single), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(joined.metrics(), single.metrics(), rtol=1e-10, atol=0)
    assert joined.passes["low"]["step"] == single.passes["low"]["step"] == 16
    assert joined.problems["low"].steps_taken == 16
    assert joined.problems["low"].stream.state_dict() == single.problems["low"].stream.state_dict()


@pytest.mark.parametrize("memory", [16.0, 0.0])
def test_no_gradient_is_left_in_the_parameters(memory):
    made = engine(memory=memory)
    for _ in range(2):
        for parameter in made.problems["low"].module.parameters():
            parameter.grad = torch.ones_like(parameter)
        made.step()
        assert all(parameter.grad is None for parameter in made.problems["low"].module.parameters())


@pytest.mark.usefixtures("float64")
def test_two_tops_are_differentiated_through_one_graph(monkeypatch):
    """The first one's step changes what the steps read, whose graph has copies of it."""

    class Both(mlo.Problem):
        def loss(self, batch, top, other):
            both = top.params["log"] * other.params["log"]  # autograd saves the parameters themselves
            return (top() * (self(batch) - batch).square() + both * self(batch).cos()).mean()

    seen = commits(monkeypatch)
    joined, single = (engine(Both, memory, tops=2) for memory in (16.0, 0.0))
    for made in (joined, single):
        torch.manual_seed(1)
        made.run(3)
    assert seen == [4] * 2
    torch.testing.assert_close(everything(joined), everything(single), rtol=1e-10, atol=1e-14)
    assert joined.passes["low"]["step"] == 2 * 12, "each step is evaluated once, however many go through it"


@pytest.mark.parametrize("tops", [1, 2])
def test_a_step_keeps_its_graph_for_several_upper_steps(tops):
    """The first upper step changes what the lower one read, whose graph has a copy of it."""

    class Both(mlo.Problem):
        def loss(self, batch, top, other=None):
            return (top() * (self(batch) - batch).square() + (other() if other else 1.0) * self(batch).cos()).mean()

    made = engine(Both, tops=tops, reads={} if tops == 2 else {"other": None})
    made.problems["low"].steps = 1
    made.problems["top"].steps = 3 - tops
    made.run(3)
    assert made.passes["low"]["step"] == 2 * 3
    assert made.pullbacks["low"] == 6
    assert made.passes["low"].get("product", 0) == 0


@pytest.mark.usefixtures("float64")
def test_a_top_of_several_steps_goes_through_the_same_graph():
    joined, single = (engine(memory=memory) for memory in (16.0, 0.0))
    for made in (joined, single):
        made.problems["top"].steps = 3
        torch.manual_seed(1)
        made.run(3)
    torch.testing.assert_close(everything(joined), everything(single), rtol=1e-10, atol=1e-14)


def test_a_loss_sees_how_many_steps_were_taken(monkeypatch):
    asked: list[int] = []

    class Asking(mlo.Problem):
        def loss(self, batch, top):
            asked.append(self.steps_taken)
            return (top() * self(batch).square()).mean() / (1 + self.steps_taken)

    seen = commits(monkeypatch)
    engine(Asking).run(3)
    assert seen == [4] * 2
    assert asked[:4] == [*range(4)]
    assert asked[-8:] == [*range(4, 12)]


class Rising(mlo.Problem):
    """Its loss is NaN in its seventh step."""

    def loss(self, batch, top):
        loss = (top() * self(batch).square()).mean()
        return loss * float("nan") if self.steps_taken == 6 else loss


def test_a_loss_that_is_not_finite_ends_at_its_own_step():
    joined, single = (engine(Rising, memory) for memory in (16.0, 0.0))
    for made in (joined, single):
        torch.manual_seed(1)
        with pytest.raises(mlo.NonFiniteLossError, match="at its step 7; that step was not taken"):
            made.run(3)
        assert made.problems["low"].steps_taken == 6
    torch.testing.assert_close(everything(joined), everything(single))


def test_a_deferred_check_leaves_what_was_before_all_of_them(monkeypatch):
    """As on a GPU, where no step is waited for: steps joined with a bad one, and all later ones, are undone there."""
    monkeypatch.setattr("mlo.training.engine.Updater", lambda device, deferred: Updater(device, deferred=True))
    seen, made = commits(monkeypatch), engine(Rising)
    made.run(1)
    before = [tensor.clone() for tensor in everything(made)]
    with pytest.raises(mlo.NonFiniteLossError, match="'low': its loss is nan at its step 7;"):
        made.step()
    made.step()
    assert seen == [4, 4]
    torch.testing.assert_close(everything(made), before, rtol=0, atol=0)


@pytest.mark.parametrize("deferred", [False, True])
def test_variables_that_are_not_finite_after_finite_losses_are_seen(deferred, monkeypatch):
    class Root(mlo.Problem):
        def loss(self, batch, top):  # the derivative of a root at zero is infinite
            zero = (self.params["4.bias"] - self.params["4.bias"].detach()).sum()
            steep = zero.sqrt() if self.steps_taken == 7 else zero
            return (top() * self(batch).square()).mean() + steep

    monkeypatch.setattr("mlo.training.engine.Updater", lambda device, **_: Updater(device, deferred))
    made = engine(Root)
    made.run(1)
    before = [tensor.clone() for tensor in everything(made)]
    with pytest.raises(mlo.NonFiniteLossError, match=r"its parameter '4.bias' is \w+ at its step 8;"):
        made.run(1)
    if deferred:
        torch.testing.assert_close(everything(made), before, rtol=0, atol=0)


def test_a_loss_that_raises_among_them_leaves_what_was_before_all_of_them():
    class Raising(mlo.Problem):
        def loss(self, batch, top):
            if self.steps_taken == 6:
                raise OSError("no disk")
            return (top() * self(batch).square()).mean()

    made = engine(Raising)
    made.run(1)
    before, data = [t.clone() for t in everything(made)], made.problems["low"].stream.state_dict()
    random = torch.get_rng_state()
    with pytest.raises(OSError, match="no disk"):
        made.step()
    torch.testing.assert_close(everything(made), before, rtol=0, atol=0)
    assert made.problems["low"].steps_taken == 4
    assert made.problems["low"].stream.state_dict() == data
    assert torch.equal(torch.get_rng_state(), random)


def test_where_something_sees_each_step_they_are_taken_one_by_one(monkeypatch):
    seen = commits(monkeypatch)
    for prepare in (
        lambda problem: next(problem.module.parameters()).register_hook(lambda g: g),
        lambda problem: setattr(problem, "scheduler", torch.optim.lr_scheduler.StepLR(problem.optimizer, 1)),
        lambda problem: setattr(problem, "scheduler", SimpleNamespace(step=lambda: None)),  # one of the user's own
    ):
        made = engine()
        prepare(made.problems["low"])
        made.run(3)
    made = engine()
    torch.optim.lr_scheduler.StepLR(made.problems["low"].optimizer, 1)  # which the user steps
    made.run(3)
    engine(clip_norm=0.1).run(3)
    engine(make=torch.optim.Adam).run(3)
    assert seen == []


@pytest.mark.usefixtures("float64")
def test_steps_of_several_batches_are_taken_one_by_one(monkeypatch):
    seen = commits(monkeypatch)
    joined, single = (engine(memory=memory, accumulate=2) for memory in (16.0, 0.0))
    for made in (joined, single):
        torch.manual_seed(1)
        made.run(3)
    assert seen == []
    torch.testing.assert_close(everything(joined), everything(single), rtol=1e-10, atol=1e-14)


def test_a_step_that_nothing_reaches_among_them_is_an_error():
    class Gone(mlo.Problem):
        def loss(self, batch, top):
            output = self(batch).detach() if self.steps_taken == 6 else self(batch)
            return (top() * output.square()).mean()

    made = engine(Gone)
    made.run(1)
    with pytest.raises(mlo.GraphError, match="no gradient of its loss reaches its own parameters"):
        made.step()
    assert made.problems["low"].steps_taken == 6


def test_in_another_precision_their_batches_are_of_it():
    found = []
    for memory in (16.0, 0.0):
        made = engine(memory=memory)
        torch.manual_seed(1)
        made.run(1)
        found.append(made.hypergradient("top", dtype=torch.float64)["log"])
    assert found[0].dtype == torch.float64
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)
