"""check: hypergradients that are wrong are found, right programs pass, and what cannot be told is said."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from analytic import Point
from brute_force import small_lbt
from engine_state import same, snapshot
from small_lbt import noisy_lbt
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import mlo
from mlo.hypergradient import Pulled
from mlo.hypergradient.estimators.unrolled import Unrolled
from mlo.hypergradient.products import Exact
from mlo.training.check import differences

Loss = Callable[..., Tensor]


class Norm(nn.Module):
    """As in language models: computed in another precision than that of the model."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, h: Tensor) -> Tensor:
        f = h.to(self.dtype)
        return (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


class Rotary(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        angles = torch.arange(2).float()
        turned = torch.view_as_complex(h.float().reshape(-1, 2, 2)) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(1).type_as(h)


class Table(nn.Module):
    """Multiplies by a matrix that is no buffer, so that it is not cast."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.eye(4) + 0.1

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.table


class Cube(torch.autograd.Function):
    """Written with elementary operators, whose graph no one records."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.detach() ** 3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x.square()


class Cubed(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return Cube.apply(h)


class Softmax(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return F.softmax(h, dim=-1, dtype=torch.float32).to(h.dtype)


class HardGumbel(nn.Module):
    """Detaches inside a function of torch.nn.functional."""

    def forward(self, h: Tensor) -> Tensor:
        return F.gumbel_softmax(h, hard=True)


def net(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 1))


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.linspace(-0.3, 0.4, 6))

    def forward(self) -> Tensor:
        return self.logs.exp()


def errors(model: mlo.Problem, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square()[:, 0]


def weighted(self, batch, w):
    return (w() * errors(self, batch)).mean()


def judged(self, batch, model):
    return errors(model, batch).mean()


def engine(
    module: nn.Module | None = None, low: Loss = weighted, top: Loss = judged, steps: int = 3, **options: object
) -> mlo.Engine:
    """A model whose samples are weighted, with losses ``low`` and ``top``, after one round."""
    torch.manual_seed(0)
    module, w = module or net(), Weights()
    x = torch.randn(12, 3).to(next(module.parameters()).dtype)
    data = [(x[:6], x[:6].sum(1, keepdim=True)), (x[6:], x[6:].sum(1, keepdim=True))]
    fit = type("Fit", (mlo.Problem,), {"loss": low})
    judge = type("Judge", (mlo.Problem,), {"loss": top})
    estimator = options.pop("estimator", "unrolled")
    made = mlo.Engine(
        [
            fit("model", module=module, optimizer=torch.optim.SGD(module.parameters(), 0.2), data=data, steps=steps),
            judge("w", module=w, optimizer=torch.optim.SGD(w.parameters(), lr=0.1), data=data, **options),
        ],
        estimator,
        device="cpu",
    )
    made.run(1)
    return made


def random_mix(self, batch, w):
    x, y = batch
    return (w() * (self(torch.randn(6, 6).softmax(1) @ x) - y).square()[:, 0]).mean()


def random_mask(self, batch, w):
    return (w() * errors(self, batch) * (torch.rand(6) > 0.3).float()).mean()


def random_normal(self, batch, w):
    x, y = batch
    return (w() * errors(self, (x + 0.1 * torch.distributions.Normal(0.0, 1.0).sample((6, 3)), y))).mean()


def filled(self, batch, w):
    errors_of = torch.zeros(6)
    errors_of[:] = errors(self, batch)
    return (w() * errors_of).mean()


def own_target(self, batch, w):
    x, _ = batch
    return weighted(self, batch, w) + (w() * (self(x) - 2 * self(x.flip(0)).detach()).square()[:, 0]).mean()


def own_target_without_graph(self, batch, w):
    x, _ = batch
    with torch.no_grad():
        target = 2 * self(x.flip(0))
    return weighted(self, batch, w) + (w() * (self(x) - target).square()[:, 0]).mean()


def own_scale(self, batch, w):
    return weighted(self, batch, w) / errors(self, batch).mean().item()


def own_weights_as_constants(self, batch, w):
    decay = sum((p * p.data).sum() for p in self.params.values())
    return weighted(self, batch, w) * decay


def own_part_detached(self, batch, model):
    return judged(self, batch, model) + (self() * self().detach()).sum()


def own_part_without_graph(self, batch, model):
    with torch.no_grad():
        scale = self().sum()
    return judged(self, batch, model) * scale + self().sum() / float(self().sum())


def taught() -> mlo.Engine:
    """A model whose teacher is trained with the same weights, which the model does not see."""

    def fit(self, batch, w):
        return weighted(self, batch, w)

    def follow(self, batch, w, teacher):
        x, y = batch
        return weighted(self, (x, teacher(x)), w) + (teacher(x) - y).square().mean() * self(x).square().mean()

    def judge(self, batch, model, teacher):
        return judged(self, batch, model) + judged(self, batch, teacher)

    torch.manual_seed(0)
    x = torch.randn(6, 3)
    stack = []
    for name, loss, module, held in (
        ("teacher", fit, net(), ()),
        ("model", follow, net(), ("teacher",)),
        ("w", judge, Weights(), ()),
    ):
        kind, optimizer = type(name, (mlo.Problem,), {"loss": loss}), torch.optim.SGD(module.parameters(), lr=0.2)
        data = [(x, x.sum(1, keepdim=True))]
        stack.append(
            kind(name, module=module, optimizer=optimizer, data=data, held=held, steps=1 if name == "w" else 2)
        )
    return mlo.Engine(stack, "unrolled", device="cpu")


RIGHT = {
    "float32 norm": lambda: engine(net(Norm(torch.float32))),
    "bfloat16 norm": lambda: engine(net(Norm(torch.bfloat16))),
    "float32 norm in float64": lambda: engine(net(Norm(torch.float32)).double()),
    "float32 softmax": lambda: engine(net(Softmax())),
    "float32 rotation": lambda: engine(net(Rotary())),
    "float32 table": lambda: engine(net(Table())),
    "autograd function": lambda: engine(net(Cubed())),
    "spectral norm": lambda: engine(net(parametrizations.spectral_norm(nn.Linear(4, 4)))),
    "batch norm and dropout": lambda: engine(net(nn.BatchNorm1d(4), nn.Dropout(0.3))),
    "matrix of random numbers": lambda: engine(low=random_mix),
    "random mask": lambda: engine(low=random_mask),
    "random distribution": lambda: engine(low=random_normal),
    "new tensor filled": lambda: engine(low=filled),
    "hard gumbel softmax": lambda: engine(net(HardGumbel())),
    "own target": lambda: engine(low=own_target),
    "own target without graph": lambda: engine(low=own_target_without_graph),
    "own scale as a number": lambda: engine(low=own_scale),
    "own weights as constants": lambda: engine(low=own_weights_as_constants),
    "own part of the top detached": lambda: engine(top=own_part_detached),
    "own part of the top without graph": lambda: engine(top=own_part_without_graph),
    "held read": lambda: taught(),
}


@pytest.mark.parametrize("program", RIGHT)
def test_right_programs_pass(program):
    made = RIGHT[program]()
    before = snapshot(list(made.problems.values()))
    mlo.check(made)
    assert same(snapshot(list(made.problems.values())), before)
    assert all("loss" not in vars(problem) for problem in made.problems.values())


def test_a_loss_that_an_instance_has_of_its_own_stays():
    made = engine(steps=1)
    problem = made.problems["model"]
    loss = problem.loss = partial(weighted, problem)
    mlo.check(made)
    assert problem.loss is loss


QUICK = ("float32 norm", "own target", "held read", "one percent", "read detached", "truncated")


def cases(programs: dict[str, object]) -> list[object]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in programs]


@pytest.mark.parametrize("program", cases(RIGHT))
def test_in_right_programs_one_percent_too_much_is_seen(program, monkeypatch):
    made = RIGHT[program]()
    real = made.hypergradient
    monkeypatch.setattr(made, "hypergradient", lambda *args: {n: 1.01 * v for n, v in real(*args).items()})
    with pytest.raises(mlo.HypergradientError, match="off by"):
        mlo.check(made)


def part_of_the_read_detached(self, batch, w):
    return ((0.9 * w() + 0.1 * w().detach()) * errors(self, batch)).mean()


def part_of_the_read_without_graph(self, batch, w):
    with torch.no_grad():
        scale = w().mean()
    return scale * weighted(self, batch, w)


def read_as_a_number(self, batch, w):
    return weighted(self, batch, w) / w().mean().item()


def read_by_its_data(self, batch, w):
    return weighted(self, batch, w) / w().data.mean()


def read_in_place(self, batch, w):
    target = torch.zeros(6)
    target[:] = w().detach()
    return weighted(self, batch, w) * target.mean()


def read_mixed_with_own(self, batch, w):
    target = (w().mean() * self(batch[0])).detach()
    return weighted(self, batch, w) + (self(batch[0]) - target).square().mean()


def top_read_detached(self, batch, model):
    return (errors(model, batch) * (1 + model(batch[0]).detach()[:, 0].square())).mean()


class KeptState:
    """A loss that is not a function of what it reads, but also of what it read before."""

    def __init__(self):
        self.sum = 0.0

    def __call__(self, problem, batch, w):
        self.sum = self.sum + w().sum()
        return weighted(problem, batch, w) * (1 + 0.01 * self.sum)


class Damaged(Unrolled):
    """Unrolled, with its answer multiplied."""

    factor: float = 1.01

    def pull(self, steps, cotangent, targets, warm):
        back = super().pull(steps, cotangent, targets, warm)
        found = {n: None if v is None else tuple(self.factor * t for t in v) for n, v in back.cotangents.items()}
        return Pulled(found, back.metrics, back.solution)


WRONG = {
    "one percent": lambda **of: engine(estimator=Damaged(), **of),
    "flipped": lambda **of: engine(estimator=Damaged(factor=-1.0), **of),
    "truncated": lambda **of: engine(estimator={"kind": "truncated", "steps": 2}, **of),
    "only the last step": lambda **of: engine(estimator="one_step", **of),
    "rough differences": lambda **of: engine(estimator={"kind": "darts", "radius": 3.0}, steps=1, **of),
    "read detached": lambda **of: engine(low=part_of_the_read_detached, steps=1, **of),
    "read without graph": lambda **of: engine(low=part_of_the_read_without_graph, **of),
    "read as a number": lambda **of: engine(low=read_as_a_number, **of),
    "read by its data": lambda **of: engine(low=read_by_its_data, **of),
    "read in place": lambda **of: engine(low=read_in_place, **of),
    "read mixed with own": lambda **of: engine(low=read_mixed_with_own, **of),
    "read of the top detached": lambda **of: engine(top=top_read_detached, **of),
}


@pytest.mark.parametrize("program", WRONG)
def test_wrong_hypergradients_are_found(program):
    with pytest.raises(mlo.HypergradientError, match="'w' is not the derivative of its loss"):
        mlo.check(WRONG[program](module=net()))


@pytest.mark.parametrize("program", cases(WRONG))
def test_wrong_hypergradients_are_found_where_a_module_computes_in_float32(program):
    with pytest.raises(mlo.HypergradientError, match="'w' is not the derivative of its loss"):
        mlo.check(WRONG[program](module=net(Norm(torch.float32))))


@pytest.mark.parametrize("part", ["own", "cross"])
def test_a_missing_second_derivative_is_found(part, monkeypatch):
    real = Exact.open

    def without(self, *point):
        right = real(self, *point)

        def product(vector, own=True, cross=True):
            h, mixed = right(vector, own, cross)
            if part == "own":
                return tuple(map(torch.zeros_like, h)), mixed
            return h, {n: v if v is None else tuple(0.99 * t for t in v) for n, v in mixed.items()}

        return product

    monkeypatch.setattr(Exact, "open", without)
    made = engine(net(Norm(torch.float32)), estimator={"kind": "unrolled", "graph_memory": 0})
    with pytest.raises(mlo.HypergradientError, match="'w' is not the derivative of its loss"):
        mlo.check(made)


def rounded(noise: float, slope: float = 1.0, grid: float = 0.0) -> Callable[[int, float], float]:
    """A smooth function of a distance, with noise of this size, or on a grid."""

    def loss(direction: int, distance: float) -> float:
        draw = torch.Generator().manual_seed(hash((direction, distance)) % 2**31)
        value = 1 + slope * torch.tensor(distance).double().sin().item() + distance**2
        value += noise * torch.randn((), generator=draw).item()
        return round(value / grid) * grid if grid else value

    return loss


@pytest.mark.parametrize("loss", [rounded(0), rounded(1e-15), rounded(1e-8), rounded(0, grid=1e-7), rounded(1e-7)])
def test_noise_neither_hides_an_error_of_a_percent_nor_makes_one(loss):
    right, wrong = [1.0] * 4, [1.01] * 4
    found = differences(loss, right, 1e-5)
    assert not found.refute(right, 1e-5)
    assert found.clear(1e-2 / 3)
    assert differences(loss, wrong, 1e-5).refute(wrong, 1e-5)


@pytest.mark.parametrize("slope", [1.0, 1e-3, 0.0])
def test_where_noise_hides_it_nothing_is_told(slope):
    right = [slope] * 4
    found = differences(rounded(1e-4, slope), right, 1e-5)
    assert not found.refute(right, 1e-5)
    assert not found.clear(1e-2)


@pytest.mark.parametrize("grid", [1e-4, 1e-5, 1e-6])
def test_a_loss_on_a_grid_is_measured_where_it_moves(grid):
    assert not differences(rounded(0, grid=grid), [1.0] * 4, 1e-5).refute([1.0] * 4, 1e-5)
    assert differences(rounded(0, grid=grid), [1.5] * 4, 1e-5).refute([1.5] * 4, 1e-5)


def test_a_small_derivative_is_measured_at_a_larger_radius():
    """At the first one, rounding in float64 would hide an error of a percent."""
    loss, right, wrong = rounded(0, slope=1e-7), [1e-7] * 4, [1.01e-7] * 4
    assert differences(loss, wrong, 1e-5).refute(wrong, 1e-5)
    assert differences(loss, right, 1e-5).clear(1e-3)


def test_a_loss_that_nothing_moves_has_no_derivative():
    found = differences(lambda direction, distance: 1.0, [0.0] * 4, 1e-5)
    assert found.clear(0.0)
    assert not found.refute([0.0] * 4, 1e-5)
    assert found.refute([1e-9] * 4, 1e-5)


def test_what_cannot_be_told_is_said():
    """NumPy rounds to float32 where torch is not asked."""

    def coarse(self, batch, model):
        loss = judged(self, batch, model)
        return loss + (loss.detach().half().float().numpy().astype("float16").item() - loss.detach())

    made = engine(top=coarse, steps=1)
    made.problems["model"].optimizer.param_groups[0]["lr"] = 1e-4
    with pytest.raises(mlo.InconclusiveError, match=r"'w' cannot be checked.* an error of 1 % would not be seen"):
        mlo.check(made)


@pytest.mark.parametrize(("steps", "estimator"), [(1, "one_step"), (1, "unrolled"), (4, "unrolled")])
def test_an_exact_estimator_passes_in_float64_whatever_the_modules_are(steps, estimator):
    stack = small_lbt("adam", steps=steps)
    assert stack[0].module.head.weight.dtype == torch.float32
    engine = mlo.Engine(stack, estimator, device="cpu")
    engine.run(2)
    mlo.check(engine)


def test_batch_norm_and_dropout_pass_too():
    engine = mlo.Engine(noisy_lbt(), "one_step", device="cpu")
    engine.run(2)
    mlo.check(engine, "arch")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda v: 10 * v,
        lambda v: -v,
        lambda v: v.sign(),
        lambda v: v * (1 + 1e-3 * torch.arange(v.numel(), dtype=v.dtype).view_as(v)),
    ],
    ids=["scaled", "flipped", "signs", "slightly off"],
)
def test_a_broken_product_fails(break_it, monkeypatch):
    real = Exact.open

    def broken(self, *point):
        right = real(self, *point)
        return lambda vector, own=True, cross=True: right(tuple(break_it(v) for v in vector), own, cross)

    monkeypatch.setattr(Exact, "open", broken)
    engine = mlo.Engine(small_lbt("momentum"), "one_step", device="cpu")
    with pytest.raises(mlo.HypergradientError, match="'arch' is not the derivative of its loss"):
        mlo.check(engine)


