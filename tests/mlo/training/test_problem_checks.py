"""What a user may change around an engine: hooks, the optimizer's settings, and what it trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import mlo
from tests.plain_loop import Factors, Fit, Judge, batches, derivative, engine, linear, values


def plain():
    module = linear()
    return module, torch.optim.SGD(module.parameters(), lr=0.1)


def calls_of(made: mlo.Engine):
    return made.step, lambda: made.hypergradient("factors"), lambda: made.objective("factors")


def everything(made: mlo.Engine) -> list[Tensor]:
    return values(p for problem in made.problems.values() for p in problem.module.parameters())


def refused_from_now_on(made: mlo.Engine, match: str) -> None:
    """Every call raises the error, and nothing changes."""
    before, random = everything(made), torch.get_rng_state()
    for call in calls_of(made):
        with pytest.raises(mlo.MloError, match=match):
            call()
    assert all(map(torch.equal, everything(made), before))
    assert torch.equal(torch.get_rng_state(), random)


# --- hooks of which there are no derivatives ---


def halve(parameter):
    parameter.grad.mul_(0.5)


def after_accumulation(module, optimizer):
    return module.weight.register_post_accumulate_grad_hook(halve)


def before_step(module, optimizer):
    return optimizer.register_step_pre_hook(lambda *_: None)


def after_step(module, optimizer):
    return optimizer.register_step_post_hook(lambda *_: None)


def before_every_step(module, optimizer):
    return register_optimizer_step_pre_hook(lambda *_: None)


def after_every_step(module, optimizer):
    return register_optimizer_step_post_hook(lambda *_: None)


HOOKS = {
    after_accumulation: "'weight' has a hook that runs after its gradient is accumulated.*Tensor.register_hook",
    before_step: "its optimizer has a hook of register_step_pre_hook.*subclass",
    after_step: "its optimizer has a hook of register_step_post_hook.*subclass",
    before_every_step: "a hook of torch's register_optimizer_step_pre_hook.*subclass",
    after_every_step: "a hook of torch's register_optimizer_step_post_hook.*subclass",
}


@pytest.mark.parametrize("estimator", ["one_step", "darts", "cg"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_run_in_real_steps_alone_are_refused_below_others(hook, estimator):
    def make():
        module, optimizer = plain()
        handles.append(hook(module, optimizer))
        return module, optimizer

    handles = []
    try:
        with pytest.raises(mlo.ConfigError, match=f"'model': .*{HOOKS[hook]}"):
            engine(make, estimator)
    finally:
        handles.pop().remove()
    made = engine(plain, estimator)
    made.step()
    model = made.problems["model"]
    handle = hook(model.module, model.optimizer)
    try:
        refused_from_now_on(made, f"'model': .*{HOOKS[hook]}")
    finally:
        handle.remove()
    made.step()


@pytest.mark.parametrize("estimator", ["one_step", "darts"])
def test_an_uppermost_level_may_have_them(estimator):
    """They act as in a loop that calls backward and step."""
    found = []
    for hooked in (False, True):
        made = engine(plain, estimator, steps=1, top_rate=1.0)
        top = made.problems["factors"]
        if hooked:
            top.module.logs.register_hook(lambda g: g.clamp(-0.2, 0.2))
            top.module.logs.register_post_accumulate_grad_hook(halve)
            top.optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.param_groups[0].update(lr=0.5))
            top.optimizer.register_step_post_hook(lambda *_, logs=top.module.logs: logs.data.clamp_(max=0.35))
        gradient, before = made.hypergradient("factors")["logs"], top.module.logs.detach().clone()
        made.step()
        found.append((gradient, before, top.module.logs.detach().clone()))
        assert top.module.logs.grad is None
    gradient, before, after = found[0]
    torch.testing.assert_close(after, before - gradient)
    torch.testing.assert_close(found[1][0], gradient)
    expected = (before - 0.5 * 0.5 * gradient.clamp(-0.2, 0.2)).clamp(max=0.35)
    torch.testing.assert_close(found[1][2], expected, rtol=1e-12, atol=0)


def test_hooks_after_accumulation_with_several_batches_are_refused():
    made = engine(plain, "one_step", steps=1, top_rate=1.0)
    top = made.problems["factors"]
    top.accumulate = 2
    top.module.logs.register_post_accumulate_grad_hook(halve)
    with pytest.raises(mlo.ConfigError, match=r"'factors': hooks on its parameters .* pass accumulate=1"):
        made.step()


def test_a_hook_after_accumulation_may_take_its_own_step():
    made = engine(plain, "one_step", steps=1, top_rate=1.0)
    logs = made.problems["factors"].module.logs
    gradient, before = made.hypergradient("factors")["logs"], logs.detach().clone()
    own = torch.optim.SGD([logs], lr=0.25)

    def step_now(parameter):
        own.step()
        own.zero_grad()

    logs.register_post_accumulate_grad_hook(step_now)
    made.step()
    torch.testing.assert_close(logs.detach(), before - 0.25 * gradient)


def test_one_level_alone_takes_every_hook():
    class Alone(mlo.Problem):
        def loss(self, batch):
            return (self(batch[0]) - batch[1]).square().mean()

    found = []
    for by_engine in (True, False):
        module, optimizer = plain()
        module.weight.register_hook(lambda g: g.clamp(-0.3, 0.3))
        after_accumulation(module, optimizer)
        optimizer.register_step_post_hook(lambda *_, module=module: module.bias.data.zero_())
        if by_engine:
            mlo.Engine(Alone("alone", module=module, optimizer=optimizer, data=batches(3)), device="cpu").run(3)
        else:
            for x, y in batches(3):
                optimizer.zero_grad()
                (module(x) - y).square().mean().backward()
                optimizer.step()
        found.append(values(module.parameters()))
    torch.testing.assert_close(*found, rtol=0, atol=0)


# --- hooks of modules ---


def hooked_module(hook):
    def make():
        module, optimizer = plain()
        module.register_full_backward_hook(hook)
        return module, optimizer

    return make


def test_forward_hooks_act_alike_everywhere():
    def make():
        module, optimizer = plain()
        module.register_forward_pre_hook(lambda module, args: (args[0].tanh(),))
        module.register_forward_hook(lambda module, args, output: 2 * output + module.weight.sum())
        return module, optimizer

    for estimator in (
        "unrolled",
        {"kind": "unrolled", "product": "forward"},
        {"kind": "unrolled", "product": "central"},
    ):
        found = engine(make, estimator).hypergradient("factors")["logs"]
        torch.testing.assert_close(found, derivative(make), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["model", "factors"])
@pytest.mark.parametrize("estimator", ["one_step", "unrolled", "darts", "sama", "cg", "neumann", "penalty"])
def test_backward_hooks_of_modules_are_refused_where_steps_are_differentiated(estimator, name):
    match = f"'{name}': 'its module' has a backward hook .*Tensor.register_hook"
    if name == "model":
        with pytest.raises(mlo.ConfigError, match=match):
            engine(hooked_module(lambda *_: None), estimator)
    made = engine(plain, estimator)
    module = made.problems[name].module
    for register in (module.register_full_backward_hook, module.register_full_backward_pre_hook):
        handle = register(lambda *_: None)
        refused_from_now_on(made, match)
        handle.remove()
    made.step()


def test_where_nothing_is_differentiated_they_act_as_in_a_plain_loop():
    class Alone(mlo.Problem):
        def loss(self, batch):
            return self(batch[0]).square().mean()

    found = []
    for by_engine in (True, False):
        inner, outer = linear(), nn.Linear(1, 1).double()
        outer.load_state_dict({"weight": torch.ones(1, 1), "bias": torch.zeros(1)})
        module = nn.Sequential(inner, outer)
        outer.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0].clamp(-0.01, 0.01),))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        if by_engine:
            mlo.Engine(Alone("alone", module=module, optimizer=optimizer, data=batches(3)), device="cpu").run(3)
        else:
            for x, _ in batches(3):
                optimizer.zero_grad()
                module(x).square().mean().backward()
                optimizer.step()
        found.append(values(module.parameters()))
    torch.testing.assert_close(*found, rtol=0, atol=0)


# --- settings of an optimizer that depend on upper variables ---


def groups(optimizer):
    return optimizer.param_groups[0]


SETTINGS = {
    "lr": (torch.optim.SGD, lambda logs: {"lr": logs[0].exp()}),
    "momentum": (torch.optim.SGD, lambda logs: {"momentum": logs[1] * 1}),
    "weight_decay": (torch.optim.AdamW, lambda logs: {"weight_decay": logs.exp()[0]}),
    "betas": (torch.optim.Adam, lambda logs: {"betas": (0.9, logs[1].sigmoid())}),
    "eps": (torch.optim.RMSprop, lambda logs: {"eps": logs[0].exp()}),
}


@pytest.mark.parametrize("estimator", ["one_step", "darts", "first_order"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_with_a_graph_are_refused(name, estimator):
    kind, setting = SETTINGS[name]
    match = f"'model': the option '{name}' of its {kind.__name__} is a tensor that requires gradients.*item"

    def make(module=None):
        module = module or linear()
        return module, kind(module.parameters(), lr=0.1)

    def with_setting():
        module, optimizer = make()
        groups(optimizer).update(setting(Factors().logs))
        return module, optimizer

    with pytest.raises(mlo.ConfigError, match=match):
        engine(with_setting, estimator)
    made = engine(make, estimator)
    made.hypergradient("factors") if estimator != "first_order" else None
    groups(made.problems["model"].optimizer).update(setting(made.problems["factors"].module.logs))
    refused_from_now_on(made, match)


def test_a_loss_that_sets_a_learned_rate_is_refused():
    class Sets(Fit):
        def loss(self, batch, factors):
            self.optimizer.param_groups[0]["lr"] = factors()[0] * 0.1
            return super().loss(batch, factors)

    module, optimizer = plain()
    top = Factors()
    made = mlo.Engine(
        [
            Sets("model", module=module, optimizer=optimizer, data=batches(1)),
            Judge("factors", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.1), data=batches(1)),
        ],
        "one_step",
        device="cpu",
    )
    with pytest.raises(mlo.ConfigError, match="'model': the option 'lr' of its SGD"):
        made.hypergradient("factors")


def test_a_rate_without_a_graph_may_be_a_tensor():
    found = []
    for rate in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        module = linear()
        optimizer = torch.optim.SGD(module.parameters(), lr=rate)
        found.append(engine(lambda o=optimizer, m=module: (m, o), "unrolled").hypergradient("factors")["logs"])
    torch.testing.assert_close(*found)


# --- what is trained changes during a run ---


class Stages(nn.Module):
    """A frozen layer, and one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.frozen.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    def forward(self, x):
        return self.head(self.frozen(x).tanh())


