"""Genotypes, the discrete architectures: checked, kept in JSON files, derived from logits, drawn at random."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from problems.nas.operation_names import BUILDABLE, NONE, explain_unknown
from problems.nas.space import ArchitectureLogits, CellKind, Edge, SearchSpace

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Choice(NamedTuple):
    """One kept edge of a node: `operation`, applied to state `source` (0 and 1 are inputs, 2 + i is node i)."""

    operation: str
    source: int


CellGenotype = tuple[tuple[Choice, Choice], ...]


class Genotype(BaseModel):
    """A discrete architecture: for each node of the normal and of the reduction cell, its two incoming edges.

    A cell's output is the concatenation of all its nodes. Immutable and hashable. Written as JSON, a cell is a list
    of nodes, a node a list of two `[operation, source]` pairs. An invalid genotype raises pydantic's
    ValidationError, a ValueError, which names cell, node, fault and remedy of all that is wrong.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    normal: CellGenotype
    reduce: CellGenotype

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = [*_cell_faults("normal", self.normal), *_cell_faults("reduce", self.reduce)]
        if len(self.normal) != len(self.reduce) or not self.normal:
            faults.append(
                f"both cells need the same number of nodes, 1 or more; "
                f"normal has {len(self.normal)}, reduce {len(self.reduce)}"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def nodes(self) -> int:
        """The number of nodes of each cell; its output concatenates the states 2, ..., nodes + 1."""
        return len(self.normal)

    def cell(self, kind: CellKind) -> CellGenotype:
        """Return the nodes of one kind of cell. Raises ValueError for another kind than "normal" and "reduce"."""
        if kind not in ("normal", "reduce"):
            raise ValueError(f"{kind!r} is not a kind of cell; valid: normal, reduce")
        return self.normal if kind == "normal" else self.reduce

    def save(self, path: str | Path) -> None:
        """Write the genotype to a JSON file."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a genotype from a JSON file. Raises ValueError, which names the file and all faults in it."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except ValidationError as error:
            faults = [_describe(".".join(map(str, fault["loc"])), fault["msg"]) for fault in error.errors()]
            raise ValueError(f"{path} is not a genotype:\n" + "\n".join(faults)) from error


def _describe(place: str, message: str) -> str:
    return f"{place}: {message}" if place else message.removeprefix("Value error, ")


def _cell_faults(kind: str, cell: CellGenotype) -> list[str]:
    faults = []
    for node, choices in enumerate(cell):
        place = f"{kind} cell, node {node}"
        for operation, source in choices:
            if operation not in BUILDABLE:
                faults.append(f"{place}: {explain_unknown(operation)}")
            if not 0 <= source < node + 2:
                faults.append(f"{place}: source {source} does not come before the node; valid: 0 to {node + 1}")
        if choices[0].source == choices[1].source:
            faults.append(f"{place}: both edges come from source {choices[0].source}; take two different sources")
    return faults


def derive(space: SearchSpace, logits: ArchitectureLogits) -> Genotype:
    """Derive the genotype of the logits, each of `space.shape` (Liu et al. 2019, DARTS, section 2.4).

    An edge is as strong as the largest weight among its operations other than none: a softmax weight, times that of
    the edge where edges have weights. Each node keeps its two strongest edges, the stronger first, with that
    operation. Of equal operations the first in the space's order wins, of equal edges the one from the lower source.

    While the normal cell has more skip-connections than `space.max_skips`, the weakest that it keeps gets weight zero
    and the cell is derived again (Chen et al. 2019, P-DARTS, section 3.3).

    Raises ValueError if the shapes are not those of the space, if a logit is NaN, or if so few skip-connections
    cannot be had, for want of other operations.
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
    """{edge: {operation that it may keep: weight}}."""
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
    kept = (sorted(incoming, key=lambda pair: -pair[0])[:2] for incoming in candidates)
    return tuple((first, second) for (_, first), (_, second) in kept)


def _limit_skips(space: SearchSpace, weights: _Weights, limit: int) -> None:
    """Set weights of skip-connections to zero until the derived cell keeps no more than `limit`."""
    while True:
        cell = _derive_cell(space, weights)
        skips = [Edge(source, node) for node, kept in enumerate(cell) for name, source in kept if name == _SKIP]
        if len(skips) <= limit:
            return
        replaceable = [edge for edge in skips if weights[edge][_SKIP] > 0]
        if not replaceable:
            raise ValueError(
                f"the normal cell cannot do with {limit} skip-connections, since some edges have no other operation; "
                "raise max_skips or keep more operations"
            )
        weakest = min(replaceable, key=lambda edge: weights[edge][_SKIP])
        weights[weakest][_SKIP] = 0.0


def random_genotype(space: SearchSpace, generator: torch.Generator) -> Genotype:
    """Draw a genotype: for each node, uniformly, two different sources and for each an operation other than none.

    The generator must be a CPU generator; the same seed gives the same genotype.
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
