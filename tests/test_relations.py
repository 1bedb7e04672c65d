"""Relations: reproduce published numbers and recover known constants from simulated runs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaletune import cli, fitting, laws
from scaletune.errors import UserError
from scaletune.fitting.relations import (
    RELATIONS,
    critical,
    fit_relation,
    predict_relation,
    schedule,
    trajectory,
)
from scaletune.plotting import fitted
from scaletune.predicting import allocation
from scaletune.records import Fit

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_public_data = pytest.mark.skipif(not DATA.exists(), reason="no public sweeps")


def value(fit, name):
    return fit.params[name]["value"]


def noisy(values, sd=0.002, seed=0):
    return np.asarray(values) * np.exp(
        sd * np.random.default_rng(seed).normal(size=np.shape(values))
    )


def uncovered_intervals(fit, truth):
    """{parameter: interval} of the intervals that do not contain the true value."""
    return {
        name: fit.params[name]["interval"]
        for name, true in truth.items()
        if not _inside(fit.params[name]["interval"], true)
    }


def _inside(interval, true):
    return interval[0] <= true <= interval[1]


# --- critical batch size --------------------------------------------------------------------------


@needs_public_data
def test_published_critical_batch_sizes_are_reproduced():
    """Reproduces the notebook of arXiv:2410.21676.

    It has 745.3201466 and 2533.4108018 sequences of 512 tokens, and the law
    93.1968 * (N in millions)**0.468278.
    """
    runs = pd.read_csv(DATA / "critical_batch.csv")
    runs = runs.assign(steps_to_target=runs["steps_to_target_edited"])
    fit = fit_relation(runs, RELATIONS["critical_batch"])
    batches = [critical.overhead_batch(cell["batch_critical"] / 512, 256) for cell in fit.cells]
    published = runs.groupby("n_params")["published_cbs_seqs"].first()
    assert batches == pytest.approx(list(published), rel=1e-6)
    over = pd.DataFrame({"millions": [85, 151, 302, 604, 1200], "sequences": batches})
    across = fit_relation(
        over, critical.power_relation("millions", "sequences", "sequences of 512", "", "")
    )
    assert (value(across, "c"), value(across, "p")) == pytest.approx((93.1968, 0.468278), rel=1e-3)
    assert fit.params["p"]["interval"][0] > 0 and len(fit.used) == len(runs)


def test_steps_and_tokens_follow_the_published_tradeoff():
    """(S / S_min - 1) (E / E_min - 1) = 1 (arXiv:1812.06162, eq. 2.7) for every fitted run."""
    batch = np.geomspace(1e4, 1e8, 9)
    runs = pd.DataFrame({"batch_tokens": batch, "steps_to_target": 1000 * (1 + 1e6 / batch)})
    fit = fit_relation(runs, RELATIONS["critical_batch"])
    assert (
        value(fit, "steps_min"),
        value(fit, "batch_critical"),
        value(fit, "tokens_min"),
    ) == pytest.approx((1000, 1e6, 1e9), rel=1e-5)
    excess = (runs["steps_to_target"] / value(fit, "steps_min") - 1) * (
        runs["steps_to_target"] * batch / value(fit, "tokens_min") - 1
    )
    assert list(excess) == pytest.approx([1.0] * 9, rel=1e-3)


def test_noise_scale_is_unbiased_on_gaussian_gradients():
    """E|G_B|**2 = |G|**2 + tr(Sigma) / B (arXiv:1812.06162, App. A.1)."""
    estimate = critical.noise_scale(4.0 + 36.0 / 8, 4.0 + 36.0 / 64, 8, 64)
    assert estimate == pytest.approx({"signal": 4.0, "noise": 36.0, "batch_simple": 9.0})
    with pytest.raises(UserError, match="needs two batch sizes"):
        critical.noise_scale(1, 1, 8, 8)
    with pytest.raises(UserError, match="average over more steps"):
        critical.noise_scale(1.0, 2.0, 8, 64)


@pytest.mark.parametrize(("batch", "exponent"), [(1e4, -0.5), (1e6, 0.0), (1e8, 0.5)])
def test_regimes_of_the_token_horizon(batch, exponent):
    assert critical.regime(batch, 1e6)[0] == exponent


# --- loss trajectories ----------------------------------------------------------------------------

KAPLAN = {
    "n_c": 6.5e13,
    "alpha_n": 0.077,
    "s_c": 2100.0,
    "alpha_s": 0.76,
    "batch_star": 2.1e8,
    "alpha_b": 0.21,
}


def curves(n_params, batches, steps):
    rows = [(n, b, s) for n in n_params for b in batches for s in steps]
    table = pd.DataFrame(rows, columns=["n_params", "batch_tokens", "steps"])
    return table.assign(run_id=[f"{n:g}-{b:g}" for n, b, _ in rows])


def test_the_trajectory_loss_solves_its_equation():
    """The loss is a fixed point of eq. 1.6 of arXiv:2001.08361."""
    x = {
        name: column.to_numpy(float)
        for name, column in curves([1e7, 1e9], [1e5, 1e7], [1e3, 1e5])
        .drop(columns="run_id")
        .items()
    }
    loss = trajectory.trajectory(x, KAPLAN)
    again = (
        trajectory.converged_loss(x, KAPLAN)
        + (KAPLAN["s_c"] / trajectory.steps_min(x, KAPLAN, loss)) ** KAPLAN["alpha_s"]
    )
    assert loss == pytest.approx(again, rel=1e-9)


def test_a_trajectory_at_any_batch_is_recovered_from_small_ones():
    """Runs up to 6e7 parameters at two batch sizes predict 1e9 at a third one within 1 %."""
    runs = curves(np.geomspace(1e6, 6e7, 5), [6e4, 1e6], np.geomspace(1e3, 1e5, 8))
    x = {name: runs[name].to_numpy(float) for name in ("n_params", "batch_tokens", "steps")}
    fit = fit_relation(
        runs.assign(loss=noisy(trajectory.trajectory(x, KAPLAN))), RELATIONS["kaplan_trajectory"]
    )
    at = {"n_params": [1e9], "batch_tokens": [5e5], "steps": [2e5]}
    truth = trajectory.trajectory({name: np.array(column) for name, column in at.items()}, KAPLAN)
    prediction = predict_relation(fit, RELATIONS["kaplan_trajectory"], at)
    assert prediction["value"] == pytest.approx(truth.tolist(), rel=0.01)
    assert prediction["low"][0] < truth[0] < prediction["high"][0]
    assert value(fit, "alpha_s") == pytest.approx(0.76, abs=0.05)
    assert value(fit, "alpha_n") == pytest.approx(0.077, abs=0.01)


# --- tasks, repetition ----------------------------------------------------------------------------


def test_the_published_error_law_is_recovered():
    """arXiv:2403.08540, eq. 5, with the coefficients of C4 and 46 tasks."""
    truth = {"eps": 0.758949444305, "k": 1.28851604004, "gamma": 0.972164292974}
    loss = np.linspace(2.4, 4.8, 12)
    fit = fit_relation(
        pd.DataFrame(
            {"loss": loss, "error": truth["eps"] - truth["k"] * np.exp(-truth["gamma"] * loss)}
        ),
        RELATIONS["error_of_loss"],
    )
    assert {name: value(fit, name) for name in truth} == pytest.approx(truth, rel=1e-4)


@needs_public_data
def test_public_errors_follow_the_error_law():
    """Errors of models from arXiv:2403.08540 scatter little around the fitted curve."""
    runs = pd.read_csv(DATA / "overtraining_104_dev.csv")
    runs = runs[(runs["train_dataset"] == "c4_original") & runs["err_avg46"].notna()]
    fit = fit_relation(
        runs.assign(error=runs["err_avg46"], loss=runs["loss_c4_val"]), RELATIONS["error_of_loss"]
    )
    assert fit.status == ["ok"] and fit.solution["scatter"] < 0.006
    assert value(fit, "eps") == pytest.approx(0.759, abs=0.01)
    assert value(fit, "gamma") == pytest.approx(0.972, abs=0.1)


def test_pass_rates_are_straight_in_log_log():
    n = np.geomspace(3e7, 2.4e9, 8)
    fit = fit_relation(
        pd.DataFrame({"n_params": n, "pass_rate": np.exp(-10.0 * n**-0.1)}), RELATIONS["pass_rate"]
    )
    assert (value(fit, "c"), value(fit, "alpha")) == pytest.approx((10.0, 0.1), rel=1e-3)


def test_the_law_of_repeated_tokens_is_recovered():
    """Runs simulated with the catalogue's `muennighoff` law give its constants back.

    arXiv:2305.16264.
    """
    published = laws.law("muennighoff")
    rng = np.random.default_rng(0)
    n, unique = (
        np.exp(rng.uniform(np.log(1e7), np.log(5e9), 120)),
        np.exp(rng.uniform(np.log(1e8), np.log(5e10), 120)),
    )
    tokens = unique * np.exp(rng.uniform(0, np.log(60), 120))
    loss = [published(N=a, D=b, U=c)["loss"] for a, b, c in zip(n, tokens, unique, strict=True)]
    runs = pd.DataFrame(
        {"n_params_total": n, "tokens": tokens, "unique_tokens": unique, "loss": noisy(loss, 0.001)}
    )
    fit = fit_relation(runs, RELATIONS["repeated_tokens"])
    c = published.coefficients
    assert not uncovered_intervals(
        fit,
        {
            "E": c["E0"],
            "A": c["A"],
            "B": c["B"],
            "alpha": c["alpha"],
            "r_tokens": c["R_Dstar"],
            "r_params": c["R_Nstar"],
        },
    )
    assert value(fit, "r_tokens") == pytest.approx(c["R_Dstar"], rel=0.1)


def test_asymptotes_are_fitted_one_by_one():
    """arXiv:2509.14786: 0.05 / (N in billions)**1.02 + 3.43, and a lower asymptote of ensembles."""
    n = np.geomspace(1.5e8, 1.4e9, 6)
    runs = pd.concat(
        pd.DataFrame({"n_params": n, "loss": 0.05 * (n / 1e9) ** -1.02 + E, "method": method})
        for method, E in (("regularized", 3.43), ("ensemble", 3.34))
    )
    fit = fit_relation(runs, RELATIONS["asymptote_n"])
    assert {cell["method"]: cell["E"] for cell in fit.cells} == pytest.approx(
        {"regularized": 3.43, "ensemble": 3.34}, rel=1e-3
    )


# --- schedules ------------------------------------------------------------------------------------


def run_of(kind, steps=4000, peak=3e-4, every=50, name=None):
    step = np.arange(every, steps + 1, every)
    share = step / steps
    lr = {
        "constant": np.ones_like(share),
        "cosine": 0.1 + 0.45 * (1 + np.cos(np.pi * share)),
        "wsd": np.minimum(1, (1 - share) / 0.25 + 0.05),
    }
    return pd.DataFrame({"run_id": name or kind, "step": step, "lr": peak * lr[kind]})


def annealing_area_by_steps(run, lam):
    """The annealing area step by step (arXiv:2408.11029), with lr linear between logged steps."""
    steps = np.arange(int(run["step"].iloc[0]), int(run["step"].iloc[-1]) + 1)
    lr = np.interp(steps, run["step"], run["lr"])
    momentum = total = 0.0
    areas = {steps[0]: 0.0}
    for i in range(1, len(steps)):
        momentum = lam * momentum + lr[i - 1] - lr[i]
        total += momentum
        areas[steps[i]] = total
    return np.array([areas[int(step)] for step in run["step"]])


@pytest.mark.parametrize("lam", [0.95, 0.99, 0.999])
def test_the_annealing_area_is_the_sum_over_steps(lam):
    run = run_of("wsd", steps=600, every=20)
    x = {
        "step": run["step"].to_numpy(float),
        "lr": run["lr"].to_numpy(float),
        "run": np.zeros(len(run)),
    }
    assert schedule.annealing_area(x, lam) == pytest.approx(
        annealing_area_by_steps(run, lam), abs=1e-12
    )


@pytest.mark.parametrize("law", ["annealing", "multi_power"])
def test_a_schedule_law_fitted_to_two_schedules_predicts_a_third(law):
    """Constant and cosine runs predict the end of a WSD run (arXiv:2408.11029, 2503.12811)."""
    truth = {
        "annealing": {"E": 2.6, "A": 0.45, "alpha": 0.5, "C": 0.4 * 1e3, "forget": 0.01},
        "multi_power": coefficients_of_25m(),
    }[law]
    truth = truth | ({"C": 40.0} if law == "annealing" else {})
    relation = RELATIONS[law]
    runs = pd.concat([run_of("constant"), run_of("cosine")], ignore_index=True)
    x = {name: runs[name].to_numpy(float) for name in ("step", "lr")} | {
        k: np.asarray(v) for k, v in schedule.lr_areas(runs).items()
    }
    fit = fit_relation(runs.assign(loss=noisy(relation.function(x, truth), 0.0005)), relation)
    unseen = run_of("wsd")
    x = {name: unseen[name].to_numpy(float) for name in ("step", "lr")} | {
        k: np.asarray(v) for k, v in schedule.lr_areas(unseen).items()
    }
    predicted = predict_relation(fit, relation, x)["value"]
    assert predicted[-1] == pytest.approx(relation.function(x, truth)[-1], rel=0.01)


def coefficients_of_25m():
    """arXiv:2503.12811's coefficients for 25M parameters."""
    return {
        "E": 3.04045406,
        "A": 0.52468604,
        "alpha": 0.50786857,
        "B": 363.78751622,
        "C": 2.06560812,
        "beta": 0.58279013,
        "gamma": 0.64142257,
    }


