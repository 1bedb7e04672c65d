"""Sweeps: a driver that owns the records, and workers that train trial after trial. An engine is a file here with a `Pool`.

The driver hands tasks to whatever pool it has and puts on record what comes back; a trial whose worker dies is tried again.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from scaletune import counting, data
from scaletune import recipe as recipes
from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.records import Store, Trial, frame
from scaletune.sweeping import stacks
from scaletune.sweeping.local import Pool, slots

TRIES = 3  # a trial whose worker dies is started this often before it is recorded as failed


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
        data.fits(point, corpus)
        counting.multipliers(point, corpus.vocab_size)  # refuses a form that cannot tie its head, before a worker dies on it
        cost = counting.seconds(point, corpus.vocab_size)
        made.append(Task(sweep, point, recipes.identity(point, corpus.digest), cost))
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
                if said := stacks.note(list(todo.values())):
                    print(f"trials {said}", file=sys.stderr)
                processes = max(task.recipe.engine.processes for task in todo.values())
                with Pool(min(slots(workers, processes), len(todo)), processes) as pool:
                    _drive(pool, sorted(todo.values(), key=lambda task: -task.cost), store, done=len(wanted) - len(todo))
            ids = {task.id for task in wanted}
            return frame(trial for trial in store.trials() if trial.id in ids)
        finally:
            store.export()


def _drive(pool: Pool, queue: list[Task], store: Store, done: int) -> None:
    """Keep every worker busy until the queue is empty and each trial is on record."""
    with contextlib.closing(_Board(queue, done)) as board:
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


def _lost(task: Task, pool: Pool, queue: list[Task], store: Store, board: _Board) -> None:
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
    corpus = data.load(task.recipe.data)
    known = counting.trial_fields(task.recipe, task.sweep, corpus.vocab_size, corpus.digest)
    return Trial(**known, status="failed", message=message, loss=None, train_loss=None, seconds=0.0)


class _Board:
    """What the user sees: trials done, the current best, the share of the work done and the time left."""

    def __init__(self, queue: Sequence[Task], done: int):
        self.total, self.done = len(queue) + done, done
        self.best: Trial | None = None
        self.shares: dict[str, float] = {}
        form = "{desc} {percentage:3.0f}% |{bar:24}| {elapsed} gone, {remaining} left{postfix}"
        quiet = 30.0 if not sys.stderr.isatty() else 0.2
        self.cost = sum(task.cost for task in queue)
        self.bar = tqdm(total=self.cost, bar_format=form, mininterval=quiet, maxinterval=60, file=sys.stderr)
        self._say()

    def _say(self) -> None:
        best = self.best
        self.bar.set_description_str(f"trials {self.done}/{self.total}", refresh=False)
        if best:
            self.bar.set_postfix_str(f"best {best.loss:.4f} at width {best.width}, lr {best.lr:.3g}", refresh=False)

    def progress(self, task: Task, share: float) -> None:
        gained = (share - self.shares.get(task.id, 0.0)) * task.cost
        self.bar.update(min(gained, self.cost - self.bar.n))  # rounding must not take the bar past its end
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
