"""Optuna's samplers and pruners by ask and tell: of indices into the cell's grid, each wave told in the order it was asked.

A pruner's rungs are the token horizons, each a trial of its own: a run cut short is not a run of a shorter schedule. A trial that goes on
is trained at the next horizon; one that is pruned is not. A pruner decides by its rung's own losses, and brackets are dealt as if there
were `RUNGS` rungs: so with samplers that do not learn (qmc, random) a longer horizon changes no decision below it, and raising the
largest budget trains what is new and nothing else. "topk" prunes nothing by the way: the baseline that trains all at the first horizon
and the best of them at the last.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scaletune.errors import UserError
from scaletune.recipe import Search
from scaletune.sweeping.search.space import Cell, Point, Waves, lowest

if TYPE_CHECKING:
    import optuna

WORSE = 1.35  # a diverged trial is told as so many times the largest loss
RUNGS = 8  # at least so many decide Hyperband's brackets
STALE = 20  # asks in a row that bring nothing new end a search


def _optuna() -> Any:
    try:
        import cmaes  # noqa: F401 (Optuna asks for it only when its CMA-ES first samples)
        import optuna
    except ImportError:
        raise UserError(
            "search.kind 'optuna' needs Optuna and cmaes: pip install 'scaletune[search]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _sampler(asked: Search) -> optuna.samplers.BaseSampler:
    samplers, seed = _optuna().samplers, asked.seed
    make = {
        "tpe": lambda: samplers.TPESampler(seed=seed),
        "gp": lambda: samplers.GPSampler(seed=seed),
        "cmaes": lambda: samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
        "qmc": lambda: samplers.QMCSampler(
            seed=seed, warn_independent_sampling=False, warn_asynchronous_seeding=False
        ),
        "random": lambda: samplers.RandomSampler(seed=seed),
    }
    return make[asked.sampler]()


def _median() -> optuna.pruners.BasePruner:
    """Prunes what is above the median of four or more that have been at its rung; Optuna's own asks complete trials alone."""

    class Median(_optuna().pruners.BasePruner):  # type: ignore[misc]  # the library is imported late
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            step = max(trial.intermediate_values)
            others = [
                t.intermediate_values[step]
                for t in study.trials
                if t.number < trial.number and step in t.intermediate_values
            ]
            return len(others) >= 4 and trial.intermediate_values[step] > float(np.median(others))

    return Median()


def _pruner(asked: Search, n_rungs: int) -> optuna.pruners.BasePruner:
    pruners, by = _optuna().pruners, asked.reduction
    most = by ** (max(n_rungs, RUNGS) - 1)
    make = {
        "none": pruners.NopPruner,
        "topk": pruners.NopPruner,
        "median": _median,
        "halving": lambda: pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=by),
        "hyperband": lambda: pruners.HyperbandPruner(
            min_resource=1, max_resource=most, reduction_factor=by
        ),
    }
    return make[asked.pruner]()


def _study(asked: Search, n_rungs: int) -> optuna.Study:
    """Minimises; the name is fixed because Hyperband deals trials to its brackets by it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", _optuna().exceptions.ExperimentalWarning)
        return _optuna().create_study(
            study_name="scaletune", sampler=_sampler(asked), pruner=_pruner(asked, n_rungs)
        )


def _wider(study: optuna.Study, asked: Search, cell: Cell, origin: Point) -> optuna.Study:
    """A new study over the grown ranges that knows the old one's trials."""
    optuna = _optuna()
    distributions = {
        path: optuna.distributions.IntDistribution(*ends)
        for path, ends in _ranges(cell, origin).items()
    }
    made = _study(asked, len(cell.rungs))
    made.add_trials(
        [
            optuna.trial.create_trial(params=t.params, value=t.value, distributions=distributions)
            for t in study.trials
        ]
    )
    return made


