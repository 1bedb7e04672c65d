"""A trial of the user's own trainer ends with a record, whatever the trainer does."""

import math
import os
import random
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import hostile_trainer
import numpy as np
import pytest
import torch

from scaletune import sweeping
from scaletune.errors import UserError
from scaletune.recipe import validate_recipe
from scaletune.recipe.trainer import Trainer
from scaletune.records import read_jsonl
from scaletune.sweeping.plain_text import last_lines
from scaletune.sweeping.trainers import guard, trial_files
from scaletune.sweeping.trainers.descendants import marked
from scaletune.sweeping.trainers.output_lines import OutputLines, parse_number
from scaletune.sweeping.trainers.reports import Reports
from scaletune.sweeping.trainers.supervisor import run_own_trial

SCRIPT = hostile_trainer.__file__
ODD = "a 'b' \"c\" $HOME {{x}} \n" + "y" * 20000


def own_recipe(home, settings=(), **trainer):
    """A recipe whose trainer is a command, by default the hostile trainer."""
    command = [sys.executable, "-IS", SCRIPT, "{my.way}", ODD]
    trainer = {"command": command, "grace": 0.3} | trainer
    engine = {"retries": 0, "patience": 4.0, "workers": 2, "runs": str(home / "runs")}
    values = {
        "model": {"width": 32},
        "trainer": trainer,
        "budget": {"tokens": 1e6, "batch_tokens": 1e3},
        "engine": engine,
        "my": {"way": "ok"},
        **dict(settings),
    }
    return validate_recipe(values, "own")


GUESS = r"its tokens went back from 1e\+06 to 500000"
# way -> (status, loss, what the message must match from beginning to end)
ENDS = {
    "ok": ("done", 3.0, ""),
    "prints_100_mb": ("done", 3.0, ""),
    "prints_binary": ("failed", None, r"exit status 3; last log lines: \(binary\)"),
    "reports_nothing": ("failed", None, r"exit status 0, but it reported no loss: call .*"),
    "reports_nan": ("diverged", None, r"loss nan at 20 tokens; last good loss 5"),
    "reports_nan_as_c_does": ("diverged", None, r"loss nan at 20 tokens"),
    "reports_inf": ("diverged", None, r"loss inf at 20 tokens"),
    "reports_1e400": ("diverged", None, r"loss inf at 20 tokens"),
    "reports_a_string": (
        *("failed", None),
        r"it reported no loss: `loss` must be a number, but it reported 'three'",
    ),
    "reports_a_list": (
        *("failed", None),
        r"it reported no loss: `loss` must be a number, but it reported \[3\.0, 3\.1\]",
    ),
    "reports_twice_the_same": ("done", 3.0, ""),
    "reports_twice": (
        *("done", 3.5),
        r"it reported two losses at 1e\+06 tokens, 3 and 3\.5: the last one counts",
    ),
    "reports_tokens_backwards": ("done", 3.0, GUESS),
    "reports_too_many_tokens": (
        *("failed", None),
        r"its last loss is at 2e\+06 of `budget.tokens` = 1e\+06 tokens: the trainer must .*",
    ),
    "reports_steps_as_tokens": (
        *("failed", None),
        r"its last loss is at 1000 of .* tokens: `tokens` must count tokens, not steps",
    ),
    "reports_steps": ("done", 3.0, ""),
    "reports_negative_counts": (
        *("done", 3.0),
        r"`n_params` must be a positive number, but it reported -1",
    ),
    "hangs_after_its_result": (
        *("done", 3.0),
        r"after its result: it reported and printed nothing for 4 s \(`engine\.patience`\)",
    ),
    "hangs": (
        *("failed", None),
        r"it reported and printed nothing for 4 s \(`engine\.patience`\)",
    ),
    "leaves_children": ("done", 3.0, r"3 processes that it left running: killed"),
    "becomes_a_daemon": ("done", 3.0, r"1 process that it left running: killed"),
    "has_a_slow_helper": ("done", 3.0, ""),
    "ignores_sigterm": ("diverged", None, r"loss nan at 10 tokens"),
    "ends_before_its_budget": (
        *("failed", None),
        r"its last loss is at 250000 of .* tokens: report the loss at the end .* too",
    ),
    "fails_after_its_result": ("done", 3.0, r"after its result: exit status 1"),
    "fails": (
        *("failed", None),
        r"exit status 1; last log lines: .* / RuntimeError: no data with token=\*\*\*",
    ),
    "segfaults": ("failed", None, r"killed by SIGSEGV"),
    "is_killed": ("failed", None, r"killed by SIGKILL"),
    "kills_its_guard": ("failed", None, r"killed by SIGKILL"),
    "exits_at_once": ("failed", None, r"exit status 7"),
    "changes_directory": ("done", 3.0, ""),
    "deletes_its_folder": ("done", 3.0, ""),
    "deletes_its_folder_and_diverges": ("diverged", None, r"loss nan at 20 tokens"),
    "writes_garbage": (
        *("failed", None),
        r"it reported no loss: 4 lines of its results are no JSON \(the first: .*\)",
    ),
    "writes_garbage_around_its_result": (
        *("done", 3.0),
        r"1 line of its results is no JSON \('hello'\)",
    ),
    "writes_no_line_break": ("done", 3.0, ""),
    "writes_half_a_line": (
        *("failed", None),
        r"""it reported no loss: 1 line of its results is no JSON \('.*"lo'\)""",
    ),
    "writes_26_mb": ("done", 3.0, r"its tokens went back .*|1 line of .*"),
    "writes_its_results_anew": ("done", 3.0, ""),
    "closes_its_output": ("done", 3.0, ""),
    "asks": ("failed", None, r"exit status 1; .* / EOFError: EOF when reading a line"),
    "needs_too_much_memory": ("failed", None, r"out of memory; .* / MemoryError"),
    "prints_out_of_memory": (
        "failed",
        None,
        r"out of memory; last log lines: RuntimeError: CUDA.*",
    ),
    "gets_odd_arguments": ("done", 3.0, ""),
}


