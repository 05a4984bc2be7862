"""A step of Learning by Teaching in one sweep, and with each product by itself: the table in docs/search_spaces.md.

    python -m benchmarks.lbt_step

One thread; CPU time, all in turns in one process, the median of the rounds. A step is one of the architecture, through
virtual steps of teacher and student, then one of the teacher and one of the student: a DARTS supernet, ResNet-18 (3x3
stem without stride, no max-pool) as student, batches of 8 images of 32x32. By hand, products are central differences;
in one sweep they are these, or one-sided ones, or exact. The supernet has the paper's 16 channels and 8 cells, edge by
edge, contiguous, as it is usually written, and as this package has it; and this with 4 channels and 4 cells, where the
student takes most of the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mlo
from benchmarks.edge_by_edge import EdgeByEdge, load_edges
from benchmarks.lbt_by_products import ByProducts
from benchmarks.measuring import SEARCH_SPACES, cpu_seconds, write_table
from problems.lbt import ArchValidate, StudentTeach, TeacherTrain
from problems.nas import Architecture, Supernet
from problems.search.students import make_student

STEP, MOMENTUM, DECAY = 0.025, 0.9, 3e-4


class Task(NamedTuple):
    """The three networks and the batches: for training, for validation (images, labels), and images without labels."""

    teacher: nn.Module
    student: nn.Module
    architecture: Architecture
    training: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    unlabeled: Tensor

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of teacher, student and architecture."""
        networks = self.teacher, self.student
        sgd = [torch.optim.SGD(n.parameters(), lr=STEP, momentum=MOMENTUM, weight_decay=DECAY) for n in networks]
        return [*sgd, torch.optim.Adam(self.architecture.parameters(), 3e-4, (0.5, 0.999), weight_decay=1e-3)]


def resnet18() -> nn.Module:
    """The paper's first student, for images of 32x32."""
    return make_student("resnet18", 3, 10, 32)


def make_task(
    student: Callable[[], nn.Module] = resnet18,
    edge_by_edge: bool = False,
    channels: int = 16,
    cells: int = 8,
    batch: int = 8,
    size: int = 32,
) -> Task:
    """The same weights and images at each call."""
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
    """The three levels; by default the pseudo-labels' direct dependence is left out, as in (9) to (12)."""
    of_teacher, of_student, of_architecture = task.optimizers()
    taught = {"labeled": [task.training], "unlabeled": [task.unlabeled]}
    return [
        TeacherTrain("teacher", module=task.teacher, optimizer=of_teacher, data=[task.training]),
        StudentTeach("student", module=task.student, optimizer=of_student, data=taught, held=held),
        ArchValidate("arch", module=task.architecture, optimizer=of_architecture, data=[task.validation], **arch),
    ]


class Passes:
    """Forward passes, and images in them, of a task's networks while it counts."""

    def __init__(self, task: Task) -> None:
        self._networks = {"teacher": task.teacher, "student": task.student}

    def of(self, step: Callable[[], object]) -> Counter[str]:
        """{network: passes, network + " images": images} of one step."""
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
    """Measure, and write the rows."""
    torch.set_num_threads(1)
    counts: list[Counter[str]] = []
    seconds = {}
    for label, options in supernets.items():
        tasks = [make_task(**options) for _ in range(1 + len(PRODUCTS))]
        steps = [ByProducts(tasks[0]).step, *map(in_one_sweep, tasks[1:], PRODUCTS)]
        counts = [Passes(task).of(step) for task, step in zip(tasks, steps, strict=True)]
        seconds[label] = cpu_seconds(steps, rounds)
    return "\n".join(_rows(counts, seconds))


def in_one_sweep(task: Task, product: str) -> Callable[[], None]:
    """The engine's step, with these products."""
    estimator = {"kind": "one_step", "product": product}
    return mlo.Engine(problems(task), estimator, lookahead=True, device="cpu").step


def _rows(counts: Sequence[Counter[str]], seconds: Mapping[str, Sequence[float]]) -> Iterator[str]:
    yield "| | each product by itself | one backward pass | one-sided | exact |"
    yield "| --- | --- | --- | --- | --- |"
    for name in ("teacher", "student"):
        for key, label in ((name, f"passes of the {name}"), (f"{name} images", "images in them")):
            yield f"| {label} | {' | '.join(str(count[key]) for count in counts)} |"
    for label, (by_itself, *indirect) in seconds.items():
        ratios = (f"{time:.2f} s: {time / by_itself:.2f}" for time in indirect)
        yield f"| CPU time, {label} | {by_itself:.2f} s | {' | '.join(ratios)} |"


if __name__ == "__main__":
    write_table(__doc__, table, SEARCH_SPACES, "lbt step")
