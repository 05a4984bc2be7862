"""Compiled passes and products: the same numbers, the same random draws, and one warning where it cannot be."""

from __future__ import annotations

import copy
import logging

import needs
import numpy as np
import pytest
import torch
from analytic import NESTED_WITH_INNER_PATH, Smooth
from brute_force import small_lbt
from small_lbt import noisy_lbt
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_flatten, tree_unflatten
from two_levels import Attention

import mlo
from mlo.ops import compiler as compiling

pytestmark = [pytest.mark.usefixtures("float64"), needs.compiled_gradients]
SLOW = pytest.mark.slow
SEVERAL = f"{compiling.STEPS} steps as one"


@pytest.fixture(autouse=True)
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and differentiate as for compilation, but write no kernels, which takes most of the time."""
    torch._dynamo.reset()
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # thousands of lines
    if "kernels" not in request.keywords:
        monkeypatch.setitem(compiling._OPTIONS, "backend", "aot_eager")
        monkeypatch.delitem(compiling._OPTIONS, "options")


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> str:
    """Two steps, and not five, are one compiled function, of this description; it is traced in half the time."""
    monkeypatch.setattr("mlo.steps.compiled.STEPS", 2)
    return "2 steps as one"


def engines(stack, estimator: object, **options: object) -> tuple[mlo.Engine, mlo.Engine]:
    plain = mlo.Engine(stack(), estimator, device="cpu", **options)
    return plain, mlo.Engine(stack(), estimator, compile=True, device="cpu", **options)


def not_compiled(engine: mlo.Engine) -> dict[str, set[str]]:
    """{problem: what of it cannot be compiled}, of those where there is something."""
    found = engine.report().problems.values()
    return {problem.name: set(problem.not_compiled) for problem in found if problem.not_compiled}


def assert_compiled(engine: mlo.Engine) -> None:
    assert not not_compiled(engine)
    assert any(problem.compiled for problem in engine.report().problems.values())


def assert_same(plain: mlo.Engine, compiled: mlo.Engine, rounds: int) -> None:
    """From the second round on all passes are compiled."""
    for _ in range(rounds):
        found = []
        for engine in (plain, compiled):
            torch.manual_seed(5)
            found.append(engine.hypergradient("arch")["weights"])
            engine.step()
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)
    for one, other in zip(plain.problems.values(), compiled.problems.values(), strict=True):
        torch.testing.assert_close(
            dict(one.module.state_dict()), dict(other.module.state_dict()), rtol=1e-8, atol=1e-11
        )
    assert_compiled(compiled)


RECOMPUTED = {"kind": "unrolled", "graph_memory": 0.0}
ESTIMATORS = [
    "one_step",
    "unrolled",
    pytest.param("darts", marks=SLOW),
    pytest.param(RECOMPUTED, marks=SLOW),
    pytest.param({"kind": "one_step", "product": "one_sided"}, marks=SLOW),
    pytest.param({"kind": "cg", "damping": 1.0, "iterations": 3}, marks=SLOW),
    pytest.param({"kind": "penalty", "steps": 2}, marks=SLOW),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_compiled_and_not_give_the_same(estimator):
    assert_same(*engines(lambda: small_lbt("adam", steps=2), estimator), rounds=2)


@pytest.mark.parametrize("estimator", [pytest.param("one_step", marks=SLOW), RECOMPUTED], ids=str)
def test_batch_norm_and_dropout_draw_and_move_as_without(estimator):
    assert_same(*engines(lambda: noisy_lbt(student={"steps": 2}), estimator), rounds=2)


def test_the_compiled_graph_of_a_step_serves_its_product():
    engine = mlo.Engine(small_lbt("sgd"), "one_step", lookahead=True, compile=True, device="cpu")
    engine.step()
    before = {name: dict(passes) for name, passes in engine.passes.items()}
    engine.step()
    taken = {kind: n - before["student"].get(kind, 0) for kind, n in engine.passes["student"].items()}
    assert taken == {"step": 1, "virtual": 1, "read": 1}, "the step's own graph serves its product"


def test_a_resumed_run_counts_its_steps_though_it_may_compile_several_as_one():
    class Counting(mlo.Problem):
        def loss(self, batch, top):
            return ((self.steps_taken % 3 + 1) * (self(batch) * top(batch)).sin()).mean()

    class Top(mlo.Problem):
        def loss(self, batch, low):
            return low(batch).square().mean()

    def engine(compile: bool) -> mlo.Engine:
        torch.manual_seed(0)
        low, top, data = nn.Linear(2, 1), nn.Linear(2, 1), [torch.randn(3, 2)]
        stack = [
            Counting("low", module=low, optimizer=torch.optim.SGD(low.parameters(), lr=0.1), data=data, steps=5),
            Top("top", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.1), data=data),
        ]
        return mlo.Engine(stack, "unrolled", lookahead=True, compile=compile, device="cpu")

    first = engine(True)
    first.run(2)
    assert SEVERAL not in first.report().problems["low"].compiled, "they would not be used"
    found = []
    for compile in (True, False):
        resumed = engine(compile)
        resumed.load_state_dict(copy.deepcopy(first.state_dict()))
        found.append(resumed.hypergradient("top"))
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)


@SLOW
def test_a_resumed_run_compiles_where_the_other_did_and_ends_in_the_same_bits():
    def engine() -> mlo.Engine:
        stack = noisy_lbt(student={"steps": 2})
        return mlo.Engine(stack, RECOMPUTED, compile=True, device="cpu")

    unbroken = engine()
    torch.manual_seed(5)
    unbroken.run(2)
    saved = copy.deepcopy(unbroken.state_dict())
    unbroken.step()
    resumed = engine()
    resumed.load_state_dict(saved)
    resumed.step()
    for one, other in zip(unbroken.problems.values(), resumed.problems.values(), strict=True):
        for name, value in one.module.state_dict().items():
            assert torch.equal(value, other.module.state_dict()[name])


class Held(mlo.Problem):
    """With a factor that is the user's to change between steps."""

    factor = 1.0

    def loss(self, batch, top):
        return self.factor * (self(batch) - top(batch)).square().mean()


