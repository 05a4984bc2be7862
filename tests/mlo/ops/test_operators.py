"""Every operator of torch in a lower loss is differentiated right, or refused by its name."""

from __future__ import annotations

import sys
import types
import unittest
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

import mlo
from mlo.hypergradient.products import Exact, Forward, Product
from mlo.ops.tf32 import Tf32
from mlo.steps.evaluation import MicroBatch
from mlo.steps.level import levels_of
from mlo.steps.point import Point, Wanted, gradient

EXACT = {"kind": "unrolled"}
FORWARD = {"kind": "unrolled", "product": "forward"}
ESTIMATORS = [EXACT, FORWARD]


class Low(mlo.Problem):
    """A loss through an operator, of the module's output ``a`` and of what is read, ``b``."""

    def __init__(self, name: str, *, operator: Callable[[Tensor, Tensor], Tensor], **problem: Any) -> None:
        super().__init__(name, **problem)
        self.operator = operator

    def loss(self, batch, up):
        return self.operator(self(batch), up(batch)).sin().mean() + (self(batch) * up(batch)).mean()


class Up(mlo.Problem):
    def loss(self, batch, low):
        return low(batch).sin().square().mean()


def engine_of(
    operator: Callable[[Tensor, Tensor], Tensor], estimator: object, *layers: nn.Module, steps: int = 2
) -> mlo.Engine:
    torch.manual_seed(0)
    low, up = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *layers), nn.Linear(3, 4)
    data = [torch.randn(4, 3) for _ in range(2)]
    problems = [
        Low(
            "low",
            operator=operator,
            module=low,
            optimizer=torch.optim.SGD(low.parameters(), 0.1),
            data=data,
            steps=steps,
        ),
        Up("up", module=up, optimizer=torch.optim.SGD(up.parameters(), 0.1), data=data),
    ]
    return mlo.Engine(problems, estimator, lookahead=False, device="cpu")


def definite(a: Tensor) -> Tensor:
    return a.mT @ a + torch.eye(4)


INDEX = torch.tensor([0, 1, 0, 2]).expand(4, 4)
RIGHT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "solve": lambda a, b: torch.linalg.solve(definite(a), b),
    "solve_ex": lambda a, b: torch.linalg.solve_ex(definite(a), b)[0],
    "tensorsolve": lambda a, b: torch.linalg.tensorsolve(definite(a), b[0]),
    "inv": lambda a, b: torch.linalg.inv(definite(a)) @ b,
    "det": lambda a, b: torch.linalg.det(definite((a + b) / 4)),
    "slogdet": lambda a, b: torch.linalg.slogdet(definite(a + b))[1],
    "logdet": lambda a, b: torch.logdet(definite(a)) * b,
    "multivariate normal": lambda a, b: torch.distributions.MultivariateNormal(b[0], definite(a)).log_prob(b[1]),
    "solve_triangular": lambda a, b: torch.linalg.solve_triangular(definite(a).tril(), b, upper=False),
    "cholesky": lambda a, b: torch.linalg.cholesky(definite(a + b)),
    "eigvalsh": lambda a, b: torch.linalg.eigvalsh(definite(a + b)),
    "cumprod of a zero": lambda a, b: (a * torch.arange(4)).cumprod(1) * b,
    "silu": lambda a, b: F.silu(a) * b,
    "mish": lambda a, b: F.mish(a) * b,
    "logit": lambda a, b: torch.logit((a + b).sigmoid()),
    "group_norm": lambda a, b: F.group_norm((a + b).view(2, 4, 2), 2),
    "hardsigmoid": lambda a, b: F.hardsigmoid(a) * b,
    "mse_loss": F.mse_loss,
    "huber_loss": lambda a, b: F.huber_loss(a, b, delta=0.3),
    "smooth_l1_loss": lambda a, b: F.smooth_l1_loss(a, b, beta=0.3),
    "soft_margin_loss": lambda a, b: F.soft_margin_loss(a * b, torch.ones(4, 4)),
    "cdist": torch.cdist,
    "cdist, p=3": lambda a, b: torch.cdist(a, b, p=3.0),
    "pdist": lambda a, b: F.pdist(a) + b.mean(),
    "interpolate": lambda a, b: F.interpolate((a + b)[None, None], scale_factor=2, mode="bicubic"),
    "pooling": lambda a, b: F.max_pool2d((a + b)[None], 2) + F.adaptive_avg_pool2d((a * b)[None], 2),
    "scatter_reduce, mean": lambda a, b: b.scatter_reduce(1, INDEX, a, "mean"),
}
if hasattr(F, "linear_cross_entropy"):
    RIGHT["linear_cross_entropy"] = lambda a, b: F.linear_cross_entropy(
        a, a * b, torch.tensor([0, 1, 2, 3]), options=nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    )


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=["exact", "forward"])
@pytest.mark.parametrize("operator", RIGHT)
def test_hypergradients_through_it_are_exact(operator, estimator, float64):
    engine = engine_of(RIGHT[operator], estimator)
    engine.step()
    mlo.check(engine, directions=2)


