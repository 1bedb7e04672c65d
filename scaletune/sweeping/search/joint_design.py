"""Sequential Bayesian design of a sweep: which run of which cell is worth its FLOPs.

Before each wave the joint loss surface is fitted to the losses so far (MAP; the prior, model and
solver of the joint fit: `scaletune.surface`). The expected excess loss of the predicted lr and
batch size at the target is the trace of the curvature with the posterior covariance of the
optimum, divided by 2. The next run is the one that decreases it most per FLOP (V-optimal design,
greedy: `GreedyDesign`). Cheap cells come first, and expensive ones get the few runs that cheap
ones cannot replace.

One run alone says little about a cell, whose optimum may deviate from the law. So the first runs of
a cell, two more than there are searched axes, are chosen and trained together: they also leave a
loss basin that can be fitted on its own. A run in training counts as trained, because its expected
information does not depend on its loss. A diverged run is a bound on the excess loss
(`surface/posterior.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scaletune.recipe import SearchSection
from scaletune.surface.design import GreedyDesign
from scaletune.surface.model import SurfaceRuns
from scaletune.surface.posterior import DIVERGED_EXCESS, solve
from scaletune.surface.prior import SurfaceDistribution, fit_prior, guessed_scales, prior_about
from scaletune.sweeping.search.space import Cell, Point, Waves, lowest
from scaletune.units import human

EXTRA_RUNS = 2
"""A cell gets this many first runs more than there are searched axes."""
GAIN_SHARE = 0.01
"""The search ends when one run is expected to gain less than this share of `search.noise`."""

Array = NDArray[np.float64]
RunIndex = tuple[int, int]
"""(cell, index in its grid)."""


@dataclass(frozen=True)
class CellGrid:
    """What the design reads of a cell."""

    n_params: float
    tokens: float
    flops: float
    """Of one run."""
    grid: Array
    """[G, 1 or 2] ln lr (and ln batch_tokens)."""


@dataclass(frozen=True)
class Posterior:
    """The surface given the losses so far."""

    law: SurfaceDistribution
    delta: Array
    """[cells, axes + 1] deviations of the cells from the law; 0 without runs."""


class Wave(NamedTuple):
    """The runs to train next."""

    runs: list[RunIndex]
    excess: float
    """Expected excess loss at the target before these runs, a share of the loss."""
    gain: float
    """Expected decrease of it by these runs, per run."""


def fit_surface(cells: Sequence[CellGrid], losses: Mapping[RunIndex, float]) -> Posterior:
    """The surface given losses; a loss that is not finite has diverged."""
    n_axes = cells[0].grid.shape[1]
    delta = np.zeros((len(cells), n_axes + 1))
    seen = sorted(losses)
    trained = sorted({cell for cell, _ in seen}) or list(range(len(cells)))
    logs = np.log([[cells[cell].n_params, cells[cell].tokens] for cell in trained])
    centre = (float(logs[:, 0].mean()), float(logs[:, 1].mean()))
    middle = np.mean([(c.grid.min(0) + c.grid.max(0)) / 2 for c in cells], 0)
    if not seen:
        prior = prior_about(middle, 1.0)
        law = SurfaceDistribution(
            centre, prior[:, 0], np.diag(prior[:, 1]), prior, guessed_scales(n_axes)
        )
        return Posterior(law, delta)
    runs = _runs(cells, seen, centre)
    ln_losses = _ln_losses(runs, np.array([losses[run] for run in seen], float))
    runs = SurfaceRuns(runs.n, runs.d, runs.x, ln_losses, runs.cell)
    prior = prior_about(middle, 1.0) if np.isnan(ln_losses).all() else fit_prior(runs)
    solution = solve(runs, prior)
    delta[trained] = solution.delta
    root = np.asarray(np.linalg.cholesky(solution.covariance), float)
    law = SurfaceDistribution(centre, solution.theta, root, prior, solution.scales)
    return Posterior(law, delta)


def _runs(
    cells: Sequence[CellGrid], chosen: Sequence[RunIndex], centre: tuple[float, float]
) -> SurfaceRuns:
    """The runs without losses; cells are numbered anew."""
    rows = [
        (math.log(cells[c].n_params), math.log(cells[c].tokens), *cells[c].grid[i])
        for c, i in chosen
    ]
    n, d, *x = np.array(rows).T
    cell = np.unique([c for c, _ in chosen], return_inverse=True)[1]
    return SurfaceRuns(
        n - centre[0], d - centre[1], np.column_stack(x), np.full(len(n), np.nan), cell
    )


def _ln_losses(runs: SurfaceRuns, losses: Array) -> Array:
    """ln losses; NaN: diverged, or as far above the lowest of the cell as a diverged run."""
    y = np.log(np.where(np.isfinite(losses), losses, np.nan))
    lowest = np.fmin.reduceat(y, runs.starts)[runs.cell]
    return np.where(y > lowest + math.log1p(DIVERGED_EXCESS), np.nan, y)


def next_wave(
    cells: Sequence[CellGrid],
    losses: Mapping[RunIndex, float],
    target: tuple[float, float],
    size: int,
) -> Wave:
    """Chooses the runs to train next.

    Args:
        cells: All cells.
        losses: The losses so far.
        target: (n_params, tokens).
        size: Number of runs; the first runs of a cell come together, so there may be a few more.
    """
    posterior = fit_surface(cells, losses)
    candidates = [(c, i) for c, cell in enumerate(cells) for i in range(len(cell.grid))]
    number = {run: row for row, run in enumerate(candidates)}
    n_axes = cells[0].grid.shape[1]
    design = GreedyDesign(
        _runs(cells, candidates, posterior.law.centre),
        posterior.law.offset(*target),
        posterior.law.mean[None],
        posterior.law.fit_prior,
        posterior.law.scales,
        most=len(losses) + size + 2 * (n_axes + EXTRA_RUNS),
        delta=posterior.delta,
    )
    for run in losses:
        design.take(number[run])
    excess, wave = design.expected_excess, list[RunIndex]()
    while len(wave) < size:
        rows = best_next(design, cells)
        if not rows:
            break
        for row in rows:
            design.take(row)
        wave += [candidates[row] for row in rows]
    gain = (excess - design.expected_excess) / max(len(wave), 1)
    return Wave(wave, excess, gain)


def best_next(design: GreedyDesign, cells: Sequence[CellGrid]) -> list[int]:
    """The run with the largest gain per FLOP, or the first runs of a cell; empty: none is left."""
    n_axes = cells[0].grid.shape[1]
    gains = design.gains()
    options: list[tuple[float, list[int]]] = []
    for c, cell in enumerate(cells):
        own = np.flatnonzero(design.cell == c)
        n_trained = int(design.taken[own].sum())
        many = min(max(1, n_axes + EXTRA_RUNS - n_trained), len(own) - n_trained)
        if many == 0:
            continue
        gain, rows = _block(design, own, gains, many)
        options.append((gain / (many * cell.flops), rows))
    return max(options, key=lambda option: option[0])[1] if options else []


def _block(
    design: GreedyDesign, own: NDArray[np.int_], gains: Array, many: int
) -> tuple[float, list[int]]:
    """The gain of `many` runs of one cell, chosen one after the other; and the runs."""
    rows: list[int] = []
    total, branch = 0.0, design.branch() if many > 1 else design
    for _ in range(many):
        if rows:
            branch.take(rows[-1])
            gains = branch.gains()
        open_rows = own[~branch.taken[own]]
        rows.append(int(open_rows[gains[open_rows].argmax()]))
        total += float(gains[rows[-1]])
    return total, rows


def search_jointly(cells: list[Cell], search: SearchSection, target: tuple[float, float]) -> Waves:
    """Searches all cells together.

    Ends when `budget` runs are trained, when the expected excess loss at the target is below
    `noise`, or when no run would lower it by more than GAIN_SHARE of `noise`. Before the end the
    ranges that have the best run of a cell at an end are extended by one step, which is trained.
    """
    seen: dict[tuple[int, Point], float] = {}
    most, excess = search.budget or math.inf, math.inf
    while len(seen) < most:
        room = int(min(search.wave, most - len(seen)))
        wave = _next_wave(cells, seen, target, room)
        excess = wave.excess
        points = [(c, cells[c].points[i]) for c, i in wave.runs]
        if _is_settled(wave, search.noise) and any(map(math.isfinite, seen.values())):
            points = _extend(cells, seen)
        if not points:
            break
        points = points[: int(min(len(points), most - len(seen)))]
        seen |= zip(points, (yield [(cells[c], point, None) for c, point in points]), strict=True)
    for c, cell in enumerate(cells):
        cell.add_note(f"trained {cell.fraction(sum(i == c for i, _ in seen))}")
    cells[-1].add_note(
        f"expected excess loss at {human(target[0])} parameters and {human(target[1])} tokens:"
        f" {100 * excess:.2g} %"
    )


def _next_wave(
    cells: Sequence[Cell],
    seen: Mapping[tuple[int, Point], float],
    target: tuple[float, float],
    size: int,
) -> Wave:
    grids = [CellGrid(cell.n_params, cell.tokens, cell.flops, cell.logs) for cell in cells]
    losses = {(c, cells[c].points.index(point)): loss for (c, point), loss in seen.items()}
    return next_wave(grids, losses, target, size)


def _is_settled(wave: Wave, noise: float) -> bool:
    return wave.excess < noise or wave.gain < GAIN_SHARE * noise


def _extend(
    cells: Sequence[Cell], seen: Mapping[tuple[int, Point], float]
) -> list[tuple[int, Point]]:
    """Extends the ranges that have the best run of a cell at an end; returns the runs beyond."""
    beyond: list[tuple[int, Point]] = []
    for c, cell in enumerate(cells):
        best = lowest({point: loss for (i, point), loss in seen.items() if i == c})
        if best is None:
            continue
        for axis, upper in cell.ends(best):
            if cell.extend_axis(axis, upper):
                value = cell.axes[axis][-upper]
                beyond.append((c, (*best[:axis], value, *best[axis + 1 :])))
    return beyond
