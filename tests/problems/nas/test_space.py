"""Search spaces as data."""

import pytest
import torch

from problems.nas import DARTS, OPERATIONS, ArchitectureLogits, Edge, SearchSpace


def test_darts_has_fourteen_edges_by_node_then_source_and_eight_operations():
    assert DARTS.edges[:6] == (Edge(0, 0), Edge(1, 0), Edge(0, 1), Edge(1, 1), Edge(2, 1), Edge(0, 2))
    assert len(DARTS.edges) == 14
    assert DARTS.edges[-1] == Edge(source=4, node=3)
    assert DARTS.operations == OPERATIONS
    assert OPERATIONS == (
        "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
        "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5",
    )  # fmt: skip


def test_every_fault_of_a_space_is_told_at_once():
    with pytest.raises(ValueError, match="nearest is 'skip_connect'") as error:
        SearchSpace(("skip_conect", "max_pool_3x3", "max_pool_3x3"), nodes=0)
    assert "named twice" in str(error.value)
    assert "at least 1 node" in str(error.value)
    with pytest.raises(ValueError, match="other than 'none'"):
        SearchSpace(("none",))


def test_logits_of_another_space_are_refused_by_cell():
    with pytest.raises(ValueError, match=r"reduce cell: .* \(14, 7\), but this space has 14 edges and 8 operations"):
        DARTS.check(ArchitectureLogits(torch.zeros(14, 8), torch.zeros(14, 7)))
