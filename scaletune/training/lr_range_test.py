"""The learning-rate range test: a short run with a rising lr (arXiv:1506.01186, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from scaletune import data
from scaletune.errors import UserError
from scaletune.recipe import Recipe, with_settings
from scaletune.training.loop import start_run, train_on_batch, training_context
from scaletune.training.processes import accelerator
from scaletune.training.run import TrainingRun

SMOOTHING = 0.9
"""Decay of the loss's moving average per step."""


def lr_range_test(
    recipe: Recipe, low: float, high: float, steps: int = 100, acc: Accelerator | None = None
) -> dict[str, Any]:
    """Trains with a learning rate that rises from `low` to `high`, and suggests a start value.

    The suggestion is a starting point for a sweep and does not replace it: the test does not see
    warmup, decay or the token horizon.

    Args:
        recipe: A recipe; its axes are ignored.
        low: Learning rate of the first step (peak lr at base width).
        high: Learning rate of the last step. In between it rises geometrically.
        steps: Number of steps, at least 10.
        acc: An Accelerator; None creates one.

    Returns:
        "records": [{"step", "lr", "loss", "smooth"}]; "steepest": the lr where the smoothed loss
        falls fastest in ln lr; "lowest": where it is lowest; "diverged_at": where it is above its
        start again, or None; "suggestion": the same as "steepest", or None if the loss only rises.
    """
    if not (0 < low < high < math.inf and steps >= 10):
        raise UserError(
            "`0 < low < high` and `steps >= 10` must hold for a range test,"
            f" but got low={low}, high={high}, steps={steps}"
        )
    recipe = with_settings(recipe.model_copy(update={"axes": {}}), {"engine.noise_every": 0})
    acc = acc or accelerator()
    lrs = [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]
    with training_context(recipe, acc):
        run = start_run(recipe, data.load(recipe.data), acc)
        losses = _train_with_rising_lr(run, lrs)
        return summarize(lrs[: len(losses)], losses, run.max_loss)


def _train_with_rising_lr(run: TrainingRun, lrs: Sequence[float]) -> list[float]:
    """The training loss at each learning rate; stops after a loss that shows a divergence."""
    losses: list[float] = []
    for step, lr in enumerate(lrs):
        for group in run.opt.param_groups:
            group["lr"] = group["initial_lr"] * lr / run.recipe.optimizer.lr
        train_on_batch(run, step)
        loss = run.unread_losses.pop()
        losses.append(float(run.acc.reduce(loss, "mean") if run.acc.num_processes > 1 else loss))
        if not losses[-1] <= run.max_loss:
            break
    return losses


def summarize(
    lrs: Sequence[float], losses: Sequence[float], max_loss: float = math.inf
) -> dict[str, Any]:
    """The result of a range test from its (lr, loss) pairs, lr rising.

    Losses from the first that is not finite or above `max_loss` on are not used.
    """
    end = next((i for i, loss in enumerate(losses) if not loss <= max_loss), None)
    smooth = _smooth(losses[:end])
    result: dict[str, Any] = {
        "records": _records(lrs, losses, smooth),
        "steepest": None,
        "lowest": None,
        "diverged_at": None if end is None else lrs[end],
        "suggestion": None,
    }
    if len(smooth) < 3:
        return result
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    result["lowest"] = lrs[lowest]
    above_start = next((i for i in range(lowest, len(smooth)) if smooth[i] > smooth[0]), None)
    if above_start is not None:
        result["diverged_at"] = lrs[above_start]
    if smooth[lowest] < smooth[0]:
        ln_lrs = torch.tensor(lrs[: len(smooth)]).double().log()
        slopes = torch.gradient(torch.tensor(smooth, dtype=torch.float64), spacing=(ln_lrs,))[0]
        result["steepest"] = result["suggestion"] = lrs[int(slopes[: lowest + 1].argmin())]
    return result


def _records(
    lrs: Sequence[float], losses: Sequence[float], smooth: Sequence[float]
) -> list[dict[str, Any]]:
    return [
        {"step": i, "lr": lr, "loss": loss, "smooth": smooth[i] if i < len(smooth) else None}
        for i, (lr, loss) in enumerate(zip(lrs, losses, strict=True))
        if math.isfinite(loss)
    ]


def _smooth(losses: Sequence[float]) -> list[float]:
    """The moving average, corrected for its start at 0."""
    average, smooth = 0.0, []
    for i, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smooth.append(average / (1 - SMOOTHING**i))
    return smooth
