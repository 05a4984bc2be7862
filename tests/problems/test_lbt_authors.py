"""The authors' variant: it equals a loop written by hand, and one option of the LBT job selects it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from engine_state import same
from small_lbt import Weights, noisy_lbt
from torch import Tensor, nn

import mlo
from mlo.options.config import parse
from problems.jobs.lbt import LbtJob
from problems.jobs.lbt_stages import student_part
from problems.lbt import ArchValidate, StudentInTurn, TeacherTrain
from problems.search.levels import Repeated, cosine

ROUNDS, CLIP, MOMENTUM, DECAY, ADAM = 2, 0.05, 0.9, 3e-2, 0.05
RATES = [0.3, 0.2]  # learning rates of teacher and student in each round
LAMBDA, GAMMA = 0.7, 0.4

pytestmark = pytest.mark.usefixtures("float64")


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, images: Tensor, weights: Tensor) -> Tensor:
        mix = weights.softmax(dim=0)
        return self.head(mix[0] * self.one(images).tanh() + mix[1] * self.two(images).sigmoid())


class Setup:
    """The networks, their optimizers, and the batches: two of each kind, four for validation."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.teacher, self.arch = Teacher(), Weights()
        self.student = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        self.lower = [self._sgd(self.teacher), self._sgd(self.student)]
        self.upper = torch.optim.Adam(self.arch.parameters(), lr=ADAM, betas=(0.5, 0.999), weight_decay=1e-3)
        self.train, self.labeled = ([self._images() for _ in range(ROUNDS)] for _ in range(2))
        self.unlabeled = [3 * torch.randn(7, 5) for _ in range(ROUNDS)]
        self.validation = [self._images() for _ in range(2 * ROUNDS)]

    def _sgd(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=RATES[0], momentum=MOMENTUM, weight_decay=DECAY)

    def _images(self) -> tuple[Tensor, Tensor]:
        return torch.randn(6, 5), torch.randint(3, (6,))

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for m in (self.arch, self.teacher, self.student) for p in m.parameters()]


