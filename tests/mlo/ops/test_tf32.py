"""TensorFloat-32: in steps as asked, in curvature products never, and outside an engine as the user has set it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from two_levels import Following, Judging

import mlo
from mlo.ops.tf32 import Tf32
from mlo.training import engine as engine_module

backends = torch.backends
NEWER = {
    "all": backends,
    "cuda": backends.cudnn,
    "conv": backends.cudnn.conv,
    "rnn": backends.cudnn.rnn,
    "matmul": backends.cuda.matmul,
    "cpu conv": backends.mkldnn.conv,
    "cpu matmul": backends.mkldnn.matmul,
}


def settings() -> dict[str, object]:
    """All that torch says about the precision of float32; "?" where its older and newer settings differ."""
    found: dict[str, object] = {name: setting.fp32_precision for name, setting in NEWER.items()}
    older = {
        "allow_tf32": lambda: backends.cudnn.allow_tf32,
        "matmul allow_tf32": lambda: backends.cuda.matmul.allow_tf32,
        "matmul precision": torch.get_float32_matmul_precision,
    }
    for name, read in older.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "?"
    return found


@pytest.fixture(autouse=True)
def as_torch_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines on the CPU change the settings as on a GPU."""
    monkeypatch.setattr(engine_module, "Tf32", lambda steps, gpu: Tf32(steps))
    yield
    backends.fp32_precision = backends.cudnn.fp32_precision = "none"
    backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    for name in ("matmul", "cpu conv", "cpu matmul"):
        NEWER[name].fp32_precision = "none"


def new(**values: str) -> None:
    for name, value in values.items():
        NEWER[name.replace("_", " ")].fp32_precision = value


def mixed() -> None:
    torch.set_float32_matmul_precision("medium")
    new(matmul="ieee")


USERS = {
    "nothing": lambda: None,
    "no TF32": lambda: setattr(backends.cudnn, "allow_tf32", False),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "TF32 in products": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
    "all": lambda: new(all="tf32"),
    "all off": lambda: new(all="ieee"),
    "cuda": lambda: new(cuda="tf32"),
    "conv off": lambda: new(conv="ieee"),
    "conv and rnn off": lambda: new(conv="ieee", rnn="ieee"),
    "matmul": lambda: new(matmul="tf32"),
    "on a CPU": lambda: new(cpu_matmul="bf16"),
    "both APIs": mixed,
}


@pytest.mark.parametrize("steps", [None, True, False])
@pytest.mark.parametrize("user", USERS)
def test_steps_are_as_asked_products_are_in_float32_and_the_users_settings_come_back(user, steps):
    USERS[user]()
    outside, tf32 = settings(), Tf32(steps)
    with tf32.in_call():
        inside = settings()
        with tf32.in_step():
            of_steps = settings()
        assert settings() == inside
    assert settings() == outside
    for name in ("conv", "rnn", "matmul", "cpu conv", "cpu matmul"):
        assert inside[name] in ("ieee", "none")
        if steps is None:
            assert of_steps[name] == outside[name]
        elif name in ("conv", "rnn", "matmul"):
            assert (of_steps[name] == "tf32") == steps
    if (
        "?" not in outside.values() and outside["all"] == outside["cuda"] == "none"
    ):  # as a loss may read it, with torch.backends.cudnn.flags
        assert inside["allow_tf32"] is False


class Watched(torch.autograd.Function):
    """The identity; its first and second backward note whether TensorFloat-32 is on."""

    @staticmethod
    def forward(ctx, x: Tensor, seen: list) -> Tensor:
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def jvp(ctx, tangent: Tensor, _):
        return tangent.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.seen.append(("backward", on()))
        return WatchedAgain.apply(grad, ctx.seen), None


class WatchedAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, seen: list) -> Tensor:
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def jvp(ctx, tangent: Tensor, _):
        return tangent.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.seen.append(("second backward", on()))
        return grad, None


def on() -> bool:
    convolutions, products = backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
    assert convolutions == products
    return convolutions


class Low(mlo.Problem):
    """Notes whether TensorFloat-32 is on, in its passes and in their backward."""

    fails = ""

    def loss(self, batch, top):
        self.seen.append((self.name, on()))
        if self.fails and self.fails == ("step" if on() else "product"):
            raise RuntimeError("it failed")
        return (Watched.apply(self(batch), self.seen) - top(batch)).square().mean()


class Top(Judging):
    def loss(self, batch, low):
        self.seen.append((self.name, on()))
        return Watched.apply(super().loss(batch, low), self.seen)


