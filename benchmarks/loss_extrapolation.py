"""Compares estimators of the loss law: error one size up, and coverage of their 90 % intervals.

Reads public sweeps from ../shared/data. Each split fits the law to the smaller sizes (isoFLOP data:
smaller budgets) and predicts the next; an error is |predicted / measured - 1|. Tables:
benchmarks/README.md.

    python benchmarks/loss_extrapolation.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaletune.fitting.loss import law as law_module
from scaletune.fitting.loss.law import CHINCHILLA, DESCRIBE, PREDICT, Estimator
from scaletune.fitting.loss.record import solution
from scaletune.fitting.stats.robust import SQUARES
from scaletune.predicting import loss_at

DATA = Path(__file__).parents[2] / "shared" / "data"
COLUMNS = ["n_params", "tokens", "loss"]
LEVEL = 0.9
DRAWS = 200  # bootstrap draws of an interval
TIED = {"beta": "alpha"}
ESTIMATORS = {
    "least squares": (Estimator(cost=SQUARES), None),
    "Huber 1e-3 (`chinchilla`)": (DESCRIBE, None),
    "tied exponents": (DESCRIBE, TIED),
    "no irreducible loss": (DESCRIBE, {"E": 0.0}),
    "exponents fixed at 0.35 and 0.37": (DESCRIBE, {"alpha": 0.35, "beta": 0.37}),
    "weights compute^0.25": (Estimator(weight_power=0.25), None),
    "weights compute": (Estimator(weight_power=1.0), None),
    "prior on exponents": (replace(PREDICT, weight_power=0.0, use_discrepancy=False), None),
    "least squares, weights, prior": (replace(PREDICT, cost=SQUARES, use_discrepancy=False), None),
    "weights and prior": (replace(PREDICT, use_discrepancy=False), None),
    "weights, prior, near runs (`loss_nd`)": (PREDICT, None),
}


def sweeps() -> Iterator[tuple[str, pd.DataFrame, list[float] | None]]:
    """(family, runs, sizes between the splits; None: split by compute)."""
    chinchilla = pd.read_csv(DATA / "chinchilla_epoch.csv")[COLUMNS]
    yield "chinchilla", chinchilla, [3e8, 6e8, 1.2e9, 2.4e9, 4.6e9, 2e10]
    gemstones = pd.read_csv(DATA / "gemstones_dev.csv")
    gemstones = gemstones.loc[gemstones["schedule"] == "cooldown_end", COLUMNS]
    yield "gemstones", gemstones, [9.9e7, 1.2e8, 6e8]
    for _, rows in pd.read_csv(DATA / "overtraining_104_dev.csv").groupby("train_dataset"):
        yield "overtraining", rows.assign(loss=rows["loss_c4_val"])[COLUMNS], [1.6e8, 4.2e8, 2e9]
    for _, rows in pd.read_csv(DATA / "porian_isoflop_dev.csv").groupby("config_id"):
        lowest = rows.groupby("flops")["loss"].transform("min")
        yield "porian", rows.loc[rows["loss"] <= 1.05 * lowest, COLUMNS], None
    steplaw = pd.read_csv(DATA / "steplaw_dense_dev.csv").sort_values("loss")
    best = steplaw.groupby("cell_id").head(5)
    yield "steplaw", best.groupby("cell_id")[COLUMNS].mean(), [3e8, 5e8]


def splits(
    runs: pd.DataFrame, cuts: list[float] | None
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """(runs to fit, runs to predict)."""
    n_params = runs["n_params"]
    if cuts is None:
        compute = n_params * runs["tokens"]
        level = np.round(np.log2(compute / compute.min()))
        masks = [(level < k, level == k) for k in sorted(set(level))[4:]]
    else:
        masks = [(n_params <= a, (n_params > a) & (n_params <= b)) for a, b in pairwise(cuts)]
    for small, large in masks:
        yield runs[small], runs[large]


def predict(
    estimator: Estimator,
    fixed: dict[str, float | str] | None,
    small: pd.DataFrame,
    large: pd.DataFrame,
    n_draws: int,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Errors [R], and with `n_draws` the ends of the 90 % intervals [R, 2], by kind of interval."""
    columns = (small[column].to_numpy(float) for column in COLUMNS)
    solved = law_module.solve(*columns, estimator=estimator, fixed=fixed)
    draws = solved.vector[None]
    if n_draws:
        draws = CHINCHILLA.natural(law_module.draw(solved, n_draws), solved.centre)
    law = solution(solved, draws, LEVEL)
    independent = {key: law[key] for key in ("vector", "draws", "scatter")}
    points = large[["n_params", "tokens"]].to_numpy(float).tolist()
    predicted = np.array([loss_at(law, LEVEL, *point)[0] for point in points])
    errors = np.abs(predicted / large["loss"].to_numpy(float) - 1)
    kinds = {"independent rows": independent, "discrepancy": law} if n_draws else {}
    return errors, {
        kind: np.array([loss_at(each, LEVEL, *point)[1] for point in points])
        for kind, each in kinds.items()
    }


def print_table(title: str, rows: pd.DataFrame, digits: int, scale: float = 100.0) -> None:
    print(f"\n| {title} | {' | '.join(rows.columns)} | mean |")
    print("|---" * (len(rows.columns) + 2) + "|")
    for name, row in rows.iterrows():
        values = [f"{scale * value:.{digits}f}" for value in [*row, row.mean()]]
        print(f"| {name} | {' | '.join(values)} |")


def print_intervals(intervals: list[dict[str, Any]]) -> None:
    """Coverage and median width of the intervals, by family."""
    groups = pd.DataFrame(intervals).groupby(["estimator", "family"], sort=False)
    coverage = (groups["hits"].sum() / groups["n"].sum()).unstack()
    print_table("coverage of 90 % intervals, %", coverage, 0)
    print_table("median width, % of the loss", groups["width"].median().unstack(), 1)


def main() -> None:
    if not DATA.exists():
        raise SystemExit(f"this benchmark reads public sweeps from {DATA}, which does not exist")
    errors, intervals = [], []
    for family, runs, cuts in sweeps():
        for small, large in splits(runs, cuts):
            loss = large["loss"].to_numpy(float)
            for name, (estimator, fixed) in ESTIMATORS.items():
                n_draws = DRAWS if estimator in (DESCRIBE, PREDICT) and fixed is None else 0
                error, ends = predict(estimator, fixed, small, large, n_draws)
                errors.append({"family": family, "estimator": name, "error": error.mean()})
                for kind, (low, high) in ((kind, both.T) for kind, both in ends.items()):
                    row = {
                        "hits": ((low <= loss) & (loss <= high)).sum(),
                        "n": len(loss),
                        "width": np.median((high - low) / loss),
                    }
                    intervals.append({"family": family, "estimator": f"{name}, {kind}", **row})
    groups = pd.DataFrame(errors).groupby(["estimator", "family"], sort=False)
    print_table("mean error one size up, %", groups["error"].mean().unstack(), 2)
    print_intervals(intervals)


if __name__ == "__main__":
    main()
