"""Compares schedules with closed forms, torch and transformers; tests weight averages."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR

from scaletune import counting, models, optim, recipe
from scaletune.errors import UserError
from scaletune.recipe import Budget, Schedule

KINDS = ("constant", "linear", "cosine", "wsd", "power", "one_cycle")
fractions, shares, kinds = st.floats(0, 1), st.floats(0, 1), st.sampled_from(KINDS)
BUDGET = Budget(tokens=100 * 64, batch_tokens=64)


@st.composite
def schedules(draw):
    kind, warmup = draw(kinds), draw(fractions)
    own = {
        "power": {"knee": draw(st.floats(0.01, 2))},
        "one_cycle": {"start": draw(fractions)},
    }.get(kind, {})
    shape = (
        {"decay_shape": draw(st.sampled_from(["linear", "cosine", "1-sqrt"]))}
        if kind in ("wsd", "power")
        else {}
    )
    return Schedule(
        kind=kind,
        warmup=warmup,
        decay=draw(fractions) * (1 - warmup),
        floor=draw(fractions),
        **own,
        **shape,
    )


@given(schedules(), shares)
def test_a_multiplier_is_between_its_floor_and_one(schedule, share):
    now = optim.multiplier(schedule, share)
    low = schedule.floor * (max(1.0, 1 / schedule.knee) ** -schedule.power if schedule.knee else 1)
    assert (0 if share < schedule.warmup else low - 1e-12) <= now <= 1 + 1e-12
    assert math.isfinite(now)


@given(schedules(), shares, shares)
def test_a_multiplier_rises_during_warmup_and_never_after(schedule, one, other):
    early, late = sorted((one, other))
    up = optim.multiplier(schedule, late) - optim.multiplier(schedule, early)
    if late < schedule.warmup:
        assert up >= -1e-12
    elif early >= schedule.warmup:
        assert up <= 1e-12


@given(schedules(), shares)
def test_a_schedule_is_continuous(schedule, share):
    decay = schedule.decay if schedule.kind in ("wsd", "power") else 1 - schedule.warmup
    assume(schedule.warmup > 1e-3 and decay > 1e-3 and share < 1)
    assume(schedule.decay_shape != "1-sqrt")  # its slope is infinite where the decay starts
    steepest = max(
        math.pi / 2 / schedule.warmup,
        math.pi / 2 / decay,
        schedule.power / schedule.knee if schedule.knee else 0,
    )
    step = min(1e-6, 1 - share)
    assert (
        abs(optim.multiplier(schedule, share + step) - optim.multiplier(schedule, share))
        <= 2 * steepest * step + 1e-9
    )


# start, half of warmup, end of warmup, middle of the rest, start of the decay of wsd,
# middle of that decay, end
SHARES = (0, 0.1, 0.2, 0.6, 0.7, 0.85, 1)
BOUNDARIES = [
    ({"kind": "constant"}, [0, 0.5, 1, 1, 1, 1, 1]),
    ({"kind": "linear"}, [0, 0.5, 1, 0.55, 0.4375, 0.26875, 0.1]),
    (
        {"kind": "cosine"},
        [
            0,
            0.5,
            1,
            0.55,
            0.55 + 0.45 * math.cos(math.pi * 0.625),
            0.55 + 0.45 * math.cos(math.pi * 0.8125),
            0.1,
        ],
    ),
    ({"kind": "wsd"}, [0, 0.5, 1, 1, 1, 0.55, 0.1]),
    ({"kind": "wsd", "decay_shape": "cosine"}, [0, 0.5, 1, 1, 1, 0.55, 0.1]),
    ({"kind": "wsd", "decay_shape": "1-sqrt"}, [0, 0.5, 1, 1, 1, 0.1 + 0.9 * (1 - 0.5**0.5), 0.1]),
    (
        {"kind": "power", "knee": 0.3},
        [0, 0.5, 1, 2**-0.51, (7 / 3) ** -0.51, 0.55 * (7 / 3) ** -0.51, 0.1 * (7 / 3) ** -0.51],
    ),
    ({"kind": "power", "knee": 0.1, "power": 1.0}, [0, 0.25, 0.5, 1 / 6, 1 / 7, 0.55 / 7, 0.1 / 7]),
    ({"kind": "power", "knee": 1.5}, [0, 0.5, 1, 1, 1, 0.55, 0.1]),  # a knee after the end is wsd
    (
        {"kind": "one_cycle", "start": 0.2},
        [0.2, 0.6, 1, 0.55, 0.55 + 0.45 * math.cos(math.pi * 0.625), None, 0.1],
    ),
]


@pytest.mark.parametrize(("options", "expected"), BOUNDARIES)
def test_boundaries(options, expected):
    schedule = Schedule(warmup=0.2, decay=0.3, floor=0.1, **options)
    for share, value in zip(SHARES, expected, strict=True):
        assert value is None or optim.multiplier(schedule, share) == pytest.approx(
            value, abs=1e-12
        ), share


@given(kinds.filter(lambda kind: kind not in ("power", "one_cycle")), fractions)
def test_without_warmup_a_schedule_starts_at_the_peak(kind, floor):
    assert optim.multiplier(Schedule(kind=kind, warmup=0, floor=floor), 0) == pytest.approx(1)


@given(st.floats(1e-4, 0.1), st.floats(1, 1e4), st.floats(1e-2, 100), st.floats(0.05, 1))
def test_the_power_law_is_that_of_the_paper(lr_max, batch, a, share):
    """arXiv:2408.13359: min(lr_max, a * batch * tokens**-0.51); the two are equal at the knee."""
    schedule = Schedule(
        kind="power", warmup=0, decay=0, knee=(lr_max / (a * batch)) ** (1 / -0.51) / BUDGET.tokens
    )
    expected = min(lr_max, a * batch * (share * BUDGET.tokens) ** -0.51)
    assert share == 1 or lr_max * optim.multiplier(schedule, share) == pytest.approx(
        expected, rel=1e-9
    )


# --- libraries: the multiplier at step s of 100 ---------------------------------------------------


def library_multipliers(make):
    """The multiplier of a library's scheduler at each of 100 steps."""
    opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler, multipliers = make(opt), []
    for _ in range(100):
        multipliers.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return multipliers