class Wild(mlo.Problem):
    def loss(self, batch, top):
        distance = (self(batch) - top(batch)).square().mean()
        return distance * 2 if distance.item() > 1e9 else distance


class Drawn(mlo.Problem):
    def loss(self, batch, top):
        return (self(batch) - top(batch)).square().mean() * (1 + np.random.rand())


class Top(mlo.Problem):
    def loss(self, batch, low):
        return low(batch).square().mean()


def two_levels(
    cls: type[mlo.Problem], steps: int = 1, module: type[nn.Module] | None = None, momentum: float = 0.0
) -> list[mlo.Problem]:
    torch.manual_seed(0)
    data = [torch.randn(4, 3)]
    one, two = nn.Linear(3, 2) if module is None else module(), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=momentum)
    low = cls("low", module=one, optimizer=optimizer, data=data, steps=steps)
    return [low, Top("top", module=two, optimizer=torch.optim.SGD(two.parameters(), lr=0.1), data=data)]


@pytest.mark.kernels
@pytest.mark.parametrize("estimator", [pytest.param("one_step", marks=SLOW), RECOMPUTED], ids=str)
def test_compiled_kernels_give_the_same(estimator):
    plain, compiled = engines(lambda: two_levels(Held, steps=2), estimator)
    for _ in range(3):
        for engine in (plain, compiled):
            engine.step()
    torch.testing.assert_close(
        compiled.problems["top"].module.weight, plain.problems["top"].module.weight, rtol=1e-10, atol=1e-13
    )
    assert_compiled(compiled)


