"""Compares the joint surface with other ways to choose lr and batch size for an untrained setting.

Holds out settings of the public Step Law runs. Each method sees only the runs of the other
settings, all of them or a random share, and predicts (lr, batch size) at the held-out one. Score:
excess loss on the held-out setting's own smoothed surface, a Gaussian process through the runs of
that setting alone: loss at the prediction over the lowest of the surface inside its grid, minus 1.
Splits: each setting in turn, the largest n_params, the largest tokens of every size. Needs
../shared/data; prints markdown. About two minutes on one core.

    OMP_NUM_THREADS=1 python benchmarks/joint_surface.py
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import minimize

from scaletune import laws
from scaletune.errors import UserError
from scaletune.fitting.joint.fit import fit_joint
from scaletune.fitting.optimum.measured_cells import measure_cells
from scaletune.fitting.optimum_laws import fit_cells
from scaletune.fitting.table import tabulate

DATA = Path(__file__).parents[2] / "shared" / "data" / "steplaw_dense_dev.csv"
NEAR = 0.0025  # the authors keep the runs this near to the lowest of their cell (arXiv:2503.04715)
REACH = 0.06  # the smoothed surface uses runs this near to the lowest
LEVEL = 0.9
SHARES = {1.0: 1, 0.4: 3, 0.2: 3, 0.1: 3, 0.05: 3}  # share of the runs: random subsets of it

Array = NDArray[np.float64]
Point = tuple[float, float, dict]  # lr, batch_tokens, and what else a method predicts


@dataclass
class Smooth:
    """A cell's smoothed ln loss over ln lr and ln batch, and its lowest point inside the grid."""

    n_params: float
    tokens: float
    points: Array
    weights: Array
    centre: Array
    spread: Array
    hyper: Array
    best: Array | None = None
    lowest: float = 0.0  # ln loss there, relative to the lowest run's
    min_loss: float = 0.0  # nats/token

    def __call__(self, x: Array) -> Array:
        q = (np.atleast_2d(x) - self.centre) / self.spread
        return kernel(q, self.points, self.hyper) @ self.weights


def kernel(a: Array, b: Array, hyper: Array) -> Array:
    """Covariance: a wide quadratic trend, and a squared exponential for the rest.

    hyper: ln lengths (2), ln amplitude, ln noise, ln misfit.
    """

    def trend(q: Array) -> Array:
        return np.column_stack([np.ones(len(q)), q, q[:, 0] ** 2, q[:, 1] ** 2, q[:, 0] * q[:, 1]])

    distance = (((a[:, None] - b[None]) / np.exp(hyper[:2])) ** 2).sum(-1)
    return 1e-2 * trend(a) @ trend(b).T + np.exp(2 * hyper[2] - distance / 2)


def smooth(cell: pd.DataFrame) -> Smooth:
    """Fits the surface by maximum likelihood.

    The noise is near 0.1 %, as in the sweep's repeated runs, and grows with the loss.
    """
    cell = cell[cell["loss"] <= (1 + REACH) * cell["loss"].min()]
    x, y = (
        np.log(cell[["lr", "batch_tokens"]].to_numpy(float)),
        np.log(cell["loss"].to_numpy(float)),
    )
    base, centre, spread = y.min(), x.mean(0), x.std(0)
    q, y = (x - centre) / spread, y - base

    def noise(hyper: Array) -> Array:
        return np.diag(np.exp(2 * hyper[3]) + (0.1 * y) ** 2 * np.exp(2 * hyper[4]))

    def cost(hyper: Array) -> float:
        factor = np.linalg.cholesky(kernel(q, q, hyper) + noise(hyper))
        half = np.linalg.solve(factor, y)
        penalty = (
            2 * (hyper[:2] ** 2).sum()
            + ((hyper[3] - math.log(1e-3)) / 0.3) ** 2 / 2
            + hyper[4] ** 2
        )
        return float(half @ half / 2 + np.log(np.diag(factor)).sum() + penalty)

    hyper = minimize(
        cost,
        [0, 0, math.log(5e-3), math.log(1e-3), 0],
        method="Nelder-Mead",
        options={"maxiter": 800},
    ).x
    weights = np.linalg.solve(kernel(q, q, hyper) + noise(hyper), y)
    surface = Smooth(
        float(cell["n_params"].median()),
        float(cell["tokens"].median()),
        q,
        weights,
        centre,
        spread,
        hyper,
    )
    grid = np.stack(
        np.meshgrid(*(np.linspace(a, b, 81) for a, b in zip(x.min(0), x.max(0), strict=True))), -1
    ).reshape(-1, 2)
    values = surface(grid)
    surface.best, surface.lowest = grid[values.argmin()], float(values.min())
    surface.min_loss = math.exp(base + surface.lowest)
    return surface


