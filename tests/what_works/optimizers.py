"""Optimizers of a small layer, schedulers and hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, lr_scheduler

from .case import Case, cases, sgd
from .layers import EMBEDDINGS

Make = Callable[..., Optimizer]


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh())


def of(name: str, **options: Any) -> dict[str, Any]:
    """An optimizer of torch.optim, after some steps."""
    made = getattr(torch.optim, name)
    return {"module": layer, "optimizer": lambda parameters: made(parameters, **options), "warm": 3}


def making(optimizer: Make) -> dict[str, Any]:
    return {"module": layer, "optimizer": optimizer, "warm": 3}


def first(case: dict[str, Any]) -> dict[str, Any]:
    """Without steps before: the optimizer has no state yet."""
    return case | {"warm": 0}


def grouped(parameters: Any) -> Optimizer:
    weight, bias = parameters
    return Adam([{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "lr": 0.3}], lr=0.1)


def joined_later(parameters: Any) -> Optimizer:
    weight, bias = parameters
    optimizer = SGD([weight], lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": [bias], "lr": 0.3})
    return optimizer


class Halved(SGD):
    """A subclass that changes gradients before the step."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.grad / 2
        return super().step(closure)


class Counting(Adam):
    """A subclass that only counts."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        return super().step(closure)


class Signed(Optimizer):
    """An optimizer of a user's own, in torch's way."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad.tanh(), alpha=group["lr"])


def clipping(parameters: Any) -> Optimizer:
    optimizer = SGD(parameters, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: clip(optimizer))
    return optimizer


def clip(optimizer: Optimizer, *_: Any) -> None:
    nn.utils.clip_grad_norm_(of_group(optimizer), 0.05)


def of_group(optimizer: Optimizer) -> list[Tensor]:
    return optimizer.param_groups[0]["params"]


OPTIMIZERS = {
    "SGD": of("SGD", lr=0.1),
    "SGD (momentum)": of("SGD", lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD (momentum, first step)": first(of("SGD", lr=0.1, momentum=0.9)),
    "SGD (nesterov)": of("SGD", lr=0.1, momentum=0.9, nesterov=True),
    "SGD (dampening)": of("SGD", lr=0.1, momentum=0.9, dampening=0.3),
    "SGD (maximize)": of("SGD", lr=0.1, maximize=True, momentum=0.5),
    "SGD (foreach)": of("SGD", lr=0.1, momentum=0.9, foreach=True),
    "SGD (fused)": of("SGD", lr=0.1, momentum=0.9, fused=True),
    "SGD (differentiable)": of("SGD", lr=0.1, momentum=0.9, differentiable=True)
    | {"warm": 0, "plain": lambda p: SGD(p, lr=0.1, momentum=0.9)},
    "SGD (lr as a tensor)": of("SGD", lr=torch.tensor(0.1, dtype=torch.float64), momentum=0.9),
    "SGD (lr 0)": of("SGD", lr=0.0),
    "Adam": of("Adam", lr=0.1),
    "Adam (first step)": first(of("Adam", lr=0.1, eps=0.1)),
    "Adam (weight_decay)": of("Adam", lr=0.1, weight_decay=0.1, betas=(0.5, 0.9)),
    "Adam (amsgrad)": of("Adam", lr=0.1, amsgrad=True),
    "Adam (maximize)": of("Adam", lr=0.1, maximize=True),
    "Adam (decoupled_weight_decay)": of("Adam", lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    "Adam (foreach)": of("Adam", lr=0.1, foreach=True),
    "Adam (fused)": of("Adam", lr=0.1, fused=True),
    "Adam (differentiable)": of("Adam", lr=0.1, eps=0.1, differentiable=True)
    | {"warm": 0, "plain": lambda p: Adam(p, lr=0.1, eps=0.1)},
    "Adam (lr as a tensor)": of("Adam", lr=torch.tensor(0.1, dtype=torch.float64), foreach=False),
    "AdamW": of("AdamW", lr=0.1),
    "AdamW (amsgrad)": of("AdamW", lr=0.1, amsgrad=True),
    "AdamW (fused)": of("AdamW", lr=0.1, fused=True),
    "NAdam": of("NAdam", lr=0.1),
    "NAdam (decoupled_weight_decay)": of("NAdam", lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": of("RAdam", lr=0.1, weight_decay=0.1),
    "Adamax": of("Adamax", lr=0.1, weight_decay=0.1),
    "Adagrad": of("Adagrad", lr=0.1, lr_decay=0.1, initial_accumulator_value=0.1),
    "Adagrad (fused)": of("Adagrad", lr=0.1, fused=True),
    "Adadelta": of("Adadelta", weight_decay=0.1),
    "RMSprop": of("RMSprop", lr=0.1),
    "RMSprop (momentum, centered)": of("RMSprop", lr=0.1, momentum=0.5, centered=True, weight_decay=0.1),
    "ASGD": of("ASGD", lr=0.1, weight_decay=0.1),
    "Rprop": of("Rprop", lr=0.1),
    "Adafactor": of("Adafactor", lr=0.1),
    "Muon": of("Muon", lr=0.1) | {"module": lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh())},
    "SparseAdam": EMBEDDINGS["Embedding with sparse=True"]
    | {"optimizer": lambda parameters: torch.optim.SparseAdam(list(parameters)[:1]), "warm": 3},
    "LBFGS": of("LBFGS") | {"warm": 0},
    "clip_norm of the problem": {"module": layer, "options": {"clip_norm": 0.05}, "plain": clipping},
    "parameter groups": making(grouped),
    "parameter groups added later": making(joined_later),
    "a subclass that changes gradients": making(lambda parameters: Halved(parameters, lr=0.1, momentum=0.9)),
    "a subclass that counts": making(lambda parameters: Counting(parameters, lr=0.1)),
    "an optimizer of your own": making(Signed),
}


def scheduled(make: Callable[[Optimizer], Any], optimizer: Make = sgd) -> dict[str, Any]:
    return {"module": layer, "optimizer": optimizer, "scheduler": make}


def momentum(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9)


SCHEDULERS = {
    "LambdaLR": scheduled(lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step))),
    "LambdaLR (warm-up from 0)": scheduled(lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 10)),
    "MultiplicativeLR": scheduled(lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.5)),
    "StepLR": scheduled(lambda o: lr_scheduler.StepLR(o, 1, 0.5)),
    "MultiStepLR": scheduled(lambda o: lr_scheduler.MultiStepLR(o, [1], 0.5)),
    "ConstantLR": scheduled(lambda o: lr_scheduler.ConstantLR(o, 0.5, 1)),
    "LinearLR": scheduled(lr_scheduler.LinearLR),
    "ExponentialLR": scheduled(lambda o: lr_scheduler.ExponentialLR(o, 0.5)),
    "PolynomialLR": scheduled(lr_scheduler.PolynomialLR),
    "CosineAnnealingLR": scheduled(lambda o: lr_scheduler.CosineAnnealingLR(o, 3)),
    "CosineAnnealingWarmRestarts": scheduled(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3)),
    "CyclicLR": scheduled(lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False)),
    "CyclicLR with momentum": scheduled(lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2), momentum),
    "OneCycleLR": scheduled(lambda o: lr_scheduler.OneCycleLR(o, 0.1, 5), momentum),
    "ChainedScheduler": scheduled(lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 1, 0.5)], o)),
    "SequentialLR": scheduled(
        lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o), lr_scheduler.StepLR(o, 1, 0.5)], [1])
    ),
    "ReduceLROnPlateau": scheduled(lr_scheduler.ReduceLROnPlateau),
}