@pytest.mark.parametrize("operator", sorted(RIGHT.keys() & {"hardsigmoid", "linear_cross_entropy"}))
def test_they_are_replaced_in_the_first_evaluation_if_it_keeps_its_graph(operator, float64):
    mlo.check(engine_of(RIGHT[operator], "one_step", steps=1), directions=2)


class Sine(torch.autograd.Function):
    """A user's function, whose backward can be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent * ctx.saved_tensors[0].cos()


class OnceSine(Sine):
    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        return cotangent * ctx.saved_tensors[0].cos()


class WrongSine(Sine):
    """Its second derivative takes the input for a constant."""

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent * ctx.saved_tensors[0].detach().cos()


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bag(torch.arange(8).view(4, 2) % 5)


LABELS = torch.tensor([0, 1, 2, 3])
# {operator: (its form, the product that is refused, a part of the message)}
REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, str]] = {
    "triangular_solve": (
        lambda a, b: torch.triangular_solve(b, definite(a))[0],
        "forward",
        "triangular_solve, whose forward-mode derivative is wrong .* torch.linalg.solve_triangular",
    ),
    "scatter_reduce": (
        lambda a, b: torch.ones(4, 4).scatter_reduce(1, INDEX, a + b, "prod"),
        "forward",
        "scatter_reduce with 'prod', whose forward-mode derivative is wrong .* torch.prod",
    ),
    "cholesky_inverse": (
        lambda a, b: torch.cholesky_inverse(torch.linalg.cholesky(definite(a + b))),
        "forward",
        "cholesky_inverse, whose forward-mode derivative is wrong .* torch.linalg.inv",
    ),
    "grid_sample": (
        lambda a, b: F.grid_sample(a[None, None], b.tanh().view(1, 2, 4, 2), align_corners=False),
        "forward",
        "grid_sample, which has no forward-mode derivative .* product 'exact'",
    ),
    "index_reduce": (
        lambda a, b: b.index_reduce(0, LABELS, a, "mean"),
        "forward",
        "index_reduce, which has no forward-mode derivative",
    ),
    "a function": (lambda a, b: OnceSine.apply(a) + b, "exact", "'OnceSine', which has no second .* once_diff"),
    "ctc_loss": (
        lambda a, b: F.ctc_loss((a + b).log_softmax(-1)[:, None], torch.tensor([[1, 2]]), (4,), (2,)),
        "exact",
        "ctc_loss, which has no second derivative .* product 'central'",
    ),
    "multi_margin_loss": (lambda a, b: F.multi_margin_loss(a + b, LABELS), "exact", "multi_margin_loss, which has no"),
    "hardsigmoid by a private name": (
        lambda a, b: torch._C._nn.hardsigmoid(a) * b,
        "exact",
        "HardsigmoidBackward0 by a private name, .* call torch.nn.functional",
    ),
    "as_strided_scatter": (
        lambda a, b: torch.as_strided_scatter(a, b[0].square(), (4,), (1,)),
        "exact",
        "as_strided_scatter, whose second derivative is wrong .* product 'forward'",
    ),
}


@pytest.mark.parametrize("operator", REFUSED)
@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated", "ignore:index_reduce")
def test_it_is_refused_by_its_name_before_the_first_update(operator, float64):
    form, product, message = REFUSED[operator]
    engine = engine_of(form, {"kind": "unrolled", "product": product})
    before = [p.detach().clone() for p in engine.problems["low"].module.parameters()]
    state = torch.get_rng_state()
    with pytest.raises(mlo.GraphError, match=f"problem 'low': its loss uses .*{message}"):
        engine.step()
    torch.testing.assert_close(list(engine.problems["low"].module.parameters()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_function_without_jvp_is_refused_where_its_tangent_is_taken(float64):
    """Not when it is seen: a module may call another operator where a forward-mode derivative is taken."""
    engine = engine_of(lambda a, b: Sine.apply(a) + b, {"kind": "unrolled", "product": "forward"})
    with pytest.raises(mlo.GraphError, match=r"autograd.Function without a method jvp, which has no forward.* define"):
        engine.step()


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=["exact", "forward"])
def test_the_module_that_an_operator_is_of_is_named(estimator, float64):
    with pytest.raises(mlo.GraphError, match=r"embedding_bag \(in '2.bag' of the module of 'low'\).* use nn.Embedding"):
        engine_of(lambda a, b: a + b, estimator, Bag()).step()


def test_finite_differences_refuse_no_operator(float64):
    engine_of(lambda a, b: a * b, {"kind": "unrolled", "product": "central"}, Bag()).run(2)
    engine_of(lambda a, b: OnceSine.apply(a * b), "darts").run(2)


class Reads(Low):
    def loss(self, batch, up):
        return (self(batch) - up(batch)).square().mean()


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=["exact", "forward"])
def test_operators_of_what_is_read_are_not_refused(estimator, float64):
    """They are differentiated once: second derivatives are for the level's own variables."""
    torch.manual_seed(0)
    low, up, data = nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 4), Bag()), [torch.randn(4, 3)]
    problems = [
        Reads("low", operator=min, module=low, optimizer=torch.optim.SGD(low.parameters(), 0.1), data=data),
        Up("up", module=up, optimizer=torch.optim.SGD(up.parameters(), 0.1), data=data),
    ]
    mlo.check(mlo.Engine(problems, estimator, device="cpu"))


