"""Which estimator of the loss law predicts one size up best on public sweeps, and how often its 90 % intervals cover what it predicts.

`python benchmarks/loss_extrapolation.py` needs ../shared/data. Every split fits the law to the smaller sizes (of isoFLOP data: smaller
budgets) and predicts the next; an error is |predicted / measured - 1|. Tables in benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

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
TIED = {"beta": "alpha"}
WAYS = {
    "squares": (Estimator(cost=SQUARES), None),
    "Huber 1e-3 (`chinchilla`)": (DESCRIBE, None),
    "tied exponents": (DESCRIBE, TIED),
    "no irreducible loss": (DESCRIBE, {"E": 0.0}),
    "exponents 0.35, 0.37": (DESCRIBE, {"alpha": 0.35, "beta": 0.37}),
    "weights compute**0.25": (Estimator(lean=0.25), None),
    "weights compute": (Estimator(lean=1.0), None),
    "prior on exponents": (replace(PREDICT, lean=0.0, near=False), None),
    "squares, weights, prior": (replace(PREDICT, cost=SQUARES, near=False), None),
    "weights and prior": (replace(PREDICT, near=False), None),
    "weights, prior, near runs (`loss_nd`)": (PREDICT, None),
}


def sweeps() -> Iterator[tuple[str, pd.DataFrame, list[float] | None]]:
    """(family, runs, sizes at which to cut; None: by compute)."""
    yield (
        "chinchilla",
        pd.read_csv(DATA / "chinchilla_epoch.csv")[COLUMNS],
        [3e8, 6e8, 1.2e9, 2.4e9, 4.6e9, 2e10],
    )
    gemstones = pd.read_csv(DATA / "gemstones_dev.csv")
    yield (
        "gemstones",
        gemstones.loc[gemstones["schedule"] == "cooldown_end", COLUMNS],
        [9.9e7, 1.2e8, 6e8],
    )
    for _, rows in pd.read_csv(DATA / "overtraining_104_dev.csv").groupby("train_dataset"):
        yield "overtraining", rows.assign(loss=rows["loss_c4_val"])[COLUMNS], [1.6e8, 4.2e8, 2e9]
    for _, rows in pd.read_csv(DATA / "porian_isoflop_dev.csv").groupby("config_id"):
        lowest = rows.groupby("flops")["loss"].transform("min")
        yield "porian", rows.loc[rows["loss"] <= 1.05 * lowest, COLUMNS], None
    steplaw = (
        pd.read_csv(DATA / "steplaw_dense_dev.csv").sort_values("loss").groupby("cell_id").head(5)
    )
    yield "steplaw", steplaw.groupby("cell_id")[COLUMNS].mean(), [3e8, 5e8]


def splits(
    runs: pd.DataFrame, cuts: list[float] | None
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    if cuts is None:
        level = np.round(
            np.log2(runs["n_params"] * runs["tokens"] / (runs["n_params"] * runs["tokens"]).min())
        )
        pairs = [(level < k, level == k) for k in sorted(set(level))[4:]]
    else:
        pairs = [
            (runs["n_params"] <= a, (runs["n_params"] > a) & (runs["n_params"] <= b))
            for a, b in pairwise(cuts)
        ]
    for seen, unseen in pairs:
        yield runs[seen], runs[unseen]


def predict(
    way: tuple[Estimator, dict[str, float | str] | None],
    seen: pd.DataFrame,
    unseen: pd.DataFrame,
    n_draws: int,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Errors, and with `n_draws` the ends of the 90 % interval (R, 2), without the discrepancy and with it."""
    solved = law_module.solve(
        *(seen[column].to_numpy(float) for column in COLUMNS), estimator=way[0], fixed=way[1]
    )
    draws = (
        CHINCHILLA.natural(law_module.draw(solved, n_draws), solved.centre)
        if n_draws
        else solved.vector[None]
    )
    law = solution(solved, draws, LEVEL)
    bare = {
        key: law[key] for key in ("vector", "draws", "scatter")
    }  # as if residuals were independent
    at = unseen[["n_params", "tokens"]].to_numpy(float).tolist()
    errors = np.abs(
        np.array([loss_at(law, LEVEL, *one)[0] for one in at]) / unseen["loss"].to_numpy(float) - 1
    )
    kinds = {"rows as independent": bare, "discrepancy": law} if n_draws else {}
    return errors, {
        kind: np.array([loss_at(kept, LEVEL, *one)[1] for one in at])
        for kind, kept in kinds.items()
    }


def table(title: str, rows: pd.DataFrame, digits: int, scale: float = 100.0) -> None:
    print(
        f"\n| {title} | {' | '.join(rows.columns)} | mean |\n|---|{'---|' * (len(rows.columns) + 1)}"
    )
    for name, row in rows.iterrows():
        print(
            f"| {name} | {' | '.join(f'{scale * v:.{digits}f}' for v in row)} | {scale * row.mean():.{digits}f} |"
        )


def sureness(intervals: list[dict[str, object]]) -> None:
    """Coverage and median width of the intervals, by family."""
    groups = pd.DataFrame(intervals).groupby(["way", "family"], sort=False)
    table("coverage of 90 % intervals, %", (groups["hits"].sum() / groups["n"].sum()).unstack(), 0)
    table("median width, % of the loss", groups["width"].median().unstack(), 1)


def main() -> None:
    if not DATA.exists():
        raise SystemExit(f"needs {DATA}")
    errors, intervals = [], []
    for family, runs, cuts in sweeps():
        for seen, unseen in splits(runs, cuts):
            loss = unseen["loss"].to_numpy(float)
            for name, way in WAYS.items():
                found, ends = predict(
                    way,
                    seen,
                    unseen,
                    200 if way[0] in (DESCRIBE, PREDICT) and way[1] is None else 0,
                )
                errors.append({"family": family, "way": name, "error": found.mean()})
                for kind, (low, high) in ((kind, both.T) for kind, both in ends.items()):
                    row = {
                        "hits": ((low <= loss) & (loss <= high)).sum(),
                        "n": len(loss),
                        "width": np.median((high - low) / loss),
                    }
                    intervals.append({"family": family, "way": f"{name}, {kind}", **row})
    means = pd.DataFrame(errors).groupby(["way", "family"], sort=False)["error"].mean().unstack()
    table("mean error one size up, %", means, 2)
    sureness(intervals)


if __name__ == "__main__":
    main()
