"""Optuna's samplers and pruners, used through its ask-and-tell interface.

A sampler chooses indices into the cell's grid. The results of a wave are reported in the order in
which its points were requested.

With two or more values in the `tokens` axis they are a pruner's rungs, and each rung is a trial of
its own: a run that is cut short differs from a run with a shorter schedule. With one token budget
the pruner stops trials inside their runs (`run_pruner`). On rungs, a point that is not pruned is
trained anew on the next rung. A pruner compares losses within a rung only, and Hyperband's brackets
are assigned as if there were at least `RUNGS` rungs. With samplers that do not learn (qmc, random),
a longer token budget therefore changes no earlier decision, and a larger budget only adds trials.
"topk" prunes nothing: it trains all points on the first rung and the best of them on the last.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scaletune.errors import UserError
from scaletune.recipe import SearchSection
from scaletune.sweeping.search.run_pruner import RunPruner
from scaletune.sweeping.search.space import Cell, Point, Waves, lowest

if TYPE_CHECKING:
    import optuna

WORSE = 1.35  # a diverged trial is reported as this factor times the largest loss
RUNGS = 8  # smallest number of rungs that determines Hyperband's brackets
STALE = 20  # consecutive waves without a new point that end the search


def _optuna() -> Any:
    try:
        import cmaes  # noqa: F401 (Optuna imports it only when its CMA-ES first samples)
        import optuna
    except ImportError:
        raise UserError(
            "search.kind 'optuna' and `search.pruner` need Optuna and cmaes:"
            " pip install 'scaletune[search]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _sampler(search: SearchSection) -> optuna.samplers.BaseSampler:
    samplers, seed = _optuna().samplers, search.seed
    make = {
        "tpe": lambda: samplers.TPESampler(seed=seed),
        "gp": lambda: samplers.GPSampler(seed=seed),
        "cmaes": lambda: samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
        "qmc": lambda: samplers.QMCSampler(
            seed=seed, warn_independent_sampling=False, warn_asynchronous_seeding=False
        ),
        "random": lambda: samplers.RandomSampler(seed=seed),
    }
    return make[search.sampler]()


def _median_pruner(inside_runs: bool) -> optuna.pruners.BasePruner:
    """Prunes what is above the median of its rung, if four or more others have a loss there.

    On rungs of their own the others are the points that were requested before it. Optuna's own
    median pruner compares with complete trials only.
    """

    # the library is imported late
    class Median(_optuna().pruners.BasePruner):  # type: ignore[misc]
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            step = max(trial.intermediate_values)
            others = [
                t.intermediate_values[step]
                for t in study.trials
                if (t.number < trial.number or (inside_runs and t.number > trial.number))
                and step in t.intermediate_values
            ]
            return len(others) >= 4 and trial.intermediate_values[step] > float(np.median(others))

    return Median()


def _pruner(search: SearchSection, cell: Cell) -> optuna.pruners.BasePruner:
    pruners, by = _optuna().pruners, search.reduction
    # The end of a run is one rung more than the decisions in it.
    most = by ** (len(cell.shares) or max(len(cell.rungs), RUNGS) - 1)
    make = {
        "none": pruners.NopPruner,
        "topk": pruners.NopPruner,
        "median": lambda: _median_pruner(bool(cell.shares)),
        "halving": lambda: pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=by),
        "hyperband": lambda: pruners.HyperbandPruner(
            min_resource=1, max_resource=most, reduction_factor=by
        ),
    }
    return make[search.pruner]()


def create_study(search: SearchSection, cell: Cell) -> optuna.Study:
    """A study that minimises. Its name is fixed: Hyperband assigns trials to brackets by it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", _optuna().exceptions.ExperimentalWarning)
        return _optuna().create_study(
            study_name="scaletune", sampler=_sampler(search), pruner=_pruner(search, cell)
        )


def _extend_study(
    study: optuna.Study, search: SearchSection, cell: Cell, origin: Point
) -> optuna.Study:
    """A new study over the extended ranges, with the trials of the old one."""
    optuna = _optuna()
    distributions = {
        path: optuna.distributions.IntDistribution(*ends)
        for path, ends in _index_ranges(cell, origin).items()
    }
    extended = create_study(search, cell)
    extended.add_trials(
        [
            optuna.trial.create_trial(
                state=t.state,
                params=t.params,
                value=t.value,
                intermediate_values=t.intermediate_values,
                system_attrs=t.system_attrs if cell.shares else None,  # the rungs it has passed
                distributions=distributions,
            )
            for t in study.trials
        ]
    )
    return extended


