"""Every estimator on every shape of graph, through every optimizer of torch.optim, against brute force in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial

import needs
import pytest
import torch
from analytic import LR, NESTED, NESTED_WITH_INNER_PATH, SHAPES, Point, Quadratics, Smooth
from brute_force_analytic import brute_force
from torch import Tensor

import mlo
from mlo.hypergradient import (
    Central,
    ConjugateGradient,
    Darts,
    Exact,
    FirstOrder,
    Forward,
    Neumann,
    Nystrom,
    OneSided,
    OneStep,
    Penalty,
    Sama,
    Truncated,
    Unrolled,
)

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:the gradient of 'mid' itself runs through 'low'"),
]

OPTIMIZERS: dict[str, dict[str, object]] = {
    "SGD": {},
    "SGD momentum": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "SGD nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "SGD maximize": {"lr": 0.01, "momentum": 0.5, "dampening": 0.3, "maximize": True, "weight_decay": 0.1},
    "Adam": {"weight_decay": 0.1},
    "Adam amsgrad": {"betas": (0.5, 0.6), "eps": 0.1, "amsgrad": True},
    "Adam maximize": {"eps": 0.1, "maximize": True},
    "AdamW": {"eps": 0.1, "weight_decay": 0.1},
    "RMSprop": {"weight_decay": 0.1},
    "RMSprop centered": {"centered": True, "momentum": 0.5, "eps": 0.1},
    "Adagrad": {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1},
    "Adadelta": {"lr": 1.0, "weight_decay": 0.1, "eps": 0.01},
    "Adamax": {"betas": (0.5, 0.6), "weight_decay": 0.1},
    "NAdam": {"eps": 0.1, "weight_decay": 0.1},
    "NAdam decoupled": {"eps": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "RAdam": {"betas": (0.9, 0.99), "eps": 0.1, "weight_decay": 0.1},
    "ASGD": {"lambd": 0.1, "weight_decay": 0.1},
    "ASGD averaging": {"t0": 2.0},
    "Rprop": {},
}
CLASSES = {name: c for name, c in vars(torch.optim).items() if inspect.isclass(c) and c is not torch.optim.Optimizer}
NOT_DIFFERENTIABLE = [name for name, c in CLASSES.items() if "differentiable" not in inspect.signature(c).parameters]


def inverse(damping: float) -> Callable[[Tensor], Tensor]:
    return lambda hessian: torch.linalg.inv(hessian + damping * torch.eye(len(hessian)))


def series(hessian: Tensor) -> Tensor:
    return 0.1 * sum(torch.linalg.matrix_power(torch.eye(len(hessian)) - 0.1 * hessian, k) for k in range(5))


assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)
Estimator = Callable[..., mlo.Estimator]
Reference = dict[str, object]
STEPS: dict[str, tuple[Estimator, Reference]] = {  # the estimator, and what brute force differentiates
    "one_step": (OneStep, {"last": 1}),
    "truncated": (partial(Truncated, steps=2), {"last": 2}),
    "unrolled": (Unrolled, {}),
}
SOLUTIONS: dict[str, tuple[Estimator, Reference]] = {
    "cg": (ConjugateGradient, {"inverse": inverse(0.0)}),
    "cg damped": (partial(ConjugateGradient, damping=0.3), {"inverse": inverse(0.3)}),
    "neumann": (partial(Neumann, terms=5, rate=0.1), {"inverse": series}),
    "nystrom": (partial(Nystrom, rank=3, damping=0.3), {"inverse": inverse(0.3)}),
}
THINNED = {"unrolled, thinned": (partial(Unrolled, every=2, graph_memory=0), {})}
EXACT = STEPS | THINNED | SOLUTIONS
NO_INNER_PATH = [*SHAPES, NESTED]
ALL = [*NO_INNER_PATH, NESTED_WITH_INNER_PATH]
CASES = [(shape, name) for name in EXACT for shape in (NO_INNER_PATH if name in SOLUTIONS else ALL)]


def problems(made: Quadratics, optimizer: str, rounds: int = 1) -> list[mlo.Problem]:
    """With the state that optimizers have after some rounds."""
    stack = made.problems(CLASSES[optimizer.split()[0]], steps=3, **OPTIMIZERS[optimizer])
    engine(made, stack, OneStep()).run(rounds)
    return stack


def engine(made: Quadratics, stack: list[mlo.Problem], estimator: object) -> mlo.Engine:
    return mlo.Engine(stack, estimator, inner_path=made.shape.inner_path, device="cpu")


def assert_exact(made: Quadratics, stack: list[mlo.Problem], estimators: Iterable[tuple[Estimator, Reference]]) -> None:
    """What the tops would step on and, by the last of the estimators, what they do step on."""
    tops = [problem for problem in stack if problem.name in made.shape.tops]
    for make, reference in estimators:
        run = engine(made, stack, make())
        expected = [brute_force(made, stack, top.name, **reference) for top in tops]
        found = [run.hypergradient(top.name)["value"] for top in tops]
        assert_close(found, expected, msg=lambda why, by=make: f"{by}: {why}")
    before = [top.module.value.detach().clone() for top in tops]
    run.step()
    taken = [(was - top.module.value.detach()) / LR for was, top in zip(before, tops, strict=True)]
    assert_close(taken, expected)


def errors(
    made: Quadratics, stack: list[mlo.Problem], estimators: Iterable[object], reference: Reference
) -> list[float]:
    """Of the first top's hypergradient, relative."""
    top = made.shape.tops[0]
    expected = brute_force(made, stack, top, **reference)
    found = [engine(made, stack, estimator).hypergradient(top)["value"] for estimator in estimators]
    return [float((f - expected).norm() / expected.norm()) for f in found]


