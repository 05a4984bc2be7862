"""Who reads whom, in which order: the graph of a multi-level problem, validated; knows no tensors."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlo.errors import GraphError


@dataclass(frozen=True)
class Node:
    """One problem as the graph sees it.

    Its name, the problems that it reads, and those of them that it holds constant, or does not read at every step.
    """

    name: str
    reads: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    sometimes: tuple[str, ...] = ()


class Graph:
    """The reads between problems, listed lowest level first.

    A problem read by one *above* it in the list is a best response, differentiated through; a problem read by one
    *below* it is an input held fixed there.

    Raises:
        GraphError: with every fault found, each with its remedy.
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
        """Every problem that ``name``'s loss reads."""
        return self._nodes[name].reads

    def lower_reads(self, name: str) -> tuple[str, ...]:
        """The best responses that ``name``'s loss reads: problems below it, not held constant."""
        return tuple(read for read in self._live_reads(name) if self._level[read] < self._level[name])

    def tops(self) -> tuple[str, ...]:
        """The problems whose solution nobody above reads."""
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
        """The backward sweep for ``name``: {lower problem: what it is pulled back onto}, highest level first.

        Only problems on some path of reads from ``name`` through best responses back to ``name`` appear, and of
        their reads only those on such a path. Problems in ``blocked`` are not differentiated through. ``inner`` names,
        for a problem, those whose steps are taken as part of it: it reads what they read.
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
                yield (
                    f"problem {name!r}: no best response that its loss reads depends on {name!r}, so it has no "
                    f"hypergradient; let the loss of {' or '.join(map(repr, self.lower_reads(name)))} "
                    f"(or of a problem that they read) take a parameter named {name!r}"
                )


def _faults(nodes: Sequence[Node]) -> Iterable[str]:
    names = [node.name for node in nodes]
    level = {name: i for i, name in enumerate(names)}
    if not names:
        yield "no problems: give the engine a list of them, lowest level first"
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{names.count(name)} problems are named {name!r}; give each a name of its own"
    for node in nodes:
        yield from _read_faults(node, names)
    if len(names) < 2:
        return
    for node in nodes:
        readers = [other.name for other in nodes if node.name in other.reads and other is not node]
        if not readers and not node.reads:
            yield f"problem {node.name!r} neither reads nor is read by another; take it out, or train it by itself"
        elif not readers:
            yield _unread(node, is_last=level[node.name] == len(names) - 1)
        elif all(level[r] < level[node.name] for r in readers) and not any(
            level.get(read, len(names)) < level[node.name] for read in node.reads
        ):
            yield (
                f"problem {node.name!r} is a top level (nobody above reads it), but its loss reads no problem below "
                "it; add a parameter named after the lower problem whose solution it judges, or look at the order of "
                f"the list, which goes lowest level first: {', '.join(names)}"
            )


def _read_faults(node: Node, names: Sequence[str]) -> Iterable[str]:
    for read in node.reads:
        if read == node.name:
            yield f"problem {node.name!r} reads itself; its own parameters are reached by calling self(...)"
        elif read not in names:
            near = difflib.get_close_matches(read, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            yield (
                f"problem {node.name!r}: its loss reads {read!r}, and no problem has that name; {hint}"
                f"there are {', '.join(map(repr, names))}. Name the parameter of loss after the problem that it reads, "
                f"or say which it is with reads={{<parameter>: <problem>}} when you construct {node.name!r} (None for "
                "one that has a default and is no problem)"
            )
    named = [*(("held", read) for read in node.held), *(("sometimes", read) for read in node.sometimes)]
    for option, read in named:
        if read not in node.reads:
            yield f"problem {node.name!r}: {option}={read!r} is not among what its loss reads ({', '.join(node.reads)})"


def _unread(node: Node, is_last: bool) -> str:
    if is_last:
        return (
            f"problem {node.name!r} is the top level, but no lower loss reads it, so nothing that it decides has an "
            f"effect; let a lower problem's loss take a parameter named {node.name!r}"
        )
    return (
        f"problem {node.name!r}: nobody above reads its solution, so training it has no effect; let the loss of a "
        f"problem above take a parameter named {node.name!r}, or take it out"
    )
