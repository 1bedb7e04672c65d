"""The Chinchilla fit and its bootstrap, beside what one would otherwise use, in one process on one thread.

`python benchmarks/chinchilla_fit.py [--starts 100] [--draws 100]` needs ../shared/data/chinchilla_epoch.csv. The published way (arXiv:2404.10102) is
BFGS with numerical gradients from 4500 starts, then from the optimum for each of 4000 resamples; a part of each is run and scaled, and the
table says so. With PyPI's `chinchilla` importable it is timed on some of the same starts too. Tables in benchmarks/README.md.
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
SE = {
    "E": 0.02566,
    "A": 124.52,
    "B": 1293.28,
    "alpha": 0.0154,
    "beta": 0.0206,
}  # printed in arXiv:2404.10102


def objective(
    x: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray, weight: np.ndarray | float = 1.0
) -> float:
    """Sum of Huber(1e-3) over residuals of ln L; x = (e, a, b, alpha, beta), logs of coefficients."""
    r = np.abs(
        np.log(loss)
        - logsumexp(
            [x[1] - x[3] * np.log(n), x[2] - x[4] * np.log(d), np.full(len(n), x[0])], axis=0
        )
    )
    return float((weight * np.where(r <= 1e-3, r * r / 2, 1e-3 * (r - 5e-4))).sum())


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found


def published_fit(data: tuple[np.ndarray, ...], n_starts: int) -> tuple[float, float]:
    """Seconds of BFGS from some of the 4500 starts and the lowest objective."""
    chosen = [GRID[i] for i in np.linspace(0, len(GRID) - 1, n_starts).astype(int)]
    seconds, ends = timed(
        lambda: [
            optimize.minimize(objective, [e, a, b, al, be], args=data, method="BFGS").fun
            for al, be, e, a, b in chosen
        ]
    )
    return seconds, float(np.nanmin(ends))


def package_fit(data: tuple[np.ndarray, ...], n: int = 16) -> tuple[float, float] | None:
    """Seconds of PyPI's `chinchilla` on n starts about the published ones (serial, its default precision), and the objective where it ends."""
    if importlib.util.find_spec("chinchilla") is None:
        return None
    from chinchilla import Chinchilla
    from chinchilla._metrics import log_huber

    grid = {"e": [0.0, 1.0], "a": [5.0, 10.0], "b": [5.0, 10.0], "alpha": [0.0, 0.5], "beta": [0.5]}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        made = Chinchilla(
            folder, param_grid=grid, loss_fn=lambda y, p: log_huber(y, p, delta=1e-3), log_level=50
        )
        for n_params, tokens, loss in zip(*data, strict=True):
            made.database.df.loc[len(made.database.df)] = {
                "C": 6 * n_params * tokens,
                "N": n_params,
                "D": tokens,
                "loss": loss,
            }
        seconds, _ = timed(lambda: made.fit(parallel=False))
    x = np.array([np.log(made.E), np.log(made.A), np.log(made.B), made.alpha, made.beta], float)
    return seconds, objective(x, *data)


def soft_l1(data: tuple[np.ndarray, ...], n_starts: int) -> tuple[float, float]:
    """`scipy.optimize.least_squares(loss="soft_l1", f_scale=1e-3)` from some of the starts: seconds, and Huber's objective at its best end."""

    def residual(x: np.ndarray) -> np.ndarray:
        n, d, loss = data
        return np.log(loss) - logsumexp(
            [x[1] - x[3] * np.log(n), x[2] - x[4] * np.log(d), np.full(len(n), x[0])], axis=0
        )

    chosen = [GRID[i] for i in np.linspace(0, len(GRID) - 1, n_starts).astype(int)]
    seconds, ends = timed(
        lambda: [
            optimize.least_squares(
                residual, [e, a, b, al, be], loss="soft_l1", f_scale=1e-3, x_scale="jac"
            )
            for al, be, e, a, b in chosen
        ]
    )
    return seconds, objective(min(ends, key=lambda end: end.cost).x, *data)


def reference_draws(
    solved: law.Solved, weight: np.ndarray, data: tuple[np.ndarray, ...]
) -> tuple[float, np.ndarray]:
    """Each resample as published, BFGS with numerical gradients from the optimum: seconds and ends."""
    e, a, b, alpha, beta = solved.vector
    start = np.array([np.log(e), np.log(a), np.log(b), alpha, beta])
    return timed(
        lambda: np.array(
            [
                optimize.minimize(objective, start, args=(*data, row), method="BFGS").x
                for row in weight
            ]
        )
    )


