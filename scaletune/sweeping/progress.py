"""What the user sees of a running sweep: a live table on a terminal, else a line now and then; and the heartbeat in the store."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scaletune.records import Store, Trial
from scaletune.sweeping import lockfile
from scaletune.sweeping.status import COUNTED, SHAPE, best_of, line, table
from scaletune.sweeping.task import Task

BEAT = 1.0  # seconds between heartbeats
DRAW = 0.2  # between drawings of the table
SAY = 30.0  # between lines where there is no terminal


@dataclass
class Running:
    """A trial under way."""

    task: Task
    share: float = 0.0  # done
    began: float = field(default_factory=lambda: time.monotonic())

    def row(self, now: float) -> dict[str, Any]:
        recipe = self.task.recipe
        shape = {
            "width": recipe.model.width, "depth": recipe.model.depth, "tokens": recipe.budget.tokens,
            "batch_tokens": recipe.budget.batch_tokens, "lr": recipe.optimizer.lr, "seed": recipe.seed,
        }  # fmt: skip
        assert tuple(shape) == SHAPE
        return {
            "id": self.task.id,
            **shape,
            "share": self.share,
            "seconds": round(now - self.began, 1),
            "try": self.task.tries + 1,
        }


class Board:
    """The standing of a sweep whose driver is at `queue`; the other trials it wants are on record."""

    def __init__(self, store: Store, queue: Sequence[Task], recorded: Sequence[Trial]):
        self.store, self.me = store, lockfile.myself()
        self.began, self.beaten, self.shown = time.monotonic(), 0.0, time.monotonic()
        self.cost, self.gained = 0.0, 0.0  # guessed seconds, of this driver's own work
        self.running: dict[str, Running] = {}
        self.n_wanted, self.counts, self.seconds = 0, dict.fromkeys(COUNTED, 0), 0.0
        self.best: dict[str, Any] | None = None
        self.terminal, self.drawn = sys.stderr.isatty(), 0  # lines of the table on the screen
        self.wanted(queue, recorded)

    def wanted(self, new: Sequence[Task], recorded: Sequence[Trial]) -> None:
        """More trials: to be trained, and on record."""
        self.cost += sum(task.cost for task in new)
        self.n_wanted += len(new) + len(recorded)
        for trial in recorded:
            self._count(trial)

    def _count(self, trial: Trial) -> None:
        self.counts[trial.status] += 1
        self.seconds += trial.seconds
        if trial.loss is not None and (self.best is None or trial.loss < self.best["loss"]):
            self.best = best_of([trial])

    def progress(self, task: Task, share: float) -> None:
        self.running.setdefault(task.id, Running(task)).share = share

    def lost(self, task: Task) -> None:
        """Not under way any more: back in the queue."""
        self.running.pop(task.id, None)

    def finished(self, task: Task, trial: Trial) -> None:
        self.running.pop(task.id, None)
        self.gained += task.cost
        self._count(trial)

    def standing(self) -> dict[str, Any]:
        """As `status` gives it, of the trials that this driver wants."""
        now = time.monotonic()
        under_way = sum(running.share * running.task.cost for running in self.running.values())
        share = min(1.0, (self.gained + under_way) / self.cost) if self.cost else 1.0
        elapsed = now - self.began
        return {
            "sweep": self.store.workbench.stem, "driver": self.me, "beat": time.time(), "wanted": self.n_wanted, **self.counts,
            "running": [running.row(now) for running in self.running.values()], "best": self.best, "seconds": round(self.seconds, 3),
            "share": share, "elapsed": round(elapsed, 1), "left": round(elapsed / share - elapsed, 1) if share else None,
        }  # fmt: skip

    def beat(self) -> None:
        """Say where it stands, to the store and to the user, when it is time."""
        now = time.monotonic()
        if now - self.beaten > BEAT:
            self.beaten = now
            self.store.tell(self.standing())
        if now - self.shown > (DRAW if self.terminal else SAY):
            self.shown = now
            self._show()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._wipe()
        print(text, file=sys.stderr, flush=True)
        if self.terminal:
            self._show()

    def _show(self) -> None:
        if not self.terminal:
            print(line(self.standing()), file=sys.stderr, flush=True)
            return
        self._wipe()
        wide, high = _size()
        rows = [row[: wide - 1] for row in table(self.standing())][
            : high - 1
        ]  # a row that wraps would be two to wipe
        print("\n".join(rows), file=sys.stderr, flush=True)
        self.drawn = len(rows)

    def _wipe(self) -> None:
        if self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="", file=sys.stderr)
        self.drawn = 0

    def close(self) -> None:
        """The last word, and no driver any more."""
        self._show()
        self.store.tell(self.standing() | {"driver": None, "running": []})


def _size() -> os.terminal_size:
    """Columns and rows of the terminal we draw on: standard output may be a file."""
    try:
        return os.get_terminal_size(sys.stderr.fileno())
    except OSError:
        return shutil.get_terminal_size()
