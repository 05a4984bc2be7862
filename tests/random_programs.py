"""Random programs, and what they should do, by plain autograd: one interpreter of all of them, written without mlo.

A program is a stack of two to six problems that read one another, with everything that may be combined: modules with
tied, shared and frozen parameters, optimizers, schedules, clipping, accumulation, estimators and products.
:class:`Reference` takes its rounds: each level from a detached start, with the graph of its last steps, as many as the
estimator goes back through.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mlo

SIZE, DAMPING = 3, 60.0
Values = tuple[Tensor, ...]  # of the variables of one level
Slots = tuple[dict[str, Any], ...]


class Kind(NamedTuple):
    """A kind of module: its parameters, those that are trained, and its output as a function of them."""

    names: tuple[str, ...]
    trained: tuple[str, ...]
    output: Callable[[Mapping[str, Tensor], Tensor], Tensor]


KINDS = {
    "matrix": Kind(("w",), ("w",), lambda p, x: p["w"].sin() @ x),
    "frozen": Kind(("w", "b", "c"), ("w", "b"), lambda p, x: p["w"].sin() @ (x * p["c"]) + p["b"].tanh()),
    "left out": Kind(("w", "b"), ("w",), lambda p, x: (p["w"] @ x + p["b"]).tanh()),
    "tied": Kind(("w", "b"), ("b", "w"), lambda p, x: p["w"].T @ (p["w"] @ x + p["b"]).sin()),
    "deep": Kind(("w", "b", "v"), ("w", "b", "v"), lambda p, x: p["v"].sin() @ (p["w"] @ x + p["b"]).tanh()),
}


class Net(nn.Module):
    """A module of a kind; ``shared`` is a frozen parameter that others hold too."""

    def __init__(self, kind: Kind, shared: nn.Parameter) -> None:
        super().__init__()
        self.kind, self.shared = kind, shared
        for name in kind.names:
            size = (SIZE,) if name in "bc" else (SIZE, SIZE)
            self.register_parameter(name, nn.Parameter(torch.randn(*size) * 0.7, requires_grad=name != "c"))

    def forward(self, x: Tensor) -> Tensor:
        return self.kind.output(dict(self.named_parameters()), x) * self.shared


Net_ = Callable[[Tensor], Tensor]

#: ways in which a loss depends on a problem that it reads, by its own output and weight, and by those of the other
TERMS: tuple[Callable[[Net_, Tensor, Net_, Tensor, tuple[Tensor, Tensor]], Tensor], ...] = (
    lambda own, w, read, r, batch: (own(batch[0]) - read(batch[0])).square().sum(),
    lambda own, w, read, r, batch: read(own(batch[0])).square().sum() + read(batch[0]).sum(),
    lambda own, w, read, r, batch: ((w - r) ** 2).sum() * 0.5 + (w * r.cos()).sum(),
    lambda own, w, read, r, batch: (read(batch[0]) * read(batch[1]).sin().exp() * own(batch[0])).sum(),
    lambda own, w, read, r, batch: read(batch[0]) @ r.sin() @ own(batch[0]),
    lambda own, w, read, r, batch: (read(read(batch[0])) * own(batch[1])).sum(),
    lambda own, w, read, r, batch: (read(batch[0] * 2.0).sin().exp() * own(own(batch[1]))).sum(),
)

OPTIMIZERS: tuple[tuple[type[torch.optim.Optimizer], dict[str, Any]], ...] = (
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"lr": 0.03, "weight_decay": 0.01}),
    (torch.optim.Adam, {"lr": 0.03, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.02, "momentum": 0.5, "centered": True}),
    (torch.optim.Adagrad, {"lr": 0.05, "lr_decay": 0.1}),
    (torch.optim.NAdam, {"lr": 0.03}),
    (torch.optim.Adamax, {"lr": 0.03}),
)


@dataclass
class Level:
    """What is drawn for one problem; the reference and the problem itself are made from it."""

    name: str
    reads: dict[str, int]  # with the number of the term
    held: tuple[str, ...]  # those that it reads as constants
    kind: Kind
    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any]
    steps: int
    steps_ahead: int | None
    accumulate: int
    clip_norm: float | None
    clip_ahead: bool
    decays: bool  # the learning rate, by a tenth at each step
    estimator: dict[str, Any]
    last: int | None  # how many of its last steps the estimator goes back through; None: all
    net: Net
    data: list[tuple[Tensor, Tensor]]

    def loss(self, own: Values, reads: Mapping[str, tuple[Level, Values]], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Its loss, in plain torch."""
        net = self.run(own)
        total = (net(batch[0]) ** 2).sum() * 0.3
        for name, (level, values) in reads.items():
            term = TERMS[self.reads[name]]
            total = total + term(net, self.weight(own), level.run(values), level.weight(values), batch)
        return total

    def run(self, values: Values) -> Net_:
        held = {**dict(self.net.named_parameters()), **dict(zip(self.kind.trained, values, strict=True))}
        return lambda x: self.kind.output(held, x) * self.net.shared

    def weight(self, values: Values) -> Tensor:
        return values[self.kind.trained.index("w")]

    def problem(self) -> mlo.Problem:
        held = dict(self.net.named_parameters())
        optimizer = self.optimizer([held[name] for name in self.kind.trained], **self.options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.9**k) if self.decays else None
        return _problem_class(self.reads)(
            self.name,
            module=self.net,
            optimizer=optimizer,
            scheduler=scheduler,
            data=self.data,
            steps=self.steps,
            steps_ahead=self.steps_ahead,
            accumulate=self.accumulate,
            clip_norm=self.clip_norm,
            clip_ahead=self.clip_ahead,
            held=self.held,
            hypergradient=self.estimator,
        )