def test_what_a_user_changes_meanwhile_counts():
    plain, compiled = engines(lambda: two_levels(Held), "one_step")
    for factor in (1.0, 1.0, 3.0, 0.5):
        for engine in (plain, compiled):
            engine.problems["low"].factor = factor
            engine.step()
        torch.testing.assert_close(compiled.losses, plain.losses)
    torch.testing.assert_close(
        compiled.problems["top"].module.weight, plain.problems["top"].module.weight, rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize(
    ("cls", "reason"), [(Wild, "data-dependent"), (Drawn, "draws from NumPy's or Python's random generator")]
)
def test_what_cannot_be_compiled_is_warned_of_once_and_runs_as_it_is(cls, reason):
    np.random.seed(0)
    compiled = mlo.Engine(two_levels(cls), "one_step", compile=True, device="cpu")
    with pytest.warns(UserWarning, match=f"'low' runs without compilation: .*{reason}") as warned:
        compiled.run(4)
    ours = [str(one.message) for one in warned if "without compilation" in str(one.message)]
    assert len(ours) == 1
    assert "\n" not in ours[0]
    np.random.seed(0)
    plain = mlo.Engine(two_levels(cls), "one_step", device="cpu")
    plain.run(4)
    torch.testing.assert_close(compiled.losses, plain.losses)
    assert not_compiled(compiled) == {"low": {"everything"}}


class Failing(mlo.Problem):
    def loss(self, batch, top):
        return (self(batch) - top(batch)).square().mean() * {}["y"]


@pytest.mark.filterwarnings("error")
def test_an_error_of_the_first_pass_comes_without_a_warning_of_compilation():
    engine = mlo.Engine(two_levels(Failing, steps=2), "one_step", compile=True, device="cpu")
    with pytest.raises(KeyError, match="'y'"):
        engine.step()


@pytest.mark.filterwarnings("ignore:problem 'top' runs without compilation")
def test_a_failure_of_the_code_generator_is_reported_as_torchs(monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("((50, 64, 8), (50, 8, 64))\nin a long trace")

    monkeypatch.setitem(compiling._OPTIONS, "backend", fail)
    compiled = mlo.Engine(two_levels(Held), "one_step", compile=True, device="cpu")
    reason = r"torch [\d.]+\S* fails to generate code for it \(AssertionError: \(\(50, .*64\)\)\); another release"
    with pytest.warns(UserWarning, match=f"'low' runs without compilation: {reason}"):
        compiled.run(3)
    assert not_compiled(compiled) == {name: {"everything"} for name in ("low", "top")}


@torch._dynamo.config.patch(recompile_limit=3)
@pytest.mark.parametrize("steps", [7, pytest.param(12, marks=SLOW)])
def test_several_steps_are_one_compiled_call_at_the_present_rates_and_factors(steps):
    """Five in one, perhaps five more, and two; from round to round a new learning rate compiles nothing again."""
    plain, compiled = engines(lambda: two_levels(Held, steps=steps, momentum=0.9), "unrolled")
    for round in range(6):
        found = []
        for engine in (plain, compiled):
            engine.problems["low"].optimizer.param_groups[0]["lr"] = 0.1 / (1 + round)
            engine.problems["low"].factor = 1.0 if round < 3 else 2.0
            engine.step()
            found.append(engine.hypergradient("top")["weight"])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)
    assert SEVERAL in compiled.report().problems["low"].compiled
    assert not not_compiled(compiled)
    assert compiled.passes == plain.passes


def same_in_each_round(plain: mlo.Engine, compiled: mlo.Engine) -> None:
    for _ in range(3):
        found = []
        for engine in (plain, compiled):
            engine.step()
            found.append(engine.hypergradient("top")["weight"])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)


def test_steps_on_batches_of_several_forms_are_taken_one_by_one():
    def stack() -> list[mlo.Problem]:
        made = two_levels(Held, steps=5)
        made[0].stream = mlo.levels.batches.open_stream([torch.randn(n, 3) for n in (4, 4, 3)], "low")
        return made

    plain, compiled = engines(stack, "unrolled")
    same_in_each_round(plain, compiled)
    assert SEVERAL not in compiled.report().problems["low"].compiled


@torch._dynamo.config.patch(recompile_limit=1)
def test_steps_may_share_batches_in_any_way(pairs):
    def stack() -> list[mlo.Problem]:
        made = two_levels(Held, steps=2)
        one, two = torch.randn(4, 3), torch.randn(4, 3)
        made[0].stream = mlo.levels.batches.open_stream([one, one, two], "low")
        return made

    plain, compiled = engines(stack, "unrolled")
    same_in_each_round(plain, compiled)
    assert pairs in compiled.report().problems["low"].compiled
    assert not not_compiled(compiled)


class CountingLater(Held):
    """Does not ask for the count before its factor changes."""

    def loss(self, batch, top):
        return super().loss(batch, top) / (1.0 if self.factor == 1.0 else 1 + self.steps_taken)


def test_a_loss_that_asks_for_the_count_later_is_compiled_step_by_step_from_then_on(pairs):
    plain, compiled = engines(lambda: two_levels(CountingLater, steps=2), "unrolled")
    same_in_each_round(plain, compiled)
    assert pairs in compiled.report().problems["low"].compiled
    for engine in (plain, compiled):
        engine.problems["low"].factor = 2.0
    found = [engine.hypergradient("top")["weight"] for engine in (plain, compiled)]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)