def _index_ranges(cell: Cell, origin: Point) -> dict[str, tuple[int, int]]:
    """Lowest and highest index of each searched axis.

    0 is the first value at the start of the search, so an extension does not renumber the points.
    """
    lows = [-values.index(first) for values, first in zip(cell.axes, origin, strict=True)]
    return {
        path: (low, low + len(values) - 1)
        for path, low, values in zip(cell.paths, lows, cell.axes, strict=True)
    }


def _suggest_point(trial: optuna.Trial, cell: Cell, origin: Point) -> Point:
    ranges = _index_ranges(cell, origin).items()
    return tuple(
        values[trial.suggest_int(path, *ends) - ends[0]]
        for (path, ends), values in zip(ranges, cell.axes, strict=True)
    )


def search_with_optuna(cell: Cell, search: SearchSection, pruner: RunPruner) -> Waves:
    """Searches one cell until the sampler has requested `budget` different points.

    Each point is trained on the first rung, and on further rungs until the pruner stops it.
    """
    assert search.budget
    study = pruner.study
    origin = tuple(values[0] for values in cell.axes)
    seen: dict[Point, float] = {}
    stale = 0
    while len(seen) < min(search.budget, len(cell.points)) and stale < STALE:
        wave = [study.ask() for _ in range(min(search.wave, search.budget - len(seen)))]
        points = {trial.number: _suggest_point(trial, cell, origin) for trial in wave}
        stale = 0 if set(points.values()) - seen.keys() else stale + 1
        pruner.start_wave(wave)
        first = yield from _train_rungs(cell, study, wave, points, search)
        seen |= {points[number]: loss for number, loss in first.items()}
        half_done = 2 * len(seen) >= search.budget > len(seen)
        best = lowest(seen) if not cell.rungs and half_done else None
        if best and cell.grow(best):
            study = pruner.study = _extend_study(study, search, cell, origin)
    if search.pruner == "topk":
        yield [(cell, point, cell.rungs[-1]) for point in _top_points(seen, search.reduction)]
    cell.note_used_budget(seen)
    cell.note_stopped(seen)


def search_grid(cell: Cell, pruner: RunPruner) -> Waves:
    """Trains all points of one cell at a time; the pruner stops those that fall behind."""
    pruner.start_wave([pruner.study.ask() for _ in cell.points])
    losses = yield [(cell, point, None) for point in cell.points]
    cell.note_stopped(dict(zip(cell.points, losses, strict=True)))


def _top_points(seen: Mapping[Point, float], reduction: int) -> list[Point]:
    """The points of the lowest losses: one in `reduction`, rounded up; none that diverged."""
    finite = [point for point, loss in seen.items() if math.isfinite(loss)]
    return sorted(finite, key=lambda point: seen[point])[: math.ceil(len(seen) / reduction)]


def _train_rungs(
    cell: Cell,
    study: optuna.Study,
    wave: list[optuna.Trial],
    points: Mapping[int, Point],
    search: SearchSection,
) -> Generator[list[tuple[Cell, Point, int | None]], list[float], dict[int, float]]:
    """Trains a wave rung by rung, and reports pruned and complete trials to the study.

    A trial that was stopped inside its run is pruned: its losses on the way are reported already.
    Returns the losses on the first rung, by trial number.
    """
    rungs: list[int | None] = [*cell.rungs[: 1 if search.pruner == "topk" else None]] or [None]
    first: dict[int, float] = {}
    for step, rung in enumerate(rungs):
        losses = yield [(cell, points[trial.number], rung) for trial in wave]
        first = first or {trial.number: loss for trial, loss in zip(wave, losses, strict=True)}
        values = _replace_diverged(losses, study)
        if not cell.shares:
            for trial, value in zip(wave, values, strict=True):
                trial.report(value, search.reduction**step)
        ended = [
            rung is rungs[-1] or math.isnan(loss) or trial.should_prune()
            for trial, loss in zip(wave, losses, strict=True)
        ]
        for trial, value, ends in zip(wave, values, ended, strict=True):
            if ends and rung is rungs[-1] and not math.isinf(value):
                study.tell(trial, value)
            elif ends:
                study.tell(trial, state=_optuna().trial.TrialState.PRUNED)
        wave = [trial for trial, ends in zip(wave, ended, strict=True) if not ends]
        if not wave:
            break
    return first


def _replace_diverged(losses: list[float], study: optuna.Study) -> list[float]:
    """The losses, with one that is larger than all known losses in place of NaN."""
    known = [value for trial in study.trials for value in trial.intermediate_values.values()]
    known += [trial.value for trial in study.trials if trial.value is not None]
    finite = [loss for loss in [*losses, *known] if math.isfinite(loss)]
    worst = WORSE * max(finite, default=1.0)
    return [worst if math.isnan(loss) else loss for loss in losses]
