"""Compares methods that estimate a setting's best lr from a few runs: accuracy, and error bars.

Results and conclusions: fits/README.md. Three tests of each method, then the whole package on
public grids and on simulated studies:

- Split halves: a public grid with a factor of 2^(1/2) at one batch size splits into two grids with
  a factor of 2 and no common run. Their two estimates differ only by the errors of the method,
  including those of its functional form.
- Law: leave one setting out and predict its lr.
- Simulated loss basins of several shapes with known optimum and realistic noise.

Without the public data the first two are skipped.

    python benchmarks/optimum_methods.py [path/to/steplaw_dense_dev.csv]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaletune.fitting import fit
from scaletune.fitting.optimum.lr_basin import Basin, estimate_noise, locate
from scaletune.fitting.optimum.power_law import fit_power_law
from scaletune.predicting import from_fit
from scaletune.surface.basin import REACH, phi

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "steplaw_dense_dev.csv"
# ln lr of the optimum and its standard error; None if the method gives none.
Estimate = tuple[float, float] | None
Method = Callable[[dict[str, Any], float, int], Estimate]


def point(x: np.ndarray, y: np.ndarray, reach: float = REACH) -> dict[str, Any]:
    """A slice as the fitting code has it: runs within `reach` of the lowest, and its neighbours."""
    best = int(np.argmin(y))
    keep = y <= (1 + reach) * y[best]
    keep[max(best - 1, 0) : best + 2] = True
    return {
        "x": x[keep],
        "y": y[keep],
        "n": np.ones(int(keep.sum())),
        "ss": 0.0,
        "dof": 0,
        "shared": 0.0,
    }


def argmin(p: dict[str, Any], variance: float, dof: int) -> Estimate:
    """The lr with the lowest loss; its error is assumed uniform over one grid step."""
    return float(p["x"][np.argmin(p["y"])]), float(np.diff(p["x"]).mean() / math.sqrt(12))


def parabola(p: dict[str, Any], variance: float, dof: int) -> Estimate:
    """The vertex through the lowest point and its two neighbours."""
    best = int(np.argmin(p["y"]))
    return _vertex(p["x"][best - 1 : best + 2], p["y"][best - 1 : best + 2], 2, variance)


def window(p: dict[str, Any], variance: float, dof: int, share: float = 0.02) -> Estimate:
    """A parabola through the points within 2 % of the lowest (three at least)."""
    keep = p["y"] <= max((1 + share) * p["y"].min(), np.sort(p["y"])[2])
    return _vertex(p["x"][keep], p["y"][keep], 2, variance)


def cubic(p: dict[str, Any], variance: float, dof: int) -> Estimate:
    """A cubic through every point of the basin (a parabola when there are only three)."""
    return _vertex(p["x"], p["y"], 3 if len(p["x"]) > 3 else 2, variance)


def linex(p: dict[str, Any], variance: float, dof: int) -> Estimate:
    """const - p ln(lr) + q lr through the points within 4 %: the skewed form with s = 1."""
    keep = p["y"] <= max(1.04 * p["y"].min(), np.sort(p["y"])[2])
    x, y = p["x"][keep], p["y"][keep]
    design = np.column_stack([np.ones_like(x), x, np.exp(x - x.mean())])
    c = np.linalg.lstsq(design, y, rcond=None)[0]
    if c[1] >= 0 or c[2] <= 0:
        return None
    covariance = np.linalg.inv(design.T @ design) * variance
    slope = np.array([0, 1 / c[1], -1 / c[2]])
    return float(x.mean() + math.log(-c[1] / c[2])), math.sqrt(slope @ covariance @ slope)


def ours(p: dict[str, Any], variance: float, dof: int) -> Estimate:
    """The method of the package: scaletune/fitting/optimum/lr_basin.py."""
    optimum = locate(p, variance, dof)
    return optimum["x"], optimum["se"]


def _vertex(x: np.ndarray, y: np.ndarray, degree: int, variance: float) -> Estimate:
    """The lowest minimum of a polynomial inside its points; the error is by the delta method."""
    if len(x) < degree + 1:
        return None
    t = x - x.mean()
    design = np.vander(t, degree + 1)
    c = np.linalg.lstsq(design, y, rcond=None)[0]
    roots = [
        r.real
        for r in np.roots(np.polyder(c))
        if abs(r.imag) < 1e-9
        and np.polyval(np.polyder(c, 2), r.real) > 0
        and t[0] <= r.real <= t[-1]
    ]
    if not roots:
        return None
    root = min(roots, key=lambda r: float(np.polyval(c, r)))
    powers = np.arange(degree, -1, -1)
    slope = np.where(
        powers > 0, powers * np.power(root, np.maximum(powers - 1, 0)), 0.0
    ) / np.polyval(np.polyder(c, 2), root)
    return float(x.mean() + root), math.sqrt(
        variance * float(slope @ np.linalg.inv(design.T @ design) @ slope)
    )


METHODS: dict[str, Method] = {
    "argmin": argmin,
    "parabola of 3": parabola,
    "parabola in 2 %": window,
    "cubic": cubic,
    "skewed, s = 1": linex,
    "ours": ours,
}


def bracketed(y: np.ndarray) -> bool:
    return 0 < int(np.argmin(y)) < len(y) - 1


def halves(table: pd.DataFrame, extra: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Per method: errors from the difference of two halves of a slice, against claimed errors."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _, group in table.groupby(["cell_id", "batch_tokens"]):
        x, y = (
            np.log(group["lr_grid"].to_numpy()),
            group["loss"].to_numpy() + extra * rng.standard_normal(len(group)),
        )
        if all(bracketed(y[i::2]) for i in (0, 1)) and bracketed(y):
            pairs.append((point(x, y), point(x[::2], y[::2]), point(x[1::2], y[1::2])))
    variance, dof = estimate_noise([half for _, *both in pairs for half in both])
    rows = []
    for name, method in METHODS.items():
        estimates = [
            (method(a, variance, dof), method(b, variance, dof), ours(full, variance, dof))
            for full, a, b in pairs
        ]
        both = [(a, b, full) for a, b, full in estimates if a and b and full]
        difference = np.array([a[0] - b[0] for a, b, _ in both])
        claimed = np.array([math.hypot(a[1], b[1]) for a, b, _ in both])
        bias = np.mean([half[0] - full[0] for a, b, full in both for half in (a, b)])
        rows.append(
            {
                "method": name,
                "slices": len(both),
                "rms error": float(np.sqrt(np.mean(difference**2) / 2)),
                "claimed": float(np.sqrt(np.mean(claimed**2) / 2)),
                "bias": float(bias),
                "coverage": float(np.mean(np.abs(difference) < 1.96 * claimed)),
            }
        )
    return pd.DataFrame(rows)


def law(table: pd.DataFrame) -> pd.DataFrame:
    """Per method, leave one setting out: excess loss at the predicted lr, and coverage.

    Covers every batch size and both of its halves. Excess loss: of the full grid's loss basin over
    its minimum loss, and of the full grid's losses, interpolated, over their minimum.
    """
    scores: dict[str, list[tuple[float, float, bool, float]]] = {name: [] for name in METHODS}
    for _, at_batch in table.groupby("batch_tokens"):
        for offset in (0, 1):
            cells = []
            for number, (_, group) in enumerate(at_batch.groupby("cell_id")):
                x, y = np.log(group["lr_grid"].to_numpy()), group["loss"].to_numpy()
                if bracketed(y) and bracketed(y[offset::2]):
                    scale = {
                        "n_params": group["n_params"].iloc[0],
                        "tokens": group["tokens_nominal"].iloc[0],
                        "cell": number,
                    }
                    cells.append(
                        {**scale, "full": (x, y), "half": point(x[offset::2], y[offset::2])}
                    )
            if len(cells) >= 6:
                for name, method in METHODS.items():
                    scores[name] += leave_out(cells, method)
    return pd.DataFrame([{"method": name, **_summary(rows)} for name, rows in scores.items()])


def leave_out(
    cells: list[dict[str, Any]], method: Method
) -> list[tuple[float, float, bool, float]]:
    """Predicts each setting from the others.

    Returns (excess on the basin, excess on the losses, covered, half-width in ln lr) of each.
    """
    noise = estimate_noise([c["half"] for c in cells])
    optima = [
        {**c, "x": e[0], "se": e[1], "half_width": [1.0, 1.0]}
        for c in cells
        if (e := method(c["half"], *noise))
    ]
    out = []
    for i, target in enumerate(optima):
        solution = fit_power_law(optima[:i] + optima[i + 1 :], ["n_params", "tokens"])["solution"]
        at = np.array(
            [1.0]
            + [
                math.log(target[c]) - m
                for c, m in zip(solution["columns"], solution["centre"], strict=True)
            ]
        )
        predicted = float(at @ solution["vector"])
        half = solution["quantile"] * math.sqrt(
            at @ np.array(solution["covariance"]) @ at + solution["scatter"] ** 2
        )
        x, y = target["full"]
        optimum = locate(point(x, y), *noise)
        basin = Basin(**optimum["basin"])
        on_basin = float(basin(math.exp(predicted))) / optimum["basin"]["floor"] - 1
        on_losses = float(np.interp(predicted, x, y)) / y.min() - 1
        out.append(
            (
                on_basin,
                on_losses,
                abs(predicted - optimum["x"]) < math.hypot(half, 1.96 * optimum["se"]),
                half,
            )
        )
    return out


def _summary(rows: list[tuple[float, float, bool, float]]) -> dict[str, float]:
    basin, losses, covered, half = (np.array(column) for column in zip(*rows, strict=True))
    return {
        "n": len(rows),
        "median excess": float(np.median(basin)),
        "worst": float(basin.max()),
        "median on losses": float(np.median(losses)),
        "worst on losses": float(losses.max()),
        "coverage": float(covered.mean()),
        "half-width": float(np.median(half)),
    }


# Loss above the minimum in nats/token, as a function of t = ln(lr / optimum).
SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "parabola": lambda t: 0.015 * t**2,
    "s = 1": lambda t: 0.03 * (np.exp(t) - 1 - t),
    "s = 2": lambda t: 0.03 * (np.exp(2 * t) - 1 - 2 * t) / 4,
    "two sides": lambda t: np.where(t < 0, 0.012, 0.05) * t**2,
    "quartic": lambda t: 0.015 * t**2 + 0.006 * np.maximum(t, 0) ** 4,
    "flat left": lambda t: np.where(
        t < 0, 0.05 * (np.sqrt(1 + t**2) - 1), 0.025 * t**2 + 0.02 * np.maximum(t, 0) ** 3
    ),
    "shallow": lambda t: 0.008 * (np.exp(t) - 1 - t),
}


def synthetic(noise: float = 0.004, studies: int = 60, seeds: int = 2) -> pd.DataFrame:
    """Rms error, bias and coverage of nominal 95 % intervals per shape of the loss basin.

    Studies of six settings, seven learning rates a factor of 2 apart at a random phase, two seeds.
    """
    rows = []
    for shape, excess in SHAPES.items():
        rng = np.random.default_rng(len(shape))
        hits: dict[str, list[tuple[float, bool]]] = {name: [] for name in METHODS}
        for _ in range(studies):
            optima, points = rng.uniform(-0.5, 0.5, 6) * math.log(2), []
            for optimum in optima:
                x = (np.arange(7) - 3) * math.log(2)
                clean = 3.0 + excess(x - optimum)
                runs = clean + noise * (1 + 3 * (clean - 3.0)) * rng.standard_normal((seeds, 7))
                residuals = runs - runs.mean(0) - runs.mean(1, keepdims=True) + runs.mean()
                noise_terms = {"ss": float((residuals**2).sum()), "dof": 6 * (seeds - 1)}
                points.append(point(x, runs.mean(0)) | noise_terms | {"n": None})
            for p in points:
                p["n"] = np.full(len(p["x"]), float(seeds))
            variance, dof = estimate_noise(points)
            for name, method in METHODS.items():
                for p, optimum in zip(points, optima, strict=True):
                    each = variance if name == "ours" else variance / seeds
                    if bracketed(p["y"]) and (estimate := method(p, each, dof)):
                        error = estimate[0] - optimum
                        hits[name].append((error, abs(error) < 1.96 * estimate[1]))
        row: dict[str, Any] = {"shape": shape}
        for name, pairs in hits.items():
            errors, coverage = np.array([e for e, _ in pairs]), np.mean([c for _, c in pairs])
            rms = np.sqrt(np.mean(errors**2))
            row[name] = f"{rms:.3f} {np.mean(errors):+.3f} {coverage:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def studies(n: int = 40) -> pd.DataFrame:
    """`fit` end to end on simulated studies, extrapolated 4x in size and 5x in tokens."""
    cases: dict[str, dict[str, Any]] = {
        "3 x 2 settings": {},
        "scatter 0.1": {"scatter": 0.1},
        "scatter 0.2": {"scatter": 0.2},
        "one seed": {"seeds": 1},
        "s = 0.3": {"skew": 0.3},
        "s = 1.6": {"skew": 1.6},
        "noise 0.01": {"noise": 0.01},
        "3 x 3 settings": {"horizons": (2e7, 6e7, 2e8)},
    }
    rows = []
    for name, case in cases.items():
        scores = []
        for seed in range(n):
            rng = np.random.default_rng(seed)
            result = fit(study(rng, **case), holdout="n_params > 1e7")
            best = from_fit(result, n_params=1.6e7, tokens=3e8)
            scatter = case.get("scatter", 0.0) * rng.standard_normal()
            x, loss = true_optimum(1.6e7, 3e8) + scatter, true_min_loss(1.6e7, 3e8)
            assert best.lr and best.loss and best.interval["lr"] and best.interval["loss"]
            (low, high), (least, most) = np.log(best.interval["lr"]), best.interval["loss"]
            score = {
                "error": math.log(best.lr) - x,
                "half-width": (high - low) / 2,
                "coverage": low < x < high,
                "loss error": best.loss / loss - 1,
                "loss half-width": (most - least) / 2 / loss,
                "loss coverage": least < loss < most,
            }
            scores.append(score)
        s = pd.DataFrame(scores).astype(float)
        rows.append(
            {
                "study": name,
                "rms error": np.sqrt(np.mean(s["error"] ** 2)),
                "half-width": np.median(s["half-width"]),
                "coverage": s["coverage"].mean(),
                "loss error": np.sqrt(np.mean(s["loss error"] ** 2)),
                "loss half-width": np.median(s["loss half-width"]),
                "loss coverage": s["loss coverage"].mean(),
            }
        )
    return pd.DataFrame(rows)


def true_optimum(n_params: float, tokens: float) -> float:
    return math.log(4e-3) - 0.1 * math.log(n_params / 1e6) + 0.1 * math.log(tokens / 3e7)


def true_min_loss(n_params: float, tokens: float) -> float:
    return 1.8 + 24 / n_params**0.35 + 600 / tokens**0.37


def study(
    rng: np.random.Generator,
    *,
    horizons: tuple[float, ...] = (2e7, 6e7),
    seeds: int = 2,
    noise: float = 0.003,
    scatter: float = 0.0,
    skew: float = 1.0,
) -> pd.DataFrame:
    """Simulated runs: three sizes, seven lrs a factor of 2 apart, and one more setting to hold out.

    A seed adds a shift (sd 0.01 nats) that is the same at every lr of a setting.
    """
    rows = []
    for n_params, tokens in [*((n, d) for n in (3e5, 1e6, 4e6) for d in horizons), (1.6e7, 3e8)]:
        best = true_optimum(n_params, tokens) + scatter * rng.standard_normal()
        for seed in range(seeds):
            shift = 0.01 * rng.standard_normal()
            for x in math.log(4e-3) + math.log(2) * np.arange(-3, 4):
                excess = 0.03 * float(phi(x - best, skew))
                clean = true_min_loss(n_params, tokens) + excess + shift
                loss = clean + noise * (1 + 5 * excess) * rng.standard_normal()
                scale = {"n_params": n_params, "tokens": tokens}
                rows.append({**scale, "lr": math.exp(x), "seed": seed, "loss": loss})
    return pd.DataFrame(rows)


HELD_OUT = (
    "kind",
    "median_excess",
    "worst_excess",
    "coverage",
    "worst_loss_error",
    "loss_coverage",
)


def whole(table: pd.DataFrame) -> pd.DataFrame:
    """`fit` on the full grids: each batch size separately, then the best of each setting.

    Leaves one setting out, and the largest size.
    """
    runs = table.assign(lr=table["lr_grid"], id=table["run_id"])
    groups: dict[str, pd.DataFrame] = {
        f"{size:g}": group
        for size, group in runs.groupby("batch_tokens")
        if group["cell_id"].nunique() > 5
    }
    rows = []
    for name, group in (groups | {"best": runs}).items():
        for holdout in (None, "n_params > 4e8"):
            result = fit(group, holdout=holdout)
            if result.held_out:
                row = {
                    "batch": name,
                    "b": result.params["b"]["value"],
                    "scatter": result.solution["scatter"],
                }
                rows.append(row | {key: result.held_out[key] for key in HELD_OUT})
    return pd.DataFrame(rows)


def main(path: Path) -> None:
    pd.set_option("display.width", 200, "display.max_columns", 20, "display.precision", 4)
    if path.exists():
        table = pd.read_csv(path)
        table = table[~table["diverged"]].sort_values(["cell_id", "batch_tokens", "lr_grid"])
        print("split halves\n", halves(table).to_string(index=False))
        noisy = halves(table, extra=0.0025)
        print("split halves, 0.1 % noise added\n", noisy.to_string(index=False))
        print("leave one setting out\n", law(table).to_string(index=False))
        print("the package on whole grids\n", whole(table).to_string(index=False))
    else:
        print(f"{path} does not exist: the tests on public grids are skipped")
    print("simulated basins: rms error, bias, coverage\n", synthetic().to_string(index=False))
    print("simulated studies\n", studies().to_string(index=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA)
