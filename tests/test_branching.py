"""Branched training: each trial is bitwise what it is alone, and the cost is the closed form."""

import gc
import math
import shutil

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scaletune import counting, data, optim, sweeping, training
from scaletune.counting import branches as counted
from scaletune.errors import UserError
from scaletune.recipe import Budget, Schedule, resolve_schedule, trial_id
from scaletune.sweeping import out_of_memory, stacks

MEASURED = ("id", "sweep", "status", "loss", "train_loss", "message", "flops", "point")
BATCH, SHORT = 256, 8  # tokens a step, steps of the shortest horizon
WSD = {"schedule.kind": "wsd", "schedule.warmup_tokens": 3 * BATCH, "schedule.decay": 0.5}
KILLED = WSD | {"schedule.ema_half_life": 1024}
AVERAGED = {
    "schedule.kind": "constant",
    "schedule.warmup_tokens": 700,
    "schedule.ema_half_life": 1024,
}


@pytest.fixture(scope="module")
def acc():
    gc.freeze()  # as a worker does, so that garbage collection is fast
    yield training.accelerator()
    gc.unfreeze()


@pytest.fixture(scope="module")
def horizons(tiny):
    """settings -> the points of horizons T, 2T, 4T."""
    return lambda settings, factors=(1, 2, 4): [
        tiny(settings | {"tokens": SHORT * BATCH * k}) for k in factors
    ]


def measured(trial, curve):
    held_out = trial.metrics["held_out"]
    return (
        {name: getattr(trial, name) for name in MEASURED},
        [x if math.isfinite(x) else None for x in curve],
        held_out,
    )


def together(points, acc, **options):
    return list(training.train_stack(points, ["main"] * len(points), acc, **options))


def same_as_alone(points, acc):
    """Trains both ways, requires bitwise equal records and curves, returns the branched trials."""
    found = together(points, acc)
    alone = [measured(*training.run_trial(point, "main", acc)) for point in points]
    assert {trial.id: measured(trial, curve) for trial, curve in found} == {
        record["id"]: (record, *rest) for record, *rest in alone
    }
    return [trial for trial, _ in found]


@pytest.mark.parametrize(
    "schedule",
    [WSD, AVERAGED, WSD | {"schedule.ema_half_life": 1024, "schedule.decay_shape": "1-sqrt"}],
    ids=str,
)
def test_a_branch_is_the_trial_alone(horizons, acc, schedule):
    trials = same_as_alone(horizons(schedule | {"engine.evaluate_at": [0.0, 0.3, 0.8]}), acc)
    assert [trial.tokens // (SHORT * BATCH) for trial in trials] == [
        1,
        2,
        4,
    ]  # reported as soon as they end


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer.family": "muon"},
        {"optimizer.family": "adafactor", "training.z_loss": 1e-3},
        {
            "optimizer.family": "momo_adam",
            "engine.accumulation": 2,
            "data.order": "shuffle",
            "data.epochs": 9,
            "schedule.floor": 0.3,
        },
    ],
    ids=str,
)
def test_any_optimizer_branches(horizons, acc, settings):
    same_as_alone(horizons(WSD | settings, factors=(1, 2)), acc)


def test_stacks_branch_beside_a_trial_that_diverges(horizons, acc):
    """Two learning rates train and one diverges, with two horizons each. Its branches end as alone."""
    points = [
        point for lr in (2e-3, 1e3, 8e-3) for point in horizons(WSD | {"lr": lr}, factors=(1, 2))
    ]
    trials = same_as_alone(points, acc)
    assert (
        sorted((trial.lr, trial.status) for trial in trials)
        == [(2e-3, "done")] * 2 + [(8e-3, "done")] * 2 + [(1e3, "diverged")] * 2
    )
    assert {trial.provenance["stack"] for trial in trials} == {3}