def test_every_optimizer_is_here():
    assert {name.split()[0] for name in OPTIMIZERS} == CLASSES.keys() - NOT_DIFFERENTIABLE


EVERY_OPTIMIZER = [(SHAPES[2], 0), (SHAPES[2], 2), (NESTED, 0), (NESTED_WITH_INNER_PATH, 2)]
OTHERS = [(shape, 2) for shape in ALL if (shape, 2) not in EVERY_OPTIMIZER]  # which test_exact_products has with AdamW


@pytest.mark.parametrize(
    ("shape", "rounds"),
    [*EVERY_OPTIMIZER, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
    ids=str,
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_of_every_optimizer(optimizer, shape, rounds):
    made = Smooth.make(shape, settled=False)
    assert_exact(made, problems(made, optimizer, rounds), STEPS.values())


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name.split()[0] not in ("ASGD", "NAdam")])
def test_variables_in_double_precision_are_enough(optimizer):
    """Torch counts steps in the default precision (and keeps some coefficients of ASGD and NAdam in it)."""
    made = Smooth.make(SHAPES[0], settled=False)
    stack = problems(made, optimizer, rounds=0)
    expected = brute_force(made, stack, "top")
    torch.set_default_dtype(torch.float32)
    found = engine(made, stack, Unrolled()).hypergradient("top")["value"]
    assert_close(found, expected)


@pytest.mark.parametrize("product", [Exact(), Forward()], ids=["exact", "forward"])
@pytest.mark.parametrize(("shape", "estimator"), CASES, ids=str)
def test_exact_products(shape, estimator, product):
    made = Smooth.make(shape, settled=False)
    make, reference = EXACT[estimator]
    assert_exact(made, problems(made, "AdamW"), [(partial(make, product=product), reference)])


@pytest.mark.parametrize(("product", "order"), [(Central, 2), (OneSided, 1)], ids=["central", "one_sided"])
@pytest.mark.parametrize(("shape", "estimator"), CASES, ids=str)
def test_differences_converge_at_their_order(shape, estimator, product, order):
    made = Smooth.make(shape, settled=False)
    make, reference = EXACT[estimator]
    estimators = [make(product=product(radius=radius)) for radius in (1e-2, 1e-3)]
    far, near = errors(made, problems(made, "AdamW"), estimators, reference)
    assert far / near == pytest.approx(10**order, rel=0.3)
    assert near < 1e-3


@pytest.mark.parametrize("shape", ALL, ids=str)
def test_first_order_is_the_direct_term(shape):
    made = Smooth.make(shape, settled=False)
    assert_exact(made, problems(made, "Adam"), [(FirstOrder, {"last": 0})])


