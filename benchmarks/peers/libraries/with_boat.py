"""The two-level workloads with BOAT: losses named by strings, one iteration at a time."""

from __future__ import annotations

import itertools
import os
import tempfile
from typing import Any

import boat_torch
import torch
from torch import Tensor, nn

from benchmarks.peers.catalogue import ITERATIONS
from benchmarks.peers.libraries import Runner
from benchmarks.peers.workloads import RADIUS, Bilevel

OPERATIONS = {"one_step": "RAD", "unrolled": "RAD", "darts": "FD", "cg": "CG", "neumann": "NS"}


def lower(data: dict[str, Any], weights: nn.Module, model: nn.Module, params: Any = None, **kwargs: Any) -> Tensor:
    """The lower loss, as BOAT calls it."""
    parameters = list(model.parameters()) if params is None else params
    return kwargs["task"].lower_loss(_run(model, params), weights, parameters, data["batch"])


def upper(data: dict[str, Any], weights: nn.Module, model: nn.Module, params: Any = None, **kwargs: Any) -> Tensor:
    """The upper loss, as BOAT calls it."""
    return kwargs["task"].upper_loss(_run(model, params), data["batch"])


def build(task: Bilevel, estimator: str) -> Runner:
    """See :mod:`benchmarks.peers.libraries`."""
    return _Run(task, estimator)


class _Run:
    def __init__(self, task: Bilevel, estimator: str) -> None:
        self._task = task
        self._hyper = list(task.weights.parameters())
        sgd = torch.optim.SGD(task.model.parameters(), lr=task.lr, momentum=task.momentum)
        self._adam = torch.optim.Adam(self._hyper, lr=task.upper_lr)
        config = _config(task, estimator, sgd, self._adam)
        losses = {
            f"{level}_level_loss": {"function": f"{__name__}.{level}", "params": {"task": task}}
            for level in ("lower", "upper")
        }
        self._problem = boat_torch.Problem(config, losses)
        self._problem.build_ll_solver()
        self._problem.build_ul_solver()
        self._batches = zip(itertools.cycle(task.lower), itertools.cycle(task.upper), strict=False)
        self._count = 0

    def gradient(self) -> list[Tensor]:
        ours, theirs = next(self._batches)
        for parameter in self._hyper:
            parameter.grad = None
        self._problem.run_iter({"batch": ours}, {"batch": theirs}, self._count)
        self._count += 1
        return [p.grad for p in self._hyper]

    def round(self) -> None:
        self.gradient()
        if self._task.trains:
            self._adam.step()


def _config(task: Bilevel, estimator: str, sgd: torch.optim.Optimizer, adam: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "fo_op": None,
        "gm_op": ["NGD"],
        "na_op": [OPERATIONS[estimator]],
        "lower_level_model": task.model,
        "upper_level_model": task.weights,
        "lower_level_var": list(task.model.parameters()),
        "upper_level_var": list(task.weights.parameters()),
        "lower_level_opt": sgd,
        "upper_level_opt": adam,
        "lower_iters": task.steps,
        "device": "cpu",
        "accumulate_grad": False,
        "return_grad": True,
        "copy_last_param": task.trains,
        "loss_log_path": os.path.join(tempfile.gettempdir(), f"boat-{os.getpid()}.json"),
        "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0},
        "RGT": {"truncate_iter": 0},
        "FD": {"r": RADIUS},
        # its number of terms does not include the first
        "CG": {"k": ITERATIONS if estimator == "cg" else ITERATIONS - 1, "tolerance": 0.0},
    }


def _run(model: nn.Module, params: Any) -> Any:
    return model if params is None else lambda images: model(images, params=params)