def trial_processes(folder):
    """The processes on this machine that belong to trials of a folder."""
    mark = f"SCALETUNE_TRIAL={folder}".encode()
    pids = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environ.read_bytes():
                pids.append(int(environ.parent.name))
        except OSError:
            pass
    return pids


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """way -> trial, its folder and what the sweep printed, of one sweep of all hostile trainers."""
    folder = tmp_path_factory.mktemp("hostile")
    recipe = own_recipe(
        folder,
        {"axes": {"my.way": list(ENDS)}},
        env={"ODD": "'\"; touch hacked", "PYTHONHASHSEED": "0"},
    )
    began = time.monotonic()
    sweeping.sweep(recipe, out=folder)
    trials = {t.point["my"]["way"]: t for t in read_jsonl(folder / "sweeps/own.jsonl")}
    return trials, folder, time.monotonic() - began


@pytest.mark.parametrize("way", ENDS)
def test_a_hostile_trainer_ends_with_one_sentence(hostile, way):
    status, loss, message = ENDS[way]
    trial = hostile[0][way]
    assert (trial.status, trial.loss) == (status, loss), trial
    assert re.fullmatch(message, trial.message), trial.message
    assert trial.message.isprintable() and "hunter2" not in trial.message


def test_hostile_trainers_leave_nothing_behind(hostile):
    trials, folder, seconds = hostile
    assert trials.keys() == ENDS.keys() and not trial_processes(folder)
    logs = [path.stat().st_size for path in folder.rglob("output.log")]
    assert max(logs) < 9 << 20
    assert seconds < 60


def run(home, train=None, id="trial", settings=(), **trainer):
    """The message about a trial that this process trains."""
    return run_own_trial(own_recipe(home, settings, **trainer), id, lambda _: None, train=train)


# --- functions ------------------------------------------------------------------------------------


def raises(trial):
    raise ValueError("bad\nvalue")


def exits(code):
    def function(trial):
        trial.report(tokens=1e6, loss=2.0) if code == 0 else None
        sys.exit(code)

    return function


def raises_after_its_result(trial):
    trial.report(tokens=1e6, loss=2.0)
    raise OSError("cannot upload")


