"""Gradients accumulated over micro-batches: the same hypergradient as of one large batch, in the memory of one."""

from __future__ import annotations

import pytest
import torch
from brute_force import batches, small_lbt
from torch import Tensor, nn
from two_levels import Value

import mlo
from mlo.levels.batches import open_stream
from mlo.training.diagnostics import _PeakMemory

pytestmark = pytest.mark.usefixtures("float64")

ESTIMATORS = [
    "one_step",
    "unrolled",
    {"kind": "unrolled", "every": 2},
    {"kind": "one_step", "product": "forward"},
    {"kind": "one_step", "product": "central"},
    {"kind": "one_step", "product": "one_sided"},
    {"kind": "cg", "damping": 1.0},
    {"kind": "neumann", "rate": 0.3},
    {"kind": "nystrom", "damping": 1.0},
    {"kind": "penalty", "steps": 2},
    "sama",
    "darts",
]


def stack(data: dict[str, list], accumulate: int, steps: int = 2) -> list[mlo.Problem]:
    """The small LBT on ``data``, whose batches are joined by three where they are not accumulated."""
    made = small_lbt("adam", steps=steps)
    parts = {name: open_stream(data[name], name) for name in ("teacher", "arch")}
    parts["student"] = open_stream({name: data[name] for name in ("labeled", "unlabeled")}, "student")
    for problem in made:
        problem.stream, problem.accumulate = parts[problem.name], accumulate
    return made


def both(steps: int = 2) -> tuple[list[mlo.Problem], list[mlo.Problem]]:
    torch.manual_seed(7)
    names = ("teacher", "labeled", "unlabeled", "arch")
    small = {name: batches(6, labeled=name != "unlabeled") for name in names}
    joined = {name: [_joined(small[name][i : i + 3]) for i in (0, 3)] for name in names}
    return stack(small, 3, steps), stack(joined, 1, steps)


def _joined(some: list) -> object:
    return torch.cat(some) if isinstance(some[0], Tensor) else tuple(map(torch.cat, zip(*some, strict=True)))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_it_is_the_hypergradient_of_the_joined_batch(estimator):
    engines = [mlo.Engine(problems, estimator, device="cpu") for problems in both()]
    for _ in range(3):
        found = [engine.hypergradient("arch")["weights"] for engine in engines]
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)
        for engine in engines:
            engine.step()
    for one, other in zip(*(engine.problems.values() for engine in engines), strict=True):
        for name, parameter in one.variables.items():
            torch.testing.assert_close(parameter, other.variables[name], rtol=1e-8, atol=1e-11)


def test_it_is_right_by_finite_differences():
    mlo.check(mlo.Engine(both()[0], "unrolled", device="cpu"))


def test_every_micro_batch_is_used_and_costs_a_pass():
    engine = mlo.Engine(both(steps=1)[0], "one_step", device="cpu")
    engine.run(2)
    assert engine.passes["teacher"]["step"] == engine.passes["student"]["step"] == 6
    assert engine.passes["teacher"]["product"] == engine.passes["student"]["product"] == 6
    assert engine.problems["teacher"].stream.state_dict()["index"] == 6


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.Tanh())))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Fit(mlo.Problem):
    def loss(self, batch, decay):
        penalty = decay().exp() * torch.stack([p.square().sum() for p in self.params.values()]).sum()
        return (self(batch) - batch).square().mean() + penalty


class Judge(mlo.Problem):
    def loss(self, batch, fit):
        return (fit(batch) - batch).square().mean()


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(-3.0))

    def forward(self) -> Tensor:
        return self.log


@pytest.mark.parametrize("estimator", ["one_step", "cg"])
def test_gradients_of_micro_batches_are_not_kept(estimator):
    """Where weights are what is large, sixteen take what two take."""

    def peak(accumulate: int) -> int:
        fit, decay = nn.Linear(400, 400), Decay()
        data = [torch.randn(2, 400) for _ in range(accumulate)]
        sgd = torch.optim.SGD
        low = Fit("fit", module=fit, optimizer=sgd(fit.parameters(), lr=0.1), data=data, accumulate=accumulate)
        top = Judge("decay", module=decay, optimizer=sgd(decay.parameters(), lr=0.1), data=data)
        engine = mlo.Engine([low, top], estimator, device="cpu")
        engine.step()
        with _PeakMemory() as memory:
            engine.step()
        return memory.peak

    assert peak(16) < 1.2 * peak(2)


@pytest.mark.parametrize("estimator", ["one_step", "darts", "cg"])
def test_memory_is_that_of_one_micro_batch(estimator):
    def peak(accumulate: int, rows: int) -> int:
        fit, judge = Deep(), Decay()
        adam = torch.optim.Adam
        data = [torch.randn(rows, 8) for _ in range(accumulate)]
        low = Fit("fit", module=fit, optimizer=adam(fit.parameters()), data=data, accumulate=accumulate)
        top = Judge("decay", module=judge, optimizer=adam(judge.parameters()), data=data, accumulate=accumulate)
        engine = mlo.Engine([low, top], estimator, device="cpu")
        with _PeakMemory() as memory:
            engine.step()
        return memory.peak

    alone = peak(1, 4000)
    assert peak(8, 4000) < 1.3 * alone
    assert peak(1, 32000) > 6 * alone


