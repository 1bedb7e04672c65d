"""Kills a sweep's driver and workers at random moments (SIGKILL) and checks what is recorded.

Without `--steps` a worker is a script that returns a prescribed loss after 40 ms, so the test is of
the driver, the pool and the database. With `--steps` workers train that many steps and resume from
checkpoints. `--scale` opens 10,000 recorded trials and runs trivial ones. Tables:
benchmarks/README.md.

    python benchmarks/chaos.py --kills 100 [--steps 400 --trials 300]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from scaletune import sweeping
from scaletune.recipe import Recipe, points, validate_recipe, with_settings
from scaletune.records import Store, Trial, read_jsonl
from scaletune.sweeping.engines import local
from scaletune.transferring.formats.recipe import toml

# Fields of a trial that must not depend on where and when it was trained.
REPRODUCIBLE = (
    "id",
    "sweep",
    "status",
    "loss",
    "train_loss",
    "message",
    "flops",
    "point",
)
WORKER = """#!{python} -IS
import json, os, sys, time
answers = json.load(open("{folder}/answers.json"))
started = os.open("{folder}/started", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for line in (json.dumps(order) for orders in sys.stdin for order in json.loads(orders)):
    recipe = json.loads(line)["recipe"]
    trial = answers[str(recipe["seed"])]
    os.write(started, (trial["id"] + chr(10)).encode())
    for share in (0.25, 0.5, 0.75):
        time.sleep({seconds} / 4)
        print(json.dumps({{"progress": share}}), flush=True)
    time.sleep({seconds} / 4)
    print(json.dumps({{"trial": trial, "curve": [1.0, 0.5]}}), flush=True)
"""
HEADER = (
    "| worker | trials | driver kills | worker kills | restarts | lost | twice | same record "
    "| orphans | files left | seconds |\n" + "|---" * 11 + "|"
)


def base_recipe(folder: Path) -> Recipe:
    """Eight steps of a model of width 32 on a generated text."""
    text = folder / "words.txt"
    if not text.exists():
        words = random.Random(0).choices([f"word{i}" for i in range(200)], k=8000)
        text.write_text(" ".join(words))
    values = {
        "model": {"width": 32, "depth": 1, "head_dim": 16},
        "parametrization": {"base_width": 32},
        "optimizer": {"lr": 5e-3},
        "data": {"source": str(text), "seq_len": 32},
        "budget": {"tokens": 2048, "batch_tokens": 256, "eval_tokens": 512},
        "engine": {"retries": 1000},
    }
    return validate_recipe(values, "chaos")


def planted_tasks(folder: Path, trials: int) -> list[sweeping.Task]:
    """Tasks for the script that returns prescribed losses: one per seed, never stacked."""
    recipe = base_recipe(folder)
    seeds = [{"seed": seed, "engine.stack": 1} for seed in range(trials)]
    return sweeping.tasks("main", [with_settings(recipe, each) for each in seeds])


def training_tasks(folder: Path, trials: int, steps: int = 400) -> list[sweeping.Task]:
    """Tasks of about a second with checkpoints.

    Half of them train in stacks of two. Every fourth diverges.
    """
    shared: dict[str, Any] = {
        "budget.tokens": 256 * steps,
        "data.epochs": 10,
        "engine.checkpoint_every": max(1, steps // 8),
    }
    recipe, lrs = with_settings(base_recipe(folder), shared), (2e-3, 4e-3, 8e-3, 1e3)
    settings = [
        {"seed": i // 4, "lr": lrs[i % 4], "engine.stack": 1 + (i // 4) % 2} for i in range(trials)
    ]
    return sweeping.tasks("main", [with_settings(recipe, each) for each in settings])


def planted_trial(task: sweeping.Task) -> Trial:
    """A trial with status "done" whose loss is a random number determined by its seed."""
    loss = 2 + random.Random(task.recipe.seed).random()
    return replace(
        sweeping.failed_trial(task, ""), status="done", loss=loss, train_loss=loss, seconds=0.04
    )


def install_worker(folder: Path, trials: int, seconds: float) -> None:
    """Writes the script that replaces a worker into `folder`, with the trials that it returns."""
    answers = {
        task.recipe.seed: asdict(planted_trial(task)) for task in planted_tasks(folder, trials)
    }
    (folder / "answers.json").write_text(json.dumps(answers))
    (folder / "started").write_text("")
    worker = folder / "worker"
    worker.write_text(WORKER.format(python=sys.executable, folder=folder, seconds=seconds))
    worker.chmod(worker.stat().st_mode | stat.S_IXUSR)


def drive(folder: Path, trials: int, workers: int, steps: int) -> None:
    """Runs a driver: `steps` training steps per trial, or prescribed losses if `steps` is 0."""
    if steps:
        _log_sent_tasks(folder / "started")
        tasks = training_tasks(folder, trials, steps)
    else:
        sys.executable = str(folder / "worker")
        tasks = planted_tasks(folder, trials)
    sweeping.train_all(tasks, folder / "sweeps/chaos", workers)


def _log_sent_tasks(path: Path) -> None:
    """Makes this process append the id of each trial that it sends to a worker to `path`."""
    send = local.Worker.send

    def log_and_send(worker: local.Worker, tasks: Sequence[sweeping.Task]) -> None:
        with path.open("a") as file:
            file.write("".join(task.id + "\n" for task in tasks))
        send(worker, tasks)

    local.Worker.send = log_and_send  # type: ignore[method-assign]


def read_lines(folder: Path) -> dict[str, str]:
    """{trial id: its line in the database}."""
    path = folder / "sweeps/chaos.db"
    if not path.exists():
        return {}
    db = sqlite3.connect(path, timeout=60)
    try:
        return dict(db.execute("SELECT id, line FROM trials"))
    except sqlite3.OperationalError:  # killed before it created its tables
        return {}
    finally:
        db.close()


@dataclass
class Outcome:
    """What happened in a sweep whose processes were killed."""

    driver_kills: int = 0
    worker_kills: int = 0
    lost: set[str] = field(default_factory=set)  # recorded, and later missing or changed
    twice: set[str] = field(default_factory=set)  # recorded, and sent to a worker again
    orphans: int = 0
    seconds: float = 0.0


def disturb(
    folder: Path,
    trials: int,
    kills: int,
    workers: int = 3,
    seed: int = 0,
    pause: float = 0.25,
    steps: int = 0,
) -> Outcome:
    """Runs the sweep to its end with `kills` kills. Restarts the driver, a sixth of the victims."""
    rng, outcome, before, starts = random.Random(seed), Outcome(), {}, folder / "started"
    start = time.monotonic()
    (folder / "tmp").mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--drive", str(folder), "--trials", str(trials)]
    command += ["--workers", str(workers), "--steps", str(steps)]
    while True:
        position = starts.stat().st_size if starts.exists() else 0
        with subprocess.Popen(
            command,
            env=os.environ | {"TMPDIR": str(folder / "tmp")},
            stderr=subprocess.PIPE,
            text=True,
        ) as driver:
            family = _kill_at_random(driver, rng, outcome, kills, pause)
            errors = driver.communicate()[1]
        outcome.orphans += len(psutil.wait_procs(family, timeout=10)[1])
        if starts.exists():
            outcome.twice |= before.keys() & set(starts.read_text()[position:].split())
        now = read_lines(folder)
        outcome.lost |= {i for i, text in before.items() if now.get(i) != text}
        before = now
        if driver.returncode != -signal.SIGKILL:
            assert driver.returncode == 0, errors
            outcome.seconds = time.monotonic() - start
            return outcome


def _kill_at_random(
    driver: subprocess.Popen[str], rng: random.Random, outcome: Outcome, kills: int, pause: float
) -> list[psutil.Process]:
    """Kills processes until the driver ends or is killed. Returns all workers that were seen."""
    family: set[psutil.Process] = set()
    while driver.poll() is None:
        time.sleep(rng.uniform(0, 2 * pause))
        workers = list_workers(driver.pid)
        family |= set(workers)
        if not workers or outcome.driver_kills + outcome.worker_kills >= kills:
            continue
        if rng.random() < 1 / 6:
            driver.kill()
            driver.wait()
            outcome.driver_kills += 1
            break
        victim = rng.choice(workers)
        if victim.is_running():
            victim.kill()
            outcome.worker_kills += 1
    return list(family)


def list_workers(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def reproducible_record(folder: Path) -> list[dict[str, Any]]:
    """The fields of all recorded trials that kills must not change, without the data's path."""
    rows = [
        {name: getattr(trial, name) for name in REPRODUCIBLE}
        for trial in read_jsonl(folder / "sweeps/chaos.jsonl")
    ]
    return [
        row | {"point": row["point"] | {"data": row["point"]["data"] | {"source": ""}}}
        for row in rows
    ]


def compare(kills: int, trials: int, steps: int, seed: int) -> None:
    """Runs one sweep without kills and one with them; prints a row of the table."""
    workers = 2 if steps else 3
    with tempfile.TemporaryDirectory() as calm, tempfile.TemporaryDirectory() as wild:
        for folder in map(Path, (calm, wild)):
            base_recipe(folder)
            if not steps:
                install_worker(folder, trials, 0.04)
        shm = set(os.listdir("/dev/shm"))
        disturb(Path(calm), trials, 0, workers, steps=steps)
        outcome = disturb(Path(wild), trials, kills, workers, seed, 2.5 if steps else 0.25, steps)
        shm = set(os.listdir("/dev/shm")) - shm
        leftovers = [*leftover_files(Path(wild)), *shm]
        for name in leftovers:
            print(f"file left: {name}", file=sys.stderr)
        same = reproducible_record(Path(calm)) == reproducible_record(Path(wild))
        restarts = len(Path(wild, "started").read_text().split()) - trials
        print(
            f"| {'trained' if steps else 'planted'} | {trials} | {outcome.driver_kills} "
            f"| {outcome.worker_kills} | {restarts} | {len(outcome.lost)} | {len(outcome.twice)} "
            f"| {'yes' if same else 'NO'} | {outcome.orphans} | {len(leftovers)} "
            f"| {outcome.seconds:.0f} |"
        )


def leftover_files(folder: Path) -> list[str]:
    """Files that a sweep should have removed by its end."""
    kept = (".db", ".jsonl", ".logs")
    sweep = [path.name for path in Path(folder, "sweeps").iterdir() if path.suffix not in kept]
    temporary = [path.name for path in Path(folder, "tmp").iterdir()]
    return [
        *sweep,
        *(name for name in temporary if not name.startswith("torchinductor_")),  # torch's cache
        *(path.name for path in Path(folder, "runs").rglob("*.part")),
    ]


def scale(n: int = 10_000) -> None:
    """Prints what `scaletune sweep` costs when all `n` trials are recorded.

    Also prints the milliseconds that a trivial trial costs beside its own time.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        axes = {"lr": [1e-3 * 1.01**i for i in range(100)], "seed": list(range(n // 100))}
        recipe = with_settings(base_recipe(folder), {"axes": axes})
        (folder / "chaos.toml").write_text(
            toml(recipe.model_dump(exclude={"holdout", "target", "compare", "fit", "evidence"}))
        )
        store = Store(folder / "sweeps/chaos")
        store._db.execute("PRAGMA synchronous=OFF")  # only to write the trials faster
        for task in sweeping.tasks("main", points(recipe)):
            store.put(planted_trial(task), [1.0] * 300)
        store.close()
        for case in ("after a crash, the record is written first", "resume"):
            print(f"{n} recorded trials, {case}: {_measure_command(folder)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        install_worker(folder, 400, 0.0)
        tasks, sys.executable = planted_tasks(folder, 400), str(folder / "worker")
        start = time.monotonic()
        sweeping.train_all(tasks, folder / "sweeps/chaos", 1)
        each = 1000 * (time.monotonic() - start) / 400
        print(f"400 trials that do nothing, one worker: {each:.1f} ms each")


def _measure_command(folder: Path) -> str:
    """Time and memory of the whole command, with start-up and imports."""
    start, before = time.monotonic(), os.times()
    command = [sys.executable, "-m", "scaletune", "sweep", str(folder / "chaos.toml")]
    subprocess.run([*command, "--out", str(folder)], check=True, capture_output=True)
    elapsed, after = time.monotonic() - start, os.times()
    cpu = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return f"{elapsed:.2f} s, {cpu:.2f} s of CPU, at most {memory:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--trials", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=0, help="training steps per trial; 0: prescribed losses"
    )
    parser.add_argument("--scale", action="store_true", help="measure 10,000 recorded trials")
    parser.add_argument("--drive", type=Path, help="run the driver of a sweep in this folder")
    args = parser.parse_args()
    if args.drive:
        drive(args.drive, args.trials, args.workers, args.steps)
    elif args.scale:
        scale()
    else:
        print(HEADER)
        compare(args.kills, args.trials, args.steps, args.seed)


if __name__ == "__main__":
    main()