def test_a_wrong_second_derivative_of_the_users_is_found_by_check(float64):
    mlo.check(engine_of(lambda a, b: Sine.apply(a) + b, EXACT))
    engine = engine_of(lambda a, b: WrongSine.apply(a) + b, EXACT)
    with pytest.raises(mlo.HypergradientError, match=r"autograd.Function: 'WrongSine' .*gradgradcheck"):
        mlo.check(engine, directions=2)


class Takes(mlo.Problem):
    """A loss of a batch that is a function of so many tensors, of both modules."""

    def loss(self, batch, up):
        form, count = batch
        return form([*self.params.values(), *up.params.values()][:count])


class TakesNothing(mlo.Problem):
    def loss(self, batch, low):
        raise NotImplementedError


def curvature(product: Product, form: Callable[..., Tensor], own: list[Tensor], read: list[Tensor]) -> float:
    """How far a product is from differences of gradients, relative to them; nan if these are useless."""

    def problem(name: str, cls: type[mlo.Problem], tensors: list[Tensor]) -> mlo.Problem:
        module = nn.ParameterList([t.detach().clone() for t in tensors or [torch.zeros(())]])
        return cls(name, module=module, optimizer=torch.optim.SGD(module.parameters(), 0.1))

    low, up = problem("low", Takes, own), problem("up", TakesNothing, read)
    modes = {"low": frozenset([product.mode])}
    level = levels_of([low, up], torch.device("cpu"), None, Tf32(None, gpu=False), modes)["low"]
    reads, state = up.live_state()._replace(live=False), low.live_state()
    point = Point(level, state, {"up": reads}, (MicroBatch((form, len(own) + len(read))),), 0)
    draw = torch.Generator().manual_seed(1)
    u = tuple([torch.randn(v.shape, generator=draw) for v in state.variables])

    def joined(found: dict[str, Sequence[Tensor | None]]) -> Tensor:
        parts = zip([*found["low"], *found["up"]], [*state.variables, *reads.variables], strict=True)
        return torch.cat([(torch.zeros_like(v) if part is None else part).reshape(-1) for part, v in parts])

    def at(step: float) -> Point:
        variables = [(v + step * d).detach().requires_grad_() for v, d in zip(state.variables, u, strict=True)]
        return point.at(tuple(variables))

    def slope(step: float) -> Tensor:
        ends = [joined(gradient(at(sign * step), Wanted(("low", "up"))).found) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * step)

    try:
        micro = gradient(at(0.0), Wanted(("low", "up"))).micro  # with its random state
    except (RuntimeError, ValueError, IndexError):  # torch cannot compute or differentiate the sample at all
        return float("nan")
    point = point._replace(micro=micro)
    measured, again = slope(1e-5), slope(1e-6)
    size = measured.norm()
    if not size > 1e-6 or not (measured - again).norm() < 1e-5 * size:
        return float("nan")
    mine, cross = product._at(at(0.0), ("up",), None)(u)
    other = cross["up"] or tuple(map(torch.zeros_like, reads.variables))
    return ((joined({"low": mine, "up": other}) - measured).norm() / size).item()