def _problem_class(reads: Mapping[str, int]) -> type[mlo.Problem]:
    """A problem with the loss of a :class:`Level`, whose reads are in its signature."""

    def evaluate(self: mlo.Problem, batch: tuple[Tensor, Tensor], problems: dict[str, mlo.Problem]) -> Tensor:
        total = (self(batch[0]) ** 2).sum() * 0.3
        for name, read in problems.items():
            total = total + TERMS[reads[name]](self, self.params["w"], read, read.params["w"], batch)
        return total

    namespace: dict[str, Any] = {"evaluate": evaluate}
    exec(
        f"def loss(self, batch{''.join(f', {read}' for read in reads)}):\n"
        f"    return evaluate(self, batch, dict({', '.join(f'{r}={r}' for r in reads)}))",
        namespace,
    )
    return type("Drawn", (mlo.Problem,), {"loss": namespace["loss"]})


def _estimator(draw: random.Random, products: list[object], inner_path: bool) -> tuple[dict[str, Any], int | None]:
    """An estimator, and how many steps it goes back through."""
    product = draw.choice(products)
    kind = draw.choice(["one_step", "truncated", "unrolled", "unrolled", "cg", "first_order"])
    if kind == "one_step" or (inner_path and kind in ("cg", "first_order")):
        return {"kind": "one_step", "product": product}, 1
    if kind == "cg":
        return {"kind": "cg", "iterations": 80, "damping": DAMPING, "product": product}, 0
    if kind == "first_order":
        return {"kind": "first_order"}, 0
    options: dict[str, Any] = {"kind": kind, "product": product, "graph_memory": draw.choice([0, 64])}
    options["every"] = draw.choice([1, 1, 2])
    if kind == "unrolled":
        return options, None
    steps = draw.choice([1, 2])
    return {**options, "steps": steps}, steps


DIFFERENCES: list[object] = [{"kind": "central", "radius": 1e-4}, {"kind": "one_sided", "radius": 1e-6}, "exact"]


