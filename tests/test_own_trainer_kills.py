"""SIGKILL of drivers, workers, guards and the user's trainers loses, doubles and leaves nothing."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import killed_trainer
import psutil
import pytest
from test_sweeping import wait_for

from scaletune.records import read_jsonl, read_store

# of a daemon that was not killed before the trial ended, and of a kill after the last report
NOTES = ("1 process that it left running: killed", "after its result: killed by SIGKILL")
PATIENCE = 10  # seconds that killed processes may take to disappear


@dataclass
class Outcome:
    kills: Counter = field(default_factory=Counter)
    lost: set = field(default_factory=set)  # recorded, and later missing or changed
    orphans: int = 0


def trial_processes(folder):
    """The processes that belong to trials of a folder: by environment, open files or memory."""
    pids = set()
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            links = [os.readlink(link) for link in (proc / "fd").iterdir()]
            if f"SCALETUNE_TRIAL={folder}".encode() in (proc / "environ").read_bytes() or any(
                link.startswith(str(folder / "alone")) for link in links
            ):
                pids.add(int(proc.name))
        except OSError:
            pass
    return pids


def kill_next(driver, rng, outcome, victims, pause):
    """Kills what `victims` names, one after the other; returns when the driver has ended."""
    while driver.poll() is None:
        time.sleep(rng.uniform(0, 2 * pause))
        if not victims:
            driver.wait()
            return
        parts = family(driver.pid)
        if not parts.get("guard"):
            continue
        kind = victims.pop()
        each = {"both": ["guard", "worker"], "all": ["driver", "guard", "worker"]}.get(kind)
        chosen = [p for part in each for p in parts[part]] if each else parts.get(kind, [])
        for process in chosen if each else rng.sample(chosen, min(1, len(chosen))):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                outcome.kills[kind] += 1


def family(driver):
    """driver, worker, guard, trainer -> processes."""
    parts = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        parts["driver"] = [psutil.Process(driver)]
        for process in psutil.Process(driver).children(recursive=True):
            parts.setdefault(part_of(process, driver), []).append(process)
    return parts


def part_of(process, driver):
    names, depth, pid = ("driver", "worker", "guard"), 0, process.pid
    with contextlib.suppress(psutil.NoSuchProcess):
        while pid not in (driver, 0):
            pid, depth = psutil.Process(pid).ppid(), depth + 1
        return names[depth] if depth < len(names) else "trainer"


def disturb(kind, folder, trials, victims, seed, pause):
    """Runs the sweep to its end, starting the driver again whenever it was killed."""
    rng, outcome, before = random.Random(seed), Outcome(), {}
    rng.shuffle(victims)
    command = [sys.executable, killed_trainer.__file__, "drive", kind, str(folder), str(trials)]
    while True:
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as driver:
            kill_next(driver, rng, outcome, victims, pause)
            errors = driver.communicate()[1]
        database = folder / "sweeps/killed.db"
        now = {t.id: t.loss for t in read_store(database)[0]} if database.exists() else {}
        outcome.lost |= {id for id, loss in before.items() if now.get(id) != loss}
        before = now
        if driver.returncode != -signal.SIGKILL:
            assert driver.returncode == 0, errors
            break
    end = time.monotonic() + PATIENCE
    while (orphans := trial_processes(folder)) and time.monotonic() < end:
        time.sleep(0.05)
    outcome.orphans = len(orphans)
    return outcome


def check(folder, trials, outcome):
    record = read_jsonl(folder / "sweeps/killed.jsonl")
    assert len(record) == len({trial.id for trial in record}) == trials
    for trial in record:
        assert trial.status == "done"
        assert not trial.message or trial.message in NOTES
        assert trial.loss == killed_trainer.loss_at(trial.lr, killed_trainer.STEPS)
        assert trial.metrics["held_out"] == killed_trainer.held_out(trial.lr)
    assert not (folder / "overlaps").exists(), (folder / "overlaps").read_text()
    assert not outcome.lost and not outcome.orphans


CASES = {"command": ["trainer", "trainer", "guard", "both", "all"], "function": ["worker", "all"]}


@pytest.mark.parametrize("kind", CASES)
def test_a_sweep_whose_processes_are_killed_ends_as_if_they_had_not_been(tmp_path, kind):
    outcome = disturb(kind, tmp_path, 6, CASES[kind][:], seed=1, pause=0.1)
    check(tmp_path, 6, outcome)
    assert outcome.kills.total() >= 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_a_hundred_kills(tmp_path, kind):
    parts = ["driver", "worker", "guard", "trainer", "both", "all"]
    victims = random.Random(7).choices(parts, weights=[1, 3, 3, 6, 2, 1], k=100)
    outcome = disturb(kind, tmp_path, 120, victims, seed=3, pause=0.2)
    check(tmp_path, 120, outcome)
    starts = [line.split() for line in (tmp_path / "started").read_text().splitlines()]
    resumed = sum(step != "0" for _, step in starts)
    print(kind, dict(outcome.kills), f"{len(starts)} starts, {resumed} from a checkpoint")
    assert outcome.kills.total() >= 90 and resumed


def test_a_trial_that_fails_continues_and_one_that_is_stopped_keeps_what_it_measured(
    tmp_path, capsys
):
    killed_trainer.check_failure_and_stop(
        killed_trainer.sweep_with_failure_and_stop("local", tmp_path)
    )
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "try 1" in line] == [
        f"trial {id}, try 1: exit status 1; last log lines: no disk"
        for id in [path.parent.name for path in tmp_path.glob("runs/*/step3.json")]
        if (tmp_path / "sweeps/killed.logs" / f"{id}.log").exists()
    ]


def test_an_interrupt_ends_the_trials(tmp_path):
    """The processes of the trials have ended when the driver has."""
    command = [sys.executable, killed_trainer.__file__, "drive", "function", str(tmp_path), "400"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as driver:
        wait_for(lambda: trial_processes(tmp_path))
        driver.send_signal(signal.SIGINT)
        assert driver.wait(PATIENCE) == 1 or driver.returncode == -signal.SIGINT
        assert not trial_processes(tmp_path)
