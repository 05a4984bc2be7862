"""Learning by Teaching: a teacher learns, teaches a student with pseudo-labels, and both judge its architecture.

The three levels of "Learning by Teaching, with Application to Neural Architecture Search", each written as if it were
trained alone. The parameter names of each `loss` say what it reads: the teacher reads the architecture, the student
reads the teacher and the architecture, and the architecture reads the teacher and the student.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mlo


class TeacherTrain(mlo.Problem):
    """Level 1, the teacher learns: min_W L(W, A; D_t^tr), the cross-entropy on the teacher's training data.

    The module maps (images, architecture) to logits of shape (N, classes). A batch is (images, labels).
    """

    def loss(self, batch: Any, arch: mlo.Problem) -> Tensor:
        """The teacher's training loss; one step on it gives W' of equation (4)."""
        images, labels = batch
        return F.cross_entropy(self(images, arch()), labels)


class StudentTeach(mlo.Problem):
    """Level 2, the teacher teaches: min_S L(S; D_s^tr) + lambda L(S; D_pl(D_u, W)), equation (5).

    The module maps images to logits of shape (N, classes). A batch is {"labeled": (images, labels), "unlabeled":
    images}, or {"unlabeled": images} to learn from pseudo-labels only (the second ablation). "unlabeled" may also be
    a pair (images, labels), whose labels are ignored. Labeled and unlabeled images go through the student as one batch.

    The pseudo-labels are the teacher's probabilities. They depend on the architecture both through the teacher's
    weights and directly. ``held=("arch",)`` ignores the direct dependence, as equations (9) to (12) do.

    Args:
        pseudo_weight: lambda, the weight of the pseudo-labeled images.
        **problem: see :class:`mlo.Problem`.
    """

    def __init__(self, name: str, *, pseudo_weight: float = 1.0, **problem: Any) -> None:
        super().__init__(name, **problem)
        self.pseudo_weight = pseudo_weight

    def loss(self, batch: Any, teacher: mlo.Problem, arch: mlo.Problem) -> Tensor:
        """The student's training loss."""
        unlabeled = batch["unlabeled"]
        if not isinstance(unlabeled, Tensor):
            unlabeled = unlabeled[0]
        pseudo_labels = teacher(unlabeled, arch()).softmax(dim=1)
        if "labeled" not in batch:
            return self.pseudo_weight * F.cross_entropy(self(unlabeled), pseudo_labels)
        images, labels = batch["labeled"]
        on_labeled, on_unlabeled = self(torch.cat([images, unlabeled])).split([len(images), len(unlabeled)])
        return F.cross_entropy(on_labeled, labels) + self.pseudo_weight * F.cross_entropy(on_unlabeled, pseudo_labels)


class StudentInTurn(mlo.Problem):
    """Level 2 as in the authors' later code: a step on the pseudo-labeled images, then a step on the labeled ones.

    The virtual (lookahead) step of the architecture's hypergradient is different: one step on both together, without
    clipping. Its pseudo-labels are the teacher's most probable classes, with the derivative of its probabilities.

    Batches are those of :class:`StudentTeach`; both steps of a round should use the same batch.

    Args:
        pseudo_weight: lambda, the weight of the pseudo-labeled images.
        labeled: whether there are labeled images. Without them a round has one step.
        **problem: see :class:`mlo.Problem`. `steps`, `steps_ahead` and `clip_ahead` are set by this class.
    """

    def __init__(self, name: str, *, pseudo_weight: float = 1.0, labeled: bool = True, **problem: Any) -> None:
        super().__init__(name, steps=1 + labeled, steps_ahead=1, clip_ahead=False, **problem)
        self.pseudo_weight = pseudo_weight

    def loss(self, batch: Any, teacher: mlo.Problem, arch: mlo.Problem) -> Tensor:
        """The loss of the student's next real step, or of its virtual step."""
        if not self.looking_ahead and self.step_in_round == 1:
            return self._labeled(batch)
        unlabeled = batch["unlabeled"]
        if not isinstance(unlabeled, Tensor):
            unlabeled = unlabeled[0]
        pseudo_labels = teacher(unlabeled, arch()).softmax(dim=1)
        if self.looking_ahead:
            pseudo_labels = pseudo_labels + (_hard(pseudo_labels) - pseudo_labels).detach()
        taught = self.pseudo_weight * F.cross_entropy(self(unlabeled), pseudo_labels)
        return taught + self._labeled(batch) if self.looking_ahead and "labeled" in batch else taught

    def _labeled(self, batch: Any) -> Tensor:
        images, labels = batch["labeled"]
        return F.cross_entropy(self(images), labels)


def _hard(probabilities: Tensor) -> Tensor:
    return torch.zeros_like(probabilities).scatter(1, probabilities.argmax(dim=1, keepdim=True), 1.0)


class ArchValidate(mlo.Problem):
    """Level 3, the teacher re-learns: min_A L(W, A; D_t^val) + gamma L(S; D_s^val), equation (6).

    The module takes no arguments and returns the architecture that the teacher is called with. A batch is (images,
    labels), or {"teacher": (images, labels), "student": (images, labels)} to validate the two on different data.
    ``reads={"teacher": None}`` uses only the student's validation loss (the first ablation). ``reads={"student":
    None}`` with a :class:`TeacherTrain` is DARTS.

    Args:
        student_weight: gamma, the weight of the student's validation loss.
        in_turn: whether to take two steps, on the teacher's term and then on the student's, each with its own virtual
            steps and its own batch, instead of one step on their sum (as in the authors' later code).
        **problem: see :class:`mlo.Problem`.
    """

    def __init__(self, name: str, *, student_weight: float = 1.0, in_turn: bool = False, **problem: Any) -> None:
        if in_turn:
            reads = {"teacher": "teacher", "student": "student"} | dict(problem.get("reads") or {})
            judges = tuple(read for read in reads.values() if read is not None)
            problem |= {"steps": len(judges), "sometimes": judges}
        super().__init__(name, **problem)
        self.student_weight = student_weight
        self.in_turn = in_turn

    def loss(self, batch: Any, teacher: mlo.Problem | None = None, student: mlo.Problem | None = None) -> Tensor:
        """The architecture's validation loss."""
        split = batch if isinstance(batch, Mapping) else {"teacher": batch, "student": batch}
        terms = []
        if self.in_turn and teacher is not None and student is not None:
            teacher, student = (teacher, None) if self.step_in_round == 0 else (None, student)
        if teacher is not None:
            images, labels = split["teacher"]
            terms.append(F.cross_entropy(teacher(images, self()), labels))
        if student is not None:
            images, labels = split["student"]
            terms.append(self.student_weight * F.cross_entropy(student(images), labels))
        return torch.stack(terms).sum()
