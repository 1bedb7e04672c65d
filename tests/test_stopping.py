"""Trials that a search stops inside their runs, and trials that take the rows they leave."""

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_sweeping import Stub

from scaletune import counting, data, sweeping, training
from scaletune import recipe as recipes
from scaletune.errors import UserError
from scaletune.fitting import fit
from scaletune.recipe import validate_recipe
from scaletune.records import Store, Trial, merge_trials
from scaletune.sweeping import stacks
from scaletune.sweeping.engines.slurm import job, job_messages
from scaletune.sweeping.status import format_table
from scaletune.sweeping.task import tasks
from scaletune.training.run_control import RunControl

DIVERGES = {"lr": 1e3, "schedule.kind": "constant"}
HALF = {"engine.evaluate_at": [0.0, 0.5]}


@pytest.fixture(scope="module")
def acc():
    return training.accelerator()


def stop_after_half(point, wanted=None):
    """A control that wants to stop trials once they have reported at half of their tokens."""
    half, stops = point.budget.tokens // 2, set()

    def report(id, tokens, loss):
        stops.update({id} if tokens >= half and wanted in (None, id) else ())

    return RunControl(report, stops.__contains__)


def same_until(trial, curve, whole, whole_curve):
    """Whether a stopped trial is the beginning of the whole one."""
    return (
        curve == whole_curve[: len(curve)]
        and trial.metrics["held_out"] == whole.metrics["held_out"][:2]
        and (trial.id, trial.flops) == (whole.id, whole.flops)
    )


def test_a_stop_ends_a_run_at_its_next_step(tiny, acc):
    point = tiny(HALF)
    whole, whole_curve = training.run_trial(point, "main", acc)
    trial, curve = training.run_trial(point, "main", acc, control=stop_after_half(point))
    assert (trial.status, trial.loss, trial.train_loss) == ("stopped", None, None)
    assert trial.message == "stopped at 1280 tokens by the search" and len(curve) == 5
    assert same_until(trial, curve, whole, whole_curve)
    assert trial.metrics["flops_spent"] == whole.metrics["flops_spent"] * 5 / 8


def test_a_stopped_run_with_a_checkpoint_is_trained_to_its_end(tiny, acc, tmp_path):
    point = tiny(HALF | {"engine.checkpoint_every": 2, "engine.runs": str(tmp_path)})
    trial, _ = training.run_trial(point, "main", acc, control=stop_after_half(point))
    reports = []
    control = RunControl(lambda id, tokens, loss: reports.append((tokens, loss)))
    again, curve = training.run_trial(point, "main", acc, control=control)
    whole, whole_curve = training.run_trial(tiny(HALF), "main", acc)
    assert (trial.status, again.status, again.loss) == ("stopped", "done", whole.loss)
    # A search that starts again learns what the first run has reported.
    assert (
        curve == whole_curve and [list(each) for each in reports] == whole.metrics["held_out"][:2]
    )


def test_in_a_stack_only_that_row_stops(tiny, acc):
    points = [tiny(HALF | {"lr": lr}) for lr in (2e-3, 5e-3, 1e-2)]
    alone = [training.run_trial(point, "main", acc) for point in points]
    control = stop_after_half(points[0], wanted=alone[1][0].id)
    stack = {
        trial.id: (trial, curve)
        for trial, curve in training.train_stack(points, ["main"] * 3, acc, control=control)
    }
    for k, (whole, whole_curve) in enumerate(alone):
        trial, curve = stack[whole.id]
        if k == 1:
            assert trial.status == "stopped" and same_until(trial, curve, whole, whole_curve)
        else:
            assert (trial.loss, curve) == (whole.loss, whole_curve)


def test_processes_stop_at_the_same_step(tiny):
    point = tiny(HALF | {"engine.processes": 2, "tokens": 200 * 256})
    stops = set()
    control = RunControl(lambda id, *_: stops.add("id"), stops.__contains__)
    with training.RankGroup() as group:
        trial, curve = group.run_trial(point, "main", control=control, id="id")
        after, _ = group.run_trial(tiny({"engine.processes": 2}), "main")
    assert (trial.status, after.status) == ("stopped", "done") and 0 < len(curve) < 200


