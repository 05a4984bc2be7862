"""Students by name."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from mlo import ConfigError
from problems.search.students import make_student, small_student


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# 3x3 stride-1 stem, no max-pool: the published networks for CIFAR
@pytest.mark.parametrize(
    ("name", "classes", "weights"),
    [
        ("resnet18", 10, 11_173_962),
        ("resnet18", 100, 11_220_132),
        ("resnet50", 10, 23_520_842),
        ("resnet50", 100, 23_705_252),
    ],
)
def test_resnets_for_cifar_have_the_published_weights(name, classes, weights):
    student = make_student(name, 3, classes, 32)
    assert count(student) == weights
    assert student.conv1.stride == (1, 1)
    features = student.layer1(student.maxpool(student.relu(student.bn1(student.conv1(torch.randn(2, 3, 32, 32))))))
    assert features.shape[2:] == (32, 32)
    fan_out = 9 * 64
    assert student.conv1.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_a_resnet_for_large_images_keeps_its_stem():
    student = make_student("resnet18", 3, 1000, 96)
    assert count(student) == 11_689_512
    assert student.conv1.stride == (2, 2)


@pytest.mark.parametrize("name", ["small", "small_wide", "resnet18", "mobilenet_v3_small", "googlenet"])
@pytest.mark.parametrize("channels", [1, 4])
def test_students_take_other_channels(name, channels):
    size = 64 if name == "googlenet" else 32
    student = make_student(name, channels, 7, size)
    assert student(torch.randn(2, channels, size, size)).shape == (2, 7)
    assert all(p.grad_fn is None and p.requires_grad for p in student.parameters())


def test_a_first_convolution_of_other_channels_keeps_the_size_of_its_outputs():
    three, one = (make_student("resnet18", channels, 10, 32).conv1 for channels in (3, 1))
    ratio = one(torch.randn(9, 1, 32, 32)).std() / three(torch.randn(9, 3, 32, 32)).std()
    assert ratio.item() == pytest.approx(1, rel=0.15)
    assert one.weight.std().item() == pytest.approx(3**0.5 * three.weight.std().item(), rel=0.15)


def test_small_students_take_small_images():
    assert count(small_student(1, 10)) == count(make_student("small", 1, 10, 8)) == 24_058
    wide = make_student("small_wide", 1, 10, 8)
    assert 14 < count(wide) / 24_058 < 17


@pytest.fixture
def own(monkeypatch):
    module = types.ModuleType("own_students")
    module.good = lambda image_channels, classes: nn.Sequential(
        nn.Dropout(), nn.Flatten(), nn.Linear(64 * image_channels, classes)
    )
    module.wrong = lambda image_channels, classes: "a network"
    module.narrow = lambda image_channels, classes: nn.Sequential(nn.Flatten(), nn.Linear(64 * image_channels, 3))
    monkeypatch.setitem(sys.modules, "own_students", module)


@pytest.mark.usefixtures("own")
def test_a_student_of_ones_own():
    torch.manual_seed(0)
    student = make_student("own_students:good", 2, 5, 8)
    after = torch.rand(())
    assert student[2].weight.shape == (5, 128)
    torch.manual_seed(0)
    nn.Linear(128, 5)
    assert torch.equal(torch.rand(()), after)  # trying it changes no random state


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "'resnet81' is not known as a student; did you mean resnet"),
        ("smal", "did you mean small.*package.module:callable"),
        ("own_students:wrong", "returned str; return a torch.nn.Module"),
        ("own_students:narrow", r"returned \(2, 3\) for two images.*return logits of shape \(2, 10\)"),
        ("own_students:absent", "cannot be imported.*installed or on PYTHONPATH"),
        ("math:sqrt", r"called with \(image_channels, classes\) = \(3, 10\), raised TypeError: .*takes these two"),
        ("math:pi", "raised TypeError: 'float' object is not callable"),
        ("no_such_package:make", "No module named 'no_such_package'"),
        ("alexnet", "does not accept images of 3x8x8.*choose another student or data.image_size"),
    ],
)
def test_students_that_cannot_be(name, message):
    with pytest.raises(ConfigError, match=message):
        make_student(name, 3, 10, 8)


def test_trying_a_student_leaves_its_statistics_alone():
    student = make_student("small", 1, 10, 8)
    assert student[1].num_batches_tracked == 0
    assert student.training
