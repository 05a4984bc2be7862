"""The drawing of a cell: it shows all edges, labels are legible, and pyplot's global state is not used."""

import io
from itertools import combinations

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from problems.nas import DARTS, PUBLISHED, draw_cell, random_genotype

GENOTYPES = [*PUBLISHED.values(), *(random_genotype(DARTS, torch.Generator().manual_seed(seed)) for seed in range(4))]


def measure(figure):
    """Return the labels and boxes, and the paths of the lines, all in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    (axes,) = figure.axes
    texts = [(text.get_text(), text.get_window_extent(renderer)) for text in axes.texts]
    labels = [(text, box) for text, box in texts if text in DARTS.operations]
    boxes = [patch.get_window_extent(renderer) for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    lines = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    return labels, boxes, [line.get_transform().transform_path(without_arrowhead(line.get_path())) for line in lines]


def without_arrowhead(path):
    end = list(path.codes).index(Path.MOVETO, 1) if Path.MOVETO in path.codes[1:] else len(path.codes)
    return Path(path.vertices[:end], path.codes[:end])


@pytest.mark.parametrize("kind", ["normal", "reduce"])
@pytest.mark.parametrize("genotype", GENOTYPES)
def test_labels_overlap_only_their_own_edge(genotype, kind):
    labels, states, paths = measure(draw_cell(genotype, kind))
    cell = genotype.cell(kind)
    assert sorted(text for text, _ in labels) == sorted(choice.operation for node in cell for choice in node)
    assert len(states) == 7
    for first, second in combinations([box for _, box in labels] + states, 2):
        assert not first.overlaps(second)
    assert not any(path.intersects_bbox(box.padded(-3), filled=False) for path in paths for box in states)
    for _, box in labels:
        assert sum(path.intersects_bbox(box, filled=False) for path in paths) == 1


@pytest.mark.parametrize("kind", ["normal", "reduce"])
@pytest.mark.parametrize("genotype", GENOTYPES)
def test_each_edge_leads_from_its_source_to_its_node(genotype, kind):
    labels, states, paths = measure(draw_cell(genotype, kind))
    first, second, output, *nodes = states
    sources = [first, second, *nodes]

    def state_at(point, candidates):
        return next(i for i, box in enumerate(candidates) if box.padded(2).contains(*point))

    drawn = set()
    for operation, box in labels:
        path = next(path for path in paths if path.intersects_bbox(box, filled=False))
        drawn.add((state_at(path.vertices[-1], nodes), operation, state_at(path.vertices[0], sources)))
    assert drawn == {(i, *choice) for i, node in enumerate(genotype.cell(kind)) for choice in node}
    assert sum(output.padded(2).contains(*path.vertices[-1]) for path in paths) == 4


def test_a_figure_can_be_saved_and_does_not_use_pyplot():
    for form in ("png", "pdf", "svg"):
        stream = io.BytesIO()
        draw_cell(PUBLISHED["DARTS_V2"], "normal").savefig(stream, format=form)
        assert stream.tell() > 1000
    assert plt.get_fignums() == []


def test_an_unknown_kind_of_cell_is_rejected():
    with pytest.raises(ValueError, match="valid: normal, reduce"):
        draw_cell(PUBLISHED["DARTS_V2"], "reduction")
