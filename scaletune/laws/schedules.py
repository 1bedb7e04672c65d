"""Learning-rate schedules as lists with one value per step, the input of schedule laws."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scaletune.errors import UserError, nearest

SHAPES = ("cosine", "constant")
FORMAT = "SHAPE:STEPS:WARMUP:PEAK:END"
MAX_STEPS = 10**7


def lr_schedule(value: str | Sequence[float]) -> tuple[float, ...]:
    """Returns one learning rate per step, from a list or from `cosine:24000:2160:3e-4:3e-5`."""
    lrs = _parse(value) if isinstance(value, str) else value
    try:
        schedule = tuple(map(float, lrs))
    except (TypeError, ValueError):
        schedule = ()
    valid = all(math.isfinite(lr) and lr >= 0 for lr in schedule)
    if not schedule or not valid or not any(schedule):
        raise UserError(
            f"`lr_schedule` must be {FORMAT} or a list of finite numbers of at least 0, "
            f"one of them above 0, but got {_abbreviate(value)}"
        )
    return schedule


def _parse(text: str) -> tuple[float, ...]:
    shape, *numbers = text.split(":")
    if shape not in SHAPES:
        raise UserError(
            f"`lr_schedule` must be {FORMAT}, but got SHAPE {shape!r}{nearest(shape, SHAPES)}"
        )
    try:
        steps, warmup, peak, end = (float(number) for number in numbers)
    except ValueError:
        raise UserError(f"`lr_schedule` must be {FORMAT}, but got {text!r}") from None
    if not (
        0 <= warmup < steps <= MAX_STEPS
        and steps == int(steps)
        and warmup == int(warmup)
        and 0 <= end <= peak < math.inf
    ):
        raise UserError(
            f"`lr_schedule` must have integers WARMUP < STEPS <= {MAX_STEPS:g} "
            f"and 0 <= END <= PEAK, but got {text!r}"
        )
    return build_schedule(shape, int(steps), int(warmup), peak, end)


def build_schedule(
    shape: str, steps: int, warmup: int, peak: float, end: float
) -> tuple[float, ...]:
    """Linear warmup to `peak`, then half a cosine down to `end`, or constant `peak`."""
    rise = [peak * step / warmup for step in range(1, warmup + 1)]
    rest = steps - warmup
    if shape == "constant":
        return (*rise, *[peak] * rest)
    return (
        *rise,
        *(end + (peak - end) * (1 + math.cos(math.pi * step / rest)) / 2 for step in range(rest)),
    )


def _abbreviate(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
