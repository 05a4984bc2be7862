"""Subclasses of torch's optimizers whose step does more: exact with a graph, and refused by name without one."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop
from torch.optim.optimizer import _use_grad_for_differentiable

import mlo
from mlo.steps.own_step import has_torch_step
from tests.plain_loop import Factors, Low, Middle, Top, batches, derivative, engine, linear, trained, values


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def graph(optimizer):
    return torch.set_grad_enabled(optimizer.defaults["differentiable"])


class Projected(SGD):
    def step(self, closure=None):
        super().step(closure)
        with graph(self):
            for p in parameters(self):
                p.clamp_(-0.7, 0.7)


class Ball(Adam):
    """Onto a ball, by copy_."""

    @_use_grad_for_differentiable
    def step(self, closure=None):
        super().step(closure)
        for p in parameters(self):
            p.copy_(p / p.norm().clamp(min=1.0))


class Clipped(SGD):
    def step(self, closure=None):
        with graph(self):
            for p in parameters(self):
                p.grad = p.grad.clamp(-0.3, 0.3)
        super().step(closure)


class ClippedInPlace(Adam):
    def step(self, closure=None):
        with graph(self):
            for p in parameters(self):
                p.grad.clamp_(-0.3, 0.3)
        super().step(closure)


class Decayed(Adam):
    """Decoupled decay, to another value than zero."""

    def step(self, closure=None):
        super().step(closure)
        with graph(self):
            for p in parameters(self):
                p.mul_(0.9).add_(0.05)


class Centralized(SGD):
    def step(self, closure=None):
        with graph(self):
            for p in parameters(self):
                if p.dim() > 1:
                    p.grad.sub_(p.grad.mean(dim=1, keepdim=True))
        super().step(closure)


class Averaged(SGD):
    """The mean of the gradients so far, in a state of its own."""

    def step(self, closure=None):
        with graph(self):
            for p in parameters(self):
                state = self.state[p]
                state.setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.3)
                p.grad = state["mean"] * 1.0
        super().step(closure)


class Decreasing(SGD):
    """A rate that decreases by a count in the state."""

    def step(self, closure=None):
        with graph(self):
            for p in parameters(self):
                self.state[p]["count"] = self.state[p].get("count", 0) + 1
                p.grad = p.grad / self.state[p]["count"] ** 0.5
        super().step(closure)


class Trusted(SGD):
    """As in LARS, the gradient is scaled by a quotient of norms."""

    def step(self, closure=None):
        with graph(self):
            for p in parameters(self):
                p.grad = p.grad * (p.norm() / (p.grad.norm() + 1e-3))
        super().step(closure)


class Same(Adam):
    """Nothing else."""


EXACT = {
    "fused SGD": lambda p: SGD(p, lr=0.05, momentum=0.9, dampening=0.4, weight_decay=0.1, maximize=True, fused=True),
    "Projected": lambda p: Projected(p, lr=0.1),
    "Projected with momentum": lambda p: Projected(p, lr=0.1, momentum=0.9),
    "Ball": lambda p: Ball(p, lr=0.1),
    "Clipped": lambda p: Clipped(p, lr=0.1, momentum=0.5, weight_decay=0.1),
    "ClippedInPlace": lambda p: ClippedInPlace(p, lr=0.1, amsgrad=True),
    "Decayed": lambda p: Decayed(p, lr=0.1),
    "Centralized": lambda p: Centralized(p, lr=0.1, momentum=0.9, nesterov=True),
    "Averaged": lambda p: Averaged(p, lr=0.1),
    "Decreasing": lambda p: Decreasing(p, lr=0.1),
    "Trusted": lambda p: Trusted(p, lr=0.1),
    "Same": lambda p: Same(p, lr=0.1),
}


def with_optimizer(optimizer):
    def make():
        module = linear()
        return module, optimizer(module.parameters())

    return make


@pytest.mark.parametrize("name", EXACT)
def test_a_step_with_a_graph_is_exact(name):
    make = with_optimizer(EXACT[name])
    for estimator, steps in (("unrolled", 3), ("one_step", 1)):
        made = engine(make, estimator, steps)
        found = made.hypergradient("factors")["logs"]
        torch.testing.assert_close(found, derivative(make, steps), rtol=1e-8, atol=1e-10)
    made = engine(make, "unrolled")
    made.run(2)
    expected = trained(make, Factors().logs.detach(), [*batches(3), *batches(3)])
    torch.testing.assert_close([*made.problems["model"].module.parameters()], [*expected.parameters()])


@pytest.mark.parametrize("kind", [Projected, Ball, pytest.param(Trusted, marks=pytest.mark.slow)])
def test_inner_paths_are_exact(kind):
    torch.manual_seed(0)
    modules, data = [nn.Linear(3, 2).double() for _ in range(3)], [torch.randn(4, 3, dtype=torch.float64)]
    problems = [
        cls(cls.__name__.lower(), module=m, optimizer=kind(m.parameters(), lr=0.1), data=data, steps=2)
        for cls, m in zip((Low, Middle, Top), modules, strict=True)
    ]
    mlo.check(mlo.Engine(problems, "unrolled", inner_path=True, device="cpu"), "top")


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in (RAdam, Adamax, Adagrad, Adadelta, ASGD, Rprop, AdamW)]


@pytest.mark.parametrize("kind", [SGD, Adam, NAdam, RMSprop, *SLOW])
def test_a_subclass_that_adds_nothing_is_taken_for_its_graph(kind):
    class Own(kind):
        def step(self, closure=None):
            super().step(closure)

    options = {"momentum": 0.9} if kind in (SGD, RMSprop) else {}
    found = [
        engine(with_optimizer(lambda p, of=of: of(p, lr=0.1, **options)), "unrolled").hypergradient("factors")["logs"]
        for of in (kind, Own)
    ]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)


class ProjectedInPlace(SGD):
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for p in parameters(self):
            p.clamp_(-0.7, 0.7)


class AllUnderNoGrad(SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for p in parameters(self):
            p.add_(p.grad, alpha=-0.1)


class ByData(Adam):
    def step(self, closure=None):
        super().step(closure)
        for p in parameters(self):
            p.data.clamp_(-0.7, 0.7)


class DataReplaced(Adam):
    def step(self, closure=None):
        super().step(closure)
        for p in parameters(self):
            p.data = p.data.clamp(-0.7, 0.7)


class ClipValue(SGD):
    def step(self, closure=None):
        nn.utils.clip_grad_value_(parameters(self), 0.3)
        super().step(closure)


class ClipNorm(Adam):
    def step(self, closure=None):
        nn.utils.clip_grad_norm_(parameters(self), 0.3)
        super().step(closure)


class GradientByData(SGD):
    def step(self, closure=None):
        for p in parameters(self):
            p.grad.data.sub_(p.grad.data.mean())
        super().step(closure)


class Detached(SGD):
    def step(self, closure=None):
        for p in parameters(self):
            p.grad = p.grad.detach().sign()
        super().step(closure)


class ByNumber(SGD):
    def step(self, closure=None):
        with graph(self):
            for p in parameters(self):
                p.grad = p.grad * min(1.0, 0.1 / p.grad.norm().item())
        super().step(closure)


class HiddenState(SGD):
    """Its own state is made of what has no graph."""

    def step(self, closure=None):
        with graph(self):
            for p in parameters(self):
                with torch.no_grad():
                    self.state[p]["last"] = 2 * p.grad
        super().step(closure)


class Dampened(SGD):
    """Torch's first momentum buffer is detached."""

    def step(self, closure=None):
        with graph(self):
            for p in parameters(self):
                p.grad = p.grad.clamp(-0.3, 0.3)
        super().step(closure)


