"""Complex parameters and buffers: everything is as if each number were written as two real ones, as torch has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mlo

pytestmark = pytest.mark.usefixtures("float64")

OPTIMIZERS: dict[str, dict[str, object]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"weight_decay": 0.1},
    "AdamW": {"amsgrad": True},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "Adagrad": {"initial_accumulator_value": 0.1},
    "Adadelta": {"lr": 1.0},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "Rprop": {},
}
ESTIMATORS = [
    "one_step",
    {"kind": "one_step", "product": "forward"},
    {"kind": "one_step", "product": "central"},
    {"kind": "one_step", "product": "one_sided"},
    "unrolled",
    {"kind": "truncated", "steps": 2},
    "darts",
    "sama",
    "penalty",
    {"kind": "cg", "damping": 0.1, "warm_start": True},
    "neumann",
    {"kind": "neumann", "rate": 0.05, "terms": 4},
    {"kind": "nystrom", "rank": 9, "damping": 0.1},
]


def written(value: Tensor, real: bool) -> nn.Parameter:
    return nn.Parameter(torch.view_as_real(value).clone() if real else value.clone())


def read(value: Tensor) -> Tensor:
    return value if value.is_complex() else torch.view_as_complex(value)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128)


class Layer(nn.Module):
    """Complex weights, a real bias, and a complex buffer."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        self.weight, self.bias = written(0.5 * draw(2, 3), real), nn.Parameter(0.5 * torch.randn(2))
        self.register_buffer("mean", draw(2))

    def forward(self, x: Tensor) -> Tensor:
        z = x @ read(self.weight).T + self.bias
        self.mean = (0.9 * self.mean + 0.1 * z.detach().mean(0)).conj()
        return z * torch.tanh(z.abs())


class Upper(nn.Module):
    """Weights of the examples, and a complex factor of each feature."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        self.logs, self.factors = nn.Parameter(0.1 * torch.randn(20)), written(1 + 0.3 * draw(3), real)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * read(self.factors), self.logs.exp()


class Fit(mlo.Problem):
    def loss(self, batch, upper):
        x, weights = upper(batch[0])
        penalty = sum(p.abs().square().sum() for p in self.params.values())
        return (weights * (self(x) - batch[1]).abs().square().sum(1)).mean() + 0.5 * penalty


class Judge(mlo.Problem):
    def loss(self, batch, low):
        return (low(batch[0]) - batch[1]).abs().square().mean() + low.params["bias"].sin().sum()


def engine(real: bool, estimator: object, optimizer: str = "Adam", **problem: object) -> mlo.Engine:
    torch.manual_seed(0)
    low, upper, x, y = Layer(real), Upper(real), draw(20, 3), draw(20, 2)
    made = getattr(torch.optim, optimizer)(low.parameters(), **{"lr": 0.05, **OPTIMIZERS[optimizer]})
    levels = [
        Fit("low", module=low, optimizer=made, data=[(x, y)], steps=2, **problem),
        Judge("upper", module=upper, optimizer=torch.optim.Adam(upper.parameters(), 0.1), data=[(x, -y)]),
    ]
    return mlo.Engine(levels, estimator, device="cpu")


def outcome(run: mlo.Engine) -> list[Tensor]:
    run.run(2)
    found = [*run.hypergradient("upper").values(), *run.problems["low"].params.values()]
    return [torch.view_as_real(t).detach() if t.is_complex() else t.detach() for t in found]


def assert_alike(*args: object, **problem: object) -> None:
    real, complex_ = (outcome(engine(real, *args, **problem)) for real in (True, False))
    torch.testing.assert_close(complex_, real, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_every_estimator(estimator):
    assert_alike(estimator)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer):
    assert_alike("unrolled", optimizer)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "NAdam"])
def test_clipping_and_accumulation(optimizer):
    assert_alike("unrolled", optimizer, clip_norm=0.5, accumulate=2)


def test_check_and_diagnose():
    run = engine(False, "unrolled")
    run.run(1)
    mlo.check(run)
    mlo.check(run, "low")
    (row,) = mlo.diagnose(run, estimators=["unrolled"]).rows
    assert row.error < 1e-12
    assert row.cosine == pytest.approx(1.0)


def test_single_precision_is_raised_to_double():
    run = engine(False, "unrolled")
    exact = run.hypergradient("upper")
    for parameter in (p for problem in run.problems.values() for p in problem.module.parameters()):
        parameter.data = parameter.data.to(torch.complex64 if parameter.is_complex() else torch.float32)
    found = run.hypergradient("upper", torch.float64)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    assert found["factors"].dtype == torch.complex128


def test_conjugated_buffers_and_the_state_of_a_checkpoint():
    run, again = engine(False, "darts"), engine(False, "darts")
    run.problems["low"].module.mean = run.problems["low"].module.mean.conj()
    again.problems["low"].module.mean = again.problems["low"].module.mean.conj().resolve_conj()
    run.run(2)
    again.run(2)
    torch.testing.assert_close(run.problems["low"].module.mean, again.problems["low"].module.mean)
    assert run.problems["low"].module.mean.is_conj()


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("estimator", ["darts", {"kind": "cg", "warm_start": True}, "neumann"], ids=str)
def test_as_on_a_gpu(estimator):
    assert_alike(estimator)


class Conjugated(nn.Module):
    """The gradient of its factor is a lazy conjugate, which torch's Adam cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.1, 0.9, 6).reshape(3, 2) + 0.3j)
        self.factor = nn.Parameter(torch.tensor([0.5 - 0.2j, 0.3 + 0.4j]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real((x.to(self.weight.dtype) @ self.weight).exp() * self.factor.conj()).sum(-1)


@pytest.mark.parametrize("optimizer", ["Adam", "RMSprop", "NAdam"])
def test_gradients_that_are_lazy_conjugates(optimizer):
    class Low(mlo.Problem):
        def loss(self, batch, top):
            return (self(batch) - top(batch)).square().mean()

    class Top(mlo.Problem):
        def loss(self, batch, low):
            return low(batch).square().mean()

    torch.manual_seed(0)
    low, top, data = Conjugated(), nn.Linear(3, 2), [torch.randn(4, 3)]
    stepped = getattr(torch.optim, optimizer)(low.parameters(), lr=0.1)
    above = Top("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.1), data=data)
    engine = mlo.Engine([Low("low", module=low, optimizer=stepped, data=data), above], "unrolled", device="cpu")
    mlo.check(engine)
    engine.run(2)
    mlo.check(engine)
