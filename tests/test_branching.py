"""Horizons on one trunk: each trial is to the bit what it is alone, and what is spent is the closed form."""

import math

import pytest
import torch

from scaletune import data, optim, training
from scaletune.counting import branching as counted
from scaletune.recipe import resolved

MEASURED = ("id", "sweep", "status", "loss", "train_loss", "message", "flops", "point")
BATCH, SHORT = 256, 8  # tokens a step, steps of the shortest horizon
WSD = {"schedule.kind": "wsd", "schedule.warmup_tokens": 3 * BATCH, "schedule.decay": 0.5}
AVERAGED = {"schedule.kind": "constant", "schedule.warmup_tokens": 700, "schedule.ema_half_life": 1024}


@pytest.fixture(scope="module")
def acc():
    return training.accelerator()


@pytest.fixture(scope="module")
def horizons(tiny):
    """settings -> the points of horizons T, 2T, 4T."""
    return lambda settings, factors=(1, 2, 4): [tiny(settings | {"tokens": SHORT * BATCH * k}) for k in factors]


def measured(trial, curve):
    held_out = trial.metrics["held_out"]
    return {name: getattr(trial, name) for name in MEASURED}, [x if math.isfinite(x) else None for x in curve], held_out


def together(points, acc, **options):
    return list(training.stacked(points, ["main"] * len(points), acc, **options))


def same_as_alone(points, acc):
    """Train both ways; records and curves must be the same to the bit. The branched trials."""
    found = together(points, acc)
    alone = [measured(*training.trial(point, "main", acc)) for point in points]
    assert {trial.id: measured(trial, curve) for trial, curve in found} == {record["id"]: (record, *rest) for record, *rest in alone}
    return [trial for trial, _ in found]


@pytest.mark.parametrize("schedule", [WSD, AVERAGED, WSD | {"schedule.ema_half_life": 1024, "schedule.decay_shape": "1-sqrt"}], ids=str)
def test_a_branch_is_the_trial_alone(horizons, acc, schedule):
    trials = same_as_alone(horizons(schedule | {"engine.evaluate_at": [0.0, 0.3, 0.8]}), acc)
    assert [trial.tokens // (SHORT * BATCH) for trial in trials] == [1, 2, 4]  # told as soon as they end