def test_rows_of_a_run_are_sorted_by_their_steps():
    runs = pd.concat([run_of("constant"), run_of("cosine")], ignore_index=True)
    runs["loss"] = noisy(2.5 + 0.6 * runs["step"] ** -0.5, 0.001)
    fits = [
        fit_relation(rows, RELATIONS["annealing"])
        for rows in (runs, runs.sample(frac=1, random_state=0))
    ]
    assert fits[0].params == fits[1].params
    without = run_of("wsd").drop(columns="run_id").assign(loss=3.0)
    with pytest.raises(UserError, match="sort by run_id and step"):
        fit_relation(without.iloc[::-1], RELATIONS["annealing"])


# --- empirical curves -----------------------------------------------------------------------------


def test_a_broken_power_law_is_fitted_on_both_sides_of_its_break():
    """arXiv:2210.14891, eq. 1: the exponent changes from 0.05 to 0.15."""
    truth = {"E": 1.0, "A": 20.0, "c0": 0.05, "c1": 0.10, "d": 1e18, "f": 0.3}
    flops = np.geomspace(1e14, 1e22, 25)
    relation = RELATIONS["broken_flops"]
    fit = fit_relation(
        pd.DataFrame({"flops": flops, "loss": relation.function({"flops": flops}, truth)}), relation
    )
    assert predict_relation(fit, relation, {"flops": [1e23]})["value"] == pytest.approx(
        relation.function({"flops": np.array([1e23])}, truth).tolist(), rel=0.01
    )


