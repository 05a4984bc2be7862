"""What the documents and the examples show, run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mlo.ops import torch_versions

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page):
    """The blocks of a page are one program, from top to bottom."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    source = "\n".join(blocks)
    if not torch_versions.COMPILES_GRADIENTS:
        source = source.replace("compile=True", "compile=False")
    if not torch.cuda.is_available():
        source = source.replace("capture=True", "capture=False")
    program = compile(source, page.name, "exec", dont_inherit=True)  # without this file's __future__ import
    exec(program, {"__name__": page.stem})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_lbt_composed_by_hand_runs():
    mixture = example("lbt_by_hand").main(steps=3)
    assert sum(mixture.values()) == pytest.approx(1, abs=1e-5)
    assert len(set(mixture.values())) == 3


def test_reweighting_finds_the_wrong_labels():
    assert example("reweighting").main(steps=40) > 0.75
