"""The end of a search: genotypes, pictures of the cells, curves, and one self-contained page that shows it all."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlo.files import write_atomic
from mlo.run import Run
from problems.nas import DARTS, Genotype, draw_cell

Line = Mapping[str, Any]
TITLES = {"lbt": "Learning by Teaching", "darts": "DARTS", "random": "Random architecture"}


def write_report(
    run: Run, genotypes: Mapping[str, Genotype], results: Mapping[str, Mapping[str, Any]], about: str
) -> Path:
    """Write everything that shows a run into its folder, and return the path of its page.

    ``genotype.json`` is LBT's, or else the first method's; those of the others are ``genotype-<method>.json``. The
    pictures are PNG files in ``figures/``, and inside the page as SVG.

    Args:
        genotypes: {method: what it found}.
        results: {method: {"test_error": percent, "test_images": number, "parameters": number}}.
        about: one sentence on what was run, for the page.
    """
    figures = run.path / "figures"
    figures.mkdir(exist_ok=True)
    sections = []
    main = "lbt" if "lbt" in genotypes else next(iter(genotypes))
    for method, genotype in genotypes.items():
        name = "genotype.json" if method == main else f"genotype-{method}.json"
        write_atomic(run.path / name, genotype.model_dump_json(indent=2) + "\n")
        drawn = {"normal cell": draw_cell(genotype, "normal"), "reduction cell": draw_cell(genotype, "reduce")}
        searched = run.metrics(f"search-{method}")
        if searched:
            drawn["losses of the search"] = loss_curves(searched)
            drawn["mean weight of each operation"] = weight_curves(searched)
        drawn["loss of the final training"] = loss_curves(run.metrics(f"train-{method}"))
        for title, figure in drawn.items():
            _save(figure, figures / f"{method}-{title.replace(' ', '-')}.png")
        pictures = {title: _svg(figure) for title, figure in drawn.items()}
        sections.append({"title": TITLES[method], "genotype": name, "pictures": pictures, **results[method]})
    page = run.path / "report.html"
    environment = Environment(
        loader=PackageLoader("problems", "."), autoescape=select_autoescape(["html", "j2"]), undefined=StrictUndefined
    )
    config = (run.path / "config.yaml").read_text(encoding="utf-8")
    write_atomic(
        page, environment.get_template("report.html.j2").render(run=run, sections=sections, config=config, about=about)
    )
    return page


def loss_curves(lines: Sequence[Line]) -> Figure:
    """The loss of each level against the step."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for key in (key for key in lines[-1] if key.endswith("/loss")):
        _plot(axes, lines, key, key.removesuffix("/loss"))
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False)
    return figure


def weight_curves(lines: Sequence[Line]) -> Figure:
    """The softmax weight of each operation, a mean over the edges, in the normal and the reduction cells."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (kind, title) in zip(panels, (("normal", "normal cell"), ("reduce", "reduction cell")), strict=True):
        for operation in DARTS.operations:
            _plot(axes, lines, f"arch/{kind}/{operation}", operation)
        axes.set(xlabel="step", title=title)
    panels[0].set_ylabel("mean weight")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _plot(axes: Axes, lines: Sequence[Line], key: str, label: str) -> None:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    axes.plot(*zip(*points, strict=True), label=label)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())


def _svg(figure: Figure) -> Markup:
    """The picture as an <svg> element; made by matplotlib from names of ours, so it is safe in a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])