# --- rows of a stack ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        {"family": "transformer", "width": 32, "depth": 1, "head_dim": 16},
        {"family": "moe", "width": 32, "depth": 1, "head_dim": 16, "n_experts": 4, "top_k": 2},
    ],
    ids=lambda model: model["family"],
)
def test_a_trial_in_a_freed_row_is_the_trial_alone(tiny, acc, model):
    """Rows are freed by a divergence, by a stop, and by the end of a run, at different steps."""

    def point(**settings):
        return tiny(HALF | {"model": model} | settings)

    first = [point(lr=5e-3), point(**DIVERGES), point(lr=1e-2)]
    waiting = [point(lr=2e-3), point(lr=3e-3, seed=1), point(**DIVERGES, seed=2), point(lr=4e-3)]
    waiting = waiting[: 4 if model["family"] == "transformer" else 2]
    alone = {t.id: (t, c) for t, c in (training.run_trial(p, "main", acc) for p in first + waiting)}
    control = stop_after_half(first[0], wanted=tasks("main", first)[2].id)
    queue, sweeps = list(waiting), iter("abcd")

    def refill(rows):
        taken = queue[:rows]
        del queue[:rows]
        return [(each, next(sweeps)) for each in taken]

    control = replace(control, refill=refill)
    stack = list(training.train_stack(first, ["main"] * 3, acc, control=control))
    assert {trial.id for trial, _ in stack} == alone.keys() and not queue
    assert {trial.sweep for trial, _ in stack} == {"main", *"abcd"[: len(waiting)]}
    assert [trial.status for trial, _ in stack].count("stopped") == 1
    for trial, curve in stack:
        whole, whole_curve = alone[trial.id]
        if trial.status == "stopped":
            assert same_until(trial, curve, whole, whole_curve)
            continue
        assert (trial.status, trial.loss, trial.message) == (
            *(whole.status, whole.loss),
            whole.message,
        )
        assert str(curve) == str(whole_curve)  # as text, NaN equals NaN
        assert trial.metrics["held_out"] == whole.metrics["held_out"]


def test_a_worker_asks_for_trials_for_the_rows_that_are_free(tiny, acc, tmp_path, monkeypatch):
    """The driver gives it those that can train in the stack; the results do not change."""
    settings = {"engine.workers": 1, "engine.stack": 2, "tokens": 96 * 64, "batch_tokens": 64}
    axes = {"lr": [1e3, 5e-3, 1e-2, 1e4], "width": [32]}
    recipe = tiny(settings | {"schedule.kind": "constant", "axes": axes})
    refills, take = [], stacks.take_refill

    def spy(queue, member, rows):
        taken = take(queue, member, rows)
        refills.append(len(taken))
        return taken

    monkeypatch.setattr(stacks, "take_refill", spy)
    table = sweeping.sweep(recipe, out=tmp_path)
    assert sum(refills) == 2  # for a row that diverged, and for one that is done
    alone = [training.run_trial(point, "main", acc)[0] for point in recipes.points(recipe)]
    assert dict(zip(table["id"], table["loss"].fillna(-1), strict=True)) == {
        trial.id: -1 if trial.loss is None else trial.loss for trial in alone
    }


def test_a_row_is_given_to_a_trial_of_the_same_stack_only(tiny):
    def queued(**settings):
        return tasks("main", [tiny(settings)])[0]

    trunk = {"schedule.kind": "constant", "schedule.warmup": 0.0}
    queue = [queued(width=64), queued(lr=1e-3), queued(tokens=4096), queued(lr=2e-3, **trunk)]
    queue += [queued(lr=2e-3, tokens=1024, **trunk), queued(lr=3e-3), queued(lr=4e-3)]
    queue[-2].most = 1  # its worker died
    taken = stacks.take_refill(queue, queued(), 3)
    assert [task.recipe.optimizer.lr for task in taken] == [1e-3, 4e-3] and len(queue) == 5


# --- searches -------------------------------------------------------------------------------------

LR = [2.0**-k for k in range(14, 4, -1)]