def engine(estimator: object, *, steps: int = 1, **options: object) -> tuple[mlo.Engine, list]:
    torch.manual_seed(0)
    seen, made, data = [], [], [torch.randn(4, 3)]
    for name, cls in (("low", Low), ("top", Top)):
        module = nn.Linear(3, 2)
        own = {"steps": steps} if name == "low" else {}
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        made.append(cls(name, module=module, optimizer=optimizer, data=data, **own))
        made[-1].seen = seen
    return mlo.Engine(made, estimator, device="cpu", **options), seen


#: the passes of a hypergradient, with their backward: whether TensorFloat-32 is on, if steps may use it
STEP, FULL = [("low", True), ("backward", True)], [("low", False), ("backward", False)]
ABOVE, SECOND = [("top", True), ("backward", True)], [("second backward", False)]
PASSES = {
    "one_step": [*FULL, *ABOVE, *SECOND],
    "darts": [*STEP, *ABOVE, FULL[0], FULL[0]],  # the difference is of the gradient in the top's parameters
    "sama": [*STEP, *ABOVE, FULL[0], FULL[0]],
}


@pytest.mark.parametrize("tf32", [None, True, False])
@pytest.mark.parametrize("estimator", PASSES)
def test_only_passes_that_no_product_uses_are_in_tf32(estimator, tf32):
    made, seen = engine(estimator, tf32=tf32)
    torch.set_float32_matmul_precision("high" if tf32 is None else "highest")
    made.hypergradient("top")  # the first one evaluates losses twice, to see whether what they note changes them
    seen.clear()
    made.hypergradient("top")
    expected = [(what, was and tf32 is not False) for what, was in PASSES[estimator]]
    assert seen == expected


@pytest.mark.parametrize(
    "estimator",
    [
        "unrolled",
        "truncated",
        "cg",
        "neumann",
        "nystrom",
        "penalty",
        {"kind": "unrolled", "every": 2},
        {"kind": "unrolled", "graph_memory": 0},
        {"kind": "unrolled", "product": "one_sided"},
        {"kind": "one_step", "product": "forward"},
    ],
    ids=str,
)
@pytest.mark.parametrize("compile", [False, True])
def test_second_derivatives_are_always_in_float32(estimator, compile, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda run, **options: run)  # what is compiled, run
    made, seen = engine(estimator, steps=4, tf32=True, compile=compile)
    made.run(3)
    assert ("low", True) in seen, "steps that nothing is differentiated through again"
    assert ("second backward", True) not in seen
    exact = isinstance(estimator, str) and estimator != "penalty"
    assert not exact or ("second backward", False) in seen
    assert ("low", False) in seen


@pytest.mark.parametrize("fails", ["step", "product"])
def test_the_users_settings_come_back_after_an_error(fails):
    made, _ = engine("darts", tf32=True)
    outside = settings()
    made.problems["low"].fails = fails
    for call in (made.step, lambda: made.hypergradient("top")):
        with pytest.raises(RuntimeError, match="it failed"):
            call()
        assert settings() == outside


def test_nothing_is_changed_between_calls_and_in_callbacks():
    made, _ = engine("one_step", tf32=True)
    outside, found = settings(), []
    made.run(2, callbacks=[lambda engine: found.append(settings())])
    assert found == [outside, outside] == [settings(), settings()]


def test_it_is_an_option_of_the_engine_and_in_its_report():
    for tf32 in (None, True, False):
        made, _ = engine("one_step", tf32=tf32)
        assert made.tf32 is made.report().tf32 is tf32
        assert f"tf32={tf32}" in str(made.report())
    with pytest.raises(mlo.ConfigError, match="tf32='high'; pass True or False or None"):
        engine("one_step", tf32="high")


def test_an_engine_on_a_cpu_leaves_the_settings_for_cudnn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "Tf32", Tf32)
    seen = []

    class Looking(Judging):
        def loss(self, batch, low):
            seen.append((backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
            return super().loss(batch, low)

    low, top = nn.Linear(3, 2), nn.Linear(3, 2)
    levels = [
        Following("low", module=low, optimizer=torch.optim.SGD(low.parameters(), 0.1), data=[torch.ones(4, 3)]),
        Looking("top", module=top, optimizer=torch.optim.SGD(top.parameters(), 0.1), data=[torch.ones(4, 3)]),
    ]
    torch.set_float32_matmul_precision("medium")
    mlo.Engine(levels, "cg", tf32=False, device="cpu").step()
    assert {*seen} == {(True, "highest")}