@dataclass
class Program:
    """A random stack of problems, with the options of its engine."""

    seed: int
    levels: list[Level] = field(default_factory=list)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        torch.manual_seed(self.seed)
        names = [f"p{index}" for index in range(draw.choice([2, 2, 3, 3, 4, 4, 5, 6]))]
        self.inner_path = draw.random() < 0.3
        self.lookahead = draw.choice([False, False, True])
        differences = draw.random() < 0.2  # whose errors must not be amplified, as Adam's first steps do
        products = DIFFERENCES if differences and not self.inner_path else ["exact", "exact", "forward"]
        self.tolerance = 1e-3 if products is DIFFERENCES else 1e-8
        optimizers = [each for each in OPTIMIZERS if products is not DIFFERENCES or each[0] is torch.optim.SGD]
        shared = nn.Parameter(torch.rand(SIZE) + 0.5, requires_grad=False)
        often = draw.choice([0.35, 0.5, 0.7])
        for index, name in enumerate(names):
            others = [other for other in names if other != name and draw.random() < often]
            others = names[1 - index : 2 - index] if len(names) == 2 else others
            held = tuple(other for other in others if draw.random() < 0.07)
            kind = KINDS[draw.choice(list(KINDS))]
            optimizer, options = draw.choice(optimizers)
            estimator, last = _estimator(draw, products, self.inner_path)
            batches = [(torch.randn(SIZE) * 0.5, torch.randn(SIZE) * 0.5) for _ in range(draw.choice([1, 2, 3]))]
            self.levels.append(
                Level(
                    name,
                    reads={other: draw.randrange(len(TERMS)) for other in others},
                    held=held,
                    kind=kind,
                    optimizer=optimizer,
                    options=options,
                    steps=draw.choice([1, 1, 2, 3]),
                    steps_ahead=draw.choice([None, None, 1, 2]),
                    accumulate=draw.choice([1, 1, 1, 2]),
                    clip_norm=draw.choice([None, None, 0.5]),
                    clip_ahead=draw.choice([True, True, False]),
                    decays=draw.random() < 0.25,
                    estimator=estimator,
                    last=last,
                    net=Net(kind, shared),
                    data=batches,
                )
            )

    @property
    def names(self) -> list[str]:
        return [level.name for level in self.levels]

    def engine(self) -> mlo.Engine:
        problems = [level.problem() for level in self.levels]
        return mlo.Engine(problems, lookahead=self.lookahead, inner_path=self.inner_path, device="cpu")

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, lookahead={self.lookahead}, inner_path={self.inner_path}"]
        for level in self.levels:
            shown = {f.name: getattr(level, f.name) for f in fields(level) if f.name not in ("net", "data", "kind")}
            lines.append(f"  {shown}")
        return "\n".join(lines)


def stepped(
    level: Level, rate: float, values: Values, gradient: Values, slots: Slots, ahead: bool
) -> tuple[Values, Slots]:
    """One step of the level's optimizer, with its graph."""
    if level.clip_norm is not None and (level.clip_ahead or not ahead):
        norm = torch.stack([g.norm() for g in gradient]).norm()
        gradient = tuple(g * (level.clip_norm / (norm + 1e-6)).clamp(max=1.0) for g in gradient)
    if level.optimizer is torch.optim.SGD:
        pairs = [_sgd(level.options, rate, *each) for each in zip(values, gradient, slots, strict=True)]
        return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
    moved = [value.clone() for value in values]
    optimizer = level.optimizer(moved, **{**level.options, "lr": rate, "differentiable": True})
    for value, g, held in zip(moved, gradient, slots, strict=True):
        value.grad = g
        optimizer.state[value].update({k: v.clone() if isinstance(v, Tensor) else v for k, v in held.items()})
    optimizer.step()
    return tuple(moved), tuple(dict(optimizer.state[value]) for value in moved)


def _sgd(
    options: Mapping[str, Any], rate: float, value: Tensor, g: Tensor, held: dict[str, Any]
) -> tuple[Tensor, dict]:
    """By hand, since torch cuts the first momentum buffer out of the graph."""
    g = g + options.get("weight_decay", 0) * value
    momentum = options.get("momentum", 0)
    if not momentum:
        return value - rate * g, {}
    buffer = momentum * held["buffer"] + (1 - options.get("dampening", 0)) * g if held else g
    g = g + momentum * buffer if options.get("nesterov") else buffer
    return value - rate * g, {"buffer": buffer}


class IllPosedError(Exception):
    """A program that has no answer to compare with: a Hessian that is not positive definite, or values that grow."""


