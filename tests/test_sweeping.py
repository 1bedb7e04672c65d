"""Sweeps: recorded trials are not trained again.

A killed driver or worker does not change the record.
"""

import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest

from scaletune import data, sweeping, training
from scaletune import recipe as recipes
from scaletune.environment import LAUNCH_VARIABLES
from scaletune.errors import UserError
from scaletune.records import Store, read_jsonl
from scaletune.sweeping.engines import local
from scaletune.sweeping.progress import SweepProgress
from scaletune.transferring.formats.recipe import toml

# Fields that do not depend on where and when a trial was trained.
MEASURED = ("id", "sweep", "status", "loss", "train_loss", "message", "flops", "point")
PATIENCE = 60  # seconds after which a waiting test fails


def measured(record):
    return [{name: getattr(trial, name) for name in MEASURED} for trial in read_jsonl(record)]


class Stub:
    """The context manager of a pool that has nothing to stop."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


class InProcess(Stub):
    """A pool that trains in this process, so that tests of the record start no workers."""

    def __init__(self, size, *rest):
        self.acc, self.task, self.trained = training.accelerator(), None, []
        InProcess.last = self

    @property
    def busy(self):
        return self.task is not None

    def hand_out(self, queue):
        self.task = self.task or (queue.pop(0) if queue else None)

    def messages(self):
        task, self.task = self.task, None
        self.trained.append(task.id)
        trial, curve = training.run_trial(task.recipe, task.sweep, self.acc)
        return [(task, {"progress": 0.5}), (task, {"trial": asdict(trial), "curve": curve})]


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", InProcess)


@pytest.fixture(scope="session")
def sweep_recipe(tiny):
    """A sweep of three trials that train and one that diverges."""
    return tiny({"axes": {"lr": [2e-3, 8e-3, 1e3], "width": [32]}, "engine.workers": 2}).model_copy(
        update={"name": "some-1.5b"}
    )


@pytest.fixture(scope="session")
def undisturbed(sweep_recipe, tmp_path_factory):
    """The record of that sweep, trained by real workers without disturbance."""
    out = tmp_path_factory.mktemp("undisturbed")
    table = sweeping.sweep(sweep_recipe, out=out)
    return out, table, out / "sweeps" / "some-1.5b.jsonl"


def children(process=None):
    return [
        child
        for child in psutil.Process(process).children(recursive=True)
        if "scaletune.sweeping.engines.worker" in child.cmdline()
    ]


def wait_for(condition):
    """Polls until the condition returns something true, and returns that."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError("nothing happened")


# --- the record -----------------------------------------------------------------------------------


def test_every_point_is_a_row_and_a_line(sweep_recipe, undisturbed):
    out, table, record = undisturbed
    assert table["lr"].tolist() == [2e-3, 8e-3, 1e3]
    assert table["status"].tolist() == ["done", "done", "diverged"]
    assert [trial.id for trial in read_jsonl(record)] == table["id"].tolist()
    store = Store(out / "sweeps" / "some-1.5b")
    assert [len(store.curve(trial_id)) for trial_id in table["id"]] == [
        8,
        8,
        len(store.curve(table["id"][2])),
    ]
    assert 0 < len(store.curve(table["id"][2])) < 8
    store.close()
    assert not children()


def test_workers_train_what_a_trial_alone_is(sweep_recipe, undisturbed):
    alone, _ = training.run_trial(recipes.points(sweep_recipe)[0], "main", training.accelerator())
    assert measured(undisturbed[2])[0] == {name: getattr(alone, name) for name in MEASURED}


def test_a_second_sweep_trains_nothing(sweep_recipe, undisturbed, monkeypatch):
    out, table, record = undisturbed
    before = record.read_bytes()
    # Starting a worker would raise.
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", None)
    again = sweeping.sweep(sweep_recipe, out=out)
    assert again.equals(table) and record.read_bytes() == before


