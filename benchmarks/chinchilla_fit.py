"""Compares the Chinchilla fit and its bootstrap with the published method, SciPy and `chinchilla`.

One process, one thread; reads ../shared/data/chinchilla_epoch.csv. The published method
(arXiv:2404.10102) is BFGS with numerical gradients from 4500 starts, then from the optimum for each
of 4000 resamples. Only some starts and resamples are run, and the time is scaled; the table gives
their number. If PyPI's `chinchilla` is installed, it is timed on some starts too. Tables:
benchmarks/README.md.

    python benchmarks/chinchilla_fit.py [--starts 100] [--draws 100]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize
from scipy.special import logsumexp

from scaletune.fitting.loss import law
from scaletune.fitting.stats import resampling

DATA = Path(__file__).parents[2] / "shared" / "data" / "chinchilla_epoch.csv"
GRID = list(
    itertools.product(
        np.arange(0, 2.5, 0.5),
        np.arange(0, 2.5, 0.5),
        np.arange(-1, 1.5, 0.5),
        range(0, 30, 5),
        range(0, 30, 5),
    )
)
# Standard errors printed in arXiv:2404.10102.
PRINTED = {"E": 0.02566, "A": 124.52, "B": 1293.28, "alpha": 0.0154, "beta": 0.0206}


def residuals(x: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """ln measured minus ln predicted loss; x = (e, a, b, alpha, beta), logs of coefficients."""
    terms = [x[1] - x[3] * np.log(n), x[2] - x[4] * np.log(d), np.full(len(n), x[0])]
    return np.log(loss) - logsumexp(terms, axis=0)


def objective(
    x: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray, weight: np.ndarray | float = 1.0
) -> float:
    """Sum of Huber(1e-3) over the residuals of ln loss."""
    r = np.abs(residuals(x, n, d, loss))
    return float((weight * np.where(r <= 1e-3, r * r / 2, 1e-3 * (r - 5e-4))).sum())


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def starts(n: int) -> list[list[float]]:
    """`n` of the 4500 published starts as (e, a, b, alpha, beta), evenly spaced in their order."""
    chosen = [GRID[i] for i in np.linspace(0, len(GRID) - 1, n).astype(int)]
    return [[e, a, b, alpha, beta] for alpha, beta, e, a, b in chosen]


def published_fit(data: tuple[np.ndarray, ...], n_starts: int) -> tuple[float, float]:
    """Seconds of BFGS from some of the 4500 starts, and the lowest objective."""

    def run() -> list[float]:
        return [
            optimize.minimize(objective, start, args=data, method="BFGS").fun
            for start in starts(n_starts)
        ]

    seconds, ends = timed(run)
    return seconds, float(np.nanmin(ends))


def package_fit(data: tuple[np.ndarray, ...]) -> tuple[float, float] | None:
    """Seconds of PyPI's `chinchilla` from 16 starts near the published ones, and the objective.

    Serial, at its default precision. None if it is not installed.
    """
    if importlib.util.find_spec("chinchilla") is None:
        return None
    from chinchilla import Chinchilla
    from chinchilla._metrics import log_huber

    grid = {"e": [0.0, 1.0], "a": [5.0, 10.0], "b": [5.0, 10.0], "alpha": [0.0, 0.5], "beta": [0.5]}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        package = Chinchilla(
            folder, param_grid=grid, loss_fn=lambda y, p: log_huber(y, p, delta=1e-3), log_level=50
        )
        for n_params, tokens, loss in zip(*data, strict=True):
            row = {"C": 6 * n_params * tokens, "N": n_params, "D": tokens, "loss": loss}
            package.database.df.loc[len(package.database.df)] = row
        seconds, _ = timed(lambda: package.fit(parallel=False))
    logs = [np.log(package.E), np.log(package.A), np.log(package.B)]
    return seconds, objective(np.array([*logs, package.alpha, package.beta], float), *data)


def soft_l1_fit(data: tuple[np.ndarray, ...], n_starts: int) -> tuple[float, float]:
    """Seconds of `scipy.optimize.least_squares` with soft_l1 (f_scale 1e-3) from some starts.

    Also returns the Huber objective at its best end.
    """

    def run() -> list[Any]:
        return [
            optimize.least_squares(
                residuals, start, args=data, loss="soft_l1", f_scale=1e-3, x_scale="jac"
            )
            for start in starts(n_starts)
        ]

    seconds, ends = timed(run)
    return seconds, objective(min(ends, key=lambda end: end.cost).x, *data)


def published_draws(
    solved: law.LossSolution, weight: np.ndarray, data: tuple[np.ndarray, ...]
) -> tuple[float, np.ndarray]:
    """Seconds and ends of the published bootstrap: BFGS with numerical gradients per resample."""
    e, a, b, alpha, beta = solved.vector
    start = np.array([np.log(e), np.log(a), np.log(b), alpha, beta])

    def run() -> np.ndarray:
        ends = [
            optimize.minimize(objective, start, args=(*data, row), method="BFGS").x
            for row in weight
        ]
        return np.array(ends)

    return timed(run)


def converged_draws(solved: law.LossSolution, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Objectives and parameters of the reference: each resample solved to convergence.

    BFGS with analytic gradients, restarted, from the optimum and from four points around it.
    """
    rng, values, ends = np.random.default_rng(9), [], []
    for row in weight:
        problem = replace(solved.problem, weight=row[None])

        def value(phi: np.ndarray, problem: Any = problem) -> tuple[float, np.ndarray]:
            cost, gradient, _ = problem.derivatives(phi[None], solved.estimator.cost)
            return cost[0] * 1e3, gradient[0] * 1e3

        tries = []
        for k in range(5):
            x = solved.phi + (k > 0) * rng.standard_normal(5) * [0.05, 0.3, 0.3, 0.05, 0.05]
            for _ in range(2):
                x = optimize.minimize(
                    value, x, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 3000}
                ).x
            tries.append((value(x)[0] / 1e3, x))
        best = min(tries, key=lambda pair: pair[0])
        values.append(best[0])
        ends.append(best[1])
    return np.array(values), solved.problem.parameters(np.array(ends))


