"""The learning-rate range test: one short run with a rising learning rate (arXiv:1506.01186, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from scaletune import data
from scaletune.errors import UserError
from scaletune.recipe import Recipe, with_settings
from scaletune.training.loop import Run, descend, released, start
from scaletune.training.processes import accelerator

SMOOTH = 0.9  # decay of the loss's moving average, a step


def lr_range_test(
    recipe: Recipe, low: float, high: float, steps: int = 100, acc: Accelerator | None = None
) -> dict[str, Any]:
    """Train for `steps` at lr = low * (high / low)**(step / (steps - 1)), peak at base width, and read three learning rates off the loss.

    {"records": [{"step", "lr", "loss", "smooth"}], "steepest", "lowest", "diverged_at", "suggestion"}: where the smoothed loss falls
    fastest per factor of lr, where it is lowest, where it is back above its start (None: nowhere in the range). The suggestion is
    `steepest`: a starting point for a sweep, never a substitute; a ramp cannot see warmup, decay or the horizon.
    """
    if not (0 < low < high < math.inf and steps >= 10):
        raise UserError(
            f"`0 < low < high` and `steps >= 10` must hold for a range test, but got low={low}, high={high}, steps={steps}"
        )
    recipe = with_settings(recipe.model_copy(update={"axes": {}}), {"engine.noise_every": 0})
    acc = acc or accelerator()
    lrs = [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]
    with released(recipe, acc):
        run = start(recipe, data.load(recipe.data), acc)
        losses = _ramped(run, lrs)
        return summary(lrs[: len(losses)], losses, run.ceiling)


def _ramped(run: Run, lrs: Sequence[float]) -> list[float]:
    """The training loss at each learning rate, up to and with the first that is not finite or above the ceiling."""
    losses: list[float] = []
    for step, lr in enumerate(lrs):
        for group in run.opt.param_groups:
            group["lr"] = group["initial_lr"] * lr / run.recipe.optimizer.lr
        descend(run, step)
        loss = run.unread.pop()
        losses.append(float(run.acc.reduce(loss, "mean") if run.acc.num_processes > 1 else loss))
        if not losses[-1] <= run.ceiling:
            break
    return losses


def summary(
    lrs: Sequence[float], losses: Sequence[float], ceiling: float = math.inf
) -> dict[str, Any]:
    """What a range test says of (lr, loss) pairs, lr rising; a loss that is not finite or above `ceiling` ends what is looked at."""
    end = next((i for i, loss in enumerate(losses) if not loss <= ceiling), None)
    smooth = _smoothed(losses[:end])
    records = [
        {"step": i, "lr": lr, "loss": loss, "smooth": smooth[i] if i < len(smooth) else None}
        for i, (lr, loss) in enumerate(zip(lrs, losses, strict=True)) if math.isfinite(loss)
    ]  # fmt: skip
    found = {
        "records": records,
        "steepest": None,
        "lowest": None,
        "diverged_at": None if end is None else lrs[end],
        "suggestion": None,
    }
    if len(smooth) < 3:
        return found
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    back = next((i for i in range(lowest, len(smooth)) if smooth[i] > smooth[0]), None)
    slopes = torch.gradient(
        torch.tensor(smooth, dtype=torch.float64),
        spacing=(torch.tensor(lrs[: len(smooth)]).double().log(),),
    )[0]
    steepest = lrs[int(slopes[: lowest + 1].argmin())]
    falls = smooth[lowest] < smooth[0]  # a loss that only rises has no learning rate to suggest
    return found | {
        "lowest": lrs[lowest], "diverged_at": lrs[back] if back is not None else found["diverged_at"],
        "steepest": steepest if falls else None, "suggestion": steepest if falls else None,
    }  # fmt: skip


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Moving average with the start's bias divided out."""
    average, found = 0.0, []
    for i, loss in enumerate(losses, 1):
        average = SMOOTH * average + (1 - SMOOTH) * loss
        found.append(average / (1 - SMOOTH**i))
    return found
