"""How far a search is whose trials are handed out, as numbers and as one line."""

from __future__ import annotations

from dataclasses import dataclass

from scaletune.sweeping.status import format_clock


@dataclass(frozen=True)
class SearchState:
    """How many trials of a search are in which state."""

    recorded: int
    """Trials with a result."""
    available: int
    """Trials that `ask` hands out now."""
    waiting: int
    """Trials that are handed out and have no result."""
    failed: int
    """Trials that have failed: `ask` hands them out again with `again`."""
    longest: float | None
    """Seconds since the first of the waiting trials was handed out."""

    @property
    def finished(self) -> bool:
        """Whether the search wants nothing more."""
        return not (self.available or self.waiting or self.failed)

    def sentence(self) -> str:
        """The state as one line."""
        results = "1 result" if self.recorded == 1 else f"{self.recorded} results"
        if self.finished:
            return f"finished: {results}"
        parts = [results]
        if self.waiting:
            clock = format_clock(self.longest)
            parts.append(f"{self.waiting} handed out without a result (the oldest {clock} ago)")
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.available:
            parts.append(f"{self.available} more can be handed out now")
        return ", ".join(parts)
