"""Every estimator that solves a linear system, against the closed form, on every shape of graph, in float64."""

import pytest
import torch
from analytic import SHAPES, Point, Quadratics

import mlo
from mlo.hypergradient.solvers import conjugate_gradient, minimal_residual, neumann_series, nystrom

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


def test_a_start_that_is_further_off_than_zero_is_dropped():
    matrix, b = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)), (torch.ones(3, dtype=torch.float64),)
    calls = []

    def matvec(u):
        calls.append(u)
        return (matrix @ u[0],)

    for solve in (
        lambda start: conjugate_gradient(matvec, b, 2, 0.0, start),
        lambda start: neumann_series(matvec, b, 3, 0.1, start),
        lambda start: minimal_residual(matvec, b, 2, start),
    ):
        expected = solve(None)
        for bad in (1e18, -1.0, float("nan"), float("inf")):
            start = (torch.full((3,), bad, dtype=torch.float64),)
            torch.testing.assert_close(solve(start), expected)
        good = (torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64),)
        kept = good[0].clone()
        found = solve(good)
        assert torch.equal(good[0], kept)
        assert found[1] < expected[1]


@pytest.mark.parametrize("as_gpu", [False, True])
@pytest.mark.parametrize("options", [{"kind": "cg", "iterations": 2}, {"kind": "neumann", "terms": 1}], ids=str)
def test_a_warm_start_stays_bounded_under_noise(options, as_gpu, request):
    """Each batch has another Hessian, some with directions of hardly any or of negative curvature."""
    if as_gpu:
        request.getfixturevalue("as_on_gpu")
    torch.manual_seed(0)

    class Low(mlo.Problem):
        def loss(self, batch, top):
            return self() @ batch @ self() / 2 - self() @ top()

    class Top(mlo.Problem):
        def loss(self, batch, low):
            return (low() - 1.0).square().sum()

    roots = [torch.randn(3, 4) for _ in range(20)]
    low, top = Point(torch.zeros(4)), Point(torch.zeros(4))
    sgd = torch.optim.SGD
    problems = [
        Low(
            "low", module=low, optimizer=sgd(low.parameters(), 0.01), data=[r.T @ r - 0.1 * torch.eye(4) for r in roots]
        ),
        Top("top", module=top, optimizer=sgd(top.parameters(), 1e-5), data=None),
    ]
    engine = mlo.Engine(problems, {**options, "warm_start": True}, device="cpu")
    for _ in range(10):
        engine.run(20)
        (warm,) = engine.state_dict()["warm"]["top"]["low"]
        assert warm.norm() < 1e3


@pytest.mark.parametrize("seed", range(3))
def test_minimal_residual_needs_no_rate_and_never_grows(seed):
    torch.manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 6, (1,)).item()
    root = torch.randn(4, 4, dtype=torch.float64)
    matrix, b = scale * (root @ root.T + torch.eye(4)), (torch.randn(4, dtype=torch.float64),)
    sizes = [minimal_residual(lambda u: (matrix @ u[0],), b, terms)[1] for terms in (1, 2, 5, 20, 400)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < 1
    assert sizes[-1] < 1e-10
    solution, residual = minimal_residual(lambda u: (matrix @ u[0],), b, 7)
    assert residual == pytest.approx(((matrix @ solution[0] - b[0]).norm() / b[0].norm()).item())


def test_the_first_step_of_minimal_residual_leaves_the_smallest_residual_along_b():
    a, b = torch.diag(torch.tensor([1.0, 2.0, 5.0])), torch.tensor([1.0, -1.0, 0.5])
    ((solution,), _) = minimal_residual(lambda u: (a @ u[0],), (b,), 1)
    torch.testing.assert_close(solution, b * (b @ a @ b) / (a @ b).square().sum())


def test_nystrom_takes_its_smallest_eigenvalue_for_directions_that_it_lacks():
    """The probes span the first two eigenvectors; then the solution is scaled such that the residual is smallest."""
    a, b = torch.diag(torch.tensor([4.0, 2.0, 1.0])), torch.ones(3)
    probes = [(each,) for each in torch.eye(3)[:2]]
    ((solution,), _) = nystrom(lambda u: (a @ u[0],), (b,), probes, None)
    before = torch.tensor([1 / 4, 1 / 2, 1 / 2])
    torch.testing.assert_close(solution, before * (a @ before @ b) / (a @ before).square().sum())


def test_the_residual_of_nystrom_is_that_of_the_damped_system():
    a, b = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)), torch.ones(3, dtype=torch.float64)
    probes = [(each,) for each in torch.eye(3, dtype=torch.float64)]
    assert nystrom(lambda u: (a @ u[0],), (b,), probes, 0.5)[1] < 1e-12


