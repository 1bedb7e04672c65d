"""The joint surface: finite differences, dense algebra, a general minimizer, simulated studies."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from scaletune import plotting
from scaletune.cli import main
from scaletune.errors import UserError
from scaletune.fitting import fit
from scaletune.fitting.joint.fit import axes_of, fit_joint, gather, usable
from scaletune.fitting.table import tabulate
from scaletune.records import Fit
from scaletune.surface.basin import basin_excess, directions, knee, phi_derivatives
from scaletune.surface.evaluation import relative_excess
from scaletune.surface.model import Scales, SurfaceRuns, ln_loss, parameter_names
from scaletune.surface.posterior import DIVERGED_EXCESS, _blocks, _weight, linearize, solve
from scaletune.surface.prior import fit_prior
from scaletune.transferring import prepare

DATA = Path(__file__).parents[2] / "shared" / "data" / "steplaw_dense_dev.csv"
SIZES, HORIZONS = (1e8, 2e8, 5e8), (4e9, 1e10, 3e10)
LAW = {
    "lr": (2e-3, -0.6, 0.25),
    "batch": (2.5e5, 0.05, 0.55),
    "wd": (0.1, 0.0, -0.4),
}  # value at 2e8 and 1e10, exponents of n_params and tokens


def optimal(axis, n_params, tokens):
    at, of_n, of_d = LAW[axis]
    return at * (n_params / 2e8) ** of_n * (tokens / 1e10) ** of_d


def minimum_loss(n_params, tokens):
    return 1.7 + 400 / n_params**0.34 + 900 / tokens**0.35


def basin(u, v, w=0.0):
    """A posynomial, relative to the minimum loss and 0 at the optimum: not a fitted form."""
    parts = (
        (0.012, 1.0, 0.0, 0.0),
        (0.012, -1.0, 0.0, 0.0),
        (0.004, 0.8, -0.8, 0.0),
        (0.004, -0.8, 0.8, 0.0),
        (0.006, 0.0, 0.9, 0.0),
        (0.006, 0.0, -0.9, 0.0),
    )
    parts += (
        (0.002, 0.7, 0.0, 0.7),
        (0.002, -0.7, 0.0, -0.7),
        (0.003, 0.0, 0.0, 0.6),
        (0.003, 0.0, 0.0, -0.6),
    )
    return sum(c * np.expm1(a * u + b * v + e * w) for c, a, b, e in parts)


def study(
    seed=0,
    *,
    noise=1e-3,
    scatter=(0.0, 0.0, 0.0),
    sizes=SIZES,
    horizons=HORIZONS,
    per_cell=None,
    decays=(),
):
    """A 7 x 6 grid of lr and batch, or `per_cell` runs of it; its middle is not the optimum."""
    rng, rows = np.random.default_rng(seed), []
    for n_params in sizes:
        for tokens in horizons:
            own = scatter * rng.standard_normal(3)
            for lr in 2e-3 * (n_params / 2e8) ** -0.5 * 2.0 ** np.arange(-3, 4):
                for batch in 3e5 * (tokens / 1e10) ** 0.5 * 2.0 ** np.arange(-3, 3):
                    for decay in decays or (None,):
                        u = math.log(lr / optimal("lr", n_params, tokens)) - own[0]
                        v = math.log(batch / optimal("batch", n_params, tokens)) - own[1]
                        w = math.log(decay / optimal("wd", n_params, tokens)) if decay else 0.0
                        loss = (
                            minimum_loss(n_params, tokens)
                            * (1 + basin(u, v, w))
                            * math.exp(own[2] + noise * rng.standard_normal())
                        )
                        row = {
                            "n_params": n_params,
                            "tokens": tokens,
                            "batch_tokens": batch,
                            "lr": lr,
                            "loss": loss,
                        }
                        rows.append(row | ({"weight_decay": decay} if decay else {}))
    table = pd.DataFrame(rows)
    if per_cell:
        table = table.groupby(["n_params", "tokens"]).sample(per_cell, random_state=seed)
    return table.reset_index(drop=True)


def gathered(table):
    kept, _ = usable(tabulate(table, ["n_params", "tokens", "batch_tokens", "lr", "loss"]))
    return gather(kept, axes_of(kept))


def quick(table, level=0.95):
    """`fit` without cells held out."""
    return fit_joint(
        tabulate(table, ["n_params", "tokens", "batch_tokens", "lr", "loss"]), [], level
    )


@pytest.fixture(scope="module")
def trials():
    return study()


@pytest.fixture(scope="module")
def fitted(trials):
    return fit(trials, "joint")


# the form


@pytest.mark.parametrize(("skew", "ln_reach"), [(0.0, 0.0), (0.9, -1.0), (-0.5, 0.7)])
def test_a_knee_is_a_parabola_at_its_minimum_and_has_two_slopes_far_out(skew, ln_reach):
    h = 1e-3
    below, at, above = knee(np.array([-h, 0.0, h]), skew, ln_reach)[0]
    assert at == pytest.approx(0, abs=1e-12) and below + above == pytest.approx(h * h, rel=1e-4)
    left, right = knee(np.array([-1e6, 1e6]), skew, ln_reach)[1]
    assert right / -left == pytest.approx((1 + math.tanh(skew)) / (1 - math.tanh(skew)))
    assert knee(np.array([0.3]), 0.0, 9.0)[0][0] == pytest.approx(0.3**2 / 2, rel=1e-6)


@pytest.mark.parametrize(
    "form",
    [lambda t, q: knee(t, q[0], q[1]), lambda t, q: phi_derivatives(t, q[0])],
    ids=["knee", "phi"],
)
@pytest.mark.parametrize("skew", [-0.4, 1e-5, 0.8])
def test_slopes_of_forms_are_those_of_finite_differences(form, skew):
    t, q, h = np.linspace(-2, 2, 9), np.array([skew, 0.2]), 1e-6
    value, *slopes = form(t, q)
    assert (form(t + h, q)[0] - form(t - h, q)[0]) / (2 * h) == pytest.approx(slopes[0], abs=1e-8)
    for i, slope in enumerate(slopes[1:]):
        step = h * np.eye(2)[i]
        assert (form(t, q + step)[0] - form(t, q - step)[0]) / (2 * h) == pytest.approx(
            slope, abs=2e-5
        )
    assert value.min() >= -1e-12


@pytest.mark.parametrize("axes", [2, 3])
def test_the_excess_without_numpy_equals_that_with_numpy(axes):
    rng, ways = np.random.default_rng(axes), directions(axes)
    offset, shape = (
        rng.normal(size=(20, axes)),
        np.array([*rng.normal(-4, 0.5, len(ways)), *rng.normal(0.5, 0.3, len(ways)), -0.3]),
    )
    value = dict(
        zip(
            [*(f"curvature.{w}" for w in ways), *(f"skew.{w}" for w in ways), "reach.lr"],
            shape.tolist(),
            strict=True,
        )
    )
    excess, to_offset, _ = basin_excess(offset, shape)
    for row, h, slope in zip(offset.tolist(), excess, to_offset[:, 0], strict=True):
        assert relative_excess(value, row) == pytest.approx((h, slope), rel=1e-9, abs=1e-12)


def test_jacobian_is_that_of_finite_differences(trials):
    runs, _ = gathered(trials)
    rng, given = np.random.default_rng(0), fit_prior(runs)
    theta, delta = (
        given[:, 0] + 0.1 * rng.standard_normal(len(given)),
        0.1 * rng.standard_normal((runs.n_cells, 3)),
    )
    _, to_theta, to_delta, _ = ln_loss(theta, delta, runs)
    for i, step in enumerate(1e-6 * np.eye(len(theta))):
        assert (
            ln_loss(theta + step, delta, runs)[0] - ln_loss(theta - step, delta, runs)[0]
        ) / 2e-6 == pytest.approx(to_theta[:, i], abs=1e-7)
    for i, step in enumerate(1e-6 * np.eye(3)):
        assert (
            ln_loss(theta, delta + step, runs)[0] - ln_loss(theta, delta - step, runs)[0]
        ) / 2e-6 == pytest.approx(to_delta[:, i], abs=1e-7)


# the solver


def test_blocks_of_the_covariance_are_those_of_the_dense_inverse(trials):
    runs, _ = gathered(trials)
    given = fit_prior(runs)
    solved = solve(runs, given, scatter=np.array([0.1, 0.2, 0.003]), noise=(1e-3, 0.15), rounds=1)
    _, to_theta, to_delta, _ = ln_loss(solved.theta, solved.delta, runs)
    scales = Scales(1e-3, 0.15, solved.scales.scatter)
    weight, p = _weight(solved.residuals, scales.variance(solved.excess)), len(given)
    own = np.zeros((len(runs.y), runs.n_cells, 3))
    own[np.arange(len(runs.y)), runs.cell] = to_delta
    jacobian = np.hstack([to_theta, own.reshape(len(runs.y), -1)])
    sd = np.concatenate([given[:, 1], np.tile(scales.scatter, runs.n_cells)])
    dense = np.linalg.inv(jacobian.T @ (jacobian * weight[:, None]) + np.diag(sd**-2.0))
    assert solved.covariance == pytest.approx(dense[:p, :p], rel=1e-6, abs=1e-10)
    assert solved.own[4] == pytest.approx(
        dense[p + 12 : p + 15, p + 12 : p + 15], rel=1e-6, abs=1e-10
    )
    assert solved.cross[4] == pytest.approx(dense[:p, p + 12 : p + 15], rel=1e-6, abs=1e-10)
    assert _blocks(runs, given, scales, weight, to_theta, to_delta)[0].shape == (p, p)


def test_a_general_minimizer_does_not_improve_the_map(trials):
    runs, _ = gathered(trials)
    given, sd = fit_prior(runs), np.array([0.1, 0.2, 0.003])
    solved = solve(runs, given, scatter=sd, noise=(1e-3, 0.15), rounds=30)
    scale2, p = (1e-3) ** 2 + (0.15 * solved.excess) ** 2, len(given)

    def cost(z):
        left = runs.y - ln_loss(z[:p], z[p:].reshape(-1, 3), runs)[0]
        return (
            3 * np.log1p(left**2 / (5 * scale2)).sum()
            + (((z[:p] - given[:, 0]) / given[:, 1]) ** 2).sum() / 2
            + ((z[p:].reshape(-1, 3) / sd) ** 2).sum() / 2
        )

    z = np.concatenate([solved.theta, solved.delta.ravel()])
    assert cost(z) == pytest.approx(solved.objective, rel=1e-3)
    assert (
        optimize.minimize(cost, z, method="L-BFGS-B", options={"maxiter": 30}).fun > cost(z) - 0.02
    )


def test_the_fit_depends_neither_on_the_order_of_rows_nor_on_units(trials, fitted):
    again = quick(trials.sample(frac=1, random_state=1))
    assert {k: p["value"] for k, p in again.params.items()} == pytest.approx(
        {k: p["value"] for k, p in fitted.params.items()}, rel=1e-6
    )
    sequences = quick(trials.assign(batch_tokens=trials["batch_tokens"] / 2048))
    for name in ("lr.N", "lr.D", "batch.D", "curvature.ratio"):
        assert sequences.params[name]["value"] == pytest.approx(
            fitted.params[name]["value"], rel=1e-4
        )


# estimates


def test_the_law_of_a_study_is_recovered(fitted):
    for axis in ("lr", "batch"):
        for name, truth in zip(("N", "D"), LAW[axis][1:], strict=True):
            low, high = fitted.params[f"{axis}.{name}"]["interval"]
            assert low < truth < high and high - low < 0.6
    best = fitted.predict(n_params=1e9, tokens=5e10)
    assert best.lr == pytest.approx(optimal("lr", 1e9, 5e10), rel=0.2)
    assert best.batch_tokens == pytest.approx(optimal("batch", 1e9, 5e10), rel=0.25)
    assert best.loss == pytest.approx(minimum_loss(1e9, 5e10), rel=0.01)
    assert fitted.held_out["worst_excess"] < 1e-3 and len(fitted.held_out["cells"]) == 9


def test_the_optimum_of_a_cell_is_not_biased_by_its_lowest_run(trials, fitted):
    lowest = trials.groupby(["n_params", "tokens"])["loss"].min()
    for cell in fitted.cells:
        at = cell["n_params"], cell["tokens"]
        assert cell["status"] == "ok" and cell["lr"] == pytest.approx(optimal("lr", *at), rel=0.1)
        assert cell["batch_tokens"] == pytest.approx(optimal("batch", *at), rel=0.12)
        assert abs(cell["floor"] / minimum_loss(*at) - 1) < 2e-3
    above = [lowest[cell["n_params"], cell["tokens"]] / cell["floor"] - 1 for cell in fitted.cells]
    assert np.mean(
        [
            cell["floor"] / minimum_loss(cell["n_params"], cell["tokens"]) - 1
            for cell in fitted.cells
        ]
    ) == pytest.approx(0, abs=1.5e-3)  # the fitted form differs from the true one
    assert min(above) < 0  # in some cell the lowest run is below the minimum loss: noise


def test_a_given_batch_size_gets_the_optimal_lr_at_it(fitted):
    at = {"n_params": 4e8, "tokens": 2e10}
    free = fitted.predict(**at)
    double = fitted.predict(**at, batch_tokens=2 * free.batch_tokens)
    u, v = math.log(double.lr / free.lr), math.log(2)
    value = dict(zip(fitted.solution["names"], fitted.solution["vector"], strict=True))
    best = optimize.minimize_scalar(
        lambda x: relative_excess(value, [x, v])[0],
        bounds=(-3, 3),
        method="bounded",
        options={"xatol": 1e-9},
    ).x
    assert u == pytest.approx(best, abs=1e-5) and 0 < u < v
    truth = optimize.minimize_scalar(
        lambda x: basin(x, math.log(2 * free.batch_tokens / optimal("batch", **at))),
        bounds=(-3, 3),
        method="bounded",
    ).x
    assert double.lr == pytest.approx(optimal("lr", **at) * math.exp(truth), rel=0.15)
    assert (
        double.batch_tokens == 2 * free.batch_tokens
        and double.interval["batch_tokens"] is None
        and double.loss > free.loss
    )
    assert fitted.predict(**at, batch_tokens=free.batch_tokens).lr == pytest.approx(
        free.lr, rel=1e-6
    )


def test_at_the_ends_of_a_band_loss_is_a_quarter_percent_up(fitted):
    best = fitted.predict(n_params=2e8, tokens=1e10)
    value, centre = (
        dict(zip(fitted.solution["names"], fitted.solution["vector"], strict=True)),
        fitted.solution["centre"],
    )
    wide = math.exp(
        value["width.n"] * (math.log(2e8) - centre[0])
        + value["width.d"] * (math.log(1e10) - centre[1])
    )
    for i, name in enumerate(("lr", "batch_tokens")):
        for end in best.band[name]:
            offset = [0.0, 0.0]
            offset[i] = math.log(end / getattr(best, name))
            assert wide * relative_excess(value, offset)[0] == pytest.approx(0.0025, rel=1e-6)
    assert best.band["loss"] == [best.loss, pytest.approx(1.0025 * best.loss)]


def test_intervals_cover_new_cells():
    """90 % intervals at a four times larger scale; the cells of each study deviate from the law."""
    hits, scatter = [], np.array([0.12, 0.15, 0.002])
    for seed in range(20):
        made = quick(study(seed, scatter=scatter, per_cell=10), 0.9)
        best, own = (
            made.predict(n_params=1e9, tokens=6e10),
            scatter * np.random.default_rng([7, seed]).standard_normal(3),
        )
        truth = dict(
            zip(
                ("lr", "batch_tokens"),
                (
                    optimal(a, 1e9, 6e10) * math.exp(o)
                    for a, o in zip(("lr", "batch"), own, strict=False)
                ),
                strict=True,
            )
        )
        truth["loss"] = minimum_loss(1e9, 6e10) * math.exp(own[2])
        hits.append(
            [
                best.interval[name][0] < truth[name] < best.interval[name][1]
                for name in ("lr", "batch_tokens", "loss")
            ]
        )
    assert (np.mean(hits, axis=0) >= 0.8).all() and np.mean(hits) <= 0.99


@pytest.mark.parametrize("per_cell", [4, 8])
def test_few_runs_per_cell_are_enough(per_cell):
    gaps = []
    for seed in range(4):
        best = quick(study(seed, per_cell=per_cell)).predict(n_params=1e9, tokens=5e10)
        gaps.append(
            basin(
                math.log(best.lr / optimal("lr", 1e9, 5e10)),
                math.log(best.batch_tokens / optimal("batch", 1e9, 5e10)),
            )
        )
    assert np.mean(gaps) < 2e-3 and max(gaps) < 6e-3


def test_weight_decay_is_an_axis_when_cells_vary_it():
    made = quick(study(decays=(0.025, 0.1, 0.4), per_cell=40))
    low, high = made.params["wd.D"]["interval"]
    assert made.solution["axes"] == ["lr", "batch", "wd"] and low < -0.4 < high and high - low < 0.6
    best = made.predict(n_params=5e8, tokens=3e10)
    assert (
        best.weight_decay == pytest.approx(optimal("wd", 5e8, 3e10), rel=0.35)
        and best.to_dict()["weight_decay"] == best.weight_decay
    )
    assert best.lr == pytest.approx(optimal("lr", 5e8, 3e10), rel=0.2)


# warnings and errors


def noise_factors(n):
    return np.exp(0.02 * np.random.default_rng(0).standard_normal(n))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t[t["n_params"] == 1e8],
            "all runs have the same n_params: lr.N, batch.N and loss.alpha are not identified",
        ),
        (
            lambda t: t[t["tokens"] == 1e10],
            "all runs have the same tokens: lr.D, batch.D and loss.beta are not identified",
        ),
        (lambda t: t[t["tokens"] / t["n_params"] == 50], "poorly constrained (prior-dominated): "),
        (
            lambda t: t.assign(tokens=20 * t["n_params"]),
            "tokens follow n_params**1 in all settings",
        ),
        (
            lambda t: t.assign(batch_tokens=2.0**18),
            "batch sensitivity unknown: include two more batch sizes in the sweep"
            " (all runs have batch_tokens 2.621e+05;",
        ),
        (lambda t: t[t["lr"] < 1.2e-3 * (t["n_params"] / 2e8) ** -0.5], "above the trained range"),
        (lambda t: pd.concat([t, t[:7]]), "7 runs are duplicates of others"),
        (
            lambda t: t.assign(weight_decay=np.where(t.index % 2, 0.1, 0.0)),
            "weight_decay differs between runs",
        ),
        (lambda t: t.assign(loss=t["loss"] * noise_factors(len(t))), "the form fits badly"),
    ],
)  # fmt: skip
def test_a_fit_warns_of_what_its_runs_do_not_determine_and_predicts(trials, change, said):
    made = quick(change(trials))
    assert any(said in sentence for sentence in made.status), made.status
    best = made.predict(n_params=5e8, tokens=1e10)
    for name in ("lr", "batch_tokens", "loss"):
        low, high = best.interval[name]
        assert 0 < low < getattr(best, name) < high
    json.dumps(made.to_dict(), allow_nan=False)


def test_exponents_that_no_run_determines_keep_their_priors(trials):
    made = fit(trials[(trials["n_params"] == 2e8) & (trials["tokens"] == 1e10)], "joint")
    assert made.params["lr.D"]["value"] == pytest.approx(0.1, abs=0.02) and made.params["batch.D"][
        "value"
    ] == pytest.approx(0.5, abs=0.02)
    assert made.params["lr.N"]["value"] == pytest.approx(-0.43, abs=0.02) and made.held_out == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[:4], "needs at least 5 usable runs, but got 4 of 4"),
        (lambda t: t.assign(status="diverged"), "needs at least 5 usable runs, but got 0 of"),
        (lambda t: t.drop(columns="batch_tokens"), "needs the column `batch_tokens`"),
        (lambda t: t.assign(lr=-t["lr"]), "`lr` must be a number above 0"),
        (lambda t: t.assign(batch_tokens=np.nan), "`batch_tokens` must be a number above 0"),
        (lambda t: t.assign(loss=0.0), "`loss` must be above 0"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(trials, change, said):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        fit(change(trials), "joint")
    assert "\n" not in str(error.value)


def test_a_level_is_between_none_and_all(trials):
    with pytest.raises(UserError, match="0 < level < 1"):
        fit(trials, "joint", level=1.0)


def test_diverged_missing_and_high_runs_are_dropped_with_the_reason(trials):
    table = trials.assign(id=[f"run{i}" for i in range(len(trials))], status="done")
    table.loc[0, "status"], table.loc[1, "loss"], table.loc[2, "loss"] = "diverged", np.nan, 11.0
    made = quick(table)
    assert (
        made.dropped["run0"] == made.dropped["run1"] == "diverged"
        and "above the lowest loss" in made.dropped["run2"]
    )
    assert set(made.used) | set(made.dropped) == set(table["id"]) and not set(made.used) & set(
        made.dropped
    )


def test_held_out_cells_are_not_fitted_and_are_judged(trials):
    made = fit(trials, "joint", holdout="n_params > 4e8")
    assert (
        made.ranges["n_params"] == [1e8, 2e8]
        and made.held_out["kind"] == "hold-out: n_params > 4e8"
    )
    assert len(made.held_out["cells"]) == 3 and made.held_out["worst_excess"] < 3e-3
    assert {"coverage", "batch_coverage", "loss_coverage"} <= made.held_out.keys()
    assert made.params == quick(trials[trials["n_params"] < 4e8]).params


# diverged runs


def test_a_diverged_run_bounds_the_excess_from_below(trials):
    """It has a residual only where the model expects a low loss; the minimum loss is not read."""
    runs, _ = gathered(trials)
    y = runs.y.copy()
    y[[0, 5, 9]] = np.nan
    prior = fit_prior(runs)
    diverged = SurfaceRuns(runs.n, runs.d, runs.x, y, runs.cell)
    theta, delta, h = prior[:, 0], np.zeros((runs.n_cells, 3)), 1e-6
    residuals, to_theta, to_delta, excess = linearize(theta, delta, diverged)
    finite = linearize(theta, delta, runs)
    for i in (0, 5, 9):
        expected = max(math.log1p(DIVERGED_EXCESS) - math.log1p(excess[i]), 0)
        assert residuals[i] == pytest.approx(expected, abs=1e-12)
        assert not to_theta[i, 6:11].any() and to_delta[i, 2] == 0
    others = ~np.isnan(y)
    assert (residuals[others] == finite[0][others]).all()
    for j, step in enumerate(h * np.eye(len(theta))):
        up, down = (linearize(theta + sign * step, delta, diverged)[0] for sign in (1, -1))
        assert (down - up) / (2 * h) == pytest.approx(to_theta[:, j], abs=1e-6)


def test_diverged_runs_move_the_optimum_away_from_them():
    """One setting, three lr that all say "higher is better"; the next two diverge."""
    x = np.log([[1e-4], [2e-4], [4e-4], [8e-4], [1.6e-3]])
    y = np.log([2.10, 2.06, 2.03, np.nan, np.nan])
    zero, cell = np.zeros(5), np.zeros(5, int)
    runs = SurfaceRuns(zero, zero, x, y, cell)
    seen = SurfaceRuns(zero[:3], zero[:3], x[:3], y[:3], cell[:3])
    with_them, without = (solve(each, fit_prior(each)) for each in (runs, seen))
    assert with_them.theta[0] + with_them.delta[0, 0] < without.theta[0] + without.delta[0, 0] - 0.3
    assert np.isfinite(with_them.covariance).all()


# the record and the commands


def test_the_command_line_fits_and_predicts(trials, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trials.to_csv("runs.csv", index=False)
    assert (
        main(["fit", "runs.csv", "--law", "joint", "--out", "FIT.json", "--level", "0.9", "--json"])
        == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert (
        answer["law"] == "joint"
        and {"lr.c", "lr.N", "lr.D", "batch.c", "batch.N", "batch.D", "loss.E"}
        <= answer["params"].keys()
    )
    assert (
        main(["predict", "--fit", "FIT.json", "--n-params", "1e9", "--tokens", "5e10", "--json"])
        == 0
    )
    (made,) = json.loads(capsys.readouterr().out)["predictions"]
    assert made.keys() == {"law", "lr", "batch_tokens", "loss", "interval", "band", "warnings"}
    assert made["interval"].keys() == made["band"].keys() == {"lr", "batch_tokens", "loss"}
    assert made["lr"] == pytest.approx(optimal("lr", 1e9, 5e10), rel=0.2)


def test_an_id_may_name_cells_or_runs_and_rows_may_come_in_any_order(trials, tmp_path, capsys):
    """Other columns, ids that repeat in a cell, shuffled rows, numbers as text, a diverged run."""
    plain = quick(trials.drop(columns="id", errors="ignore"))
    names = trials["n_params"].map("{:.6g}".format) + "/" + trials["tokens"].map("{:.6g}".format)
    other = pd.concat(
        [
            trials.assign(id=names, note="x"),
            trials.assign(id=names, note="x").iloc[[0]].assign(loss=1e5),
        ]
    )
    other.sample(frac=1.0, random_state=4).to_csv(tmp_path / "runs.csv", index=False)
    made = quick(pd.read_csv(tmp_path / "runs.csv", dtype=str))
    assert {name: row["value"] for name, row in made.params.items()} == pytest.approx(
        {name: row["value"] for name, row in plain.params.items()}, rel=1e-6
    )
    with pytest.raises(
        UserError, match="the id of a trial must be unique, or name its setting, but"
    ):
        quick(trials.assign(id=["a", "b"] * (len(trials) // 2)))


def test_predicting_needs_no_numpy(fitted, tmp_path):
    path = fitted.write(tmp_path / "fit.json")
    code = f"""
