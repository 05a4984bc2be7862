"""Mistakes that a user can make, and their errors: what is wrong, where, and what to write, before any training."""

from __future__ import annotations

import pytest
import torch
from analytic import Point
from torch import nn

import mlo
from mlo.hypergradient import Neumann
from mlo.training.devices import DEVICES, known_device


class Low(mlo.Problem):
    def loss(self, batch, top):
        return (self() - top()).square().sum()


class Top(mlo.Problem):
    def loss(self, batch, low):
        return low().square().sum()


def made(cls: type[mlo.Problem], name: str, **options: object) -> mlo.Problem:
    module = options.pop("module", None) or Point(torch.ones(2))
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(module.parameters(), lr=0.1)
    return cls(name, module=module, optimizer=optimizer, **options)


def engine(*problems: mlo.Problem, **options: object) -> mlo.Engine:
    return mlo.Engine(list(problems), **{"hypergradient": "one_step", "device": "cpu", **options})


def loss_reading(*names: str) -> type[mlo.Problem]:
    """A problem class whose loss reads these."""
    namespace: dict = {}
    exec(f"def loss(self, batch, {', '.join(names)}):\n    return self().sum()", namespace)
    return type("Reading", (mlo.Problem,), {"loss": namespace["loss"]})


def test_a_read_that_names_no_problem():
    with pytest.raises(
        mlo.GraphError, match=r"'low': its loss reads 'topp'.*did you mean 'top'\?.*reads=\{<parameter>: <problem>\}"
    ):
        engine(made(loss_reading("topp"), "low"), made(Top, "top"))


def test_a_loss_without_a_batch():
    class Batchless(mlo.Problem):
        def loss(self, top):
            return (self() - top()).square().sum()

    with pytest.raises(
        mlo.GraphError, match=r"'low': the first parameter .* named 'top'.* write loss\(self, batch, top\)"
    ):
        engine(made(Batchless, "low"), made(Top, "top"))


def test_a_read_of_itself():
    with pytest.raises(mlo.GraphError, match=r"'low' reads itself; .*self\(\.\.\.\)"):
        engine(made(loss_reading("low", "top"), "low"), made(Top, "top"))


def test_a_problem_that_neither_reads_nor_is_read():
    with pytest.raises(mlo.GraphError, match="'lonely' neither reads nor is read"):
        engine(
            made(Low, "low"),
            made(type("L", (mlo.Problem,), {"loss": lambda self, batch: self().sum()}), "lonely"),
            made(Top, "top"),
        )


def test_a_lower_problem_whose_solution_nobody_above_reads():
    with pytest.raises(mlo.GraphError, match="'student': no problem above reads its solution"):
        engine(made(Low, "low"), made(loss_reading("low"), "student"), made(Top, "top"))


def test_a_top_that_nothing_reads():
    with pytest.raises(mlo.GraphError, match=r"'top' is the top level, but no lower loss reads it"):
        engine(made(loss_reading("mid"), "low"), made(loss_reading("low"), "mid"), made(Top, "top"))


def test_a_top_that_reads_no_lower_problem():
    with pytest.raises(mlo.GraphError, match=r"'top' is a top level .* reads no problem below it"):
        engine(made(Low, "low"), made(type("T", (mlo.Problem,), {"loss": lambda self, batch: self().sum()}), "top"))


def test_a_top_on_whom_no_best_response_depends():
    """A ring in the wrong order: low depends on mid, but the top reads only what does not depend on it."""
    with pytest.raises(mlo.GraphError, match=r"'top': no best response that its loss reads depends on 'top'"):
        engine(
            made(loss_reading("mid"), "low"), made(loss_reading("low", "top"), "mid"), made(loss_reading("low"), "top")
        )


def test_two_problems_of_one_name():
    with pytest.raises(mlo.GraphError, match="2 problems are named 'low'"):
        engine(made(Low, "low"), made(Low, "low"), made(Top, "top"))


def test_all_faults_are_reported_at_once():
    with pytest.raises(mlo.GraphError) as raised:
        engine(made(loss_reading("tup"), "low"), made(loss_reading("lwo"), "top"))
    assert "'tup'" in str(raised.value)
    assert "'lwo'" in str(raised.value)


def test_parameters_shared_by_two_problems():
    shared = Point(torch.ones(2))
    with pytest.raises(mlo.GraphError, match=r"'low' and 'top' share a parameter.*copy\.deepcopy"):
        engine(made(Low, "low", module=shared), made(Top, "top", module=shared))


