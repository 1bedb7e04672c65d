"""The joint surface against finite differences, dense algebra, a general minimizer, and studies whose truth is known."""

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
from scaletune.fitting.joint.basin import directions, height, knee, phi_slopes
from scaletune.fitting.joint.fit import axes_of, fit_joint, gather, usable
from scaletune.fitting.joint.surface import Scales, _blocks, _weight, model, names, prior, solve
from scaletune.fitting.table import tabulate
from scaletune.laws.surface import height as height_at
from scaletune.records import Fit
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


def floor(n_params, tokens):
    return 1.7 + 400 / n_params**0.34 + 900 / tokens**0.35


def basin(u, v, w=0.0):
    """A posynomial less its value at the optimum, in shares of the floor: none of the forms that are fitted."""
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
    """A 7 x 6 grid of lr and batch (or `per_cell` runs drawn from it) about a middle that is a factor off the optimum."""
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
                            floor(n_params, tokens)
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
    [lambda t, q: knee(t, q[0], q[1]), lambda t, q: phi_slopes(t, q[0])],
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
def test_the_height_without_arrays_is_that_with_them(axes):
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
    tall, to_offset, _ = height(offset, shape)
    for row, h, slope in zip(offset.tolist(), tall, to_offset[:, 0], strict=True):
        assert height_at(value, row) == pytest.approx((h, slope), rel=1e-9, abs=1e-12)


def test_jacobian_is_that_of_finite_differences(trials):
    runs, _ = gathered(trials)
    rng, given = np.random.default_rng(0), prior(runs)
    theta, delta = (
        given[:, 0] + 0.1 * rng.standard_normal(len(given)),
        0.1 * rng.standard_normal((runs.n_cells, 3)),
    )
    _, to_theta, to_delta, _ = model(theta, delta, runs)
    for i, step in enumerate(1e-6 * np.eye(len(theta))):
        assert (
            model(theta + step, delta, runs)[0] - model(theta - step, delta, runs)[0]
        ) / 2e-6 == pytest.approx(to_theta[:, i], abs=1e-7)
    for i, step in enumerate(1e-6 * np.eye(3)):
        assert (
            model(theta, delta + step, runs)[0] - model(theta, delta - step, runs)[0]
        ) / 2e-6 == pytest.approx(to_delta[:, i], abs=1e-7)


# the solver


def test_blocks_of_the_covariance_are_those_of_the_dense_inverse(trials):
    runs, _ = gathered(trials)
    given = prior(runs)
    solved = solve(runs, given, scatter=np.array([0.1, 0.2, 0.003]), noise=(1e-3, 0.15), rounds=1)
    _, to_theta, to_delta, _ = model(solved.theta, solved.delta, runs)
    scales = Scales(1e-3, 0.15, solved.scales.scatter)
    weight, p = _weight(solved.left, solved.height, scales), len(given)
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


def test_the_map_is_a_minimum_that_a_general_minimizer_does_not_better(trials):
    runs, _ = gathered(trials)
    given, sd = prior(runs), np.array([0.1, 0.2, 0.003])
    solved = solve(runs, given, scatter=sd, noise=(1e-3, 0.15), rounds=30)
    scale2, p = (1e-3) ** 2 + (0.15 * solved.height) ** 2, len(given)

    def cost(z):
        left = runs.y - model(z[:p], z[p:].reshape(-1, 3), runs)[0]
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


def test_the_answer_depends_on_neither_the_order_of_rows_nor_units(trials, fitted):
    again = quick(trials.sample(frac=1, random_state=1))
    assert {k: p["value"] for k, p in again.params.items()} == pytest.approx(
        {k: p["value"] for k, p in fitted.params.items()}, rel=1e-6
    )
    sequences = quick(trials.assign(batch_tokens=trials["batch_tokens"] / 2048))
    for name in ("lr.N", "lr.D", "batch.D", "curvature.ratio"):
        assert sequences.params[name]["value"] == pytest.approx(
            fitted.params[name]["value"], rel=1e-4
        )


# what it finds


def test_the_law_of_a_study_is_recovered(fitted):
    for axis in ("lr", "batch"):
        for name, truth in zip(("N", "D"), LAW[axis][1:], strict=True):
            low, high = fitted.params[f"{axis}.{name}"]["interval"]
            assert low < truth < high and high - low < 0.6
    best = fitted.predict(n_params=1e9, tokens=5e10)
    assert best.lr == pytest.approx(optimal("lr", 1e9, 5e10), rel=0.2)
    assert best.batch_tokens == pytest.approx(optimal("batch", 1e9, 5e10), rel=0.25)
    assert best.loss == pytest.approx(floor(1e9, 5e10), rel=0.01)
    assert fitted.held_out["worst_excess"] < 1e-3 and len(fitted.held_out["cells"]) == 9


def test_every_cell_has_its_own_optimum_without_the_luck_of_its_lowest_run(trials, fitted):
    lowest = trials.groupby(["n_params", "tokens"])["loss"].min()
    for cell in fitted.cells:
        at = cell["n_params"], cell["tokens"]
        assert cell["status"] == "ok" and cell["lr"] == pytest.approx(optimal("lr", *at), rel=0.1)
        assert cell["batch_tokens"] == pytest.approx(optimal("batch", *at), rel=0.12)
        assert abs(cell["floor"] / floor(*at) - 1) < 2e-3
    above = [lowest[cell["n_params"], cell["tokens"]] / cell["floor"] - 1 for cell in fitted.cells]
    assert np.mean(
        [cell["floor"] / floor(cell["n_params"], cell["tokens"]) - 1 for cell in fitted.cells]
    ) == pytest.approx(0, abs=1.5e-3)  # the form is another
    assert min(above) < 0  # the lowest run of some cell is below its floor: that is luck


