"""Compares planned runs with a full grid and with random runs of the same cost.

Simulated studies: a surface is drawn from the planner's prior for configs/quickstart-target.toml
(not one of the draws that it plans with). Cells deviate from it, and runs have noise, as in the
joint surface. The runs are fitted, and the fit predicts the target. "Expected" is what the plan
states before training. Excess loss: loss at the predicted lr and batch size over the lowest there.

Public runs: dense Step Law runs as a lookup table. The settings of the largest horizon of each size
are held out, and the plan chooses among the runs of the others by their FLOPs.

    OMP_NUM_THREADS=1 python benchmarks/planning.py
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from joint_surface import Smooth, runs, smooth
from numpy.typing import NDArray

import scaletune
from scaletune import counting, recipe
from scaletune.errors import UserError
from scaletune.fitting.joint.fit import fit_joint
from scaletune.fitting.table import tabulate
from scaletune.planning import OVERHEAD, _candidates, _possible
from scaletune.planning import candidates as possible
from scaletune.planning.cost import Candidates
from scaletune.planning.optimal_design import half_widths, path
from scaletune.planning.prior import from_priors
from scaletune.surface.model import STUDENT, SurfaceRuns, law_basis, ln_loss
from scaletune.surface.prior import SurfaceDistribution

TARGET = Path(__file__).parents[1] / "configs" / "quickstart-target.toml"
LEVEL, STUDIES, BUDGETS = 0.9, 48, (0.01, 0.02, 0.05)
SHARES, SUBSETS = (0.025, 0.05, 0.1), 5

Array = NDArray[np.float64]
Indices = NDArray[np.int_]


def grid(table: pd.DataFrame, cost: Array, until: float) -> Indices:
    """The most expensive full grid within the budget.

    Three sizes x three horizons, each about a factor of two apart, x three batch sizes x five lr.
    """
    sizes, horizons = sorted(table["n_params"].unique()), sorted(table["level"].unique())
    best = (0.0, np.zeros(0, int))
    for size in (sizes[i : i + 5 : 2] for i in range(len(sizes) - 4)):
        for horizon in (horizons[i : i + 3] for i in range(len(horizons) - 2)):
            cells = table[table["n_params"].isin(size) & table["level"].isin(horizon)]
            if cells["cell"].nunique() < 9:
                continue
            of_lr = cells.groupby("cell")["lr"].rank("dense").between(2, 6)
            of_batch = cells.groupby("cell")["batch_tokens"].rank("dense")
            chosen = cells.index[
                of_lr
                & (
                    of_batch.sub(of_batch.groupby(cells["cell"]).transform("max") / 2 + 0.5).abs()
                    <= 1
                )
            ].to_numpy()
            if best[0] < cost[chosen].sum() <= until:
                best = (float(cost[chosen].sum()), chosen)
    return best[1]


def at_random(cost: Array, until: float, seed: int) -> Indices:
    """Runs in random order that fit into the budget."""
    order, spent, chosen = np.random.default_rng(seed).permutation(len(cost)), 0.0, []
    for i in order:
        if spent + cost[i] <= until:
            spent, chosen = spent + cost[i], [*chosen, i]
    return np.array(chosen, int)


def simulate(
    table: pd.DataFrame, options: Candidates, prior: SurfaceDistribution, theta: Array, seed: int
) -> tuple[pd.DataFrame, Array]:
    """Losses of every candidate under one surface, and the target's optimum with its own deviation.

    The optimum is (ln lr, ln batch, ln minimum loss).
    """
    rng, k = np.random.default_rng(seed), 2
    delta = prior.scales.scatter * rng.standard_normal((options.runs.n_cells, k + 1))
    value, _, _, excess = ln_loss(theta, delta, options.runs)
    sd = np.sqrt(prior.scales.noise**2 + (prior.scales.misfit * excess) ** 2)
    simulated = table.assign(loss=np.exp(value + sd * rng.standard_t(STUDENT, len(sd))))
    deviation = prior.scales.scatter * rng.standard_normal(k + 1)
    return simulated, optimum(theta, options.target) + deviation


def optimum(theta: Array, target: tuple[float, float]) -> Array:
    n, d = np.array([target[0]]), np.array([target[1]])
    x = theta[:6].reshape(2, 3) @ law_basis(n, d)[0]
    return np.append(
        x, ln_loss(theta, np.zeros((1, 3)), SurfaceRuns(n, d, x[None], n, np.zeros(1, int)))[0]
    )


def gap(theta: Array, target: tuple[float, float], truth: Array, named: Array) -> float:
    """ln of the loss at the predicted (lr, batch size) over the lowest loss there."""
    at = SurfaceRuns(
        np.array([target[0]]), np.array([target[1]]), named[None], np.zeros(1), np.zeros(1, int)
    )
    return float(
        ln_loss(theta, np.append(truth[:2] - optimum(theta, target)[:2], 0.0)[None], at)[3][0]
    )


def ask(table: pd.DataFrame, n_params: float, tokens: float) -> tuple[Array, Array]:
    """(ln lr, ln batch, ln loss) that a joint fit of these runs predicts, and its half-widths."""
    law = fit_joint(
        tabulate(table, ["n_params", "tokens", "batch_tokens", "lr", "loss"]), [], LEVEL
    )
    best = law.predict(n_params=n_params, tokens=tokens)
    ends = np.log([best.interval[name] for name in ("lr", "batch_tokens", "loss")])
    return np.log([best.lr, best.batch_tokens, best.loss]), (ends[:, 1] - ends[:, 0]) / 2


def simulated_studies(budgets: tuple[float, ...] = BUDGETS, studies: int = STUDIES) -> pd.DataFrame:
    # Without branches: each design pays the whole cost of each run.
    target = recipe.load(TARGET, ["engine.branch=false"])
    n_params = counting.params(target.model, counting.BYTES_TEXT_VOCAB)["n_params"]
    prior, table, _ = _possible(target, counting.BYTES_TEXT_VOCAB, None, None)
    table = possible.costs(target, table, counting.BYTES_TEXT_VOCAB)
    table["level"] = np.round(np.log2(target.budget.tokens / table["tokens"]))
    options = _candidates(table, prior, (n_params, target.budget.tokens), 1, "flops")
    whole = scaletune.count(target)["flops"]
    truths = (
        prior.mean
        + np.random.default_rng(1).standard_normal((studies, len(prior.mean))) @ prior.root.T
    )
    rows = []
    for budget in budgets:
        until = budget * whole
        designs: dict[str, Callable[[int], Indices]] = {
            "planned": lambda _, until=until: path(
                prior, options, until=until, most=300, overhead=OVERHEAD * whole
            ),
            "full grid": lambda _, until=until: grid(table, options.cost, until),
            "random": lambda seed, until=until: at_random(options.cost, until, seed),
        }
        for name, design in designs.items():
            chosen = design(0)
            for i, theta in enumerate(truths):
                chosen = design(i) if name == "random" else chosen
                trials, truth = simulate(table, options, prior, theta, i)
                predicted, half = ask(trials.loc[np.sort(chosen)], n_params, target.budget.tokens)
                expected, _ = half_widths(prior, options, chosen, LEVEL)
                row = {
                    "budget": budget,
                    "design": name,
                    "runs": len(chosen),
                    "cost": options.cost[chosen].sum() / whole,
                    "gap": gap(theta, options.target, truth, predicted[:2]),
                }
                for j, q in enumerate(("lr", "batch", "loss")):
                    row[f"error {q}"] = predicted[j] - truth[j]
                    row[f"expected {q}"] = expected[j]
                    row[f"fitted {q}"] = half[j]
                rows.append(row)
    return pd.DataFrame(rows)


def simulated_markdown(results: pd.DataFrame) -> str:
    lines = [
        "| budget, % of the target | design | runs | excess loss, % (mean, median) "
        "| rms error: ln lr | ln batch | ln loss, % "
        "| expected 90 % half-width: ln lr | ln batch | ln loss, % "
        "| coverage of the expected interval: lr | batch | loss "
        "| coverage of the fit's interval: lr | batch | loss |",
        "|---" * 16 + "|",
    ]
    for (budget, design), rows in results.groupby(["budget", "design"], sort=False):
        error = {q: math.sqrt((rows[f"error {q}"] ** 2).mean()) for q in ("lr", "batch", "loss")}
        covered = [
            f"{(rows[f'error {q}'].abs() <= rows[f'{kind} {q}']).mean():.0%}"
            for kind in ("expected", "fitted")
            for q in error
        ]
        half = {q: rows[f"expected {q}"].mean() for q in error}
        lines.append(
            f"| {rows['cost'].mean():.2%} of {budget:.1%} | {design} | {rows['runs'].mean():.0f} "
            f"| {100 * rows['gap'].mean():.3f}, {100 * rows['gap'].median():.3f} "
            f"| {error['lr']:.2f} | {error['batch']:.2f} | {100 * error['loss']:.2f} "
            f"| {half['lr']:.2f} | {half['batch']:.2f} | {100 * half['loss']:.2f} "
            f"| {' | '.join(covered)} |"
        )
    return "\n".join(lines)


def splits(table: pd.DataFrame) -> dict[str, list[str]]:
    """{name: held-out cells}: those of the largest horizon of every size, and the largest alone."""
    cells = table.groupby("cell_id")[["n_params", "tokens_nominal"]].first()
    ends = list(
        cells.index[
            cells["tokens_nominal"] == cells.groupby("n_params")["tokens_nominal"].transform("max")
        ]
    )
    return {"largest of every size": ends, "largest alone": [cells["tokens_nominal"].idxmax()]}


def lookup(table: pd.DataFrame, surfaces: dict[str, Smooth]) -> pd.DataFrame:
    rows = []
    for split, held in splits(table).items():
        seen = (
            table[~table["cell_id"].isin(held)]
            .sort_values("cell_id", kind="stable")
            .reset_index(drop=True)
        )
        seen["cell"] = np.unique(seen["cell_id"], return_inverse=True)[1]
        seen["flops"] = 6.0 * seen["n_params"] * seen["tokens"]
        seen = seen.assign(trunk=range(len(seen)), stable=0.0)  # the public runs share no trunk
        for cell in held:
            rows += [
                {"split": split, "cell": cell} | row for row in _score_designs(seen, surfaces[cell])
            ]
    return pd.DataFrame(rows)


def _score_designs(seen: pd.DataFrame, surface: Smooth) -> list[dict]:
    """Each design at each share of the FLOPs, by several draws of the prior or of the runs."""
    centre = tuple(np.log(seen.groupby("cell_id")[["n_params", "tokens"]].median()).mean())
    # The middle of the grid, from no published law.
    at = tuple(np.log(seen[["lr", "batch_tokens"]]).mean())
    priors = [from_priors(centre, at, (1.0, 1.0), seed=seed) for seed in range(SUBSETS)]
    options = _candidates(seen, priors[0], (surface.n_params, surface.tokens), 1, "flops")
    whole, rows = options.cost.sum(), []
    designs = {("full grid", 1.0): [np.arange(len(seen))]}
    for share in SHARES:
        designs["planned", share] = [
            path(prior, options, until=share * whole, most=len(seen)) for prior in priors
        ]
        designs["random", share] = [
            at_random(options.cost, share * whole, seed) for seed in range(SUBSETS)
        ]
    for (name, share), choices in designs.items():
        for chosen in choices:
            row = {
                "design": name,
                "share": share,
                "runs": len(chosen),
                "cost": options.cost[chosen].sum() / whole,
            }
            try:
                predicted, _ = ask(seen.loc[np.sort(chosen)], surface.n_params, surface.tokens)
                missed = 100 * math.expm1(float(surface(predicted[:2])[0]) - surface.lowest)
                row |= {
                    "gap": missed,
                    "loss error": 100 * abs(math.exp(predicted[2]) / surface.min_loss - 1),
                }
            except UserError:
                row |= {"gap": math.nan}
            rows.append(row)
    return rows


def lookup_markdown(results: pd.DataFrame) -> str:
    lines = [
        "| held out | predicted setting | design | FLOPs of the full grid, % | runs "
        "| excess loss, % (mean, largest) | loss error, % |",
        "|---" * 7 + "|",
    ]
    for (split, cell, design, _), rows in results.groupby(
        ["split", "cell", "design", "share"], sort=False
    ):
        lines.append(
            f"| {split} | {cell} | {design} "
            f"| {100 * rows['cost'].mean():.1f} | {rows['runs'].mean():.0f} "
            f"| {rows['gap'].mean():.3f}, {rows['gap'].max():.3f} "
            f"| {rows['loss error'].mean():.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    start = time.perf_counter()
    print(simulated_markdown(simulated_studies()), "\n", flush=True)
    table = runs()
    surfaces = {
        cell: smooth(rows) for cell, rows in table[table["status"] == "done"].groupby("cell_id")
    }
    done = table[table["status"] == "done"]
    print(lookup_markdown(lookup(done, surfaces)))
    print(f"\n{time.perf_counter() - start:.0f} s")
