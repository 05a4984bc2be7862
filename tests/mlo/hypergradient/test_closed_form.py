"""Every estimator that solves a linear system, against the closed form, on every shape of graph, in float64."""

import pytest
import torch
from analytic import SHAPES, Quadratics

import mlo
from mlo.hypergradient.solvers import conjugate_gradient, neumann_series

CASES = [(shape, top) for shape in SHAPES for top in shape.tops]
EXACT = [
    {"kind": "cg"},
    {"kind": "cg", "product": {"kind": "central", "radius": 1e-2}},
    {"kind": "neumann", "terms": 800, "rate": 0.15},
]


def hypergradient(quadratics: Quadratics, top: str, estimator: object, **engine: object) -> torch.Tensor:
    device = quadratics.values[top].device
    return mlo.Engine(quadratics.problems(), estimator, device=device, **engine).hypergradient(top)["value"]


@pytest.mark.parametrize("estimator", EXACT, ids=str)
@pytest.mark.parametrize(("shape", "top"), CASES, ids=str)
def test_agrees_with_the_closed_form(shape, top, estimator, device):
    quadratics = Quadratics.make(shape, device=device)
    expected = quadratics.closed_form(top)
    torch.testing.assert_close(hypergradient(quadratics, top, estimator), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("shape", "top"), CASES, ids=str)
def test_every_part_of_the_closed_form_counts(shape, top):
    """The direct term alone is far off: a dropped path cannot hide within the tolerance above."""
    quadratics = Quadratics.make(shape)
    expected = quadratics.closed_form(top)
    assert (hypergradient(quadratics, top, "first_order") - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_nystrom_of_full_rank_is_the_damped_inverse(shape):
    quadratics, damped = Quadratics.make(shape), Quadratics.make(shape)
    expected = quadratics.closed_form("top")
    errors = [
        (hypergradient(damped, "top", {"kind": "nystrom", "rank": 3, "damping": d}) - expected).norm()
        for d in (1e-3, 1e-6)
    ]
    assert errors[1] < 1e-5 * expected.norm()
    assert errors[0] > 100 * errors[1]


def test_nystrom_converges_with_its_rank():
    quadratics = Quadratics.make(SHAPES[0])
    expected = quadratics.closed_form("top")
    found = [hypergradient(quadratics, "top", {"kind": "nystrom", "rank": r, "damping": 1e-7}) for r in (1, 2, 3, 9)]
    errors = [(f - expected).norm() / expected.norm() for f in found]
    assert errors[2] < 1e-5
    assert errors[3] < 1e-5
    assert errors[0] > 1e-2


@pytest.mark.parametrize("knob", ["terms", "iterations"])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_converges_as_its_knob_is_turned(shape, knob):
    quadratics = Quadratics.make(shape)
    expected = quadratics.closed_form("top")
    kind = {"terms": "neumann", "iterations": "cg"}[knob]
    extra = {"rate": 0.15} if kind == "neumann" else {}
    errors = [
        (hypergradient(quadratics, "top", {"kind": kind, knob: n, **extra}) - expected).norm() for n in (1, 2, 3, 200)
    ]
    assert errors[-1] < 1e-8 * expected.norm() < 1e-3 * errors[0]
    assert errors[0] > errors[2]


def test_damping_is_added_to_the_curvature():
    quadratics = Quadratics.make(SHAPES[0])
    damped = Quadratics.make(SHAPES[0])
    damped.own["low"] = damped.own["low"] + 0.7 * torch.eye(3, dtype=torch.float64)
    found = hypergradient(quadratics, "top", {"kind": "cg", "damping": 0.7})
    low, top = quadratics.values["low"], quadratics.values["top"]
    cotangent = 2 * low + low.cos() + quadratics.mixed["top", "low"].T @ top
    direct = quadratics.own["top"] @ top + quadratics.pull("top", quadratics.values)
    indirect = quadratics.mixed["low", "top"].T @ torch.linalg.solve(damped.own["low"], cotangent)
    torch.testing.assert_close(found, direct - indirect, rtol=1e-10, atol=1e-10)


def test_neumann_stops_where_its_terms_grow():
    """Eigenvalue times rate above 2 diverges: the result stays finite, and the metric shows it."""
    quadratics = Quadratics.make(SHAPES[0])
    engine = mlo.Engine(quadratics.problems(), {"kind": "neumann", "terms": 200, "rate": 5.0}, device="cpu")
    assert engine.hypergradient("top")["value"].isfinite().all()
    engine.step()
    assert engine.metrics()["low/residual"] > 1


def test_no_term_that_grows_is_added():
    target = (torch.tensor([2.0, 1.0]),)
    (found,), size = neumann_series(lambda v: (10.0 * v[0],), target, 5, rate=0.5)
    torch.testing.assert_close(found, 0.5 * target[0])  # the next term, -4 v, is larger
    assert size == pytest.approx(4)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("solve", [conjugate_gradient, neumann_series])
def test_a_solver_does_not_change_its_arguments(solve, warm):
    """Also if the product returns its argument itself."""
    target, start = (torch.tensor([2.0, 1.0]),), (torch.tensor([0.5, -1.0]),) if warm else None
    before = [vector[0].clone() for vector in (target, start) if vector]
    (found,), _ = solve(lambda v: v, target, 6, *((0.0,) if solve is conjugate_gradient else (0.9,)), start)
    torch.testing.assert_close([vector[0] for vector in (target, start) if vector], before)
    torch.testing.assert_close(found, target[0], rtol=1e-4, atol=1e-4)


def test_conjugate_gradient_stops_at_negative_curvature():
    quadratics = Quadratics.make(SHAPES[0])
    quadratics.own["low"] = torch.diag(torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64))
    engine = mlo.Engine(quadratics.problems(), {"kind": "cg", "iterations": 50}, device="cpu")
    assert engine.hypergradient("top")["value"].isfinite().all()
    engine.step()
    assert engine.metrics()["low/residual"] > 1e-3