def test_a_learning_curve_is_extrapolated_with_an_interval_that_covers():
    tokens, hits = np.geomspace(1e6, 1e8, 20), 0
    for seed in range(20):
        runs = pd.DataFrame(
            {"tokens": tokens, "loss": noisy(2.0 + 300 * tokens**-0.3, 0.004, seed)}
        )
        relation = RELATIONS["learning_curve"]
        prediction = predict_relation(fit_relation(runs, relation), relation, {"tokens": [4e8]})
        hits += prediction["low"][0] <= 2.0 + 300 * 4e8**-0.3 <= prediction["high"][0]
    assert hits >= 17


def test_seconds_a_step_are_calibrated_on_records():
    rng = np.random.default_rng(1)
    moved, flops = np.exp(rng.uniform(15, 24, 30)), np.exp(rng.uniform(18, 28, 30))
    seconds = 2e-3 + moved / 2e10 + flops / 5e10
    fit = fit_relation(
        pd.DataFrame(
            {
                "bytes_moved": moved,
                "flops_per_step": flops,
                "seconds_per_step": noisy(seconds, 0.03),
            }
        ),
        RELATIONS["seconds_per_step"],
    )
    truth = {"overhead": 2e-3, "bytes_per_second": 2e10, "flops_per_second": 5e10}
    assert {name: value(fit, name) for name in truth} == pytest.approx(truth, rel=0.15)


