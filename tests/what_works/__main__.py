"""Write docs/what_works.md; what is wrong is printed."""

from __future__ import annotations

import torch

from .page import FAMILIES, PAGE, find, page

torch.set_num_threads(1)
found = {family: find(family) for family in FAMILIES}
PAGE.write_text(page(found))
for family, members in found.items():
    for name, shown in members.items():
        for fault in shown.faults:
            print(f"{family}: {name}: {fault}")
