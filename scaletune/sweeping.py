"""Sweeps on this machine: a driver that owns the records, and one worker process a core (or a GPU) that trains trial after trial.

Driver and worker speak JSON lines over the worker's standard input and output. A worker whose driver is gone reads the end
of its input and leaves at once, so a killed driver leaves no orphan; a worker that dies is replaced and its trial tried again.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pandas as pd
from tqdm import tqdm

from scaletune import counting, data
from scaletune import recipe as recipes
from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.records import Store, Trial, frame

TRIES = 3  # a trial whose worker dies is started this often before it is recorded as failed
SAY_EVERY = 0.5  # seconds between a worker's progress messages
INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # would make a worker wait for peers


@dataclass
class Task:
    """One trial to train: which sweep asked, the point, its id, and how often it was started."""

    sweep: str
    recipe: Recipe
    id: str
    cost: float  # seconds, guessed
    tries: int = 0


def tasks(sweep: str, points: Sequence[Recipe]) -> list[Task]:
    """One task a point. Reads the corpus: its digest is part of a trial's identity."""
    made = []
    for point in points:
        corpus = data.load(point.data)
        counting.multipliers(point, corpus.vocab_size)  # refuses a form that cannot tie its head, before a worker dies on it
        cost = counting.seconds(point, corpus.vocab_size)
        made.append(Task(sweep, point, recipes.identity(point.point(), corpus.digest), cost))
    return made


def sweep(source: str | Path | Recipe, *, out: str | Path = ".", adopt: bool = False, settings: Sequence[str] = ()) -> pd.DataFrame:
    """Train every point of the recipe that is not on record in `out/sweeps/NAME.db`; all its trials, a row each.

    `adopt` counts the records of an existing `NAME.jsonl` as trained. Writes `sweeps/NAME.jsonl` at every stop.
    """
    recipe = source if isinstance(source, Recipe) else recipes.load(source, settings)
    wanted = tasks("main", recipes.points(recipe))
    return train_all(wanted, Path(out) / "sweeps" / recipe.name, recipe.engine.workers, adopt=adopt)


def train_all(wanted: Sequence[Task], stem: Path, workers: str | int = "auto", *, adopt: bool = False) -> pd.DataFrame:
    """Train what is not on record, longest first, and return the wanted trials; the record is written whatever happens."""
    store = Store(stem, adopt=adopt)
    with contextlib.closing(store):
        store.export()  # a record that could not be kept is refused before anything is trained
        try:
            store.forget(trial.id for trial in store.trials() if trial.status == "failed")
            known = {trial.id for trial in store.trials()}
            todo = {task.id: task for task in reversed(wanted) if task.id not in known}  # asked twice: the first sweep's
            if todo:
                with _Pool(min(_slots(workers), len(todo)), workers) as pool:
                    _drive(pool, sorted(todo.values(), key=lambda task: -task.cost), store, done=len(wanted) - len(todo))
            ids = {task.id for task in wanted}
            return frame(trial for trial in store.trials() if trial.id in ids)
        finally:
            store.export()


def _drive(pool: _Pool, queue: list[Task], store: Store, done: int) -> None:
    """Keep every worker busy until the queue is empty and each trial is on record."""
    board = _Board(queue, done)
    while queue or pool.busy:
        pool.hand_out(queue)
        for task, message in pool.messages():
            if message is None:
                _lost(task, pool, queue, store, board)
            elif "progress" in message:
                board.progress(task, message["progress"])
            else:
                trial = Trial(**message["trial"])
                if trial.id != task.id:
                    raise UserError(f"`{task.recipe.data.source}` must stay as it is while a sweep runs, but a worker read other data")
                store.put(trial, message["curve"])
                board.finished(task, trial)
    board.close()


def _lost(task: Task, pool: _Pool, queue: list[Task], store: Store, board: _Board) -> None:
    """A worker died: its trial goes back to the queue, or on record as failed with the last lines of the worker's log."""
    task.tries += 1
    board.progress(task, 0.0)
    if task.tries < TRIES:
        queue.insert(0, task)
        return
    trial = failed(task, f"its worker died {TRIES} times; last words: {pool.last_words}")
    store.put(trial)
    board.finished(task, trial)


def failed(task: Task, message: str) -> Trial:
    """The record of a trial that could not be trained."""
    from scaletune.training import on_record

    return on_record(task.recipe, task.sweep, data.load(task.recipe.data), "failed", message, 0.0, {}, {})