@pytest.mark.parametrize("same", [True, False])
def test_an_architecture_inside_the_model(same):
    """Its own problem trains it, the model's problem would hold it as a constant: copying the module does not help."""

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.alphas = nn.Linear(2, 2), Point(torch.ones(2))

    cell = Cell()
    one, other = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (cell.layer, cell.alphas))
    low = made(Low, "low", module=cell, optimizer=one)
    top = made(Top, "top", module=cell if same else cell.alphas, optimizer=other)
    with pytest.raises(mlo.GraphError) as raised:
        engine(low, top)
    message = str(raised.value)
    assert "share a parameter ('alphas.value' and " in message
    assert "which only 'top' trains; in the module of 'low' it would be a constant" in message
    assert "Give it a module of its own" in message
    assert message.endswith("let the loss of 'low' read it, as in self(x, top())")


def test_an_optimizer_of_another_module():
    other = torch.optim.SGD(Point(torch.ones(2)).parameters(), lr=0.1)
    with pytest.raises(mlo.ConfigError, match=r"'low': its optimizer holds none of its module's trainable parameters"):
        made(Low, "low", optimizer=other)


def test_an_optimizer_that_also_holds_anothers_parameters():
    mine, other = Point(torch.ones(2)), Point(torch.ones(2))
    both = torch.optim.SGD([*mine.parameters(), *other.parameters()], lr=0.1)
    with pytest.raises(
        mlo.ConfigError, match=r"'low': its optimizer holds 1 parameter\(s\) that are not of its module"
    ):
        made(Low, "low", module=mine, optimizer=both)


@pytest.mark.parametrize("estimator", ["one_step", "darts", "cg"])
@pytest.mark.parametrize("where", ["low", "top"])
def test_a_declared_read_that_no_gradient_reaches(where, estimator):
    class Detached(mlo.Problem):
        def loss(self, batch, top):
            return (self() - top().detach()).square().sum()

    class Blind(mlo.Problem):
        def loss(self, batch, low):
            return low().detach().square().sum() + self().sum()

    stack = (made(Detached, "low"), made(Top, "top")) if where == "low" else (made(Low, "low"), made(Blind, "top"))
    read = "top" if where == "low" else "low"
    before = [p.module.value.detach().clone() for p in stack]
    with pytest.raises(
        mlo.GraphError, match=rf"'{where}': its loss reads '{read}', but no gradient .*held=\('{read}',\)"
    ):
        engine(*stack, hypergradient=estimator).hypergradient("top")
    assert all(torch.equal(p.module.value, b) for p, b in zip(stack, before, strict=True))


def test_a_read_held_constant_may_carry_no_gradient():
    class Both(mlo.Problem):
        def loss(self, batch, top, other):
            return (self() - top() - other().detach()).square().sum()

    class Other(mlo.Problem):
        def loss(self, batch, top):
            return (self() - top()).square().sum()

    class Judge(mlo.Problem):
        def loss(self, batch, low, other):
            return low().square().sum() + other().sum()

    problems = [made(Other, "other"), made(Both, "low", held=("other",)), made(Judge, "top")]
    found = engine(*problems).hypergradient("top")["value"]
    assert found.isfinite().all()
    with pytest.raises(mlo.GraphError, match="'low': held='othr' is not among what its loss reads"):
        engine(made(Other, "other"), made(Both, "low", held=("othr",)), made(Judge, "top"))


@pytest.mark.parametrize(
    ("value", "message"), [(lambda s: s(), r"a tensor of shape \(2,\)"), (lambda s: 1.0, "a float")]
)
def test_a_loss_that_is_no_scalar(value, message):
    cls = type("Low", (Low,), {"loss": lambda self, batch, top: value(self)})
    with pytest.raises(mlo.GraphError, match=rf"'low': its loss returned {message}; return a scalar"):
        engine(made(cls, "low"), made(Top, "top")).step()


def test_a_loss_that_goes_backward_itself():
    def loss(self, batch, top):
        distance = (self() - top()).square().sum()
        distance.backward()
        return distance

    low = made(type("Low", (Low,), {"loss": loss}), "low")
    with pytest.raises(
        mlo.GraphError, match=r"'low': the graph of its loss is freed .* without calling \.backward\(\)"
    ):
        engine(low, made(Top, "top")).step()


