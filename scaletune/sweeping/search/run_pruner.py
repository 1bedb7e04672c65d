"""Stops trials inside their runs: one of Optuna's pruners decides from held-out losses on the way.

A pruner decides at given shares of the token budget: those of `engine.evaluate_at`, or the shares
below where the user's trainer reports at its own times. The first loss that a trial reports at a
share or after it counts there. Losses are compared with those of all other trials of the setting at
the same share, whichever of them came first: which trials are stopped therefore depends on the
order in which losses arrive. What is recorded is not decided again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scaletune.errors import UserError
from scaletune.recipe import Recipe, SearchSection
from scaletune.records import FINISHED_SHARE, Trial

if TYPE_CHECKING:
    import optuna

MEDIAN_SHARES = tuple(tenth / 10 for tenth in range(1, 10))
"""Where the median pruner decides on a user's trainer; the others at the last three rungs."""


def decision_shares(recipe: Recipe) -> list[float]:
    """The shares of the token budget at which the pruner of a recipe decides inside runs.

    Raises:
        UserError: The pruner cannot decide inside runs.
    """
    search = recipe.search
    if search.pruner == "topk":
        raise UserError(
            "pruner 'topk' needs two or more values in `axes.tokens` (it trains the best points of"
            " the lowest one on the highest one): use median, halving or hyperband with one"
        )
    if not recipe.has_budget:
        raise UserError(
            f"pruner {search.pruner!r} needs `budget.tokens`, because it compares trials at equal"
            " shares of it"
        )
    shares = sorted({share for share in recipe.engine.evaluate_at if 0 < share < FINISHED_SHARE})
    if not shares and not recipe.foreign:
        raise UserError(
            f"pruner {search.pruner!r} decides at evaluations on the way, so `engine.evaluate_at`"
            " must name shares of the token budget, for example [0.25, 0.5], but got"
            f" {recipe.engine.evaluate_at}"
        )
    rungs = tuple(search.reduction**-k for k in (3, 2, 1))
    return shares or list(MEDIAN_SHARES if search.pruner == "median" else rungs)


class RunPruner:
    """Decides which trials of one setting to stop.

    Args:
        study: The study that has the pruner.
        search: Its settings.
        shares: Where it decides, ascending.
        tokens: The token budget of a trial.
    """

    def __init__(
        self, study: optuna.Study, search: SearchSection, shares: Sequence[float], tokens: float
    ):
        self.study, self.search, self.shares, self.tokens = study, search, shares, tokens
        self.trials: list[optuna.Trial] = []  # of the current wave, in its order
        self.passed: list[set[float]] = []  # the shares at which each has a loss
        self.stopped: set[int] = set()  # their indices
        self.n_losses = 0  # losses on the way, of all waves

    def start_wave(self, trials: Sequence[optuna.Trial]) -> None:
        """The trials that are trained next."""
        self.trials, self.passed, self.stopped = list(trials), [set() for _ in trials], set()

    def add_loss(self, index: int, tokens: float, loss: float) -> bool:
        """Adds a held-out loss of a trial of the wave; whether the trial is to stop."""
        share = tokens / self.tokens
        at = max((each for each in self.shares if each <= share * (1 + 1e-9)), default=0.0)
        if at and share < FINISHED_SHARE and at not in self.passed[index]:
            self.n_losses += 1
            self.trials[index].report(loss, self.search.reduction ** len(self.passed[index]))
            self.passed[index].add(at)
            if index not in self.stopped and self.trials[index].should_prune():
                self.stopped.add(index)
        return index in self.stopped

    def add_record(self, index: int, trial: Trial) -> None:
        """Adds the losses of a recorded trial that are not known yet."""
        for tokens, loss in trial.metrics.get("held_out", []):
            if tokens is not None:
                self.add_loss(index, tokens, loss)
