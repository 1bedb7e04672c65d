"""Progress table and lines, `scaletune status` and `export`, and a fit of several records."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from test_chaos import chaos, under_way, worker  # noqa: F401

import scaletune
from scaletune.cli import main
from scaletune.records import Store, read_jsonl, read_store, read_trials
from scaletune.sweeping import progress
from scaletune.sweeping.status import format_clock, format_line, format_table

PYTHON = sys.executable  # before a fixture replaces it


@pytest.fixture
def store(tmp_path):
    """(store, tasks, trials) of five trials: two done, one diverged, two not trained yet."""
    tasks = chaos.planted_tasks(tmp_path, 5)
    trials = [replace(chaos.planted_trial(task), seconds=10.0 + i) for i, task in enumerate(tasks)]
    trials[1] = replace(trials[1], status="diverged", loss=None, train_loss=None)
    opened = Store(tmp_path / "sweeps/some-1.5b")
    for trial in trials[:3]:
        opened.put(trial)
    yield opened, tasks, trials
    opened.close()


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that the test sets."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_table_counts_recorded_and_running_trials(store, clock):
    database, tasks, trials = store
    for task, cost in zip(tasks, (0, 0, 0, 30.0, 10.0), strict=True):
        task.cost = cost
    shown = progress.SweepProgress(database, tasks[3:], trials[:3])
    shown.update(tasks[3], 0.5)
    shown.update(tasks[4], 0.0)
    clock[0] += 60
    shown.finish(tasks[4], trials[4])
    now = shown.snapshot()
    best = min((trials[i] for i in (0, 2, 4)), key=lambda trial: trial.loss)
    assert (now["wanted"], now["done"], now["diverged"], now["failed"], now["seconds"]) == (
        5,
        3,
        1,
        0,
        10 + 11 + 12 + 14,
    )
    assert now["best"]["id"] == best.id and now["best"]["loss"] == best.loss
    assert [(row["id"], row["share"], row["seconds"], row["try"]) for row in now["running"]] == [
        (tasks[3].id, 0.5, 60.0, 1)
    ]
    # 25 of 40 took 60 s.
    assert now["share"] == (10 + 0.5 * 30) / 40
    assert now["elapsed"] == 60
    assert now["left"] == 36
    shown.requeue(tasks[3])
    assert shown.snapshot()["running"] == []
    assert format_table(now) == [
        "some-1.5b  trials 4/5  done 3  diverged 1  failed 0  running 1  training time 47 s",
        " 62% ###############......... elapsed 1:00, ETA 0:36",
        f"lowest loss {best.loss:.4f} at width 32, lr 0.005",
        "   width depth  tokens   batch        lr seed  done  elapsed  try",
        "      32     1   2,048     256     0.005    3   50%     1:00  1",
    ]
    assert format_line(now) == (
        "trials 4/5  62%, elapsed 1:00, ETA 0:36, training time 47 s, 1 running, 1 diverged;"
        f" lowest loss {best.loss:.4f} at width 32, lr 0.005"
    )


def test_a_terminal_gets_a_redrawn_table_and_other_outputs_a_line(
    store, monkeypatch, capsys, clock
):
    database, tasks, _ = store
    for terminal in (True, False):
        monkeypatch.setattr(
            progress.sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False
        )
        shown = progress.SweepProgress(database, tasks[3:], [])
        for _ in range(2):
            clock[0] += 1
            shown.update(tasks[3], 0.5)
            shown.refresh()
        output = capsys.readouterr().err
        assert output.count("trials 0/2") == (2 if terminal else 0)
        assert output.count("\x1b[4F\x1b[J") == (1 if terminal else 0)
        clock[0] += progress.LINE
        shown.refresh()
        assert capsys.readouterr().err.count("\n") == (4 if terminal else 1)


def screen(text):
    """The rows that a terminal shows; it handles "n lines up" and "clear from here"."""
    rows, at = [""], 0
    for part in re.findall(r"\x1b\[\d*[FJ]|\r?\n|[^\x1b\r\n]+", text):
        if part.startswith("\x1b"):
            at, rows = (
                (max(0, at - int(part[2:-1])), rows)
                if part.endswith("F")
                else (at, [*rows[:at], ""])
            )
        elif part.endswith("\n"):
            at += 1
            rows += [""] * (at == len(rows))
        else:
            rows[at] += part
    return rows


def test_a_real_terminal_shows_one_table_and_no_row_wraps(worker, tmp_path):  # noqa: F811
    """Standard error is a terminal narrower than a table row; standard output is no terminal."""
    tasks, wide = worker(12, seconds=0.3), 60
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, wide, 0, 0))
    command = [PYTHON, chaos.__file__, "--drive", str(tmp_path), "--trials", "12", "--workers", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs) as driver:
        os.close(theirs)
        text = b""
        with suppress(OSError):  # Linux raises it when the other end is closed
            while part := os.read(ours, 1 << 16):
                text += part
    os.close(ours)
    frames = re.split(r"(?=\x1b\[\d+F)", text.decode())
    best = min(chaos.planted_trial(task).loss for task in tasks)
    assert driver.returncode == 0
    assert len(frames) > 5
    assert any("running 2" in frame for frame in frames)
    assert all(
        len(row) < wide
        for row in text.decode().replace("\x1b[J", "\n").splitlines()
        if not row.startswith("\x1b")
    )
    *lines, end = screen(text.decode())
    loss = f"lowest loss {best:.4f} at"
    assert end == ""
    assert [line[: len(loss)] for line in lines] == [
        "chaos  trials 12/12  done 12"[: len(loss)],
        "100% ########################"[: len(loss)],
        loss,
    ]
    assert lines[0].startswith("chaos  trials 12/12  done 12  diverged ")


def test_clocks_say_hours_when_there_are_any():
    assert [format_clock(seconds) for seconds in (None, 7.9, 187, 3727)] == [
        "?",
        "0:07",
        "3:07",
        "1:02:07",
    ]


def test_status_of_a_sweep_without_a_driver(store, tmp_path, capsys):
    database, _, trials = store
    before = database.database.read_bytes()
    assert main(["status", "some-1.5b", "--out", str(tmp_path), "--json"]) == 0
    now = json.loads(capsys.readouterr().out)
    assert now["driver"] is None
    assert (now["recorded"], now["done"], now["diverged"], now["failed"]) == (3, 2, 1, 0)
    assert now["seconds"] == 33 and now["flops"] == sum(trial.flops for trial in trials[:3])
    assert main(["status", str(database.database)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        "some-1.5b  trials 3/3  done 2  diverged 1  failed 0  running 0  training time 33 s\n"
        "lowest loss 2."
    )
    assert shown.endswith("driver: none; `scaletune sweep` or `scaletune run` continues\n")
    assert database.database.read_bytes() == before


def test_status_and_export_of_a_sweep_that_runs(under_way, tmp_path, capsys):  # noqa: F811
    assert main(["status", "chaos", "--out", str(tmp_path)]) == 0
    assert f"driver: {under_way.pid} on " in capsys.readouterr().out
    assert main(["export", "chaos", "--out", str(tmp_path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["path"] == str(tmp_path / "sweeps/chaos.jsonl")
    assert 1 <= len(read_jsonl(tmp_path / "sweeps/chaos.jsonl")) <= answer["n_trials"] < 40


def test_export_writes_what_is_on_record(store, tmp_path, capsys):
    database, _, trials = store
    assert main(["export", "some-1.5b", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"3 trials: {database.record}\n"
    assert {trial.id: trial for trial in read_jsonl(database.record)} == {
        trial.id: trial for trial in trials[:3]
    }


@pytest.mark.parametrize("command", ["status", "export"])
def test_a_missing_sweep_is_one_sentence_and_is_not_created(command, tmp_path, capsys):
    assert main([command, "none", "--out", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"scaletune: the database of the sweep must exist, but got `{tmp_path}/sweeps/none.db`\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_fit_of_the_halves_of_a_record_is_that_of_the_whole(tmp_path, capsys):
    """The committed quickstart, split as if two machines had recorded it, with an overlap."""
    whole = Path(__file__).parent.parent / "sweeps/2026-11-quickstart.jsonl"
    lines = whole.read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:80]))
    store = Store(tmp_path / "b.db")
    (tmp_path / "rest.jsonl").write_text("".join(lines[60:]))
    for trial in read_jsonl(tmp_path / "rest.jsonl"):
        store.put(trial)
    store.close()
    assert len(read_trials([tmp_path / "a.jsonl", tmp_path / "b.db"])) == len(lines)
    assert len(lines) == len(read_store(tmp_path / "b.db")[0]) + 60
    assert main(["fit", str(tmp_path / "a.jsonl"), str(tmp_path / "b.db"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["params"] == scaletune.fit(whole).params
