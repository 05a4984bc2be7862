"""Genotypes, the discrete architectures: checked, kept in JSON files, derived from logits, drawn at random."""

from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from problems.nas.operations import NONE, OPERATIONS, explain_unknown
from problems.nas.space import ArchitectureLogits, SearchSpace


class Choice(NamedTuple):
    """One kept edge of a node: `operation`, applied to state `source` (0 and 1 are inputs, 2 + i is node i)."""

    operation: str
    source: int


CellKind = Literal["normal", "reduce"]
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
            if operation not in OPERATIONS or operation == NONE:
                faults.append(f"{place}: {explain_unknown(operation)}")
            if not 0 <= source < node + 2:
                faults.append(f"{place}: source {source} does not come before the node; valid: 0 to {node + 1}")
        if choices[0].source == choices[1].source:
            faults.append(f"{place}: both edges come from source {choices[0].source}; take two different sources")
    return faults


def derive(space: SearchSpace, logits: ArchitectureLogits) -> Genotype:
    """Derive the genotype of the logits, each (edges, operations) (Liu et al. 2019, DARTS, section 2.4).

    An edge is as strong as the largest softmax weight among its operations other than none. Each node keeps its two
    strongest edges, the stronger first, with that operation. Of equal operations the first in the space's order
    wins, of equal edges the one from the lower source.

    Raises ValueError if the shapes are not those of the space, or if a logit is NaN.
    """
    space.check(logits)
    normal, reduce = (_derive_cell(space, kind, matrix) for kind, matrix in zip(logits._fields, logits, strict=True))
    return Genotype(normal=normal, reduce=reduce)


def _derive_cell(space: SearchSpace, kind: str, logits: Tensor) -> CellGenotype:
    if logits.isnan().any():
        raise ValueError(f"{kind} cell: the architecture logits contain NaN, so no genotype can be derived")
    weights = logits.detach().cpu().double().softmax(dim=-1).tolist()
    candidates: list[list[tuple[float, Choice]]] = [[] for _ in range(space.nodes)]
    for edge, row in zip(space.edges, weights, strict=True):
        named = [pair for pair in zip(space.operations, row, strict=True) if pair[0] != NONE]
        operation, weight = max(named, key=lambda pair: pair[1])
        candidates[edge.node].append((weight, Choice(operation, edge.source)))
    kept = (sorted(incoming, key=lambda pair: -pair[0])[:2] for incoming in candidates)
    return tuple((first, second) for (_, first), (_, second) in kept)


def random_genotype(space: SearchSpace, generator: torch.Generator) -> Genotype:
    """Draw a genotype: for each node, uniformly, two different sources and an operation other than none for each.

    The generator must be a CPU generator; the same seed gives the same genotype.
    """
    operations = [name for name in space.operations if name != NONE]

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    def draw_node(node: int) -> tuple[Choice, Choice]:
        pairs = list(combinations(range(node + 2), 2))
        first, second = pairs[draw(len(pairs))]
        return Choice(operations[draw(len(operations))], first), Choice(operations[draw(len(operations))], second)

    normal, reduce = (tuple(draw_node(node) for node in range(space.nodes)) for _ in range(2))
    return Genotype(normal=normal, reduce=reduce)
