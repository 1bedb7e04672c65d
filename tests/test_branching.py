"""Branched training: each trial equals the single trial bitwise; the cost follows a formula."""

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


def comparable(trial, curve):
    held_out = trial.metrics["held_out"]
    return (
        {name: getattr(trial, name) for name in MEASURED},
        [x if math.isfinite(x) else None for x in curve],
        held_out,
    )


def train_together(points, acc, **options):
    return list(training.train_stack(points, ["main"] * len(points), acc, **options))


def same_as_alone(points, acc):
    """Trains both ways, requires bitwise equal records and curves, returns the branched trials."""
    results = train_together(points, acc)
    alone = [comparable(*training.run_trial(point, "main", acc)) for point in points]
    assert {trial.id: comparable(trial, curve) for trial, curve in results} == {
        record["id"]: (record, *rest) for record, *rest in alone
    }
    return [trial for trial, _ in results]


@pytest.mark.parametrize(
    "schedule",
    [WSD, AVERAGED, WSD | {"schedule.ema_half_life": 1024, "schedule.decay_shape": "1-sqrt"}],
    ids=str,
)
def test_a_branch_is_the_trial_alone(horizons, acc, schedule):
    trials = same_as_alone(horizons(schedule | {"engine.evaluate_at": [0.0, 0.3, 0.8]}), acc)
    # Each is reported as soon as it ends.
    assert [trial.tokens // (SHORT * BATCH) for trial in trials] == [1, 2, 4]


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
    """Two learning rates train and one diverges, with two horizons each.

    Its branches end as they do alone.
    """
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
    alone = sorted(
        (comparable(*training.run_trial(point, "main", acc)) for point in points), key=str
    )
    monkeypatch.setitem(training.loop.READ_EVERY, "cpu", 16)
    results = train_together(points, acc)
    assert sorted((comparable(trial, curve) for trial, curve in results), key=str) == alone
    assert {record["status"] for record, *_ in alone} == {"diverged"}


@pytest.mark.parametrize("diverging", [1, 4])
def test_a_horizon_that_diverges_at_its_evaluation_affects_no_other(
    horizons, acc, monkeypatch, diverging
):
    """If the trunk diverges, the longest branch becomes the trunk of the others."""
    evaluate = training.loop.evaluate

    def patched(net, corpus, recipe, acc):
        return (
            math.inf
            if recipe.budget.tokens == diverging * SHORT * BATCH
            else evaluate(net, corpus, recipe, acc)
        )

    monkeypatch.setattr(training.loop, "evaluate", patched)
    trials = same_as_alone(horizons(WSD | {"engine.evaluate_at": [0.05]}), acc)
    assert {trial.tokens // (SHORT * BATCH): trial.status for trial in trials} == dict.fromkeys(
        (1, 2, 4), "done"
    ) | {diverging: "diverged"}


def test_a_branch_that_missed_a_checkpoint_trains_by_itself(horizons, undisturbed, acc, tmp_path):
    """Killed between the checkpoints of one step.

    The middle horizon has its previous checkpoint, the shortest has none.
    """
    points = horizons(KILLED | {"engine.checkpoint_every": 2, "engine.runs": str(tmp_path)})
    with pytest.raises(KeyboardInterrupt):
        # Interrupted after 4 of 32 + 4 + 8 steps.
        train_together(points, acc, progress=lambda share: interrupt(share, 0.08))
    short, middle = (
        tmp_path / trial_id(point, data.load(point.data).digest) for point in points[:2]
    )
    (middle / "checkpoint.pt").unlink()
    shutil.rmtree(short)
    results = train_together(points, acc)
    assert sorted((comparable(trial, curve) for trial, curve in results), key=str) == undisturbed
    assert [trial.provenance.get("trunk_tokens") for trial, _ in results] == [None, 2 * BATCH, None]


def interrupt(share, stop):
    if share > stop:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def undisturbed(horizons, acc):
    return sorted(
        (comparable(*training.run_trial(point, "main", acc)) for point in horizons(KILLED)), key=str
    )


@pytest.mark.parametrize(
    ("stop", "alone"), [(0.15, False), (0.3, False), (0.6, False), (0.6, True)]
)
def test_a_killed_branched_stack_continues_bitwise(
    horizons, undisturbed, acc, tmp_path, stop, alone
):
    """Stopped on the trunk, in a cooldown or after a branch; continued together, or one by one."""
    points = horizons(KILLED | {"engine.checkpoint_every": 3, "engine.runs": str(tmp_path)})

    with pytest.raises(KeyboardInterrupt):
        train_together(points, acc, progress=lambda share: interrupt(share, stop))
    results = (
        [training.run_trial(point, "main", acc) for point in points]
        if alone
        else train_together(points, acc)
    )
    assert sorted((comparable(trial, curve) for trial, curve in results), key=str) == undisturbed


# --- cost and record ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [(WSD, 4 + 0.5 * (1 + 2)), (AVERAGED, 4), ({"schedule.kind": "cosine"}, 1 + 2 + 4)],
)
def test_the_cost_is_the_longest_trunk_and_the_cooldowns(
    horizons, acc, monkeypatch, schedule, steps
):
    """T, 2T, 4T with a cooldown of half: 4T + (T + 2T) / 2 in place of 7T."""
    points, assigned_stacks, update = horizons(schedule), [], training.loop.update
    monkeypatch.setattr(
        training.loop, "update", lambda run: (assigned_stacks.append(run), update(run))
    )
    served = counted.trunk_key(points[0]) != ""
    trials = [
        t
        for t, _ in (
            train_together(points, acc)
            if served
            else [training.run_trial(point, "main", acc) for point in points]
        )
    ]
    assert len(assigned_stacks) == sum(counted.steps_after_branching(points)) == steps * SHORT
    per_step = counting.flops_per_token(points[0].model, 256, points[0].data.seq_len) * BATCH
    assert sum(trial.metrics["flops_spent"] for trial in trials) == pytest.approx(
        steps * SHORT * per_step
    )
    assert [trial.flops for trial in trials] == pytest.approx(
        [per_step * trial.tokens / BATCH for trial in trials]
    )


