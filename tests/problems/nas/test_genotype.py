"""Genotypes: validation, JSON files, derivation from logits, random genotypes."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from problems.nas import (
    DARTS,
    P_DARTS,
    PC_DARTS,
    PUBLISHED,
    ArchitectureLogits,
    Choice,
    Genotype,
    SearchSpace,
    derive,
    random_genotype,
)

OPERATION = {name: column for column, name in enumerate(DARTS.operations)}
ROW = {(edge.source, edge.node): row for row, edge in enumerate(DARTS.edges)}


def logits_of(**cells):
    """Logits that are zero except cells[kind][source, node, operation] = value."""
    matrices = {kind: torch.zeros(14, 8) for kind in ("normal", "reduce")}
    for kind, entries in cells.items():
        for (source, node, operation), value in entries.items():
            matrices[kind][ROW[source, node], OPERATION[operation]] = value
    return ArchitectureLogits(**matrices)


def test_derivation_keeps_the_two_strongest_edges_with_their_best_operation():
    reduce = {
        (1, 0, "sep_conv_5x5"): 2.0,
        (0, 0, "dil_conv_3x3"): 1.0,
        (0, 1, "skip_connect"): 1.0,
        (0, 1, "avg_pool_3x3"): 0.5,
        (1, 1, "sep_conv_3x3"): -1.0,
        (2, 1, "dil_conv_5x5"): 3.0,
        (3, 2, "sep_conv_3x3"): 1.5,
        (1, 2, "max_pool_3x3"): 1.0,
        (2, 2, "sep_conv_5x5"): 0.9,
        (4, 3, "avg_pool_3x3"): 2.0,
        (2, 3, "dil_conv_3x3"): 2.5,
        (0, 3, "dil_conv_3x3"): 1.9,
    }
    assert derive(DARTS, logits_of(reduce=reduce)).reduce == (
        (Choice("sep_conv_5x5", 1), Choice("dil_conv_3x3", 0)),
        (Choice("dil_conv_5x5", 2), Choice("skip_connect", 0)),
        (Choice("sep_conv_3x3", 3), Choice("max_pool_3x3", 1)),
        (Choice("dil_conv_3x3", 2), Choice("avg_pool_3x3", 4)),
    )


def test_ties_go_to_the_first_operation_and_the_lower_source():
    genotype = derive(DARTS, logits_of(normal={(0, 3, "none"): 1.0}))
    assert genotype.normal[:3] == ((Choice("max_pool_3x3", 0), Choice("max_pool_3x3", 1)),) * 3
    assert genotype.normal[3] == (Choice("max_pool_3x3", 1), Choice("max_pool_3x3", 2))


def test_none_is_never_chosen_but_weakens_its_edge():
    """A large logit of "none" lowers the softmax weight of the best operation of the same edge."""
    normal = {(0, 1, "none"): 5.0, (0, 1, "sep_conv_3x3"): 2.0, (2, 1, "dil_conv_3x3"): 0.5}
    normal |= {(source, 2, "none"): 9.0 for source in range(4)} | {(3, 2, "skip_connect"): 1.0}
    cell = derive(DARTS, logits_of(normal=normal)).normal
    assert cell[1] == (Choice("dil_conv_3x3", 2), Choice("max_pool_3x3", 1))
    assert cell[2] == (Choice("skip_connect", 3), Choice("max_pool_3x3", 0))


def test_the_strength_of_an_edge_is_the_product_of_both_weights():
    """PC-DARTS: the edge from 0 has the strongest operation of node 1, but then a small edge weight."""
    matrix = torch.zeros(14, 9)
    matrix[ROW[0, 1], OPERATION["sep_conv_5x5"]] = 3.0
    matrix[ROW[1, 1], OPERATION["sep_conv_3x3"]] = 2.0
    matrix[ROW[2, 1], OPERATION["skip_connect"]] = 1.0
    chosen = derive(PC_DARTS, ArchitectureLogits(matrix, matrix)).normal[1]
    assert chosen == (Choice("sep_conv_5x5", 0), Choice("sep_conv_3x3", 1))
    matrix[ROW[0, 1], 8], matrix[ROW[2, 1], 8] = -3.0, 2.0
    chosen = derive(PC_DARTS, ArchitectureLogits(matrix, matrix)).normal[1]
    assert chosen == (Choice("skip_connect", 2), Choice("sep_conv_3x3", 1))


def test_only_operations_that_an_edge_still_has_are_chosen():
    choices = tuple(("none", "dil_conv_3x3") if edge.node else ("skip_connect",) for edge in DARTS.edges)
    space = SearchSpace(DARTS.operations, normal=choices)
    strong = logits_of(normal={(0, 2, "sep_conv_3x3"): 9.0, (1, 2, "dil_conv_3x3"): 1.0})
    cell = derive(space, strong).normal
    assert cell[0] == (Choice("skip_connect", 0), Choice("skip_connect", 1))
    assert cell[2] == (Choice("dil_conv_3x3", 1), Choice("dil_conv_3x3", 0))
    drawn = random_genotype(space, torch.Generator().manual_seed(0)).normal
    assert {choice.operation for choice in drawn[0]} == {"skip_connect"}
    assert {choice.operation for node in drawn[1:] for choice in node} == {"dil_conv_3x3"}


def test_the_weakest_skip_connections_of_the_normal_cell_are_replaced():
    """Two are replaced: the edge 1 -> node 1 gets another operation, and 4 -> node 3 another edge in its stead."""
    entries = {
        (0, 0, "skip_connect"): 5.0,
        (0, 1, "skip_connect"): 4.0,
        (1, 1, "skip_connect"): 3.0,
        (1, 1, "sep_conv_3x3"): 2.5,
        (4, 3, "skip_connect"): 2.0,
        (3, 3, "dil_conv_5x5"): 1.0,
        (2, 3, "sep_conv_5x5"): 0.5,
    }
    logits = logits_of(normal=entries, reduce=entries)
    unlimited = derive(DARTS, logits)
    assert unlimited.normal == unlimited.reduce
    genotype = derive(P_DARTS, logits)
    assert genotype.reduce == unlimited.reduce
    assert genotype.normal[0] == unlimited.normal[0]
    assert unlimited.normal[1] == (Choice("skip_connect", 0), Choice("skip_connect", 1))
    assert genotype.normal[1] == (Choice("skip_connect", 0), Choice("sep_conv_3x3", 1))
    assert unlimited.normal[3] == (Choice("skip_connect", 4), Choice("dil_conv_5x5", 3))
    assert genotype.normal[3] == (Choice("dil_conv_5x5", 3), Choice("sep_conv_5x5", 2))
    none_at_all = derive(replace(P_DARTS, max_skips=0), logits)
    assert not any(choice.operation == "skip_connect" for node in none_at_all.normal for choice in node)


def test_a_limit_on_skip_connections_that_cannot_be_reached_is_an_error():
    bare = (("none", "skip_connect"),) * 2 + (DARTS.operations,) * 12
    space = replace(P_DARTS, normal=bare)
    assert derive(space, logits_of()).normal[0] == (Choice("skip_connect", 0), Choice("skip_connect", 1))
    with pytest.raises(ValueError, match=r"cannot be limited to 1 skip-connections.* increase max_skips"):
        derive(replace(space, max_skips=1), logits_of())


def test_derivation_rejects_nan_and_wrong_shapes():
    with pytest.raises(ValueError, match=r"reduce cell: .* NaN"):
        derive(DARTS, logits_of(reduce={(0, 0, "none"): float("nan")}))
    with pytest.raises(ValueError, match=r"normal cell: .* shape"):
        derive(SearchSpace(DARTS.operations, nodes=3), logits_of())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_genotypes_are_unchanged_by_saving_and_loading(name, tmp_path):
    path = tmp_path / "genotype.json"
    PUBLISHED[name].save(path)
    genotype = Genotype.load(path)
    assert genotype == PUBLISHED[name]
    assert hash(genotype) == hash(PUBLISHED[name])
    first = json.loads(path.read_text())["normal"][0][0]
    assert first == list(PUBLISHED[name].normal[0][0])


def broken(tmp_path, change):
    """Save DARTS_V2 changed by `change`, and return the error message of loading it."""
    content = PUBLISHED["DARTS_V2"].model_dump(mode="json")
    change(content)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"broken\.json is not a genotype") as error:
        Genotype.load(path)
    return str(error.value)


def test_all_errors_in_a_file_are_listed_with_cell_and_node(tmp_path):
    def change(content):
        content["normal"][2] = [["sep_conv_3x4", 9], ["skip_connect", 0]]
        content["reduce"][0] = [["none", 0], ["skip_connect", -1]]
        content["reduce"][1] = [["skip_connect", 2], ["max_pool_3x3", 2]]

    message = broken(tmp_path, change)
    assert "normal cell, node 2: 'sep_conv_3x4' is not an operation; the nearest is 'sep_conv_3x3'" in message
    assert "normal cell, node 2: source 9 does not come before the node; valid: 0 to 3" in message
    assert "reduce cell, node 0: 'none' means the absence of an edge" in message
    assert "reduce cell, node 0: source -1 does not come before the node; valid: 0 to 1" in message
    assert "reduce cell, node 1: both edges come from source 2" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["normal"][1][0].__setitem__(1, "0"), "normal.1.0.1: Input should be a valid integer"),
        (lambda content: content["normal"][1][0].__setitem__(1, True), "normal.1.0.1: Input should be a valid integer"),
        (lambda content: content["normal"][1].pop(), "normal.1.1: Field required"),
        (lambda content: content["normal"].pop(), "normal has 3, reduce has 4"),
        (lambda content: content.update(normal=[], reduce=[]), "at least 1; normal has 0, reduce has 0"),
        (lambda content: content.pop("reduce"), "reduce: Field required"),
        (lambda content: content.update(color="red"), "color: Extra inputs are not permitted"),
    ],
)
def test_malformed_files_are_rejected(change, message, tmp_path):
    assert message in broken(tmp_path, change)


def test_invalid_json_and_a_missing_file(tmp_path):
    path = tmp_path / "text.json"
    path.write_text("Genotype(normal=")
    with pytest.raises(ValueError, match=r"text\.json is not a genotype:\nInvalid JSON"):
        Genotype.load(path)
    with pytest.raises(FileNotFoundError):
        Genotype.load(tmp_path / "absent.json")


def test_genotypes_are_immutable():
    with pytest.raises(ValidationError):
        PUBLISHED["DARTS_V1"].normal = ()


def test_random_genotypes_follow_the_seed_and_are_uniform():
    def draw(seed, count):
        generator = torch.Generator().manual_seed(seed)
        return [random_genotype(DARTS, generator) for _ in range(count)]

    assert draw(3, 4) == draw(3, 4)
    assert draw(3, 1) != draw(4, 1)
    genotypes = draw(0, 700)
    pairs, operations = Counter(), Counter()
    for genotype in genotypes:
        for cell in (genotype.normal, genotype.reduce):
            pairs[cell[3][0].source, cell[3][1].source] += 1
            operations.update((node, choice.operation) for node in cell for choice in node)
    by_name = Counter()
    for (_, name), count in operations.items():
        by_name[name] += count
    assert len(pairs) == 10
    assert set(by_name) == set(DARTS.operations) - {"none"}
    assert all(abs(count - 140) < 4 * 140**0.5 for count in pairs.values())
    assert all(abs(count - 1600) < 4 * 1600**0.5 for count in by_name.values())
