"""Where runs report their held-out losses, and what decides that one stops or joins a stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scaletune.recipe import Recipe


@dataclass(frozen=True)
class RunControl:
    """The connection of runs in training to a search. By default nobody listens."""

    report: Callable[[str, float, float], None] = lambda id, tokens, loss: None
    """Called with trial id, tokens and held-out loss at each evaluation before the last step."""

    stop_requested: Callable[[str], bool] = lambda id: False
    """Whether the trial is to stop."""

    progress: Callable[[str, float], None] = lambda id, share: None
    """Called with trial id and share of its steps, where runs of a stack are at different steps."""

    refill: Callable[[int], Sequence[tuple[Recipe, str]]] = lambda rows: ()
    """Called with the number of rows of a stack that are free; returns points to train in them,
    each with the name of its sweep."""


UNCONTROLLED = RunControl()
"""Of runs that no search stops and no worker reports."""