def test_a_second_product_at_a_point_keeps_the_graph_for_all_further_ones():
    """The first one is compiled as a whole."""
    plain, compiled = engines(lambda: two_levels(Held), {"kind": "cg", "damping": 1.0, "iterations": 4})
    for engine in (plain, compiled):
        engine.run(3)
    counts = [engine.passes["low"]["product"] for engine in (plain, compiled)]
    for engine in (plain, compiled):
        engine.hypergradient("top")
    taken = [engine.passes["low"]["product"] - n for engine, n in zip((plain, compiled), counts, strict=True)]
    assert taken == [1, 2]


@torch._dynamo.config.patch(recompile_limit=1)
def test_steps_are_compiled_once_in_the_precision_of_the_module():
    """The graph of the last step of a round reaches only what is read; in another precision nothing is compiled."""
    _, compiled = engines(lambda: two_levels(Held, steps=2), "one_step", lookahead=True)
    compiled.run(3)
    compiled.hypergradient("top", torch.float32)
    expected = ("gradient", "gradient with its graph for what is read")
    assert compiled.report().problems["low"].compiled == expected
    assert not not_compiled(compiled)


@torch._dynamo.config.patch(recompile_limit=3)
def test_steps_whose_options_change_too_often_go_one_by_one_with_a_warning():
    plain, compiled = engines(lambda: two_levels(Held, steps=5), "unrolled")

    def rounds() -> None:
        for round in range(6):
            found = []
            for engine in (plain, compiled):
                engine.problems["low"].optimizer.param_groups[0]["weight_decay"] = 0.01 * round
                engine.step()
                found.append(engine.hypergradient("top")["weight"])
            torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)

    with pytest.warns(UserWarning, match="'low': its steps are compiled one by one from now on") as warned:
        rounds()
    assert len([warning for warning in warned if "one by one" in str(warning.message)]) == 1
    assert not_compiled(compiled) == {"low": {SEVERAL}}


class Noised(mlo.Problem):
    def loss(self, batch, top):
        return (self(batch) - torch.rand(()) * top(batch)).square().mean()


@pytest.mark.filterwarnings("ignore:problem '(low|top)' runs without compilation. no backward")
@pytest.mark.parametrize("several", [pytest.param(False, marks=SLOW), True])
def test_code_that_fails_after_it_has_drawn_gives_its_random_numbers_back(several, monkeypatch):
    """Its forward runs, its backward cannot be compiled: single steps, or several as one, are then taken without."""

    def fail(*_: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no backward")

    plain, compiled = engines(lambda: two_levels(Noised, steps=5), "unrolled")
    found: list[Tensor] = []
    if not several:
        monkeypatch.setattr(compiling, "_compile_backward", fail)
    for engine in (plain, compiled):
        torch.manual_seed(3)
        engine.step()
    torch.testing.assert_close(compiled.losses, plain.losses)
    monkeypatch.setattr(compiling, "_compile_backward", fail)
    for engine in (plain, compiled):
        torch.manual_seed(4)
        found.append(engine.hypergradient("top")["weight"])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)
    assert not_compiled(compiled)["low"] == {"everything"}
    failed = {key[1] for key in compiled._levels["low"].compiler.failed}
    assert failed == ({SEVERAL} if several else set())


def test_steps_with_large_graphs_are_compiled_one_by_one(monkeypatch):
    monkeypatch.setattr("mlo.steps.compiled.SMALL_GRAPH", 8)
    _, compiled = engines(lambda: two_levels(Held, steps=5), "unrolled")
    for _ in range(3):
        compiled.step()
        compiled.hypergradient("top")
    assert compiled.report().problems["low"].compiled == ("gradient", "gradient with its graph", "product")


@SLOW
@pytest.mark.kernels
def test_compiled_kernels_of_several_steps_give_the_same():
    plain, compiled = engines(lambda: two_levels(Held, steps=5, momentum=0.9), "unrolled")
    same_in_each_round(plain, compiled)
    assert SEVERAL in compiled.report().problems["low"].compiled