REFUSED = {
    "ProjectedInPlace": lambda p: ProjectedInPlace(p, lr=0.1),
    "AllUnderNoGrad": lambda p: AllUnderNoGrad(p, lr=0.1),
    "ByData": lambda p: ByData(p, lr=0.1),
    "DataReplaced": lambda p: DataReplaced(p, lr=0.1),
    "ClipValue": lambda p: ClipValue(p, lr=0.1),
    "ClipNorm": lambda p: ClipNorm(p, lr=0.1),
    "GradientByData": lambda p: GradientByData(p, lr=0.1),
    "Detached": lambda p: Detached(p, lr=0.1),
    "ByNumber": lambda p: ByNumber(p, lr=0.1),
    "HiddenState": lambda p: HiddenState(p, lr=0.1),
    "Dampened": lambda p: Dampened(p, lr=0.1, momentum=0.9, dampening=0.5),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_without_a_graph_is_refused_when_the_engine_is_made(name):
    pattern = rf"'model': {name} changes .* in its step without a graph, by .*\(line \d+ of test_own_optimizers.py\)"
    for estimator in ("one_step", "unrolled", "darts"):
        with pytest.raises(mlo.ConfigError, match=pattern):
            engine(with_optimizer(REFUSED[name]), estimator)


@pytest.mark.parametrize("name", REFUSED)
def test_estimators_that_differentiate_no_step_take_it(name):
    make = with_optimizer(REFUSED[name])
    made = engine(make, "cg")
    made.hypergradient("factors")
    made.run(2)
    expected = trained(make, Factors().logs.detach(), [*batches(3), *batches(3)])
    torch.testing.assert_close([*made.problems["model"].module.parameters()], [*expected.parameters()])


class LosesLater(SGD):
    """Its third step has no graph."""

    def step(self, closure=None):
        super().step(closure)
        for p in parameters(self):
            self.state[p]["count"] = self.state[p].get("count", 0) + 1
            if self.state[p]["count"] == 3:
                p.data.mul_(0.5)


def test_a_later_step_without_a_graph_is_refused_then():
    made = engine(with_optimizer(lambda p: LosesLater(p, lr=0.1)), "unrolled")
    with pytest.raises(mlo.ConfigError, match="'model': LosesLater changes 'weight' in its step without a graph"):
        made.hypergradient("factors")


class OwnRate(SGD):
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 0.5


class Counting(SGD):
    count = 0

    def step(self, closure=None):
        self.count += 1
        super().step(closure)


class Remembering(SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.norms = []

    def step(self, closure=None):
        self.norms.append(1.0)
        super().step(closure)


class HoldsParameters(SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.held = [p for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for p in self.held:
                p.clamp_(-0.7, 0.7)


class InOrder(SGD):
    """Keeps its last gradients in a list."""

    def step(self, closure=None):
        with graph(self):
            for p in parameters(self):
                self.state[p]["last"] = [*self.state[p].get("last", []), p.grad.clone()][-2:]
                p.sub_(0.1 * sum(self.state[p]["last"]))


class Nested(Remembering):
    def __init__(self, params, lr):
        SGD.__init__(self, params, lr)
        self.cache = {"calls": []}

    def step(self, closure=None):
        self.cache["calls"].append(1)
        SGD.step(self, closure)


CALLS = []


class ByGlobal(SGD):
    def step(self, closure=None):
        CALLS.append(1)
        for p in parameters(self):
            p.grad = p.grad / len(CALLS)
        super().step(closure)


class ReadsOwn(SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.held = [p for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        for p in parameters(self):
            p.grad = p.grad * self.held[0].detach().norm()
        super().step(closure)


class Learned(SGD):
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)

    def step(self, closure=None):
        with graph(self):
            for p in parameters(self):
                p.grad = p.grad * self.factor
        super().step(closure)


class SharpnessAware(SGD):
    def step(self, closure=None):
        assert closure is not None, "needs a closure"


@pytest.mark.parametrize("estimator", ["cg", "darts", "first_order"])
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (InOrder, r"keeps a list of tensors in its state \('last'\)"),
        (Nested, "changes the attribute 'cache' of the optimizer itself"),
        (ByGlobal, "with the same gradient, has another result the second time.*self.state"),
        (ReadsOwn, "reads the parameter 'weight' itself"),
        (SharpnessAware, "raises AssertionError: needs a closure"),
        (OwnRate, "changes its option 'lr' in its step.*lr_scheduler"),
        (Counting, "changes its attribute 'count' in its step.*self.state"),
        (Remembering, "changes the attribute 'norms' of the optimizer itself"),
        (HoldsParameters, "changes the tensors of the optimizer itself"),
    ],
)
def test_a_step_that_changes_more_than_parameters_and_state_is_refused(kind, what, estimator):
    module = linear()
    optimizer = kind(module.parameters(), lr=0.1)
    before, held = values(module.parameters()), dict(vars(optimizer))
    random = torch.get_rng_state()
    with pytest.raises(mlo.ConfigError, match=rf"'model': .*{kind.__name__}.*{what}|'model': .*{what}"):
        engine(lambda: (module, optimizer), estimator)
    assert all(map(torch.equal, module.parameters(), before))
    assert vars(optimizer) == held
    assert getattr(optimizer, "norms", []) == [] == getattr(optimizer, "cache", {"calls": []})["calls"]
    assert torch.equal(torch.get_rng_state(), random)


def patched(optimizer):
    own = optimizer.step
    optimizer.step = lambda closure=None: (nn.utils.clip_grad_value_(parameters(optimizer), 0.1), own(closure))[1]


def method(optimizer):
    def step(self, closure=None):
        nn.utils.clip_grad_value_(parameters(self), 0.1)
        return type(self).step(self, closure)

    optimizer.step = types.MethodType(step, optimizer)


def wrapped(optimizer):
    own = optimizer.step

    @functools.wraps(own)
    def step(closure=None):
        nn.utils.clip_grad_value_(parameters(optimizer), 0.1)
        return own(closure)

    optimizer.step = step


@pytest.mark.parametrize("estimator", ["one_step", "darts", "cg"])
@pytest.mark.parametrize("kind", [SGD, Adam, Same])
@pytest.mark.parametrize("patch", [patched, method, wrapped])
def test_a_step_that_is_replaced_on_the_instance_is_refused(patch, kind, estimator):
    def make():
        module = linear()
        optimizer = kind(module.parameters(), lr=0.1)
        patch(optimizer)
        return module, optimizer

    with pytest.raises(mlo.ConfigError, match=rf"'model': the method step of its {kind.__name__} was replaced.*super"):
        engine(make, estimator)
    made = engine(with_optimizer(lambda p: kind(p, lr=0.1)), estimator)
    made.step()
    patch(made.problems["model"].optimizer)
    with pytest.raises(mlo.ConfigError, match="was replaced"):
        made.step()


@pytest.mark.parametrize("kind", [SGD, Adam, Same, Projected])
def test_a_step_that_a_scheduler_has_wrapped_is_torchs(kind):
    def make():
        module = linear()
        optimizer = kind(module.parameters(), lr=0.1)
        torch.optim.lr_scheduler.StepLR(optimizer, 100)
        return module, optimizer

    found = engine(make, "unrolled").hypergradient("factors")["logs"]
    torch.testing.assert_close(found, derivative(make), rtol=1e-8, atol=1e-10)


def test_a_step_that_is_replaced_on_torchs_class_is_not_torchs(monkeypatch):
    optimizer = torch.optim.Adagrad([torch.zeros(1, requires_grad=True)])
    assert has_torch_step(optimizer)
    monkeypatch.setattr(torch.optim.Adagrad, "step", lambda self, closure=None: None)
    assert not has_torch_step(optimizer)


def test_the_uppermost_level_takes_any_step():
    made = engine(with_optimizer(lambda p: SGD(p, lr=0.1)), "one_step", steps=1, top_rate=1.0)
    optimizer = made.problems["factors"].optimizer
    method(optimizer)
    gradient = made.hypergradient("factors")["logs"]
    before = made.problems["factors"].module.logs.detach().clone()
    made.step()
    torch.testing.assert_close(made.problems["factors"].module.logs.detach(), before - gradient.clamp(-0.1, 0.1))


def test_a_step_with_a_graph_to_another_parameter_is_refused():
    with pytest.raises(mlo.ConfigError, match="'model': a step of Learned depends on a tensor that requires gradients"):
        engine(with_optimizer(lambda p: Learned(p, 0.1)), "one_step")


def test_a_wrapper_that_is_no_whole_optimizer_is_refused():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, base):
            self.base, self.param_groups, self.state = base, base.param_groups, base.state

    with pytest.raises(mlo.ConfigError, match="Wrapper does not call super"):
        engine(with_optimizer(lambda p: Wrapper(SGD(p, 0.1))), "one_step")
