"""The student networks: small ones of our own, torchvision's, or the user's."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from mlo import ConfigError
from mlo.options import registry

SMALL_IMAGES = 64  # up to this side, a ResNet gets the stem for CIFAR
WITHOUT_AUXILIARY = {"aux_logits": False, "init_weights": True}
OPTIONS: dict[str, dict[str, Any]] = {"googlenet": WITHOUT_AUXILIARY, "inception_v3": WITHOUT_AUXILIARY}


def make_student(name: str, image_channels: int, classes: int, image_size: int) -> nn.Module:
    """A new network that maps images (N, image_channels, image_size, image_size) to logits (N, classes).

    Args:
        name: "small" (24,000 weights), "small_wide" (four times as wide), the name of a classification network of
            torchvision (untrained), or "package.module:callable", which is called as callable(image_channels,
            classes). "resnet18" and "resnet50" are the paper's students. For images of up to 64x64, torchvision's
            ResNets get the usual stem for CIFAR: one 3x3 convolution, without pooling.
        image_channels: channels of the images.
        classes: number of classes.
        image_size: side of the images, in pixels.

    Raises:
        ConfigError: if there is no such network, if the callable does not return a module, or if the network does not
            return logits for such images (tested on two black images).
    """
    if ":" in name:
        module = _own(name, image_channels, classes)
    elif name in WIDTHS:
        module = _convolutions(image_channels, classes, WIDTHS[name])
    elif name in (valid := torchvision.models.list_models(module=torchvision.models)):
        module = torchvision.models.get_model(name, weights=None, num_classes=classes, **OPTIONS.get(name, {}))
        if isinstance(module, torchvision.models.ResNet) and image_size <= SMALL_IMAGES:
            _small_stem(module)
        _take_channels(module, image_channels)
    else:
        raise ConfigError(
            f"{registry.unknown(name, [*WIDTHS, *valid], 'as a student')}; or write package.module:callable"
        )
    _try_on_zeros(name, module, image_channels, classes, image_size)
    return module


def small_student(image_channels: int, classes: int) -> nn.Module:
    """A three-layer convolutional network of about 24,000 weights, from images of 8x8 or larger to (N, classes)."""
    return _convolutions(image_channels, classes, WIDTHS["small"])


WIDTHS = {"small": 16, "small_wide": 64}


def _convolutions(image_channels: int, classes: int, width: int) -> nn.Module:
    """Three convolutions of ``width``, 2 ``width`` and 4 ``width`` channels, the second with stride 2."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(image_channels, width, 1), *block(width, 2 * width, 2), *block(2 * width, 4 * width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def _small_stem(network: torchvision.models.ResNet) -> None:
    """The stem of ResNets on CIFAR: a 3x3 convolution of stride 1, and no pooling."""
    network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own
    network.maxpool = nn.Identity()


def _take_channels(network: nn.Module, channels: int) -> None:
    """Change the first convolution to ``channels`` inputs, with normal weights that keep the scale of its outputs."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    if first.in_channels != channels:
        outputs, inputs, *kernel = first.weight.shape
        deviation = first.weight.std() * (inputs / channels) ** 0.5
        first.in_channels = channels
        first.weight = nn.Parameter(torch.randn(outputs, channels, *kernel) * deviation.detach())


def _own(name: str, image_channels: int, classes: int) -> nn.Module:
    """The module that a user's callable returns."""
    path, _, attribute = name.partition(":")
    try:
        make = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"student {name!r} cannot be imported ({error}); write package.module:callable, and make sure that the "
            "package is installed or on PYTHONPATH"
        ) from error
    try:
        module = make(image_channels, classes)
    except Exception as error:
        raise ConfigError(
            f"student {name!r}, called with (image_channels, classes) = ({image_channels}, {classes}), raised "
            f"{type(error).__name__}: {error}; give a callable that takes these two numbers and returns a "
            "torch.nn.Module"
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"student {name!r} returned {type(module).__name__}; return a torch.nn.Module that maps images "
            f"(N, {image_channels}, H, W) to logits (N, {classes})"
        )
    return module


def _try_on_zeros(name: str, module: nn.Module, image_channels: int, classes: int, image_size: int) -> None:
    """Check a copy of the module on two black images, in training mode; module and random state do not change."""
    images = torch.zeros(2, image_channels, image_size, image_size)
    what = f"images of {image_channels}x{image_size}x{image_size}"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            logits = copy.deepcopy(module).train()(images)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise ConfigError(
                f"student {name!r} does not accept {what} ({error}); choose another student or data.image_size"
            ) from error
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"student {name!r} returned {found} for two {what}; return logits of shape (2, {classes}) for two images"
        )
