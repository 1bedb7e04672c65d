"""Times `scaletune.fit` on tables of 100,000 runs.

One process; simulated losses. `lr axis`: 40 settings x 5 batch sizes x 25 learning rates x 20
seeds. `many settings`: 2,000 settings x 50 learning rates. `tuned`: one run per setting, no lr
axis. `checkpoints`: 10 evenly spaced checkpoints of 10,000 runs. Table: benchmarks/README.md.

    python benchmarks/fit_table.py [--share 1]
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import pandas as pd

from scaletune import fit

RUNS = 100_000


def minimum_loss(n_params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return 1.7 + 400 / n_params**0.34 + 2000 / tokens**0.36


def basin(table: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Adds losses around an optimal lr and batch size."""
    n, d, b = table["n_params"], table["tokens"], table["batch_tokens"]
    best_lr = 4e-3 * (n / 1e8) ** -0.25 * (d / 1e10) ** 0.05 * (b / 2**17) ** 0.3
    best_batch = 2**17 * (d / 1e10) ** 0.3
    loss = minimum_loss(n, d) + 0.05 * np.log(table["lr"] / best_lr) ** 2
    loss += 0.01 * np.log(b / best_batch) ** 2 + 0.003 * rng.standard_normal(len(table))
    return table.assign(loss=loss)


def lr_axis(share: float, rng: np.random.Generator) -> pd.DataFrame:
    axes = {
        "n_params": np.geomspace(1e7, 1e9, 8),
        "tokens": np.geomspace(1e9, 1e11, 5),
        "batch_tokens": 2.0 ** np.arange(15, 20),
        "lr": 1e-4 * 2 ** np.linspace(0, 8, 25),
        "seed": np.arange(max(round(20 * share), 1)),
    }
    values = np.meshgrid(*axes.values(), indexing="ij")
    columns = {name: column.ravel() for name, column in zip(axes, values, strict=True)}
    return basin(pd.DataFrame(columns), rng)


def many_settings(share: float, rng: np.random.Generator) -> pd.DataFrame:
    n_settings, n_lrs = round(RUNS / 50 * share), 50
    table = pd.DataFrame(
        {
            "n_params": np.repeat(10 ** rng.uniform(7, 9.5, n_settings), n_lrs),
            "tokens": np.repeat(10 ** rng.uniform(8.5, 11, n_settings), n_lrs),
            "batch_tokens": 2.0**17,
            "lr": 1e-4 * 2 ** np.tile(np.linspace(0, 8, n_lrs), n_settings),
        }
    )
    return basin(table, rng)


def tuned(share: float, rng: np.random.Generator, checkpoints: int = 1) -> pd.DataFrame:
    n_runs = round(RUNS * share / checkpoints)
    n = np.repeat(10 ** rng.uniform(7, 9.5, n_runs), checkpoints)
    last = np.repeat(10 ** rng.uniform(8.5, 11, n_runs), checkpoints)
    d = last * np.tile(np.arange(1, checkpoints + 1) / checkpoints, n_runs)
    loss = minimum_loss(n, d) * np.exp(0.003 * rng.standard_normal(len(n)))
    return pd.DataFrame({"n_params": n, "tokens": d, "loss": loss})


TABLES = {
    "lr axis": (lr_axis, ("lr_nd", "loss_nd", "joint")),
    "many settings": (many_settings, ("lr_nd",)),
    "tuned": (tuned, ("loss_nd", "chinchilla")),
    "checkpoints": (lambda share, rng: tuned(share, rng, 10), ("loss_nd", "chinchilla")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="share of the 100,000 runs")
    share = parser.parse_args().share
    fit(tuned(0.0005, np.random.default_rng(0)), "loss_nd")  # imports SciPy
    print("| table | runs | law | runs used | seconds | CPU seconds | peak memory, GB |")
    print("|---|---|---|---|---|---|---|")
    for name, (make, laws) in TABLES.items():
        table = make(share, np.random.default_rng(0))
        for law in laws:
            wall, cpu = time.perf_counter(), time.process_time()
            fitted = fit(table, law)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(
                f"| {name} | {len(table)} | {law} | {len(fitted.used)} | {wall:.1f} | {cpu:.1f}"
                f" | {memory:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
