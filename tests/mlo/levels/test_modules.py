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
from mlo.ops.differentiable import TwiceDifferentiable


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


class InLists(nn.Module):
    """Parameters in torch's containers."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name = nn.ParameterDict({"first": torch.randn(4, 3), "last": torch.randn(3, 2)})
        self.by_number = nn.ParameterList([torch.randn(3), torch.randn(2)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.by_name["first"] + self.by_number[0])
        return (hidden @ self.by_name["last"] + self.by_number[1]).mean(dim=1)


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.within = Tied()

    def forward(self, x: Tensor) -> Tensor:
        return self.within(x)


class Called(Wrapper):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * self.within(x)


class ByKeyword(Wrapper):
    def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.within(x)

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x=x, scale=0.5)


class NotCopied(Wrapper):
    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("cannot be copied")


class Slotted(Wrapper):
    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.within(x)


class Counting(Wrapper):
    """A buffer that is not saved, and a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.table = torch.eye(4) + 0.1

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.within(x @ self.table.to(x.dtype)) * (1 + 0.1 * self.calls)


class Quantized(Wrapper):
    """A frozen matrix of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Parameter(torch.arange(16, dtype=torch.uint8).view(4, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.within(x @ (self.bytes.to(x.dtype) / 16))


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    module = Tied()
    change(module)
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


def engine(
    module: nn.Module, estimator: object, steps: int = 3, optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
) -> mlo.Engine:
    torch.manual_seed(3)
    scale = Scale().double()
    data = [(torch.randn(2, 3, 4).double(), torch.randn(2, 2).double()) for _ in range(3)]
    rate = 0.1 if optimizer is torch.optim.SGD else 0.01
    own = optimizer([p for p in module.parameters() if p.requires_grad], lr=rate)
    return mlo.Engine(
        [
            Fit("model", module=module, optimizer=own, data=data, steps=steps),
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
    "parameters in containers": InLists,
    "call overridden": Called,
    "by keyword": ByKeyword,
    "not copied": NotCopied,
    "with slots": Slotted,
    "with an unsaved buffer": Counting,
    "of bytes": Quantized,
    "data parallel": lambda: nn.DataParallel(Tied()),
    "compiled by the user": lambda: torch.compile(Tied()),
    "with a compiled part": lambda: changed(lambda module: module.two.compile()),
    "spectral norm": lambda: changed(lambda module: parametrizations.spectral_norm(module.head)),
    "spectral norm by hooks": lambda: changed(lambda module: nn.utils.spectral_norm(module.head)),
    "orthogonal": lambda: changed(lambda module: parametrizations.orthogonal(module.head)),
    "pruned": lambda: changed(lambda module: prune.l1_unstructured(module.head, "weight", 0.5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("product", ["exact", "forward"])
def test_a_loss_that_calls_compiled_code_is_refused(product):
    class Compiled(Wrapper):
        def __init__(self) -> None:
            super().__init__()
            self.activation = torch.compile(lambda x: x.sin().exp(), backend="aot_eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(self.within(x))

    made = engine(Compiled().double(), {"kind": "one_step", "product": product})
    with pytest.raises(
        mlo.GraphError, match=r"'model': its loss uses a function compiled by torch\.compile.* Engine\(compile=True\)"
    ):
        made.step()


QUICK = ("recurrent", "unused", "tied with buffer", "parametrized", "checkpointed weight norm", "weight norm by hooks")
QUICK += ("spectral norm", "of bytes", "in place", "checkpointed attention")


def by_hand(checked: mlo.Engine) -> Tensor:
    """The hypergradient through the next steps of plain SGD, by autograd of functional calls."""
    model, judge = checked.problems.values()
    module = model.module.module if isinstance(model.module, nn.DataParallel) else model.module
    logs = judge.module.logs.detach().clone().requires_grad_()
    tensors = {n: p.detach().clone() for n, p in module.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    for name in names:
        tensors[name].requires_grad_()

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return (torch.func.functional_call(module, {**tensors, **buffers}, (x,)) - y).square()

    for number in range(model.steps):
        loss = (logs.exp() * losses(*model.stream.peek(number))).mean()
        found = torch.autograd.grad(loss, [tensors[n] for n in names], create_graph=True, allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            tensors[name] = tensors[name] - (0 if gradient is None else 0.1 * gradient)
    return torch.autograd.grad(losses(*judge.stream.peek()).mean(), logs)[0]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:.*compiled by torch.compile")
@pytest.mark.parametrize("module", [name for name in MODULES if "checkpointed" not in name])
def test_modules_agree_with_steps_by_hand(module):
    torch.manual_seed(0)
    made = MODULES[module]().double()
    checked = engine(made, "unrolled", optimizer=torch.optim.SGD)
    with TwiceDifferentiable(), torch.compiler.set_stance("force_eager"):
        expected = by_hand(checked)
    torch.testing.assert_close(checked.hypergradient("scale", torch.float64)["logs"], expected, rtol=1e-9, atol=1e-14)


def test_a_compiled_module_is_reported():
    with pytest.warns(UserWarning, match=r"'model': its module is compiled by torch\.compile.* Engine\(compile=True\)"):
        engine(torch.compile(Tied().double()), "one_step")


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:.*compiled by torch.compile")
@pytest.mark.parametrize("product", ["exact", "central"])
@pytest.mark.parametrize("module", [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in MODULES])
def test_modules_work_and_agree_with_brute_force(module, product):
    if (module, product) == ("in place", "central"):
        pytest.skip("a difference across the kinks of a ReLU is not exact")
    if (module, product) == ("spectral norm by hooks", "central"):
        pytest.skip("a difference also sees how the singular vectors change, which torch takes for constants")
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


class OfBatch(mlo.Problem):
    def loss(self, batch, top):
        return (self(batch)[:, :2] - top(batch)).square().mean()


class InAList(nn.Module):
    """Uses its weight from a list, which no substitution reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.weights = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.weights[0]


@pytest.mark.filterwarnings("ignore:problem")
def test_a_parameter_in_a_list_that_moves_is_reported():
    module = InAList()
    low = OfBatch(
        "low", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data=[torch.randn(4, 3)]
    )
    top = two_levels()[1]
    with pytest.raises(mlo.GraphError, match=r"'low': a tensor that the gradient .* written into.*\.params\[name\]"):
        mlo.Engine([low, top], "one_step", device="cpu").run(2)


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