def test_the_batch_asked_for_gets_the_lr_that_is_best_there(fitted):
    at = {"n_params": 4e8, "tokens": 2e10}
    free = fitted.predict(**at)
    double = fitted.predict(**at, batch_tokens=2 * free.batch_tokens)
    u, v = math.log(double.lr / free.lr), math.log(2)
    value = dict(zip(fitted.solution["names"], fitted.solution["vector"], strict=True))
    best = optimize.minimize_scalar(
        lambda x: height_at(value, [x, v])[0],
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
            assert wide * height_at(value, offset)[0] == pytest.approx(0.0025, rel=1e-6)
    assert best.band["loss"] == [best.loss, pytest.approx(1.0025 * best.loss)]


def test_intervals_cover_new_cells():
    """90 % intervals at a scale four times beyond the largest, over studies whose cells deviate from the law."""
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
        truth["loss"] = floor(1e9, 6e10) * math.exp(own[2])
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


# what it says


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[t["n_params"] == 1e8], "every run has the same n_params: lr.N, batch.N and loss.alpha are not identified"),
        (lambda t: t[t["tokens"] == 1e10], "every run has the same tokens: lr.D, batch.D and loss.beta are not identified"),
        (lambda t: t[t["tokens"] / t["n_params"] == 50], "hardly identified by these runs"),
        (lambda t: t.assign(tokens=20 * t["n_params"]), "tokens follow n_params**1 in all cells"),
        (lambda t: t.assign(batch_tokens=2.0**18), "every run has batch_tokens 2.621e+05: the best batch size, and how it grows, is not measured"),
        (lambda t: t[t["lr"] < 1.2e-3 * (t["n_params"] / 2e8) ** -0.5], "above all that were tried"),
        (lambda t: pd.concat([t, t[:7]]), "7 runs are copies of others"),
        (lambda t: t.assign(weight_decay=np.where(t.index % 2, 0.1, 0.0)), "weight_decay differs between runs"),
        (lambda t: t.assign(loss=t["loss"] * np.exp(0.02 * np.random.default_rng(0).standard_normal(len(t)))), "the form fits badly"),
    ],
)  # fmt: skip
def test_what_the_runs_cannot_give_is_said_and_an_answer_comes_back(trials, change, said):
    made = quick(change(trials))
    assert any(said in sentence for sentence in made.status), made.status
    best = made.predict(n_params=5e8, tokens=1e10)
    for name in ("lr", "batch_tokens", "loss"):
        low, high = best.interval[name]
        assert 0 < low < getattr(best, name) < high
    json.dumps(made.to_dict(), allow_nan=False)


def test_exponents_without_a_run_to_tell_them_are_their_priors(trials):
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
        (lambda t: t.drop(columns="batch_tokens"), "must have a column `batch_tokens`"),
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
    """As in a table from elsewhere: other columns, ids that repeat in a cell, shuffled rows, text for numbers, a run that blew up."""
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
    with pytest.raises(UserError, match="a trial's id must be its own, or its cell's, but"):
        quick(trials.assign(id=["a", "b"] * (len(trials) // 2)))


def test_predicting_needs_no_arrays(fitted, tmp_path):
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


def test_a_cut_record_is_the_users_to_know(fitted):
    cut = replace(fitted, solution={k: v for k, v in fitted.solution.items() if k != "scatter"})
    with pytest.raises(UserError, match=r"must hold `solution\.scatter`"):
        cut.predict(n_params=1e9, tokens=5e10)
    assert Fit.from_dict(fitted.to_dict()).digest == fitted.digest


def test_pictures_show_the_law_and_one_basin(fitted, tmp_path):
    cell = fitted.cells[4]
    contour = plotting.basin_contour(fitted, cell)
    row, column = np.unravel_index(contour.height.argmin(), contour.height.shape)
    assert contour.lr[column] == pytest.approx(cell["lr"], rel=0.1) and contour.batch_tokens[
        row
    ] == pytest.approx(cell["batch_tokens"], rel=0.1)
    near = (
        np.abs(contour.runs[:, 2]) < 0.3
    )  # % above the floor: what the surface says of the runs themselves
    i, j = (
        np.abs(np.log(contour.runs[near, k, None] / grid)).argmin(1)
        for k, grid in enumerate((contour.lr, contour.batch_tokens))
    )
    assert contour.runs[near, 2] == pytest.approx(contour.height[j, i], abs=0.35)
    assert [path.name for path in plotting.plot(fitted, tmp_path)] == ["law.png"] and (
        tmp_path / "law.png"
    ).stat().st_size > 20_000


@pytest.mark.skipif(not DATA.exists(), reason="public sweeps are not here")
def test_public_sweeps_are_predicted_in_lr_and_batch():
    """Eight cells, each from the other seven; and a tenth of the runs says nearly the same."""
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
    assert len(names(2)) == len(fitted.solution["vector"]) == len(p)


def test_a_transfer_asks_for_the_lr_at_the_targets_own_batch(fitted, tiny):
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
