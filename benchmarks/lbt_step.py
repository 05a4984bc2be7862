"""A step of Learning by Teaching in one sweep, and with each product by itself: the table in docs/search_spaces.md.

    python -m benchmarks.lbt_step

One thread; CPU time, all in turns in one process, the median of the rounds. A step is one of the architecture, through
virtual steps of teacher and student, then one of the teacher and one of the student: a DARTS supernet, ResNet-18 (3x3
stem without stride, no max-pool) as student, batches of 16 images of 32x32, products by central differences. At 4
channels and 4 cells, with the supernet edge by edge, contiguous, as it is usually written, and with this package's;
and with this at the paper's 16 channels and 8 cells.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mlo
from benchmarks.edge_by_edge import EdgeByEdge, load_edges
from benchmarks.lbt_by_products import ByProducts
from benchmarks.supernet import PAGE, cpu_seconds
from problems.lbt import ArchValidate, StudentTeach, TeacherTrain
from problems.nas import Architecture, Supernet
from problems.students import make_student

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
    channels: int = 4,
    cells: int = 4,
    batch: int = 16,
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
    "4 channels, 4 cells, edge by edge": {"edge_by_edge": True},
    "4 channels, 4 cells": {},
    "16 channels, 8 cells": {"channels": 16, "cells": 8},
}


def table(rounds: int, supernets: Mapping[str, dict[str, Any]] = SUPERNETS) -> str:
    """Measure, and write the rows."""
    torch.set_num_threads(1)
    steps: list[Callable[[], object]] = []
    counts = []
    for options in supernets.values():
        for in_one_sweep in (False, True):
            task = make_task(**options)
            step = mlo.Engine(problems(task), "darts", device="cpu").step if in_one_sweep else ByProducts(task).step
            counts.append(Passes(task).of(step))
            steps.append(step)
    return "\n".join(_rows(counts[:2], dict(zip(supernets, pairs(cpu_seconds(steps, rounds)), strict=True))))


def pairs(seconds: Sequence[float]) -> list[tuple[float, float]]:
    """Pairs of neighbors."""
    return list(zip(seconds[::2], seconds[1::2], strict=True))


def _rows(counts: Sequence[Counter[str]], seconds: Mapping[str, tuple[float, float]]) -> Iterator[str]:
    yield "| | each product by itself | one sweep | ratio |"
    yield "| --- | --- | --- | --- |"
    for name in ("teacher", "student"):
        for key, label in ((name, f"passes of the {name}"), (f"{name} images", "images in them")):
            apart, swept = (count[key] for count in counts)
            yield f"| {label} | {apart} | {swept} | {swept / apart:.2f} |"
    for label, (by_itself, in_one) in seconds.items():
        yield f"| CPU time, {label} | {by_itself:.2f} s | {in_one:.2f} s | {in_one / by_itself:.2f} |"


def main() -> None:
    """Measure, print the table and put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken")
    rows = table(parser.parse_args().rounds)
    print(rows)
    page = PAGE.read_text(encoding="utf-8")
    marked = re.sub(r"(<!-- lbt step -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{rows}\n{m[2]}", page, flags=re.DOTALL)
    PAGE.write_text(marked, encoding="utf-8")


if __name__ == "__main__":
    main()
