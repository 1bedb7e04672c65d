"""Trials whose worker dies continue from a checkpoint: alone, stacked and over processes."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time

import psutil
import pytest
from test_sweeping import PATIENCE, children, gone, wait_for

from scaletune import recipe as recipes
from scaletune import sweeping, training
from scaletune.records import Store, read_jsonl
from scaletune.sweeping.engines import local
from scaletune.transferring.formats.recipe import toml

WORKER = """
import os, signal, sys
from scaletune.sweeping.engines import worker
from scaletune.training import loop, rank

finish_step = loop.finish_step

def watched(run, track):
    "Records each trained step in a file, and ends the first worker at step 5."
    finish_step(run, track)
    if not run.acc.is_main_process:
        return
    with open({folder!r} + "/" + run.id, "a") as file:
        file.write(f"{{run.step}} ")
    if run.step == 5 and not os.path.exists({folder!r} + "/ended"):
        open({folder!r} + "/ended", "w").close()
        {end}

loop.finish_step = watched
if __name__ == "__main__":
    sys.executable = {folder!r} + "/../worker"  # the processes of a trial are watched too
    rank.main() if "scaletune.training.rank" in sys.argv else worker.main()
"""
KILLED, NO_MEMORY = "os.kill(os.getpid(), signal.SIGKILL)", "raise MemoryError"
# Steps that were trained, with checkpoints after 2, 4, 6 and 8.
ALONE, RETRIED, BEHIND = ("1 2 3 4 5 6 7 8 ", "1 2 3 4 5 5 6 7 8 ", "1 2 3 4 5 6 7 8 ")


@pytest.fixture
def worker_ends(tmp_path, monkeypatch):
    """Makes the first worker end at step 5 of a trial."""

    def planted(end):
        (tmp_path / "steps").mkdir()
        (tmp_path / "worker.py").write_text(WORKER.format(folder=str(tmp_path / "steps"), end=end))
        (tmp_path / "worker").write_text(
            f'#!/bin/sh\nexec {sys.executable} {tmp_path}/worker.py "$@"\n'
        )
        (tmp_path / "worker").chmod(stat.S_IRWXU)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "worker"))

    return planted


def steps(folder, table):
    """The steps of each trial that the workers trained, in the order of learning rates."""
    return [(folder / "steps" / i).read_text() for i in table.sort_values("lr")["id"]]


def checkpointed_recipe(tiny, lrs, **settings):
    return tiny({"axes": {"lr": lrs}, "engine.workers": 1, "engine.checkpoint_every": 2} | settings)


def alone(recipe):
    """Losses of the points, trained here without disturbance."""
    apart = {"engine.checkpoint_every": 0, "engine.processes": 1}
    points = [recipes.with_settings(point, apart) for point in recipes.points(recipe)]
    return [training.run_trial(point, "main", training.accelerator())[0].loss for point in points]


def test_a_trial_whose_worker_is_killed_goes_on_from_its_checkpoint(tiny, tmp_path, worker_ends):
    recipe = checkpointed_recipe(tiny, [4e-3])
    worker_ends(KILLED)
    table = sweeping.sweep(recipe, out=tmp_path)
    assert steps(tmp_path, table) == [RETRIED] and table["loss"].tolist() == alone(recipe)


def test_trials_of_a_killed_stack_go_on_from_their_checkpoints_alone(
    tiny, tmp_path, worker_ends, capsys
):
    recipe = checkpointed_recipe(tiny, [2e-3, 4e-3], **{"engine.stack": 2})
    worker_ends(KILLED)
    table = sweeping.sweep(recipe, out=tmp_path)
    # The fifth step of the other trial was not recorded in its file.
    assert sorted(steps(tmp_path, table)) == sorted([RETRIED, BEHIND])
    assert table["loss"].tolist() == alone(recipe)
    assert [row["stack"] for row in table["provenance"]] == [1, 1]
    assert capsys.readouterr().err.count(", try 1: its worker died") == 2


def test_a_stack_without_memory_is_halved_and_goes_on_from_its_checkpoints(
    tiny, tmp_path, worker_ends, capsys
):
    """The stack is halved, not the micro-batches, so the trials stay bitwise the same."""
    recipe = checkpointed_recipe(
        tiny, [1e-3, 2e-3, 4e-3, 8e-3], **{"engine.stack": 4, "engine.retries": 0}
    )
    worker_ends(NO_MEMORY)
    table = sweeping.sweep(recipe, out=tmp_path)
    assert table["loss"].tolist() == alone(recipe)
    assert sorted(steps(tmp_path, table)) == sorted([RETRIED, *[BEHIND] * 3])
    assert [(row["stack"], row["accumulation"]) for row in table["provenance"]] == [(2, 1)] * 4
    retried = "try 1: out of memory; retried in a stack of 2 instead of 4\n"
    assert capsys.readouterr().err.count(retried) == 4


def test_a_trial_over_processes_out_of_memory_continues_with_smaller_micro_batches(
    tiny, tmp_path, worker_ends, capsys
):
    recipe = checkpointed_recipe(tiny, [4e-3], **{"engine.processes": 2, "engine.retries": 0})
    worker_ends(NO_MEMORY)
    table = sweeping.sweep(recipe, out=tmp_path)
    assert steps(tmp_path, table) == [RETRIED]
    assert table["loss"].tolist() == pytest.approx(alone(recipe), rel=1e-5)
    assert (table["provenance"][0]["processes"], table["provenance"][0]["accumulation"]) == (2, 2)
    assert "try 1: out of memory; retried with engine.accumulation = 2\n" in capsys.readouterr().err


def test_a_stopped_worker_leaves_no_processes(tiny, tmp_path):
    (task,) = sweeping.tasks("main", [tiny(LONG | {"engine.processes": 2, "tokens": 256 * 10**6})])
    with local.LocalPool(1, 2) as pool:
        pool.hand_out([task])
        wait_for(lambda: any(message["progress"] > 0 for _, message in pool.messages()))
        ranks = psutil.Process(pool.workers[0].process.pid).children(recursive=True)
    assert len(ranks) == 2 and not psutil.wait_procs(ranks, timeout=30)[1]


def test_a_partial_checkpoint_of_a_killed_writer_is_deleted(tiny, tmp_path):
    recipe = tiny({"engine.checkpoint_every": 4, "engine.runs": str(tmp_path)})
    trial, _ = training.run_trial(recipe, "main", training.accelerator())
    (tmp_path / trial.id / "checkpoint.4711.part").write_bytes(b"half")
    (tmp_path / trial.id / "checkpoint.pt").unlink()  # the checkpoint of step 4 remains
    assert training.run_trial(recipe, "main", training.accelerator())[0].loss == trial.loss
    assert {path.name for path in (tmp_path / trial.id).iterdir()} == {
        "checkpoint.pt",
        "previous.pt",
    }


# --- interrupts -----------------------------------------------------------------------------------

DRIVER = """
import signal, sys
from scaletune.cli import main
# A background job ignores SIGINT, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""
# One trial takes eight steps, the other an hour.
LONG = {"axes": {"tokens": [256 * 8, 256 * 10**6]}, "data.epochs": 10**4, "engine.workers": 2}