def test_losses_that_are_read_late_change_no_record(horizons, acc, monkeypatch):
    """As on a GPU: the host reads the divergence after more steps, and after a branch point."""
    points = horizons(WSD | {"lr": 30.0, "optimizer.clip": 1e3, "engine.evaluate_at": [0.3]})
    alone = sorted((measured(*training.run_trial(point, "main", acc)) for point in points), key=str)
    monkeypatch.setitem(training.loop.READ_EVERY, "cpu", 16)
    assert (
        sorted((measured(trial, curve) for trial, curve in together(points, acc)), key=str) == alone
    )
    assert {record["status"] for record, *_ in alone} == {"diverged"}


@pytest.mark.parametrize("judged", [1, 4])
def test_a_horizon_that_is_judged_diverged_takes_no_other_with_it(
    horizons, acc, monkeypatch, judged
):
    """If the trunk diverges, the longest branch becomes the trunk of the others."""
    evaluate = training.loop.evaluate

    def patched(net, corpus, recipe, acc):
        return (
            math.inf
            if recipe.budget.tokens == judged * SHORT * BATCH
            else evaluate(net, corpus, recipe, acc)
        )

    monkeypatch.setattr(training.loop, "evaluate", patched)
    trials = same_as_alone(horizons(WSD | {"engine.evaluate_at": [0.05]}), acc)
    assert {trial.tokens // (SHORT * BATCH): trial.status for trial in trials} == dict.fromkeys(
        (1, 2, 4), "done"
    ) | {judged: "diverged"}


def test_a_branch_that_missed_a_checkpoint_trains_by_itself(horizons, undisturbed, acc, tmp_path):
    """Killed between the checkpoints of one step: the middle horizon has the previous one, the shortest none."""
    points = horizons(KILLED | {"engine.checkpoint_every": 2, "engine.runs": str(tmp_path)})
    with pytest.raises(KeyboardInterrupt):
        together(
            points, acc, progress=lambda share: interrupt(share, 0.08)
        )  # after 4 of 32 + 4 + 8 steps
    short, middle = (
        tmp_path / trial_id(point, data.load(point.data).digest) for point in points[:2]
    )
    (middle / "checkpoint.pt").unlink()
    shutil.rmtree(short)
    found = together(points, acc)
    assert sorted((measured(trial, curve) for trial, curve in found), key=str) == undisturbed
    assert [trial.provenance.get("trunk_tokens") for trial, _ in found] == [None, 2 * BATCH, None]


def interrupt(share, stop):
    if share > stop:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def undisturbed(horizons, acc):
    return sorted(
        (measured(*training.run_trial(point, "main", acc)) for point in horizons(KILLED)), key=str
    )


@pytest.mark.parametrize(
    ("stop", "alone"), [(0.15, False), (0.3, False), (0.6, False), (0.6, True)]
)
def test_a_killed_order_goes_on_to_the_same_bits(horizons, undisturbed, acc, tmp_path, stop, alone):
    """Stopped on the trunk, in a cooldown or after a branch; continued together, or one by one."""
    points = horizons(KILLED | {"engine.checkpoint_every": 3, "engine.runs": str(tmp_path)})

    with pytest.raises(KeyboardInterrupt):
        together(points, acc, progress=lambda share: interrupt(share, stop))
    found = (
        [training.run_trial(point, "main", acc) for point in points]
        if alone
        else together(points, acc)
    )
    assert sorted((measured(trial, curve) for trial, curve in found), key=str) == undisturbed


