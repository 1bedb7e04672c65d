"""A trainer that resumes, for tests that kill it; as a command, as a function, and its driver.

python killed_trainer.py train FOLDER
python killed_trainer.py drive command|function FOLDER TRIALS
"""

import fcntl
import json
import os
import sys
import time
from pathlib import Path

from scaletune import trial as scaletune_trial

STEPS, PAUSE = 8, 0.02
TOKENS = 1000  # per step
LRS = [(1 + i) / 1024 for i in range(1000)]


def loss_at(lr, step):
    return 2 + lr + 1 / step


def held_out(lr):
    return [[TOKENS * step, loss_at(lr, step)] for step in range(1, STEPS + 1)]


def hold_alone(folder, id):
    """Locks the trial, in this process and its children; writes to `overlaps` if another has it."""
    (folder / "alone").mkdir(exist_ok=True)
    lock = os.open(folder / "alone" / id, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with (folder / "overlaps").open("a") as file:
            file.write(f"{id} {os.getpid()}\n")
        os._exit(99)


def start_daemon():
    """A process in a session of its own that outlives its parent and inherits the lock."""
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(600)
        os._exit(0)


def train(trial, folder=None):
    folder = folder or Path(trial.run_dir).parent.parent
    hold_alone(folder, trial.id)
    start_daemon()
    step = json.loads(trial.resume_from.read_text())["step"] if trial.resume_from else 0
    with (folder / "started").open("a") as file:
        file.write(f"{trial.id} {step}\n")
    while step < STEPS:
        step += 1
        time.sleep(PAUSE)
        trial.report(tokens=TOKENS * step, loss=loss_at(trial["lr"], step), train_loss=5.0 + step)
        if step % 3 == 0:
            path = trial.run_dir / f"step{step}.json"
            path.with_suffix(".part").write_text(json.dumps({"step": step}))
            path.with_suffix(".part").replace(path)
            trial.report(checkpoint=path)
    return loss_at(trial["lr"], step)


def fail_and_wait(trial):
    """The first trial fails once after a checkpoint; the second one trains until it is stopped."""
    step = json.loads(trial.resume_from.read_text())["step"] if trial.resume_from else 0
    while step < STEPS:
        step += 1
        if step == 5 and trial["lr"] == LRS[0] and not trial.resume_from:
            sys.exit("no disk")
        trial.report(tokens=TOKENS * step, loss=loss_at(trial["lr"], step))
        if step == 3:
            path = trial.run_dir / "step3.json"
            path.write_text(json.dumps({"step": step}))
            trial.report(checkpoint=path)
        while step == 5 and trial["lr"] == LRS[1] and not trial.should_stop:
            time.sleep(0.05)
        if trial.should_stop:
            return


def sweep_with_failure_and_stop(engine, folder):
    """A sweep of three trials with `fail_and_wait` on an engine; its records by their lr."""
    from scaletune import sweeping
    from scaletune.recipe import points, with_settings
    from scaletune.records import read_jsonl
    from scaletune.sweeping.driver import train_all

    def watch(task, tokens, loss):
        return [task.id] if task.recipe.optimizer.lr == LRS[1] and tokens == 5 * TOKENS else []

    base = with_settings(recipe("command", folder, 3, "fail_and_wait"), {"engine.kind": engine})
    tasks = sweeping.tasks("main", points(base))
    train_all(tasks, folder / "sweeps/killed", 2, watch=watch)
    return {trial.lr: trial for trial in read_jsonl(folder / "sweeps/killed.jsonl")}


def check_failure_and_stop(trials):
    """The end of `sweep_with_failure_and_stop`, the same on every engine."""
    first, stopped, last = (trials[lr] for lr in LRS[:3])
    for trial in (first, last):
        assert (trial.status, trial.message) == ("done", "")
        assert trial.loss == loss_at(trial.lr, STEPS)
        assert trial.metrics["held_out"] == held_out(trial.lr)
    assert (stopped.status, stopped.loss) == ("stopped", None)
    assert stopped.message == "stopped at 5000 tokens by the search"
    assert stopped.metrics["held_out"] == held_out(stopped.lr)[:5]


def recipe(kind, folder, trials, mode="train"):
    from scaletune.recipe import validate_recipe

    command = [sys.executable, __file__, mode, str(folder), "{lr}"]
    trainer = {"command": command} if kind == "command" else {"function": "killed_trainer:train"}
    values = {
        "model": {"width": 32},
        "trainer": trainer,
        "budget": {"tokens": float(STEPS * TOKENS), "batch_tokens": 100.0},
        "engine": {"retries": 1000, "workers": 2, "runs": str(folder / "runs")},
        "axes": {"lr": LRS[:trials]},
    }
    return validate_recipe(values, "killed")


def drive(kind, folder, trials):
    from scaletune import sweeping
    from scaletune.recipe import points
    from scaletune.sweeping.driver import train_all

    fork = (lambda trial: train(trial, folder)) if kind == "function" else None
    tasks = sweeping.tasks("main", points(recipe(kind, folder, trials)))
    train_all(tasks, folder / "sweeps/killed", 2, train=fork)


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(scaletune_trial.current(), Path(sys.argv[2]))
    elif sys.argv[1] == "fail_and_wait":
        fail_and_wait(scaletune_trial.current())
    else:
        drive(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
