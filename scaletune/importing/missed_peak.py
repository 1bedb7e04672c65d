"""How much higher than its largest logged value a learning rate may have been.

A tracker logs every n steps, so the peak after warmup may lie between two log lines. A bound on it:
the decay that follows the largest value, continued back to the log line before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from scaletune.importing.names import is_lr
from scaletune.units import human

NOTABLE = 1.05  # a smaller bias in the peak is within the interval of any optimum


def missed_peak(points: Iterable[tuple[int, float]]) -> float:
    """The largest factor by which the true peak may exceed the largest logged value.

    For a linear decay that began between two log lines the bound holds exactly; a cosine decays
    more slowly at first, so that the bound is wider. A constant schedule gives 1.

    Args:
        points: (step, learning rate) of one run.

    Example:
        >>> missed_peak([(10, 0.8), (20, 0.6), (30, 0.4)])  # at step 0: 1.0
        1.25
    """
    by_step = {step: value for step, value in points if math.isfinite(value)}
    steps = sorted(by_step)
    if len(steps) < 2 or max(by_step.values()) <= 0:
        return 1.0
    top = max(steps, key=lambda step: (by_step[step], -step))
    place = steps.index(top)
    if place + 1 == len(steps):  # still rising at the end
        return 1.0
    before, after = steps[place - 1] if place else 0, steps[place + 1]
    slope = (by_step[top] - by_step[after]) / (after - top)
    return 1.0 + slope * max(top - before, 0) / by_step[top]


def missed_peaks(histories: Iterable[Mapping[str, list[tuple[int, float]]]]) -> list[str]:
    """A warning if learning rates are sparse in the histories of runs without such a setting."""
    factors = [
        (missed_peak(points), name, min(step for step, _ in points))
        for history in histories
        for name, points in history.items()
        if is_lr(name) and points
    ]
    factor, name, first = max(factors, default=(1.0, "", 0))
    if factor < NOTABLE:
        return []
    return [
        f"the log is sparse (its first `{name}` is at step {human(first)}), so that the peak may be"
        f" up to {factor:.2g} times the largest logged value (--map lr=NAME reads a setting)"
    ]
