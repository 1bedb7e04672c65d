"""Kills, full disks, incomplete files, two drivers and clock jumps do not damage a record."""

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from test_sweeping import PATIENCE, wait_for

from scaletune import counting, data, sweeping, training
from scaletune import recipe as recipes
from scaletune.errors import UserError
from scaletune.recipe import with_settings
from scaletune.records import Store, files, read_jsonl, read_store, read_trials
from scaletune.records import store as store_module
from scaletune.sweeping import lockfile, out_of_memory, progress

spec = spec_from_file_location("chaos", Path(__file__).parent.parent / "benchmarks/chaos.py")
sys.modules["chaos"] = chaos = module_from_spec(spec)
spec.loader.exec_module(chaos)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """(trials, body, seconds) -> tasks; replaces the training worker by one that answers at once.

    `body` is Python code that the worker runs before it answers.
    """
    python = sys.executable

    def install(trials=4, body="pass", seconds=0.0):
        chaos.base_recipe(tmp_path)
        monkeypatch.setattr(sys, "executable", python)
        chaos.install_worker(tmp_path, trials, seconds)
        script = (tmp_path / "worker").read_text()
        mark = "    os.write(started"
        (tmp_path / "worker").write_text(
            script.replace(mark, "    " + body.replace("\n", "\n    ") + "\n" + mark)
        )
        monkeypatch.setattr(sys, "executable", str(tmp_path / "worker"))
        return chaos.planted_tasks(tmp_path, trials)

    return install


def planted_losses(tasks):
    return {task.id: chaos.planted_trial(task).loss for task in tasks}


def losses(table):
    return dict(zip(table["id"], table["loss"], strict=True))


def set_engine(tasks, **settings):
    for task in tasks:
        task.recipe = with_settings(
            task.recipe, {f"engine.{name}": value for name, value in settings.items()}
        )
    return tasks


# --- kills ----------------------------------------------------------------------------------------


def test_a_sweep_that_is_killed_at_random_ends_as_if_it_had_not_been(worker, tmp_path, monkeypatch):
    tasks = worker(90, seconds=0.03)
    monkeypatch.undo()
    shm = set(os.listdir("/dev/shm"))
    outcome = chaos.disturb(tmp_path, 90, kills=8, workers=2, seed=3, pause=0.08)
    assert outcome.worker_kills and not (outcome.lost or outcome.twice or outcome.orphans)
    record = read_jsonl(tmp_path / "sweeps/chaos.jsonl")
    assert {trial.id: trial.loss for trial in record} == planted_losses(tasks) and len(record) == 90
    assert {path.suffix for path in (tmp_path / "sweeps").iterdir()} <= {".db", ".jsonl", ".logs"}
    assert not os.listdir(tmp_path / "tmp") and set(os.listdir("/dev/shm")) <= shm


def test_training_that_is_killed_at_random_ends_as_if_it_had_not_been(tmp_path):
    """Records are bitwise equal; trials are stacked, have checkpoints, and one diverges."""
    tasks = chaos.training_tasks(tmp_path, 6, steps=120)
    alone = [
        training.run_trial(task.recipe, "main", training.accelerator())[0]
        for task in set_engine(tasks, checkpoint_every=0)
    ]
    shm = set(os.listdir("/dev/shm"))
    outcome = chaos.disturb(tmp_path, 6, kills=2, workers=2, seed=2, pause=1.2, steps=120)
    assert outcome.driver_kills + outcome.worker_kills
    assert not (outcome.lost or outcome.twice or outcome.orphans)
    (tmp_path / "alone/sweeps").mkdir(parents=True)
    store = Store(tmp_path / "alone/sweeps/chaos")
    for trial in alone:
        store.put(trial)
    store.export()
    store.close()
    assert chaos.reproducible_record(tmp_path) == chaos.reproducible_record(tmp_path / "alone")
    assert len(alone) == 6
    assert not chaos.leftover_files(tmp_path) and set(os.listdir("/dev/shm")) <= shm


