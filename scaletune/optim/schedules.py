"""Schedules as pure functions of the share of tokens seen, and the averages of weights that go with them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scaletune.errors import UserError
from scaletune.recipe import Budget, Schedule

SHAPES: dict[str, Callable[[float], float]] = {  # from 1 at 0 down to 0 at 1
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def multiplier(schedule: Schedule, share: float, warmed: float | None = None) -> float:
    """Learning-rate multiplier at `share` in [0, 1] of the tokens seen: up linearly over `warmup`, then by kind down to `floor`.

    `warmed`: how much of a warmup that is counted in tokens is over; share / warmup is the same but for rounding, which the horizon is in.

    constant: 1.  linear, cosine: from the end of warmup to the last token.  wsd: 1, then by `decay_shape` over the last `decay`
    (arXiv:2405.18392).  power: min(1, (share / knee)**-power), times that decay (arXiv:2408.13359: lr = min(lr_max, a * batch * tokens**b),
    so knee_tokens = (lr_max / (a * batch))**(1 / b)).  one_cycle: half a cosine up from `start`, half a cosine down (arXiv:1708.07120).
    table: the multiplier of the last of `shares` that is passed, times warmup's.
    """
    if schedule.warmup_tokens is not None or schedule.knee_tokens is not None:
        raise UserError(
            "a schedule that counts tokens must be put as shares first: `resolved(schedule, budget)`"
        )
    risen = warmed if warmed is not None else share / schedule.warmup if schedule.warmup else 1.0
    if schedule.kind == "table":
        return schedule.multipliers[bisect_right(schedule.shares, share) - 1] * min(risen, 1.0)
    if risen < 1:
        return _up(schedule, risen)
    if schedule.kind == "constant":
        return 1.0
    decays = schedule.kind in ("wsd", "power")
    start = 1.0 - schedule.decay if decays else schedule.warmup
    down = min(1.0, max(0.0, (share - start) / max(1.0 - start, 1e-12)))
    shape = SHAPES[
        schedule.decay_shape if decays else "linear" if schedule.kind == "linear" else "cosine"
    ]
    return _level(schedule, min(share, start)) * (
        schedule.floor + (1 - schedule.floor) * shape(down)
    )


def _up(schedule: Schedule, done: float) -> float:
    """During warmup, `done` of it over."""
    if schedule.kind == "one_cycle":
        return schedule.start + (1 - schedule.start) * (1 - SHAPES["cosine"](done))
    return done * _level(schedule, schedule.warmup)


def _level(schedule: Schedule, share: float) -> float:
    """The multiplier before any decay: 1, but under a power law past its knee."""
    if schedule.kind != "power" or schedule.knee is None or share <= schedule.knee:
        return 1.0
    return (share / schedule.knee) ** -schedule.power


def set_share(
    opt: Optimizer, schedule: Schedule, share: float, warmed: float | None = None
) -> None:
    """Set every group's lr to its own peak times the multiplier."""
    now = multiplier(schedule, share, warmed)
    for group in opt.param_groups:
        group["lr"] = group["initial_lr"] * now


def ema(model: nn.Module, schedule: Schedule, budget: Budget) -> AveragedModel | None:
    """An exponential moving average of the weights, a <- d * a + (1 - d) * w with d = 2**(-batch_tokens / ema_half_life); None: none asked.

    Call `update_parameters(model)` after every step; the first one copies the weights. Its state is plain tensors.
    """
    if schedule.ema_half_life is None:
        return None
    decay = 0.5 ** (budget.batch_tokens / schedule.ema_half_life)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


@contextmanager
def judged(
    model: nn.Module, opt: Optimizer, average: AveragedModel | None = None
) -> Iterator[None]:
    """Put the weights that are to be judged into the model, and those in training back: the average's, and schedule-free's own average."""
    opt.eval() if hasattr(opt, "eval") else None
    kept = (
        [p.detach().clone() for p in model.parameters()] if average and average.n_averaged else []
    )
    if kept and average:
        _copy(model, [p.detach() for p in average.module.parameters()])
    try:
        yield
    finally:
        if kept:
            _copy(model, kept)
        opt.train() if hasattr(opt, "train") else None


@torch.no_grad()
def _copy(model: nn.Module, values: list[torch.Tensor]) -> None:
    for p, value in zip(model.parameters(), values, strict=True):
        p.copy_(value)