class Reference:
    """A program's rounds and hypergradients, by plain autograd."""

    def __init__(self, program: Program) -> None:
        self.program, self.levels = program, {level.name: level for level in program.levels}
        self.values: dict[str, Values] = {
            name: tuple(dict(level.net.named_parameters())[n].detach().clone() for n in level.kind.trained)
            for name, level in self.levels.items()
        }
        self.slots: dict[str, Slots] = {name: tuple({} for _ in self.values[name]) for name in self.levels}
        self.taken = dict.fromkeys(self.levels, 0)  # steps

    def hypergradient(self, name: str) -> Values:
        """The gradient of a problem's next step, after the next steps of those below it."""
        start = {n: tuple(v.detach() for v in values) for n, values in self.values.items()}
        own = start[name] = tuple(v.requires_grad_() for v in start[name])
        below = self.program.names[: self.program.names.index(name)]
        tops = self.tops() if self.program.lookahead else []
        after, _ = self._after([low for low in below if low not in tops], start)
        return torch.autograd.grad(self._loss(name, after, 0), own)

    def round(self) -> None:
        """All steps of one round."""
        tops = self.tops() if self.program.lookahead else []
        rest = [name for name in self.program.names if name not in tops]
        for top in tops:  # on virtual steps of the others, which step for real afterwards
            for _ in range(self.levels[top].steps):
                gradient = self.hypergradient(top)
                level = self.levels[top]
                self.values[top], self.slots[top] = stepped(
                    level, self._rate(level, 0), self.values[top], gradient, self.slots[top], False
                )
                self.taken[top] += 1
        after, slots = self._after(rest, dict(self.values), real=True)
        for name in rest:
            self.values[name] = tuple(v.detach() for v in after[name])
            self.slots[name] = _cut(slots[name])
            self.taken[name] += self.levels[name].steps

    def tops(self) -> list[str]:
        """The problems that read one below, and that none above reads."""
        names = self.program.names
        return [
            name
            for index, name in enumerate(names)
            if any(read in names[:index] for read in self.levels[name].reads)
            and not any(name in self.levels[above].reads for above in names[index + 1 :])
        ]

    def _after(self, names: list[str], start: dict[str, Values], *, real: bool = False) -> tuple[dict, dict]:
        """The values of all levels after the steps of ``names``, and the slots of these."""
        after, slots = dict(start), dict(self.slots)
        for index, name in enumerate(names):
            level = self.levels[name]
            own, held = start[name], slots[name]
            ahead = self.program.lookahead and not real
            steps = level.steps_ahead if ahead and level.steps_ahead is not None else level.steps
            for step in range(steps):
                gradient = self._total(name, names[:index], own, start, after, step, real)
                own, held = stepped(level, self._rate(level, step if real else 0), own, gradient, held, ahead)
                if level.last is not None and steps - step > level.last:
                    own, held = tuple(v.detach() for v in own), _cut(held)
            if max(float(v.detach().abs().max()) for v in own) > 100:
                raise IllPosedError
            if level.estimator["kind"] == "cg":
                own = self._solution(name, own, after, steps - 1)
            after[name], slots[name] = own, held
        return after, slots

    def _total(
        self,
        name: str,
        below: list[str],
        own: Values,
        start: dict[str, Values],
        after: dict[str, Values],
        step: int,
        real: bool,
    ) -> Values:
        """The gradient of one step: of the loss itself, and through the steps of the levels below."""
        here = tuple(torch.zeros_like(v, requires_grad=True) for v in own)
        there = {**after, name: tuple(v + h for v, h in zip(own, here, strict=True))}
        if not self._runs_through(name, below):
            return torch.autograd.grad(self._loss(name, there, step), here, create_graph=True)
        shift = tuple(torch.zeros_like(v, requires_grad=True) for v in own)
        shifted = {**start, name: tuple(v + s for v, s in zip(start[name], shift, strict=True))}
        again, _ = self._after(below, shifted, real=real)
        there.update({low: again[low] for low in below})
        found = torch.autograd.grad(
            self._loss(name, there, step), (*here, *shift), create_graph=True, materialize_grads=True
        )
        direct, inner = found[: len(own)], found[len(own) :]
        if not self.program.inner_path:
            inner = tuple(i.detach() for i in inner)
        return tuple(d + i for d, i in zip(direct, inner, strict=True))

    def _loss(self, name: str, values: Mapping[str, Values], step: int) -> Tensor:
        """The mean loss over the batches of a step."""
        level, losses = self.levels[name], list[Tensor]()
        first = (self.taken[name] + step) * level.accumulate
        for index in range(level.accumulate):
            batch = level.data[(first + index) % len(level.data)]
            reads = {
                read: (
                    self.levels[read],
                    tuple(v.detach() for v in values[read]) if read in level.held else values[read],
                )
                for read in level.reads
            }
            losses.append(level.loss(values[name], reads, batch))
        return torch.stack(losses).mean()

    def _rate(self, level: Level, step: int) -> float:
        return level.options["lr"] * (0.9 ** (self.taken[level.name] + step) if level.decays else 1.0)

    def _solution(self, name: str, own: Values, after: dict[str, Values], step: int) -> Values:
        """The values moved as the minimum would move, by the implicit function theorem, with damping."""
        own = tuple(v.detach().requires_grad_() for v in own)
        slope = torch.autograd.grad(self._loss(name, {**after, name: own}, step), own, create_graph=True)
        flat = torch.cat([s.reshape(-1) for s in slope])
        rows = [torch.autograd.grad(s, own, retain_graph=True, materialize_grads=True) for s in flat]
        hessian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).detach()
        hessian = hessian + DAMPING * torch.eye(len(flat))
        if float(torch.linalg.eigvalsh(hessian)[0]) < DAMPING / 10:
            raise IllPosedError
        moved = torch.linalg.solve(hessian, flat - flat.detach())
        parts = moved.split([v.numel() for v in own])
        return tuple(v.detach() - part.view_as(v) for v, part in zip(own, parts, strict=True))

    def _runs_through(self, name: str, below: list[str]) -> bool:
        """Whether a loss depends on its own level through the steps of those below."""
        reached, waiting = set[str](), [name]
        while waiting:
            reader = waiting.pop()
            lower = below if reader == name else below[: below.index(reader)]
            new = [r for r in self.levels[reader].reads if r in lower and r not in reached]
            reached.update(new)
            waiting += new
        return any(name in self.levels[low].reads for low in reached)