def bootstrap_lines(solved: law.LossSolution, data: tuple[np.ndarray, ...], n: int) -> list[str]:
    """The table of the bootstrap, and its standard errors."""
    ours, draws = timed(lambda: law.CHINCHILLA.natural(law.draw(solved, 4000), solved.centre))
    weight = resampling.pairs(np.random.default_rng(1), n, solved.cluster)
    theirs, their_ends = published_draws(solved, weight, data)
    reference, ends = converged_draws(solved, weight)
    again = law.refit(solved, replace(solved.problem, weight=weight))
    reached = np.array(
        [
            replace(solved.problem, weight=w[None]).objective(p[None], solved.estimator.cost)[0]
            for w, p in zip(weight, again, strict=True)
        ]
    )
    off = np.abs(again.std(0) / ends.std(0) - 1).max()
    published = np.array([objective(x, *data, w) for x, w in zip(their_ends, weight, strict=True)])
    errors = [
        f"{name} {error:.4g} (printed {PRINTED[name]:g})"
        for name, error in zip(law.NAMES, draws.std(0), strict=True)
    ]
    return [
        "| 4000 bootstrap resamples of the runs | seconds "
        "| objective above the converged reference, worst resample |",
        "|---|---|---|",
        f"| scaletune, one batched solve | {ours:.2f} | {(reached - reference).max():.1e} |",
        f"| BFGS from the optimum, as published: {n} run, scaled | {theirs * 4000 / n:.0f} "
        f"| {(published - reference).max():.1e} |",
        "",
        f"On the same {n} resamples, standard errors of (ln E, ln A', ln B', alpha, beta) differ",
        f"from those of the converged reference by {off:.1e} at most.",
        f"Standard errors: {', '.join(errors)}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=100, help="starts to run of the 4500")
    parser.add_argument("--draws", type=int, default=100, help="resamples to run of the 4000")
    args = parser.parse_args()
    if not DATA.exists():
        raise SystemExit(f"this benchmark reads the public runs in {DATA}, which does not exist")
    table = pd.read_csv(DATA)
    data = tuple(table[column].to_numpy(float) for column in ("n_params", "tokens", "loss"))
    rounds = [timed(lambda: law.solve(*data)) for _ in range(21)]
    ours, solved = statistics.median(r[0] for r in rounds), rounds[-1][1]
    scaled = 4500 / args.starts
    rows = [("scaletune, no starts", ours, solved.objective)]
    seconds, value = published_fit(data, args.starts)
    name = f"BFGS, 4500 starts as published: {args.starts} run, scaled"
    rows.append((name, seconds * scaled, value))
    seconds, value = soft_l1_fit(data, args.starts)
    name = f"scipy least_squares soft_l1, 4500 starts: {args.starts} run, scaled"
    rows.append((name, seconds * scaled, value))
    seconds, value = soft_l1_fit(data, 1)
    rows.append(("scipy least_squares soft_l1, one start (all zeros and -1)", seconds, value))
    if (package := package_fit(data)) is not None:
        name = "PyPI chinchilla, 4500 starts on one core: 16 run, scaled"
        rows.append((name, package[0] * 4500 / 16, package[1]))
    print(
        "| 240 runs | seconds | objective (sum of Huber 1e-3 over ln L) | time relative to ours |"
    )
    print("|---|---|---|---|")
    for name, seconds, value in rows:
        print(f"| {name} | {seconds:.3g} | {value:.10f} | {seconds / ours:.0f} |")
    parameters = zip(law.NAMES, solved.vector, strict=True)
    print("\n" + ", ".join(f"{name} {value:.6g}" for name, value in parameters) + "\n")
    print("\n".join(bootstrap_lines(solved, data, args.draws)))


if __name__ == "__main__":
    main()
