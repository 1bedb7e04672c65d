"""The loss as the optimizer sees it: each parameter's lr, what its step is divided by, and where stability ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from scaletune.checking.target import Run


def rates(run: Run) -> dict[int, float]:
    """id of a parameter -> the lr it is trained at now."""
    return {
        id(p): float(group["lr"])
        for opt in run.optimizers
        for group in opt.param_groups
        for p in group["params"]
    }


def known(run: Run) -> bool:
    """Whether a diagonal stands for what every optimizer does: SGD's, or Adam's once it has stepped."""
    return all(isinstance(opt, (SGD, Adam, AdamW)) for opt in run.optimizers)


def weights(run: Run, by_tensor: bool = False) -> dict[int, Tensor]:
    """id of a parameter -> lr / P, P what its step is divided by: 1 of SGD, (1 - beta1**t) * (sqrt(v_t / (1 - beta2**t)) + eps) of Adam
    (arXiv:2207.14484). In coordinates divided by sqrt(lr / P) every parameter is trained at lr 1. by_tensor: P's RMS in each.
    """
    found = {}
    for opt in run.optimizers:
        for group in opt.param_groups:
            for p in group["params"]:
                divisor = _divisor(opt, group, p)
                found[id(p)] = float(group["lr"]) / (
                    divisor.square().mean().sqrt().expand_as(p) if by_tensor else divisor
                )
    return found


def _divisor(opt: Optimizer, group: dict[str, Any], p: Tensor) -> Tensor:
    state = opt.state.get(p, {})
    if "exp_avg_sq" not in state:
        return torch.ones_like(p)
    (beta1, beta2), t = group["betas"], float(state["step"])
    return (1 - beta1**t) * ((state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"])


def threshold(run: Run) -> float:
    """What lr times sharpness can be before a quadratic diverges: 2 of gradient descent, (2 + 2 beta) of momentum, of Adam
    (2 + 2 beta1) / (1 - beta1) = 38 at 0.9 (arXiv:2103.00065, arXiv:2207.14484). The least over groups."""
    found = []
    for opt in run.optimizers:
        for group in opt.param_groups:
            beta = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
            over = 1 - beta if "betas" in group else 1 + 2 * beta if group.get("nesterov") else 1.0
            found.append((2 + 2 * beta) / over)
    return min(found)
