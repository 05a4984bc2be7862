"""Recurrent layers: torch's own kernels where a second derivative is needed, cuDNN's and oneDNN's elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import mlo
from mlo.ops.differentiable import TwiceDifferentiable
from mlo.training.devices import warn_of_masks

LAYERS = {
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "gru": lambda: nn.GRU(3, 4, 2),
    "tanh": lambda: nn.RNN(3, 4),
    "relu": lambda: nn.RNN(3, 4, nonlinearity="relu"),
}


class Libraries(TorchFunctionMode):
    """Notes for each call of a recurrent layer or convolution whether cuDNN and oneDNN were enabled."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool, bool]] = []
        self.fails = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if name in ("lstm", "gru", "rnn_tanh", "rnn_relu", "conv2d"):
            self.seen.append((name, torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled))
            if self.fails:
                raise RuntimeError("a kernel failed")
        return func(*args, **(kwargs or {}))


class Sequences(nn.Module):
    """A recurrent layer over the rows of a batch."""

    def __init__(self, kind: str, checkpointed: bool = False) -> None:
        super().__init__()
        self.layer, self.checkpointed = LAYERS[kind](), checkpointed
        self.head = nn.Linear(self.layer.hidden_size * (2 if self.layer.bidirectional else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=False) if self.checkpointed else self.run(x)

    def run(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


class Low(mlo.Problem):
    def loss(self, batch, top):
        return (self(batch) - top(batch)).square().mean()


class Mid(mlo.Problem):
    def loss(self, batch, low, top):
        return (self(batch) - low(batch)).cos().mean() + (self(batch) * top(batch)).mean()


class LowOfThree(mlo.Problem):
    def loss(self, batch, mid, top):
        return (self(batch) - mid(batch)).square().mean() + (self(batch) * top(batch)).sin().mean()


class Top(mlo.Problem):
    def loss(self, batch, low):
        return low(batch).sin().square().mean()


class TopOfThree(mlo.Problem):
    def loss(self, batch, mid, low):
        return (mid(batch) * low(batch)).square().mean()


def problems(
    *classes: type[mlo.Problem], kind: str, steps: int = 1, checkpointed: bool = False, dtype: torch.dtype
) -> list[mlo.Problem]:
    torch.manual_seed(0)
    names = ("low", "top") if len(classes) == 2 else ("low", "mid", "top")
    made = []
    for name, cls in zip(names, classes, strict=True):
        module = (nn.Linear(3, 2) if name == "top" else Sequences(kind, checkpointed)).to(dtype)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        data = [torch.randn(5, 2, 3, dtype=dtype) for _ in range(3)]
        made.append(cls(name, module=module, optimizer=optimizer, data=data, steps=steps if name == "low" else 1))
    return made


@pytest.mark.parametrize("kind", LAYERS)
def test_only_recurrent_layers_leave_their_libraries_and_only_inside(kind):
    layer, x, outside = LAYERS[kind](), torch.randn(5, 2, 3), torch._VF.lstm
    name = kind if kind in ("lstm", "gru") else f"rnn_{kind}"
    with Libraries() as libraries:
        layer(x)
        with TwiceDifferentiable():
            layer(x)
            F.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1))
            libraries.fails = True
            with pytest.raises(RuntimeError, match="a kernel failed"):
                layer(x)
            libraries.fails = False
        layer(x)
    on, off = (True, True), (False, False)
    assert libraries.seen == [(name, *on), (name, *off), ("conv2d", *on), (name, *off), (name, *on)]
    assert torch._VF.lstm is torch.lstm is outside
    assert torch.backends.cudnn.enabled
    assert torch.backends.mkldnn.enabled


def test_libraries_that_the_user_turned_off_stay_off():
    torch.backends.mkldnn.enabled = False
    try:
        with TwiceDifferentiable():
            nn.LSTM(3, 4)(torch.randn(5, 2, 3))
        assert not torch.backends.mkldnn.enabled
    finally:
        torch.backends.mkldnn.enabled = True


