"""The engine: which problem steps when, what it costs in passes, and that hypergradients have no side effects."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from analytic import SHAPES, Point, Quadratics, Shape
from engine_state import same, snapshot
from small_lbt import noisy_lbt
from torch import nn

import mlo

ESTIMATORS = ["first_order", "darts", "one_step", "cg", "neumann"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimating_changes_no_bit_of_anything(estimator, device):
    stack = noisy_lbt()
    engine = mlo.Engine(stack, estimator, device=device)
    engine.run(2)
    before = snapshot(stack)
    assert before[0][1]["norm.running_mean"].abs().sum() > 0
    first = engine.hypergradient("arch")["weights"]
    assert same(snapshot(stack), before)
    assert torch.equal(engine.hypergradient("arch")["weights"], first)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_run_is_the_same_whether_or_not_hypergradients_are_computed_in_between(estimator):
    plain, watched = noisy_lbt(), noisy_lbt()
    engine = mlo.Engine(plain, estimator, device="cpu")
    torch.manual_seed(1)
    engine.run(7)
    engine = mlo.Engine(watched, estimator, device="cpu")
    torch.manual_seed(1)
    engine.run(7, callbacks=[lambda engine: engine.hypergradient("arch")])
    assert same(snapshot(plain), snapshot(watched))


def test_batch_norm_counts_real_steps_alone():
    stack = noisy_lbt()
    mlo.Engine(stack, "darts", device="cpu").run(6)
    assert stack[0].module.norm.num_batches_tracked == 6
    assert stack[1].module[1].num_batches_tracked == 6


def test_real_steps_are_the_ones_that_a_hand_written_loop_takes():
    """Parameters, statistics and dropout masks of the teacher, whose loss reads an architecture that stays put."""
    stack = noisy_lbt()
    twin = copy.deepcopy(stack[0].module)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    weights = stack[2].module.weights.detach().clone()
    seen = []
    real = stack[0].stream.next
    stack[0].stream.next = lambda: seen.append(real()) or seen[-1]
    stack[2].warmup = 10
    torch.manual_seed(3)
    masks = torch.get_rng_state()
    engine = mlo.Engine(stack, "one_step", device="cpu")
    engine.step()
    torch.set_rng_state(masks)
    images, labels = seen[0]
    nn.functional.cross_entropy(twin(images, weights), labels).backward()
    optimizer.step()
    for name, value in twin.state_dict().items():
        assert torch.equal(value, stack[0].module.state_dict()[name]), name


def test_passes_of_one_step():
    """Without lookahead, by central difference: the teacher 5, the student 4, and every lower problem pulled once."""
    stack = noisy_lbt()
    engine = mlo.Engine(stack, "darts", lookahead=False, device="cpu")
    engine.step()
    assert engine.passes["teacher"] == {"step": 1, "read": 2, "product": 2}
    assert engine.passes["student"] == {"step": 1, "read": 1, "product": 2}
    assert engine.pullbacks == {"teacher": 1, "student": 1}


def test_passes_of_one_exact_step():
    """The step's own gradient keeps its graph for the product: an exact step costs no further pass."""
    engine = mlo.Engine(noisy_lbt(), "one_step", device="cpu")
    engine.step()
    assert engine.passes["teacher"] == {"step": 1, "read": 2}
    assert engine.passes["student"] == {"step": 1, "read": 1}


def test_lookahead_costs_one_more_pass_a_lower_problem():
    engine = mlo.Engine(noisy_lbt(), "darts", device="cpu")
    engine.step()
    assert engine.passes["teacher"] == {"virtual": 1, "step": 1, "read": 3, "product": 2}
    assert engine.passes["student"] == {"virtual": 1, "step": 1, "read": 1, "product": 2}


def test_a_ladder_takes_one_pullback_a_level():
    """Eight lower levels, each reading all below: 2^7 paths, 8 pullbacks."""
    names = [f"level{i}" for i in range(8)]
    ladder = Shape("ladder", {n: (*names[:i], "top") for i, n in enumerate(names)} | {"top": tuple(names)})
    quadratics = Quadratics.make(ladder)
    engine = mlo.Engine(quadratics.problems(), "cg", device="cpu")
    found = engine.hypergradient("top")["value"]
    torch.testing.assert_close(found, quadratics.closed_form("top"), rtol=1e-10, atol=1e-10)
    assert engine.pullbacks == dict.fromkeys(names, 1)


def test_lookahead_updates_the_top_first():
    """Without it, the lower problem steps under the old top; with it, under the new one, on the same batch."""
    for lookahead in (False, True):
        quadratics = Quadratics.make(SHAPES[0])
        low, top = quadratics.problems()
        with torch.no_grad():
            low.module.value.add_(1.0)
        start, before = low.module.value.detach().clone(), top.module.value.detach().clone()
        mlo.Engine([low, top], "one_step", lookahead=lookahead, device="cpu").step()
        read = top.module.value.detach() if lookahead else before
        gradient = quadratics.own["low"] @ start + quadratics.pull("low", {"top": read})
        torch.testing.assert_close(low.module.value.detach(), start - 0.05 * gradient)
        assert not torch.equal(top.module.value, before)