STEP_KNOBS = {  # each turned twice, what it converges to, and how near it comes
    "darts radius": ([Darts(radius=r) for r in (1e-1, 1e-2, 1e-3)], {"last": 1}, 1e-8),
    "sama radius": ([Sama(radius=r) for r in (1e-1, 1e-2, 1e-3)], {"last": 1, "at_end": True}, 1e-8),
    "truncated steps": ([Truncated(steps=n) for n in (1, 2, 3)], {}, 1e-12),
}


@pytest.mark.parametrize("knob", STEP_KNOBS)
@pytest.mark.parametrize("shape", NO_INNER_PATH, ids=str)
def test_steps_converge_as_their_knob_is_turned(shape, knob):
    made = Smooth.make(shape, settled=False)
    estimators, reference, near = STEP_KNOBS[knob]
    first, second, third = errors(made, problems(made, "AdamW"), estimators, reference)
    assert third < min(near, first / 10, second / 10)


SOLUTION_KNOBS = {
    "cg tolerance": ([ConjugateGradient(tolerance=t) for t in (0.9, 0.1, 1e-12)], 0.0, 1e-10),
    "cg damping": ([ConjugateGradient(damping=d) for d in (1.0, 1e-3, 1e-6)], 0.0, 1e-5),
    "neumann terms": ([Neumann(terms=n, rate=0.2) for n in (2, 20, 100)], 0.0, 1e-8),
    "nystrom rank": ([Nystrom(rank=n, damping=1.0) for n in (1, 2, 3)], 1.0, 1e-12),
    "nystrom damping": ([Nystrom(rank=3, damping=d) for d in (1.0, 1e-3, 1e-6)], 0.0, 1e-5),
    "penalty steps": ([Penalty(steps=n, rate=0.2, tilt=1e-4) for n in (2, 20, 80)], 0.0, 1e-6),
    "penalty tilt": ([Penalty(steps=80, rate=0.2, tilt=t) for t in (0.1, 1e-2, 1e-3)], 0.0, 1e-6),
}


@pytest.mark.parametrize("knob", SOLUTION_KNOBS)
@pytest.mark.parametrize("shape", NO_INNER_PATH, ids=str)
def test_solutions_converge_as_their_knob_is_turned(shape, knob):
    made = Smooth.make(shape)
    estimators, damping, near = SOLUTION_KNOBS[knob]
    first, second, third = errors(made, made.problems(lr=0.0), estimators, {"inverse": inverse(damping)})
    assert third < min(near, first / 10, second / 10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_converge_to_the_solution(shape):
    made = Smooth.make(shape)
    estimators = [Truncated(steps=n) for n in (2, 20, 60)]
    first, second, third = errors(made, made.problems(steps=60, lr=0.2), estimators, {"inverse": inverse(0.0)})
    assert third < min(1e-5, first / 10, second / 10)


class Row(Point):
    """Variables that are a matrix, which Muon requires."""

    def forward(self) -> Tensor:
        return self.value[0]


def two_levels(made: Quadratics, optimizer: str, estimator: object, lr: float = 0.1) -> mlo.Engine:
    low, top = made.problems()
    module = Row(low.module.value[None])
    low = type(low)("low", module=module, optimizer=CLASSES[optimizer](module.parameters(), lr=lr))
    return mlo.Engine([low, top], estimator, device="cpu")


@pytest.mark.parametrize("estimator", [*STEPS, "darts", "sama"])
@pytest.mark.parametrize("optimizer", NOT_DIFFERENTIABLE)
def test_optimizers_without_a_differentiable_step_are_refused(optimizer, estimator):
    with pytest.raises(mlo.ConfigError, match=f"{optimizer} (cannot be differentiated|evaluates the loss)"):
        two_levels(Quadratics.make(SHAPES[0]), optimizer, estimator)


@pytest.mark.parametrize("estimator", SOLUTIONS)
@pytest.mark.parametrize("optimizer", ["Adafactor", pytest.param("Muon", marks=needs.muon)])
def test_and_do_where_the_solution_is_differentiated(optimizer, estimator):
    made, (make, reference) = Quadratics.make(SHAPES[0]), SOLUTIONS[estimator]
    expected = brute_force(made, made.problems(), "top", **reference)
    assert_close(two_levels(made, optimizer, make(), lr=0.0).hypergradient("top")["value"], expected)