def trials_in_store(folder):
    """Trials in the database of a running driver."""
    if not (folder / "sweeps/long.db").exists():
        return []
    store = Store(folder / "sweeps/long")
    trials = store.trials()
    store.close()
    return trials


def test_a_second_interrupt_stops_at_once(tiny, tmp_path):
    """Ctrl-C reaches the whole foreground group.

    After the first interrupt the driver waits for the locked database, after the second it stops.
    """
    (tmp_path / "long.toml").write_text(
        toml(tiny(LONG).model_dump(include={*recipes.POINT_SECTIONS, "axes", "engine"}))
    )
    command = [
        sys.executable,
        "-c",
        DRIVER,
        "sweep",
        str(tmp_path / "long.toml"),
        "--out",
        str(tmp_path),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as driver:
        (trial,) = wait_for(lambda: trials_in_store(tmp_path))
        workers = children(driver.pid)
        held = sqlite3.connect(tmp_path / "sweeps/long.db", timeout=PATIENCE, isolation_level=None)
        held.execute("BEGIN IMMEDIATE")
        os.killpg(driver.pid, signal.SIGINT)
        assert (
            wait_for(driver.stderr.readline)
            == "scaletune: stopping cleanly; a second interrupt stops at once\n"
        )
        time.sleep(0.2)
        assert driver.poll() is None
        os.killpg(driver.pid, signal.SIGINT)
        assert driver.wait(PATIENCE / 4) == -signal.SIGINT
        assert gone(workers)
        assert "Traceback" not in driver.stderr.read()
        held.close()
    # The trial is in the database; the next command writes the record.
    assert trials_in_store(tmp_path) == [trial]
    assert not read_jsonl(tmp_path / "sweeps/long.jsonl")
    assert sweeping.status("long", out=tmp_path)["driver"] is None
    assert sweeping.export("long", out=tmp_path)
    assert read_jsonl(tmp_path / "sweeps/long.jsonl") == [trial]
