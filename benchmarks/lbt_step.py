"""A step of Learning by Teaching by the engine and by hand: the table in docs/search_spaces.md.

    python -m benchmarks.lbt_step

The engine computes the hypergradient in one backward pass over the levels; by hand each product is computed
separately. CPU time on one thread: all candidates take turns in one process, and the table shows the median over
rounds.

A step consists of a step of the architecture, through virtual steps of teacher and student, a step of the teacher, and
a step of the student. The teacher is a DARTS supernet, the student a ResNet-18 (3x3 stem without stride, no max-pool),
and batches have 8 images of 32x32. By hand, products are central differences; the engine takes central differences,
one-sided differences, or exact products. The supernet has the paper's 16 channels and 8 cells, once written edge by
edge with contiguous tensors, as usual, and once as in this package; the latter also with 4 channels and 4 cells, where
the student takes most of the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mlo
from benchmarks.edge_by_edge import EdgeByEdge, load_edges
from benchmarks.lbt_by_hand import LbtByHand
from benchmarks.measuring import SEARCH_SPACES, cpu_seconds, write_table
from problems.lbt import ArchValidate, StudentTeach, TeacherTrain
from problems.nas import Architecture, Supernet
from problems.search.students import make_student

STEP, MOMENTUM, DECAY = 0.025, 0.9, 3e-4


class Task(NamedTuple):
    """The three networks and three batches: (images, labels) for training and validation, and unlabeled images."""

    teacher: nn.Module
    student: nn.Module
    architecture: Architecture
    training: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    unlabeled: Tensor

    def optimizers(self, capturable: bool = False) -> list[torch.optim.Optimizer]:
        """The optimizers of teacher, student and architecture; ``capturable``: whether by a CUDA graph."""
        networks = self.teacher, self.student
        sgd = [torch.optim.SGD(n.parameters(), lr=STEP, momentum=MOMENTUM, weight_decay=DECAY) for n in networks]
        options: dict[str, Any] = {"betas": (0.5, 0.999), "weight_decay": 1e-3, "capturable": capturable}
        return [*sgd, torch.optim.Adam(self.architecture.parameters(), 3e-4, **options)]


def resnet18() -> nn.Module:
    """The first student of the paper, for images of 32x32."""
    return make_student("resnet18", 3, 10, 32)


def make_task(
    student: Callable[[], nn.Module] = resnet18,
    edge_by_edge: bool = False,
    channels: int = 16,
    cells: int = 8,
    batch: int = 8,
    size: int = 32,
) -> Task:
    """Make a task; each call gives the same weights and images."""
    torch.manual_seed(0)
    supernet = Supernet(channels=channels, cells=cells)
    teacher: nn.Module = supernet
    if edge_by_edge:
        teacher = EdgeByEdge(channels=channels, cells=cells)
        load_edges(teacher, supernet)
    torch.manual_seed(1)
    images = [torch.randn(batch, 3, size, size) for _ in range(3)]
    labels = [torch.randint(10, (batch,)) for _ in range(2)]
    return Task(teacher, student(), Architecture(), (images[0], labels[0]), (images[1], labels[1]), images[2])


def problems(task: Task, held: tuple[str, ...] = ("arch",), **arch: Any) -> list[mlo.Problem]:
    """The three levels. By default the direct dependence of the pseudo-labels is left out, as in (9) to (12)."""
    of_teacher, of_student, of_architecture = task.optimizers()
    taught = {"labeled": [task.training], "unlabeled": [task.unlabeled]}
    return [
        TeacherTrain("teacher", module=task.teacher, optimizer=of_teacher, data=[task.training]),
        StudentTeach("student", module=task.student, optimizer=of_student, data=taught, held=held),
        ArchValidate("arch", module=task.architecture, optimizer=of_architecture, data=[task.validation], **arch),
    ]


class Passes:
    """Counts the forward passes of a task's networks, and the images in them."""

    def __init__(self, task: Task) -> None:
        self._networks = {"teacher": task.teacher, "student": task.student}

    def of(self, step: Callable[[], object]) -> Counter[str]:
        """Run two steps (the first may look at losses twice); return {network: passes} of the second, and images."""
        step()
        counts: Counter[str] = Counter()

        def counting(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda _, inputs: counts.update({name: 1, f"{name} images": len(inputs[0])})

        hooks = [network.register_forward_pre_hook(counting(name)) for name, network in self._networks.items()]
        step()
        for hook in hooks:
            hook.remove()
        return counts


SUPERNETS: dict[str, dict[str, Any]] = {
    "16 channels, 8 cells, edge by edge": {"edge_by_edge": True},
    "16 channels, 8 cells": {},
    "4 channels, 4 cells": {"channels": 4, "cells": 4},
}
PRODUCTS = ("central", "one_sided", "exact")


def table(rounds: int, supernets: Mapping[str, dict[str, Any]] = SUPERNETS) -> str:
    """Measure, and return the table in Markdown."""
    torch.set_num_threads(1)
    counts: list[Counter[str]] = []
    seconds = {}
    for label, options in supernets.items():
        tasks = [make_task(**options) for _ in range(1 + len(PRODUCTS))]
        steps = [LbtByHand(tasks[0]).step, *map(engine_step, tasks[1:], PRODUCTS)]
        counts = [Passes(task).of(step) for task, step in zip(tasks, steps, strict=True)]
        seconds[label] = cpu_seconds(steps, rounds)
    return "\n".join(_rows(counts, seconds))


def engine_step(task: Task, product: str) -> Callable[[], None]:
    """A step of the engine with one kind of product."""
    estimator = {"kind": "one_step", "product": product}
    return mlo.Engine(problems(task), estimator, lookahead=True, device="cpu").step


def _rows(counts: Sequence[Counter[str]], seconds: Mapping[str, Sequence[float]]) -> Iterator[str]:
    yield "| | each product by itself | one backward pass | one-sided | exact |"
    yield "| --- | --- | --- | --- | --- |"
    for name in ("teacher", "student"):
        for key, label in ((name, f"passes of the {name}"), (f"{name} images", "images in them")):
            yield f"| {label} | {' | '.join(str(count[key]) for count in counts)} |"
    for label, (by_hand, *engines) in seconds.items():
        ratios = (f"{time:.2f} s: {time / by_hand:.2f}" for time in engines)
        yield f"| CPU time, {label} | {by_hand:.2f} s | {' | '.join(ratios)} |"


if __name__ == "__main__":
    write_table(__doc__, table, SEARCH_SPACES, "lbt step")