def becomes_a_daemon(trial):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    return 2.0


def kills_its_guard(trial):
    """Its fork has no mark in its environment, but the trial's file is open in it."""
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
    time.sleep(0.2)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def returns(value):
    return lambda trial: value


LOSSES = [2.0, np.float32(2), np.float64(2), np.array(2.0), torch.tensor(2.0, requires_grad=True)]
LOSS = "return a loss or a dict with 'loss', or report a loss, but got"
FUNCTIONS = [
    *((returns(loss), "done", "") for loss in LOSSES),
    (returns({"loss": torch.tensor([2.0]), "note": "x"}), "done", ""),
    (returns(2), "done", ""),
    (returns(None), "failed", f"its function must {LOSS} None"),
    (returns({"x": 1}), "failed", f"its function must {LOSS} {{'x': 1}}"),
    (
        returns("two"),
        "failed",
        "it reported no loss: `loss` must be a number, but it reported 't.*",
    ),
    (lambda t: t.report(loss="2"), "lost", "TypeError: `loss` of a report must be .* got '2' .*"),
    (returns([1, 2]), "lost", "TypeError: `loss` of a report must be a number, but got .*"),
    (returns(math.nan), "diverged", "loss nan"),
    (raises, "lost", r"ValueError: bad \(test_own_trainers\.py:\d+\)"),
    (exits(0), "done", ""),
    (exits(3), "lost", r"SystemExit: 3 .*"),
    (exits("no data"), "lost", r"SystemExit: no data .*"),
    (raises_after_its_result, "done", "after its result: OSError: cannot upload .*"),
    (becomes_a_daemon, "done", "1 process that it left running: killed"),
    (kills_its_guard, "lost", "killed by SIGKILL"),
    (lambda trial: os._exit(4), "lost", "exit status 4"),
    (lambda trial: os.chdir("/") or 2.0, "done", ""),
]


@pytest.mark.parametrize(("function", "status", "message"), FUNCTIONS)
def test_a_function_ends_with_one_sentence(tmp_path, function, status, message):
    end = run(tmp_path, function)
    trial = end.get("trial") or {"status": "lost", "message": end["lost"], "loss": None}
    assert trial["status"] == status, trial
    assert re.fullmatch(message.replace("{", r"\{"), trial["message"]), trial["message"]
    assert trial["loss"] == (2.0 if status == "done" else None)
    assert not marked(str(tmp_path / "runs/trial/trial.json"))


# --- programs that cannot start -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (None, 0, "must start with a program that exists, but got '{}'$"),
        ("#!/bin/sh\n", 0o644, "but got '{}': make it executable"),
    ],
)
def test_a_program_that_is_absent_is_refused(tmp_path, content, mode, message):
    path = tmp_path / "train"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    with pytest.raises(UserError, match=message.format(path)):
        run(tmp_path, command=[str(path)])


@pytest.mark.parametrize(
    ("content", "argument", "message"),
    [
        ("#!/no/such/python\n", "", "No such file or directory (the interpreter in its first"),
        ("print(1)\n", "", "Exec format error (its first line must be #! and an interpreter)"),
        ("#!/bin/sh\n", "x" * 3_000_000, "Argument list too long (give long values in a file)"),
    ],
)
def test_a_program_that_cannot_start_is_one_sentence(tmp_path, content, argument, message):
    path = tmp_path / "train"
    path.write_text(content)
    path.chmod(0o755)
    lost = run(tmp_path, command=[str(path), argument])
    assert lost["lost"].startswith(f"`{path}` cannot start: {message}") and lost["explained"]


# --- checkpoints ----------------------------------------------------------------------------------


def resume(trial):
    """Reports a checkpoint after each half; fails after the first half of the first try."""
    begun = 0 if trial.resume_from is None else int(trial.resume_from.read_text())
    for half in range(begun, 2):
        trial.report(tokens=(half + 1) * 5e5, loss=4.0 - half, train_loss=4.5 - half)
        path = trial.run_dir / f"half{half + 1}"
        path.write_text(str(half + 1))
        os.chdir("/")
        trial.report(checkpoint=path)
        if begun == half == 0:
            trial.report(tokens=6e5, loss=3.9)  # after the checkpoint: measured again, or not
            raise RuntimeError("lost")
    return {"begun": begun}