def test_a_driver_killed_while_it_records_loses_and_repeats_nothing(worker, tmp_path, monkeypatch):
    tasks = worker(100, seconds=0.01)
    monkeypatch.undo()
    command = [
        sys.executable,
        chaos.__file__,
        "--drive",
        str(tmp_path),
        "--trials",
        "100",
        "--workers",
        "2",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as driver:
        wait_for(lambda: len(chaos.read_lines(tmp_path)) >= 5)
        driver.kill()
    before, position = chaos.read_lines(tmp_path), (tmp_path / "started").stat().st_size
    outcome = chaos.disturb(tmp_path, 100, kills=0)
    started = (tmp_path / "started").read_text()[position:].split()
    after = chaos.read_lines(tmp_path)
    assert 5 <= len(before) < 100 and before.items() <= after.items() and not outcome.lost
    assert sorted(started) == sorted(after.keys() - before.keys()) and len(after) == len(tasks)


def test_a_stopped_worker_is_killed_with_its_driver(worker, tmp_path, monkeypatch):
    """A stopped process cannot read the end of its input, so the kernel must kill it."""
    code = (
        "import time; from scaletune.sweeping.engines.parent_death import die_with_parent; "
        "die_with_parent(); print(1, flush=True); time.sleep(600)"
    )
    parent = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {code!r}]); "
        "print(p.pid, flush=True); time.sleep(600)"
    )
    import psutil

    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True
    ) as driver:
        child = psutil.Process(int(driver.stdout.readline()))
        driver.stdout.readline()
        child.send_signal(signal.SIGSTOP)
        driver.kill()
        assert psutil.wait_procs([child], timeout=PATIENCE)[1] == []


# --- lost trials ----------------------------------------------------------------------------------


def first_time_only(tmp_path, does):
    """Code for a worker that runs `does` the first time only."""
    return (
        f"flag = {str(tmp_path / 'flag')!r}\n"
        "if not os.path.exists(flag):\n"
        "    open(flag, 'w').close()\n"
        f"    {does}"
    )


def test_a_worker_that_hangs_is_replaced_and_its_trial_trained(worker, tmp_path, capsys):
    tasks = set_engine(worker(2, first_time_only(tmp_path, "time.sleep(600)")), patience=0.5)
    assert losses(sweeping.train_all(tasks, tmp_path / "sweeps/chaos", 1)) == planted_losses(tasks)
    assert "its worker sent no message for " in capsys.readouterr().err


def test_a_worker_that_always_hangs_is_a_failed_trial(worker, tmp_path):
    tasks = set_engine(
        worker(
            1, "sys.stderr.write('loading\\nnearly there\\n'); sys.stderr.flush(); time.sleep(600)"
        ),
        patience=0.3,
        retries=1,
    )
    (trial,) = sweeping.train_all(tasks, tmp_path / "sweeps/chaos", 1).itertuples()
    assert trial.status == "failed" and trial.message.startswith("its worker sent no message for ")
    assert trial.message.endswith("; last log lines: loading / nearly there (exit status -9)")
    log = (tmp_path / f"sweeps/chaos.logs/{trial.id}.log").read_text()
    assert log.count("nearly there") == 2
    assert "try 1: lost: its worker sent" in log
    assert "try 2: lost" in log


