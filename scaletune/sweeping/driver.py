"""The driver of a sweep: keeps all workers busy, records results, and retries lost trials."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune import environment
from scaletune.errors import UserError
from scaletune.records import Store, Trial, frame, redact
from scaletune.sweeping import lockfile, stacks
from scaletune.sweeping.engines import pool as pool_module
from scaletune.sweeping.engines.pool import Message, Pool
from scaletune.sweeping.out_of_memory import shrink
from scaletune.sweeping.pending_tasks import note_handed_out, note_recorded, require_own_trainer
from scaletune.sweeping.plain_text import last_lines
from scaletune.sweeping.progress import SweepProgress
from scaletune.sweeping.task import Task, complete_trial, failed_trial

if TYPE_CHECKING:
    import pandas as pd

    from scaletune.sweeping.trainers.start import Train

FIRST_FAILURES = 3  # trials of the user's trainer that may fail before any has succeeded

Then = Callable[[Trial], Sequence[Task]]  # a search: recorded trial -> tasks to train next
# a search: (task, tokens, held-out loss on the way) -> ids of the trials to stop now
Watch = Callable[[Task, float, float], Collection[str]]


def train_all(
    wanted: Sequence[Task],
    stem: Path,
    workers: str | int = "auto",
    *,
    adopt: bool = False,
    then: Then | None = None,
    watch: Watch | None = None,
    finish_stopped: bool = True,
    train: Train | None = None,
) -> pd.DataFrame:
    """Trains the tasks that are not recorded, the longest first, and writes the record.

    Args:
        wanted: The tasks.
        stem: Path of the sweep's files without suffix, `sweeps/NAME`.
        workers: The number of workers, or "auto".
        adopt: Accept the trials of an existing `.jsonl` record.
        then: Called with each requested trial as soon as it is recorded, and at the start with
            those that are; returns more tasks.
        watch: Called with each held-out loss that a trial in training reports; returns the ids of
            trials to stop.
        finish_stopped: Train trials that were stopped early to their end. Otherwise they count as
            recorded.
        train: The user's function that trains, where it cannot be imported by its name.

    Returns:
        The trials of all requested tasks. The record is written even if an exception is raised.

    Raises:
        UserError: Another driver runs this sweep, or the record cannot be kept.
    """
    environment.require_one_process()
    with lockfile.hold_lock(stem), closing(Store(stem, adopt=adopt)) as store:
        store.export()  # an unreadable record is refused before anything is trained
        try:
            external = any(task.recipe.trainer.external for task in wanted)
            driver = Driver(store, then, watch, finish_stopped, retries=not external)
            driver.add(wanted)
            name = wanted[0].recipe.trainer.function if train and wanted else ""
            if name and not driver.queue:
                print(note_recorded(driver.wanted, name), file=sys.stderr)
            if driver.queue:
                require_own_trainer(store, driver.queue)
                if note := note_handed_out(store, driver.queue):
                    print(note, file=sys.stderr)
                if note := stacks.explain_separate_training(driver.queue):
                    print(note, file=sys.stderr)
                with pool_module.open_pool(
                    driver.queue, workers, growing=then is not None, stem=stem, train=train
                ) as pool:
                    driver.run(pool)
            return frame(trial for trial in store.trials() if trial.id in driver.wanted)
        finally:
            store.export()


class Driver:
    """The tasks of a sweep, those that are still to be trained, and the store of the results.

    Without `retries`, trials that failed or were stopped stay as they are recorded.
    """

    def __init__(
        self,
        store: Store,
        then: Then | None = None,
        watch: Watch | None = None,
        finish_stopped: bool = True,
        retries: bool = True,
    ):
        self.store, self.then, self.watch = store, then, watch
        self.failures = 0  # trials of the user's trainer that failed before any has succeeded
        live = store.read_progress()
        if lockfile.driven_elsewhere(live):  # on this machine we hold the lock
            raise lockfile.second_driver_error(store.database.stem, live["driver"])
        self.known = store.statuses()
        again = {"failed", "stopped"} if finish_stopped else {"failed"}
        again = again if retries else set()
        store.delete(i for i, status in self.known.items() if status in again - {"stopped"})
        self.known = {i: status for i, status in self.known.items() if status not in again}
        self.wanted: set[str] = set()
        self.queue: list[Task] = []  # the longest first
        self.progress: SweepProgress | None = None

    def add(self, tasks: Sequence[Task]) -> None:
        """Queues the tasks that are not recorded. Of tasks with the same id, the first counts."""
        new = {task.id: task for task in reversed(tasks) if task.id not in self.wanted}
        self.wanted |= new.keys()
        todo = [
            with_absolute_runs(task, self.store.database)
            for task in new.values()
            if task.id not in self.known
        ]
        self.queue = sorted(self.queue + todo, key=lambda task: -task.cost)
        recorded = self._load_recorded(new.keys()) if self.then or self.progress else []
        if self.progress:
            self.progress.add(todo, recorded)
        if self.then:
            for trial in recorded:
                self.add(self.then(trial))

    def _load_recorded(self, ids: Collection[str]) -> list[Trial]:
        if not self.known.keys() & set(ids):
            return []
        return [trial for trial in self.store.trials() if trial.id in ids]

    def run(self, pool: Pool) -> None:
        """Trains until the queue is empty and every trial is recorded."""
        recorded = self._load_recorded(self.wanted)
        with closing(SweepProgress(self.store, self.queue, recorded)) as self.progress:
            while self.queue or pool.busy:
                pool.hand_out(self.queue)
                for task, message in pool.messages():
                    if "report" in message:
                        if ids := self._judge(task, message["report"]):
                            pool.request_stop(ids)
                    else:
                        self._handle(task, message, self.progress)
                self.progress.refresh()

    def _judge(self, task: Task, report: dict[str, float]) -> Collection[str]:
        """The trials that the search stops after a report of one of them."""
        return self.watch(task, report["tokens"], report["loss"]) if self.watch else ()

    def _handle(self, task: Task, message: Message, progress: SweepProgress) -> None:
        if "lost" in message:
            self._retry(task, message, progress)
        elif "refused" in message:  # an error that the user must correct: no retry
            raise UserError(message["refused"])
        elif "trials" in message:
            self._record_lineages(task, message, progress)
        elif "progress" in message:
            progress.update(task, message["progress"])
        else:
            own = task.recipe.foreign
            trial = complete_trial(task, message["trial"]) if own else Trial(**message["trial"])
            if trial.id != task.id:
                raise UserError(
                    f"`{task.recipe.data.source}` must not change while a sweep runs, but a worker"
                    " read other data than the driver: start the sweep again"
                )
            self._write_log(task, message, trial.status)
            self._record(task, trial, message["curve"], progress)

    def _record(
        self, task: Task, trial: Trial, curve: Sequence[float], progress: SweepProgress
    ) -> None:
        self.store.put(trial, curve)
        self.known[trial.id] = trial.status
        progress.finish(task, trial)
        if task.recipe.foreign:
            self._require_success(trial)
        if self.then:
            self.add(self.then(trial))

    def _require_success(self, trial: Trial) -> None:
        """UserError if the user's trainer fails from the start: the other trials would too."""
        if any(status != "failed" for status in self.known.values()):
            return
        self.failures += 1
        if self.failures >= min(FIRST_FAILURES, len(self.wanted)):
            raise UserError(
                f"the trainer must train, but the first {self.failures} trials failed, the last"
                f" one: {trial.message}"
            )

    def _record_lineages(self, task: Task, message: Message, progress: SweepProgress) -> None:
        """Records the surviving lineages of a population."""
        trials = [Trial(**each["trial"]) for each in message["trials"]]
        self._write_log(task, message, f"{len(trials)} lineages")
        for trial, each in zip(trials, message["trials"], strict=True):
            self.store.put(trial, each["curve"])
            self.known[trial.id] = trial.status
        self.store.write_lineages(task.id, [trial.id for trial in trials])
        progress.add([], trials[1:])
        progress.finish(task, trials[0])

    def _retry(self, task: Task, message: Message, progress: SweepProgress) -> None:
        """Queues a lost task again, smaller if memory ran out; after the last try it has failed."""
        task.tries += 1
        end, log = message["lost"], last_lines(message["log"])
        if not (task.recipe.foreign and (message.get("explained") or log == "none")):
            end = f"{end}; last log lines: {log}"
        end += "" if task.recipe.foreign else f" (exit status {message['status']})"
        self._write_log(task, message, "lost: " + message["lost"])
        progress.requeue(task)
        if smaller := shrink(task, message.get("stack", 1)) if message["memory"] else "":
            end = f"out of memory; retried {smaller}"
        elif task.tries - task.shrunk > task.recipe.engine.retries:
            end = end.replace("its worker died", f"its worker died {task.tries} times")
            if task.recipe.foreign and task.tries > 1:
                end = f"{end}; tried {task.tries} times"
            self._record(task, failed_trial(task, end), [], progress)
            return
        else:
            task.most = 1
        progress.print_line(f"trial {task.id}, try {task.tries}: {redact(end)}")
        self.queue.insert(0, task)

    def _write_log(self, task: Task, message: dict[str, Any], end: str) -> None:
        """Appends what the worker printed to `sweeps/NAME.logs/ID.log`; writes no empty file."""
        text = redact(message.get("log", ""))
        if not text and "lost" not in message:
            return
        folder = self.store.database.with_suffix(".logs")
        line = f"--- {lockfile.this_process()['since']} try {task.tries}: {end}"
        try:
            folder.mkdir(exist_ok=True)
            with (folder / f"{task.id}.log").open("a", encoding="utf-8") as file:
                file.write(f"{text}\n{line}\n")
        except OSError as error:
            raise UserError(f"`{folder}` must be writable, but {error.strerror}") from error


def with_absolute_runs(task: Task, workbench: Path) -> Task:
    """Makes `engine.runs` absolute, because workers may have another working directory.

    A relative `engine.runs` is relative to the folder that holds `sweeps/`.
    """
    engine, home = task.recipe.engine, workbench.parent
    home = home.parent if home.name == "sweeps" else home
    runs = str((home / engine.runs).absolute())
    task.recipe = task.recipe.model_copy(
        update={"engine": engine.model_copy(update={"runs": runs})}
    )
    return task