class Low(mlo.Problem):
    def loss(self, batch, top):
        return (self() - top() - batch).square().sum()


class Top(mlo.Problem):
    def loss(self, batch, low):
        return (low() * batch).square().sum() + self().square().sum()


def pair(low: dict | None = None, top: dict | None = None) -> list[mlo.Problem]:
    made = []
    for cls, name, options in ((Low, "low", low), (Top, "top", top)):
        module = Point(torch.ones(2))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        defaults = {"data": [torch.tensor(float(i)) for i in range(10)]}
        made.append(cls(name, module=module, optimizer=optimizer, **{**defaults, **(options or {})}))
    return made


@pytest.mark.parametrize(("low", "top"), [(3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("lookahead", [False, True])
def test_problems_take_their_own_number_of_steps(low, top, lookahead):
    stack = pair({"steps": low}, {"steps": top})
    engine = mlo.Engine(stack, "one_step", lookahead=lookahead, device="cpu")
    engine.run(4)
    assert [p.steps_taken for p in stack] == [4 * low, 4 * top]
    assert engine.passes["low"]["step"] == 4 * low
    assert engine.passes["top"]["step"] == 4 * top


def test_several_upper_steps_differentiate_the_lower_step_where_it_was_taken():
    """The second step of the top still goes through the lower step under the first top."""
    stack = pair(top={"steps": 2, "data": [torch.tensor(1.0)]}, low={"data": [torch.tensor(0.5)]})
    low, top = (p.module.value.detach().clone() for p in stack)
    mlo.Engine(stack, "one_step", device="cpu").step()
    low = low - 0.1 * 2 * (low - top - 0.5)
    for _ in range(2):
        top = top - 0.1 * (2 * top + 0.1 * 2 * 2 * low)
    torch.testing.assert_close(stack[1].module.value.detach(), top)


def test_warmup_delays_an_upper_problem():
    stack = pair(top={"warmup": 3})
    engine = mlo.Engine(stack, "darts", device="cpu")
    engine.run(3)
    assert [p.steps_taken for p in stack] == [3, 0]
    assert engine.passes["low"] == {"step": 3}
    engine.run(2)
    assert [p.steps_taken for p in stack] == [5, 2]


def test_a_scheduler_steps_with_its_own_problem():
    stack = pair({"steps": 3}, {"warmup": 1})
    for problem in stack:
        problem.scheduler = torch.optim.lr_scheduler.ExponentialLR(problem.optimizer, 0.5)
    mlo.Engine(stack, "one_step", device="cpu").run(2)
    assert [p.optimizer.param_groups[0]["lr"] for p in stack] == [0.1 * 0.5**6, 0.1 * 0.5]


def test_a_single_problem_is_plain_training():
    class Alone(mlo.Problem):
        def loss(self, batch):
            return (self() - batch).square().sum()

    module = Point(torch.zeros(2))
    alone = Alone("alone", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.5), data=[3.0])
    mlo.Engine([alone], device="cpu").run(2)
    torch.testing.assert_close(module.value.detach(), torch.full((2,), 3.0))


def test_frozen_parameters_and_those_of_no_optimizer_stay():
    stack = noisy_lbt()
    teacher = stack[0].module
    teacher.head.bias.requires_grad_(False)
    head = torch.optim.SGD(teacher.head.parameters(), lr=0.1)
    stack[0] = type(stack[0])(
        "teacher", module=teacher, optimizer=head, data=[(torch.randn(5, 5), torch.arange(5) % 3)]
    )
    before = {n: p.detach().clone() for n, p in teacher.named_parameters()}
    mlo.Engine(stack, "one_step", device="cpu").run(3)
    assert [n for n, p in teacher.named_parameters() if not torch.equal(p, before[n])] == ["head.weight"]


def test_a_submodule_under_two_names_is_run_as_it_is_and_unchanged_by_a_virtual_step():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
            self.again = nn.Sequential(self.layer, self.norm)

        def forward(self, x):
            return self.again(self.norm(self.layer(x)))

    class Low(mlo.Problem):
        def loss(self, batch):
            return self(batch).sin().mean()

    torch.manual_seed(0)
    module, x = Twice(), torch.randn(5, 3)
    plain = copy.deepcopy(module)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    engine = mlo.Engine(
        Low("low", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data=[x]), device="cpu"
    )
    engine.objective("low")
    engine.hypergradient("low")
    for name, tensor in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
        assert tensor is tensors[name]
        assert torch.equal(tensor, values[name])
    engine.step()
    plain(x).sin().mean().backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor)


def test_tied_weights_stay_tied_and_get_both_parts_of_their_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    class TiedLow(mlo.Problem):
        def loss(self, batch, top):
            return (self(batch) - top()).square().mean()

    class TiedTop(mlo.Problem):
        def loss(self, batch, low):
            return low(batch).square().mean()

    torch.manual_seed(0)
    x, module, target = torch.randn(4, 2).double(), Tied().double(), Point(torch.ones(2).double())
    low = TiedLow("low", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.3), data=[x])
    top = TiedTop("top", module=target, optimizer=torch.optim.SGD(target.parameters(), lr=0.1), data=[x])
    found = mlo.Engine([low, top], "one_step", device="cpu").hypergradient("top")["value"]
    w = module.one.weight.detach().clone().requires_grad_()
    t = target.value.detach().clone().requires_grad_()
    loss = (torch.tanh(x @ w.T) @ w.T - t).square().mean()
    w = w - 0.3 * torch.autograd.grad(loss, w, create_graph=True)[0]
    expected = torch.autograd.grad((torch.tanh(x @ w.T) @ w.T).square().mean(), t)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Bent(mlo.Problem):
    def loss(self, batch, low, top):
        return (self() * top().exp()).sum() + self().square().sum() + low().square().sum()