@pytest.mark.parametrize(
    "words", ["MemoryError", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"]
)
def test_out_of_memory_halves_the_micro_batch_with_a_message(worker, tmp_path, capsys, words):
    seen = (
        "open(flag + 'seen', 'a')"
        ".write(str(json.loads(line)['recipe']['engine'].get('accumulation', 1)) + ' ')"
    )
    tasks = worker(
        1,
        f"flag = {str(tmp_path / 'flag')!r}\n{seen}\n"
        + first_time_only(tmp_path, f"sys.exit({words!r})"),
    )
    assert losses(sweeping.train_all(tasks, tmp_path / "sweeps/chaos", 1)) == planted_losses(tasks)
    assert (tmp_path / "flagseen").read_text() == "1 2 "
    assert (
        f"trial {tasks[0].id}, try 1: out of memory; retried with engine.accumulation = 2"
        in capsys.readouterr().err
    )


def test_sigkill_is_out_of_memory_only_if_the_kernel_counted_an_oom_kill(monkeypatch):
    """After another SIGKILL, the trial is retried unchanged."""
    assert not out_of_memory.ran_out_of_memory("", -9, out_of_memory.kernel_kills())
    monkeypatch.setattr(out_of_memory, "kernel_kills", lambda: 8)
    assert out_of_memory.ran_out_of_memory("", -9, 7)
    assert not out_of_memory.ran_out_of_memory("", -9, 8)
    assert not out_of_memory.ran_out_of_memory("", 1, 7)


def test_micro_batches_are_halved_while_rows_halve(tiny):
    accumulations, recipe = [], tiny()  # 8 rows
    while recipe := out_of_memory.halve_micro_batches(recipe):
        accumulations.append(recipe.engine.accumulation)
    assert accumulations == [2, 4, 8]


def test_no_secret_reaches_a_record_or_a_log(worker, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    failure = "sys.exit('cannot read s3://me:hunter2pass@host/x with ' + os.environ['HF_TOKEN'])"
    table = sweeping.train_all(
        set_engine(worker(1, failure), retries=0), tmp_path / "sweeps/chaos", 1
    )
    assert table["message"][0].endswith(
        "last log lines: cannot read s3://***@host/x with *** (exit status 1)"
    )
    kept = b"".join(
        path.read_bytes() for path in (tmp_path / "sweeps").rglob("*") if path.is_file()
    )
    assert b"cannot read" in kept and b"abcdefghijkl" not in kept and b"hunter2" not in kept


def test_no_shell_interprets_strings_of_a_recipe(worker, tmp_path, monkeypatch):
    name = "a; touch hacked; $(touch hacked) `touch hacked`"
    tasks = set_engine(worker(2), runs=f"{tmp_path}/{name}")
    monkeypatch.chdir(tmp_path)
    assert losses(sweeping.train_all(tasks, tmp_path / "sweeps" / name, 1)) == planted_losses(tasks)
    assert sweeping.status(name, out=tmp_path)["done"] == 2 and not list(tmp_path.rglob("hacked"))


def test_the_runs_folder_is_beside_the_sweeps_folder(worker, tmp_path):
    tasks = worker(2)
    set_engine(tasks[1:], runs=str(tmp_path / "elsewhere"))
    sweeping.train_all(tasks, tmp_path / "sweeps/chaos", 1)
    assert [task.recipe.engine.runs for task in tasks] == [
        str(tmp_path / "runs"),
        str(tmp_path / "elsewhere"),
    ]


def test_a_search_callback_gets_every_trial_and_may_add_more(worker, tmp_path):
    tasks, reported = worker(6), []

    def then(trial):
        reported.append(trial.id)
        return tasks[len(reported) : len(reported) + 1]

    table = sweeping.train_all(tasks[:1], tmp_path / "sweeps/chaos", 2, then=then)
    assert losses(table) == planted_losses(tasks)
    assert sorted(reported) == sorted(task.id for task in tasks)
    again, reported[:] = reported[:], []
    assert sweeping.train_all(tasks[:1], tmp_path / "sweeps/chaos", 2, then=then).equals(table)
    assert sorted(reported) == sorted(again)


# --- interrupts, two drivers, other terminals -----------------------------------------------------


@pytest.fixture
def under_way(worker, tmp_path, monkeypatch):
    """A driver in its own process that has recorded a trial and is training others."""
    worker(40, seconds=0.4)
    monkeypatch.undo()
    command = [
        sys.executable,
        chaos.__file__,
        "--drive",
        str(tmp_path),
        "--trials",
        "40",
        "--workers",
        "2",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as driver:
        wait_for(lambda: chaos.read_lines(tmp_path))
        yield driver
        driver.kill()


def test_a_second_driver_is_refused_and_the_first_one_unharmed(under_way, tmp_path):
    with pytest.raises(
        UserError,
        match=(
            rf"^sweep `chaos` must have one driver, but process {under_way.pid} on \S+ has "
            r"driven it since 20"
        ),
    ):
        sweeping.train_all([], tmp_path / "sweeps/chaos")
    now = wait_for(
        lambda: (
            (now := sweeping.status(tmp_path / "sweeps/chaos.db"))["running"]
            and now["recorded"]
            and now
        )
    )
    assert now["driver"]["pid"] == under_way.pid
    assert now["wanted"] == 40
    assert now["recorded"] == now["done"] >= 1
    assert {row["id"] for row in now["running"]} <= {
        task.id for task in chaos.planted_tasks(tmp_path, 40)
    }
    assert len(now["running"]) <= 2
    # read a moment later, so there may be more trials
    recorded = [trial.loss for trial in read_store(tmp_path / "sweeps/chaos.db")[0]]
    assert now["best"]["loss"] in recorded
    assert sum(loss < now["best"]["loss"] for loss in recorded) <= len(recorded) - now["recorded"]
    workers = chaos.list_workers(under_way.pid)
    # after the first interrupt the record is written and the workers are stopped
    under_way.send_signal(signal.SIGINT)
    under_way.wait(PATIENCE)
    assert under_way.returncode == -signal.SIGINT
    assert not [worker for worker in workers if worker.is_running()]
    assert {trial.id for trial in read_jsonl(tmp_path / "sweeps/chaos.jsonl")} == chaos.read_lines(
        tmp_path
    ).keys()
    now = sweeping.status(tmp_path / "sweeps/chaos.db")
    assert now["driver"] is None
    assert now["running"] == []
    assert not (tmp_path / "sweeps/chaos.lock").exists()


def test_only_one_of_two_simultaneous_drivers_trains(worker, tmp_path):
    tasks, ends = worker(3, seconds=0.3), []

    def drive():
        try:
            ends.append(losses(sweeping.train_all(tasks, tmp_path / "sweeps/chaos", 1)))
        except UserError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=drive) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    refused, trained = sorted(ends, key=lambda end: isinstance(end, dict))
    assert "must have one driver" in refused and trained == planted_losses(tasks)
    assert len((tmp_path / "started").read_text().split()) == 3


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    stem = tmp_path / "sweep"
    stem.with_suffix(".lock").write_text(json.dumps({"pid": 1, "host": "here", "since": "2020"}))
    with (
        lockfile.hold_lock(stem),
        pytest.raises(UserError, match=f"process {os.getpid()} on "),
        lockfile.hold_lock(stem),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_driver_of_another_machine_is_known_by_its_heartbeat(tmp_path):
    store = Store(tmp_path / "sweep")
    store.write_progress(
        {"driver": {"pid": 7, "host": "elsewhere", "since": "2026-11-20"}, "beat": time.time() - 5}
    )
    store.close()
    with pytest.raises(UserError, match="process 7 on elsewhere has driven it since 2026-11-20"):
        sweeping.train_all([], tmp_path / "sweep")
    store = Store(tmp_path / "sweep")
    store.write_progress(
        {
            "driver": {"pid": 7, "host": "elsewhere", "since": "2026-11-20"},
            "beat": time.time() - 2 * lockfile.SILENT,
        }
    )
    store.close()
    assert sweeping.train_all([], tmp_path / "sweep").empty


def test_a_clock_that_jumps_changes_nothing(worker, tmp_path, monkeypatch):
    """The wall clock jumps by years; patience, progress and ETA use the monotonic clock."""
    tasks, jumps = worker(4), iter([1e9, -1e9] * 1000)
    monkeypatch.setattr(time, "time", lambda: 1.8e9 + next(jumps))
    monkeypatch.setattr(progress, "BEAT", 0.0)
    assert losses(sweeping.train_all(tasks, tmp_path / "sweeps/chaos", 2)) == planted_losses(tasks)
    assert len((tmp_path / "started").read_text().split()) == 4
    table = sweeping.train_all(tasks, tmp_path / "sweeps/chaos", 2)
    assert table["status"].tolist() == ["done"] * 4


# --- disks ----------------------------------------------------------------------------------------


def raise_disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_a_user_error_and_costs_one_trial(worker, tmp_path):
    """A limit on the pages of SQLite has the effect of a full disk."""
    tasks, stem = worker(6), tmp_path / "sweeps/chaos"
    sweeping.train_all(tasks[:2], stem, 1)
    store = Store(stem)
    store._db.execute(
        f"PRAGMA max_page_count = {store._db.execute('PRAGMA page_count').fetchone()[0]}"
    )
    with pytest.raises(
        UserError,
        match=r"`.*chaos.db` must be a writable SQLite file, but database or disk is full",
    ):
        for task in tasks[2:]:
            store.put(chaos.planted_trial(task), [i / 7 for i in range(5000)])
    store.close()
    before = chaos.read_lines(tmp_path)
    assert len(before) >= 2
    assert losses(sweeping.train_all(tasks, stem, 1)) == planted_losses(tasks)
    assert before.items() <= chaos.read_lines(tmp_path).items()


def test_a_record_that_cannot_be_written_stays_as_it_was(worker, tmp_path, monkeypatch):
    tasks, stem = worker(2), tmp_path / "sweeps/chaos"
    sweeping.train_all(tasks[:1], stem, 1)
    before = (tmp_path / "sweeps/chaos.jsonl").read_bytes()
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            UserError, match=r"chaos.jsonl` must be writable, but No space left on device"
        ),
    ):
        patch.setattr(files.os, "fsync", raise_disk_full)
        sweeping.train_all(tasks, stem, 1)
    assert (tmp_path / "sweeps/chaos.jsonl").read_bytes() == before
    assert len(chaos.read_lines(tmp_path)) == 2
    assert {path.name for path in (tmp_path / "sweeps").iterdir()} == {"chaos.db", "chaos.jsonl"}
    assert len(read_jsonl(tmp_path / "sweeps/chaos.jsonl")) == 1
    assert len(sweeping.train_all(tasks, stem, 1)) == 2
    assert len(read_jsonl(tmp_path / "sweeps/chaos.jsonl")) == 2


@pytest.fixture
def read_only():
    """(folder, function that removes write permission for this process, also for root)."""
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), os.geteuid() == 0

        def close():
            for path in (folder, *folder.iterdir()):
                path.chmod(0o555)
            if root:
                os.seteuid(65534)  # nobody

        yield folder, close
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_read_only_folder_can_be_read_but_not_trained_into(read_only, tmp_path):
    folder, close = read_only
    task = chaos.planted_tasks(tmp_path, 1)[0]
    store = Store(folder / "sweep")
    store.put(chaos.planted_trial(task))
    store.export()
    store.close()
    close()
    assert len(read_trials(folder / "sweep.db")) == 1
    assert sweeping.status(folder / "sweep.db")["done"] == 1
    with pytest.raises(UserError, match=r"sweep.lock` must be writable, but Permission denied"):
        sweeping.train_all([task], folder / "sweep")
    with pytest.raises(UserError, match=r"sweep.db` must be a writable SQLite file, but "):
        Store(folder / "sweep").put(chaos.planted_trial(task))


