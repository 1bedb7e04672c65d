"""Runs one trial of the user's trainer: starts it, reads its reports, stops it."""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import IO, Any

from scaletune.recipe import Recipe
from scaletune.sweeping.out_of_memory import kernel_kills
from scaletune.sweeping.trainers.guard import End, GuardedProcess
from scaletune.sweeping.trainers.outcome import Ended, describe_message, lost_message
from scaletune.sweeping.trainers.output_lines import OutputLines
from scaletune.sweeping.trainers.reports import Reports
from scaletune.sweeping.trainers.results_file import ResultsFile
from scaletune.sweeping.trainers.start import Train, entry_point, prepare_folder, trial_files
from scaletune.sweeping.trainers.trial_files import TrialFiles, hold_folder

LOOK = 0.2  # seconds between looks at the results
BEAT = 0.5  # seconds between progress messages
REST = 2.0  # seconds in which the output of an ended trial is read
BURST, PAUSE = 1000, 0.05  # so many held-out losses are sent at once; then one in so many seconds
CHUNK = 1 << 16
WRITTEN = 8 << 20  # bytes of a try's output that are written to output.log
TAIL = 1 << 14  # bytes of the end of the output that go to the driver

Send = Callable[[dict[str, Any]], None]


def run_own_trial(
    recipe: Recipe,
    id: str,
    send: Send,
    stop_requested: Callable[[], bool] = lambda: False,
    train: Train | None = None,
) -> dict[str, Any]:
    """Runs a trial to its end.

    Args:
        recipe: A point whose `trainer` has a command or function.
        id: The trial's id.
        send: Called with {"progress": share} several times a second, and with {"report": ...}.
        stop_requested: Whether a search wants the trial to stop.
        train: The function itself, where it cannot be imported by its name.

    Returns:
        A message for the driver: {"trial": ...}, or {"lost": ...} if it should be tried again.

    Raises:
        UserError: The trial cannot be started.
    """
    files = trial_files(recipe, id)
    with hold_folder(files) as held:
        if not held:
            return lost_message(id, f"another process trains it: `{files.lock}` is locked")
        values = prepare_folder(recipe, id, files)
        run = entry_point(recipe, files, values, train)
        with closing(Supervisor(recipe, id, files, send, stop_requested, run)) as supervisor:
            ended = supervisor.watch()
    return describe_message(recipe, id, ended, values)