@pytest.mark.parametrize(
    ("estimator", "steps", "plain"),
    [
        ("one_step", 1, [True, False]),  # the step's pass keeps its graph; then the top reads the result
        ("unrolled", 2, [True, True, False]),
        ({"kind": "unrolled", "graph_memory": 0}, 2, [False, True, False, True]),  # the first step is evaluated again
        ({"kind": "one_step", "product": "forward"}, 1, [False, False, True]),
        ("cg", 1, [False, False, True]),
        ("darts", 1, [False, False, False, False]),
    ],
    ids=str,
)
def test_passes_that_are_differentiated_again_use_plain_kernels(estimator, steps, plain):
    engine = mlo.Engine(problems(Low, Top, kind="lstm", steps=steps, dtype=torch.float32), estimator, device="cpu")
    engine.step()  # from the first round on, sizes of graphs are known
    with Libraries() as libraries:
        engine.hypergradient("top")
    assert [not cudnn for _, cudnn, _ in libraries.seen] == plain


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("product", ["exact", "forward"])
def test_the_hypergradient_of_a_recurrent_layer_is_exact(kind, product, checkpointed):
    made = problems(Low, Top, kind=kind, steps=2, checkpointed=checkpointed, dtype=torch.float32)
    engine = mlo.Engine(made, {"kind": "unrolled", "product": product}, device="cpu")
    engine.step()
    mlo.check(engine)
    single, double = engine.hypergradient("top"), engine.hypergradient("top", torch.float64)
    for name, value in double.items():
        torch.testing.assert_close(single[name].double(), value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_inner_paths_use_plain_kernels(kind):
    made = problems(LowOfThree, Mid, TopOfThree, kind=kind, dtype=torch.float64)
    engine = mlo.Engine(made, "unrolled", inner_path=True, device="cpu")
    mlo.check(engine, "top")


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_recurrent_layer_is_not_compiled_and_gives_the_same(kind):
    plain = mlo.Engine(problems(Low, Top, kind=kind, dtype=torch.float64), "one_step", device="cpu")
    other = mlo.Engine(problems(Low, Top, kind=kind, dtype=torch.float64), "one_step", compile=True, device="cpu")
    plain.run(3)
    with pytest.warns(UserWarning, match="'low' runs without compilation"):
        other.run(3)
    torch.testing.assert_close(other.hypergradient("top"), plain.hypergradient("top"), rtol=0, atol=0)


@pytest.mark.parametrize(("layers", "dropout", "warns"), [(2, 0.5, True), (2, 0.0, False), (1, 0.5, False)])
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_masks_that_a_gpu_cannot_repeat_are_warned_of(layers, dropout, warns, recwarn):
    problem = problems(Low, Top, kind="lstm", dtype=torch.float32)[0]
    problem.module.layer = nn.LSTM(3, 4, layers, dropout=dropout)
    recwarn.clear()
    warn_of_masks(problem)
    assert [str(w.message).partition(" cannot")[0] for w in recwarn] == warns * [
        "problem 'low': the dropout between the layers of 'layer'"
    ]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("estimator", ["one_step", "unrolled", {"kind": "unrolled", "graph_memory": 0}, "cg"], ids=str)
def test_on_a_gpu_hypergradients_are_those_of_the_cpu(kind, checkpointed, estimator):
    found = []
    for device in ("cpu", "cuda"):
        made = problems(Low, Top, kind=kind, steps=2, checkpointed=checkpointed, dtype=torch.float64)
        engine = mlo.Engine(made, estimator, device=device)
        engine.run(2)
        found.append({name: value.cpu() for name, value in engine.hypergradient("top").items()})
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-12)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_on_a_gpu_inner_paths_are_those_of_the_cpu(kind):
    found = []
    for device in ("cpu", "cuda"):
        made = problems(LowOfThree, Mid, TopOfThree, kind=kind, dtype=torch.float64)
        engine = mlo.Engine(made, "unrolled", inner_path=True, device=device)
        engine.step()
        found.append({name: value.cpu() for name, value in engine.hypergradient("top").items()})
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-12)
