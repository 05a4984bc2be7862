"""What losses do in practice that could cause side effects, or go wrong when outputs of reads are cached."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from analytic import Point
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mlo

pytestmark = pytest.mark.usefixtures("float64")

ESTIMATORS = ["one_step", {"kind": "one_step", "product": {"kind": "central", "radius": 1e-4}}]


def problem(cls: type[mlo.Problem], name: str, module: nn.Module, lr: float = 0.1, **options: object) -> mlo.Problem:
    return cls(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=lr), **options)


class Top(mlo.Problem):
    def loss(self, batch, low):
        return low().square().sum() + 0 * self().sum()


def two_levels(loss, *, low: nn.Module | None = None, top: nn.Module | None = None, **options: object):
    """A lower problem with this loss (self, batch, top) under a top whose loss is its square."""
    cls = type("Low", (mlo.Problem,), {"loss": loss})
    return [
        problem(cls, "low", low or Point(torch.tensor([0.3, -0.2])), **options),
        problem(Top, "top", top or Point(torch.tensor([0.7, 0.4]))),
    ]


def hypergradient(stack: list[mlo.Problem], estimator: object) -> Tensor:
    return mlo.Engine(stack, estimator, device="cpu").hypergradient("top")["value"]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_one_problem_read_by_two_names_counts_once(estimator):
    class Low(mlo.Problem):
        def loss(self, batch, a, b):
            return (self() - a()).square().sum() + (self() * b()).sum()

    low = problem(Low, "low", Point(torch.tensor([0.3, -0.2])), reads={"a": "top", "b": "top"})
    top = problem(Top, "top", Point(torch.tensor([0.7, 0.4])))
    t, x = low.module.value.detach(), top.module.value.detach()
    stepped = t - 0.1 * (2 * (t - x) + x)
    torch.testing.assert_close(hypergradient([low, top], estimator), 2 * stepped * 0.1, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_a_read_under_no_grad_carries_no_gradient(estimator):
    def silent(self, batch, top):
        with torch.no_grad():
            read = top()
        return (self() - read).square().sum()

    with pytest.raises(mlo.GraphError, match="'low': its loss reads 'top', but no gradient flows"):
        hypergradient(two_levels(silent), estimator)

    def half(self, batch, top):
        with torch.no_grad():
            read = top()
        return (self() * read).sum() + (self() * top().square()).sum()

    stack = two_levels(half)
    t, x = (p.module.value.detach() for p in stack)
    stepped = t - 0.1 * (x + x.square())
    torch.testing.assert_close(hypergradient(stack, estimator), 2 * stepped * -0.1 * 2 * x, rtol=1e-6, atol=1e-9)


def test_caching_reads_changes_no_real_step():
    """Dropout in the reader and in what it reads, called twice: the same masks whether or not a pullback follows."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.drop = nn.Parameter(torch.ones(6)), nn.Dropout(0.5)

        def forward(self) -> Tensor:
            return self.drop(self.value)

    def loss(self, batch, top):
        return (self() * top()).sum() + (self() * 2 * top()).sum() + self().square().sum()

    taken = []
    for estimator in ("first_order", "one_step", "darts"):
        stack = two_levels(loss, low=Noisy(), top=Noisy())
        torch.manual_seed(4)
        engine = mlo.Engine(stack, estimator, lookahead=False, device="cpu")
        engine.step()
        taken.append((engine.losses["low"], stack[0].module.value.detach().clone()))
    for others in taken[1:]:
        assert all(torch.equal(a, b) for a, b in zip(taken[0], others, strict=True))


