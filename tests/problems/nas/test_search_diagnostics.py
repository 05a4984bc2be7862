"""Diagnostics of a search: derived operations, entropy, the Hessian's dominant eigenvalue, early stopping."""

import math

import pytest
import torch
from torch.autograd.functional import hessian

from problems.nas import (
    DARTS,
    P_DARTS,
    PC_DARTS,
    ROBUST_S4,
    Architecture,
    ArchitectureLogits,
    SearchSpace,
    Supernet,
    architecture_loss,
    count_operations,
    count_skips,
    dominant_eigenvalue,
    entropy,
)


def test_operations_of_the_derived_genotype_are_counted():
    normal, reduce = torch.zeros(14, 8), torch.zeros(14, 8)
    normal[:, DARTS.operations.index("sep_conv_3x3")] = 1.0
    normal[[0, 1, 2], DARTS.operations.index("skip_connect")] = 2.0  # both inputs of node 0, the first of node 1
    normal[:, 0] = 3.0
    logits = ArchitectureLogits(normal, reduce)
    assert count_skips(DARTS, logits) == 3
    assert count_skips(P_DARTS, logits) == 2
    assert count_operations(DARTS, logits) == {"skip_connect": 3, "sep_conv_3x3": 5}
    assert count_operations(DARTS, logits, "reduce") == {"max_pool_3x3": 8}
    assert count_operations(DARTS, logits)["noise"] == 0
    with pytest.raises(ValueError, match="valid: normal, reduce"):
        count_operations(DARTS, logits, "reduction")


def test_entropy_is_the_mean_over_edges_relative_to_equal_weights():
    normal = torch.zeros(14, 8)
    normal[0] = torch.tensor([0.5, 0.25, 0.25, *[1e-30] * 5]).log()
    reduce = torch.full((14, 8), -1e4)
    reduce[:, 3] = 0.0
    found = entropy(DARTS, ArchitectureLogits(normal.requires_grad_(), reduce))
    assert found["normal"].item() == pytest.approx((13 + 1.5 * math.log(2) / math.log(8)) / 14)
    assert found["reduce"].item() == 0
    assert not found["normal"].requires_grad
    with pytest.raises(ValueError, match=r"normal cell: .* shape"):
        entropy(ROBUST_S4, ArchitectureLogits(normal, reduce))


def test_entropy_uses_the_operations_of_each_edge_and_ignores_edge_weights():
    few = (("none", "skip_connect"), ("sep_conv_3x3",)) + (DARTS.operations,) * 12
    found = entropy(SearchSpace(DARTS.operations, normal=few), ArchitectureLogits(*torch.zeros(2, 14, 8)))
    assert found["normal"].item() == pytest.approx(13 / 14)
    assert found["reduce"].item() == pytest.approx(1)
    matrix = torch.zeros(14, 9)
    matrix[:, 8] = torch.arange(14)
    assert entropy(PC_DARTS, ArchitectureLogits(matrix, matrix))["normal"].item() == pytest.approx(1)


def small(space, **options):
    torch.manual_seed(0)
    net = Supernet(space, channels=4, cells=3, classes=4, image_channels=2)
    net.skip_dropout = options.get("skip_dropout", 0.0)
    loss = architecture_loss(net, torch.randn(6, 2, 8, 8), torch.arange(6) % 4)
    return net, loss, ArchitectureLogits(*torch.randn(2, *space.shape))


def exact_eigenvalues(loss, logits):
    size = logits.normal.numel()

    def of_vector(vector):
        return loss(ArchitectureLogits(vector[:size].view_as(logits.normal), vector[size:].view_as(logits.reduce)))

    return torch.linalg.eigvalsh(hessian(of_vector, torch.cat([matrix.flatten() for matrix in logits])))


TWO_NODES = SearchSpace(("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"), nodes=2)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("space", "skip_dropout"),
    [(TWO_NODES, 0.0), (TWO_NODES, 0.3), (SearchSpace(("sep_conv_3x3", "noise"), nodes=2), 0.0)],
    ids=["DARTS", "dropout", "noise"],
)
def test_the_dominant_eigenvalue_is_that_of_the_whole_hessian(space, skip_dropout, train):
    net, loss, logits = small(space, skip_dropout=skip_dropout)
    net.train(train)
    exact = exact_eigenvalues(loss, logits)
    assert exact[-1] > 1.01 * exact[-2] > 0
    assert dominant_eigenvalue(loss, logits, tolerance=1e-12) == pytest.approx(exact[-1].item(), rel=1e-10)
    assert dominant_eigenvalue(loss, logits) == pytest.approx(exact[-1].item(), rel=1e-2)


@pytest.mark.usefixtures("float64")
def test_it_is_the_largest_in_value_not_in_magnitude():
    def loss(logits):
        return (logits.normal.square() * torch.tensor([0.5, -4.0])).sum() + 1.5 * logits.reduce.square().sum() / 2

    logits = ArchitectureLogits(torch.zeros(5, 2), torch.zeros(5, 2))
    assert dominant_eigenvalue(loss, logits) == pytest.approx(1.5)


def test_diagnostics_change_neither_supernet_nor_random_state():
    net, loss, logits = small(ROBUST_S4)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random, numbers = torch.get_rng_state(), logits.normal.clone()
    first = dominant_eigenvalue(loss, logits)
    assert dominant_eigenvalue(loss, logits) == first
    assert loss(logits) == loss(logits)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(logits.normal, numbers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_loss_uses_the_current_weights():
    net, loss, logits = small(DARTS)
    before = loss(logits)
    with torch.no_grad():
        net.classifier.bias[0] += 1
    assert loss(logits) != before
    parameters = Architecture()()
    assert loss(parameters).requires_grad
    assert not torch.autograd.grad(loss(parameters), net.classifier.bias, allow_unused=True)[0]


def test_flat_and_linear_losses_have_eigenvalue_zero():
    logits = ArchitectureLogits(*torch.zeros(2, 14, 8))
    assert dominant_eigenvalue(lambda given: given.normal.sum(), logits) == 0
    assert dominant_eigenvalue(lambda given: 0 * given.normal.square().sum(), logits) == 0


def test_eigenvalues_that_cannot_be_computed_are_errors():
    logits = ArchitectureLogits(*torch.ones(2, 14, 8))
    with pytest.raises(ValueError, match="does not depend on the architecture logits"):
        dominant_eigenvalue(lambda given: logits.normal.sum(), logits)
    with pytest.raises(ValueError, match="loss is nan"):
        dominant_eigenvalue(lambda given: given.normal.square().sum() * float("nan"), logits)
    scale = torch.linspace(1, 1.001, 112).view(14, 8)
    with pytest.raises(RuntimeError, match="did not converge to a relative error of 1e-09 in 1 iterations; increase"):
        dominant_eigenvalue(lambda given: (given.normal.square() * scale).sum(), logits, 1e-9, iterations=1)