def test_a_loss_that_does_not_use_its_own_parameters():
    cls = type("Low", (Low,), {"loss": lambda self, batch, top: top().sum()})
    with pytest.raises(mlo.GraphError, match=r"'low': no gradient of its loss reaches its own parameters"):
        engine(made(cls, "low"), made(Top, "top")).step()


def test_first_order_where_there_is_no_direct_term():
    with pytest.raises(mlo.GraphError, match="'top': with first_order nothing is differentiated"):
        engine(made(Low, "low"), made(Top, "top"), hypergradient="first_order").step()


def test_a_loss_that_is_not_finite_stops_the_run_at_the_last_good_state():
    class Statistics(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

        def forward(self, x):
            return self.layer(x)

    class Fit(mlo.Problem):
        def loss(self, batch, top):
            return (self(batch) - top()).square().mean()

    class Judge(mlo.Problem):
        def loss(self, batch, low):
            return low(batch).square().mean()

    good = torch.randn(4, 2)
    data = [good, good + 1, torch.full((4, 2), float("nan"))]
    module = Statistics()
    low = made(Fit, "low", module=module, optimizer=torch.optim.Adam(module.parameters()), data=data)
    trained = engine(low, made(Judge, "top", data=[good]))
    trained.run(2)
    kept = {k: v.clone() for k, v in module.state_dict().items()}
    state = [v.clone() for s in low.optimizer.state.values() for v in s.values()]
    with pytest.raises(mlo.NonFiniteLossError, match=r"'low': its loss is nan at its step 3; that step was not taken"):
        trained.step()
    assert all(torch.equal(v, kept[k]) for k, v in module.state_dict().items())
    assert all(
        torch.equal(a, b)
        for a, b in zip((v for s in low.optimizer.state.values() for v in s.values()), state, strict=True)
    )
    assert (low.steps_taken, trained.rounds) == (2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0; pass a whole number"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"warmup": -1}, "warmup=-1"),
        ({"clip_norm": 0}, "clip_norm=0"),
        ({"accumulate": 0}, "accumulate=0; pass a whole number"),
        ({"autocast": "bf16"}, "autocast='bf16'; pass torch.bfloat16"),
        ({"module": lambda: None}, r"module is a function; pass a torch\.nn\.Module"),
        ({"optimizer": "sgd"}, "optimizer is a str"),
        ({"scheduler": object()}, "scheduler is a object"),
        ({"data": iter([1])}, r"data is an iterator .*read only once.*without calling it"),
        ({"data": 3}, "data is a int"),
        ({"reads": {"tip": "top"}}, r"reads has 'tip', which is not a parameter of its loss; its parameters are 'top'"),
        ({"reads": {"top": None}}, r"'top': None}, but that parameter of loss has no default value"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_arguments_of_a_problem(options, message):
    module = Point(torch.ones(2))
    with pytest.raises(mlo.ConfigError, match=message):
        Low("low", **{"module": module, "optimizer": torch.optim.SGD(module.parameters(), lr=0.1), **options})


def test_schedulers_and_optimizers_that_cannot_be():
    module = Point(torch.ones(2))
    mine, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, Point(torch.ones(2))))
    schedulers = torch.optim.lr_scheduler
    for options, message in [
        ({"scheduler": schedulers.StepLR(other, 1), "optimizer": mine}, "scheduler is for another optimizer"),
        (
            {"scheduler": schedulers.ReduceLROnPlateau(mine), "optimizer": mine},
            "ReduceLROnPlateau needs a validation metric",
        ),
        ({"optimizer": torch.optim.LBFGS(module.parameters())}, "LBFGS evaluates the loss several times"),
    ]:
        with pytest.raises(mlo.ConfigError, match=message):
            Low("low", module=module, **options)


def lazy(run: bool = False) -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
    if run:
        module(torch.randn(2, 3))
    return module


def sharing(kind: str) -> nn.Module:
    """Two tensors in one place of the memory."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    if kind == "parameters":
        module[1].weight.data = module[0].weight.data
    elif kind == "part":
        module[1].bias = nn.Parameter(module[0].weight.data[1])
    else:
        module.register_buffer("copy", module[0].weight.data)
    return module


class Wrapped(nn.Module):
    """As torch's, whose wrapper needs a process group."""

    def __init__(self, *device_ids: int) -> None:
        super().__init__()
        self.module, self.device_ids = nn.Linear(2, 2), device_ids


def wrapper(name: str, *device_ids: int) -> nn.Module:
    return type(name, (Wrapped,), {})(*device_ids)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lazy, r"lazy layers without a shape yet \('1.weight', '1.bias', '2.weight', ...\); run the model once"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), "'low': its module is a ScriptModule .* pass the Python module"),
        (lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), "its module is a ScriptModule"),
        (lambda: nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2))), "the part '1' of its module is"),
        (
            lambda: wrapper("DistributedDataParallel"),
            "its module is a DistributedDataParallel.*pass the module inside it",
        ),
        (
            lambda: nn.Sequential(wrapper("FullyShardedDataParallel")),
            "the part '0' of its module is a FullyShardedData",
        ),
        (lambda: wrapper("DataParallel", 0, 1), "its module is a DataParallel"),
        (
            lambda: sharing("parameters"),
            "parameter .[01].weight. of its module shares its memory with '[01].weight'",
        ),
        (lambda: sharing("part"), r"'0.weight' of its module shares its memory with '1.bias'.*\.clone"),
        (lambda: sharing("buffer"), r"the parameter '0.weight' of its module shares its memory with 'copy'.*\.clone"),
    ],
)
def test_modules_that_cannot_be(module, message):
    given = module()
    with pytest.raises(mlo.ConfigError, match=message):
        Low("low", module=given, optimizer=torch.optim.SGD(given.parameters(), lr=0.1))