class Pulled(mlo.Problem):
    def loss(self, batch, mid, top):
        return (self() - mid().sin() - top()).square().sum()


class Last(mlo.Problem):
    def loss(self, batch, mid, low):
        return (mid() * low()).sum()


@pytest.mark.parametrize("estimator", ["one_step", "unrolled", "cg", "darts"])
def test_a_read_without_a_mixed_second_derivative_is_no_missing_read(estimator):
    """The middle loss depends on the low problem, and its gradient does not: the cotangent is zero."""
    made = []
    for cls, name in ((Pulled, "low"), (Bent, "mid"), (Last, "top")):
        module = Point(torch.randn(2, dtype=torch.float64))
        made.append(cls(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the inner path
        mlo.Engine(made, estimator, device="cpu").run(2)
        difference = {"kind": "one_step", "product": {"kind": "central", "radius": 1e-4}}
        found = [mlo.Engine(made, one, device="cpu").hypergradient("top")["value"] for one in ("one_step", difference)]
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.zeros(3, 2))

    def forward(self, x):
        return x @ (self.one + self.other)  # both have the same gradient, in one tensor


class FitSum(mlo.Problem):
    def loss(self, batch):
        x, y = batch
        return (self(x) - y).square().mean()


class Decayed(torch.optim.SGD):
    """An optimizer that writes into gradients."""

    def step(self, closure=None):
        for group in self.param_groups:
            for variable in group["params"]:
                variable.grad.add_(variable.detach(), alpha=0.1)
        return super().step(closure)


def nesterov(variables, foreach):
    return torch.optim.SGD(variables, 0.1, momentum=0.9, nesterov=True, foreach=foreach)


def rprop(variables, foreach):
    return torch.optim.Rprop(variables, 0.1, foreach=foreach)


def decayed(variables, foreach):
    return Decayed(variables, 0.1, foreach=foreach)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("optimizer_of", [nesterov, rprop, decayed])
def test_an_optimizer_may_write_into_a_gradient_that_two_variables_share(optimizer_of, foreach):
    torch.manual_seed(0)
    x, y, model, hand = torch.randn(6, 3), torch.randn(6, 2), Sum(), Sum()
    problem = FitSum("model", module=model, optimizer=optimizer_of(model.parameters(), foreach), data=[(x, y)])
    mlo.Engine(problem, device="cpu").run(3)
    optimizer = optimizer_of(hand.parameters(), foreach)
    for _ in range(3):
        optimizer.zero_grad()
        (hand(x) - y).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.one, hand.one)
    assert torch.equal(model.other, hand.other)


class Weighted(mlo.Problem):
    def loss(self, batch, weight):
        x, y = batch
        return (weight.params["weight"].exp() * (self(x) - y).square()).mean()


class Judged(mlo.Problem):
    def loss(self, batch, model):
        x, y = batch
        return (model(x) - y).square().mean()


@pytest.mark.parametrize("foreach", [False, True])
def test_a_gradient_that_is_kept_to_differentiate_a_step_is_not_written_into(foreach):
    torch.manual_seed(0)
    model, weight = nn.Linear(3, 2).double(), nn.Linear(2, 1, bias=False).double()
    data = [(torch.randn(6, 3).double(), torch.randn(6, 2).double())]
    above = torch.optim.SGD(weight.parameters(), 0.1)
    engine = mlo.Engine(
        [
            Weighted("model", module=model, optimizer=nesterov(model.parameters(), foreach), data=data, steps=2),
            Judged("weight", module=weight, optimizer=above, data=data),
        ],
        {"kind": "unrolled", "product": "one_sided"},
        device="cpu",
    )
    for _ in range(3):
        before, expected = weight.weight.detach().clone(), engine.hypergradient("weight")["weight"]
        engine.step()
        torch.testing.assert_close((before - weight.weight.detach()) / 0.1, expected, rtol=1e-7, atol=1e-10)
