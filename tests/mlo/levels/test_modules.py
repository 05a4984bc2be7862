"""Modules as people have them: each gives the hypergradient that its plain equivalent gives, or brute force finds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import mlo


class Attention(nn.Module):
    """One head of scaled-dot-product attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).view(2, 1, -1, 12).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v)).mean(dim=(1, 2))


class CheckpointedAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class Deep(nn.Module):
    """Blocks with activations checkpointed or not."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x).mean(dim=1)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.SiLU(inplace=True))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)).mean(dim=1)


class Unused(nn.Module):
    """Some parameters that no loss reaches, and some that are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(torch.tanh(self.frozen(x))).mean(dim=1)


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x))))).mean(dim=1)


class TiedWithBuffer(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.gain.mul_(1.1)
        return super().forward(x * self.gain)


def parametrized() -> nn.Module:
    module = Tied()
    parametrize.register_parametrization(module.one, "weight", nn.Tanh())
    return module


def weight_normed(norm: Callable[..., nn.Module], checkpointed: bool = False) -> nn.Module:
    """Two layers of it, along the first dimension and along the last."""
    module = Deep(checkpointed)
    norm(module.blocks[0][0])
    norm(module.blocks[1][0], dim=1)
    return module


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.tensor([0.1, -0.2]))

    def forward(self) -> Tensor:
        return self.logs.exp()


class Fit(mlo.Problem):
    def loss(self, batch, scale):
        x, y = batch
        return (scale() * (self(x) - y).square()).mean()


class Judge(mlo.Problem):
    def loss(self, batch, model):
        x, y = batch
        return (model(x) - y).square().mean()


def engine(module: nn.Module, estimator: object, steps: int = 3) -> mlo.Engine:
    torch.manual_seed(3)
    scale = Scale().double()
    data = [(torch.randn(2, 3, 4).double(), torch.randn(2, 2).double()) for _ in range(3)]
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.01)
    return mlo.Engine(
        [
            Fit("model", module=module, optimizer=optimizer, data=data, steps=steps),
            Judge("scale", module=scale, optimizer=torch.optim.SGD(scale.parameters(), lr=0.1), data=data),
        ],
        estimator,
        device="cpu",
    )


MODULES = {
    "attention": Attention,
    "recurrent": Recurrent,
    "checkpointed": lambda: Deep(True),
    "in place": InPlace,
    "unused": Unused,
    "tied": Tied,
    "tied with buffer": TiedWithBuffer,
    "parametrized": parametrized,
    "weight norm": lambda: weight_normed(parametrizations.weight_norm),
    "checkpointed weight norm": lambda: weight_normed(parametrizations.weight_norm, checkpointed=True),
    "weight norm by hooks": lambda: weight_normed(nn.utils.weight_norm),
    "checkpointed attention": CheckpointedAttention,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("product", ["exact", "central"])
@pytest.mark.parametrize("module", MODULES)
def test_modules_work_and_agree_with_brute_force(module, product):
    if (module, product) == ("in place", "central"):
        pytest.skip("a difference across the kinks of a ReLU is not exact")
    torch.manual_seed(0)
    made = MODULES[module]().double()
    checked = engine(made, {"kind": "unrolled", "product": product})
    checked.run(2)
    mlo.check(checked, tolerance=1e-5 if product == "exact" else 1e-2)


@pytest.mark.parametrize("estimator", ["one_step", "unrolled", "cg", "darts"])
def test_checkpointed_activations_are_recomputed_with_the_substituted_parameters(estimator):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        made = engine(Deep(checkpointed).double(), estimator)
        made.run(2)
        found.append(made.hypergradient("scale")["logs"])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


class Flat(mlo.Problem):
    """Uses the parameters as one vector, its own and those of what it reads."""

    def loss(self, batch, other=None):
        own, read = (torch.cat([p.flatten() for p in each.params.values()]) for each in (self, other))
        weights = torch.arange(1.0, 1 + own.numel())
        return ((own * weights).sum() - (read * weights).sum()).sin()


def test_parameters_are_in_the_order_of_the_module():
    """Not with the frozen ones last; a vector of all of them is that of torch."""
    modules = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)).double() for _ in range(2)]
    problems = []
    for name, other, module in (("low", "top", modules[0]), ("top", "low", modules[1])):
        for frozen in (module[0].weight, module[1].bias):
            frozen.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        problems.append(Flat(name, module=module, optimizer=optimizer, reads={"other": other}))
        assert list(problems[-1].params) == [name for name, _ in module.named_parameters()]
    weights = torch.arange(1.0, 19.0).double()
    own, read = (nn.utils.parameters_to_vector(module.parameters()) @ weights for module in modules)
    expected = modules[0][2].weight.detach() - 0.1 * (own - read).cos().detach() * weights[12:16].view(2, 2)
    mlo.Engine(problems, "one_step", lookahead=False, device="cpu").step()
    torch.testing.assert_close(modules[0][2].weight.detach(), expected)