class FitStages(mlo.Problem):
    def loss(self, batch, factors):
        return factors()[0] * (self(batch[0]) - batch[1]).square().mean()


def staged(hold_all: bool = True, estimator: object = "one_step") -> mlo.Engine:
    torch.manual_seed(0)
    module, top = Stages().double(), Factors()
    held = module.parameters() if hold_all else module.head.parameters()
    return mlo.Engine(
        [
            FitStages("model", module=module, optimizer=torch.optim.SGD(held, lr=0.1), data=batches(2), steps=2),
            Judge("factors", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.1), data=batches(1)),
        ],
        estimator,
        device="cpu",
    )


def thaw(module, optimizer):
    module.frozen.requires_grad_(True)


def freeze(module, optimizer):
    module.head.bias.requires_grad_(False)


def replace(module, optimizer):
    module.head.weight = nn.Parameter(torch.zeros(1, 4, dtype=torch.float64))


def tie(module, optimizer):
    module.frozen.bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    module.frozen.register_parameter("other", module.head.weight)


def replace_submodule(module, optimizer):
    module.head = nn.Linear(4, 1).double()


def replace_frozen_submodule(module, optimizer):
    module.frozen = nn.Linear(4, 4).double().requires_grad_(False)


def regroup(module, optimizer):
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [optimizer.param_groups[0]["params"].pop()]})