def test_a_wider_sweep_trains_what_is_new(tiny, in_process, tmp_path):
    first = sweeping.sweep(tiny({"axes": {"lr": [2e-3]}}), out=tmp_path)
    both = sweeping.sweep(tiny({"axes": {"lr": [2e-3, 4e-3]}}), out=tmp_path)
    assert len(InProcess.last.trained) == 1 and both["lr"].tolist() == [2e-3, 4e-3]
    assert both.iloc[0].equals(first.iloc[0])


def test_a_sweep_returns_the_requested_trials_and_records_all(tiny, in_process, tmp_path):
    sweeping.sweep(tiny({"axes": {"lr": [2e-3, 4e-3]}}), out=tmp_path)
    table = sweeping.sweep(tiny({"axes": {"lr": [2e-3]}}), out=tmp_path)
    assert table["lr"].tolist() == [2e-3] and len(read_jsonl(tmp_path / "sweeps/tiny.jsonl")) == 2


def test_a_point_requested_twice_belongs_to_the_first_sweep(tiny, in_process, tmp_path):
    wanted = sweeping.tasks("main", [tiny()]) + sweeping.tasks("comparison", [tiny(), tiny(seed=1)])
    table = sweeping.train_all(wanted, tmp_path / "twice", 1)
    assert sorted(zip(table["sweep"], table["seed"], strict=True)) == [
        ("comparison", 1),
        ("main", 0),
    ]


def test_a_record_that_came_with_a_clone_is_not_our_own(tiny, in_process, tmp_path):
    """Its lines are kept, but this machine trains its own trials."""
    sweeping.sweep(tiny({"axes": {"lr": [2e-3, 4e-3]}}), out=tmp_path / "theirs")
    record = tmp_path / "ours/sweeps/tiny.jsonl"
    record.parent.mkdir(parents=True)
    theirs = [
        replace(trial, loss=9.0) for trial in read_jsonl(tmp_path / "theirs/sweeps/tiny.jsonl")
    ]
    record.write_text("".join(json.dumps(asdict(trial)) + "\n" for trial in theirs))
    table = sweeping.sweep(tiny({"axes": {"lr": [2e-3]}}), out=tmp_path / "ours")
    assert len(InProcess.last.trained) == 1 and table["loss"][0] < 9
    assert {trial.lr: trial.loss for trial in read_jsonl(record)} == {
        2e-3: table["loss"][0],
        4e-3: 9.0,
    }


def test_adopt_takes_a_record_as_our_own(tiny, monkeypatch, tmp_path, undisturbed, sweep_recipe):
    record = tmp_path / "sweeps/some-1.5b.jsonl"
    record.parent.mkdir()
    record.write_bytes(undisturbed[2].read_bytes())
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", None)
    assert sweeping.sweep(sweep_recipe, out=tmp_path, adopt=True).equals(undisturbed[1])


def test_a_torn_record_does_not_stop_a_sweep(tiny, in_process, tmp_path):
    first = sweeping.sweep(tiny({"axes": {"lr": [2e-3, 4e-3]}}), out=tmp_path)
    record = tmp_path / "sweeps/tiny.jsonl"
    whole = record.read_bytes()
    record.write_bytes(whole[:-100])
    assert sweeping.sweep(tiny({"axes": {"lr": [2e-3, 4e-3]}}), out=tmp_path).equals(first)
    assert record.read_bytes() == whole


@pytest.mark.parametrize("change", [{"schema": 3}, {"colour": "red"}])
def test_a_record_we_cannot_keep_is_refused_before_anything_is_trained(
    tiny, monkeypatch, tmp_path, undisturbed, change
):
    record = tmp_path / "sweeps/tiny.jsonl"
    record.parent.mkdir()
    row = json.loads(undisturbed[2].read_text().splitlines()[0]) | change
    record.write_text(json.dumps(row) + "\n")
    started = []
    monkeypatch.setattr(
        "scaletune.sweeping.engines.local.LocalPool", lambda *size: started.append(size)
    )
    with pytest.raises(UserError, match=r"tiny\.jsonl:1 "):
        sweeping.sweep(tiny(), out=tmp_path)
    assert json.loads(record.read_text()) == row and not started