def test_nystrom_without_damping_is_exact_at_full_rank_and_no_worse_than_zero_below():
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix, b = root @ root.T + 0.1 * torch.eye(6), (torch.randn(6, dtype=torch.float64),)
    for shift in (0.0, 3.0):  # the second is not definite
        a = matrix - shift * torch.eye(6)
        for rank in range(1, 7):
            probes = [(torch.randn(6, dtype=torch.float64),) for _ in range(rank)]
            solution, residual = nystrom(lambda u, a=a: (a @ u[0],), b, probes, None)
            assert residual == pytest.approx(((a @ solution[0] - b[0]).norm() / b[0].norm()).item(), abs=1e-12)
            assert residual <= 1
        if not shift:
            torch.testing.assert_close(solution[0], torch.linalg.solve(a, b[0]), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"kind": "cg", "iterations": 1}, r"system of 'cg' is not .* raise iterations, as in \{'kind': 'cg'"),
        ({"kind": "cg", "iterations": 1, "damping": 1e-3}, "system of 'cg', of the Hessian plus the damping, is not"),
        ({"kind": "neumann", "rate": 1e-3}, r"raise terms, as in \{'kind'.*leave out rate"),
        ({"kind": "nystrom", "rank": 1, "damping": 1e-4}, "raise rank, as"),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_a_system_that_is_not_solved_is_warned_of_once_and_reported(options, remedy, recwarn):
    quadratics = Quadratics.make(SHAPES[0])
    quadratics.own["low"] = torch.diag(torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64))
    engine = mlo.Engine(quadratics.problems(lr=0.0), options, device="cpu")
    with pytest.warns(UserWarning, match=remedy) as warned:
        found = engine.hypergradient("top")
    assert "'low': the linear system" in str(warned[0].message)
    assert warned[0].filename == __file__
    engine.run(2)
    assert not recwarn
    assert found.metrics["low/residual"] > 0.5
    assert engine.hypergradient("low").metrics == {}


def test_one_that_is_solved_is_not_warned_of(recwarn):
    engine = mlo.Engine(Quadratics.make(SHAPES[0]).problems(), "cg", device="cpu")
    assert engine.hypergradient("top").metrics["low/residual"] < 1e-9
    engine.run(2)
    assert not recwarn


def test_a_warm_start_that_solves_nothing_is_warned_of_from_the_second_round_on(recwarn):
    """The Hessian is negative: a later round does no better than the first."""
    quadratics = Quadratics.make(SHAPES[0])
    quadratics.own["low"] = torch.diag(torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64))
    engine = mlo.Engine(quadratics.problems(lr=0.0), {"kind": "cg", "warm_start": True}, device="cpu")
    engine.step()
    assert not recwarn
    with pytest.warns(UserWarning, match="'low': the linear system of 'cg' is not solved"):
        engine.step()


@pytest.mark.parametrize("damping", [None, 0.1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nystrom_passes_on_what_is_not_finite(damping, bad):
    b, probes = (torch.ones(3, dtype=torch.float64),), [(torch.randn(3, dtype=torch.float64),) for _ in range(2)]
    solution, residual = nystrom(lambda u: (u[0] * bad,), b, probes, damping)
    assert not solution[0].isfinite().any()
    assert not residual.isfinite()