class _Board:
    """What the user sees: trials done, the current best, the share of the work done and the time left."""

    def __init__(self, queue: Sequence[Task], done: int):
        self.total, self.done, self.best = len(queue) + done, done, None
        self.shares: dict[str, float] = {}
        form = "{desc} {percentage:3.0f}% |{bar:24}| {elapsed} gone, {remaining} left{postfix}"
        quiet = 30.0 if not sys.stderr.isatty() else 0.2
        self.bar = tqdm(total=sum(task.cost for task in queue), bar_format=form, mininterval=quiet, maxinterval=60, file=sys.stderr)
        self._say()

    def _say(self) -> None:
        best = self.best
        self.bar.set_description_str(f"trials {self.done}/{self.total}", refresh=False)
        if best:
            self.bar.set_postfix_str(f"best {best.loss:.4f} at width {best.width}, lr {best.lr:.3g}", refresh=False)

    def progress(self, task: Task, share: float) -> None:
        self.bar.update((share - self.shares.get(task.id, 0.0)) * task.cost)
        self.shares[task.id] = share

    def finished(self, task: Task, trial: Trial) -> None:
        self.done += 1
        if trial.loss is not None and (self.best is None or trial.loss < (self.best.loss or 0)):
            self.best = trial
        self._say()
        self.progress(task, 1.0)

    def close(self) -> None:
        self.bar.refresh()
        self.bar.close()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _slots(workers: str | int) -> int:
    """How many workers: as asked, or one a GPU, or one a core this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return workers if isinstance(workers, int) else _gpus() or cores


def _environment(slot: int) -> dict[str, str]:
    """One thread a worker (two on a shared core collapse), and its own GPU; nothing of a surrounding distributed launch."""
    kept = {key: value for key, value in os.environ.items() if key not in INHERITED and not key.startswith("TORCHELASTIC_")}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    gpus = _gpus()
    return kept | threads | ({"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus else {})


class _Worker:
    """A worker process, its log, and the task it is on."""

    def __init__(self, slot: int):
        self.slot, self.task, self.heard = slot, None, b""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (`stop` closes it)
        command = [sys.executable, "-m", "scaletune.sweeping"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=_environment(slot))

    task: Task | None

    def lines(self) -> list[bytes] | None:
        """What it has said since, in whole lines, or None when its output has ended. Call when there is something to read.

        Read past any buffer of ours: a second line left in one would never wake the selector.
        """
        said = os.read(self.process.stdout.fileno(), 1 << 16)
        *lines, self.heard = (self.heard + said).split(b"\n")
        return lines if said else None

    def last_words(self) -> str:
        """The last line of its log, and how it ended."""
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'none'} (exit status {self.process.wait()})"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class _Pool:
    """Workers, replaced when they die."""

    def __init__(self, size: int, workers: str | int):
        self.selector = selectors.DefaultSelector()
        self.workers: list[_Worker] = []
        self.last_words = ""
        for slot in range(size):
            self._start(slot)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers:
            worker.stop()
        self.selector.close()

    def _start(self, slot: int) -> None:
        worker = _Worker(slot)
        self.workers.append(worker)
        self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    @property
    def busy(self) -> bool:
        return any(worker.task for worker in self.workers)

    def hand_out(self, queue: list[Task]) -> None:
        """Give each idle worker the next task."""
        for worker in [worker for worker in self.workers if worker.task is None][: len(queue)]:
            worker.task = queue.pop(0)
            order = {"sweep": worker.task.sweep, "recipe": worker.task.recipe.model_dump()}
            with contextlib.suppress(BrokenPipeError):  # a dead worker shows as the end of its output
                worker.process.stdin.write(json.dumps(order).encode() + b"\n")
                worker.process.stdin.flush()

    def messages(self) -> list[tuple[Task, dict[str, Any] | None]]:
        """Wait for workers to speak: (task, message), the message None when the worker died on it."""
        heard: list[tuple[Task, dict[str, Any] | None]] = []
        for key, _ in self.selector.select():
            worker, task = key.data, key.data.task
            lines = worker.lines()
            for message in map(json.loads, lines or []):
                heard.append((task, message))
                worker.task = task if "progress" in message else None
            if lines is None:
                heard += [(task, None)] if task else []
                self._replace(worker)
        return heard

    def _replace(self, worker: _Worker) -> None:
        self.selector.unregister(worker.process.stdout)
        self.workers.remove(worker)
        self.last_words = worker.last_words()
        worker.stop()
        self._start(worker.slot)


def _serve(orders: IO[str], answers: IO[str]) -> None:
    """A worker's life: read an order, train, answer."""
    from scaletune import training

    acc = training.accelerator()
    gc.freeze()  # what is imported stays: garbage is collected after each trial, in 2 ms instead of 100
    said = 0.0

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    def progress(share: float) -> None:
        nonlocal said
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            say({"progress": share})

    for line in orders:
        order = json.loads(line)
        point = recipes.validated(order["recipe"], "point")
        trial, curve = training.trial(point, order["sweep"], acc, progress)
        say({"trial": asdict(trial), "curve": curve if trial.status == "done" else [x for x in curve if x == x]})


def main() -> None:
    """`python -m scaletune.sweeping`: be a worker. Leaves when its input ends, in the middle of a trial too."""
    import queue

    orders: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            orders.put(line)
        os._exit(0)  # the driver is gone: no one would read the result

    threading.Thread(target=listen, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log, never between the answers
    _serve(iter(orders.get, None), answers)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