def test_a_truncated_store_is_a_user_error_and_is_restored_from_the_record(worker, tmp_path):
    tasks, stem = worker(40), tmp_path / "sweeps/chaos"
    table = sweeping.train_all(tasks, stem, 2)
    path = tmp_path / "sweeps/chaos.db"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for act in (
        lambda: sweeping.train_all(tasks, stem, 2),
        lambda: read_trials(path),
        lambda: sweeping.status(path),
    ):
        with pytest.raises(
            UserError,
            match=(
                r"chaos.db` must be .*malformed; `chaos.jsonl` is not damaged: move the .db "
                r"away and resume with"
            ),
        ):
            act()
    path.unlink()
    assert sweeping.train_all(tasks, stem, 2, adopt=True).equals(table)
    assert len((tmp_path / "started").read_text().split()) == 40


def test_an_incomplete_record_gives_a_message_and_is_rewritten(worker, tmp_path, capsys):
    tasks, stem, record = worker(3), tmp_path / "sweeps/chaos", tmp_path / "sweeps/chaos.jsonl"
    sweeping.train_all(tasks, stem, 1)
    whole = record.read_bytes()
    record.write_bytes(whole[:-100])
    assert len(read_jsonl(record)) == 2
    assert capsys.readouterr().err.endswith(
        f"the last line of `{record}` is incomplete and was left out; 2 lines were read\n"
    )
    sweeping.train_all(tasks, stem, 1)
    assert record.read_bytes() == whole


