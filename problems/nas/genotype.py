"""Genotypes (discrete architectures): validation, JSON files, the rule that derives them from logits, random ones."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from problems.nas.operation_names import BUILDABLE, NONE, explain_unknown
from problems.nas.search_space import ArchitectureLogits, CellKind, Edge, SearchSpace

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Choice(NamedTuple):
    """One edge into a node: `operation` applied to state `source` (0 and 1 are the cell's inputs, 2 + i is node i)."""

    operation: str
    source: int


CellGenotype = tuple[tuple[Choice, Choice], ...]
LARGEST = 10**6  # bytes of a file


class Genotype(BaseModel):
    """A discrete architecture: for each node of the normal and of the reduction cell, its two incoming edges.

    The output of a cell is the concatenation of all its nodes. Genotypes are immutable and hashable. In JSON a cell is
    a list of nodes, and a node is a list of two `[operation, source]` pairs.

    Raises:
        pydantic.ValidationError: a ValueError, if the genotype is invalid. It lists all errors, each with its cell and
            node and what is valid there.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    normal: CellGenotype
    reduce: CellGenotype

    @model_validator(mode="after")
    def _check(self) -> Self:
        errors = [*_cell_errors("normal", self.normal), *_cell_errors("reduce", self.reduce)]
        if len(self.normal) != len(self.reduce) or not self.normal:
            errors.append(
                f"both cells need the same number of nodes, at least 1; "
                f"normal has {len(self.normal)}, reduce has {len(self.reduce)}"
            )
        if errors:
            raise ValueError("\n".join(errors))
        return self

    @property
    def nodes(self) -> int:
        """The number of nodes of each cell. The cell's output concatenates the states 2, ..., nodes + 1."""
        return len(self.normal)

    def cell(self, kind: CellKind) -> CellGenotype:
        """Return the nodes of one kind of cell. Raises ValueError if `kind` is neither "normal" nor "reduce"."""
        if kind not in ("normal", "reduce"):
            raise ValueError(f"{kind!r} is not a kind of cell; valid: normal, reduce")
        return self.normal if kind == "normal" else self.reduce

    def save(self, path: str | Path) -> None:
        """Write the genotype to a JSON file."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a genotype from a JSON file. Raises ValueError, with the file name and all errors, if it is invalid."""
        with Path(path).open("rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f"{path} is not a genotype: it has more than {LARGEST:,} bytes")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            lines = [_describe(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors()]
            raise ValueError(f"{path} is not a genotype:\n" + "\n".join(lines)) from error


def _describe(location: str, message: str) -> str:
    return f"{location}: {message}" if location else message.removeprefix("Value error, ")


def _cell_errors(kind: str, cell: CellGenotype) -> list[str]:
    errors = []
    for node, choices in enumerate(cell):
        location = f"{kind} cell, node {node}"
        for operation, source in choices:
            if operation not in BUILDABLE:
                errors.append(f"{location}: {explain_unknown(operation)}")
            if not 0 <= source < node + 2:
                errors.append(f"{location}: source {source} does not come before the node; valid: 0 to {node + 1}")
        if choices[0].source == choices[1].source:
            errors.append(f"{location}: both edges come from source {choices[0].source}; use two different sources")
    return errors


def derive(space: SearchSpace, logits: ArchitectureLogits) -> Genotype:
    """Derive the genotype from architecture logits (Liu et al. 2019, DARTS, section 2.4).

    The strength of an edge is the largest weight among its operations except "none"; a weight is the softmax over
    operations, times the weight of the edge where the space has edge weights. Each node keeps its two strongest edges,
    the stronger one first, each with its strongest operation. Ties go to the operation that comes first in the space,
    and to the edge from the lower source.

    If the normal cell has more skip-connections than `space.max_skips`, the weakest of them gets weight zero and the
    cell is derived again, until it has few enough (Chen et al. 2019, P-DARTS, section 3.3).

    Args:
        space: the search space of the logits.
        logits: two matrices of shape `space.shape`.

    Raises:
        ValueError: if the logits do not have the shape of the space or contain NaN, or if `space.max_skips` cannot be
            reached because some edges have no other operation.
    """
    space.check(logits)
    for kind, matrix in zip(logits._fields, logits, strict=True):
        if matrix.isnan().any():
            raise ValueError(f"{kind} cell: the architecture logits contain NaN, so no genotype can be derived")
    normal, reduce = _weights(space, "normal", logits.normal), _weights(space, "reduce", logits.reduce)
    if space.max_skips is not None:
        _limit_skips(space, normal, space.max_skips)
    return Genotype(normal=_derive_cell(space, normal), reduce=_derive_cell(space, reduce))


_SKIP = "skip_connect"
_Weights = dict[Edge, dict[str, float]]


def _weights(space: SearchSpace, kind: CellKind, logits: Tensor) -> _Weights:
    """{edge: {operation other than "none": weight}}."""
    matrix = space.mixture(kind, logits.detach().cpu().double()).operations.tolist()
    rows = zip(space.edges, space.choices(kind), matrix, strict=True)
    return {
        edge: {name: row[column] for column, name in enumerate(space.operations) if name in names and name != NONE}
        for edge, names, row in rows
    }


def _derive_cell(space: SearchSpace, weights: _Weights) -> CellGenotype:
    candidates: list[list[tuple[float, Choice]]] = [[] for _ in range(space.nodes)]
    for edge, row in weights.items():
        operation = max(row, key=row.__getitem__)
        candidates[edge.node].append((row[operation], Choice(operation, edge.source)))
    strongest = (sorted(incoming, key=lambda pair: -pair[0])[:2] for incoming in candidates)
    return tuple((first, second) for (_, first), (_, second) in strongest)


def _limit_skips(space: SearchSpace, weights: _Weights, limit: int) -> None:
    """Set weights of skip-connections to zero until the derived cell has at most `limit` of them."""
    while True:
        cell = _derive_cell(space, weights)
        skips = [Edge(source, node) for node, choices in enumerate(cell) for name, source in choices if name == _SKIP]
        if len(skips) <= limit:
            return
        replaceable = [edge for edge in skips if weights[edge][_SKIP] > 0]
        if not replaceable:
            raise ValueError(
                f"the normal cell cannot be limited to {limit} skip-connections, since some edges have no other "
                "operation; increase max_skips or keep more operations"
            )
        weakest = min(replaceable, key=lambda edge: weights[edge][_SKIP])
        weights[weakest][_SKIP] = 0.0


def random_genotype(space: SearchSpace, generator: torch.Generator) -> Genotype:
    """Draw a random genotype: for each node two different sources, and for each source an operation, all uniformly.

    "none" is never drawn. The generator must be a CPU generator; the same seed gives the same genotype.
    """
    import torch

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    def draw_choice(kind: CellKind, edge: Edge) -> Choice:
        operations = [name for name in space.choices(kind)[space.edges.index(edge)] if name != NONE]
        return Choice(operations[draw(len(operations))], edge.source)

    def draw_node(kind: CellKind, node: int) -> tuple[Choice, Choice]:
        pairs = list(combinations(range(node + 2), 2))
        first, second = pairs[draw(len(pairs))]
        return draw_choice(kind, Edge(first, node)), draw_choice(kind, Edge(second, node))

    kinds: tuple[CellKind, CellKind] = ("normal", "reduce")
    normal, reduce = (tuple(draw_node(kind, node) for node in range(space.nodes)) for kind in kinds)
    return Genotype(normal=normal, reduce=reduce)