MASK = torch.tensor([[1.0, 0, 1]] * 4, dtype=torch.float64)


def hooked(hook: Callable[[nn.Module], Any], **more: Any) -> dict[str, Any]:
    """A hook on the linear layer."""

    def module() -> nn.Module:
        made = layer()
        hook(made[0])
        return made

    return {"module": module} | more


def stepping(hook: Callable[[Optimizer], Any]) -> dict[str, Any]:
    """A hook on the optimizer."""

    def optimizer(parameters: Any) -> Optimizer:
        made = SGD(parameters, lr=0.1, momentum=0.9)
        hook(made)
        return made

    return {"module": layer, "optimizer": optimizer}


@torch.no_grad()
def masked(parameter: Tensor) -> None:
    parameter.grad.mul_(MASK)


@torch.no_grad()
def bounded(optimizer: Optimizer, *_: Any) -> None:
    for parameter in of_group(optimizer):
        parameter.mul_(0.9)


def stepped_in_backward(linear: nn.Module) -> None:
    for parameter in linear.parameters():
        optimizer = SGD([parameter], lr=0.1)

        def hook(parameter: Tensor, optimizer: Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(hook)


HOOKS = {
    "Tensor.register_hook of a parameter (a mask)": hooked(lambda m: m.weight.register_hook(lambda g: g * MASK)),
    "Tensor.register_hook of a parameter (clamping)": hooked(
        lambda m: m.weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    ),
    "Tensor.register_hook of a parameter that only looks": hooked(lambda m: m.weight.register_hook(lambda g: None)),
    "register_post_accumulate_grad_hook (a mask)": hooked(
        lambda m: m.weight.register_post_accumulate_grad_hook(masked)
    ),
    "register_post_accumulate_grad_hook (a step)": hooked(stepped_in_backward),
    "Optimizer.register_step_pre_hook (clipping)": stepping(lambda o: o.register_step_pre_hook(clip)),
    "Optimizer.register_step_post_hook (shrinking weights)": stepping(lambda o: o.register_step_post_hook(bounded)),
    "Optimizer.register_step_post_hook that only looks": stepping(lambda o: o.register_step_post_hook(lambda *_: None)),
    "Module.register_forward_pre_hook": hooked(lambda m: m.register_forward_pre_hook(lambda m, x: (x[0].sin(),))),
    "Module.register_forward_hook": hooked(lambda m: m.register_forward_hook(lambda m, x, y: y * m.weight.sum())),
    "Module.register_full_backward_hook that only looks": hooked(
        lambda m: m.register_full_backward_hook(lambda *_: None)
    ),
    "Module.register_full_backward_hook": hooked(
        lambda m: m.register_full_backward_pre_hook(lambda m, g: (g[0] * 0.5,)), by_autograd=True
    ),
}

CASES: list[Case] = [
    *cases("Optimizers", OPTIMIZERS),
    *cases("Learning-rate schedulers", SCHEDULERS),
    *cases("Hooks", HOOKS),
]