def _ranges(cell: Cell, origin: Point) -> dict[str, tuple[int, int]]:
    """Lowest and highest index of each searched axis, counted from where it first began: growth does not renumber."""
    lows = [-values.index(first) for values, first in zip(cell.axes, origin, strict=True)]
    return {
        path: (low, low + len(values) - 1)
        for path, low, values in zip(cell.paths, lows, cell.axes, strict=True)
    }


def _suggested(trial: optuna.Trial, cell: Cell, origin: Point) -> Point:
    ranges = _ranges(cell, origin).items()
    return tuple(
        values[trial.suggest_int(path, *ends) - ends[0]]
        for (path, ends), values in zip(ranges, cell.axes, strict=True)
    )


def sampled(cell: Cell, asked: Search) -> Waves:
    """One cell: until the sampler has asked for `budget` different points, each trained at the first horizon and as far as the pruner lets it."""
    assert asked.budget
    study, origin = _study(asked, len(cell.rungs)), tuple(values[0] for values in cell.axes)
    seen: dict[Point, float] = {}
    stale = 0
    while len(seen) < min(asked.budget, len(cell.points)) and stale < STALE:
        wave = [study.ask() for _ in range(min(asked.wave, asked.budget - len(seen)))]
        points = {trial.number: _suggested(trial, cell, origin) for trial in wave}
        stale = 0 if set(points.values()) - seen.keys() else stale + 1
        first = yield from _climbed(cell, study, wave, points, asked)
        seen |= {points[number]: loss for number, loss in first.items()}
        best = (
            lowest(seen) if not cell.rungs and 2 * len(seen) >= asked.budget > len(seen) else None
        )
        if best and cell.grow(best):
            study = _wider(study, asked, cell, origin)
    if asked.pruner == "topk":
        yield [(cell, point, cell.rungs[-1]) for point in _top(seen, asked.reduction)]
    cell.spent(seen)


def _top(seen: Mapping[Point, float], reduction: int) -> list[Point]:
    """One in `reduction` of the points, rounded up, of the lowest losses; none that diverged."""
    finite = [point for point, loss in seen.items() if math.isfinite(loss)]
    return sorted(finite, key=lambda point: seen[point])[: math.ceil(len(seen) / reduction)]


def _climbed(
    cell: Cell,
    study: optuna.Study,
    wave: list[optuna.Trial],
    points: Mapping[int, Point],
    asked: Search,
) -> Generator[list[tuple[Cell, Point, int | None]], list[float], dict[int, float]]:
    """Train a wave rung by rung, telling the study of those that are pruned and of those that reach the last; losses at the first rung."""
    rungs: list[int | None] = [*cell.rungs[: 1 if asked.pruner == "topk" else None]] or [None]
    first: dict[int, float] = {}
    for step, rung in enumerate(rungs):
        losses = yield [(cell, points[trial.number], rung) for trial in wave]
        first = first or {trial.number: loss for trial, loss in zip(wave, losses, strict=True)}
        values = _finite(losses, study)
        for trial, value in zip(wave, values, strict=True):
            trial.report(value, asked.reduction**step)
        over = [
            rung is rungs[-1] or math.isnan(loss) or trial.should_prune()
            for trial, loss in zip(wave, losses, strict=True)
        ]
        for trial, value, ends in zip(wave, values, over, strict=True):
            if ends and rung is rungs[-1]:
                study.tell(trial, value)
            elif ends:
                study.tell(trial, state=_optuna().trial.TrialState.PRUNED)
        wave = [trial for trial, ends in zip(wave, over, strict=True) if not ends]
        if not wave:
            break
    return first


def _finite(losses: list[float], study: optuna.Study) -> list[float]:
    """The losses, with one that is worse than all known in place of what diverged."""
    known = [value for trial in study.trials for value in trial.intermediate_values.values()]
    worst = WORSE * max([loss for loss in [*losses, *known] if not math.isnan(loss)], default=1.0)
    return [worst if math.isnan(loss) else loss for loss in losses]