def test_a_try_continues_from_the_reported_checkpoint(tmp_path):
    assert "lost" in run(tmp_path, resume)
    end = run(tmp_path, resume)
    assert end["trial"]["metrics"]["held_out"] == [[5e5, 4.0], [1e6, 3.0]]
    assert end["trial"]["metrics"]["reported"] == {"begun": 1} and end["curve"] == [4.5, 3.5]
    assert end["trial"]["message"] == ""


def test_a_checkpoint_is_found_where_its_folder_was_moved(tmp_path):
    run(tmp_path / "before", resume)
    (tmp_path / "before").rename(tmp_path / "after")
    end = run(tmp_path / "after", resume)
    assert end["trial"]["metrics"]["reported"] == {"begun": 1}


def test_without_its_checkpoint_a_trial_starts_again(tmp_path):
    run(tmp_path, resume)
    (tmp_path / "runs/trial/half1").unlink()
    assert "lost" in run(tmp_path, resume)
    assert len((tmp_path / "runs/trial/results.jsonl").read_text().splitlines()) == 4


def test_a_checkpoint_may_be_relative_to_the_working_folder(tmp_path):
    (tmp_path / "work").mkdir()
    script = (
        'test -e "$1" && echo \'{"loss": 2}\' >> "$SCALETUNE_RESULTS" && exit; echo 1 > last.pt;'
        ' echo \'{"checkpoint": "last.pt"}\' >> "$SCALETUNE_RESULTS"; exit 1'
    )
    script = script.replace("{", "{{").replace("}", "}}")
    command = ["sh", "-c", script, "sh", "{resume_from}"]
    folder = str(tmp_path / "work")
    assert run(tmp_path, command=command, folder=folder)["lost"] == "exit status 1"
    assert run(tmp_path, command=command, folder=folder)["trial"]["loss"] == 2


def test_two_processes_never_train_a_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(trial_files, "WAIT", 0.1)
    files = trial_files.TrialFiles(tmp_path / "runs/trial")
    files.folder.mkdir(parents=True)
    with trial_files.hold_folder(files) as held:
        assert held
        lost = run(tmp_path, returns(2.0))
    assert lost["lost"] == f"another process trains it: `{files.lock}` is locked"
    assert run(tmp_path, returns(2.0))["trial"]["loss"] == 2.0


# --- lines of standard output ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("3.21,", 3.21), ("tensor(3.21,", 3.21), ("3.21)", 3.21), ("1e-3", 1e-3), ("-0.5", -0.5)),
        *(("1,234.5", 1234.5), ("=3", 3), (".5", 0.5), ("3.", 3), ("tensor(3.2, device='x')", 3.2)),
        *(("3,21", "3,21"), ("3,210", "3,210"), ("n/a", "n/a"), ("1.2.3", "1.2.3")),
        *(("3.21M", "3.21M"), ("1 2", "1 2"), ("", "")),
    ],
)
def test_a_loss_is_read_as_programs_print_it_or_not_at_all(text, number):
    assert parse_number("loss", text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234,567", 1234567), ("12_000", 12000), ("1.5M", 1.5e6), ("2B", 2e9), ("12,34", "12,34")],
)
def test_tokens_may_be_grouped_or_abbreviated(text, number):
    assert parse_number("tokens", text) == number


@pytest.mark.parametrize("text", ["nan", "-nan,", "NaN", "nan(ind)"])
def test_nan_is_a_number(text):
    assert math.isnan(parse_number("loss", text))


def test_progress_bars_and_colours(tmp_path):
    lines = OutputLines(r"tokens (?P<tokens>\S+).* val loss: (?P<loss>\S+)")
    text = (
        "\x1b[32mtokens\x1b[0m 10 | val loss: \x1b[1m3.50\x1b[0m,\r\x1b[Ktokens 1,000 |###| val"
        " loss: 3.21, 5 it/s\r\n\xff garbage\ntokens 2k, val loss: nan"
    ).encode("latin-1")
    rows = [row for byte in text for row in lines.feed(bytes([byte]))]
    assert rows == [{"tokens": 10, "loss": 3.5}, {"tokens": 1000, "loss": 3.21}]
    (last,) = lines.rest()
    assert last["tokens"] == 2000 and math.isnan(last["loss"])


