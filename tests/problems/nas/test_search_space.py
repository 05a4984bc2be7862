"""Search spaces: edges, validation, mixtures, and the narrowing of P-DARTS."""

import math

import pytest
import torch

from problems.nas import DARTS, OPERATIONS, P_DARTS, PC_DARTS, Architecture, ArchitectureLogits, Edge, SearchSpace


def test_darts_has_fourteen_edges_by_node_then_source_and_eight_operations():
    assert DARTS.edges[:6] == (Edge(0, 0), Edge(1, 0), Edge(0, 1), Edge(1, 1), Edge(2, 1), Edge(0, 2))
    assert len(DARTS.edges) == 14
    assert DARTS.edges[-1] == Edge(source=4, node=3)
    assert DARTS.operations == OPERATIONS
    assert OPERATIONS == (
        "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
        "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5",
    )  # fmt: skip


def test_all_errors_of_a_space_are_listed_at_once():
    with pytest.raises(ValueError, match="nearest is 'skip_connect'") as error:
        SearchSpace(("skip_conect", "max_pool_3x3", "max_pool_3x3"), nodes=0)
    assert "named twice" in str(error.value)
    assert "at least 1 node" in str(error.value)
    with pytest.raises(ValueError, match="other than 'none'"):
        SearchSpace(("none",))


def test_logits_of_another_space_are_rejected():
    with pytest.raises(ValueError, match=r"reduce cell: .* \(14, 7\), but this space has 14 edges and 8 operations"):
        DARTS.check(ArchitectureLogits(torch.zeros(14, 8), torch.zeros(14, 7)))
    with pytest.raises(ValueError, match="14 edges and 8 operations and edge weights"):
        PC_DARTS.check(Architecture(DARTS)())


def test_errors_in_the_operations_of_edges():
    some = (("skip_connect",),) * 13
    with pytest.raises(ValueError, match="normal lists operations for 13 edges, but the cell has 14") as error:
        SearchSpace(OPERATIONS, normal=some, reduce=(*some, ("none",)))
    assert "reduce, edge 13: needs an operation other than 'none'" in str(error.value)
    with pytest.raises(ValueError, match="reduce, edge 13: sep_conv_3x3 not in the operations"):
        SearchSpace(("skip_connect",), reduce=(*some, ("skip_connect", "sep_conv_3x3")))
    with pytest.raises(ValueError, match="partial must be at least 1, not 0; max_skips must be at least 0, not -1"):
        SearchSpace(OPERATIONS, partial=0, max_skips=-1)
    with pytest.raises(ValueError, match="valid: normal, reduce"):
        DARTS.choices("reduction")


def test_edge_weights_are_a_softmax_within_each_node_and_multiply_operations():
    logits = torch.zeros(14, 9)
    logits[0, 8], logits[4, 8] = math.log(3), math.log(2)  # the first of node 0's two edges, the last of node 1's three
    logits[4, 2] = math.log(9)
    operations, edges = PC_DARTS.mixture("normal", logits)
    expected = torch.tensor([3 / 4, 1 / 4, 1 / 4, 1 / 4, 1 / 2, *[1 / 4] * 4, *[1 / 5] * 5])
    torch.testing.assert_close(edges, expected)
    torch.testing.assert_close(operations.sum(dim=1), expected)
    torch.testing.assert_close(operations[4], torch.tensor([1, 1, 9, 1, 1, 1, 1, 1]) / 32)


def test_dropped_operations_have_weight_zero():
    choices = (("skip_connect", "sep_conv_3x3"),) * 14
    logits = torch.zeros(14, 8).requires_grad_()
    operations, edges = SearchSpace(OPERATIONS, normal=choices).mixture("normal", logits)
    assert edges is None
    assert torch.equal(operations, torch.tensor([0, 0, 0, 0.5, 0.5, 0, 0, 0]).expand(14, 8))
    (gradient,) = torch.autograd.grad(operations[:, 3].sum(), logits)
    assert gradient[0].nonzero().flatten().tolist() == [3, 4]


def test_narrowing_drops_the_weakest_operations_of_each_edge_in_each_stage():
    """8 operations, then 5, 3 and 1; each stage chooses among those that the previous one has left."""
    columns = torch.arange(8.0)
    first = P_DARTS.narrow(ArchitectureLogits(columns.expand(14, 8), (-columns).expand(14, 8)), 3)
    assert first.choices("normal") == (OPERATIONS[3:],) * 14
    assert first.choices("reduce") == (OPERATIONS[:5],) * 14
    assert first.max_skips == 2
    logits = torch.zeros(14, 8)
    logits[:, :3] = 9.0  # already dropped from the normal cell, so their logits do not matter
    logits[2, 3:] = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0])
    second = first.narrow(ArchitectureLogits(logits, logits), 2)
    assert second.choices("normal")[2] == ("sep_conv_3x3", "dil_conv_3x3", "dil_conv_5x5")
    assert second.choices("normal")[0] == OPERATIONS[5:]  # of equal weights the first go
    assert second.choices("reduce")[0] == OPERATIONS[:3]
    logits[0, 0] = 20.0
    last = second.narrow(ArchitectureLogits(logits, logits), 2)
    assert last.choices("normal")[2] == ("sep_conv_3x3",)
    assert last.choices("reduce")[0] == ("avg_pool_3x3",)  # not "none", which is the strongest


def test_narrowing_must_leave_an_operation():
    with pytest.raises(
        ValueError, match=r"cannot drop 8 operations from an edge that has 8 \(none, max_pool_3x3.*; drop at most 7"
    ):
        DARTS.narrow(Architecture()(), 8)
    with pytest.raises(ValueError, match="shape"):
        DARTS.narrow(Architecture(PC_DARTS)(), 3)