# --- cost and record ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(WSD, 4 + 0.5 * (1 + 2)), (AVERAGED, 4), ({"schedule.kind": "cosine"}, 1 + 2 + 4)],
)
def test_what_is_spent_is_the_longest_trunk_and_the_cooldowns(
    horizons, acc, monkeypatch, schedule, steps
):
    """T, 2T, 4T with a cooldown of half: 4T + (T + 2T) / 2 in place of 7T."""
    points, taken, update = horizons(schedule), [], training.loop.update
    monkeypatch.setattr(training.loop, "update", lambda run: (taken.append(run), update(run)))
    served = counted.trunk_key(points[0]) != ""
    trials = [
        t
        for t, _ in (
            together(points, acc)
            if served
            else [training.run_trial(point, "main", acc) for point in points]
        )
    ]
    assert len(taken) == sum(counted.steps_after_branching(points)) == steps * SHORT
    per_step = counting.flops_per_token(points[0].model, 256, points[0].data.seq_len) * BATCH
    assert sum(trial.metrics["flops_spent"] for trial in trials) == pytest.approx(
        steps * SHORT * per_step
    )
    assert [trial.flops for trial in trials] == pytest.approx(
        [per_step * trial.tokens / BATCH for trial in trials]
    )


def test_a_record_says_which_trunk_it_came_from(horizons, acc):
    short, middle, long = (trial for trial, _ in together(horizons(WSD), acc))
    assert (short.provenance["trunk"], short.provenance["trunk_tokens"]) == (
        long.id,
        SHORT * BATCH // 2,
    )
    assert (middle.provenance["trunk"], middle.provenance["trunk_tokens"]) == (
        long.id,
        SHORT * BATCH,
    )
    assert "trunk" not in long.provenance
    for trial in (short, middle, long):
        spent = trial.metrics["seconds"]
        assert trial.seconds == pytest.approx(spent["train"] + spent["evaluate"], abs=3e-3)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["wsd", "constant"]), decay=st.floats(0, 0.9), floor=st.floats(0, 0.9), warmup=st.integers(1, 99),
    batch=st.integers(1, 9), steps=st.integers(1, 400), more=st.integers(1, 900),
)  # fmt: skip
def test_horizons_part_at_the_branch_step(tiny, kind, decay, floor, warmup, batch, steps, more):
    """Before the branch point the learning rates of two horizons are bitwise equal; then they differ."""
    shape = {"kind": kind, "warmup_tokens": warmup} | (
        {"decay": decay, "floor": floor} if kind == "wsd" else {}
    )
    budgets = [Budget(tokens=n * batch, batch_tokens=batch) for n in (steps, steps + more)]
    recipes = [
        tiny().model_copy(update={"budget": budget, "schedule": Schedule(**shape)})
        for budget in budgets
    ]
    assume(warmup / budgets[0].tokens + (decay if kind == "wsd" else 0) <= 1)

    def lr(recipe, step):
        share, warmed = (step + 0.5) / recipe.budget.steps, (step + 0.5) * batch / warmup
        return optim.multiplier(resolve_schedule(recipe.schedule, recipe.budget), share, warmed)

    branch = counted.branch_step(recipes[0])
    assert all(lr(recipes[0], step) == lr(recipes[1], step) for step in range(branch))
    assert (
        branch == steps
        or lr(recipes[0], branch) != lr(recipes[1], branch)
        or floor > 0.999
        or decay < 1e-6
    )


# --- which points can branch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({"schedule.kind": "cosine"}, "the schedule has no constant phase (`schedule.kind = 'cosine'`): use wsd or constant"),
        ({"schedule.warmup_tokens": None}, "`schedule.warmup = 0.1` is a share of the token budget"),
        ({"optimizer.family": "schedulefree_adamw", "schedule.kind": "constant"}, "`optimizer.family = 'schedulefree_adamw'` changes its weights for an evaluation"),
        ({"engine.processes": 2}, "`engine.processes = 2`: several processes train one trial"),
        ({"engine.noise_every": 2, "engine.accumulation": 2}, "`engine.noise_every = 2` measures the gradients of one trial"),
    ],
)  # fmt: skip
def test_what_keeps_horizons_apart_is_said_where_branches_were_asked_for(horizons, own, why):
    asked = WSD | own | ({"schedule.decay": 0.3} if own.get("schedule.kind") else {})
    points = horizons(asked | {"engine.branch": True})
    assert stacks.explain_separate_training(sweeping.tasks("main", points)).startswith(
        f"no branched training: {why}"
    )
    assert (
        stacks.explain_separate_training(sweeping.tasks("main", points[:1]))
        == ""
        == stacks.explain_separate_training(sweeping.tasks("main", horizons(asked)))
    )
    with pytest.raises(
        UserError,
        match=r"must have the same `budget\.tokens`, but these differ|a trial must train alone with",
    ):
        list(training.train_stack(points, ["main"] * 3, training.accelerator()))


