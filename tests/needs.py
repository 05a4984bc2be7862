"""Marks of tests that need more than the oldest supported torch has."""

from __future__ import annotations

import pytest
import torch

from mlo.ops import torch_versions


def _needs(there: bool, reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not there, reason=f"torch {torch.__version__} {reason}")


compiled_gradients = _needs(torch_versions.COMPILES_GRADIENTS, "cannot compile gradients")
muon = _needs(hasattr(torch.optim, "Muon"), "has no Muon")