@pytest.mark.parametrize("draw", [np.random.rand, random.random], ids=["numpy", "python"])
def test_randomness_outside_torch_is_replayed_and_put_back(draw):
    def loss(self, batch, top):
        mix = draw()
        return (mix * self() * top().sin()).sum() + (self() - mix * top()).square().sum()

    stack = two_levels(loss)
    exact, central = (mlo.Engine(stack, estimator, device="cpu") for estimator in ESTIMATORS)
    np.random.seed(1)
    random.seed(1)
    states = np.random.get_state()[1].copy(), np.random.get_state()[2], random.getstate()
    found = exact.hypergradient("top")["value"]
    torch.testing.assert_close(central.hypergradient("top")["value"], found, rtol=1e-6, atol=1e-9)
    after = np.random.get_state()[1], np.random.get_state()[2], random.getstate()
    assert np.array_equal(states[0], after[0])
    assert states[1:] == after[1:]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_a_second_backward_after_the_first_top_has_moved_sees_its_own_reads(estimator):
    class Low(mlo.Problem):
        def loss(self, batch, one, two):
            return (
                (self() - one().sin()).square().sum()
                + (self() * two().square()).sum()
                + (self() * two.params["value"]).sum()
            )

    class Judge(mlo.Problem):
        def loss(self, batch, low):
            return (low() - 1).square().sum() + self().square().sum()

    values = [torch.tensor(v) for v in ([0.2, 0.3], [0.5, -0.4], [0.6, 0.1])]
    low, one, two = (Point(v) for v in values)
    stack = [
        problem(Low, "low", low),
        problem(Judge, "one", one, steps=2),
        problem(Judge, "two", two),
    ]
    mlo.Engine(stack, estimator, lookahead=False, device="cpu").step()
    t, a, b = values
    stepped = t - 0.1 * (2 * (t - a.sin()) + b.square() + b)
    upper = 2 * (stepped - 1)
    moved = a.clone()
    for _ in range(2):  # both steps go through the lower step where it was taken
        moved = moved - 0.1 * (2 * moved + upper * 0.1 * 2 * a.cos())
    torch.testing.assert_close(one.value.detach(), moved, rtol=1e-6, atol=1e-9)
    expected = b - 0.1 * (2 * b + upper * -0.1 * (2 * b + 1))
    torch.testing.assert_close(two.value.detach(), expected, rtol=1e-6, atol=1e-9)


def test_lookahead_with_several_tops_pulls_each_back_once():
    class Low(mlo.Problem):
        def loss(self, batch, one, two, three):
            return (self() - one() * two() * three()).square().sum()

    class Judge(mlo.Problem):
        def loss(self, batch, low):
            return low().square().sum()

    stack = [problem(Low, "low", Point(torch.ones(2)))]
    stack += [problem(Judge, name, Point(torch.full((2,), 0.5))) for name in ("one", "two", "three")]
    engine = mlo.Engine(stack, "darts", device="cpu")
    engine.step()
    assert engine.pullbacks == {"low": 3}


def test_a_buffer_that_forward_assigns_anew_is_kept():
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.ones(2))
            self.register_buffer("mean", torch.zeros(2))

        def forward(self) -> Tensor:
            self.mean = 0.5 * self.mean + 0.5 * self.value
            return self.value * (1 + self.mean.detach())

    stack = two_levels(lambda self, batch, top: (self() - top()).square().sum(), low=Average(), lr=0.0)
    engine = mlo.Engine(stack, "one_step", device="cpu")
    engine.hypergradient("top")
    assert torch.equal(stack[0].module.mean, torch.zeros(2))
    engine.run(2)
    torch.testing.assert_close(stack[0].module.mean, torch.full((2,), 0.75))
    assert not stack[0].module.mean.requires_grad


def test_buffers_that_a_state_dict_leaves_out_are_saved():
    class Hidden(Point):
        def __init__(self) -> None:
            super().__init__(torch.ones(2))
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self) -> Tensor:
            self.calls += 1
            return self.value * (1 + self.calls)

    def stack():
        return two_levels(lambda self, batch, top: (self() - top()).square().sum(), low=Hidden())

    engine = mlo.Engine(stack(), "one_step", device="cpu")
    engine.run(3)
    resumed = mlo.Engine(stack(), "one_step", device="cpu")
    resumed.load_state_dict(engine.state_dict())
    assert resumed.problems["low"].module.calls == 3
    assert resumed.metrics() == engine.metrics()


def test_a_gradient_that_is_not_finite_is_not_stepped_on():
    stack = two_levels(lambda self, batch, top: (self() * 0).abs().sqrt().sum() + (self() * top()).sum())
    before = stack[0].module.value.detach().clone()
    with pytest.raises(
        mlo.NonFiniteLossError, match="'low': the gradient of its parameter 'value' is nan at its step 1"
    ):
        mlo.Engine(stack, "one_step", device="cpu").step()
    assert torch.equal(stack[0].module.value, before)


def test_hooks_of_an_uppermost_optimizer_run_in_real_steps_alone():
    stack = two_levels(lambda self, batch, top: (self() - top()).square().sum())
    calls = []
    stack[1].optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    stack[1].optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    engine = mlo.Engine(stack, "darts", device="cpu")
    engine.hypergradient("top")
    assert not calls
    engine.step()
    assert calls == ["pre", "post"]


@dataclass
class Pair:
    one: Tensor
    two: Tensor