def test_a_record_says_which_trunk_it_came_from(horizons, acc):
    short, middle, long = (trial for trial, _ in train_together(horizons(WSD), acc))
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
    kind=st.sampled_from(["wsd", "constant"]),
    decay=st.floats(0, 0.9),
    floor=st.floats(0, 0.9),
    warmup=st.integers(1, 99),
    batch=st.integers(1, 9),
    steps=st.integers(1, 400),
    more=st.integers(1, 900),
)
def test_learning_rates_of_two_horizons_differ_from_the_branch_step_on(
    tiny, kind, decay, floor, warmup, batch, steps, more
):
    """Learning rates of two horizons are bitwise equal up to the branch step; then they differ."""
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


# --- which points can branch ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (
            {"schedule.kind": "cosine"},
            "the schedule has no constant phase (`schedule.kind = 'cosine'`): use wsd or constant",
        ),
        (
            {"schedule.warmup_tokens": None},
            "`schedule.warmup = 0.1` is a share of the token budget",
        ),
        (
            {"optimizer.family": "schedulefree_adamw", "schedule.kind": "constant"},
            "`optimizer.family = 'schedulefree_adamw'` changes its weights for an evaluation",
        ),
        ({"engine.processes": 2}, "`engine.processes = 2`: several processes train one trial"),
        (
            {"engine.noise_every": 2, "engine.accumulation": 2},
            "`engine.noise_every = 2` measures the gradients of one trial",
        ),
    ],
)
def test_separate_training_of_horizons_is_explained(horizons, own, why):
    options = WSD | own | ({"schedule.decay": 0.3} if own.get("schedule.kind") else {})
    points = horizons(options | {"engine.branch": True})
    assert stacks.explain_separate_training(sweeping.tasks("main", points)).startswith(
        f"no branched training: {why}"
    )
    assert stacks.explain_separate_training(sweeping.tasks("main", points[:1])) == ""
    assert stacks.explain_separate_training(sweeping.tasks("main", horizons(options))) == ""
    with pytest.raises(
        UserError,
        match=r"must have the same `budget\.tokens`, but these differ"
        r"|a trial must train alone with",
    ):
        list(training.train_stack(points, ["main"] * 3, training.accelerator()))


def assigned_stacks(points, workers=1):
    """(lr, factor) of each task that is assigned."""
    queue, stacked = sorted(sweeping.tasks("main", points), key=lambda task: -task.cost), []
    while queue:
        stacked.append(
            [
                (t.recipe.optimizer.lr, t.recipe.budget.tokens // (SHORT * BATCH))
                for t in stacks.take_stack(queue, workers)
            ]
        )
    return stacked


def test_a_worker_gets_a_stack_of_trunks_with_their_branches(horizons, monkeypatch):
    monkeypatch.setattr(stacks, "on_gpu", lambda: False)
    points = [point for lr in (1e-3, 2e-3) for point in horizons(WSD | {"lr": lr})]
    (stack,) = assigned_stacks(points)
    assert stack[:2] == [(1e-3, 4), (2e-3, 4)]
    assert sorted(stack) == [(lr, k) for lr in (1e-3, 2e-3) for k in (1, 2, 4)]
    assert [sorted(stack) for stack in assigned_stacks(points, workers=2)] == [
        [(lr, k) for k in (1, 2, 4)] for lr in (1e-3, 2e-3)
    ]
    apart = [
        point for lr in (1e-3, 2e-3) for point in horizons(WSD | {"lr": lr, "engine.branch": False})
    ]
    assert assigned_stacks(apart) == [[(1e-3, k), (2e-3, k)] for k in (4, 2, 1)]
    assert stacks.count_runs(sweeping.tasks("main", points)) == 2
    assert stacks.count_runs(sweeping.tasks("main", apart)) == 6


def test_a_stack_out_of_memory_is_halved_by_its_number_of_models(horizons, monkeypatch):
    """Two trunks and their branches are four models; half of them are two, then one."""
    monkeypatch.setattr(stacks, "on_gpu", lambda: False)
    queue = sorted(
        sweeping.tasks("main", [p for lr in (1e-3, 2e-3) for p in horizons(WSD | {"lr": lr})]),
        key=lambda task: -task.cost,
    )
    sizes = []
    for _ in range(2):
        stack = stacks.take_stack(queue, 1)
        queue[:0] = stack  # as after a lost worker
        sizes.append(
            [
                len(stack),
                stacks.count_models(stack),
                {out_of_memory.shrink(task, stacks.count_models(stack)) for task in stack},
            ]
        )
    assert sizes == [
        [6, 4, {"in a stack of 2 instead of 4"}],
        [2, 2, {"in a stack of 1 instead of 2"}],
    ]
    assert stacks.count_models([]) == 0
    assert [stacks.count_models(stacks.take_stack(queue, 1)) for _ in range(2)] == [1, 1]


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