def test_running_statistics_go_from_one_micro_batch_to_the_next():
    """As after as many steps with a learning rate of zero."""

    class Normed(mlo.Problem):
        def loss(self, batch, decay):
            return self(batch).square().mean() + decay() * self.params["weight"].square().sum()

    def buffers(accumulate: int, steps: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        norm, decay = nn.BatchNorm1d(3), Decay()
        low = Normed(
            "fit",
            module=norm,
            optimizer=torch.optim.SGD(norm.parameters(), lr=0.0),
            data=[torch.randn(4, 3) for _ in range(3)],
            accumulate=accumulate,
            steps=steps,
        )
        top = Judge("decay", module=decay, optimizer=torch.optim.SGD(decay.parameters()), data=[torch.randn(4, 3)])
        mlo.Engine([low, top], "cg", device="cpu").step()
        return dict(norm.named_buffers())

    one, other = buffers(3, 1), buffers(1, 3)
    assert one["num_batches_tracked"] == 3
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["cg", "neumann", "nystrom", "penalty"])
@pytest.mark.parametrize("lookahead", [False, True])
def test_a_fresh_batch_is_the_next_one_and_is_not_used_up(kind, lookahead):
    """The curvature of the loss on the next batch, at the solution of the step on this one."""
    torch.manual_seed(3)
    first, second, judged = torch.randn(20, 8), 3 * torch.randn(20, 8), torch.randn(20, 8)
    taken = {}
    for fresh, data in ((True, [first, second]), (False, [first, second]), ("swapped", [second, first])):
        torch.manual_seed(0)
        fit, decay = Deep(), Decay()
        sgd = torch.optim.SGD
        low = Fit("fit", module=fit, optimizer=sgd(fit.parameters(), lr=0.0), data=data)
        top = Judge("decay", module=decay, optimizer=sgd(decay.parameters(), lr=0.1), data=[judged])
        options = {"kind": kind, "fresh_batch": fresh is True}
        options |= {"damping": 1.0} if kind in ("cg", "nystrom") else {"rate": 0.1}
        engine = mlo.Engine([low, top], options, lookahead=lookahead, device="cpu")
        taken[fresh] = engine.hypergradient("decay")["log"]
        single = engine.hypergradient("decay", torch.float32)["log"]
        torch.testing.assert_close(single.double(), taken[fresh], rtol=1 if kind == "nystrom" else 1e-3, atol=1e-6)
        engine.step()
        torch.testing.assert_close((torch.tensor(-3.0) - decay.log.detach()) / 0.1, taken[fresh], rtol=1e-6, atol=1e-12)
        assert low.stream.state_dict()["index"] == 1
    torch.testing.assert_close(taken[True], taken["swapped"], rtol=1e-9, atol=0)
    assert (taken[True] - taken[False]).abs() > 1e-4 * taken[False].abs()