class Reporting(Stub):
    """A pool of two workers whose trials report a planted loss at every tenth of their tokens."""

    def __init__(self, *rest):
        self.tasks, self.stops, self.trained = {}, set(), []
        Reporting.last = self

    @property
    def busy(self):
        return bool(self.tasks)

    def hand_out(self, queue):
        while queue and len(self.tasks) < 2:
            task = queue.pop(0)
            self.tasks[task.id] = (task, [])
            self.trained.append(task.id)

    def request_stop(self, ids):
        self.stops |= set(ids)

    def messages(self):
        return [self.step(*each) for each in list(self.tasks.values())]

    def step(self, task, held_out):
        budget, lr = task.recipe.budget.tokens, task.recipe.optimizer.lr
        worst = math.log(lr / 2.0**-7) ** 2
        tenth = len(held_out) + 1
        held_out.append([tenth * budget / 10, 2 + 0.1 * worst + 1 / tenth])
        if task.id not in self.stops and len(held_out) < 10:
            tokens, loss = held_out[-1]
            return task, {"report": {"tokens": tokens, "loss": loss}}
        del self.tasks[task.id]
        known = counting.trial_fields(
            task.recipe, task.sweep, 64, data.load(task.recipe.data).digest
        )
        end = {"status": "stopped", "loss": None, "message": f"stopped at {held_out[-1][0]:g}"}
        if task.id not in self.stops:
            end = {"status": "done", "loss": held_out[-1][1]}
        rest = {"train_loss": None, "seconds": 0.0, "metrics": {"held_out": held_out}}
        return task, {"trial": asdict(Trial(**known, **end, **rest)), "curve": []}


@pytest.fixture
def pruned(tiny, monkeypatch):
    """A sweep over lr whose pruner decides at a fifth and at half."""
    pytest.importorskip("optuna")
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", Reporting)

    def make(**search):
        search = {"kind": "grid", "pruner": "median"} | search
        return tiny({"engine.evaluate_at": [0.2, 0.5], "axes": {"lr": LR}, "search": search})

    return make


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_a_pruner_stops_trials_that_fall_behind(pruned, tmp_path, capsys, pruner):
    table = sweeping.sweep(pruned(pruner=pruner, reduction=2), out=tmp_path)
    stopped = table[table["status"] == "stopped"]
    assert f"the pruner stopped {len(stopped)} of 10 points early" in capsys.readouterr().err
    assert 2 <= len(stopped) <= 7 and 2.0**-7 in set(table["lr"]) - set(stopped["lr"])
    now = sweeping.status("tiny", out=tmp_path)
    assert now["stopped"] == len(stopped) and f"stopped {len(stopped)}" in format_table(now)[0]
    dropped = [why for why in fit(table, "lr_nd").dropped.values() if "stopped early: at" in why]
    assert len(dropped) == len(stopped)
    # A rerun trains nothing; without a pruner, those that were stopped are trained to their end.
    first = Reporting.last
    assert sweeping.sweep(pruned(pruner=pruner, reduction=2), out=tmp_path).equals(table)
    assert Reporting.last is first
    whole = sweeping.sweep(pruned(pruner="none"), out=tmp_path)
    assert set(Reporting.last.trained) == set(stopped["id"])
    assert set(whole["id"]) == set(table["id"]) and set(whole["status"]) == {"done"}


def test_an_optuna_search_replays_what_was_stopped(pruned, tmp_path):
    search = {"kind": "optuna", "sampler": "qmc", "pruner": "halving", "reduction": 2}
    first = sweeping.sweep(pruned(**search, budget=6), out=tmp_path)
    more = sweeping.sweep(pruned(**search, budget=8), out=tmp_path)
    assert 0 < (first["status"] == "stopped").sum() < 6
    assert set(Reporting.last.trained) == set(more["id"]) - set(first["id"])
    kept = more[more["id"].isin(first["id"])].reset_index(drop=True)
    assert kept[["id", "status", "message"]].equals(first[["id", "status", "message"]])


def test_a_pruner_stops_our_loop(tiny, tmp_path):
    """A trial that comes after four others, the largest lr first."""
    pytest.importorskip("optuna")
    steps = {"tokens": 192 * 64, "batch_tokens": 64, "engine.evaluate_at": [0.25]}
    axes = {"lr": [2.0**-k for k in (5, 6, 7, 8, 14)]}
    search = {"kind": "grid", "pruner": "median"}
    recipe = tiny(steps | {"axes": axes, "search": search, "engine.workers": 1, "engine.stack": 1})
    table = sweeping.sweep(recipe, out=tmp_path)
    assert table["status"].tolist() == ["stopped"] + ["done"] * 4  # in the order of lr
    assert len(table["metrics"][0]["held_out"]) == 1


TRAINER = """
import math, sys, time
import scaletune.trial as trial

lr, worst = float(sys.argv[1]), math.log(float(sys.argv[1]) / 0.01) ** 2
for tenth in range(1, 11):
    trial.report(tokens=tenth * 1e5, loss=2 + worst + 1 / tenth)
    end = time.time() + (30 if tenth == 5 and worst > 4 else 0)  # a good trial does not wait
    while time.time() < end and not trial.should_stop:
        time.sleep(0.02)
    if trial.should_stop:
        break
"""