def test_a_zero_cotangent_gives_zero_and_not_nan():
    quadratics = Quadratics.make(SHAPES[0])

    class Flat(mlo.Problem):
        def loss(self, batch, low):
            return (0 * low()).sum() + self().square().sum()

    low, top = quadratics.problems()
    flat = Flat("top", module=top.module, optimizer=top.optimizer)
    for estimator in ("cg", "neumann", "one_step", "darts"):
        found = mlo.Engine([low, flat], estimator, device="cpu").hypergradient("top")["value"]
        torch.testing.assert_close(found, 2 * top.module.value.detach())


@pytest.mark.parametrize(
    "estimator",
    [{"kind": "cg", "iterations": 1}, {"kind": "neumann", "terms": 2, "rate": 0.15}],
    ids=lambda options: options["kind"],
)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_a_warm_start_converges_over_steps_with_one_iteration_each(shape, estimator):
    """While the top stays put, one iteration a step reaches what many at once reach (SOBA)."""
    quadratics = Quadratics.make(shape)
    expected = quadratics.closed_form("top")
    errors = {}
    for warm in (False, True):
        problems = quadratics.problems()
        problems[-1].optimizer.param_groups[0]["lr"] = 0.0
        engine = mlo.Engine(problems, {**estimator, "warm_start": warm}, device="cpu")
        engine.run(100)
        errors[warm] = (engine.hypergradient("top")["value"] - expected).norm() / expected.norm()
    assert errors[True] < 1e-8
    assert errors[False] > 1e-3


def test_a_warm_start_is_part_of_the_state_and_is_unchanged_by_evaluating():
    quadratics = Quadratics.make(SHAPES[2])
    options = {"kind": "cg", "iterations": 1, "warm_start": True}
    engine = mlo.Engine(quadratics.problems(), options, device="cpu")
    engine.run(3)
    saved, metrics = engine.state_dict(), engine.metrics()
    evaluated = engine.hypergradient("top")["value"]
    assert torch.equal(engine.hypergradient("top")["value"], evaluated)
    assert engine.metrics() == metrics, "the residuals of the last real step"
    resumed = mlo.Engine(quadratics.problems(), options, device="cpu")
    assert not torch.equal(resumed.hypergradient("top")["value"], evaluated)
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.hypergradient("top")["value"], evaluated)


def test_nystrom_draws_its_probes_from_the_steps_own_random_state():
    engine = mlo.Engine(Quadratics.make(SHAPES[0]).problems(), {"kind": "nystrom", "rank": 1}, device="cpu")
    state = torch.get_rng_state()
    found = engine.hypergradient("top")["value"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(engine.hypergradient("top")["value"], found)
