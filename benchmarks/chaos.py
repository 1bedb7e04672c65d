"""Kill -9 at random moments of a sweep's driver and its workers, and what is left of the record.

`python benchmarks/chaos.py --kills 100 [--steps 400 --trials 200]`; without `--steps` a worker is a script that answers in 40 ms with a
planted loss, so that the driver, the pool and the store are what is put to the test; with it, workers train so long, and go on from
checkpoints. `--scale` opens 10,000 recorded trials and drives trivial ones. Tables in benchmarks/README.md.
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
from scaletune.recipe import Recipe, points, validated, with_settings
from scaletune.records import Store, Trial, read_jsonl
from scaletune.sweeping.engines import local
from scaletune.transferring.formats.recipe import toml

NAMED = "scaletune.sweeping.engines.worker"
MEASURED = (
    "id",
    "sweep",
    "status",
    "loss",
    "train_loss",
    "message",
    "flops",
    "point",
)  # of a trial, wherever and whenever it was trained
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


def base(folder: Path) -> Recipe:
    """Eight steps of a model of width 32 on a text of our own."""
    text = folder / "words.txt"
    if not text.exists():
        drawn = random.Random(0)
        text.write_text(" ".join(drawn.choices([f"word{i}" for i in range(200)], k=8000)))
    return validated(
        {
            "model": {"width": 32, "depth": 1, "head_dim": 16}, "parametrization": {"base_width": 32}, "optimizer": {"lr": 5e-3},
            "data": {"source": str(text), "seq_len": 32}, "budget": {"tokens": 2048, "batch_tokens": 256, "eval_tokens": 512},
            "engine": {"retries": 1000},
        },
        "chaos",
    )  # fmt: skip


def wanted(folder: Path, trials: int) -> list[sweeping.Task]:
    recipe = base(folder)
    return sweeping.tasks(
        "main", [with_settings(recipe, {"seed": seed, "engine.stack": 1}) for seed in range(trials)]
    )


def real(folder: Path, trials: int, steps: int = 400) -> list[sweeping.Task]:
    """Trials of a second or so that keep checkpoints; half of them train in stacks of two, and every fourth diverges."""
    rows: dict[str, Any] = {
        "budget.tokens": 256 * steps,
        "data.epochs": 10,
        "engine.checkpoint_every": max(1, steps // 8),
    }
    recipe, lrs = with_settings(base(folder), rows), (2e-3, 4e-3, 8e-3, 1e3)
    settings = [
        {"seed": i // 4, "lr": lrs[i % 4], "engine.stack": 1 + (i // 4) % 2} for i in range(trials)
    ]
    return sweeping.tasks("main", [with_settings(recipe, each) for each in settings])


def planted(task: sweeping.Task) -> Trial:
    """A done trial whose loss is drawn from its seed."""
    loss = 2 + random.Random(task.recipe.seed).random()
    return replace(
        sweeping.failed(task, ""), status="done", loss=loss, train_loss=loss, seconds=0.04
    )


def plant(folder: Path, trials: int, seconds: float) -> None:
    """Put a worker that answers at once into `folder`, with what it answers."""
    answers = {task.recipe.seed: asdict(planted(task)) for task in wanted(folder, trials)}
    (folder / "answers.json").write_text(json.dumps(answers))
    (folder / "started").write_text("")
    worker = folder / "worker"
    worker.write_text(WORKER.format(python=sys.executable, folder=folder, seconds=seconds))
    worker.chmod(worker.stat().st_mode | stat.S_IXUSR)


def drive(folder: Path, trials: int, workers: int, steps: int) -> None:
    """What a driver's process does: `steps` of training a trial, or a planted answer."""
    if not steps:
        sys.executable = str(folder / "worker")
    else:
        _note_orders(folder / "started")
    sweeping.train_all(
        real(folder, trials, steps) if steps else wanted(folder, trials),
        folder / "sweeps/chaos",
        workers,
    )


def _note_orders(started: Path) -> None:
    """Have this process write down which trials it hands to its workers."""
    order = local.Worker.order

    def noted(worker: local.Worker, tasks: Sequence[sweeping.Task]) -> None:
        with started.open("a") as file:
            file.write("".join(task.id + "\n" for task in tasks))
        order(worker, tasks)

    local.Worker.order = noted  # type: ignore[method-assign]


def recorded(folder: Path) -> dict[str, str]:
    """id -> line of what is on record."""
    path = folder / "sweeps/chaos.db"
    if not path.exists():
        return {}
    db = sqlite3.connect(path, timeout=60)
    try:
        return dict(db.execute("SELECT id, line FROM trials"))
    except sqlite3.OperationalError:  # killed before it made its tables
        return {}
    finally:
        db.close()


@dataclass
class Found:
    """What a disturbed sweep showed."""

    driver_kills: int = 0
    worker_kills: int = 0
    lost: set[str] = field(default_factory=set)  # recorded, and gone later, or changed
    twice: set[str] = field(default_factory=set)  # started by a driver that had them on record
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
) -> Found:
    """Carry the sweep to its end through `kills` kills; every sixth is the driver's, and it is started again."""
    drawn, found, before, starts = random.Random(seed), Found(), {}, folder / "started"
    began = time.monotonic()
    (folder / "tmp").mkdir(exist_ok=True)
    command = [
        sys.executable,
        __file__,
        "--drive",
        str(folder),
        "--trials",
        str(trials),
        "--workers",
        str(workers),
    ]
    command += ["--steps", str(steps)]
    while True:
        position = starts.stat().st_size if starts.exists() else 0
        with subprocess.Popen(
            command,
            env=os.environ | {"TMPDIR": str(folder / "tmp")},
            stderr=subprocess.PIPE,
            text=True,
        ) as driver:
            family = _kill_at_random(driver, drawn, found, kills, pause)
            said = driver.communicate()[1]
        found.orphans += len(psutil.wait_procs(family, timeout=10)[1])
        if starts.exists():
            found.twice |= before.keys() & set(starts.read_text()[position:].split())
        now = recorded(folder)
        found.lost |= {i for i, text in before.items() if now.get(i) != text}
        before = now
        if driver.returncode != -signal.SIGKILL:
            assert driver.returncode == 0, said
            found.seconds = time.monotonic() - began
            return found