@pytest.mark.parametrize("size", [3, 30_000])
def test_the_error_is_reported_whatever_the_number_of_parameters(size):
    """A tenth of the gradient is hidden: along a random direction both it and its derivative are small, alike."""

    class Hidden(mlo.Problem):
        def loss(self, batch, top):
            return (self() - 0.9 * top() - 0.1 * top().detach()).square().sum()

    class Top(mlo.Problem):
        def loss(self, batch, low):
            return (low() - 2).square().sum()

    stack = []
    for cls, name in ((Hidden, "low"), (Top, "top")):
        module = Point(torch.randn(size, generator=torch.Generator().manual_seed(0)).double())
        stack.append(cls(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1)))
    with pytest.raises(mlo.HypergradientError, match=r"off by (1\.0e-01|9\.9e-02) of its size"):
        mlo.check(mlo.Engine(stack, "one_step", device="cpu"))


def test_a_path_that_a_loss_hides_is_found():
    class Hidden(mlo.Problem):
        def loss(self, batch, top):
            return (self() - top() - 0.5 * top().detach() ** 2).square().sum()

    class Top(mlo.Problem):
        def loss(self, batch, low):
            return low().square().sum()

    stack = []
    for cls, name in ((Hidden, "low"), (Top, "top")):
        module = Point(torch.ones(2))
        stack.append(cls(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1)))
    with pytest.raises(
        mlo.HypergradientError, match=r"computed with one_step through 1 step\(s\) of 'low'\.(?s:.*)not a pure function"
    ):
        mlo.check(mlo.Engine(stack, "one_step", device="cpu"))


def test_of_an_estimator_at_a_minimum_it_says_where_to_look():
    for estimator in ("cg", "neumann", "nystrom", "penalty", "one_step"):
        with pytest.raises(mlo.HypergradientError) as error:
            mlo.check(engine(estimator=estimator, steps=2))
        looks = "at a minimum: look at their residual" in str(error.value) and "mlo.diagnose" in str(error.value)
        assert looks == (estimator != "one_step")
