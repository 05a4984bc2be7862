"""Golden values of the LBT gradient, on which two independent implementations agree."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlo
from problems.lbt import ArchValidate, StudentTeach, TeacherTrain
from problems.nas import Architecture, Supernet

STEP = 0.025
FIRST_ORDER = (0.10155003464, 0.088171134126)
DARTS_SECOND = (0.20582802007, 0.20509562044)
LBT_FULL = (0.20582721273, 0.20509282916)
STUDENT_FULL = (7.2671040346e-06, 9.3745892353e-06)
STUDENT_PAPER = (6.1006165001e-06, 7.7258404888e-06)


def fill(module: nn.Module) -> nn.Module:
    """Set weights to sin(i + 1) sqrt(2 / fan_in), for a supernet edge by edge, and biases of linear layers to 0."""
    tensors = module.edge_tensors() if isinstance(module, Supernet) else dict(module.named_parameters())
    for parameter in tensors.values():
        with torch.no_grad():
            if parameter.dim() > 1:
                wave = torch.arange(1, parameter.numel() + 1, dtype=torch.float64).sin()
                parameter.copy_((wave * math.sqrt(2 / parameter[0].numel())).view_as(parameter))
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    return module


def wave(function: str, frequency: float, shift: float = 0.0) -> Tensor:
    t = torch.arange(8 * 3 * 16 * 16, dtype=torch.float64)
    return getattr(torch, function)(frequency * t + shift).view(8, 3, 16, 16)


def problems(*, held: tuple[str, ...] = (), judged_by_teacher: bool = True, student_weight: float = 1.0):
    b = torch.arange(8)
    train = (wave("sin", 1.7), b % 10)
    validation = (wave("cos", 1.87), (3 * b + 1) % 10)
    unlabeled = wave("sin", 1.53, 1.0)
    teacher = fill(Supernet(channels=4, cells=3).double())
    student = fill(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        ).double()
    )
    arch = Architecture().double()
    i = torch.arange(14 * 8, dtype=torch.float64).view(14, 8)
    with torch.no_grad():
        arch.normal.copy_(0.1 * i.sin())
        arch.reduce.copy_(0.1 * i.cos())

    def sgd(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=STEP, weight_decay=3e-4)

    return [
        TeacherTrain("teacher", module=teacher, optimizer=sgd(teacher), data=[train]),
        StudentTeach(
            "student",
            module=student,
            optimizer=sgd(student),
            data=[{"labeled": train, "unlabeled": unlabeled}],
            held=held,
        ),
        ArchValidate(
            "arch",
            module=arch,
            optimizer=torch.optim.Adam(arch.parameters(), lr=3e-4),
            data=[validation],
            student_weight=student_weight,
            reads=None if judged_by_teacher else {"teacher": None},
        ),
    ]


def norms(gradient: dict[str, Tensor]) -> tuple[float, float]:
    return gradient["normal"].norm().item(), gradient["reduce"].norm().item()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LBT_FULL),
        ({"student_weight": 0.0}, DARTS_SECOND),
        ({"judged_by_teacher": False}, STUDENT_FULL),
        ({"judged_by_teacher": False, "held": ("arch",)}, STUDENT_PAPER),
    ],
    ids=["full", "darts", "student part", "student part, paper path"],
)
def test_the_hypergradient_has_the_golden_norms(options, expected, device):
    engine = mlo.Engine(problems(**options), "one_step", device=device)
    assert norms(engine.hypergradient("arch")) == pytest.approx(expected, rel=1e-10, abs=0)


def test_the_losses_are_the_golden_ones():
    stack = problems()
    engine = mlo.Engine(stack, "one_step", device="cpu")
    engine.step()
    assert engine.losses["teacher"].item() == pytest.approx(2.3319250819516735, rel=1e-13)
    images, labels = stack[2].stream.peek()
    stepped = stack[0].module(images, problems()[2].module())
    assert F.cross_entropy(stepped, labels).item() == pytest.approx(2.260004025066869, rel=1e-13)


def test_the_first_order_gradient_is_taken_at_the_weights_before_the_step():
    teacher, _, arch = problems()
    images, labels = arch.stream.peek()
    loss = F.cross_entropy(teacher.module(images, arch.module()), labels)
    gradient = torch.autograd.grad(loss, list(arch.module.parameters()))
    assert [g.norm().item() for g in gradient] == pytest.approx(FIRST_ORDER, rel=1e-10)
