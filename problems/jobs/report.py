"""The report of a search: genotypes, pictures of the cells, curves, and one self-contained page that shows them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlo import Run
from mlo.files import write_atomic
from problems.nas import Genotype, draw_cell

Line = Mapping[str, Any]
CURVE = 2000  # points at most


def write_report(
    run: Run,
    genotypes: Mapping[str, Genotype],
    results: Mapping[str, Mapping[str, Any]],
    searches: Mapping[str, Sequence[str]],
    about: str,
) -> Path:
    """Write the pictures and the result page into the run folder, and return the path of the page.

    The pictures are written as PNG files in ``figures/``, and as SVG into the page.

    Args:
        genotypes: {method: the genotype that it found}.
        results: {method: {"title": text, "test_error": percent, "test_images": number, "parameters": number}}.
        searches: {method: the names of its search stages, in order}; empty for a method that does not search.
        about: a sentence about the search, for the page.
    """
    figures = run.path / "figures"
    figures.mkdir(exist_ok=True)
    sections = []
    for method, genotype in genotypes.items():
        drawn = {"normal cell": draw_cell(genotype, "normal"), "reduction cell": draw_cell(genotype, "reduce")}
        searched = _joined([run.metrics(stage, CURVE) for stage in searches[method]])
        if searched and any(key.startswith("arch/normal/") for key in searched[-1]):
            drawn["losses of the search"] = loss_curves(searched)
            drawn["mean weight of each operation"] = weight_curves(searched)
            drawn["skip-connections and entropy"] = health_curves(searched)
        if any("arch/eigenvalue" in line for line in searched):
            drawn["dominant eigenvalue"] = eigenvalue_curve(searched)
        drawn["loss of the final training"] = loss_curves(run.metrics(f"train-{method}", CURVE))
        for title, figure in drawn.items():
            _save(figure, figures / f"{method}-{title.replace(' ', '-')}.png")
        pictures = {title: _svg(figure) for title, figure in drawn.items()}
        sections.append({"genotype": genotype_file(genotypes, method), "pictures": pictures, **results[method]})
    page = run.path / "report.html"
    environment = Environment(
        loader=PackageLoader("problems.jobs", "."),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
    )
    config = (run.path / "config.yaml").read_text(encoding="utf-8")
    write_atomic(
        page, environment.get_template("report.html.j2").render(run=run, sections=sections, config=config, about=about)
    )
    return page


def genotype_file(genotypes: Mapping[str, Genotype], method: str) -> str:
    """The name of a method's genotype file: genotype.json for LBT (or else the first method), others by method."""
    main = "lbt" if "lbt" in genotypes else next(iter(genotypes))
    return "genotype.json" if method == main else f"genotype-{method}.json"


def save_genotypes(run: Run, genotypes: Mapping[str, Genotype]) -> None:
    """Write the genotype of each method into the run folder."""
    for method, genotype in genotypes.items():
        write_atomic(run.path / genotype_file(genotypes, method), genotype.model_dump_json(indent=2) + "\n")


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
    """The softmax weight of each operation, averaged over the edges, in the normal and the reduction cells."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (kind, title) in zip(panels, (("normal", "normal cell"), ("reduce", "reduction cell")), strict=True):
        prefix = f"arch/{kind}/"
        for key in (key for key in lines[0] if key.startswith(prefix) and not key.endswith("/entropy")):
            _plot(axes, lines, key, key.removeprefix(prefix))
        axes.set(xlabel="step", title=title)
    panels[0].set_ylabel("mean weight")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def health_curves(lines: Sequence[Line]) -> Figure:
    """How many skip-connections the normal cell would keep, and how undecided the operation weights are."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot(left, lines, "arch/skips", "skip-connections")
    left.set(xlabel="step", ylabel="skip-connections kept in the normal cell", ylim=(-0.2, None))
    for kind, title in (("normal", "normal cell"), ("reduce", "reduction cell")):
        _plot(right, lines, f"arch/{kind}/entropy", title)
    right.set(xlabel="step", ylabel="entropy of the operation weights")
    right.legend(frameon=False)
    return figure


def eigenvalue_curve(lines: Sequence[Line]) -> Figure:
    """The dominant eigenvalue of the validation loss's Hessian in the architecture, at the rounds that have it."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    _plot(axes, lines, "arch/eigenvalue", "dominant eigenvalue")
    axes.set(xlabel="step", ylabel="dominant eigenvalue", ylim=(0, None))
    return figure


def _joined(stages: Sequence[Sequence[Line]]) -> list[Line]:
    """The metrics of several stages as one list, with continued step numbers."""
    joined: list[Line] = []
    for lines in stages:
        done = joined[-1]["step"] if joined else 0
        joined += [{**line, "step": line["step"] + done} for line in lines]
    return joined


def _plot(axes: Axes, lines: Sequence[Line], key: str, label: str) -> None:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    axes.plot(*zip(*points, strict=True), label=label)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())


def _svg(figure: Figure) -> Markup:
    """The picture as an <svg> element. Matplotlib makes it from our own names, so it needs no escaping."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])