def taken(points, workers=1):
    """(lr, factor) of each task that is assigned."""
    queue, found = sorted(sweeping.tasks("main", points), key=lambda task: -task.cost), []
    while queue:
        found.append(
            [
                (t.recipe.optimizer.lr, t.recipe.budget.tokens // (SHORT * BATCH))
                for t in stacks.take_stack(queue, workers)
            ]
        )
    return found


def test_an_order_is_a_stack_of_trunks_with_their_branches(horizons, monkeypatch):
    monkeypatch.setattr(stacks, "on_gpu", lambda: False)
    points = [point for lr in (1e-3, 2e-3) for point in horizons(WSD | {"lr": lr})]
    (order,) = taken(points)
    assert order[:2] == [(1e-3, 4), (2e-3, 4)] and sorted(order) == [
        (lr, k) for lr in (1e-3, 2e-3) for k in (1, 2, 4)
    ]
    assert [sorted(order) for order in taken(points, workers=2)] == [
        [(lr, k) for k in (1, 2, 4)] for lr in (1e-3, 2e-3)
    ]
    apart = [
        point for lr in (1e-3, 2e-3) for point in horizons(WSD | {"lr": lr, "engine.branch": False})
    ]
    assert taken(apart) == [[(1e-3, k), (2e-3, k)] for k in (4, 2, 1)]
    assert (
        stacks.count_runs(sweeping.tasks("main", points)) == 2
        and stacks.count_runs(sweeping.tasks("main", apart)) == 6
    )


def test_what_an_order_without_memory_is_made_smaller_by_counts_its_models(horizons, monkeypatch):
    """Two trunks and their branches are four models: half of that is the trunks, then one alone."""
    monkeypatch.setattr(stacks, "on_gpu", lambda: False)
    queue = sorted(
        sweeping.tasks("main", [p for lr in (1e-3, 2e-3) for p in horizons(WSD | {"lr": lr})]),
        key=lambda task: -task.cost,
    )
    found = []
    for _ in range(2):
        order = stacks.take_stack(queue, 1)
        queue[:0] = order  # lost
        found.append(
            [
                len(order),
                stacks.count_models(order),
                {out_of_memory.shrink(task, stacks.count_models(order)) for task in order},
            ]
        )
    assert found == [
        [6, 4, {"in a stack of 2 instead of 4"}],
        [2, 2, {"in a stack of 1 instead of 2"}],
    ]
    assert stacks.count_models([]) == 0 and [
        stacks.count_models(stacks.take_stack(queue, 1)) for _ in range(2)
    ] == [
        1,
        1,
    ]


def test_a_sweep_of_branches_is_the_sweep_without(horizons, tiny, tmp_path):
    recipe = tiny(
        WSD
        | {
            "axes": {"lr": [2e-3, 8e-3], "tokens": [SHORT * BATCH * k for k in (1, 2)]},
            "engine.workers": 1,
        }
    )
    table = sweeping.sweep(recipe, out=tmp_path / "branched")
    plain = sweeping.sweep(
        tiny({"axes": recipe.axes, "engine.branch": False, "engine.workers": 1} | WSD),
        out=tmp_path / "plain",
    )
    assert table[list(MEASURED)].equals(plain[list(MEASURED)])
    longest = {row.lr: row.id for row in table.itertuples() if row.tokens == 2 * SHORT * BATCH}
    assert [row.provenance.get("trunk") for row in table.itertuples()] == [
        longest[row.lr] if row.tokens == SHORT * BATCH else None for row in table.itertuples()
    ]
