"""Reads the runs in one text log: the lines of a program, restarts, and how the log ends."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from scaletune.importing.log_formats import LogFormat, find_format
from scaletune.importing.names import is_lr
from scaletune.importing.run import ImportedRun, Setting, to_number
from scaletune.records import FINISHED_SHARE

LR_PRECISION = 0.02  # a printed lr may be rounded by this share of its peak
MAX_LINES_BETWEEN = 100_000  # lines without metrics that are kept to look for settings

RESUMED = (
    "a training that was started again is one run; of steps that were printed twice, the later"
    " values count"
)
BESIDE = "write `{}` into a config.json beside the log, in a folder of its own for each run"

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_RANK = re.compile(
    r"^\[(?:rank|default|\d+,)?(\d+)\](?:<std\w+>)?:? ?|^(?:rank)?(\d+):(?: |(?=\D))"
)
_TIME = re.compile(
    r"^\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?\]?(?:Z| UTC)?(?:: | - |,? |$)"
)
_FAILURE = re.compile(
    r"Traceback \(most recent call last\)|CUDA out of memory|OutOfMemoryError|DUE TO TIME LIMIT"
    r"|slurmstepd: error|srun: error|oom-kill|^Killed\b|Signal \d+ \(SIG|Segmentation fault"
    r"|ChildFailedError|DUE TO PREEMPTION|CANCELLED AT|NCCL error|Bus error|core dumped"
)
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b")
_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_NAMES = {
    "optim/LR (group 0)": "lr",
    "optim/LR": "lr",
    "optim/learning_rate_group0": "lr",
    "train/CE loss": "train_loss",
    "train/CrossEntropyLoss": "train_loss",
}


@dataclass
class LogSegment:
    """The lines that one start of the program printed."""

    log_format: LogFormat
    run: ImportedRun
    first: int = -1
    """First step with metrics."""

    interval: int = 0
    """Steps from the first logged step to the next."""

    last: int = -1
    rank: str = ""
    plan: int | None = None
    failure: str = ""
    """Line of an error after the last step."""

    is_complete: bool = False
    """Whether the program printed that it made all steps."""

    lr_rounding: float = 0.0
    """Largest rounding error of a printed learning rate."""

    between: list[tuple[str, str]] = field(default_factory=list)
    """(rank, line) without metrics since the last step."""

    saw_header: bool = False
    """Whether `between` has a line that is printed at a start."""

    def starts_late(self) -> bool:
        """Whether the first step is not that of a run from scratch: it was resumed."""
        return self.first > max(1, self.interval)

    def stopped_early(self) -> bool:
        """Whether the log shows that the planned steps were not made."""
        if self.plan:
            return self.last < FINISHED_SHARE * self.plan and not self.is_complete
        return bool(self.failure)


def read_segments(lines: Iterable[str]) -> list[LogSegment]:
    """The starts of a program in a log, in order. Empty if no line has a known format."""
    segments: list[LogSegment] = []
    head: list[tuple[str, str]] = []
    for raw in lines:
        rank, line = strip_prefix(raw)
        if not segments:
            log_format = find_format(line)
            if log_format is None:
                head.append((rank, line))
                continue
            segments.append(_start(log_format, head))
        _read_line(segments, rank, line)
    return [segment for segment in segments if segment.last >= 0]


def strip_prefix(raw: str) -> tuple[str, str]:
    """(rank, line) without colours, the rank's prefix and a time stamp."""
    line = raw.rstrip()
    if "\x1b" in line:
        line = _ANSI.sub("", line)
    rank = ""
    if line[:1] in "[0123456789rd":
        if match := _RANK.match(line):
            rank, line = match[1] or match[2], line[match.end() :]
        if match := _TIME.match(line):
            line = line[match.end() :]
    return rank, line


def _start(log_format: LogFormat, header: list[tuple[str, str]]) -> LogSegment:
    """A new segment with the settings of its header, in which ranks may print alternately."""
    ordered = sorted(header, key=lambda entry: int(entry[0] or -1))
    settings = dict(log_format.read_settings([line for _, line in ordered]))
    return LogSegment(log_format, ImportedRun("", config=settings))


def _read_line(segments: list[LogSegment], rank: str, line: str) -> None:
    segment = segments[-1]
    log_format = segment.log_format
    if any(hint in line for hint in log_format.hints):
        for pattern in log_format.lines:
            if match := pattern.search(line):
                _read_match(segments, rank, line, match)
                return
    if len(segment.between) < MAX_LINES_BETWEEN:
        segment.between.append((rank, line))
    if log_format.header.search(line):
        segment.saw_header = True
    elif log_format.end and log_format.end in line:
        segment.is_complete = True
    elif segment.failure.startswith("Traceback") and _EXCEPTION.match(line):
        segment.failure = line
    elif _FAILURE.search(line):
        segment.failure = segment.failure or line


def _read_match(segments: list[LogSegment], rank: str, line: str, match: re.Match[str]) -> None:
    """Adds the metrics of a line, after a new segment if the program was started again."""
    groups = match.groupdict()
    segment = segments[-1]
    step = _integer(groups.pop("step", None))
    plan = _integer(groups.pop("plan", None))
    if step is not None:
        if rank != segment.rank and 0 <= step <= segment.last and not segment.saw_header:
            return  # another rank prints the same steps
        if _is_restart(segment, step):
            segments.append(_start(segment.log_format, segment.between))
            segment = segments[-1]
        _advance(segment, step, rank)
        segment.plan = plan or segment.plan
    elif segment.last < 0 or segment.saw_header:
        return  # evaluated before the first step
    _add_metrics(segment, groups, line, is_first=match.re is segment.log_format.lines[0])