def test_a_form_that_cannot_tie_is_refused_before_anything_is_trained(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", None)
    with pytest.raises(UserError, match="a tied head needs a form"):
        sweeping.sweep(tiny({"model.tied": True, "form": "sp", "width": 64}), out=tmp_path)


def test_data_that_changes_under_a_sweep_is_refused(tiny, in_process, monkeypatch, tmp_path):
    """Its trials would have other ids than the requested ones, and would train again forever."""
    (tmp_path / "text.txt").write_text("before " * 1000)
    recipe, trial = tiny({"data.source": str(tmp_path / "text.txt")}), training.run_trial

    def changed(*arguments):
        (tmp_path / "text.txt").write_text("after " * 1000)
        data._load.cache_clear()  # a worker is another process
        return trial(*arguments)

    monkeypatch.setattr(training, "run_trial", changed)
    with pytest.raises(
        UserError,
        match=r"`.*text.txt` must not change while a sweep runs, but a worker read other data",
    ):
        sweeping.sweep(recipe, out=tmp_path)
    assert read_jsonl(tmp_path / "sweeps/tiny.jsonl") == []


# --- killed processes -----------------------------------------------------------------------------

DRIVER = """
import os, signal, sys
from scaletune import sweeping
from scaletune.sweeping.progress import SweepProgress
finish = SweepProgress.finish

def interrupted(progress, task, trial):
    finish(progress, task, trial)
    os.kill(os.getpid(), signal.SIGINT)

if sys.argv[3] == "interrupted":
    SweepProgress.finish = interrupted
sweeping.sweep(sys.argv[1], out=sys.argv[2])
"""


@pytest.fixture
def driver(sweep_recipe, tmp_path, request):
    """A driver in a separate process on the same sweep: (process, its folder)."""
    study = tmp_path / "some-1.5b.toml"
    study.write_text(toml(sweep_recipe.model_dump(exclude={"holdout", "target", "compare", "fit"})))
    command = [
        sys.executable,
        "-c",
        DRIVER,
        str(study),
        str(tmp_path),
        getattr(request, "param", ""),
    ]
    with subprocess.Popen(command, stderr=PIPE, text=True) as process:
        yield process, tmp_path
        process.kill()


def trials_in_store(folder):
    """Trials in the database of a running driver."""
    if not (folder / "sweeps/some-1.5b.db").exists():
        return []
    store = Store(folder / "sweeps/some-1.5b")
    trials = store.trials()
    store.close()
    return trials


def gone(processes):
    return psutil.wait_procs(processes, timeout=PATIENCE)[1] == []


@pytest.mark.parametrize("moment", ["any", "after a trial"])
def test_a_killed_driver_leaves_no_orphan_and_its_rerun_the_same_record(
    sweep_recipe, undisturbed, driver, moment
):
    process, folder = driver
    workers, pause = wait_for(lambda: children(process.pid)), random.uniform(0, 3)
    wait_for(lambda: trials_in_store(folder)) if moment == "after a trial" else time.sleep(pause)
    workers = children(process.pid) or workers
    process.kill()
    assert gone(workers), pause
    before = {trial.id: trial.provenance for trial in trials_in_store(folder)}
    sweeping.sweep(sweep_recipe, out=folder)
    assert measured(folder / "sweeps/some-1.5b.jsonl") == measured(undisturbed[2]), pause
    after = {trial.id: trial.provenance for trial in trials_in_store(folder)}
    assert before.items() <= after.items()  # recorded trials were not trained again


def test_a_worker_without_a_driver_stops_in_the_middle_of_its_trial(tiny):
    order = [{"sweep": "main", "recipe": tiny(tokens=256 * 10**6).model_dump()}]  # takes an hour
    with subprocess.Popen(
        [sys.executable, "-m", "scaletune.sweeping.engines.worker"],
        stdin=PIPE,
        stdout=PIPE,
        text=True,
    ) as worker:
        worker.stdin.write(json.dumps(order) + "\n")
        worker.stdin.flush()
        assert 0 < json.loads(worker.stdout.readline())["progress"] < 0.01
        worker.stdin.close()
        assert worker.wait(10) == 0


@pytest.mark.parametrize("driver", ["interrupted"], indirect=True)
def test_an_interrupt_leaves_the_record_written(undisturbed, driver):
    process, folder = driver
    workers = wait_for(lambda: children(process.pid))
    assert process.wait(PATIENCE) == -signal.SIGINT and "KeyboardInterrupt" in process.stderr.read()
    assert gone(workers)
    on_record = measured(folder / "sweeps/some-1.5b.jsonl")
    assert on_record and all(line in measured(undisturbed[2]) for line in on_record)
    assert {line["id"] for line in on_record} == {trial.id for trial in trials_in_store(folder)}


def test_a_killed_worker_is_replaced_and_its_trial_trained(tiny, tmp_path, monkeypatch):
    """Killed in the middle of the trial, after a progress message."""
    killed, update = [], SweepProgress.update

    def watched(progress, task, share):
        update(progress, task, share)
        if 0 < share < 1 and not killed:
            killed.append(children()[0])
            killed[0].send_signal(signal.SIGKILL)

    monkeypatch.setattr(SweepProgress, "update", watched)
    recipe = tiny({"tokens": 256 * 400, "data.epochs": 3, "engine.workers": 1})
    table = sweeping.sweep(recipe, out=tmp_path)
    assert len(killed) == 1 and table["status"].tolist() == ["done"]
    alone, curve = training.run_trial(recipe, "main", training.accelerator())
    assert table["loss"][0] == alone.loss and len(curve) == 400
    assert not children()


@pytest.fixture
def worker_is(tmp_path, monkeypatch):
    """Replaces the worker by a shell script."""

    def replace_it(script):
        path = tmp_path / "worker"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(path))

    return replace_it