class Structured(nn.Module):
    """Outputs of a kind, from arguments of every kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.value = kind, nn.Parameter(torch.tensor([0.7, 0.4]))

    def forward(self, array: np.ndarray, scale: float = 1.0, name: str = "") -> object:
        one, two = self.value.sin() * scale, self.value * torch.from_numpy(array)
        return {"tuple": (one, two, name), "dict": {"a": one, "b": [two]}, "object": Pair(one, two)}[self.kind]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("kind", ["tuple", "dict", "object"])
def test_reads_take_and_give_structures(kind, estimator):
    array = np.array([1.0, 2.0])

    def loss(self, batch, top):
        total = 0
        for scale in (1.0, 2.0):
            found = top(array, scale=scale, name="x")
            one, two = (
                (found[0], found[1])
                if kind == "tuple"
                else (found["a"], found["b"][0])
                if kind == "dict"
                else (found.one, found.two)
            )
            total = total + (self() * one).sum() + (self() - two).square().sum()
        return total

    stack = two_levels(loss, top=Structured(kind))
    stack[1] = problem(
        type("T", (mlo.Problem,), {"loss": lambda self, batch, low: low().square().sum()}), "top", stack[1].module
    )
    t, x = stack[0].module.value.detach(), stack[1].module.value.detach().clone().requires_grad_()
    scaled = torch.from_numpy(array)
    gradient = 3 * x.sin() + 4 * (t - x * scaled)
    expected = torch.autograd.grad((t - 0.1 * gradient).square().sum(), x)[0]
    torch.testing.assert_close(hypergradient(stack, estimator), expected, rtol=1e-6, atol=1e-9)


def test_a_loaders_generator_may_not_serve_two():
    draw = torch.Generator()
    data = TensorDataset(torch.randn(4, 2))
    loaders = [DataLoader(data, batch_size=2, shuffle=True, generator=draw) for _ in range(2)]
    stack = two_levels(lambda self, batch, top: (self() - top()).square().sum(), data=loaders[0])
    stack[1] = problem(Top, "top", stack[1].module, data=loaders[1])
    with pytest.raises(mlo.ConfigError, match="the data of 'low' and of 'top' draw from one torch"):
        mlo.Engine(stack, device="cpu")


def test_no_substitute_is_left_after_a_loss_that_raises():
    def loss(self, batch, top):
        top()
        raise ZeroDivisionError

    stack = two_levels(loss)
    engine = mlo.Engine(stack, "one_step", device="cpu")
    for call in (engine.step, lambda: engine.hypergradient("top")):
        state = torch.get_rng_state()
        with pytest.raises(ZeroDivisionError):
            call()
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.substitute is None for p in stack)
    assert stack[0].module.value.grad is None


@pytest.mark.parametrize("bound", [0.01, 100.0])
def test_a_real_step_is_clipped_as_torch_clips(bound):
    stack = two_levels(lambda self, batch, top: (5 * self() - top()).square().sum(), clip_norm=bound)
    twin = stack[0].module.value.detach().clone().requires_grad_()
    (5 * twin - stack[1].module.value.detach()).square().sum().backward()
    torch.nn.utils.clip_grad_norm_([twin], bound)
    mlo.Engine(stack, "one_step", device="cpu").step()
    torch.testing.assert_close(stack[0].module.value.detach(), twin.detach() - 0.1 * twin.grad)
    assert stack[0].module.value.grad is None


def test_a_hypergradient_leaves_reports_and_warm_starts_as_the_last_step_made_them():
    def low(self, batch, top):
        return (self() * top()).square().sum() + self().pow(4).sum()

    estimator = {"kind": "cg", "iterations": 1, "warm_start": True}
    made = mlo.Engine(two_levels(low), estimator, device="cpu")
    made.run(2)
    metrics, warm = made.metrics(), [each.clone() for each in made.state_dict()["warm"]["top"]["low"]]
    assert "low/residual" in metrics
    made.hypergradient("top")
    assert made.metrics() == metrics
    assert all(map(torch.equal, made.state_dict()["warm"]["top"]["low"], warm))


class Counted(Point):
    """Attributes that the next call sees."""

    def __init__(self, value: Tensor) -> None:
        super().__init__(value)
        self.calls, self.outputs, self.last, self.average = 0, [], {}, torch.ones(2)


class ByCount(Counted):
    def forward(self) -> Tensor:
        self.calls += 1
        return super().forward() * self.calls


class ByList(Counted):
    def forward(self) -> Tensor:
        self.outputs.append(super().forward().detach())
        return super().forward() + sum(self.outputs)


class ByDict(Counted):
    def forward(self) -> Tensor:
        output = super().forward() + self.last.get("output", 0)
        self.last["output"] = output.detach()
        return output


class ByTensor(Counted):
    def forward(self) -> Tensor:
        self.average.mul_(0.9).add_(super().forward().detach(), alpha=0.1)
        return super().forward() * self.average


class ByGenerator(Counted):
    def __init__(self, value: Tensor) -> None:
        super().__init__(value)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self) -> Tensor:
        return super().forward() + torch.rand(2, generator=self.generator)


class ByNumpy(Counted):
    def __init__(self, value: Tensor) -> None:
        super().__init__(value)
        self.generator = np.random.default_rng(0)

    def forward(self) -> Tensor:
        return super().forward() * self.generator.random()


def by_hook() -> Point:
    module, calls = Point(torch.tensor([0.3, -0.2])), []
    module.register_forward_hook(lambda module, args, output: calls.append(1) or output * len(calls))
    return module


def counted(kind: type[Counted]) -> Counted:
    return kind(torch.tensor([0.3, -0.2]))


REMEMBERING = {
    "a count": (lambda: counted(ByCount), "it changes 'calls' of the module of 'low'"),
    "a list": (lambda: counted(ByList), "it changes 'outputs' of the module of 'low'"),
    "a dictionary": (lambda: counted(ByDict), "it changes 'last' of the module of 'low'"),
    "a tensor": (lambda: counted(ByTensor), "it changes 'average' of the module of 'low'"),
    "a generator": (lambda: counted(ByGenerator), "it changes 'generator' of the module of 'low'"),
    "a generator of NumPy": (lambda: counted(ByNumpy), "it changes 'generator' of the module of 'low'"),
    "a forward hook": (by_hook, "a forward hook may count its calls"),
}


@pytest.mark.parametrize("estimator", ["one_step", "darts", "cg"])
@pytest.mark.parametrize("name", REMEMBERING)
def test_a_module_whose_output_depends_on_earlier_calls_is_refused(name, estimator):
    """Each evaluation of the same step would see other values."""
    make, what = REMEMBERING[name]
    low = make()
    stack = two_levels(lambda self, batch, top: (self() - top()).square().sum(), low=low)
    for call in (lambda made: made.step(), lambda made: made.hypergradient("top")):
        random = torch.get_rng_state()
        with pytest.raises(mlo.GraphError, match=f"'low': its loss has another value .*{what}.*register_buffer"):
            call(mlo.Engine(stack, estimator, device="cpu"))
        assert low.value.tolist() == torch.tensor([0.3, -0.2]).tolist()
        assert (vars(low).get("calls", 0), vars(low).get("outputs", []), vars(low).get("last", {})) == (0, [], {})
        assert torch.equal(torch.get_rng_state(), random)


def test_a_loss_that_depends_on_earlier_calls_is_refused():
    def annealed(self, batch, top):
        self.factor = 0.5 * getattr(self, "factor", 1.0)
        return (self() - top()).square().sum() * self.factor

    (low, top) = two_levels(annealed)
    with pytest.raises(mlo.GraphError, match=r"it changes 'factor' of problem 'low'.*self.steps_taken"):
        mlo.Engine([low, top], "one_step", device="cpu").step()
    assert "factor" not in vars(low)


class Noted(Counted):
    """Attributes that no output depends on: a log, a cache, a value for the loss."""

    def forward(self) -> Tensor:
        self.calls += 1
        self.outputs.append(self.calls)
        self.last.setdefault("table", torch.arange(2.0).cos())
        self.norm = super().forward().square().sum()
        return super().forward() * self.last["table"] * torch.rand(2)


@pytest.mark.parametrize("estimator", ["one_step", "darts", "cg"])
def test_a_module_may_note_and_cache(estimator):
    def loss(self, batch, top):
        return (self() - top()).square().sum() + self.module.norm

    noted = counted(Noted)
    plain = type("Plain", (Noted,), {"forward": lambda self: self.value * torch.arange(2.0).cos() * torch.rand(2)})
    found = []
    for low in (noted, plain(torch.tensor([0.3, -0.2]))):
        torch.manual_seed(0)
        body = (
            loss
            if low is noted
            else lambda self, batch, top: (self() - top()).square().sum() + self.params["value"].square().sum()
        )
        engine = mlo.Engine(two_levels(body, low=low), estimator, device="cpu")
        engine.step()
        engine.step()
        found.append((low.value.detach(), engine.problems["top"].module.value.detach()))
    torch.testing.assert_close(found[0], found[1])