def _is_restart(segment: LogSegment, step: int) -> bool:
    if segment.first < 0:
        return False
    if segment.saw_header:
        return True
    if step >= segment.last:
        return False
    return segment.log_format.is_ordered or bool(segment.failure) or step <= segment.first


def _advance(segment: LogSegment, step: int, rank: str) -> None:
    if segment.first < 0:
        segment.first = step
    elif not segment.interval and step > segment.first:
        segment.interval = step - segment.first
    segment.last, segment.rank = max(step, segment.last), rank
    segment.failure, segment.saw_header = "", False
    segment.between.clear()


def _add_metrics(
    segment: LogSegment, groups: dict[str, str | None], line: str, is_first: bool
) -> None:
    step = segment.last
    key, value = groups.pop("key", None), groups.pop("value", None)
    if key is not None:
        groups[_NAMES.get(key, key)] = value
    for name, pattern in segment.log_format.more.items() if is_first else ():
        if match := pattern.search(line):
            groups[name] = match[1]
    if groups.get("nan_iterations") not in (None, "0") and "train_loss" not in groups:
        groups["train_loss"] = "nan"  # Megatron-LM leaves out an average that is not a number
    for name, text in groups.items():
        if text is not None:
            segment.run.history.setdefault(name, []).append((step, _number(text)))
            if name == "lr":
                segment.lr_rounding = max(segment.lr_rounding, _rounding(text))


def _integer(text: str | None) -> int | None:
    digits = (text or "").replace(",", "")
    return int(digits) if digits.isdigit() else None


def _number(text: str) -> float:
    factor = _SUFFIXES.get(text[-1], 1.0) if text[-1] in _SUFFIXES else 1.0
    return factor * float(text.rstrip("KMBTPE").replace(",", ""))


def _rounding(text: str) -> float:
    """Half a unit of the last printed digit."""
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 0.5 * 10.0 ** (int(exponent or 0) - decimals) if mantissa[-1:].isdigit() else 0.0


# --- segments to runs -----------------------------------------------------------------------------


def join_segments(segments: Iterable[LogSegment]) -> list[LogSegment]:
    """Segments as runs: one that resumed or replaced an earlier one is merged into it."""
    runs: list[LogSegment] = []
    for segment in segments:
        if runs and _continues(runs[-1], segment):
            _merge(runs[-1], segment)
        else:
            runs.append(segment)
    return runs


def _continues(before: LogSegment, segment: LogSegment) -> bool:
    if segment.starts_late():
        return True
    same = segment.run.config == before.run.config and bool(segment.run.config)
    return same and before.stopped_early()


def _merge(before: LogSegment, later: LogSegment) -> None:
    lrs = [
        segment.run.config.get("lr", segment.run.config.get("learning_rate"))
        for segment in (before, later)
    ]
    if not later.starts_late():  # from scratch: nothing of the earlier start counts
        before.run.history, before.interval, before.first = {}, later.interval, later.first
        before.lr_rounding = 0.0
    before.run.merge(later.run)
    before.run.notes = [RESUMED]
    before.last = max(later.last, max((s for s, _ in _points(before.run)), default=0))
    before.plan, before.failure = later.plan or before.plan, later.failure
    before.is_complete = later.is_complete
    before.lr_rounding = max(before.lr_rounding, later.lr_rounding)
    if None not in lrs and lrs[0] != lrs[1]:
        before.failure = f"it was resumed with another learning rate: {lrs[0]}, then {lrs[1]}"
        before.plan = None


def _points(run: ImportedRun) -> Iterable[tuple[int, float]]:
    return (points[-1] for points in run.history.values() if points)


def finish_run(segment: LogSegment) -> ImportedRun:
    """The run of a segment, with its plan, the step it reached, and its status."""
    run = segment.run
    last = segment.plan if segment.is_complete and segment.plan else segment.last
    if segment.is_complete and (plan := run.config.get("total_steps")):
        last = int(float(plan))
    run.history["iteration"] = [(segment.last, float(last))]
    if segment.plan:
        run.config["total_steps"] = segment.plan
    if segment.failure:
        run.status, run.message = "failed", f"its log ends with: {_shorten(segment.failure)}"
    _check_lr(segment)
    _note_size(segment)
    return run


def _shorten(line: str) -> str:
    text = " ".join(line.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_lr(segment: LogSegment) -> None:
    """Takes out logged learning rates that do not show the peak."""
    run = segment.run
    points = run.history.get("lr", [])
    peak = max((value for _, value in points if math.isfinite(value)), default=0.0)
    if _has_lr(run.config):
        return
    if not points:
        reason = f"{segment.log_format.program} printed no learning rate in the log"
    elif segment.starts_late():
        reason = f"the log starts at step {segment.first}, where the lr may have decayed"
    elif segment.lr_rounding > LR_PRECISION * peak:
        reason = f"the log prints the lr rounded to {2 * segment.lr_rounding:.2g}"
    else:
        return
    run.history.pop("lr", None)
    run.absent["lr"] = f"{reason}; {BESIDE.format('lr')}"


def _has_lr(config: dict[str, Setting]) -> bool:
    return any(is_lr(name) and to_number(value) for name, value in config.items())


def _note_size(segment: LogSegment) -> None:
    run, program = segment.run, segment.log_format.program
    if {"n_params", "n_params_total"} <= run.config.keys():
        run.notes.append(
            f"`n_params` is the total that {program} prints, without its embeddings and readout"
        )
    elif not run.config.keys() & {"n_params", "n_params_total"}:
        run.absent["n_params"] = (
            f"{program} printed no number of parameters in the log; {BESIDE.format('n_params')}"
        )
