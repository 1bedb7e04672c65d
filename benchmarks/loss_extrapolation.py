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

from scaletune.fitting import losslaw
from scaletune.fitting.losslaw import CHINCHILLA, DESCRIBE, PREDICT, Estimator
from scaletune.fitting.robust import SQUARES

DATA = Path(__file__).parents[2] / "shared" / "data"
COLUMNS = ["n_params", "tokens", "loss"]
TIED = {"beta": "alpha"}
WAYS = {
    "squares": (Estimator(cost=SQUARES), None),
    "Huber 1e-3 (`chinchilla`)": (DESCRIBE, None),
    "tied exponents": (DESCRIBE, TIED),
    "no irreducible loss": (DESCRIBE, {"E": 0.0}),
    "exponents 0.35, 0.37": (DESCRIBE, {"alpha": 0.35, "beta": 0.37}),
    "weights compute**0.25": (Estimator(lean=0.25), None),
    "weights compute": (Estimator(lean=1.0), None),
    "prior on exponents": (replace(PREDICT, lean=0.0), None),
    "squares, weights, prior": (replace(PREDICT, cost=SQUARES), None),
    "weights and prior (`loss_nd`)": (PREDICT, None),
}


def sweeps() -> Iterator[tuple[str, pd.DataFrame, list[float] | None]]:
    """(family, runs, sizes at which to cut; None: by compute)."""
    yield "chinchilla", pd.read_csv(DATA / "chinchilla_epoch.csv")[COLUMNS], [3e8, 6e8, 1.2e9, 2.4e9, 4.6e9, 2e10]
    gemstones = pd.read_csv(DATA / "gemstones_dev.csv")
    yield "gemstones", gemstones.loc[gemstones["schedule"] == "cooldown_end", COLUMNS], [9.9e7, 1.2e8, 6e8]
    for _, rows in pd.read_csv(DATA / "overtraining_104_dev.csv").groupby("train_dataset"):
        yield "overtraining", rows.assign(loss=rows["loss_c4_val"])[COLUMNS], [1.6e8, 4.2e8, 2e9]
    for _, rows in pd.read_csv(DATA / "porian_isoflop_dev.csv").groupby("config_id"):
        lowest = rows.groupby("flops")["loss"].transform("min")
        yield "porian", rows.loc[rows["loss"] <= 1.05 * lowest, COLUMNS], None
    steplaw = pd.read_csv(DATA / "steplaw_dense_dev.csv").sort_values("loss").groupby("cell_id").head(5)
    yield "steplaw", steplaw.groupby("cell_id")[COLUMNS].mean(), [3e8, 5e8]


def splits(runs: pd.DataFrame, cuts: list[float] | None) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    if cuts is None:
        level = np.round(np.log2(runs["n_params"] * runs["tokens"] / (runs["n_params"] * runs["tokens"]).min()))
        pairs = [(level < k, level == k) for k in sorted(set(level))[4:]]
    else:
        pairs = [(runs["n_params"] <= a, (runs["n_params"] > a) & (runs["n_params"] <= b)) for a, b in pairwise(cuts)]
    for seen, unseen in pairs:
        yield runs[seen], runs[unseen]


def predict(
    way: tuple[Estimator, dict[str, float | str] | None], seen: pd.DataFrame, unseen: pd.DataFrame, n_draws: int
) -> list[np.ndarray]:
    """Errors, and with `n_draws` whether the 90 % interval covers, without and with the drift."""
    data = [seen[column].to_numpy(float) for column in COLUMNS]
    n, d, loss = (unseen[column].to_numpy(float) for column in COLUMNS)
    solved = losslaw.solve(*data, estimator=way[0], fixed=way[1])

    def law(v: np.ndarray) -> np.ndarray:
        return v[:, :1] + v[:, 1:2] * n ** -v[:, 3:4] + v[:, 2:3] * d ** -v[:, 4:5]

    middle = law(solved.vector[None])[0]
    found = [np.abs(middle / loss - 1)]
    if n_draws:
        low, high = np.quantile(law(CHINCHILLA.natural(losslaw.draw(solved, n_draws), solved.centre)), [0.05, 0.95], axis=0)
        beyond = sum(
            np.maximum(0, np.maximum(np.log(x / seen[c].max()), np.log(seen[c].min() / x))) for c, x in (("n_params", n), ("tokens", d))
        )
        for drift in (0.0, losslaw.DRIFT):
            half = 1.645 * solved.noise[0] * np.hypot(1, drift * beyond) * middle
            below, above = np.hypot(np.maximum(middle - low, 0), half), np.hypot(np.maximum(high - middle, 0), half)
            found.append((middle - below <= loss) & (loss <= middle + above))
    return found


def table(title: str, rows: pd.DataFrame, digits: int, scale: float = 100.0) -> None:
    print(f"\n| {title} | {' | '.join(rows.columns)} | mean |\n|---|{'---|' * (len(rows.columns) + 1)}")
    for name, row in rows.iterrows():
        print(f"| {name} | {' | '.join(f'{scale * v:.{digits}f}' for v in row)} | {scale * row.mean():.{digits}f} |")


def main() -> None:
    if not DATA.exists():
        raise SystemExit(f"needs {DATA}")
    errors, covered = [], []
    for family, runs, cuts in sweeps():
        for seen, unseen in splits(runs, cuts):
            for name, way in WAYS.items():
                found = predict(way, seen, unseen, 200 if way[0] in (DESCRIBE, PREDICT) and way[1] is None else 0)
                errors.append({"family": family, "way": name, "error": found[0].mean()})
                for drift, hits in zip(("no drift", "drift"), found[1:], strict=False):
                    covered.append({"family": family, "way": f"{name}, {drift}", "hits": hits.sum(), "n": len(hits)})
    means = pd.DataFrame(errors).groupby(["way", "family"], sort=False)["error"].mean().unstack()
    table("mean error one size up, %", means, 2)
    counts = pd.DataFrame(covered).groupby(["way", "family"], sort=False)[["hits", "n"]].sum()
    table("coverage of 90 % intervals, %", (counts["hits"] / counts["n"]).unstack(), 0)


if __name__ == "__main__":
    main()