@pytest.mark.parametrize("part", [nn.Linear(2, 2, device="meta"), nn.BatchNorm1d(2, device="meta")], ids=str)
def test_tensors_without_values(part):
    low = made(Low, "low", module=nn.Sequential(nn.Linear(2, 2), part))
    with pytest.raises(mlo.ConfigError, match=r"'low'.* on the meta device, without values \('1.weight', .*to_empty"):
        engine(low, made(Top, "top"))


def test_modules_that_are_like_those_that_cannot_be():
    """Lazy layers that have run, scripts without tensors, and wrappers of one device."""
    scripted = nn.Sequential(nn.Linear(3, 1), torch.jit.script(nn.Tanh()))
    flat = torch.randn(6)  # parts of one tensor that do not overlap
    apart = nn.ParameterList([nn.Parameter(flat[:2]), nn.Parameter(flat[2:])])
    for module in (lazy(run=True), scripted, wrapper("DataParallel"), wrapper("DataParallel", 0), apart):
        made(Low, "low", module=module)


def test_a_name_that_no_loss_could_read():
    with pytest.raises(mlo.ConfigError, match="must be a Python identifier"):
        made(Low, "my low")


def test_an_iterator_in_a_batch():
    low = made(Low, "low", data=[(x for x in torch.randn(2, 3))])
    with pytest.raises(mlo.ConfigError, match=r"'low': its batch holds an iterator \(generator\), .* put a list"):
        engine(low, made(Top, "top")).step()


def test_data_without_a_batch():
    with pytest.raises(mlo.ConfigError, match="'low': its data yields no batch"):
        engine(made(Low, "low", data=[]), made(Top, "top")).step()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("dart", r"'dart' is not known.*did you mean darts\?.*cg, darts, first_order"),
        (
            {"kind": "neumann", "termss": 3},
            r"^hypergradient.termss: unknown option; did you mean hypergradient.terms\?$",
        ),
        ({"kind": "one_step", "termss": 3}, r"^hypergradient.termss: unknown option; there are: product$"),
        (
            {"kind": "cg", "product": {"kind": "exact", "radus": 1}},
            r"^hypergradient.product.radus: unknown option; there are: autocast$",
        ),
        ({"kind": "neumann", "terms": -3}, "terms: -3 was given"),
        ({"kind": "cg", "radius": 0.01}, "radius: is an option of darts, sama, not of the chosen hypergradient"),
        (
            {"kind": "central", "terms": 3},
            r"'central' is not .*, but among mlo.products \(--hypergradient.product cent",
        ),
        ({"kind": "one_step", "product": "exat"}, r"'exat' is not known.*did you mean exact\?"),
        (3, "name"),
    ],
    ids=str,
)
def test_an_estimator_that_is_not_there(value, message):
    with pytest.raises(mlo.ConfigError, match=message):
        engine(made(Low, "low"), made(Top, "top"), hypergradient=value)
    with pytest.raises(mlo.ConfigError, match=message):
        engine(made(Low, "low", hypergradient=value), made(Top, "top"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tems": 3}, r"^Neumann: tems: unknown option; did you mean terms\?$"),
        ({"iteratons": 3}, "^Neumann: iteratons: unknown option; there are: fresh_batch, product, terms, rate, warm_s"),
        ({"terms": -3}, "^Neumann: terms: -3 was given, but it should be greater than or equal to 1$"),
        ({"terms": 3, "product": "exat"}, r"^Neumann: product: 'exat' is not known.*did you mean exact\?"),
    ],
    ids=str,
)
def test_an_estimator_made_by_its_class(options, message):
    with pytest.raises(mlo.ConfigError, match=message):
        Neumann(**options)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_a_name_of_no_device(name):
    with pytest.raises(mlo.ConfigError) as error:
        engine(made(Low, "low"), made(Top, "top"), device=name)
    assert str(error.value) == f"device={name!r} cannot be used: there is no device of this name; {DEVICES}"