def test_a_trainer_that_only_prints(tmp_path):
    script = r"for i in 1 2 3 4; do printf 'step %s/4 loss %s\r' $i $((5 - i)).5; done"
    end = run(
        tmp_path,
        command=["sh", "-c", script],
        pattern=r"step (?P<step>\d+)/\d+ loss (?P<loss>\S+)",
        settings={"budget": {"tokens": 4e3, "batch_tokens": 1e3}},
    )
    assert end["trial"]["metrics"]["held_out"] == [[1e3, 4.5], [2e3, 3.5], [3e3, 2.5], [4e3, 1.5]]


def test_tokens_that_are_no_number_are_said(tmp_path):
    pattern = r"loss (?P<loss>\S+) at (?P<tokens>.+)"
    end = run(tmp_path, command=["echo", "loss 3.5 at 90 % of 1M"], pattern=pattern)["trial"]
    assert end["loss"] == 3.5
    assert end["message"] == "`tokens` must be a positive number, but it reported '90 % of 1M'"


def test_steps_may_be_counted_from_0_but_a_crash_in_the_last_step_is_no_end(tmp_path):
    script = 'i=0; while [ $i -lt 10 ]; do echo "step $i loss 3"; i=$((i+1)); done; exit '
    settings = {"budget": {"tokens": 1e4, "batch_tokens": 1e3}}
    pattern = r"step (?P<step>\d+) loss (?P<loss>\S+)"
    ends = [
        run(tmp_path, command=["sh", "-c", f"{script}{n}"], pattern=pattern, settings=settings)
        for n in (0, 1)
    ]
    assert ends[0]["trial"]["loss"] == 3 and ends[1]["lost"] == "exit status 1"


# --- logs -----------------------------------------------------------------------------------------

LOGS = {  # log of tests/fixtures -> (loss, tokens) of its run
    "trainer_state.json": (2.6802444458007812, 640),
    "events/simple": (3.6, 4 * 160),
    "run-lr0.001.wandb": (4.46, 163840),
    "lightning/proxies/version_0": (2.057950735092163, 163840),
    "levanter/lr0.001": (3.11, 51200),
}


@pytest.mark.parametrize("log", LOGS)
def test_a_log_of_another_tool_is_the_result(tmp_path, log):
    loss, tokens = LOGS[log]
    source = Path(__file__).parent / "fixtures" / log
    end = run(
        tmp_path,
        command=["cp", "-r", str(source), "{run_dir}"],
        log="{run_dir}",
        settings={"budget": {"tokens": float(tokens), "batch_tokens": 160.0}},
    )
    assert end["trial"]["status"] == "done", end["trial"]["message"]
    assert end["trial"]["loss"] == pytest.approx(loss) and end["trial"]["message"] == ""


@pytest.mark.parametrize(
    ("column", "rows", "status", "message"),
    [
        ("val_loss", 10, "done", ""),
        ("val_loss", 5, "failed", "its last loss is at 500000 of .*"),
        (
            *("train_loss", 10, "done"),
            "its log has no held-out loss, so its training loss `train_loss` counts",
        ),
        ("", 0, "failed", "exit status 0, but `trainer.log`: the records .*must exist, .*"),
    ],
)
def test_a_log_without_a_result_is_one_sentence(tmp_path, column, rows, status, message):
    (tmp_path / "work").mkdir()
    if rows:
        lines = [f"{i},{i}e5,{5 - i / 10}\n" for i in range(1, rows + 1)]
        (tmp_path / "log.csv").write_text("".join([f"step,tokens,{column}\n", *lines]))
    command = ["cp", str(tmp_path / "log.csv"), "log.csv"] if rows else ["true"]
    end = run(tmp_path, command=command, log="log.csv", folder=str(tmp_path / "work"))
    assert end["trial"]["status"] == status
    assert re.fullmatch(message, end["trial"]["message"]), end["trial"]["message"]