@pytest.mark.parametrize(
    "script",
    [
        "echo 'some words' >&2; exit 3",
        "read order; echo 'some words' >&2; printf '{\"progr'; exit 3",
    ],
)
def test_a_trial_whose_worker_always_dies_is_recorded_as_failed_and_retried_by_the_next_sweep(
    tiny, tmp_path, worker_is, monkeypatch, script
):
    worker_is(script)
    recipe = tiny({"axes": {"lr": [2e-3, 4e-3]}, "engine.workers": 2})
    table = sweeping.sweep(recipe, out=tmp_path)
    assert table["status"].tolist() == ["failed", "failed"] and table["loss"].isna().all()
    assert set(table["message"]) == {
        "its worker died 3 times; last log lines: some words (exit status 3)"
    }
    assert [line["status"] for line in measured(tmp_path / "sweeps/tiny.jsonl")] == [
        "failed",
        "failed",
    ]
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", InProcess)
    assert sweeping.sweep(recipe, out=tmp_path)["status"].tolist() == ["done", "done"]
    assert [line["status"] for line in measured(tmp_path / "sweeps/tiny.jsonl")] == ["done", "done"]


def test_messages_that_arrive_together_are_all_received(tiny, tmp_path, worker_is):
    """A line that stays in a Python buffer would never wake the driver."""
    trial, curve = training.run_trial(tiny(), "main", training.accelerator())
    lines = [{"progress": 0.5}, {"progress": 1.0}, {"trial": asdict(trial), "curve": curve}]
    (tmp_path / "answers").write_text("".join(json.dumps(line) + "\n" for line in lines))
    worker_is(f"read order; cat {tmp_path}/answers; exec sleep {PATIENCE}")
    done = []
    thread = threading.Thread(
        target=lambda: done.append(sweeping.sweep(tiny({"engine.workers": 1}), out=tmp_path)),
        daemon=True,
    )
    thread.start()
    thread.join(PATIENCE / 2)
    assert done and done[0]["loss"].tolist() == [trial.loss]