@pytest.mark.parametrize("name", ["mps", "xpu:1", "meta", "vulkan", "privateuseone"])
def test_a_device_that_is_not_there(monkeypatch, name):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(mlo.ConfigError) as error:
        known_device(name)
    assert str(error.value) == f"device={name!r} cannot be used: there is no such device here; {DEVICES}"


def test_of_accelerators_the_one_that_is_there_is_known(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [known_device(name) for name in ("xpu", "xpu:1")] == [torch.device("xpu"), torch.device("xpu:1")]
    for absent in ("xpu:2", "mps"):
        with pytest.raises(mlo.ConfigError, match="there is no such device here"):
            known_device(absent)


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_the_gpus_that_are_there_are_known(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for number in range(gpus):
        assert known_device(f"cuda:{number}") == torch.device("cuda", number)
    with pytest.raises(mlo.ConfigError, match="CUDA GPU"):
        known_device(f"cuda:{gpus}" if gpus else "cuda")


@pytest.mark.parametrize(
    ("gpus", "device", "message"),
    [(0, "cuda", "no CUDA GPUs here; pass "), (1, "cuda:1", "1 CUDA GPU here; pass 'cuda:0'")],
)
def test_a_gpu_that_is_not_there(monkeypatch, gpus, device, message):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(
        mlo.ConfigError, match=f"device='{device}' cannot be used: torch finds {message}.*'cpu'( or 'auto')?$"
    ):
        engine(made(Low, "low"), made(Top, "top"), device=device)


def test_a_hypergradient_of_no_problem():
    with pytest.raises(mlo.ConfigError, match="no problem is named 'arch'"):
        engine(made(Low, "low"), made(Top, "top")).hypergradient("arch")


def test_a_level_that_starts_before_the_one_it_is_differentiated_through():
    with pytest.raises(mlo.ConfigError, match="raise the warmup of 'top'"):
        engine(made(Low, "low", warmup=3), made(Top, "top", warmup=2))


def test_something_that_is_no_problem():
    with pytest.raises(mlo.ConfigError, match=r"is not an mlo\.Problem"):
        engine(made(Low, "low"), object())


def test_a_renamed_read_serves_a_class_twice():
    found = engine(made(Low, "pupil", reads={"top": "boss"}), made(Top, "boss", reads={"low": "pupil"}))
    assert found.graph.reads("pupil") == ("boss",)
    assert found.hypergradient("boss")["value"].abs().sum() > 0


class Unpacking(mlo.Problem):
    def loss(self, batch):
        x, y = batch
        return (self(x) - y).square().mean()


def test_a_list_of_tensors_that_was_meant_for_one_batch_is_reported():
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    problem = Unpacking("model", module=module, optimizer=optimizer, data=[torch.ones(3, 2), torch.ones(3, 1)])
    with pytest.raises(mlo.ConfigError, match=r"'model' raised .*unpack.* shape \(3, 2\).*data=\[\(x, y\)\]"):
        mlo.Engine(problem, device="cpu").step()


def test_metrics_that_require_gradients_are_numbers(recwarn):
    class Penalty(Low):
        def metrics(self):
            return {"size": self.params["value"].exp().sum()}

    found = engine(made(Penalty, "low"), made(Top, "top")).metrics()
    assert found["low/size"] == pytest.approx(2 * 2.718281828, rel=1e-6)
    assert not recwarn.list


def test_a_batch_that_is_none_without_data_is_reported():
    module = torch.nn.Linear(2, 1)
    problem = Unpacking("model", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
    with pytest.raises(TypeError) as raised:
        mlo.Engine(problem, device="cpu").step()
    assert raised.value.__notes__ == ["(problem 'model' was given no data, so the batch of its loss is None)"]