CHANGES = {
    thaw: "the parameter 'frozen.weight' requires gradients by now, .*learning rate 0 .*base_lrs",
    freeze: "no longer requires gradients: 'head.bias'; freeze",
    replace: "the parameter 'head.weight' of its module is another tensor .*copy_",
    tie: "the parameter 'frozen.other' of its module is another tensor",
    replace_submodule: "'head' of its module is another submodule",
    replace_frozen_submodule: "'frozen' of its module is another submodule",
    regroup: "its optimizer holds its parameters in other groups",
}


@pytest.mark.parametrize("estimator", ["unrolled", "darts", "first_order"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_trained_may_not_change(change, estimator):
    made = staged(estimator=estimator)
    if estimator != "first_order":
        made.step()
    model = made.problems["model"]
    change(model.module, model.optimizer)
    refused_from_now_on(made, f"'model': .*{CHANGES[change]}")


def test_a_group_that_is_added_is_refused():
    made = staged(hold_all=False)
    made.step()
    model = made.problems["model"]
    model.module.frozen.requires_grad_(True)
    made.step()  # a constant, as in a plain loop
    model.optimizer.add_param_group({"params": model.module.frozen.parameters()})
    refused_from_now_on(made, "'model': its optimizer holds the parameter 'frozen.weight', 'frozen.bias' by now")


def test_changes_between_problem_and_engine_are_seen():
    module, optimizer = plain()
    fit = Fit("model", module=module, optimizer=optimizer, data=batches(1))
    top = Factors()
    judge = Judge("factors", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.1), data=batches(1))
    module.bias.requires_grad_(False)
    with pytest.raises(mlo.GraphError, match="no longer requires gradients: 'bias'"):
        mlo.Engine([fit, judge], device="cpu")


def test_the_remedies_work():
    """A group with learning rate 0 that is raised later; and a problem and an engine made again."""
    made = staged()
    module, optimizer = made.problems["model"].module, made.problems["model"].optimizer
    made.step()
    module.frozen.requires_grad_(True)
    top = made.problems["factors"].module
    again = mlo.Engine(
        [
            FitStages("model", module=module, optimizer=optimizer, data=batches(2), steps=2),
            Judge("factors", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.1), data=batches(1)),
        ],
        "unrolled",
        device="cpu",
    )
    before = module.frozen.weight.detach().clone()
    mlo.check(again)
    again.step()
    assert not torch.equal(module.frozen.weight, before)

    module = Stages().double().requires_grad_(True)
    parts = [{"params": module.head.parameters()}, {"params": module.frozen.parameters(), "lr": 0.0}]
    optimizer = torch.optim.SGD(parts, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    made = mlo.Engine(
        [
            FitStages("model", module=module, optimizer=optimizer, data=batches(2), steps=2, scheduler=scheduler),
            Judge("factors", module=top, optimizer=torch.optim.SGD(top.parameters(), lr=0.1), data=batches(1)),
        ],
        "unrolled",
        device="cpu",
    )
    before = module.frozen.weight.detach().clone()
    made.step()
    assert torch.equal(module.frozen.weight, before)
    scheduler.base_lrs[1] = 0.1  # from which the scheduler computes the rate
    made.step()
    before = module.frozen.weight.detach().clone()
    mlo.check(made)
    made.step()
    assert not torch.equal(module.frozen.weight, before)


def test_harmless_changes_are_taken():
    made = staged(estimator="unrolled")
    model = made.problems["model"]
    made.step()
    model.module.frozen.bias = nn.Parameter(torch.zeros(4, dtype=torch.float64), requires_grad=False)
    made.step()
    model.module.register_parameter("unused", nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    made.step()
    model.optimizer.load_state_dict(model.optimizer.state_dict())
    made.step()
    mlo.check(made)
    parametrizations.weight_norm(model.module.head)
    refused_from_now_on(made, "its module has no tensor 'head.weight' any more")


def test_a_variable_that_gets_a_second_place_in_its_module_is_refused():
    """Virtual steps would not exchange it there."""
    made = engine(plain, "one_step", steps=1)
    module = made.problems["model"].module
    module.tied = module.weight
    with pytest.raises(mlo.GraphError, match="'model': the parameter 'tied' of its module is another tensor"):
        made.step()