class Remembering(nn.Module):
    """Its output depends on its buffers, which every call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(0.5 * x.detach().mean(0))
        self.gain.mul_(0.7).add_(0.6)
        return (self.linear(x - self.mean) * self.gain).tanh()


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(2))

    def forward(self) -> Tensor:
        return (self.value + torch.randn(2)).sigmoid()


class Follow(mlo.Problem):
    def loss(self, batch, top):
        x, reads = batch
        found = self(x)
        return (found.exp() * top()).square().mean() + (found - top()).square().mean() if reads else found.exp().mean()


class Weigh(mlo.Problem):
    def loss(self, batch, low):
        return low(batch[0]).sin().square().mean()


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"graph_memory": 0.0}, {"product": "forward"}], ids=str)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_buffers_and_noise_are_those_of_each_micro_batch(accumulate, options):
    """By finite differences, over several steps, with batches that do not read the top at all."""
    torch.manual_seed(0)
    data = [(torch.randn(4, 3), i != 1) for i in range(5)]
    low, top = Remembering(), Noisy()
    adam = torch.optim.Adam(low.parameters(), lr=0.05)
    problems = [
        Follow("low", module=low, optimizer=adam, data=data, steps=3, accumulate=accumulate),
        Weigh("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.1), data=data, accumulate=accumulate),
    ]
    engine = mlo.Engine(problems, {"kind": "unrolled", **options}, device="cpu")
    for _ in range(2):
        mlo.check(engine)
        expected = engine.hypergradient("top")["value"]
        before = top.value.detach().clone()
        engine.step()
        torch.testing.assert_close((before - top.value.detach()) / 0.1, expected, rtol=1e-9, atol=1e-13)


class Growing(Value):
    """Gives a factor, too, which every call raises."""

    def __init__(self, *value: float) -> None:
        super().__init__(*value)
        self.register_buffer("gain", torch.ones(()))

    def forward(self) -> tuple[Tensor, Tensor]:
        self.gain.mul_(1.5)
        return self.value, self.gain.clone()


class Bowl(mlo.Problem):
    def loss(self, batch, top):
        value, gain = self()
        return (gain * value.square() / 2 + batch * value * top()).sum()


class Size(mlo.Problem):
    def loss(self, batch, low):
        return low()[0].square().sum()


@pytest.mark.parametrize("product", ["exact", "forward", "central"])
@pytest.mark.parametrize("fresh", [False, True])
def test_curvature_at_the_solution_begins_with_the_buffers_there(fresh, product):
    """Not with those that a micro-batch had in the step."""
    low, top, rate = Growing(0.3, -0.7), Value(0.5, 0.2), 0.1
    data = [torch.tensor(factor) for factor in (1.0, 3.0, -2.0, 1.0)]
    problems = [
        Bowl("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=rate), data=data, accumulate=2),
        Size("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=rate)),
    ]
    engine = mlo.Engine(problems, {"kind": "cg", "product": product, "fresh_batch": fresh}, device="cpu")
    for turn in range(2):
        value, x, gain = low.value.detach().clone(), top.value.detach().clone(), low.gain.clone()
        factor, following = ((2.0, -0.5), (-0.5, 2.0))[turn]
        value = value - rate * ((1.5 + 2.25) / 2 * gain * value + factor * x)
        expected = -(following if fresh else factor) / (1.5**3 * gain) * 2 * value
        torch.testing.assert_close(engine.hypergradient("top")["value"], expected, rtol=1e-7, atol=0)
        engine.step()
        torch.testing.assert_close(low.gain, 2.25 * gain)
        torch.testing.assert_close(top.value.detach(), x - rate * expected, rtol=1e-7, atol=0)


class Grown(mlo.Problem):
    def loss(self, batch, low):
        value, gain = self()
        return (batch * gain * value * low()).sum()


class Near(mlo.Problem):
    def loss(self, batch, top):
        return (self() - top()[0]).square().sum()


def test_an_objective_moves_buffers_from_one_micro_batch_to_the_next():
    low, top, rate = Value(0.3, -0.7), Growing(0.5, 0.2), 0.1
    data = [torch.tensor(factor) for factor in (1.0, 3.0)]
    problems = [
        Near("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=rate)),
        Grown("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=rate), data=data, accumulate=2),
    ]
    engine = mlo.Engine(problems, "one_step", device="cpu")
    value, x = low.value.detach(), top.value.detach()
    stepped = value - 2 * rate * (value - x)
    expected = (1.5 * 1.0 + 2.25 * 3.0) / 2 * (x * stepped).sum()
    torch.testing.assert_close(engine.objective("top"), expected)
    assert top.gain == 1.0
    mlo.check(engine)


class Now(mlo.Problem):
    """Reads the other problem on positive batches only, where its gradient depends on it or does not."""

    bends = True

    def loss(self, batch, top):
        loss = (self() - batch).square().sum()
        return loss + (self() * top() if self.bends else top()).sum() if batch > 0 else loss


class Sum(mlo.Problem):
    def loss(self, batch, low):
        return low().square().sum()


@pytest.mark.parametrize("batches", [(-1.0, 2.0), (2.0, -1.0), (-1.0, -2.0, 3.0)], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_a_problem_may_be_read_in_some_micro_batches_only(estimator, batches):
    """The step of ``low`` moves by -0.1 / n of ``top``, as one of n micro-batches reads it, or by nothing."""
    low, top = Value(0.5, 0.2), Value(0.3, -0.4)
    data = list(map(torch.tensor, batches))
    for bends in (True, False):
        stack = [
            Now(
                "low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=0.1), data=data, accumulate=len(data)
            ),
            Sum("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.1)),
        ]
        stack[0].bends = bends
        made = mlo.Engine(stack, estimator, device="cpu")
        found = made.hypergradient("top")["value"]
        if not bends:
            assert not found.any()
        elif estimator in ("one_step", "unrolled"):
            mean = sum(batches) / len(batches)
            after = low.value.detach() - 0.2 * (low.value.detach() - mean) - 0.1 / len(data) * top.value.detach()
            torch.testing.assert_close(found, -0.2 / len(data) * after)
        else:
            assert found.all()


def test_a_problem_that_no_micro_batch_reads_is_reported():
    low, top = Value(0.5), Value(0.3)
    data = [torch.tensor(-1.0), torch.tensor(-2.0)]
    stack = [
        Now("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=0.1), data=data, accumulate=2),
        Sum("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.1)),
    ]
    with pytest.raises(mlo.GraphError, match="'low': its loss reads 'top', but no gradient flows"):
        mlo.Engine(stack, "one_step", device="cpu").step()