# --- size -----------------------------------------------------------------------------------------


def test_a_recorded_sweep_is_resumed_with_one_read_and_no_write(worker, tmp_path, monkeypatch):
    """Each requested trial is parsed once; there is no export and no transaction per trial."""
    tasks, stem = worker(30), tmp_path / "sweeps/chaos"
    store = Store(stem)
    for task in tasks:
        store.put(replace(chaos.planted_trial(task)))
    store.export()
    store.close()
    statements, connect = [], sqlite3.connect

    def watched(*args, **named):
        db = connect(*args, **named)
        db.set_trace_callback(statements.append)
        return db

    monkeypatch.setattr(sqlite3, "connect", watched)
    monkeypatch.setattr(store_module, "write_atomically", None)
    assert len(sweeping.train_all(tasks, stem)) == 30
    assert len(statements) < 30
    assert sum("SELECT id, line" in statement for statement in statements) == 1


def test_costs_and_data_checks_run_once_per_shape(tmp_path, monkeypatch):
    """Checks and costs are computed per shape, not per point."""
    recipe, judged, loaded = chaos.base_recipe(tmp_path), [], []
    points = recipes.points(
        with_settings(recipe, {"axes": {"lr": [1e-3, 2e-3], "seed": [0, 1, 2], "width": [32, 64]}})
    )
    apart = [chaos.sweeping.tasks("main", [point])[0] for point in points]
    monkeypatch.setattr(
        counting,
        "seconds",
        lambda *a, seconds=counting.seconds, **named: judged.append(a) or seconds(*a, **named),
    )
    monkeypatch.setattr(data, "load", lambda *a, load=data.load: loaded.append(a) or load(*a))
    together = chaos.sweeping.tasks("main", points)
    assert len(judged) == len(loaded) == 2 and len({task.id for task in together}) == 12
    assert [(task.id, task.cost) for task in together] == [(task.id, task.cost) for task in apart]


def test_a_driver_parses_a_recorded_trial_once(tmp_path, monkeypatch):
    """A search reads the record after every wave."""
    tasks, read = chaos.planted_tasks(tmp_path, 3), []
    store = Store(tmp_path / "sweep")
    monkeypatch.setattr(
        store_module,
        "parse_line",
        lambda *a, parse=store_module.parse_line: read.append(a) or parse(*a),
    )
    for i, task in enumerate(tasks):
        store.put(chaos.planted_trial(task))
        assert len(store.trials()) == len(read) == i + 1
    store.delete([tasks[0].id])
    store.put(replace(chaos.planted_trial(tasks[0]), loss=7.0))
    assert sorted(trial.loss == 7 for trial in store.trials()) == [False, False, True]
    store.close()
