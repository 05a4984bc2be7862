"""The noise operation: on an edge, in the supernet, in genotypes and their networks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import mlo
from benchmarks.edge_by_edge import EdgeByEdge, load_edges
from problems.evaluation.training import TrainNetwork
from problems.nas import (
    DARTS,
    NOISE,
    OPERATIONS,
    PC_DARTS,
    PUBLISHED,
    ROBUST_S4,
    Architecture,
    ArchitectureLogits,
    Choice,
    EvaluationNetwork,
    Genotype,
    SearchSpace,
    Supernet,
    derive,
    draw_cell,
    random_genotype,
)
from problems.nas.cell_edges import GroupedEdges
from problems.nas.evaluation_network import GenotypeEdge
from problems.nas.operations import make_operation
from problems.nas.skeleton import CellPlan

WITH_NOISE = SearchSpace((*OPERATIONS, NOISE))


def images(count=4, channels=2, size=8):
    return torch.randn(count, channels, size, size)


def test_the_darts_space_has_no_noise():
    assert DARTS.operations == OPERATIONS
    assert OPERATIONS == (
        "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
        "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5",
    )  # fmt: skip
    assert ROBUST_S4.operations == ("sep_conv_3x3", "noise")


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_noise_is_standard_normal_drawn_at_each_call_and_independent_of_its_input(stride, train):
    torch.manual_seed(0)
    operation = make_operation(NOISE, 8, stride, affine=True).train(train)
    features = torch.full((50, 8, 17, 15), 7.0)
    noise = operation(features)
    assert noise.shape == (50, 8, -(-17 // stride), -(-15 // stride))
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    assert not torch.equal(noise, operation(features))
    assert operation(features.double()).dtype == torch.float64
    assert not [*operation.parameters()]


@pytest.mark.parametrize("stride", [1, 2])
def test_each_edge_from_one_state_has_its_own_noise_times_its_weight(stride):
    torch.manual_seed(0)
    group = GroupedEdges(
        {1: ("sep_conv_3x3", NOISE), 2: ("sep_conv_3x3",), 4: (NOISE,)}, ROBUST_S4.operations, 4, stride
    )
    weights = torch.zeros(5, 2)
    weights[1, 1], weights[2, 1], weights[4, 1] = 0.5, 100.0, 2.0  # edge 2 has no noise
    state = torch.zeros(100, 4, 9, 9)
    first, without, second = (sum(terms).detach() for terms in group(state, weights, 0.0))
    assert first.shape == second.shape == (100, -(-9 // stride), -(-9 // stride), 4)
    assert not without.any()
    for edge, weight in ((first, 0.5), (second, 2.0)):
        assert abs(edge.mean()) < 4 * weight / edge.numel() ** 0.5
        assert edge.std().item() == pytest.approx(weight, rel=4 / edge.numel() ** 0.5)
    correlation = (first * second).mean()
    assert abs(correlation) < 4 / first.numel() ** 0.5


def test_only_the_weight_of_noise_gets_a_gradient():
    torch.manual_seed(0)
    group = GroupedEdges({0: (NOISE,)}, (NOISE,), 3, 1)
    state, weights = images(2, 3).requires_grad_(), torch.ones(1, 1, requires_grad=True)
    ((output,),) = group(state, weights, 0.0)
    to_state, to_weight = torch.autograd.grad(output.square().sum(), [state, weights], allow_unused=True)
    assert to_state is None
    assert to_weight.item() == pytest.approx(2 * output.square().sum().item(), rel=1e-5)


def test_noise_of_weight_zero_changes_nothing():
    """The output equals that of the supernet of the space without noise, with the same weights."""
    torch.manual_seed(0)
    noisy = Supernet(WITH_NOISE, 4, 3, image_channels=2)
    plain = Supernet(DARTS, 4, 3, image_channels=2)
    plain.load_state_dict(noisy.state_dict())
    kinds = [torch.randn(14, 9) for _ in range(2)]
    for matrix in kinds:
        matrix[:, 8] = float("-inf")
    batch = images()
    without = plain(batch, ArchitectureLogits(*(matrix[:, :8] for matrix in kinds)))
    torch.testing.assert_close(noisy(batch, ArchitectureLogits(*kinds)), without, rtol=1e-4, atol=1e-5)


SPACES = {
    "S4": ROBUST_S4,
    "DARTS and noise": WITH_NOISE,
    "PC-DARTS": replace(PC_DARTS, operations=(*OPERATIONS, NOISE)),
    "some edges": replace(ROBUST_S4, normal=(("sep_conv_3x3", NOISE), ("sep_conv_3x3",)) * 7),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_supernet_equals_the_one_edge_by_edge_given_the_same_noise(space, monkeypatch):
    """Values, gradients and Hessian-vector products, with `torch.randn` replaced by the same pattern for both."""

    def pattern(*shape, **options):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        height, width, channels = shape[-3:] if len(shape) == 5 else (shape[2], shape[3], shape[1])
        pixels = torch.arange(height * width * channels, **options).view(height, width, channels).sin()
        return pixels.expand(shape) if len(shape) == 5 else pixels.permute(2, 0, 1).expand(shape)

    torch.manual_seed(0)
    ours = Supernet(space, 8, 3, image_channels=2)
    theirs = EdgeByEdge(space, 8, 3, image_channels=2)
    load_edges(theirs, ours)
    batch, matrices, tangents = images(size=7), torch.randn(2, *space.shape), [*torch.randn(2, *space.shape)]
    monkeypatch.setattr(torch, "randn", pattern)
    found = []
    for net in (ours, theirs):
        logits = [matrix.clone().requires_grad_() for matrix in matrices]
        loss = F.cross_entropy(net(batch, ArchitectureLogits(*logits)), torch.arange(4))
        gradient = torch.autograd.grad(loss, logits, create_graph=True)
        product = torch.autograd.grad(gradient, logits, tangents)
        found.append([loss.detach(), *gradient, *product])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_noise_comes_from_the_global_generator():
    torch.manual_seed(0)
    net, logits, batch = Supernet(ROBUST_S4, 4, 2, image_channels=2), Architecture(ROBUST_S4)(), images()
    state = torch.get_rng_state()
    first, other = net(batch, logits), net(batch, logits)
    torch.set_rng_state(state)
    assert torch.equal(net(batch, logits), first)
    assert not torch.equal(first, other)


def noise_everywhere():
    cell = tuple((Choice(NOISE, 0), Choice(NOISE, 1)) for _ in range(4))
    return Genotype(normal=cell, reduce=cell)


def test_genotypes_may_contain_noise(tmp_path):
    matrix = torch.zeros(14, 2)
    matrix[:, 1] = 1.0
    genotype = derive(ROBUST_S4, ArchitectureLogits(matrix, matrix))
    assert genotype == noise_everywhere()
    genotype.save(tmp_path / "genotype.json")
    assert Genotype.load(tmp_path / "genotype.json") == genotype
    drawn = [random_genotype(ROBUST_S4, torch.Generator().manual_seed(seed)) for seed in range(8)]
    operations = [choice.operation for genotype in drawn for node in genotype.normal for choice in node]
    assert set(operations) == {"sep_conv_3x3", NOISE}
    with pytest.raises(ValueError, match="'noize' is not an operation; the nearest is 'noise'"):
        SearchSpace(("noize", "sep_conv_3x3"))


def test_cells_with_noise_can_be_drawn():
    (axes,) = draw_cell(noise_everywhere(), "reduce").axes
    assert [text.get_text() for text in axes.texts].count(NOISE) == 8


def test_drop_path_applies_to_noise():
    torch.manual_seed(0)
    edge = GenotypeEdge(Choice(NOISE, 0), CellPlan((4, 4), 4, True, follows_reduction=False))
    output = edge([torch.zeros(400, 4, 5, 5)], 0.5)
    assert output.shape == (400, 4, 3, 3)
    kept = output.flatten(1).any(1)
    assert 160 < kept.sum() < 240
    assert output[kept].std().item() == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("genotype", [noise_everywhere(), PUBLISHED["DARTS_V2"]], ids=["noise", "DARTS"])
def test_a_network_with_noise_can_be_trained(genotype):
    torch.manual_seed(0)
    if genotype != noise_everywhere():
        first = ((Choice(NOISE, 0), Choice(NOISE, 1)), *genotype.normal[1:])
        genotype = Genotype(normal=first, reduce=genotype.reduce)
    network = EvaluationNetwork(genotype, 4, 3, image_channels=2)
    problem = TrainNetwork(
        "network",
        module=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
        data=[(images(), torch.arange(4))],
        total_steps=2,
        drop_path=0.2,
    )
    before = network.classifier.weight.detach().clone()
    engine = mlo.Engine([problem], device="cpu")
    engine.run(2)
    assert not torch.equal(network.classifier.weight, before)
    assert engine.losses["network"].isfinite()
