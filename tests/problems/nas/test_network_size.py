"""Network sizes: they equal the published ones, and counting does not change the network."""

import pytest
import torch
from torch import nn

from problems.nas import NOISE, PUBLISHED, Choice, EvaluationNetwork, Genotype, NetworkSize, size_of

IMAGENET = {"channels": 48, "cells": 14, "classes": 1000, "stem": "imagenet"}
SIZES = {
    "DARTS_V1": (3_169_414, 3_221_344, 500_987_520, 4_510_432, 505_864_704),
    "DARTS_V2": (3_349_342, 3_401_272, 528_359_040, 4_718_752, 529_911_552),
    "PDARTS": (3_433_798, 3_485_728, 532_174_464, 4_944_352, 542_819_328),
    "PC_DARTS_cifar": (3_634_678, 3_686_608, 556_670_592, 5_270_560, 571_137_408),
    "PC_DARTS_image": (3_721_510, 3_773_440, 570_466_944, 5_342_464, 581_627_328),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    cifar10, cifar100, cifar, imagenet, imagenet_multiply_adds = SIZES[name]
    with torch.device("meta"):
        assert size_of(EvaluationNetwork(PUBLISHED[name])) == NetworkSize(cifar10, cifar)
        assert sum(p.numel() for p in EvaluationNetwork(PUBLISHED[name], classes=100).parameters()) == cifar100
        network = EvaluationNetwork(PUBLISHED[name], **IMAGENET)
        assert size_of(network, (3, 224, 224)) == (imagenet, imagenet_multiply_adds)


def test_the_auxiliary_head_does_not_count():
    with torch.device("meta"):
        without = EvaluationNetwork(PUBLISHED["DARTS_V2"], 8, 3)
        network = EvaluationNetwork(PUBLISHED["DARTS_V2"], 8, 3, auxiliary=True)
    assert size_of(network.train()) == size_of(without)
    assert network.auxiliary is not None


def test_counting_does_not_change_the_network():
    torch.manual_seed(0)
    network = EvaluationNetwork(PUBLISHED["DARTS_V2"], 4, 3, image_channels=1, auxiliary=True)
    network.cells[0].eval()
    modes = [module.training for module in network.modules()]
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in network.state_dict(keep_vars=True).items()}
    random = torch.get_rng_state()
    counts = size_of(network, (1, 64, 48))
    after = network.state_dict(keep_vars=True)
    assert all(after[name] is tensor and torch.equal(tensor, old) for name, (tensor, old) in before.items())
    assert modes == [module.training for module in network.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert counts.parameters == sum(p.numel() for n, p in network.named_parameters() if "auxiliary" not in n)


def test_multiply_adds_of_a_small_network_computed_by_hand():
    network = nn.Sequential(nn.Conv2d(2, 6, 3, stride=2, padding=1, groups=2), nn.Flatten(), nn.Linear(6 * 4 * 5, 7))
    assert size_of(network, (2, 8, 10)) == (6 * 9 + 6 + 7 * 121, 6 * 9 * 4 * 5 + 7 * 120)


def test_noise_takes_no_multiply_adds():
    cell = tuple((Choice(NOISE, 0), Choice(NOISE, 1)) for _ in range(4))
    network = EvaluationNetwork(Genotype(normal=cell, reduce=cell), 4, 1, image_channels=1)
    assert size_of(network, (1, 8, 8)).multiply_adds == 64 * (9 * 12 + 2 * 12 * 8) + 32 * 10


@pytest.mark.parametrize("shape", [(32, 32), (3, 0, 32)])
def test_invalid_image_shapes_are_rejected(shape):
    with pytest.raises(ValueError, match=r"\(channels, height, width\)"):
        size_of(nn.Identity(), shape)