def _cut(slots: Slots) -> Slots:
    return tuple({k: v.detach() if isinstance(v, Tensor) else v for k, v in held.items()} for held in slots)


def programs(first: int = 0) -> Iterator[Program]:
    """Valid programs, from a seed on."""
    seed = first
    while True:
        program = Program(seed)
        seed += 1
        try:
            program.engine()
        except (mlo.GraphError, mlo.errors.ConfigError):
            continue
        yield program


def wrong(program: Program, rounds: int = 2) -> list[str]:
    """What mlo and the reference do not agree on.

    Raises:
        IllPosedError: if the program has no answer.
    """
    reference, engine, found = Reference(program), program.engine(), list[str]()
    for number in range(1, rounds + 1):
        levels = program.names if rounds > 1 else program.names[-1:]  # a round shows those of the others by their steps
        for name in reference.tops() if program.lookahead else levels:
            wanted = dict(zip(reference.levels[name].kind.trained, reference.hypergradient(name), strict=True))
            gradient = engine.hypergradient(name)
            error = _error(list(gradient.values()), [wanted[n] for n in gradient])
            if not error < program.tolerance:
                found.append(f"hypergradient of {name} in round {number}: off by {error:.1e}")
        reference.round()
        engine.step()
        for name, values in reference.values.items():
            held = dict(reference.levels[name].net.named_parameters())
            error = _error([held[n] for n in reference.levels[name].kind.trained], values)
            if not error < program.tolerance:
                found.append(f"values of {name} after round {number}: off by {error:.1e}")
    return found


def _error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    first, second = (torch.cat([t.detach().reshape(-1) for t in each]) for each in (found, wanted))
    return float((first - second).norm() / second.norm().clamp_min(1e-6))


def main() -> None:
    """Try many programs, and print those that go wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first program")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tried = ill = bad = 0
    for program in itertools.islice(programs(given.first), given.count):
        tried += 1
        try:
            faults = wrong(program, given.rounds)
        except IllPosedError:
            ill += 1
            continue
        if faults:
            bad += 1
            print(program, *faults, sep="\n", flush=True)
    print(f"{tried} programs: {bad} wrong, {ill} without an answer to compare with")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