def our_multipliers(schedule, last=100):
    return [optim.multiplier(schedule, step / last) for step in range(100)]


def transformers_multipliers(name, **options):
    return library_multipliers(
        lambda opt: getattr(pytest.importorskip("transformers"), name)(
            opt, num_warmup_steps=20, **options
        )
    )


def test_constant_linear_and_cosine_are_those_of_transformers():
    for kind, name in (
        ("constant", "get_constant_schedule_with_warmup"),
        ("linear", "get_linear_schedule_with_warmup"),
        ("cosine", "get_cosine_schedule_with_warmup"),
    ):
        theirs = transformers_multipliers(
            name, **({} if kind == "constant" else {"num_training_steps": 100})
        )
        assert our_multipliers(Schedule(kind=kind, warmup=0.2)) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_wsd_is_that_of_transformers(shape):
    theirs = transformers_multipliers(
        "get_wsd_schedule", num_decay_steps=30, num_training_steps=100, decay_type=shape
    )
    assert our_multipliers(
        Schedule(kind="wsd", warmup=0.2, decay=0.3, decay_shape=shape)
    ) == pytest.approx(theirs, abs=1e-12)
    floored = optim.multiplier(
        Schedule(kind="wsd", warmup=0.2, decay=0.3, decay_shape=shape, floor=0.1), 0.9
    )
    theirs = transformers_multipliers(
        "get_wsd_schedule",
        num_decay_steps=30,
        num_training_steps=100,
        decay_type=shape,
        min_lr_ratio=0.1,
    )
    assert floored == pytest.approx(theirs[90], abs=1e-12)


def test_one_cycle_equals_torchs():
    """torch counts steps from 0 and has its peak at 0.3 * 101 - 1."""
    theirs = library_multipliers(
        lambda opt: OneCycleLR(
            opt, 1.0, total_steps=101, pct_start=0.3, div_factor=25, final_div_factor=100
        )
    )
    schedule = Schedule(
        kind="one_cycle", warmup=(0.3 * 101 - 1) / 100, start=1 / 25, floor=1 / 2500
    )
    assert our_multipliers(schedule) == pytest.approx(theirs, abs=1e-12)


def test_linear_equals_torchs():
    theirs = library_multipliers(lambda opt: LinearLR(opt, 1.0, 0.1, total_iters=100))
    assert our_multipliers(Schedule(kind="linear", warmup=0, floor=0.1)) == pytest.approx(
        theirs, abs=1e-12
    )


def test_a_multiplier_is_a_lambda_of_torchs_lambda_lr():
    schedule = Schedule(kind="power", warmup=0.1, knee=0.2, decay=0.2)
    theirs = library_multipliers(
        lambda opt: LambdaLR(opt, lambda step: optim.multiplier(schedule, step / 100))
    )
    assert our_multipliers(schedule) == theirs


# --- tokens ---------------------------------------------------------------------------------------


def test_token_counts_become_shares_of_the_budget():
    schedule = Schedule(kind="power", warmup_tokens=640, knee_tokens=1600)
    resolved = optim.resolve_schedule(schedule, BUDGET)
    assert (resolved.warmup, resolved.knee, resolved.warmup_tokens, resolved.knee_tokens) == (
        0.1,
        0.25,
        None,
        None,
    )
    assert optim.resolve_schedule(resolved, BUDGET) == resolved
    longer = optim.resolve_schedule(schedule, Budget(tokens=12800, batch_tokens=64))
    # before the decay, the multiplier depends on tokens, not on the token horizon
    for tokens in (100, 640, 1000, 3200):
        assert optim.multiplier(longer, tokens / 12800) == pytest.approx(
            optim.multiplier(resolved, tokens / 6400)
        )


