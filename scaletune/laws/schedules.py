"""Learning rates over the steps of a run, as the laws of schedules take them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scaletune.errors import UserError, nearest

SHAPES = ("cosine", "constant")
FORMAT = "SHAPE:STEPS:WARMUP:PEAK:END"
MOST = 10**7  # steps: a list of floats, not more


def lr_schedule(value: str | Sequence[float]) -> tuple[float, ...]:
    """One lr a step, of a list of them or of text such as `cosine:24000:2160:3e-4:3e-5`."""
    lrs = _shaped(value) if isinstance(value, str) else value
    try:
        read = tuple(map(float, lrs))
    except (TypeError, ValueError):
        read = ()
    if not read or not all(math.isfinite(lr) and lr >= 0 for lr in read) or not any(read):
        raise UserError(
            f"`lr_schedule` must be {FORMAT} or a list of finite lrs of at least 0, one above 0, but got {_brief(value)}"
        )
    return read


def _shaped(text: str) -> tuple[float, ...]:
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
        0 <= warmup < steps <= MOST
        and steps == int(steps)
        and warmup == int(warmup)
        and 0 <= end <= peak < math.inf
    ):
        raise UserError(
            f"`lr_schedule` must have whole WARMUP < STEPS <= {MOST:g} and 0 <= END <= PEAK, but got {text!r}"
        )
    return warmed(shape, int(steps), int(warmup), peak, end)


def warmed(shape: str, steps: int, warmup: int, peak: float, end: float) -> tuple[float, ...]:
    """`warmup` steps in a line up to the peak, then half a cosine down to `end`, or the peak to the last."""
    rise = [peak * step / warmup for step in range(1, warmup + 1)]
    rest = steps - warmup
    if shape == "constant":
        return (*rise, *[peak] * rest)
    return (
        *rise,
        *(end + (peak - end) * (1 + math.cos(math.pi * step / rest)) / 2 for step in range(rest)),
    )


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
