"""The graph of a multi-level problem: which loss reads which problem, validated, without any tensors."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlo.errors import GraphError


@dataclass(frozen=True)
class Node:
    """One problem in the graph.

    Attributes:
        name: its name.
        reads: the problems that its loss reads.
        held: those of ``reads`` that it treats as constants.
        sometimes: those of ``reads`` that it does not read at every step.
    """

    name: str
    reads: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    sometimes: tuple[str, ...] = ()


class Graph:
    """The graph of which problem reads which, listed lowest level first.

    If a problem is read by one *above* it in the list, it is a best response there: the upper problem is differentiated
    through its training. If it is read by one *below* it, it is a fixed input there.

    Raises:
        GraphError: lists every mistake found, and how to correct each.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = {node.name: node for node in nodes}
        self.names = tuple(node.name for node in nodes)
        self._level = {name: level for level, name in enumerate(self.names)}
        faults = list(_faults(nodes))
        if not faults:
            faults = list(self._missing_paths())
        if faults:
            raise GraphError("\n".join(faults))

    def reads(self, name: str) -> tuple[str, ...]:
        """All problems that the loss of ``name`` reads."""
        return self._nodes[name].reads

    def lower_reads(self, name: str) -> tuple[str, ...]:
        """The best responses that the loss of ``name`` reads: problems below it that are not held constant."""
        return tuple(read for read in self._live_reads(name) if self._level[read] < self._level[name])

    def tops(self) -> tuple[str, ...]:
        """The problems that no problem above them reads."""
        read = {
            read for name in self.names for read in self._nodes[name].reads if self._level[read] < self._level[name]
        }
        return tuple(name for name in self.names if name not in read)

    def is_upper(self, name: str) -> bool:
        """Whether the gradient of ``name`` runs through the training of a lower problem."""
        return bool(self.paths(name))

    def paths(
        self, name: str, blocked: Collection[str] = (), inner: Mapping[str, Sequence[str]] | None = None
    ) -> dict[str, tuple[str, ...]]:
        """The backward pass for ``name``: {lower problem: problems that it is pulled back onto}, highest level first.

        It contains only problems on a path of reads that starts at ``name``, goes down through best responses and ends
        at ``name`` again.

        Args:
            name: the problem whose hypergradient is computed.
            blocked: problems that are not differentiated through.
            inner: {problem: lower problems whose steps are part of its loss}; it then also reads what these read.
        """
        inner = inner or {}
        reached = self._reached(name, blocked, inner)
        useful: dict[str, tuple[str, ...]] = {}
        for lower in self.names[: self._level[name]]:
            if lower in reached:
                reads = self._joint_reads(lower, inner)
                targets = tuple(r for r in reads if r == name or (self._level[r] < self._level[lower] and r in useful))
                if targets:
                    useful[lower] = targets
        return dict(reversed(useful.items()))

    def __str__(self) -> str:
        lines = []
        for level in reversed(range(len(self.names))):
            name = self.names[level]
            parts = []
            for read in self._nodes[name].reads:
                role = "best response" if self._level[read] < level else "input"
                parts.append(f"{read} ({role}{', held constant' if read in self._nodes[name].held else ''})")
            lines.append(f"level {level + 1}  {name}  reads {', '.join(parts) if parts else 'nothing'}")
        return "\n".join(lines)

    def _live_reads(self, name: str) -> tuple[str, ...]:
        node = self._nodes[name]
        return tuple(read for read in node.reads if read not in node.held)

    def _joint_reads(
        self,
        name: str,
        inner: Mapping[str, Sequence[str]],
        retaken: frozenset[str] = frozenset(),
        whole: str | None = None,
    ) -> tuple[str, ...]:
        """What a problem reads, by itself and by the steps of lower problems that are part of its loss.

        Such a step reads a problem above it as it was before its own step, which depends on nothing; only what is above
        the ``whole`` whose part it is counts. Of the problems below it, those whose steps are ``retaken`` are part too.
        """
        whole = whole or name
        retaken = retaken.union(inner.get(name, ()))
        reads = dict.fromkeys(
            read
            for read in self._live_reads(name)
            if self._level[read] > self._level[whole] or (self._level[read] < self._level[name] and read not in retaken)
        )
        for low in inner.get(name, ()):
            reads.update(dict.fromkeys(self._joint_reads(low, inner, retaken, whole)))
        return tuple(reads)

    def _reached(self, name: str, blocked: Collection[str], inner: Mapping[str, Sequence[str]]) -> set[str]:
        reached: set[str] = set()
        waiting = [name]
        while waiting:
            reader = waiting.pop()
            for read in self._joint_reads(reader, {} if reader == name else inner):
                if self._level[read] < self._level[reader] and read not in reached and read not in blocked:
                    reached.add(read)
                    waiting.append(read)
        return reached

    def _missing_paths(self) -> Iterable[str]:
        if len(self.names) == 1:
            return
        for name in self.tops():
            if not self.is_upper(name):
                below = self.names[: self._level[name]]
                depends = [low for low in below if name in self._live_reads(low)]
                yield (
                    f"problem {name!r}: no best response that its loss reads depends on {name!r}, so it has no "
                    f"hypergradient; add a parameter named {name!r} to the loss of "
                    f"{' or '.join(map(repr, self.lower_reads(name)))}, or of a lower problem that they read"
                    + (
                        f"; or let its loss read {' or '.join(map(repr, depends))}, which depends on it"
                        if depends
                        else ""
                    )
                )