@dataclass
class Supervisor:
    """Watches the process of one trial."""

    recipe: Recipe
    id: str
    files: TrialFiles
    send: Send
    stop_requested: Callable[[], bool]
    run: Callable[[], int]
    stopping: str = ""
    """Why the trial is being stopped: "search", "diverged" or "silent"."""
    deadline: float = float("inf")
    """When the next, harder request to stop is due, by the monotonic clock."""
    terminated: bool = False
    tail: bytes = b""
    written: int = 0
    reports: Reports = field(init=False)

    def __post_init__(self) -> None:
        self.last_progress = time.monotonic()
        batch = self.recipe.budget.batch_tokens if self.recipe.has_budget else None
        self.reports = Reports(batch)
        self.results = ResultsFile(self.files.results, self.reports.begin_try)
        self.lines = OutputLines(self.recipe.trainer.pattern)
        self._add_results()  # of the try that is resumed
        self.reports.begin_try()
        self.sent, self.last_sent = 0, 0.0
        for point in self.reports.held_out.points:  # a search that starts again needs them
            self._notice(point)
        self.kills, self.began = kernel_kills(), time.monotonic()
        self.last_sign = self.began
        self.log: IO[bytes] = self.files.open_log()
        self.process = GuardedProcess(self.run, str(self.files.trial))

    def close(self) -> None:
        self.process.close()
        self.results.close()
        with suppress(OSError):  # a full disk
            self.log.close()

    def watch(self) -> Ended:
        """Waits for the end of the process; returns all that is known of it."""
        output = [self.process.output]
        while (end := self.process.poll()) is None:
            ready = select.select([self.process.fileno(), *output], [], [], LOOK)[0]
            if self.process.output in ready and not self._read_output():
                output = []
            self._read_results()
            self._send_progress()
            self._stop_if_due()
        self._read_rest()
        return self._ended(end)

    def _ended(self, end: End) -> Ended:
        return Ended(
            end=end,
            reports=self.reports,
            stopping=self.stopping,
            seconds=time.monotonic() - self.began,
            output=self.tail.decode(errors="replace"),
            kernel_killed=kernel_kills() > self.kills,
        )

    def _read_output(self) -> bool:
        """Reads what the trial has printed; False at the end of its output."""
        try:
            new = os.read(self.process.output, CHUNK)
        except BlockingIOError:
            return True
        if new:
            self.last_sign = time.monotonic()
            self.tail = (self.tail + new)[-TAIL:]
            self._write_log(new[: max(0, WRITTEN - self.written)])
            self.written += len(new)
            for row in self.lines.feed(new):
                self._notice(self.reports.add(row))
        return bool(new)

    def _write_log(self, text: bytes) -> None:
        with suppress(OSError):  # a full disk must not end the trial
            self.log.write(text)

    def _read_results(self) -> None:
        for line in self.results.read():
            self.last_sign = time.monotonic()
            self._notice(self.reports.add_line(line))

    def _add_results(self) -> None:
        """Adds all that is in the results file now."""
        while True:
            for line in self.results.read():
                self.reports.add_line(line)
            if not self.results.behind:
                return
            self._send_progress()

    def _notice(self, point: list[float] | None) -> None:
        """Passes a new [tokens, loss] on to the driver; not each one of a flood."""
        now = time.monotonic()
        if point is None or not math.isfinite(point[1]):
            return
        if self.sent < BURST or now - self.last_sent > PAUSE:
            self.sent, self.last_sent = self.sent + 1, now
            self.send({"id": self.id, "report": {"tokens": point[0], "loss": point[1]}})

    def _read_rest(self) -> None:
        """Reads what is left of output and results after the end of the process."""
        end = time.monotonic() + REST  # a process that could not be killed may print for ever
        with suppress(OSError):
            while select.select([self.process.output], [], [], 0)[0] and time.monotonic() < end:
                if not self._read_output():
                    break
        for row in self.lines.rest():
            self.reports.add(row)
        self._add_results()
        for line in self.results.rest():
            self.reports.add_line(line)
        if self.written > WRITTEN:
            self._write_log(b"\n... %d bytes are left out ...\n" % (self.written - WRITTEN))
            self._write_log(self.tail)

    def _send_progress(self) -> None:
        now = time.monotonic()
        if now - self.last_progress >= BEAT:
            self.last_progress = now
            tokens = self.reports.tokens or 0.0
            share = tokens / self.recipe.budget.tokens if self.recipe.has_budget else 0.0
            self.send({"id": self.id, "progress": min(max(share, 0.0), 1.0)})

    def _stop_if_due(self) -> None:
        """Asks the trial to stop, and ends it if it does not."""
        now, grace = time.monotonic(), self.recipe.trainer.grace
        if not self.stopping:
            self.stopping = self._reason_to_stop(now)
            if self.stopping == "silent":
                self.process.kill()
            elif self.stopping:
                with suppress(OSError):  # the trainer has deleted its folder
                    self.files.stop.touch()
                self.deadline = now + grace
        elif now > self.deadline:
            self.process.kill() if self.terminated else self.process.terminate()
            self.terminated, self.deadline = True, now + grace

    def _reason_to_stop(self, now: float) -> str:
        if self.reports.not_finite:
            return "diverged"
        if self.stop_requested():
            return "search"
        return "silent" if now - self.last_sign > self.recipe.engine.patience else ""