# --- bad input ------------------------------------------------------------------------------------

BAD = {
    "column": (
        {"batch_tokens": [1e5] * 4},
        (
            r"critical_batch needs a column `steps_to_target` \(optimizer steps until the "
            r"target loss\), but"
        ),
    ),
    "rows": (
        {"batch_tokens": [1e5, 2e5], "steps_to_target": [9, 8]},
        r"has 2 parameters and needs more rows than that, but got 2",
    ),
    "number": (
        {"batch_tokens": [1e5, -1, 3, 4], "steps_to_target": [9, 8, 7, 6]},
        r"`batch_tokens` must be a number above 0 in every row, but row 1 has -1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case):
    table, sentence = BAD[case]
    with pytest.raises(UserError, match=sentence):
        fit_relation(pd.DataFrame(table), RELATIONS["critical_batch"])


def test_a_parameter_that_is_not_identified_gives_a_warning():
    """Far below the critical batch size, only the product of the two parameters is identified."""
    batch = np.geomspace(1e2, 1e3, 8)
    fit = fit_relation(
        pd.DataFrame({"batch_tokens": batch, "steps_to_target": noisy(1e9 / batch, 0.01)}),
        RELATIONS["critical_batch"],
    )
    assert any(
        "poorly constrained" in sentence or "end of its search range" in sentence
        for sentence in fit.status
    )


# --- commands -------------------------------------------------------------------------------------


def command(*arguments, capsys):
    assert cli.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def steps_csv(tmp_path):
    """Three sizes whose critical batch size is ~ n_params**0.5, with column names of a tracker."""
    batch = np.geomspace(1e4, 1e8, 9)
    rows = [
        {
            "n_params": n,
            "batch_size_tokens": b,
            "steps_needed": 1000 * (1 + 1e6 * (n / 1e8) ** 0.5 / b),
            "target_loss": 3.0,
        }
        for n in (1e8, 4e8, 16e8)
        for b in batch
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "steps.csv", index=False)
    return tmp_path / "steps.csv"


def test_fit_predict_plot_and_report_of_a_relation(steps_csv, capsys):
    fit = steps_csv.with_name("fit.json")
    summary = command(
        "fit",
        steps_csv,
        "--law",
        "critical_batch",
        "--map",
        "steps_to_target=steps_needed",
        "--out",
        fit,
        capsys=capsys,
    )
    assert summary["n_used"] == 27
    assert summary["params"]["p"]["value"] == pytest.approx(0.5, abs=1e-3)
    assumptions = Fit.read(fit).assumptions
    guess = "`batch_tokens` is read from the column `batch_size_tokens` (--map batch_tokens=NAME"
    assert any(each.startswith(guess) for each in assumptions)
    (prediction,) = command("predict", "--fit", fit, "--n-params", "1e10", capsys=capsys)[
        "predictions"
    ]
    assert prediction["values"]["batch_critical"] == pytest.approx(1e7, rel=1e-2)
    assert prediction["units"] == {"batch_critical": "tokens"}
    low, high = prediction["interval"]["batch_critical"]
    assert low <= prediction["values"]["batch_critical"] <= high
    (picture,) = command("plot", fit, "--out", steps_csv.parent / "plots", capsys=capsys)["files"]
    assert Path(picture).stat().st_size > 5000
    assert cli.main(["report", str(fit), "--out", str(steps_csv.with_name("r.html"))]) == 0


def test_the_plot_of_a_relation_shows_its_prediction(steps_csv):
    runs = (
        pd.read_csv(steps_csv)
        .query("n_params == 1e8")
        .rename(columns={"batch_size_tokens": "batch_tokens", "steps_needed": "steps_to_target"})
    )
    fit = fit_relation(runs, RELATIONS["critical_batch"])
    (panel,) = fitted.relation_panels(fit)
    (curve,), (points,) = panel.curves, panel.points
    assert points.y == list(runs["steps_to_target"])
    assert list(curve.y) == pytest.approx(list(1000 * (1 + 1e6 / curve.x)), rel=1e-4)
    assert (curve.low <= curve.y).all() and (curve.y <= curve.high).all()


@needs_public_data
def test_the_plot_of_a_loss_law_shows_every_run_and_the_prediction():
    fit = fitting.fit(DATA / "chinchilla_epoch.csv", "chinchilla")
    lines, off = fitted.loss_panels(fit)
    assert len(off.points[0].x) == 240 and max(map(abs, off.points[0].y)) < 6
    at = lines.curves[2]
    size = fitted._spread(np.array(fit.solution["points"])[:, 0])[2]
    assert at.y[30] == pytest.approx(fit.predict(n_params=size, tokens=at.x[30]).loss, rel=1e-3)


def test_a_relation_needs_its_own_columns(steps_csv, capsys):
    fit = steps_csv.with_name("fit.json")
    arguments = [
        "fit",
        str(steps_csv),
        "--law",
        "critical_batch",
        "--map",
        "steps_to_target=steps_needed",
        "--out",
        str(fit),
    ]
    assert cli.main(arguments) == 0
    assert cli.main(["predict", "--fit", str(fit), "--tokens", "1e9"]) == 2
    assert (
        "a prediction from a fit of 'critical_batch' needs n_params, but `n_params` was not given"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="a relation between columns of its own"):
        Fit.read(fit).predict(n_params=1e9, tokens=1e9)
    assert cli.main([*arguments, "--holdout", "n_params > 1"]) == 2


# --- Chinchilla's three approaches ----------------------------------------------------------------


def test_the_envelope_of_training_curves_gives_the_allocation_of_their_law():
    """Approach 1 of arXiv:2203.15556 on curves of approach 3 gives beta / (alpha + beta)."""
    law = laws.law("besiroglu")
    c = law.coefficients
    rows = [
        (f"{n:.3g}", n, d, 6 * n * d)
        for n in np.geomspace(3e7, 3e10, 40)
        for d in np.geomspace(2 * n, 300 * n, 40)
    ]
    runs = pd.DataFrame(rows, columns=["run_id", "n_params", "tokens", "flops"])
    runs["loss"] = [
        law(N=n, D=d)["loss"] for n, d in zip(runs["n_params"], runs["tokens"], strict=True)
    ]
    fit = fit_relation(runs, RELATIONS["frontier"])
    assert value(fit, "p") == pytest.approx(c["beta"] / (c["alpha"] + c["beta"]), abs=0.02)
    with pytest.raises(UserError, match="needs a column `run_id`, but the columns are"):
        fit_relation(runs.drop(columns="run_id"), RELATIONS["frontier"])
    with pytest.raises(UserError, match="at least 3 runs, but got 2"):
        fit_relation(
            runs[runs["n_params"].isin(sorted(set(runs["n_params"]))[:2])], RELATIONS["frontier"]
        )


@needs_public_data
def test_approach_3_allocates_as_its_refit_was_published():
    """arXiv:2404.10102: 18.4 tokens a parameter at 5.88e23 FLOPs, and n_params ~ C**0.512."""
    fit = fitting.fit(DATA / "chinchilla_epoch.csv", "chinchilla")
    best = allocation(fit, 5.88e23)
    assert best["tokens_per_param"][0] == pytest.approx(18.4, rel=0.03)
    assert best["n_exponent"][0] == pytest.approx(0.512, abs=0.003)
    n, low, high = best["n_params"]
    assert low < n < high and 6 * n * best["tokens"][0] == pytest.approx(5.88e23)
    at = fit.predict(n_params=n, tokens=best["tokens"][0])
    assert at.loss == pytest.approx(best["loss"][0])
    around = [fit.predict(n_params=n * f, tokens=best["tokens"][0] / f).loss for f in (0.8, 1.25)]
    assert min(around) > at.loss


# --- predictions from the command line ------------------------------------------------------------


def predict(capsys, *arguments):
    """(exit status, the one prediction, the line on stderr)."""
    status = cli.main(["predict", "--json", "--fit", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, json.loads(out)["predictions"][0] if out else None, err


@pytest.fixture(scope="module")
def annealed(tmp_path_factory):
    """(path of a fit of `annealing` to a cosine and a constant run, the true constants)."""
    parts = [
        pd.DataFrame(
            {"run_id": name, "step": (steps := np.arange(20, 2001, 20)), "lr": lr(steps / 2000)}
        )
        for name, lr in (
            ("cosine", lambda u: 5e-4 * (1 + np.cos(np.pi * u))),
            ("constant", lambda u: 1e-3 * np.ones_like(u)),
        )
    ]
    runs, truth = (
        pd.concat(parts, ignore_index=True),
        {"E": 2.5, "A": 0.6, "alpha": 0.5, "C": 0.3, "forget": 0.005},
    )
    columns = {name: runs[name].to_numpy(float) for name in ("step", "lr")} | schedule.lr_areas(
        runs
    )
    path = tmp_path_factory.mktemp("annealed") / "fit.json"
    fit_relation(
        runs.assign(loss=schedule.annealing(columns, truth)), RELATIONS["annealing"]
    ).write(path)
    return path, truth


def test_a_schedule_law_predicts_from_a_whole_schedule(annealed, capsys):
    """Compares with the annealing law of the catalogue, which sums over steps."""
    path, t = annealed
    status, prediction, _ = predict(capsys, path, "--lr-schedule", "constant:1500:0:1e-3:1e-3")
    assert status == 0
    assert prediction["loss"] == pytest.approx(
        t["E"] + t["A"] * (1500 * 1e-3) ** -t["alpha"], rel=1e-3
    )
    status, prediction, _ = predict(capsys, path, "--lr-schedule", "cosine:2000:0:1e-3:0")
    lrs = tuple(5e-4 * (1 + np.cos(np.pi * step / 2000)) for step in range(2000))
    coefficients = {
        "L0": t["E"],
        "A": t["A"],
        "alpha": t["alpha"],
        "C": t["C"],
        "lam": 1 - t["forget"],
    }
    assert status == 0
    assert prediction["loss"] == pytest.approx(
        laws.schedule.annealing(lrs, 2000, **coefficients)["loss"], rel=2e-3
    )
    status, _, err = predict(capsys, path, "--given", "step=100", "--lr", "1e-3")
    assert status == 2 and "give --lr-schedule" in err


@pytest.fixture
def members(tmp_path):
    """A fit of `asymptote_n` to two methods, which are fitted separately."""
    rows = [
        (n, method, 3 + a * n**-0.3)
        for method, a in (("one", 100.0), ("many", 60.0))
        for n in np.geomspace(1e7, 1e10, 8)
    ]
    fit_relation(
        pd.DataFrame(rows, columns=["n_params", "method", "loss"]), RELATIONS["asymptote_n"]
    ).write(tmp_path / "fit.json")
    return tmp_path / "fit.json"


def test_groups_that_are_fitted_separately_predict_and_plot_separately(members, capsys):
    fit = Fit.read(members)
    assert len(fit.used) == 16 and value(fit, "A at method=many") == pytest.approx(60, rel=1e-3)
    status, prediction, _ = predict(capsys, members, "--n-params", "1e9", "--given", "method=many")
    assert status == 0 and prediction["loss"] == pytest.approx(3 + 60 * 1e9**-0.3, rel=1e-5)
    status, _, err = predict(capsys, members, "--n-params", "1e9")
    assert status == 2 and "name one of them, such as method=many" in err
    assert [panel.title for panel in fitted.relation_panels(fit)] == ["method many", "method one"]


def test_a_relation_warns_about_extrapolation(members, capsys):
    status, prediction, _ = predict(capsys, members, "--n-params", "1e13", "--given", "method=one")
    assert status == 0
    assert ["1000x above the fitted range" in warning for warning in prediction["warnings"]] == [
        True
    ]


@pytest.mark.parametrize(("number", "shown"), [("-1", "-1"), ("nan", "nan"), ("0", "0")])
def test_a_relation_needs_numbers_above_zero(members, capsys, number, shown):
    status, _, err = predict(capsys, members, f"--n-params={number}", "--given", "method=one")
    assert status == 2
    assert f"`n_params` must be a number above 0 in every row, but row 0 has {shown}" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--given", "n_params=big"], "has 'big'"),
        (["--n-params", "1e9", "--tokens", "3"], "only, but got tokens"),
    ],
)
def test_a_relation_takes_only_its_own_columns(members, capsys, more, message):
    status, _, err = predict(capsys, members, "--given", "method=one", *more)
    assert status == 2 and message in err and len(err.splitlines()) == 1


def test_an_interval_of_a_relation_is_at_the_level_of_its_fit():
    """The scatter contributes 1.645 sd at 90 % and 1.960 sd at 95 %."""
    rows = pd.DataFrame(
        {
            "n_params": (n := np.geomspace(1e7, 1e10, 200)),
            "loss": noisy((8.8e13 / n) ** 0.076, 0.01),
        }
    )
    wide, narrow = (
        predict_relation(
            fit_relation(rows, RELATIONS["kaplan_n"], level=level),
            RELATIONS["kaplan_n"],
            {"n_params": [1e9]},
        )
        for level in (0.95, 0.9)
    )
    width = [prediction["high"][0] - prediction["low"][0] for prediction in (wide, narrow)]
    assert width[0] / width[1] == pytest.approx(1.960 / 1.645, rel=0.02)


# --- rows that do not count, for every relation ---------------------------------------------------


def tables():
    """Relation -> a table with noise whose formula is true."""
    rng, sizes, batch = (
        np.random.default_rng(3),
        np.geomspace(1e7, 1e9, 8),
        np.geomspace(1e4, 1e7, 6),
    )
    critical_rows = [
        (n, b, 1000 * (1 + 1e5 * (n / 1e7) ** 0.4 / b))
        for n in (1e7, 4e7, 16e7, 64e7)
        for b in batch
    ]
    loss = np.linspace(2.4, 4.4, 9)
    curve = np.geomspace(1e6, 1e8, 20)
    made = {
        "critical_batch": pd.DataFrame(
            critical_rows, columns=["n_params", "batch_tokens", "steps_to_target"]
        ),
        "critical_batch_loss": pd.DataFrame(
            {"loss": loss, "batch_critical": 2e8 / loss ** (1 / 0.21)}
        ),
        "critical_batch_tokens": pd.DataFrame(
            {"tokens": sizes * 20, "batch_critical": 1e-3 * (sizes * 20) ** 0.9}
        ),
        "kaplan_n": pd.DataFrame({"n_params": sizes, "loss": (8.8e13 / sizes) ** 0.076}),
        "asymptote_n": pd.DataFrame(
            {
                "n_params": np.tile(sizes, 2),
                "method": ["one"] * 8 + ["many"] * 8,
                "loss": np.concatenate([3 + a * sizes**-0.3 for a in (100.0, 60.0)]),
            }
        ),
        "error_of_loss": pd.DataFrame({"loss": loss, "error": 0.76 - 1.29 * np.exp(-0.97 * loss)}),
        "pass_rate": pd.DataFrame({"n_params": sizes, "pass_rate": np.exp(-40 * sizes**-0.2)}),
        "learning_curve": pd.DataFrame({"tokens": curve, "loss": 2 + 300 * curve**-0.3}),
    }
    return {
        law: table.assign(**{column: table[column] * np.exp(0.002 * rng.normal(size=len(table)))})
        for law, table in made.items()
        for column in [RELATIONS[law].output.name]
    }


TABLES = tables()


@pytest.mark.parametrize("law", TABLES)
def test_the_order_of_rows_and_unfinished_runs_change_nothing(law):
    relation, table = RELATIONS[law], TABLES[law].assign(status="done", message="")
    table["id"] = [f"run{i:02}" for i in range(len(table))]
    output = relation.output.name
    killed = table.iloc[::3].assign(status="failed", message="killed at 40 %")
    killed[output] *= 0.5
    lost = table.iloc[1::3].assign(status="done")
    lost[output] = np.nan
    for rows, end in ((killed, "-killed"), (lost, "-lost")):
        rows["id"] += end
    first = fit_relation(table, relation)
    again = fit_relation(pd.concat([killed, table, lost]).sample(frac=1, random_state=1), relation)
    assert again.params == first.params
    assert set(again.used) == set(first.used) == set(table["id"])
    assert {again.dropped[i] for i in killed["id"]} == {"failed: killed at 40 %"}
    assert {again.dropped[i] for i in lost["id"]} == {f"`{output}` is missing"}
    assert set(again.dropped) == set(killed["id"]) | set(lost["id"])


@pytest.mark.parametrize("law", TABLES)
def test_all_missing_columns_are_named_at_once(law):
    relation = RELATIONS[law]
    names = [column.name for column in (*relation.inputs, relation.output)]
    with pytest.raises(UserError) as error:
        fit_relation(pd.DataFrame({"other": [1.0, 2.0]}), relation)
    assert all(f"`{name}` (" in str(error.value) for name in names)
    assert "the columns are: other" in str(error.value) and "--map" in str(error.value)


def test_runs_that_are_all_dropped_give_the_reasons():
    table = TABLES["kaplan_n"].assign(status="diverged", message="loss is NaN from step 300")
    with pytest.raises(UserError, match=r"all are dropped: diverged: loss is NaN .* \(8x\)"):
        fit_relation(table, RELATIONS["kaplan_n"])
    with pytest.raises(UserError, match=r"must be one of done, .* but got 'finish'"):
        fit_relation(table.assign(status="finish"), RELATIONS["kaplan_n"])


def test_thin_groups_are_dropped_and_not_fatal():
    table = TABLES["critical_batch"]
    thin = table[(table["n_params"] > 1e7) | (table["batch_tokens"] < 1e5)]
    fit = fit_relation(thin.assign(id=thin.index.astype(str)), RELATIONS["critical_batch"])
    assert fit.status[0].startswith("1 of 4 groups dropped (n_params=1e+07): critical_batch has 2")
    assert len(fit.dropped) == 2 and value(fit, "p") == pytest.approx(0.4, abs=0.05)
    with pytest.raises(UserError, match="all 4 are dropped: critical_batch has 2 parameters"):
        fit_relation(table.groupby("n_params").head(2), RELATIONS["critical_batch"])


def test_sizes_that_differ_by_less_than_one_percent_are_one_group():
    table = TABLES["critical_batch"]
    jitter = 1 + 0.003 * np.sin(np.arange(len(table)))
    clean, moved = (
        fit_relation(rows, RELATIONS["critical_batch"])
        for rows in (table, table.assign(n_params=table["n_params"] * jitter))
    )
    assert len(moved.cells) == 4
    low, high = clean.params["p"]["interval"]
    assert abs(value(moved, "p") - value(clean, "p")) < (high - low) / 10


def test_target_losses_that_one_law_cannot_separate_are_named():
    table = pd.concat(
        TABLES["critical_batch"].assign(
            target_loss=target, steps_to_target=lambda t, f=f: t["steps_to_target"] * f
        )
        for target, f in ((3.0, 1.0), (2.8, 2.0))
    )
    fit = fit_relation(table, RELATIONS["critical_batch"])
    assert any(
        "`target_loss` differs between groups of the same `n_params`" in s for s in fit.status
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_group_that_gives_only_a_bound_does_not_decide(seed):
    """Far below its critical batch size, the runs of a size give only a lower bound."""
    batch = np.geomspace(1e4, 1e7, 6)
    rows = [
        (n, b, 1000 * (1 + 1e5 * (n / 1e7) ** 0.4 / b)) for n in (1e7, 4e7, 16e7) for b in batch
    ]
    rows += [(64e7, b, 1e12 / b) for b in np.geomspace(1e3, 1e4, 6)]
    table = pd.DataFrame(rows, columns=["n_params", "batch_tokens", "steps_to_target"])
    table["steps_to_target"] = noisy(table["steps_to_target"], 0.01, seed)
    fit = fit_relation(table, RELATIONS["critical_batch"])
    low, high = fit.params["p"]["interval"]
    assert low <= 0.4 <= high and value(fit, "p") == pytest.approx(0.4, abs=0.1)


def test_learning_curves_of_several_runs_are_fitted_one_by_one():
    curve = TABLES["learning_curve"]
    both = pd.concat([curve.assign(run_id="a"), curve.assign(run_id="b", loss=curve["loss"] + 1)])
    fit = fit_relation(both, RELATIONS["learning_curve"])
    assert value(fit, "E at run_id=b") - value(fit, "E at run_id=a") == pytest.approx(1, abs=0.1)


def test_two_sizes_do_not_give_three_parameters():
    n = np.repeat([1e7, 1.005e7, 4e7], 4)
    table = pd.DataFrame({"n_params": n, "loss": noisy(3 + 100 * n**-0.3)})
    with pytest.raises(UserError, match="as many different values of `n_params`, but got 2"):
        fit_relation(table, RELATIONS["asymptote_n"])


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_positive_quantities_have_positive_intervals(seed):
    """Few batch sizes and 30 % noise leave the critical batch size almost free."""
    table = TABLES["critical_batch"].groupby("n_params").head(4)
    steps = noisy(table["steps_to_target"], 0.3, seed)
    fit = fit_relation(table.assign(steps_to_target=steps), RELATIONS["critical_batch"])
    assert fit.params["c"]["interval"][0] > 0
    for n in (1e6, 1e8, 1e12):
        at = predict_relation(fit, RELATIONS["critical_batch"], {"n_params": [n]})
        assert 0 < at["low"][0] <= at["value"][0] <= at["high"][0] < np.inf
    one = fit_relation(
        table.assign(steps_to_target=steps).query("n_params == 1e7"), RELATIONS["critical_batch"]
    )
    for name in ("steps_min", "batch_critical", "tokens_min"):
        low, high = one.params[name]["interval"]
        assert 0 < low <= value(one, name) <= high < np.inf


@needs_public_data
def test_the_case_of_a_negative_critical_batch():
    table = pd.read_csv(DATA.parent / "cases" / "21-critical-batch" / "cb.csv")
    fit = fit_relation(table, RELATIONS["critical_batch"])
    for n in np.geomspace(1e7, 1e12, 6):
        at = predict_relation(fit, RELATIONS["critical_batch"], {"n_params": [n]})
        assert 0 < at["low"][0] <= at["value"][0] <= at["high"][0] < np.inf


TRUTHS = {
    "kaplan_n": ({"n_c": 8.8e13, "alpha_n": 0.076}, "n_params", (1e7, 1e9), 0.005),
    "critical_batch": ({"steps_min": 1e3, "batch_critical": 1e6}, "batch_tokens", (1e5, 1e7), 0.05),
    "asymptote_n": ({"E": 2.0, "A": 300.0, "alpha": 0.3}, "n_params", (1e6, 1e8), 0.004),
    "critical_batch_loss": ({"batch_star": 2e8, "alpha_b": 0.21}, "loss", (2.5, 4.5), 0.1),
    "error_of_loss": ({"eps": 0.76, "k": 1.29, "gamma": 0.97}, "loss", (2.4, 4.4), 0.01),
}


@pytest.mark.parametrize("law", TRUTHS)
@pytest.mark.parametrize("extra", [1, 3])
def test_intervals_of_few_rows_cover_inside_and_ten_times_beyond(law, extra):
    """One row more than parameters: quantiles of resamples alone covered 60 to 80 % of cases."""
    relation, (truth, name, (low, high), sd) = RELATIONS[law], TRUTHS[law]
    x = np.geomspace(low, high, len(truth) + extra)
    at = np.array([math.sqrt(low * high), high * (10 if high > 100 else 1.5)])
    true, covered = relation.function({name: at}, truth), []
    for seed in range(20):
        y = noisy(relation.function({name: x}, truth), sd, seed)
        fit = fit_relation(pd.DataFrame({name: x, relation.output.name: y}), relation)
        prediction = predict_relation(fit, relation, {name: at})
        covered.append(
            (np.array(prediction["low"]) <= true) & (true <= np.array(prediction["high"]))
        )
        for parameter in fit.params.values():
            ends = parameter["interval"]
            assert np.isfinite(ends).all() and ends[0] <= parameter["value"] <= ends[1]
    assert (np.mean(covered, axis=0) >= 0.85).all()


def test_two_rows_more_than_nothing_say_how_little_is_known():
    """Three sizes far below the target: the interval is wide, and the status says why."""
    n = np.array([1e6, 1.3e6, 1.7e6])
    fit = fit_relation(
        pd.DataFrame({"n_params": n, "loss": noisy((8.8e13 / n) ** 0.076, 0.01)}),
        RELATIONS["kaplan_n"],
    )
    at = predict_relation(fit, RELATIONS["kaplan_n"], {"n_params": [1e10]})
    assert at["high"][0] / at["low"][0] > 2 and fit.status != ["ok"]


def test_a_fit_from_an_older_version_still_predicts():
    """Without `dof` and `t_draws` the interval is that of the resamples and the scatter."""
    fit = fit_relation(TABLES["kaplan_n"], RELATIONS["kaplan_n"])
    old = {name: fit.solution[name] for name in ("values", "draws", "scatter", "points")}
    new, before = (
        predict_relation(each, RELATIONS["kaplan_n"], {"n_params": [1e9]})
        for each in (fit, replace(fit, solution=old))
    )
    assert new["value"] == before["value"]
    assert new["low"][0] <= before["low"][0] < before["high"][0] <= new["high"][0]


def test_the_envelope_counts_sizes_and_not_levels():
    """Sixty levels of compute on the curves of four sizes are four observations."""
    rows = [
        (f"{n:.3g}", n, d) for n in np.geomspace(1e8, 1e9, 6) for d in np.geomspace(n, 300 * n, 30)
    ]
    runs = pd.DataFrame(rows, columns=["run_id", "n_params", "tokens"])
    runs["loss"] = 1.7 + 406 * runs["n_params"] ** -0.34 + 410 * runs["tokens"] ** -0.28
    short = pd.DataFrame([("short", 2e8, 1e10, 3.0)], columns=runs.columns)
    fit = fit_relation(pd.concat([runs, short]), RELATIONS["frontier"])
    low, high = fit.params["p"]["interval"]
    assert low <= 0.28 / 0.62 <= high
    assert fit.dropped == {"short": "a training curve needs 2 rows"}
    assert len(fit.used) == len(runs)
    assert any("`flops` is missing and computed" in sentence for sentence in fit.assumptions)
    ends = runs[runs["n_params"].isin(sorted(set(runs["n_params"]))[:3])]
    with pytest.raises(UserError, match="neither of the smallest nor of the largest size"):
        fit_relation(ends[ends["tokens"] < 2e9], RELATIONS["frontier"])
