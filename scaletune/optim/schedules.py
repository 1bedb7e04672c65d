"""Learning-rate schedules as pure functions of the share of tokens seen, and weight averages."""

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

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}
"""Decays from 1 at x = 0 to 0 at x = 1."""


def multiplier(schedule: Schedule, share: float, warmup_share: float | None = None) -> float:
    """The learning-rate multiplier of a schedule.

    It rises linearly over `warmup`, and then depends on the kind:

    - constant: 1.
    - linear, cosine: decays from the end of warmup to the last token, to `floor`.
    - wsd: 1, then decays by `decay_shape` over the last `decay` of the tokens, to `floor`
      (arXiv:2405.18392).
    - power: min(1, (share / knee)**-power), times the decay of wsd (arXiv:2408.13359:
      lr = min(lr_max, a * batch * tokens**b), so knee_tokens = (lr_max / (a * batch))**(1 / b)).
    - one_cycle: half a cosine up from `start`, half a cosine down (arXiv:1708.07120).
    - table: the multiplier of the last entry of `shares` that is passed, times that of warmup.

    Args:
        schedule: A schedule in shares of the tokens; convert one with token counts by
            `resolve_schedule(schedule, budget)`.
        share: Share of the tokens seen, in [0, 1].
        warmup_share: Share of the warmup that is over, for a warmup that is counted in tokens.
            None: share / warmup, which is the same but for rounding that depends on the horizon.

    Returns:
        The multiplier of each group's peak learning rate.

    Raises:
        UserError: The schedule contains token counts.

    Example:
        >>> from scaletune import optim, recipe
        >>> schedule = recipe.Schedule(kind="wsd", warmup=0.1, decay=0.5)
        >>> [optim.multiplier(schedule, share) for share in (0.05, 0.1, 0.5, 0.75, 1.0)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if schedule.warmup_tokens is not None or schedule.knee_tokens is not None:
        raise UserError(
            "a schedule must be in shares of the tokens, but it has token counts:"
            " use `resolve_schedule(schedule, budget)`"
        )
    if warmup_share is None:
        warmup_share = share / schedule.warmup if schedule.warmup else 1.0
    if schedule.kind == "table":
        row = bisect_right(schedule.shares, share) - 1
        return schedule.multipliers[row] * min(warmup_share, 1.0)
    if warmup_share < 1:
        return _warmup_multiplier(schedule, warmup_share)
    if schedule.kind == "constant":
        return 1.0
    has_decay = schedule.kind in ("wsd", "power")
    start = 1.0 - schedule.decay if has_decay else schedule.warmup
    decayed = min(1.0, max(0.0, (share - start) / max(1.0 - start, 1e-12)))
    name = schedule.decay_shape if has_decay else schedule.kind
    shape = SHAPES["cosine" if name == "one_cycle" else name]
    peak = _power_law_multiplier(schedule, min(share, start))
    return peak * (schedule.floor + (1 - schedule.floor) * shape(decayed))


def _warmup_multiplier(schedule: Schedule, warmup_share: float) -> float:
    """The multiplier during warmup."""
    if schedule.kind == "one_cycle":
        return schedule.start + (1 - schedule.start) * (1 - SHAPES["cosine"](warmup_share))
    return warmup_share * _power_law_multiplier(schedule, schedule.warmup)


def _power_law_multiplier(schedule: Schedule, share: float) -> float:
    """The multiplier without decay: 1, except for a power law after its knee."""
    if schedule.kind != "power" or schedule.knee is None or share <= schedule.knee:
        return 1.0
    return (share / schedule.knee) ** -schedule.power


def set_learning_rates(
    opt: Optimizer, schedule: Schedule, share: float, warmup_share: float | None = None
) -> None:
    """Sets the lr of each group to its peak times the multiplier."""
    factor = multiplier(schedule, share, warmup_share)
    for group in opt.param_groups:
        group["lr"] = group["initial_lr"] * factor


def weight_average(model: nn.Module, schedule: Schedule, budget: Budget) -> AveragedModel | None:
    """The exponential moving average of the weights; None without `ema_half_life`.

    a <- d * a + (1 - d) * w with d = 2**(-batch_tokens / ema_half_life). Call
    `update_parameters(model)` after every step; the first call copies the weights.
    """
    if schedule.ema_half_life is None:
        return None
    decay = 0.5 ** (budget.batch_tokens / schedule.ema_half_life)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


@contextmanager
def evaluation_weights(
    model: nn.Module, opt: Optimizer, average: AveragedModel | None = None
) -> Iterator[None]:
    """Inside this context the model has the weights to evaluate, after it the weights in training.

    The weights to evaluate are those of `average`, or the average that a schedule-free optimizer
    keeps.
    """
    if hasattr(opt, "eval"):
        opt.eval()
    training_weights = (
        [p.detach().clone() for p in model.parameters()] if average and average.n_averaged else []
    )
    if training_weights and average:
        _copy_weights(model, [p.detach() for p in average.module.parameters()])
    try:
        yield
    finally:
        if training_weights:
            _copy_weights(model, training_weights)
        if hasattr(opt, "train"):
            opt.train()


@torch.no_grad()
def _copy_weights(model: nn.Module, values: list[torch.Tensor]) -> None:
    for p, value in zip(model.parameters(), values, strict=True):
        p.copy_(value)