# --- bounds and other systems ---------------------------------------------------------------------


def test_a_flood_of_reports_stays_small(tmp_path):
    reports, rng = Reports(), random.Random(0)
    for i in range(12_000):
        reports.add({"tokens": i, "loss": 3.0, f"mine{i}": rng.random(), "train_loss": 1.0})
    reports.add({"loss": 2.5})
    assert len(reports.held_out.points) <= 8000 and len(reports.own) == 100
    assert reports.held_out.points[-1] == [11999, 3.0] and reports.loss == 2.5


def test_a_log_becomes_a_few_printable_words(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter2secret")
    log = "a\n\x1b[31m1%\r 50%\r100%\x1b[0m\n\n" + "x" * 5000 + "\nhunter2secret\x07\n\x00\x01\x02"
    assert last_lines(log) == f"{'x' * 197}... / ***\ufffd / (binary)"
    assert last_lines("") == "none" and last_lines("1%\r 50%\r100%\r\n") == "100%"


def test_without_proc_and_prctl_the_process_group_is_killed(tmp_path, monkeypatch):
    """As on macOS."""
    monkeypatch.setattr(guard, "_PRCTL", None)
    monkeypatch.setattr("scaletune.sweeping.engines.parent_death._PRCTL", None)
    monkeypatch.setattr("scaletune.sweeping.trainers.descendants.PROC", tmp_path / "absent")
    monkeypatch.delattr(os, "pidfd_open")
    pid = tmp_path / "pid"

    def leaves_a_child(trial):
        if os.fork() == 0:
            time.sleep(600)
        pid.write_text(str(os.getpid()))
        return 2.0

    end = run(tmp_path, leaves_a_child)
    assert end["trial"]["loss"] == 2.0 and end["trial"]["message"] == ""
    with pytest.raises(ProcessLookupError):
        while True:
            os.killpg(int(pid.read_text()), 0)
            time.sleep(0.01)
    assert run(tmp_path, returns(2.0))["trial"]["loss"] == 2.0  # the trial's folder exists now


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    times = iter(range(0, -(10**9), -(10**6)))
    monkeypatch.setattr(time, "time", lambda: next(times))
    end = run(tmp_path, lambda trial: time.sleep(0.3) or 2.0)
    assert end["trial"]["loss"] == 2.0 and 0.3 <= end["trial"]["seconds"] < 30


def test_a_population_needs_our_own_loop(tmp_path):
    content = {
        "model": {"width": 32},
        "trainer": {"command": ["true"], "version": 2},
        "axes": {"lr": [0.01, 0.02]},
        "search": {"kind": "pbt"},
        "schedule": {"kind": "constant"},
    }
    recipe = validate_recipe(content, "population")
    assert recipe.trainer.version == "2"
    with pytest.raises(UserError, match="'pbt' copies weights from trial to trial, which only"):
        sweeping.sweep(recipe, out=tmp_path)


def bound(trial, extra, way=None):
    return extra


def test_partial_functions_with_other_arguments_train_other_trials(tmp_path, capsys):
    recipe = own_recipe(tmp_path).model_copy(update={"trainer": Trainer()})
    functions = [partial(bound, extra=2.0), partial(bound, extra=3.0, way=tmp_path)]
    rows = [sweeping.sweep(recipe, out=tmp_path, train=function) for function in functions]
    assert [row.loss.tolist() for row in rows] == [[2.0], [3.0]]
    assert rows[1]["trainer.function"][0].endswith(":bound<extra=3.0, way=PosixPath>")


def test_a_function_whose_trials_are_recorded_is_said(tmp_path, capsys):
    recipe = own_recipe(tmp_path).model_copy(update={"trainer": Trainer()})
    rows = [sweeping.sweep(recipe, out=tmp_path, train=returns(x)) for x in (2.0, 3.0)]
    assert [row.loss.tolist() for row in rows] == [[2.0], [2.0]]
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"nothing is trained: the trial of `.*<lambda>` is recorded.*version`", sentence
    )