# operators of the database whose loss is not smooth in the inputs that are moved, or that torch has no names for
_NOT_SMOOTH = {
    "masked.logaddexp",  # of minus infinity: nan, which an engine reports
    "nn.functional.cosine_embedding_loss",  # its labels are moved
    "nn.functional.hinge_embedding_loss",
    "nn.functional.max_unpool1d",  # of indices that repeat, where the gradient is not that of the values either
    "nn.functional.max_unpool2d",
    "nn.functional.max_unpool3d",
    "native_layer_norm",  # of its statistics, as no function of torch.nn.functional returns them
    "bfloat16",
    "half",
    "chalf",
    "linalg.norm",  # at zero
    "normal",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",  # by its private name
}


_NEVER = {"_segment_reduce", "nn.functional.embedding_bag"}
_NEVER |= {"nn.functional.multi_margin_loss", "nn.functional.multilabel_margin_loss"}
_REFUSED: dict[str | None, set[str]] = {
    "reverse": {*_NEVER, "as_strided_scatter"},
    "forward": {
        *_NEVER,
        *("cholesky_inverse", "grid_sampler_3d", "index_reduce", "nn.functional.grid_sample"),
        *("native_dropout_backward", "ormqr", "scatter_reduce", "to_sparse", "triangular_solve"),
    },
}


def database() -> list[Any]:
    """The operators of torch's own tests, which need one more package; nothing of it is used here."""
    if "expecttest" not in sys.modules:
        stub = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stub
    with mock.patch.object(torch.backends, "disable_global_flags"):  # which would hold for the whole process
        from torch.testing._internal.common_methods_invocations import op_db

    names = [op for op in op_db if op.supports_autograd and torch.float64 in op.dtypes]
    return [op for op in names if op.name not in _NOT_SMOOTH]


def samples(op: Any) -> Iterator[tuple[Callable[..., Tensor], list[Tensor]]]:
    """Losses of the operator's small samples, and the tensors that they are differentiated for."""
    torch.manual_seed(0)
    for number, sample in enumerate(op.sample_inputs("cpu", torch.float64, requires_grad=True)):
        if number == 12:
            return
        leaves, structure = tree_flatten((sample.input, sample.args, sample.kwargs))
        of = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]
        tensors = [leaves[i] for i in of]
        if not 0 < sum(t.numel() for t in tensors) < 1000 or any(t.numel() == 0 for t in tensors):
            continue
        fixed = [t.detach() if isinstance(t, Tensor) else t for t in leaves]

        def form(given: list[Tensor], fixed=fixed, of=of, structure=structure, sample=sample) -> Tensor:
            every = list(fixed)
            for index, tensor in zip(of, given, strict=True):
                every[index] = tensor * 1.0  # some operators write into their input
            first, args, kwargs = tree_unflatten(every, structure)
            output = sample.output_process_fn_grad(op.gradcheck_wrapper(op.get_op(), first, *args, **kwargs))
            loss = torch.zeros(())
            for part in tree_flatten(output)[0]:
                if isinstance(part, Tensor) and part.requires_grad:
                    part = part if part.layout is torch.strided else part.to_dense()
                    part = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
                    loss = loss + (part.double() * torch.linspace(0.3, 1.1, part.numel()).view(part.shape)).sin().sum()
            return loss

        yield form, tensors


@pytest.mark.slow
@pytest.mark.parametrize("product", [Exact(), Forward()], ids=["exact", "forward"])
@pytest.mark.filterwarnings("ignore")
def test_all_operators_of_torch_are_right_or_refused(product, float64):
    """Which operators are refused, replaced or taken with a graph is data, which a new release of torch may change.

    An operator that is now wrong, or that now raises an error of torch's own, belongs into ``mlo.ops.derivatives``.
    """
    wrong, refused, seen = dict[str, str](), set[str](), 0
    for op in database():
        for form, tensors in samples(op):
            for own in {len(tensors), 1}:  # all move, or the first one only, and the others are what is read
                seen += 1
                try:
                    error = curvature(product, form, tensors[:own], tensors[own:])
                except mlo.GraphError:
                    refused.add(op.name)
                except RuntimeError as raised:
                    wrong[op.name] = str(raised).partition("\n")[0]
                else:
                    if error > 1e-4:
                        wrong[op.name] = f"off by {error:.1e}"
    assert seen > 2000
    assert wrong == {}
    assert refused == _REFUSED[product.mode]
