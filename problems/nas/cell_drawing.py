"""Draws one cell of a genotype as a directed graph, from left to right."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from problems.nas.genotype import CellGenotype, Genotype
from problems.nas.search_space import CellKind

# All lengths are in inches, which are also the units of the axes.
_PITCH, _LANE = 1.7, 0.36  # between nodes, between lanes
_HALF_HEIGHT, _HALF_WIDTH = 0.16, 0.27  # half the size of a box; the box of a node is a square
_PORT = 0.06  # distance from the middle of a node at which its edges arrive
_TURN = 0.28  # the length over which an edge changes height
_FIRST_GAP, _LAST_GAP = _PITCH + _HALF_WIDTH - _HALF_HEIGHT, 1.2  # after the inputs, and before the output
_MARGIN = 0.12  # around the picture
_END_COLOR, _NODE_COLOR, _CONCATENATION_COLOR = "#e9e9e4", "#cfe2f3", "#b4b4b4"
_COLORS = {
    "sep": "#1f5f99",
    "dil": "#0b7a6b",
    "max": "#b3541e",
    "avg": "#b3541e",
    "skip": "#6b6b6b",
    "noise": "#b01e3c",
}


class _Route(NamedTuple):
    """The route of an edge: from a height in column `start`, along one lane, to column `stop`. Heights are in lanes."""

    start: int
    stop: int
    start_height: int
    operation: str


def draw_cell(genotype: Genotype, kind: CellKind) -> Figure:
    """Draw the normal or the reduction cell; `figure.savefig(path)` writes it as PNG, PDF or SVG.

    The figure does not use pyplot's global state. Between two columns no two edges share a lane, so that labels do not
    overlap other edges or labels. Grey lines show the concatenation of the nodes.

    Raises:
        ValueError: if `kind` is neither "normal" nor "reduce".
    """
    routes = list(_routes(genotype.cell(kind)))
    lanes = _choose_lanes(routes)
    nodes = genotype.nodes
    lowest, highest = min(-1, *lanes) - 1, max(1, *lanes)
    right = _x(nodes) + _LAST_GAP
    size = (right + 2 * (_HALF_WIDTH + _MARGIN), (highest - lowest) * _LANE + 2 * (_HALF_HEIGHT + _MARGIN))
    figure = Figure(figsize=size)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-_HALF_WIDTH - _MARGIN, right + _HALF_WIDTH + _MARGIN)
    axes.set_ylim(lowest * _LANE - _HALF_HEIGHT - _MARGIN, highest * _LANE + _HALF_HEIGHT + _MARGIN)
    for node in range(nodes):
        _draw_concatenation(axes, node, right, lowest if node < nodes - 1 else 0)
    for index, (route, lane) in enumerate(zip(routes, lanes, strict=True)):
        other_edge_of_node = index ^ 1
        _draw_route(axes, route, lane, _PORT if lane > lanes[other_edge_of_node] else -_PORT)
    for x, y, name in ((0.0, _LANE, "k-2"), (0.0, -_LANE, "k-1"), (right, 0.0, "k")):
        _draw_state(axes, x, y, f"$c_{{{name}}}$", _END_COLOR, _HALF_WIDTH)
    for node in range(nodes):
        _draw_state(axes, _x(node + 1), 0.0, str(node), _NODE_COLOR, _HALF_HEIGHT)
    return figure


def _routes(cell: CellGenotype) -> Iterator[_Route]:
    """List the edges, two for each node. Column 0 has the inputs, one lane up and one down; column 1 + i has node i."""
    for node, choices in enumerate(cell):
        for operation, source in choices:
            height = (1, -1)[source] if source < 2 else 0
            yield _Route(max(0, source - 1), node + 1, height, operation)


def _choose_lanes(routes: Sequence[_Route]) -> list[int]:
    """Choose a lane for each edge so that few edges cross and lanes stay close to the middle.

    A local search: start with each edge outside all previous ones, then move one edge or swap two for as long as that
    lowers the cost.
    """
    lanes = [(index + 1) * (1 if route.start_height > 0 else -1) for index, route in enumerate(routes)]
    best = _cost(routes, lanes)
    improved = True
    while improved:
        improved = False
        for candidate in _neighbors(lanes):
            cost = _cost(routes, candidate)
            if cost < best - 1e-9:
                lanes, best, improved = candidate, cost, True
                break
    return lanes


def _neighbors(lanes: Sequence[int]) -> Iterator[list[int]]:
    count = len(lanes)
    for index in range(count):
        for lane in sorted(range(-count, count + 1), key=abs):
            yield [*lanes[:index], lane, *lanes[index + 1 :]]
    for first, second in combinations(range(count), 2):
        swapped = list(lanes)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        yield swapped


def _cost(routes: Sequence[_Route], lanes: Sequence[int]) -> float:
    """The cost of crossings and height changes; infinite if two edges share a lane or an edge runs through a node."""
    cost = 0.0
    for route, lane in zip(routes, lanes, strict=True):
        if lane == 0 and route.stop - route.start > 1:
            return float("inf")
        cost += 0.3 * (abs(lane - route.start_height) + abs(lane))
    for (first, first_lane), (second, second_lane) in combinations(zip(routes, lanes, strict=True), 2):
        shared = range(max(first.start, second.start), min(first.stop, second.stop))
        if shared and first_lane == second_lane:
            return float("inf")
        for gap in shared:
            above = first_lane > second_lane
            entry = _height(first, first_lane, gap) - _height(second, second_lane, gap)
            cost += entry != 0 and (entry > 0) != above
            leave = (first.stop - 1 > gap) * first_lane - (second.stop - 1 > gap) * second_lane
            cost += leave != 0 and (leave > 0) != above
    return cost


def _height(route: _Route, lane: int, gap: int) -> int:
    """The height at which an edge enters the gap to the right of column `gap`."""
    return route.start_height if gap == route.start else lane


def _x(column: int) -> float:
    return _FIRST_GAP + (column - 1) * _PITCH if column else 0.0


def _draw_route(axes: Axes, route: _Route, lane: int, port: float) -> None:
    color = next(color for prefix, color in _COLORS.items() if route.operation.startswith(prefix))
    begin = (_x(route.start) + (_HALF_HEIGHT if route.start else _HALF_WIDTH), route.start_height * _LANE)
    end = (_x(route.stop) - _HALF_HEIGHT, port)
    _draw_curve(axes, begin, lane * _LANE, end, color, arrow=True)
    axes.text(
        _x(route.stop) - _PITCH / 2, lane * _LANE, route.operation, color=color, fontsize=7.5, ha="center", va="center",
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}, zorder=3,
    )  # fmt: skip


def _draw_concatenation(axes: Axes, node: int, right: float, lane: int) -> None:
    begin = (_x(node + 1) + _HALF_HEIGHT, 0.0)
    _draw_curve(axes, begin, lane * _LANE, (right - _HALF_WIDTH, 0.0), _CONCATENATION_COLOR, arrow=lane == 0)


def _draw_curve(
    axes: Axes, begin: tuple[float, float], height: float, end: tuple[float, float], color: str, arrow: bool
) -> None:
    """Draw a line that turns to `height` just after its start, and leaves it just before its end."""
    (left, low), (right, high) = begin, end
    half = _TURN / 2
    first, last = left + _TURN, right - _TURN
    vertices = [
        begin, (left + half, low), (first - half, height), (first, height),
        (last, height), (last + half, height), (right - half, high), end,
    ]  # fmt: skip
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3]
    style = "-|>,head_length=3.5,head_width=1.8" if arrow else "-"
    axes.add_patch(
        FancyArrowPatch(
            path=Path(vertices, codes), arrowstyle=style, color=color, linewidth=1.1, shrinkA=0, shrinkB=0, zorder=2
        )
    )


def _draw_state(axes: Axes, x: float, y: float, name: str, color: str, half_width: float) -> None:
    box = FancyBboxPatch(
        (x - half_width, y - _HALF_HEIGHT),
        2 * half_width,
        2 * _HALF_HEIGHT,
        boxstyle=f"round,pad=0,rounding_size={_HALF_HEIGHT}",
        facecolor=color,
        edgecolor="#444444",
        linewidth=0.8,
        zorder=4,
    )
    axes.add_patch(box)
    axes.text(x, y, name, fontsize=9, ha="center", va="center_baseline", zorder=5)