def runs() -> pd.DataFrame:
    table = pd.read_csv(DATA).drop(columns="lr").rename(columns={"lr_grid": "lr", "run_id": "id"})
    status = np.where(table["diverged"], "diverged", "done")
    return table[
        ["id", "cell_id", "n_params", "tokens", "tokens_nominal", "batch_tokens", "lr", "loss"]
    ].assign(status=status)


def splits(table: pd.DataFrame) -> Iterator[tuple[str, list[str]]]:
    """(name, cells held out)."""
    cells = table.groupby("cell_id")[["n_params", "tokens_nominal"]].first()
    yield from (("each setting", [cell]) for cell in cells.index)
    yield "largest n_params", list(cells.index[cells["n_params"] == cells["n_params"].max()])
    yield (
        "largest tokens",
        list(
            cells.index[
                cells["tokens_nominal"]
                == cells.groupby("n_params")["tokens_nominal"].transform("max")
            ]
        ),
    )


def log_log(kept: pd.DataFrame, n_params: float, tokens: float) -> Point:
    """The authors' form, least squares: ln lr on ln n_params, ln tokens; ln batch on ln tokens."""
    logs = {
        c: np.log(kept[c].to_numpy(float)) for c in ("n_params", "tokens", "lr", "batch_tokens")
    }
    one = np.ones(len(kept))
    lr = np.linalg.lstsq(
        np.column_stack([one, logs["n_params"], logs["tokens"]]), logs["lr"], rcond=None
    )[0]
    batch = np.linalg.lstsq(
        np.column_stack([one, logs["tokens"]]), logs["batch_tokens"], rcond=None
    )[0]
    return (
        math.exp(lr @ [1, math.log(n_params), math.log(tokens)]),
        math.exp(batch @ [1, math.log(tokens)]),
        {},
    )


def authors(table: pd.DataFrame) -> Callable[[float, float], Point]:
    done = table[table["status"] == "done"]
    kept = done[done["loss"] <= (1 + NEAR) * done.groupby("cell_id")["loss"].transform("min")]
    return lambda n_params, tokens: log_log(kept, n_params, tokens)


def argmin(table: pd.DataFrame) -> Callable[[float, float], Point]:
    best = table.loc[table[table["status"] == "done"].groupby("cell_id")["loss"].idxmin()]
    return lambda n_params, tokens: log_log(best, n_params, tokens)


def published(n_params: float, tokens: float) -> Point:
    answer, _ = laws.evaluate(laws.law("steplaw_lr_bs"), n_params=n_params, tokens=tokens)
    return answer["lr"], answer["batch_tokens"], {}


def by_cell(table: pd.DataFrame) -> Callable[[float, float], Point]:
    """lr_nd: the best lr of each cell at its best batch size, and a power law through these.

    The batch size is predicted by least squares on the best batch sizes.
    """
    cells = measure_cells(tabulate(table, ["n_params", "tokens", "lr", "loss"]), level=LEVEL)
    if not cells.usable:
        raise UserError("no setting has an optimum inside its grid")
    law = fit_cells("lr_nd", cells, n_draws=100)  # `fit` without its own cross-validation
    kept = pd.DataFrame([{**row, "lr": math.exp(row["x"])} for row in cells.usable])

    def at(n_params: float, tokens: float) -> Point:
        best = law.predict(n_params=n_params, tokens=tokens)
        return (
            best.lr,
            log_log(kept, n_params, tokens)[1],
            {"loss": best.loss, "interval": best.interval},
        )

    return at


def joint(table: pd.DataFrame) -> Callable[[float, float], Point]:
    law = fit_joint(
        tabulate(table, ["n_params", "tokens", "batch_tokens", "lr", "loss"]), [], LEVEL
    )

    def at(n_params: float, tokens: float) -> Point:
        best = law.predict(n_params=n_params, tokens=tokens)
        return best.lr, best.batch_tokens, {"loss": best.loss, "interval": best.interval}

    return at