def _faults(nodes: Sequence[Node]) -> Iterable[str]:
    names = [node.name for node in nodes]
    level = {name: i for i, name in enumerate(names)}
    if not names:
        yield "no problems: pass the engine a list of problems, lowest level first"
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{names.count(name)} problems are named {name!r}; give each problem a different name"
    for node in nodes:
        yield from _read_faults(node, names)
    if len(names) < 2:
        return
    for node in nodes:
        readers = [other.name for other in nodes if node.name in other.reads and other is not node]
        if not readers and not node.reads:
            yield f"problem {node.name!r} neither reads nor is read by another; remove it, or train it alone"
        elif not readers:
            yield _unread(node, is_last=level[node.name] == len(names) - 1)
        elif all(level[r] < level[node.name] for r in readers) and not any(
            level.get(read, len(names)) < level[node.name] for read in node.reads
        ):
            yield (
                f"problem {node.name!r} is a top level (no problem above reads it), but its loss reads no problem "
                "below it; add a parameter to its loss, named after the lower problem that it evaluates, or check the "
                f"order of the list, which must be lowest level first: {', '.join(names)}"
            )


def _read_faults(node: Node, names: Sequence[str]) -> Iterable[str]:
    for read in node.reads:
        if read == node.name:
            yield f"problem {node.name!r} reads itself; to use its own parameters, call self(...)"
        elif read not in names:
            near = difflib.get_close_matches(read, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            yield (
                f"problem {node.name!r}: its loss reads {read!r}, but no problem has that name; {hint}"
                f"the problems are {', '.join(map(repr, names))}. Name the parameter of loss after the problem that it "
                f"reads, or pass reads={{<parameter>: <problem>}} when you construct {node.name!r} (write None "
                "for a parameter with a default value that is not a problem)"
            )
    named = [*(("held", read) for read in node.held), *(("sometimes", read) for read in node.sometimes)]
    for option, read in named:
        if read not in node.reads:
            yield f"problem {node.name!r}: {option}={read!r} is not among what its loss reads ({', '.join(node.reads)})"


def _unread(node: Node, is_last: bool) -> str:
    if is_last:
        return (
            f"problem {node.name!r} is the top level, but no lower loss reads it, so its parameters have no effect; "
            f"add a parameter named {node.name!r} to the loss of a lower problem"
        )
    return (
        f"problem {node.name!r}: no problem above reads its solution, so training it has no effect; add a parameter "
        f"named {node.name!r} to the loss of a problem above, or remove {node.name!r}"
    )
