"""A learning rate of exactly 0, where a warm-up begins, and gradients of exactly 0: the derivatives are right."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlo

pytestmark = pytest.mark.usefixtures("float64")


class SubclassOfAdamW(torch.optim.AdamW):
    """Has no formula, so torch's own step is differentiated."""


OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "SGD nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {"eps": 0.1}),  # with hardly any, a step does not depend on the size of gradients
    "Adam amsgrad maximize": (torch.optim.Adam, {"amsgrad": True, "maximize": True, "eps": 0.1}),
    "Adam fused": (torch.optim.Adam, {"fused": True, "eps": 0.1}),
    "AdamW": (torch.optim.AdamW, {"eps": 0.1}),
    "AdamW subclass": (SubclassOfAdamW, {"eps": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5, "eps": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1, "eps": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"eps": 0.1}),
    "Adamax": (torch.optim.Adamax, {"betas": (0.5, 0.6)}),
    "NAdam": (torch.optim.NAdam, {"eps": 0.1}),
    "RAdam": (torch.optim.RAdam, {"betas": (0.9, 0.99), "eps": 0.1}),
    "ASGD": (torch.optim.ASGD, {}),
}


class Weights(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.linspace(-0.3, 0.4, count))

    def forward(self) -> Tensor:
        return self.logs.exp()


class Fit(mlo.Problem):
    def loss(self, batch, weights):
        return (weights() * F.mse_loss(self(batch[0]), batch[1], reduction="none")[:, 0]).mean()


class Judge(mlo.Problem):
    def loss(self, batch, model):
        return F.mse_loss(model(batch[0]), batch[1])


def engine(optimizer: str, estimator: object, *, dead: bool = False, steps: int = 2) -> mlo.Engine:
    """With a linear warm-up from 0. With a ``dead`` feature, the gradient of its weight is always 0."""
    torch.manual_seed(0)
    x = torch.randn(24, 4)
    if dead:
        x[:, 1] = 0.0
    y, model, weights = x.sum(1, keepdim=True), nn.Linear(4, 1), Weights(12)
    make, options = OPTIMIZERS[optimizer]
    made = make(model.parameters(), lr=0.1, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: min(1.0, step / 10))
    sgd = torch.optim.SGD(weights.parameters(), lr=0.1)
    levels = [
        Fit(
            "model",
            module=model,
            optimizer=made,
            data=[(x[:12], y[:12]), (x[:12], -y[:12].sin())],
            scheduler=schedule,
            steps=steps,
        ),
        Judge("weights", module=weights, optimizer=sgd, data=[(x[12:], y[12:])]),
    ]
    return mlo.Engine(levels, estimator, device="cpu")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_warm_up_begins_with_a_derivative_of_zero(optimizer):
    for estimator in ("one_step", "unrolled", "darts", "sama"):
        run = engine(optimizer, estimator, dead=True)
        assert run.hypergradient("weights")["logs"].abs().max() < 1e-25, "all virtual steps have a rate of 0"
        run.run(2)
        found = run.hypergradient("weights")["logs"]
        assert found.isfinite().all()
        assert found.any()


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "ASGD"])  # whose rate is in its state
def test_states_carry_what_happens_at_a_rate_of_zero(optimizer):
    """The first of two real steps has a rate of 0; the second moves along what the first left in the state."""
    run = engine(optimizer, "unrolled", steps=2)
    optimizer_of = run.problems["model"].optimizer
    batches = [run.problems["model"].stream.peek(i) for i in range(2)]
    x_top, y_top = run.problems["weights"].stream.peek()
    before = {name: p.detach().clone() for name, p in run.problems["model"].params.items()}

    def outcome(logs: Tensor) -> float:
        model, (make, options) = nn.Linear(4, 1), OPTIMIZERS[optimizer]
        model.load_state_dict(before)
        made = make(model.parameters(), lr=0.1, **options)
        for rate, (x, y) in zip((0.0, 0.01), batches, strict=True):
            made.param_groups[0]["lr"] = rate
            made.zero_grad()
            (logs.exp() * (model(x) - y).square()[:, 0]).mean().backward()
            made.step()
        return F.mse_loss(model(x_top), y_top).item()

    assert optimizer_of.param_groups[0]["lr"] == 0.0
    logs = run.problems["weights"].module.logs.detach().clone()
    run.run(1)
    moved = (logs - run.problems["weights"].module.logs.detach()) / 0.1
    along = moved / moved.norm()
    step = 1e-4
    slope = (outcome(logs + step * along) - outcome(logs - step * along)) / (2 * step)
    assert math.isclose(slope, moved.norm().item(), rel_tol=1e-4)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_what_looks_ahead_says_that_all_is_zero(optimizer):
    made = engine(optimizer, "unrolled", steps=1)
    with pytest.raises(mlo.InconclusiveError, match=r"exactly 0.*learning rate is 0"):
        mlo.check(made)
    text = str(mlo.diagnose(made, estimators=["unrolled", "darts"]))
    assert "nan" not in text
    assert text.count("the exact hypergradient is 0") == 2
    made.step()
    mlo.check(made)
