"""The page docs/what_works.md says what is found, and nothing that is found is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

if not hasattr(nn, "LinearCrossEntropyLoss"):
    pytest.skip("the page is about the layers and optimizers of PyTorch 2.14", allow_module_level=True)

from what_works.page import CASES, FAMILIES, HEAD, PAGE, find, section, sections

SLOW = ("Scripted, traced and compiled modules", "Pooling, padding, resampling and shapes")
OTHER_LAYERS = """Container DataParallel Module ModuleDict ModuleList NLLLoss2d ParameterDict ParameterList RNNBase
RNNCellBase Sequential SyncBatchNorm"""


@pytest.mark.filterwarnings("ignore")  # of torch; those of mlo are looked at
@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=pytest.mark.slow if family in SLOW else ()) for family in FAMILIES]
)
def test_the_page_says_what_is_found(family):
    found = find(family)
    faults = [f"{name}: {fault}" for name, shown in found.items() for fault in shown.faults]
    assert not faults, "\n".join(faults)
    written = sections(PAGE.read_text())[family]
    assert section(family, found) == written, "write the page anew: python -m tests.what_works"


def test_the_page_has_these_sections_only():
    text = PAGE.read_text()
    assert text.startswith(HEAD)
    assert list(sections(text)) == list(FAMILIES)


def test_names_are_unique_in_a_family():
    assert len({(case.family, case.name) for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("namespace", "base", "others"),
    [
        (nn, nn.Module, OTHER_LAYERS),
        (torch.optim, Optimizer, "Optimizer"),
        (lr_scheduler, lr_scheduler.LRScheduler, ""),
    ],
    ids=["torch.nn", "torch.optim", "lr_scheduler"],
)
def test_no_class_of_torch_is_left_out(namespace, base, others):
    shown = {case.name.split()[0].rstrip(",") for case in CASES} | {"LRScheduler", *others.split()}
    classes = {n for n, c in vars(namespace).items() if isinstance(c, type) and issubclass(c, base) and n[0] != "_"}
    assert {name for name in classes if not name.startswith("Lazy")} <= shown