METHODS = {
    "joint surface": joint,
    "authors' regression (runs within 0.25 %)": authors,
    "lowest run per setting, least squares": argmin,
    "Step Law, published": lambda _: published,
    "`lr_nd`, setting by setting": by_cell,
}


def score(surface: Smooth, point: Point) -> dict[str, float]:
    """Excess loss in %, error of the loss in %, and which intervals cover the smoothed optimum."""
    lr, batch, answer = point
    row = {"gap": 100 * math.expm1(float(surface(np.log([lr, batch]))[0]) - surface.lowest)}
    if answer:
        row["loss error"] = 100 * abs(answer["loss"] / surface.min_loss - 1)
        truth = {
            "lr": math.exp(surface.best[0]),
            "batch_tokens": math.exp(surface.best[1]),
            "loss": surface.min_loss,
        }
        row |= {
            f"{name} covered": float(ends[0] <= truth[name] <= ends[1])
            for name, ends in answer["interval"].items()
            if ends
        }
    return row


def results(table: pd.DataFrame, surfaces: dict[str, Smooth]) -> pd.DataFrame:
    rows = []
    for share, n_draws in SHARES.items():
        for draw in range(n_draws):
            part = table if share == 1 else table.sample(frac=share, random_state=draw)
            for split, held in splits(table):
                for name, method in METHODS.items():
                    seen = part[~part["cell_id"].isin(held)]
                    try:
                        predict = method(seen)
                        points = [
                            predict(surfaces[cell].n_params, surfaces[cell].tokens) for cell in held
                        ]
                    except UserError:
                        rows.append({"share": share, "method": name, "split": split, "failed": 1.0})
                        continue
                    scored = [
                        score(surfaces[cell], point)
                        for cell, point in zip(held, points, strict=True)
                    ]
                    rows += [
                        {"share": share, "method": name, "split": split, "failed": 0.0, **row}
                        for row in scored
                    ]
    return pd.DataFrame(rows)


def markdown(scores: pd.DataFrame, split: str) -> str:
    """Mean (largest) excess loss by method and share of the runs."""
    here = scores[scores["split"] == split]
    shares = list(SHARES)
    lines = [
        f"**{split}**: mean excess loss (largest), %",
        "",
        "| method | " + " | ".join(f"{share:.0%} of runs" for share in shares) + " |",
    ]
    lines.append("|---" * (1 + len(shares)) + "|")
    for name in METHODS:
        cells = []
        for share in shares:
            gaps = here[(here["method"] == name) & (here["share"] == share)]
            some = (
                ""
                if gaps["failed"].all()
                else f"{gaps['gap'].mean():.3f} ({gaps['gap'].max():.2f})"
            )
            cells.append(
                some + (f" {gaps['failed'].mean():.0%} failed" if gaps["failed"].any() else "")
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def intervals(scores: pd.DataFrame) -> str:
    """Error of the predicted loss, and how often 90 % intervals cover the smoothed optimum."""
    columns = ["loss error", "lr covered", "batch_tokens covered", "loss covered"]
    lines = [
        "**loss and 90 % intervals**",
        "",
        "| method | split | share | loss error, % (mean, largest) | coverage: lr | batch | loss |",
        "|---" * 7 + "|",
    ]
    for (name, split, share), rows in scores[scores["loss error"].notna()].groupby(
        ["method", "split", "share"], sort=False
    ):
        mean = rows[columns].mean()
        covered = " | ".join("" if np.isnan(mean[c]) else f"{mean[c]:.0%}" for c in columns[1:])
        lines.append(
            f"| {name} | {split} | {share:.0%} "
            f"| {mean['loss error']:.2f}, {rows['loss error'].max():.2f} | {covered} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    start, table = time.perf_counter(), runs()
    surfaces = {
        cell: smooth(rows) for cell, rows in table[table["status"] == "done"].groupby("cell_id")
    }
    scores = results(table, surfaces)
    for split in scores["split"].unique():
        print(markdown(scores, split))
    print(intervals(scores))
    print(f"\n{len(scores)} predictions in {time.perf_counter() - start:.0f} s")