def test_workers_inherit_nothing_of_a_surrounding_launch(monkeypatch):
    launch = [name + "X" * name.endswith("_") for name in LAUNCH_VARIABLES]
    for name in launch:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "1")
    environment = local.worker_environment(0)
    assert environment["KEPT"] == environment["OMP_NUM_THREADS"] == "1"
    assert {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_X"} <= set(launch)
    assert not set(launch) & environment.keys()


def test_one_worker_per_core_by_default(monkeypatch):
    monkeypatch.setattr(local, "_count_gpus", lambda: 0)
    assert local.count_workers("auto") == len(os.sched_getaffinity(0))
    assert local.count_workers(5) == 5
    monkeypatch.setattr(local, "_count_gpus", lambda: 8)
    assert local.count_workers("auto") == 8
    assert local.worker_environment(9)["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_trial_over_several_gpus_takes_a_worker_with_as_many(monkeypatch):
    monkeypatch.setattr(local, "_count_gpus", lambda: 8)
    assert local.count_workers("auto", 3) == 2
    assert [local.worker_environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == [
        "0,1,2",
        "3,4,5",
    ]
    # Of eight GPUs this process may use two.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(local, "_count_gpus", lambda: 2)
    assert [local.worker_environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1, 2)] == [
        "4",
        "6",
        "4",
    ]
    monkeypatch.setattr(local, "_count_gpus", lambda: 8)
    with pytest.raises(
        UserError, match="`processes <= GPUs` must hold, but got 9 processes and 8 GPUs"
    ):
        local.count_workers("auto", 9)


def test_a_sweep_trains_over_two_processes(tiny, tmp_path):
    alone, _ = training.run_trial(tiny(), "main", training.accelerator())
    table = sweeping.sweep(tiny({"engine.processes": 2, "engine.workers": 1}), out=tmp_path)
    assert table["id"].tolist() == [alone.id]
    assert table["loss"][0] == pytest.approx(alone.loss, rel=1e-5)
    assert table["provenance"][0]["processes"] == 2


NOISY = """
import os
from scaletune.sweeping.engines import worker

def serve(orders, driver, train):
    print("noise", flush=True)
    driver.send("answer")
    os._exit(0)

worker.serve = serve
worker.main()
"""


def test_output_of_a_library_does_not_mix_with_the_messages():
    """The worker's own standard output goes to its log."""
    with subprocess.Popen(
        [sys.executable, "-c", NOISY], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True
    ) as process:
        process.wait(PATIENCE)
        assert (process.stdout.read(), process.stderr.read()) == ('"answer"\n', "noise\n")


def test_progress_lines_show_the_share_done_and_the_lowest_loss(tiny, in_process, tmp_path, capsys):
    table = sweeping.sweep(tiny({"axes": {"lr": [2e-3, 8e-3, 1e3]}}), out=tmp_path)
    shown = capsys.readouterr().err
    best = table.loc[table["loss"].idxmin()]
    assert "trials 3/3" in shown and "100%" in shown
    assert f"lowest loss {best['loss']:.4f} at width 32, lr {best['lr']:.3g}" in shown


def test_a_database_can_be_read_while_a_sweep_writes(tmp_path, undisturbed):
    trials = read_jsonl(undisturbed[2])
    store = Store(tmp_path / "sweep")
    store.put(trials[0])
    other = Store(tmp_path / "sweep")
    with store.write():
        assert other.trials() == trials[:1]
    other.close()
    store.close()
    assert Path(tmp_path / "sweep.db").exists()


def test_settings_override_a_recipe_as_they_override_a_file(tiny, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(sweeping, "train_all", lambda tasks, *rest, **named: trained.extend(tasks))
    sweeping.sweep(tiny({"lr": 0.01}), out=tmp_path, settings=["lr=0.02", "model.depth=1"])
    assert [(task.recipe.optimizer.lr, task.recipe.model.depth) for task in trained] == [(0.02, 1)]
