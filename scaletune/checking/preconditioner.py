"""The optimizer's view of the loss: learning rate and divisor of each parameter, and stability."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from scaletune.checking.target import CheckRun


def learning_rates(run: CheckRun) -> dict[int, float]:
    """Current learning rate of each parameter, by its id."""
    return {
        id(p): float(group["lr"])
        for opt in run.optimizers
        for group in opt.param_groups
        for p in group["params"]
    }


def is_diagonal(run: CheckRun) -> bool:
    """Whether every optimizer divides each entry by its own number, as SGD and Adam do."""
    return all(isinstance(opt, (SGD, Adam, AdamW)) for opt in run.optimizers)


def scaled_rates(run: CheckRun, by_tensor: bool = False) -> dict[int, Tensor]:
    """lr / P of each parameter, by its id; P is the divisor of the optimizer's step.

    P is 1 for SGD and (1 - beta1**t) * (sqrt(v_t / (1 - beta2**t)) + eps) for Adam
    (arXiv:2207.14484). In coordinates divided by sqrt(lr / P) every parameter has learning rate 1.

    Args:
        run: The run.
        by_tensor: Use the root mean square of P in each tensor instead of P entry by entry.
    """
    rates = {}
    for opt in run.optimizers:
        for group in opt.param_groups:
            for p in group["params"]:
                divisor = _divisor(opt, group, p)
                if by_tensor:
                    divisor = divisor.square().mean().sqrt().expand_as(p)
                rates[id(p)] = float(group["lr"]) / divisor
    return rates


def _divisor(opt: Optimizer, group: dict[str, Any], p: Tensor) -> Tensor:
    state = opt.state.get(p, {})
    if "exp_avg_sq" not in state:
        return torch.ones_like(p)
    (beta1, beta2), t = group["betas"], float(state["step"])
    return (1 - beta1**t) * ((state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"])


def stability_threshold(run: CheckRun) -> float:
    """The value of lr * sharpness above which a quadratic diverges: the smallest over groups.

    It is 2 for gradient descent, 2 + 2 beta with momentum, and (2 + 2 beta1) / (1 - beta1) for
    Adam, which is 38 at beta1 = 0.9 (arXiv:2103.00065, arXiv:2207.14484).
    """
    limits = []
    for opt in run.optimizers:
        for group in opt.param_groups:
            beta = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
            over = 1 - beta if "betas" in group else 1 + 2 * beta if group.get("nesterov") else 1.0
            limits.append((2 + 2 * beta) / over)
    return min(limits)