def test_a_schedule_in_tokens_is_resolved_first():
    with pytest.raises(UserError, match=r"use `resolve_schedule\(schedule, budget\)`"):
        optim.multiplier(Schedule(warmup_tokens=640), 0.5)


def test_tokens_that_do_not_fit_are_refused():
    with pytest.raises(
        UserError,
        match=(
            r"`warmup_tokens / tokens \+ decay <= 1` must hold, but got warmup_tokens=6000, "
            r"tokens=6400, decay"
        ),
    ):
        recipe.resolve_schedule(Schedule(warmup_tokens=6000), BUDGET)


# --- averages -------------------------------------------------------------------------------------


def test_an_average_follows_its_recurrence_and_is_evaluated_instead_of_the_model(tiny):
    """a <- d a + (1 - d) w with the given half-life; the training weights are restored."""
    ema_recipe = tiny({"schedule.ema_half_life": 512})
    model = models.build(ema_recipe, 64, seeds=(0, 1))
    opt = optim.optimizer(model, counting.plan_tensors(ema_recipe, 64), ema_recipe.optimizer)
    average, expected = optim.weight_average(model, ema_recipe.schedule, ema_recipe.budget), None
    for step in range(4):
        with torch.no_grad():
            model.lm_head.weight.add_(step)
        average.update_parameters(model)
        weight = model.lm_head.weight.detach().double()
        expected = weight if expected is None else 0.5**0.5 * expected + (1 - 0.5**0.5) * weight
    before = model.lm_head.weight.detach().clone()
    with optim.evaluation_weights(model, opt, average):
        torch.testing.assert_close(
            model.lm_head.weight.detach().double(), expected, rtol=1e-6, atol=1e-6
        )
    assert torch.equal(model.lm_head.weight, before)
    assert optim.weight_average(model, tiny().schedule, ema_recipe.budget) is None


def test_an_average_before_the_first_update_is_the_model(tiny):
    ema_recipe = tiny({"schedule.ema_half_life": 512})
    model = models.build(ema_recipe, 64)
    before = model.lm_head.weight.detach().clone()
    with optim.evaluation_weights(
        model,
        torch.optim.SGD(model.parameters()),
        optim.weight_average(model, ema_recipe.schedule, ema_recipe.budget),
    ):
        assert torch.equal(model.lm_head.weight, before)


def test_schedule_free_is_evaluated_at_its_average(tiny):
    """Evaluates at x = (y - (1 - beta1) z) / beta1 (arXiv:2405.15682) and restores y.

    y is restored even after an error.
    """
    pytest.importorskip("schedulefree")
    free_recipe = tiny({"optimizer.family": "schedulefree_adamw", "schedule.kind": "constant"})
    model = models.build(free_recipe, 64)
    opt = optim.optimizer(model, counting.plan_tensors(free_recipe, 64), free_recipe.optimizer)
    tokens = torch.arange(64).view(2, 32)
    for _ in range(3):
        model(tokens, tokens.flip(1)).sum().backward()
        opt.step()
    weight = model.lm_head.weight
    y, z = weight.detach().clone(), opt.state[weight]["z"]
    with pytest.raises(KeyboardInterrupt), optim.evaluation_weights(model, opt):
        torch.testing.assert_close(weight.detach(), (y - 0.1 * z) / 0.9)
        assert not torch.allclose(weight, y, rtol=0, atol=1e-5)
        raise KeyboardInterrupt
    torch.testing.assert_close(weight.detach(), y)


def test_a_table_has_its_multipliers_after_warmup():
    """Ten steps with a warmup of two; the share of a step is the middle of its tokens."""
    table = Schedule(kind="table", warmup=0.2, shares=[0, 0.5, 0.8], multipliers=[1.0, 1.5, 0.25])
    multipliers = [optim.multiplier(table, (step + 0.5) / 10) for step in range(10)]
    assert multipliers == pytest.approx([0.25, 0.75, 1, 1, 1, 1.5, 1.5, 1.5, 0.25, 0.25])
    longer_warmup = Schedule(kind="table", warmup=0.5, shares=[0, 0.25], multipliers=[1, 4.0])
    assert optim.multiplier(longer_warmup, 0.25) == 2.0


@pytest.mark.parametrize(
    "table",
    [
        {"shares": [], "multipliers": []},
        {"shares": [0.1], "multipliers": [1.0]},
        {"shares": [0, 0.5, 0.5], "multipliers": [1.0, 2.0, 1.0]},
        {"shares": [0, 0.5], "multipliers": [1.0]},
    ],
)
def test_an_invalid_table_is_refused(table, tiny):
    with pytest.raises(
        UserError,
        match=(
            "schedule 'table' needs one multiplier for each of `shares`, which start at 0 and "
            "increase"
        ),
    ):
        tiny({"schedule": {"kind": "table", **table}})
    with pytest.raises(UserError, match="is read only by table, but got kind='wsd'"):
        tiny({"schedule.shares": [0]})