def converged_draws(solved: law.Solved, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each resample to convergence: BFGS with gradients, restarted, from the optimum and four places about it; objectives and parameters."""
    rng, values, ends = np.random.default_rng(9), [], []
    for row in weight:
        problem = replace(solved.problem, weight=row[None])

        def value(phi: np.ndarray, problem: Any = problem) -> tuple[float, np.ndarray]:
            found, gradient, _ = problem.derivatives(phi[None], solved.estimator.cost)
            return found[0] * 1e3, gradient[0] * 1e3

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


def bootstrap_lines(solved: law.Solved, data: tuple[np.ndarray, ...], n: int) -> list[str]:
    ours, drawn = timed(lambda: law.CHINCHILLA.natural(law.draw(solved, 4000), solved.centre))
    weight = resampling.pairs(np.random.default_rng(1), n, solved.cluster)
    theirs, their_ends = reference_draws(solved, weight, data)
    value, ends = converged_draws(solved, weight)
    again = law.refit(solved, replace(solved.problem, weight=weight))
    reached = np.array(
        [
            replace(solved.problem, weight=w[None]).objective(p[None], solved.estimator.cost)[0]
            for w, p in zip(weight, again, strict=True)
        ]
    )
    off = np.abs(again.std(0) / ends.std(0) - 1).max()
    published = np.array([objective(x, *data, w) for x, w in zip(their_ends, weight, strict=True)])
    return [
        "| 4000 pair bootstraps | seconds | objective above the converged reference's, worst draw |",
        "|---|---|---|",
        f"| scaletune, one batched solve | {ours:.2f} | {(reached - value).max():.1e} |",
        f"| BFGS from the optimum, as published: {n} run, scaled | {theirs * 4000 / n:.0f} | {(published - value).max():.1e} |",
        "",
        f"On the same {n} resamples, standard errors of (ln E, ln A', ln B', alpha, beta) differ from the converged reference's by {off:.1e} at most.",
        "Standard errors: "
        + ", ".join(
            f"{k} {s:.4g} (printed {SE[k]:g})" for k, s in zip(law.NAMES, drawn.std(0), strict=True)
        )
        + ".",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--starts", type=int, default=100)
    parser.add_argument("--draws", type=int, default=100)
    args = parser.parse_args()
    if not DATA.exists():
        raise SystemExit(f"needs {DATA}")
    table = pd.read_csv(DATA)
    data = tuple(table[column].to_numpy(float) for column in ("n_params", "tokens", "loss"))
    rounds = [timed(lambda: law.solve(*data)) for _ in range(21)]
    ours, solved = statistics.median(r[0] for r in rounds), rounds[-1][1]
    rows = [("scaletune: no start given", ours, solved.objective)]
    seconds, value = published_fit(data, args.starts)
    rows.append(
        (
            f"BFGS, 4500 starts as published: {args.starts} run, scaled",
            seconds * 4500 / args.starts,
            value,
        )
    )
    seconds, value = soft_l1(data, args.starts)
    rows.append(
        (
            f"scipy least_squares soft_l1, 4500 starts: {args.starts} run, scaled",
            seconds * 4500 / args.starts,
            value,
        )
    )
    seconds, value = soft_l1(data, 1)
    rows.append(("scipy least_squares soft_l1, one start (all zeros and -1)", seconds, value))
    if (package := package_fit(data)) is not None:
        rows.append(
            (
                "PyPI chinchilla, 4500 starts on one core: 16 run, scaled",
                package[0] * 4500 / 16,
                package[1],
            )
        )
    print("| 240 runs | seconds | objective (sum of Huber 1e-3 over ln L) | times ours |")
    print("|---|---|---|---|")
    for name, seconds, value in rows:
        print(f"| {name} | {seconds:.3g} | {value:.10f} | {seconds / ours:.0f} |")
    print(
        "\n"
        + ", ".join(
            f"{name} {value:.6g}" for name, value in zip(law.NAMES, solved.vector, strict=True)
        )
        + "\n"
    )
    print("\n".join(bootstrap_lines(solved, data, args.draws)))


if __name__ == "__main__":
    main()