def with_graphs_of_one_memory(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Compile as for a GPU, with CUDA graphs imitated by functions that write into one memory.

    Returns (name, whether it is captured) of each compiled function.
    """
    compile_really, seen = torch.compile, []

    def compile(function, *, options, **others):
        plain = compile_really(function, **others)
        seen.append((function.__qualname__, bool(options.get("triton.cudagraphs"))))
        memory: dict[object, list[object]] = {}

        def replay(*arguments: object) -> object:
            found, structure = tree_flatten(plain(*arguments))
            held = memory.setdefault(structure, [f.clone() if isinstance(f, Tensor) else f for f in found])
            for place, new in zip(held, found, strict=True):
                if isinstance(place, Tensor):
                    place.copy_(new)
            return tree_unflatten(held, structure)

        return replay if seen[-1][1] else plain

    monkeypatch.setitem(compiling._OPTIONS, "options", {})
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("mlo.training.engine.Compiler", lambda device, **_: compiling.Compiler(torch.device("cuda")))
    return seen


@pytest.mark.parametrize("estimator", ["darts", pytest.param(RECOMPUTED, marks=SLOW)], ids=str)
def test_what_a_cuda_graph_gives_outlives_its_next_replay(monkeypatch, estimator):
    seen = with_graphs_of_one_memory(monkeypatch)
    plain, compiled = engines(lambda: noisy_lbt(student={"steps": 2}), estimator)
    assert_same(plain, compiled, rounds=2)
    kept: list[list[object]] = [[], []]
    for _ in range(3):
        for found, engine in zip(kept, (plain, compiled), strict=True):
            torch.manual_seed(5)
            found += [engine.hypergradient("arch")["weights"], dict(engine.losses)]
            engine.step()
    torch.testing.assert_close(*kept, rtol=1e-9, atol=1e-13)
    assert any(captured for _, captured in seen)
    assert estimator == "darts" or not all(captured for _, captured in seen), "a graph is left behind there"


def test_several_steps_as_one_leave_a_graph_and_are_not_captured(monkeypatch):
    seen = with_graphs_of_one_memory(monkeypatch)
    same_in_each_round(*engines(lambda: two_levels(Held, steps=5, momentum=0.9), "unrolled"))
    assert ("steps.<locals>.run", False) in seen


@pytest.mark.kernels
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("estimator", ["darts", "one_step", RECOMPUTED], ids=str)
def test_on_a_gpu_passes_are_replayed(estimator):
    torch._dynamo.utils.counters.clear()
    plain = mlo.Engine(noisy_lbt(student={"steps": 2}), estimator, device="cuda")
    compiled = mlo.Engine(noisy_lbt(student={"steps": 2}), estimator, compile=True, device="cuda")
    assert_same(plain, compiled, rounds=5)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).tanh()))


def weight_normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(3, 2))


class Between(mlo.Problem):
    def loss(self, batch, one, two):
        return (self(batch) - one(batch) * two(batch)).square().mean()


@pytest.mark.parametrize("estimator", ["one_step", pytest.param(RECOMPUTED, marks=SLOW)], ids=str)
def test_two_tops_over_one_low_problem_each_have_their_code(estimator):
    def stack() -> list[mlo.Problem]:
        torch.manual_seed(0)
        made, data = [], [torch.randn(4, 3)]
        for cls, name in ((Between, "low"), (Top, "one"), (Top, "two")):
            module = nn.Linear(3, 2)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            made.append(cls(name, module=module, optimizer=optimizer, data=data, steps=2))
        return made

    plain, compiled = engines(stack, estimator, lookahead=True)
    for _ in range(3):
        for name in ("one", "two"):
            found = [engine.hypergradient(name)["weight"] for engine in (plain, compiled)]
            torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)
        plain.step()
        compiled.step()


class Own(mlo.Problem):
    def loss(self, batch):
        return (self(batch) - batch[:, :2]).square().mean()


class OverOwn(mlo.Problem):
    """Notices what is not a constant."""

    def loss(self, batch, own, top):
        read = own(batch)
        return (self(batch) - read * top(batch)).square().mean() * (3.0 if read.requires_grad else 1.0)


@pytest.mark.parametrize("estimator", [pytest.param("one_step", marks=SLOW), "unrolled"])
def test_a_read_that_nothing_is_pulled_back_onto_is_a_constant_in_compiled_code(estimator, pairs):
    """Its backward would compute a gradient for it."""

    def stack() -> list[mlo.Problem]:
        torch.manual_seed(0)
        made, data = [], [torch.randn(4, 3)]
        for cls, name in ((Own, "own"), (OverOwn, "low"), (Top, "top")):
            module = nn.Linear(3, 2)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            made.append(cls(name, module=module, optimizer=optimizer, data=data, steps=2 if name == "low" else 1))
        return made

    plain, compiled = engines(stack, estimator)
    same_in_each_round(plain, compiled)
    assert_compiled(compiled)
    assert (pairs in compiled.report().problems["low"].compiled) == (estimator == "unrolled")


@pytest.mark.parametrize(
    ("autocast", "in_products"),
    [
        pytest.param(torch.bfloat16, False, marks=SLOW),
        (torch.bfloat16, True),
        pytest.param(torch.float16, False, marks=SLOW),
    ],
)
def test_autocast_is_the_present_one_in_steps_and_in_products(autocast, in_products):
    """Compiled or not, the same roundings; other ones where a pass is in another precision."""
    torch.set_default_dtype(torch.float32)  # autocast leaves double precision alone
    options = {"kind": "unrolled", "graph_memory": 0.0, "product": {"kind": "exact", "autocast": in_products}}
    plain, compiled = engines(lambda: two_levels(Held, steps=2), options)
    for dtype in (None, None, autocast, None, autocast, autocast):
        found = []
        for engine in (plain, compiled):
            engine.problems["low"].autocast = dtype
            found.append(engine.hypergradient("top")["weight"])
            engine.step()
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(compiled.losses, plain.losses, rtol=1e-5, atol=1e-7)
    lowered = {function.partition(" in ")[2] for function in compiled.report().problems["low"].compiled}
    assert lowered == {"", str(autocast).removeprefix("torch.")}


class Faint(mlo.Problem):
    def loss(self, batch, top):
        return 1e-7 * (self(batch) - top(batch)).float().square().mean()


@pytest.mark.parametrize("estimator", ["one_step", pytest.param(RECOMPUTED, marks=SLOW)], ids=str)
def test_gradients_of_compiled_steps_do_not_vanish_in_float16(estimator):
    torch.set_default_dtype(torch.float32)

    def stack() -> list[mlo.Problem]:
        made = two_levels(Faint, steps=2)
        made[0].autocast, made[0].optimizer.param_groups[0]["lr"] = torch.float16, 1e6
        return made

    plain, compiled = engines(stack, estimator)
    for _ in range(3):
        found = [engine.hypergradient("top")["weight"] for engine in (plain, compiled)]
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)
        for engine in (plain, compiled):
            engine.step()
        moved = [engine.problems["low"].module.weight.detach() for engine in (plain, compiled)]
        torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-6)
    assert "gradient in float16" in compiled.report().problems["low"].compiled


@pytest.mark.parametrize(
    "estimator",
    ["one_step", pytest.param(RECOMPUTED, marks=SLOW), pytest.param({"kind": "cg", "damping": 1.0}, marks=SLOW)],
    ids=str,
)
@pytest.mark.parametrize("module", [Attention, weight_normed, Tied])
def test_attention_weight_norm_and_tied_weights_are_differentiated_twice(module, estimator):
    plain, compiled = engines(lambda: two_levels(Held, steps=2, module=module), estimator)
    for _ in range(3):
        found = [engine.hypergradient("top")["weight"] for engine in (plain, compiled)]
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)
        for engine in (plain, compiled):
            engine.step()
    assert_compiled(compiled)


def test_the_inner_path_counts():
    """Gradients that run through lower steps are not compiled; those without are, and all the numbers are the same."""
    made = Smooth.make(NESTED_WITH_INNER_PATH, settled=False)
    plain, compiled = engines(lambda: made.problems(steps=2), "unrolled", inner_path=True)
    for _ in range(3):
        found = [engine.hypergradient("top")["value"] for engine in (plain, compiled)]
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)
        for engine in (plain, compiled):
            engine.step()
    assert_compiled(compiled)


class Widening(mlo.Problem):
    """Reaches its bias only at every second step; the optimizer leaves it alone at the others."""

    def loss(self, batch, top):
        own = batch @ self.params["weight"].T
        if self.steps_taken % 2 == 0:
            own = own + self.params["bias"]
        return (own - top(batch)).square().mean()


class Narrow(mlo.Problem):
    """Never reaches its bias."""

    def loss(self, batch, top):
        return (batch @ self.params["weight"].T - top(batch)).square().mean()


@pytest.mark.parametrize("cls", [Widening, Narrow])
def test_a_variable_that_a_compiled_step_does_not_reach_is_left_alone(cls):
    """Momentum and weight decay would move it on a gradient of zero."""

    def stack() -> list[mlo.Problem]:
        made = two_levels(cls, momentum=0.9)
        made[0].optimizer.param_groups[0]["weight_decay"] = 0.1
        return made

    plain, compiled = engines(stack, "one_step")
    for _ in range(5):
        plain.step()
        compiled.step()
    torch.testing.assert_close(
        dict(compiled.problems["low"].module.state_dict()), dict(plain.problems["low"].module.state_dict())
    )