def _kill_at_random(
    driver: subprocess.Popen[str], drawn: random.Random, found: Found, kills: int, pause: float
) -> list[psutil.Process]:
    """Until the driver has ended, or was killed; all its workers that were seen."""
    family: set[psutil.Process] = set()
    while driver.poll() is None:
        time.sleep(drawn.uniform(0, 2 * pause))
        workers = _workers(driver.pid)
        family |= set(workers)
        if not workers or found.driver_kills + found.worker_kills >= kills:
            continue
        if drawn.random() < 1 / 6:
            driver.kill()
            driver.wait()
            found.driver_kills += 1
            break
        victim = drawn.choice(workers)
        if victim.is_running():
            victim.kill()
            found.worker_kills += 1
    return list(family)


def _workers(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def measured(folder: Path) -> list[dict[str, Any]]:
    """What of the record no disturbance may change, to the last bit; where the data lay is left out."""
    rows = [
        {name: getattr(trial, name) for name in MEASURED}
        for trial in read_jsonl(folder / "sweeps/chaos.jsonl")
    ]
    return [
        row | {"point": row["point"] | {"data": row["point"]["data"] | {"source": ""}}}
        for row in rows
    ]


def compare(kills: int, trials: int, steps: int, seed: int) -> None:
    """One row of the table."""
    workers = 2 if steps else 3
    with tempfile.TemporaryDirectory() as calm, tempfile.TemporaryDirectory() as wild:
        for folder in map(Path, (calm, wild)):
            base(folder)
            if not steps:
                plant(folder, trials, 0.04)
        shm = set(os.listdir("/dev/shm"))
        disturb(Path(calm), trials, 0, workers, steps=steps)
        found = disturb(Path(wild), trials, kills, workers, seed, 2.5 if steps else 0.25, steps)
        shm = set(os.listdir("/dev/shm")) - shm
        for name in [*(left := leavings(Path(wild))), *shm]:
            print(f"left: {name}", file=sys.stderr)
        same = measured(Path(calm)) == measured(Path(wild))
        started = Path(wild, "started").read_text().split()
        print(
            f"| {'trained' if steps else 'planted'} | {trials} | {found.driver_kills} | {found.worker_kills} | {len(started) - trials} |"
            f" {len(found.lost)} | {len(found.twice)} | {'yes' if same else 'NO'} | {found.orphans} | {len(left) + len(shm)} | {found.seconds:.0f} |"
        )


def leavings(folder: Path) -> list[str]:
    """Files that a sweep which has ended should not have left."""
    left = [
        path.name
        for path in Path(folder, "sweeps").iterdir()
        if path.suffix not in (".db", ".jsonl", ".logs")
    ]
    temporary = [
        path.name
        for path in Path(folder, "tmp").iterdir()
        if not path.name.startswith("torchinductor_")
    ]  # torch's cache
    return left + temporary + [path.name for path in Path(folder, "runs").rglob("*.part")]


def scale(n: int = 10_000) -> None:
    """Seconds and memory of `scaletune sweep` where all `n` trials are on record; milliseconds a trivial trial costs beside its own time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = with_settings(
            base(folder),
            {"axes": {"lr": [1e-3 * 1.01**i for i in range(100)], "seed": list(range(n // 100))}},
        )
        (folder / "chaos.toml").write_text(
            toml(recipe.model_dump(exclude={"holdout", "target", "compare", "fit", "evidence"}))
        )
        store = Store(folder / "sweeps/chaos")
        store._db.execute("PRAGMA synchronous=OFF")  # only to have them there sooner
        for task in sweeping.tasks("main", points(recipe)):
            store.put(planted(task), [1.0] * 300)
        store.close()
        for what in ("after a crash: its record is written", "resumed"):
            print(f"{n} recorded trials, {what}: {_measured_command(folder)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(folder, 400, 0.0)
        asked, sys.executable = wanted(folder, 400), str(folder / "worker")
        began = time.monotonic()
        sweeping.train_all(asked, folder / "sweeps/chaos", 1)
        print(
            f"400 trials that do nothing, one worker: {1000 * (time.monotonic() - began) / 400:.1f} ms each"
        )


def _measured_command(folder: Path) -> str:
    """What the whole command takes, its start and imports too."""
    began, before = time.monotonic(), os.times()
    command = [
        sys.executable,
        "-m",
        "scaletune",
        "sweep",
        str(folder / "chaos.toml"),
        "--out",
        str(folder),
    ]
    subprocess.run(command, check=True, capture_output=True)
    gone, after = time.monotonic() - began, os.times()
    spent = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return f"{gone:.2f} s, {spent:.2f} s of CPU, {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MB at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--trials", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=0, help="of training a trial; 0: planted answers"
    )
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--drive", type=Path)
    args = parser.parse_args()
    if args.drive:
        drive(args.drive, args.trials, args.workers, args.steps)
    elif args.scale:
        scale()
    else:
        print(
            "| workers | trials | driver kills | worker kills | started again | lost | twice | same record | orphans | files left | seconds |\n"
            + "|---" * 11
            + "|"
        )
        compare(args.kills, args.trials, args.steps, args.seed)


if __name__ == "__main__":
    main()