def by_mlo(setup: Setup, held: tuple[str, ...] = ("arch",), hypergradient: str = "one_step", rounds: int = ROUNDS):
    def scheduled(optimizer: torch.optim.Optimizer, each: int):
        def factor(step: int) -> float:
            return RATES[min(step // each, ROUNDS - 1)] / RATES[0]

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    teacher = TeacherTrain(
        "teacher",
        module=setup.teacher,
        optimizer=setup.lower[0],
        scheduler=scheduled(setup.lower[0], 1),
        data=setup.train,
        clip_norm=CLIP,
        clip_ahead=False,
    )
    data = {"labeled": Repeated(setup.labeled, 2), "unlabeled": Repeated(setup.unlabeled, 2)}
    student = StudentInTurn(
        "student",
        module=setup.student,
        optimizer=setup.lower[1],
        scheduler=scheduled(setup.lower[1], 2),
        data=data,
        pseudo_weight=LAMBDA,
        clip_norm=CLIP,
        held=held,
    )
    arch = ArchValidate(
        "arch",
        module=setup.arch,
        optimizer=setup.upper,
        data=setup.validation,
        student_weight=GAMMA,
        in_turn=True,
    )
    engine = mlo.Engine([teacher, student, arch], hypergradient, lookahead=True, device="cpu")
    engine.run(rounds)
    return engine


def virtual_step(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], gradients, rate: float):
    """A step of SGD with momentum and weight decay, without clipping, as in the code of DARTS."""
    moved = {}
    for (name, weight), gradient in zip(parameters.items(), gradients, strict=True):
        buffer = optimizer.state[weight].get("momentum_buffer")
        momentum = 0 if buffer is None else MOMENTUM * buffer
        moved[name] = (weight - rate * (momentum + gradient + DECAY * weight)).detach().requires_grad_()
    return moved


def loss_of(module: nn.Module, parameters: dict[str, Tensor], images: Tensor, target: Tensor, *more: Tensor) -> Tensor:
    return F.cross_entropy(torch.func.functional_call(module, parameters, (images, *more)), target)


class ByHand:
    """The authors' round by hand, with exact products: steps of the architecture, then of teacher and student."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.W, self.S = dict(setup.teacher.named_parameters()), dict(setup.student.named_parameters())
        self.A = setup.arch.weights

    def teacher_ahead(self, r: int) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Return W' for the current A, and the gradient of the step, with its graph."""
        images, labels = self.setup.train[r]
        loss = loss_of(self.setup.teacher, self.W, images, labels, self.A)
        gradient = torch.autograd.grad(loss, list(self.W.values()), create_graph=True)
        return virtual_step(self.setup.lower[0], self.W, gradient, RATES[r]), gradient

    def adam(self, gradient: Tensor) -> None:
        self.A.grad = gradient
        self.setup.upper.step()
        self.A.grad = None

    def judged_by_teacher(self, r: int) -> None:
        """Equations (7) and (8)."""
        ahead, gradient = self.teacher_ahead(r)
        images, labels = self.setup.validation[2 * r]
        loss = loss_of(self.setup.teacher, ahead, images, labels, self.A)
        direct, *v = torch.autograd.grad(loss, [self.A, *ahead.values()])
        self.adam(direct - RATES[r] * torch.autograd.grad(gradient, self.A, v)[0])

    def judged_by_student(self, r: int) -> None:
        """Equations (9) to (12): hard labels in the step to S', soft labels in the product."""
        setup, u = self.setup, self.setup.unlabeled[r]
        ahead, gradient = self.teacher_ahead(r)
        soft = torch.func.functional_call(setup.teacher, ahead, (u, self.A.detach())).softmax(1)
        hard = soft.argmax(1)
        assert len(hard.unique()) > 1
        loss = loss_of(setup.student, self.S, *setup.labeled[r]) + LAMBDA * loss_of(setup.student, self.S, u, hard)
        taught = virtual_step(setup.lower[1], self.S, torch.autograd.grad(loss, list(self.S.values())), RATES[r])
        v = torch.autograd.grad(
            GAMMA * loss_of(setup.student, taught, *setup.validation[2 * r + 1]), list(taught.values())
        )
        on_soft = LAMBDA * loss_of(setup.student, self.S, u, soft)
        of_student = torch.autograd.grad(on_soft, list(self.S.values()), create_graph=True)
        q = torch.autograd.grad(of_student, list(ahead.values()), v)
        q = [-RATES[r] * part for part in q]
        self.adam(-RATES[r] * torch.autograd.grad(gradient, self.A, q)[0])

    def real_step(self, optimizer: torch.optim.Optimizer, module: nn.Module, loss: Tensor, rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        assert nn.utils.clip_grad_norm_(module.parameters(), CLIP) > CLIP, "the gradient must be clipped"
        optimizer.step()
        self.A.grad = None

    def round(self, r: int) -> None:
        setup, u = self.setup, self.setup.unlabeled[r]
        self.judged_by_teacher(r)
        self.judged_by_student(r)
        images, labels = setup.train[r]
        self.real_step(setup.lower[0], setup.teacher, loss_of(setup.teacher, self.W, images, labels, self.A), RATES[r])
        soft = setup.teacher(u, self.A).softmax(1).detach()
        taught = LAMBDA * F.cross_entropy(setup.student(u), soft)
        self.real_step(setup.lower[1], setup.student, taught, RATES[r])
        images, labels = setup.labeled[r]
        self.real_step(setup.lower[1], setup.student, F.cross_entropy(setup.student(images), labels), RATES[r])


def test_two_rounds_equal_those_of_the_loop_by_hand():
    one, other = Setup(), Setup()
    initial = one.values()
    by_mlo(one)
    loop = ByHand(other)
    for r in range(ROUNDS):
        loop.round(r)
    for found, expected, start in zip(one.values(), other.values(), initial, strict=True):
        assert not torch.allclose(found, start)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_direct_dependence_of_the_pseudo_labels_can_be_included():
    one, other = Setup(), Setup()
    by_mlo(one)
    by_mlo(other, held=())
    assert not torch.allclose(one.values()[0], other.values()[0])


def test_finite_differences_are_close_to_exact_products():
    one, other = Setup(), Setup()
    by_mlo(one)
    by_mlo(other, hypergradient="darts")
    torch.testing.assert_close(one.values()[0], other.values()[0], rtol=1e-3, atol=0)


def test_the_passes_of_a_round():
    engine = by_mlo(Setup(), hypergradient="darts", rounds=1)
    # read for the pseudo-labels of two virtual steps and a real one, and validated once
    assert engine.passes["teacher"] == {"virtual": 2, "product": 4, "read": 4, "step": 1}
    # two forward passes in each virtual loss: in two virtual steps, and at the two points of a difference
    assert engine.passes["student"] == {"virtual": 4, "product": 4, "read": 1, "step": 2}
    assert engine.pullbacks == {"teacher": 2, "student": 1}


def test_it_resumes_between_rounds():
    one, other = Setup(), Setup()
    engine = by_mlo(one, rounds=1)
    again = by_mlo(other, rounds=0)
    again.load_state_dict(copy.deepcopy(engine.state_dict()))
    engine.step()
    again.step()
    assert same(engine.state_dict(), again.state_dict())


def job(**options: object) -> LbtJob:
    few = ["skip_connect", "avg_pool_3x3", "sep_conv_3x3"]  # which take less time than all
    search = {"channels": 1, "cells": 3, "batch_size": 10, "operations": few}
    data = {"train_size": 40, "validation_size": 50, "unlabeled_size": 60}
    return parse(LbtJob, {"data": data, "device": "cpu", "search": search, "variant": "authors", "steps": 6, **options})


@pytest.fixture
def float32(float64):
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float32")
class TestJob:
    def test_one_option_selects_the_authors_variant(self):
        engine = job().search_engine("lbt")
        teacher, student, arch = engine.problems.values()
        assert isinstance(student, StudentInTurn)
        assert (teacher.steps, student.steps, student.steps_ahead, arch.steps) == (1, 2, 1, 2)
        assert (teacher.clip_norm, student.clip_norm) == (5.0, 5.0)
        assert [level.clip_ahead for level in (teacher, student)] == [False, False]
        assert student.node.held == ("arch",)
        assert engine.report().lookahead
        assert not job(pseudo_label_path="full").search_engine("lbt").problems["student"].node.held
        assert job(hypergradient="one_step").search_engine("lbt").report().lookahead

    def test_both_learning_rates_are_the_teachers_schedule(self):
        engine = job().search_engine("lbt")
        for done in range(6):
            rates = [engine.problems[name].optimizer.param_groups[0]["lr"] for name in ("teacher", "student")]
            expected = 0.001 + 0.049 * (1 + math.cos(math.pi * done / 6)) / 2
            assert rates == pytest.approx([expected, expected])
            assert 0.05 * cosine(done / 6, 0.001 / 0.05) == pytest.approx(expected)
            engine.step()
        (factor,) = engine.problems["student"].scheduler.lr_lambdas
        assert factor(6) == factor(7) != factor(8), "the same in both steps of a round"

    def test_both_student_steps_use_the_batch_of_the_virtual_step(self):
        student = job().search_engine("lbt").problems["student"]
        batches = [student.stream.next() for _ in range(4)]
        for kind, get in (("labeled", lambda b: b[0]), ("unlabeled", lambda b: b[0])):
            images = [get(batch[kind]) for batch in batches]
            assert torch.equal(images[0], images[1])
            assert torch.equal(images[2], images[3])
            assert not torch.equal(images[1], images[2])

    def test_measuring_the_students_part_changes_no_state(self):
        engine = job().search_engine("lbt")
        engine.run(2)
        before = copy.deepcopy(engine.state_dict())
        assert 0 < student_part(engine) < math.inf
        assert engine.problems["arch"].in_turn
        assert same(engine.state_dict(), before)

    @pytest.mark.parametrize("options", [{"judged_by": "student"}, {"student_learns_from": "pseudo_labels"}], ids=str)
    def test_the_ablations_train(self, options):
        engine = job(**options).search_engine("lbt")
        arch = engine.problems["arch"]
        before = arch.module.normal.detach().clone()
        engine.run(2)
        assert arch.steps_taken == (2 if "judged_by" in options else 4)
        assert engine.problems["student"].steps_taken == (4 if "judged_by" in options else 2)
        assert not torch.equal(arch.module.normal, before)

    def test_plain_is_darts_as_in_its_own_code(self):
        engine = job().search_engine("plain")
        assert not engine.problems["teacher"].clip_ahead
        assert engine.problems["arch"].steps == 1
        engine.run(1)

    @pytest.mark.parametrize("options", [{"lookahead": False}, {"teacher_hypergradient": "first_order"}], ids=str)
    def test_incompatible_options_are_errors(self, options):
        with pytest.raises(
            ValueError, match="variant: authors needs lookahead and a hypergradient through the teacher's steps"
        ):
            job(**options)


@pytest.mark.usefixtures("float32")
def test_the_virtual_student_step_uses_hard_labels_with_the_derivative_of_soft_ones():
    teacher, _, arch = noisy_lbt()
    teacher.module.eval()
    module = nn.Linear(5, 3)
    student = StudentInTurn("student", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
    batch = {"unlabeled": torch.randn(6, 5)}
    logits = teacher.module(batch["unlabeled"], arch.module())
    student.looking_ahead = True
    ahead = student.loss(batch, teacher, arch)
    torch.testing.assert_close(ahead, F.cross_entropy(module(batch["unlabeled"]), logits.argmax(1)))
    soft = F.cross_entropy(module(batch["unlabeled"]), logits.softmax(1))
    found, expected = (torch.autograd.grad(loss, teacher.module.head.weight)[0] for loss in (ahead, soft))
    torch.testing.assert_close(found, expected)