import sys
from scaletune.predicting import predict
made = predict(n_params=1e9, tokens=5e10, fit={str(path)!r})[0]
print(made.lr, any(name in sys.modules for name in ("numpy", "scipy", "pandas")))"""
    said = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert (
        float(said[0]) == pytest.approx(fitted.predict(n_params=1e9, tokens=5e10).lr)
        and said[1] == "False"
    )


def test_an_incomplete_record_is_a_user_error(fitted):
    cut = replace(fitted, solution={k: v for k, v in fitted.solution.items() if k != "scatter"})
    with pytest.raises(UserError, match=r"must hold `solution\.scatter`"):
        cut.predict(n_params=1e9, tokens=5e10)
    assert Fit.from_dict(fitted.to_dict()).digest == fitted.digest


def test_pictures_show_the_law_and_one_basin(fitted, tmp_path):
    cell = fitted.cells[4]
    contour = plotting.basin_contour(fitted, cell)
    row, column = np.unravel_index(contour.excess.argmin(), contour.excess.shape)
    assert contour.lr[column] == pytest.approx(cell["lr"], rel=0.1) and contour.batch_tokens[
        row
    ] == pytest.approx(cell["batch_tokens"], rel=0.1)
    near = np.abs(contour.runs[:, 2]) < 0.3  # % above the minimum loss
    i, j = (
        np.abs(np.log(contour.runs[near, k, None] / grid)).argmin(1)
        for k, grid in enumerate((contour.lr, contour.batch_tokens))
    )
    assert contour.runs[near, 2] == pytest.approx(contour.excess[j, i], abs=0.35)
    assert [path.name for path in plotting.plot(fitted, tmp_path)] == ["law.png"] and (
        tmp_path / "law.png"
    ).stat().st_size > 20_000


@pytest.mark.skipif(not DATA.exists(), reason="public sweeps are not here")
def test_public_sweeps_are_predicted_in_lr_and_batch():
    """Each of eight cells from the other seven; a tenth of the runs gives nearly the same law."""
    table = pd.read_csv(DATA).drop(columns="lr").rename(columns={"lr_grid": "lr", "run_id": "id"})
    table = table.assign(status=np.where(table["diverged"], "diverged", "done"))
    made = fit(table, "joint", level=0.9)
    excess = [cell["excess"] for cell in made.held_out["cells"]]
    assert np.mean(excess) < 6e-4 and max(excess) < 1.5e-3
    assert made.held_out["worst_loss_error"] < 6e-3 and made.held_out["coverage"] >= 0.75
    few = quick(table.sample(frac=0.1, random_state=0))
    for axis in ("lr", "batch_tokens"):
        full, part = (getattr(f.predict(n_params=1e9, tokens=2e10), axis) for f in (made, few))
        assert part == pytest.approx(full, rel=0.35)


def test_parameters_are_listed_as_the_law_is_written(fitted):
    assert list(fitted.params)[:6] == ["lr.c", "lr.N", "lr.D", "batch.c", "batch.N", "batch.D"]
    assert list(fitted.params)[6:11] == ["loss.E", "loss.A", "loss.B", "loss.alpha", "loss.beta"]
    p = {name: param["value"] for name, param in fitted.params.items()}
    best = fitted.predict(n_params=3e8, tokens=2e10)
    assert best.lr == pytest.approx(p["lr.c"] * 3e8 ** p["lr.N"] * 2e10 ** p["lr.D"], rel=1e-9)
    assert best.batch_tokens == pytest.approx(
        p["batch.c"] * 3e8 ** p["batch.N"] * 2e10 ** p["batch.D"], rel=1e-9
    )
    assert best.loss == pytest.approx(
        p["loss.E"] + p["loss.A"] * 3e8 ** -p["loss.alpha"] + p["loss.B"] * 2e10 ** -p["loss.beta"],
        rel=1e-9,
    )
    assert len(parameter_names(2)) == len(fitted.solution["vector"]) == len(p)


def test_a_transfer_predicts_the_lr_at_the_targets_own_batch_size(fitted, tiny):
    target = tiny()
    made = prepare(fitted, target, force=True)
    best = fitted.predict(
        n_params=made.evidence["n_params"],
        tokens=target.budget.tokens,
        batch_tokens=target.budget.batch_tokens,
    )
    assert (
        made.evidence["lr"] == best.lr
        and made.evidence["batch_tokens"] == target.budget.batch_tokens
    )
