"""What an error says of a loss, gradient or buffer that is not finite: the level, step and tensor where it arose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mlo
from mlo.training import engine as engine_module
from mlo.training.commit import Updater
from mlo.training.finite import Seen, check

NAN, INF = float("nan"), float("inf")


class Low(mlo.Problem):
    """Batches of (x, y, factor of a root's argument, weight of the root)."""

    def loss(self, batch, top):
        x, y, inside, weight = batch
        fit = ((self(x) - y).square() * top.params["weight"].exp()).mean()
        return fit + weight * (inside * self.params["weight"]).abs().sum().sqrt()


class Top(mlo.Problem):
    def loss(self, batch, low):
        return (low(batch) - 1.0).square().mean()


@pytest.fixture(params=[False, True], ids=["at once", "deferred"])
def deferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether updates are checked as on a GPU."""
    if request.param:
        monkeypatch.setattr(engine_module, "Updater", lambda device, deferred: Updater(device, deferred=True))
    return request.param


def batches(bad: int, x: float = 1.0, inside: float = 1.0, weight: float = 0.0) -> list[tuple[Tensor, ...]]:
    fine, other = (torch.ones(4, 3), torch.ones(4, 1), torch.tensor(1.0), torch.tensor(0.0)), torch.tensor
    return [(fine[0] * x, fine[1], other(inside), other(weight)) if i == bad else fine for i in range(3)]


def engine(data: list, top: float = 1.0, estimator: object = "darts", lr: float = 0.01) -> mlo.Engine:
    torch.manual_seed(0)
    low, upper = nn.Linear(3, 1), nn.Linear(1, 1)
    sgd = torch.optim.SGD(low.parameters(), lr)
    levels = [
        Low("low", module=low, optimizer=sgd, data=data, steps=3),
        Top("top", module=upper, optimizer=torch.optim.SGD(upper.parameters(), 0.1), data=[torch.full((4, 3), top)]),
    ]
    return mlo.Engine(levels, estimator, device="cpu")


def test_a_bad_batch_of_a_virtual_step_is_named(deferred):
    run = engine(batches(1, x=NAN))
    with pytest.raises(mlo.NonFiniteLossError, match=r"'low': its loss is nan at its step 2, a virtual one .* 'top'"):
        run.run(1)
    assert all(p.isfinite().all() for problem in run.problems.values() for p in problem.module.parameters())


def test_a_gradient_that_is_not_finite_in_a_virtual_step_is_named(deferred):
    """On a GPU the gradients of virtual steps are not checked, and it shows in the next loss, or at their end."""
    for bad in (1, 2):
        last = "its parameter 'weight' is nan at its step 3" if bad == 2 else "its loss is nan at its step 3"
        at_once = f"the gradient of its parameter 'weight' is nan at its step {bad + 1}"
        with pytest.raises(mlo.NonFiniteLossError, match=f"'low': {last if deferred else at_once}, a virtual one"):
            engine(batches(bad, inside=0.0, weight=1.0)).run(1)


@pytest.mark.usefixtures("deferred")
def test_a_top_problem_is_named_for_what_arose_in_it():
    with pytest.raises(mlo.NonFiniteLossError, match=r"'top': its loss is (nan|inf) at its step 1; that step"):
        engine(batches(9), top=INF).run(1)


@pytest.mark.usefixtures("deferred")
def test_a_hypergradient_before_it_does_not_change_what_is_named():
    run = engine(batches(1, x=NAN))
    run.hypergradient("top")
    with pytest.raises(mlo.NonFiniteLossError, match="'low': its loss is nan at its step 2"):
        run.run(1)


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("estimator", ["darts", "one_step", "unrolled"])
def test_a_finite_gradient_whose_square_overflows_is_finite(estimator):
    run = engine([(torch.full((4, 3), 1e10), torch.full((4, 1), 1e11), *batches(9)[0][2:])], estimator=estimator, lr=0)
    gradient = run.hypergradient("low")["weight"]
    assert gradient.abs().max() > 1e20
    assert gradient.norm().isinf()
    run.run(1)


class Statistics(nn.Module):
    """A buffer that follows the batch, one that is a mask, and one of integers; the output needs none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("mask", torch.tensor([0.0, -INF]))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, batch: Tensor) -> Tensor:
        self.count += 1
        self.mean.lerp_(batch[0] / batch[1], 0.5)
        return self.linear(batch[2:])


class Follow(mlo.Problem):
    def loss(self, batch):
        return self(batch).square().mean()


@pytest.mark.usefixtures("deferred")
def test_a_buffer_that_alone_becomes_nan_is_named_and_undone():
    module, data = Statistics(), [torch.rand(5, 3) + 0.1 for _ in range(3)]
    data[2][:2] = 0.0
    problem = Follow("low", module=module, optimizer=torch.optim.SGD(module.parameters(), 0.1), data=data)
    run = mlo.Engine(problem, device="cpu")
    run.run(2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(mlo.NonFiniteLossError, match="'low': its buffer 'mean' is nan at its step 3"):
        run.run(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.usefixtures("deferred")
def test_an_empty_parameter_and_parameters_of_several_precisions_are_checked():
    module = nn.ParameterList([torch.zeros(0), torch.ones(2, dtype=torch.bfloat16), torch.ones(2)])

    class Sum(mlo.Problem):
        def loss(self, batch):
            none, half, one = self.params.values()
            return none.sum() + (half.float() * batch).sum() + one.square().sum()

    problem = Sum("low", module=module, optimizer=torch.optim.SGD(module.parameters(), 0.1), data=[1.0, INF])
    run = mlo.Engine(problem, device="cpu")
    run.run(1)
    with pytest.raises(mlo.NonFiniteLossError, match="'low': its loss is inf at its step 2"):
        run.run(1)


def test_a_virtual_step_is_blamed_only_for_the_real_step_after_it():
    one = torch.zeros(1)
    seen = [
        Seen("low", 4, ["its loss"], one, virtual=True),
        Seen("left", 0, ["its loss"], one),
        Seen("right", 0, ["its loss"], one),
    ]
    check(seen, [NAN, 1.0, 1.0])
    with pytest.raises(mlo.NonFiniteLossError, match="'right': its loss is nan at its step 1;"):
        check(seen, [NAN, 1.0, NAN])
    with pytest.raises(mlo.NonFiniteLossError, match=r"'low': its loss is inf at its step 5, a virtual one .* 'left'"):
        check(seen, [INF, NAN, 1.0])


@pytest.mark.parametrize("look", [mlo.check, mlo.diagnose])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"bad": 1, "x": NAN}, r"'low': its loss is nan at its step 2, a virtual one before the step of 'top'"),
        ({"bad": 2, "x": INF}, r"'low': its loss is nan at its step 3, a virtual one"),
        (
            {"bad": 1, "inside": 0.0, "weight": 1.0},
            r"'low': the gradient of its parameter 'weight' is nan at its step 2",
        ),
        ({"bad": 9, "top": NAN}, r"'top': its loss is nan at its step 1"),
    ],
)
def test_what_looks_ahead_names_what_is_not_finite(look, bad, message):
    top = bad.get("top", 1.0)
    run = engine(batches(**{key: value for key, value in bad.items() if key != "top"}), top, "unrolled")
    with pytest.raises(mlo.NonFiniteLossError, match=message):
        look(run)