@pytest.mark.parametrize("kind", ["command", "function"])
def test_a_pruner_stops_the_users_trainer(tmp_path, monkeypatch, kind):
    pytest.importorskip("optuna")
    monkeypatch.setenv("PYTHONPATH", str(Path(sweeping.__file__).parents[2]))
    script = tmp_path / "train.py"
    script.write_text(TRAINER)

    def train(trial):
        monkeypatch.setattr(sys, "argv", ["train.py", str(trial["lr"])])
        exec(compile(TRAINER, "train.py", "exec"), {})

    values = {
        "model": {"width": 32},
        "budget": {"tokens": 1e6, "batch_tokens": 1e3},
        "engine": {"workers": 1, "runs": str(tmp_path / "runs"), "evaluate_at": [0.5]},
        "axes": {"lr": [0.0005, 0.008, 0.009, 0.011, 0.012]},
        "search": {"kind": "grid", "pruner": "median"},
    }
    command = [sys.executable, str(script), "{lr}"]
    trainer = {"command": command} if kind == "command" else {"function": "here:train"}
    recipe = validate_recipe(values | {"trainer": trainer}, "own")
    table = sweeping.sweep(recipe, out=tmp_path, train=train if kind == "function" else None)
    assert table["status"].tolist() == ["stopped"] + ["done"] * 4
    assert table["message"].iloc[0] == "stopped at 500000 tokens by the search"
    assert len(table["metrics"].iloc[0]["held_out"]) == 5 and math.isnan(table["loss"].iloc[0])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"search.pruner": "topk"}, "pruner 'topk' needs search.kind 'optuna' and two or more"),
        (
            {"search": {"kind": "optuna", "budget": 3, "pruner": "topk"}, **HALF},
            "pruner 'topk' needs two or more values in `axes.tokens`",
        ),
        ({"search.pruner": "median"}, r"for example \[0.25, 0.5\], but got \[\]"),
        (
            {"search": {"kind": "basin", "pruner": "median"}},
            "`search.pruner` is read only by search.kind 'optuna' and 'grid', but got kind='basin'",
        ),
    ],
)
def test_what_no_pruner_can_decide_is_one_sentence(tiny, tmp_path, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        sweeping.sweep(tiny({"axes": {"lr": [1e-3, 2e-3]}} | settings), out=tmp_path)


# --- records and engines --------------------------------------------------------------------------


@pytest.fixture
def record(tiny, acc):
    """status -> the trial as it would be recorded with it."""
    whole, _ = training.run_trial(tiny(), "main", acc)
    ends = {"done": whole.loss, "stopped": None, "failed": None}
    return lambda status: replace(whole, status=status, loss=ends[status])


def test_the_end_of_a_training_replaces_a_stopped_trial(record, tmp_path):
    done, stopped, failed = map(record, ("done", "stopped", "failed"))
    for order in ([done, stopped, failed], [failed, stopped, done]):
        assert [trial.status for trial in merge_trials(order)] == ["done"]
    assert [trial.status for trial in merge_trials([failed], [stopped])] == ["stopped"]
    store = Store(tmp_path / "some")
    for trial, curve in ((stopped, [5.0]), (done, [5.0, 4.0]), (stopped, [5.0])):
        store.put(trial, curve)
    assert [trial.status for trial in store.trials()] == ["done"]
    assert store.curve(done.id) == [5.0, 4.0]
    store.close()


def test_a_slurm_job_passes_losses_on_and_stops_trials(tiny, tmp_path):
    (task,) = tasks("main", [tiny()])
    order = job_messages.write_order(tmp_path, [task])
    runner = job.OrderRunner(order.folder)
    for tokens in (100.0, 200.0):
        runner._answer(task, {"report": {"tokens": tokens, "loss": 3.0}})
        runner.last_beat = -math.inf
        runner._send_heartbeat("")
        order.heartbeat = json.loads((order.folder / "beat.json").read_text())
        new = job_messages.new_reports(order)
        assert new == [(task, {"report": {"tokens": tokens, "loss": 3.0}})]
    assert job_messages.new_reports(order) == [] and not job_messages.list_answers(tmp_path)
    job_messages.write_stops(order, [task.id])
    assert job_messages.read_stops(order.folder) == [task.id]
