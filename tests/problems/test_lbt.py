"""The three losses of LBT, term by term, and how to leave terms out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_lbt import Weights
from torch import nn

import mlo
from problems.lbt import ArchValidate, StudentTeach, TeacherTrain


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, images, weights):
        return self.layer(images) * weights.sum()


def sgd(module: nn.Module) -> dict[str, object]:
    return {"module": module, "optimizer": torch.optim.SGD(module.parameters(), lr=0.1)}


def levels(
    batch: dict | None = None,
    validation: object = None,
    *,
    weight: float = 1.0,
    gamma: float = 1.0,
    held: tuple[str, ...] = (),
    **arch: object,
) -> list[mlo.Problem]:
    torch.manual_seed(0)
    labeled = (torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))
    batch = {"labeled": labeled, "unlabeled": torch.randn(6, 5)} if batch is None else batch
    return [
        TeacherTrain("teacher", data=[labeled], **sgd(Teacher())),
        StudentTeach("student", data=[batch], pseudo_weight=weight, held=held, **sgd(nn.Linear(5, 3))),
        ArchValidate("arch", data=[validation or labeled], student_weight=gamma, **{**sgd(Weights()), **arch}),
    ]


def test_each_loss_is_that_of_the_paper():
    teacher, student, arch = problems = levels(weight=0.3, gamma=0.6)
    (images, labels), unlabeled = student.stream.peek().values()
    weights = arch.module()
    soft = teacher.module(unlabeled, weights).softmax(1)
    pseudo = -(soft * student.module(unlabeled).log_softmax(1)).sum(1).mean()
    expected = {
        "teacher": F.cross_entropy(teacher.module(images, weights), labels),
        "student": F.cross_entropy(student.module(images), labels) + 0.3 * pseudo,
        "arch": F.cross_entropy(teacher.module(images, weights), labels)
        + 0.6 * F.cross_entropy(student.module(images), labels),
    }
    assert teacher.loss(teacher.stream.peek(), arch) == expected["teacher"]
    torch.testing.assert_close(student.loss(student.stream.peek(), teacher, arch), expected["student"])
    torch.testing.assert_close(arch.loss(arch.stream.peek(), teacher, student), expected["arch"])
    assert str(mlo.Engine(problems, device="cpu").graph).splitlines()[0].startswith("level 3  arch  reads teacher")


def test_the_second_ablation_learns_only_from_pseudo_labels():
    unlabeled = torch.randn(6, 5)
    for part in (unlabeled, (unlabeled, torch.zeros(6))):
        teacher, student, arch = levels({"unlabeled": part}, weight=0.5)
        soft = teacher.module(unlabeled, arch.module()).softmax(1)
        expected = -0.5 * (soft * student.module(unlabeled).log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(student.loss(student.stream.peek(), teacher, arch), expected)


def test_the_first_ablation_validates_only_the_student():
    problems = levels(reads={"teacher": None})
    _, student, arch = problems
    images, labels = arch.stream.peek()
    assert arch.loss((images, labels), student=student) == F.cross_entropy(student.module(images), labels)
    engine = mlo.Engine(problems, "one_step", device="cpu")
    assert engine.graph.reads("arch") == ("student",)
    assert engine.hypergradient("arch")["weights"].abs().sum() > 0


def test_without_a_student_it_is_darts():
    teacher, _, arch = levels(reads={"student": None})
    engine = mlo.Engine([teacher, arch], "one_step", device="cpu")
    engine.step()
    assert engine.pullbacks == {"teacher": 1}


def test_teacher_and_student_may_be_validated_on_different_data():
    one, two = ((torch.randn(4, 5), torch.tensor(y)) for y in ([0, 1, 2, 0], [2, 2, 1, 1]))
    teacher, student, arch = levels(validation={"teacher": one, "student": two})
    expected = F.cross_entropy(teacher.module(one[0], arch.module()), one[1])
    expected = expected + F.cross_entropy(student.module(two[0]), two[1])
    torch.testing.assert_close(arch.loss(arch.stream.peek(), teacher, student), expected)


def test_the_papers_form_leaves_out_only_the_direct_dependence():
    """With a fixed teacher the student's part is only the direct dependence, so the paper's form of it is zero."""
    found = {}
    for held in ((), ("arch",)):
        problems = levels(held=held, reads={"teacher": None})
        for group in problems[0].optimizer.param_groups:
            group["lr"] = 0.0
        found[held] = mlo.Engine(problems, "one_step", device="cpu").hypergradient("arch")["weights"]
    assert found[()].norm() > 1e-5
    assert found[("arch",)].norm() == 0


@pytest.mark.parametrize("product", ["exact", "central"])
def test_a_round_computes_the_pseudo_labels_only_twice(product):
    engine = mlo.Engine(levels(), {"kind": "one_step", "product": product}, device="cpu")
    engine.step()
    assert engine.passes["teacher"]["read"] == 2
