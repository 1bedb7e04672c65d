"""Shows a running sweep: a live table on a terminal, otherwise a line every 30 s.

Also writes the driver's heartbeat, which `scaletune status` reads, into the database.
"""

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
from scaletune.sweeping.status import COUNTED, SHAPE, best_of, format_line, format_table
from scaletune.sweeping.task import Task

BEAT = 1.0  # seconds between heartbeats
DRAW = 0.2  # seconds between updates of the table
LINE = 30.0  # seconds between lines where there is no terminal


@dataclass
class RunningTrial:
    """A trial in training."""

    task: Task
    share: float = 0.0
    """Share of the training done."""
    began: float = field(default_factory=lambda: time.monotonic())

    def row(self, now: float) -> dict[str, Any]:
        recipe = self.task.recipe
        shape = {
            "width": recipe.model.width,
            "depth": recipe.model.depth,
            "tokens": recipe.budget.tokens if recipe.has_budget else None,
            "batch_tokens": recipe.budget.batch_tokens if recipe.has_budget else None,
            "lr": recipe.optimizer.lr if recipe.states("optimizer.lr") else None,
            "seed": recipe.seed,
        }
        assert tuple(shape) == SHAPE
        return {
            "id": self.task.id,
            **shape,
            "share": self.share,
            "seconds": round(now - self.began, 1),
            "try": self.task.tries + 1,
        }


class SweepProgress:
    """The progress of a driver: its queue, the trials in training and the recorded ones."""

    def __init__(self, store: Store, queue: Sequence[Task], recorded: Sequence[Trial]):
        self.store, self.driver = store, lockfile.this_process()
        self.began = self.last_shown = time.monotonic()
        self.last_beat = 0.0
        self.cost, self.cost_done = 0.0, 0.0  # estimated seconds of this driver's work
        self.running: dict[str, RunningTrial] = {}
        self.n_wanted, self.counts, self.seconds = 0, dict.fromkeys(COUNTED, 0), 0.0
        self.best: dict[str, Any] | None = None
        self.terminal, self.drawn_lines = sys.stderr.isatty(), 0
        self.add(queue, recorded)

    def add(self, new: Sequence[Task], recorded: Sequence[Trial]) -> None:
        """Adds trials: those to be trained, and those that are recorded."""
        self.cost += sum(task.cost for task in new)
        self.n_wanted += len(new) + len(recorded)
        for trial in recorded:
            self._count(trial)

    def _count(self, trial: Trial) -> None:
        self.counts[trial.status] += 1
        self.seconds += trial.seconds or 0.0
        if trial.loss is not None and (self.best is None or trial.loss < self.best["loss"]):
            self.best = best_of([trial])

    def update(self, task: Task, share: float) -> None:
        """Sets the share of a trial's training that is done."""
        self.running.setdefault(task.id, RunningTrial(task)).share = share

    def requeue(self, task: Task) -> None:
        """Removes a lost trial, which is back in the queue."""
        self.running.pop(task.id, None)

    def finish(self, task: Task, trial: Trial) -> None:
        """Counts a trial that is recorded now."""
        self.running.pop(task.id, None)
        self.cost_done += task.cost
        self._count(trial)

    def snapshot(self) -> dict[str, Any]:
        """The state of this driver's trials, with the keys of `status`."""
        now = time.monotonic()
        in_training = sum(running.share * running.task.cost for running in self.running.values())
        share = min(1.0, (self.cost_done + in_training) / self.cost) if self.cost else 1.0
        elapsed = now - self.began
        return {
            "sweep": self.store.database.stem,
            "driver": self.driver,
            "beat": time.time(),
            "wanted": self.n_wanted,
            **self.counts,
            "running": [running.row(now) for running in self.running.values()],
            "best": self.best,
            "seconds": round(self.seconds, 3),
            "share": share,
            "elapsed": round(elapsed, 1),
            "left": round(elapsed / share - elapsed, 1) if share else None,
        }

    def refresh(self) -> None:
        """Writes the heartbeat and shows the progress when each is due."""
        now = time.monotonic()
        if now - self.last_beat > BEAT:
            self.last_beat = now
            self.store.write_progress(self.snapshot())
        if now - self.last_shown > (DRAW if self.terminal else LINE):
            self.last_shown = now
            self._show()

    def print_line(self, text: str) -> None:
        """Prints a line that stays above the table."""
        self._erase()
        print(text, file=sys.stderr, flush=True)
        if self.terminal:
            self._show()

    def _show(self) -> None:
        if not self.terminal:
            print(format_line(self.snapshot()), file=sys.stderr, flush=True)
            return
        self._erase()
        columns, rows = _terminal_size()
        # Cut: a line that wraps would need two lines to be erased.
        lines = [line[: columns - 1] for line in format_table(self.snapshot())][: rows - 1]
        print("\n".join(lines), file=sys.stderr, flush=True)
        self.drawn_lines = len(lines)

    def _erase(self) -> None:
        if self.drawn_lines:
            print(f"\x1b[{self.drawn_lines}F\x1b[J", end="", file=sys.stderr)
        self.drawn_lines = 0

    def close(self) -> None:
        """Shows the final state, and writes that the sweep has no driver."""
        self._show()
        self.store.write_progress(self.snapshot() | {"driver": None, "running": []})


def _terminal_size() -> os.terminal_size:
    """Columns and rows of the terminal of standard error; standard output may be a file."""
    try:
        return os.get_terminal_size(sys.stderr.fileno())
    except OSError:
        return shutil.get_terminal_size()
