"""What the words for a run's state mean: finished, unfinished, diverged."""

from __future__ import annotations

import re

from scaletune.errors import UserError, nearest

FINISHED = (
    *("done", "finished", "complete", "completed", "success", "succeeded", "terminated"),
    *("ok", "true", "yes", "passed", "ended", "✅", "✓", "✔"),
)
"""Ray writes TERMINATED for a trial that ended as planned; the other words are of all trackers."""
UNFINISHED = (
    *("failed", "fail", "failure", "crashed", "killed", "running", "pending", "scheduled"),
    *("pruned", "timeout", "timed_out", "preempted", "preempting", "paused", "waiting", "queued"),
    *("error", "errored", "canceled", "cancelled", "aborted", "interrupted", "stopped"),
    *("out_of_memory", "oom", "node_fail", "unfinished", "restarting", "created", "initializing"),
    *("suspended", "requeued", "boot_fail", "deadline", "revoked", "unknown"),
    *("false", "no", "dead", "terminating", "incomplete", "❌", "✗", "✘"),
)
DIVERGED = ("diverged", "nan")


def read_state(word: object) -> tuple[str, str]:
    """("done", "failed" or "diverged", reason) for a tracker's word for the state of a run.

    Raises:
        UserError: The word is not known.
    """
    text = str(word).strip()
    known = text.lower().replace(" ", "_").replace("-", "_").rsplit(".", 1)[-1]
    if match := re.fullmatch(r"(cancelled|canceled)_by_\w+|(\w+)\+", known):  # Slurm's sacct
        known = next(part for part in match.groups() if part)
    if known in FINISHED:
        return "done", ""
    if known in DIVERGED:
        return "diverged", "" if known == "diverged" else f"its state is {text!r}"
    if known in UNFINISHED:
        return "failed", "" if known == "failed" else f"unfinished: its state is {text!r}"
    words = (*FINISHED, *UNFINISHED, *DIVERGED)
    raise UserError(
        f"the state of a run must be a word such as finished, crashed, running or diverged, but"
        f" got {text!r}{nearest(known, words)}: rename it, or leave these rows out with --where"
    )
