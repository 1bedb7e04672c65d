"""The driver of a sweep: keeps every worker busy, puts on record what comes back, tries again what is lost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.records import Store, Trial, scrubbed
from scaletune.sweeping import lockfile
from scaletune.sweeping.engines.pool import Message, Pool
from scaletune.sweeping.out_of_memory import shrink
from scaletune.sweeping.progress import Board
from scaletune.sweeping.task import Task, failed

LAST = 3  # lines of a lost worker's log that its trial's record repeats


class Driver:
    """What a sweep wants, what of it is still to be trained, and where it is recorded."""

    def __init__(self, store: Store, then: Callable[[Trial], Sequence[Task]] | None = None):
        self.store, self.then = store, then
        live = store.told()
        if lockfile.elsewhere(live):  # on this machine we hold the lock
            raise lockfile.refuse(store.workbench.stem, live["driver"])
        self.known = store.statuses()
        store.forget(i for i, status in self.known.items() if status == "failed")
        self.known = {i: status for i, status in self.known.items() if status != "failed"}
        self.wanted: set[str] = set()
        self.queue: list[Task] = []  # the longest first
        self.board: Board | None = None

    def want(self, tasks: Sequence[Task]) -> None:
        """Put what is not on record into the queue; a trial that is asked for twice is the first sweep's."""
        new = {task.id: task for task in reversed(tasks) if task.id not in self.wanted}
        self.wanted |= new.keys()
        todo = [
            _placed(task, self.store.workbench)
            for task in new.values()
            if task.id not in self.known
        ]
        self.queue = sorted(self.queue + todo, key=lambda task: -task.cost)
        there = self._recorded(new.keys()) if self.then or self.board else []
        if self.board:
            self.board.wanted(todo, there)
        if self.then:
            for trial in there:
                self.want(self.then(trial))

    def _recorded(self, ids: Collection[str]) -> list[Trial]:
        return (
            [trial for trial in self.store.trials() if trial.id in ids]
            if self.known.keys() & set(ids)
            else []
        )

    def drive(self, pool: Pool) -> None:
        """Until the queue is empty and each trial is on record."""
        with closing(Board(self.store, self.queue, self._recorded(self.wanted))) as self.board:
            while self.queue or pool.busy:
                pool.hand_out(self.queue)
                for task, message in pool.messages():
                    self._hear(task, message, self.board)
                self.board.beat()

    def _hear(self, task: Task, message: Message, board: Board) -> None:
        if "lost" in message:
            self._lost(task, message, board)
        elif (
            "refused" in message
        ):  # what the user can mend is no fault of the worker's: said at once
            raise UserError(message["refused"])
        elif "trials" in message:
            self._lineages(task, message, board)
        elif "progress" in message:
            board.progress(task, message["progress"])
        else:
            trial = Trial(**message["trial"])
            if trial.id != task.id:
                raise UserError(
                    f"`{task.recipe.data.source}` must stay as it is while a sweep runs, but a worker read other data"
                )
            self._log(task, message, trial.status)
            self._record(task, trial, message["curve"], board)

    def _record(self, task: Task, trial: Trial, curve: Sequence[float], board: Board) -> None:
        self.store.put(trial, curve)
        self.known[trial.id] = trial.status
        board.finished(task, trial)
        if self.then:
            self.want(self.then(trial))

    def _lineages(self, task: Task, message: Message, board: Board) -> None:
        """Put on record what a population left, and that it was this one's."""
        trials = [Trial(**each["trial"]) for each in message["trials"]]
        self._log(task, message, f"{len(trials)} lineages")
        for trial, each in zip(trials, message["trials"], strict=True):
            self.store.put(trial, each["curve"])
            self.known[trial.id] = trial.status
        self.store.left(task.id, [trial.id for trial in trials])
        board.wanted([], trials[1:])
        board.finished(task, trials[0])

    def _lost(self, task: Task, message: Message, board: Board) -> None:
        """Back to the queue, made smaller when memory ran out; or on record as failed, with the last lines of the log."""
        task.tries += 1
        end = f"{message['lost']}; last words: {_last_words(message['log'])} (exit status {message['status']})"
        self._log(task, message, "lost: " + message["lost"])
        board.lost(task)
        if smaller := shrink(task, message.get("stack", 1)) if message["memory"] else "":
            end = f"out of memory: tried again {smaller}"
        elif task.tries - task.shrunk > task.recipe.engine.retries:
            said = end.replace("its worker died", f"its worker died {task.tries} times")
            self._record(task, failed(task, said), [], board)
            return
        else:
            task.most = 1
        board.say(f"trial {task.id}, try {task.tries}: {scrubbed(end)}")
        self.queue.insert(0, task)

    def _log(self, task: Task, message: dict[str, Any], end: str) -> None:
        """What a worker said while it was on this try of the trial, in `sweeps/NAME.logs/ID.log`; no file where there is nothing to say."""
        text = scrubbed(message.get("log", ""))
        if text or "lost" in message:
            folder = self.store.workbench.with_suffix(".logs")
            try:
                folder.mkdir(exist_ok=True)
                with (folder / f"{task.id}.log").open("a", encoding="utf-8") as file:
                    file.write(
                        f"{text}\n--- {lockfile.myself()['since']} try {task.tries}: {end}\n"
                    )
            except OSError as error:
                raise UserError(f"`{folder}` must be writable, but {error.strerror}") from error


def _last_words(log: str) -> str:
    return " / ".join(line.strip() for line in log.splitlines()[-LAST:]) or "none"


def _placed(task: Task, workbench: Path) -> Task:
    """With a relative `engine.runs` in the folder that has `sweeps/`, from the root: a worker may be elsewhere."""
    engine, home = task.recipe.engine, workbench.parent
    home = home.parent if home.name == "sweeps" else home
    task.recipe = task.recipe.model_copy(
        update={"engine": engine.model_copy(update={"runs": str((home / engine.runs).absolute())})}
    )
    return task