class Scaled(mlo.Problem):
    """Goes to the module's own weight, which an evaluation cannot replace."""

    def loss(self, batch, top):
        return (self(batch) - top(batch)).square().mean() * (1 + self.module.weight.square().sum())


class Above(mlo.Problem):
    def loss(self, batch, low):
        return low(batch).square().mean()


def two_levels() -> list[mlo.Problem]:
    one, two, data = nn.Linear(3, 2), nn.Linear(3, 2), [torch.randn(4, 3)]
    low = Scaled("low", module=one, optimizer=torch.optim.SGD(one.parameters(), lr=0.1), data=data)
    return [low, Above("top", module=two, optimizer=torch.optim.SGD(two.parameters(), lr=0.1), data=data)]


@pytest.mark.parametrize("estimator", ["one_step", "cg", "darts"])
def test_a_loss_that_goes_past_the_substitution_is_reported(estimator):
    made = mlo.Engine(two_levels(), estimator, device="cpu")
    with pytest.warns(UserWarning, match=r"'low': its loss uses 'weight' of the module of 'low' directly.*\.params"):
        made.step()
    made.run(2)  # once


def test_a_parameter_that_is_frozen_in_mid_run_is_reported():
    stack = two_levels()
    made = mlo.Engine(stack, "cg", device="cpu")
    stack[0].module.bias.requires_grad_(False)
    with pytest.raises(mlo.GraphError, match="'low': a parameter that its optimizer held at the start no longer"):
        made.step()


CHANGES = {
    "weight norm": lambda module: parametrizations.weight_norm(module.one),
    "weight norm of the second use of a tied weight": lambda module: parametrizations.weight_norm(module.two),
    "parametrized": lambda module: parametrize.register_parametrization(module.one, "weight", nn.Tanh()),
    "pruned": lambda module: prune.l1_unstructured(module.one, "weight", amount=0.5),
    "taken away": lambda module: setattr(module.one, "weight", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_is_changed_after_its_problem_was_made_is_reported(change):
    module = Tied().double()
    made = engine(module, "one_step")
    made.step()
    CHANGES[change](module)
    for call in (made.step, lambda: made.hypergradient("scale"), lambda: made.objective("scale")):
        with pytest.raises(
            mlo.GraphError, match=r"'model': its module has no tensor '(one|two)\.weight' any more.* first"
        ):
            call()


def test_reentrant_checkpointing_raises():
    class Reentrant(Deep):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.blocks[0], x.requires_grad_(), use_reentrant=True)).mean(dim=1)

    made = engine(Reentrant(True).double(), "one_step")
    for call in (made.step, lambda: made.hypergradient("scale")):
        with pytest.raises(mlo.ConfigError, match=r"checkpoint\(..., use_reentrant=False\)"):
            call()


class Spread(mlo.Problem):
    """Multiplies by a sparse matrix of the batch, as graph networks do."""

    def loss(self, batch, top):
        adjacency, x = batch
        return (torch.sparse.mm(adjacency, self(x)) - top(x)).square().mean()


class AboveSpread(mlo.Problem):
    def loss(self, batch, low):
        return low(batch[1]).square().mean()


@pytest.mark.parametrize("estimator", ["one_step", "unrolled", "cg", "darts"])
def test_sparse_tensors_in_batches(estimator):
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    data = [(torch.eye(5).to_sparse(), torch.randn(5, 3))]
    low = Spread("low", module=one, optimizer=torch.optim.SGD(one.parameters(), lr=0.1), data=data, steps=2)
    top = AboveSpread("top", module=two, optimizer=torch.optim.SGD(two.parameters(), lr=0.1), data=data)
    mlo.Engine([low, top], estimator, device="cpu").run(2)


def test_no_graph_outlives_its_round():
    """That of the pass whose memory is counted neither: an operator's saved output must not hold itself."""
    alive = []

    class Watched(mlo.Problem):
        def loss(self, batch, top):
            hidden = self(batch).tanh()
            alive.append(weakref.ref(hidden))
            return (hidden - top(batch)).square().mean()

    one, two, data = nn.Linear(3, 2), nn.Linear(3, 2), [torch.randn(4, 3)]
    low = Watched("low", module=one, optimizer=torch.optim.SGD(one.parameters(), lr=0.1), data=data)
    top = Above("top", module=two, optimizer=torch.optim.SGD(two.parameters(), lr=0.1), data=data)
    mlo.Engine([low, top], "one_step", device="cpu").run(3)
    gc.collect()
    assert [reference() for reference in alive[:-1]] == [None] * (len(alive) - 1)
