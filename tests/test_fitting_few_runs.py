"""Compares intervals of fits of few runs with published laws, closed forms and public sweeps."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scaletune import laws
from scaletune.cli import main
from scaletune.errors import UserError
from scaletune.fitting import fit, measure
from scaletune.fitting.loss.functional_forms import CHINCHILLA, build_problem, make_shape
from scaletune.fitting.loss.noise import FEW_DOF, FEW_NOISE, few_run_noise
from scaletune.fitting.loss.published import published_parameters, published_prior
from scaletune.fitting.optimum.power_law import fit_power_law, regress
from scaletune.fitting.optimum.published import published_covariance, published_exponents
from scaletune.predicting import from_fit
from scaletune.records import Fit

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_public_data = pytest.mark.skipif(not DATA.exists(), reason="no public sweeps")
TARGET = {"n_params": 7e9, "tokens": 1.4e11}
LOSS_LAWS = ("chinchilla", "loss_nd")
# Exponents of lr in n_params and tokens: arXiv:2503.04715, arXiv:2409.19913, muP with
# arXiv:2409.19913, nothing.
LR_EXPONENTS = [(-0.713, 0.307), (-0.23, -0.32), (0.0, -0.32), (0.0, 0.0)]


def lr_sweep(scales, exponents=(-0.3, 0.1), noise=0.0, batches=(2.0**18,), shape=0.08):
    """Noiseless runs with lr = 0.02 (n_params / 1e6)**a (tokens / 1e8)**b at 2**18 tokens."""
    a, b = exponents
    rng = np.random.default_rng(0)
    rows = []
    for (n_params, tokens), batch in itertools.product(scales, batches):
        best = 0.02 * (n_params / 1e6) ** a * (tokens / 1e8) ** b * (batch / 2**18) ** 0.5
        rows += [
            {
                "n_params": n_params,
                "tokens": tokens,
                "batch_tokens": batch,
                "lr": lr,
                "loss": 1.8
                + 20 / n_params**0.25
                + 60 / tokens**0.25
                + shape * math.log(lr / best) ** 2
                + noise * rng.standard_normal(),
            }
            for lr in best * 2.0 ** np.arange(-3.3, 3.5)
        ]
    return pd.DataFrame(rows)


def loss_table(*rows):
    return pd.DataFrame(rows, columns=["n_params", "tokens", "loss"])


def half_width(fitted, **scale):
    prediction = from_fit(fitted, **scale)
    return math.log(prediction.interval["lr"][1] / prediction.lr)


ONE, LEFT, UP, DIAGONAL = (
    [(1e7, 2e8)],
    [(1e7, 1e8), (1e7, 2e8), (1e7, 4e8)],
    [(1e6, 2e8), (3e6, 2e8), (1e7, 2e8)],
    [(1e6, 2e7), (3e6, 6e7), (1e7, 2e8)],
)

# laws of the learning rate


def test_the_spread_of_lr_exponents_is_that_of_the_papers():
    exponents = published_exponents()
    assert exponents["n_params"] == [-0.713, -0.23, -0.81, 0.0]  # 2503.04715 2409.19913 2502.05172
    assert exponents["tokens"][:2] == [0.307, -0.32]
    # arXiv: 2503.04715, 2409.19913, 2406.19146, 2401.02954, 2502.16982, 2507.17702, 2404.06395
    along = [-0.713 + 0.307, -0.23 - 0.32, -0.36, -0.25, -0.114, -0.3058, 0.0]
    assert exponents["along"] == pytest.approx(along)
    covariance = published_covariance()
    assert np.linalg.eigvalsh(covariance).min() > 0
    direction = np.array([1.0, 1.0, 0.0])
    assert direction @ covariance @ direction == pytest.approx(np.mean(np.square(along)))


@pytest.mark.parametrize("exponents", LR_EXPONENTS)
@pytest.mark.parametrize("scales", [ONE, LEFT, UP, DIAGONAL, DIAGONAL[:2], LEFT[:2], UP[:2]])
def test_an_interval_elsewhere_contains_what_published_laws_say(scales, exponents):
    fitted = fit(lr_sweep(scales, exponents))
    for n, d in ((700, 700), (30, 30), (100, 1), (1, 100), (10, 0.1)):
        n_params, tokens = 1e7 * n, 2e8 * d
        truth = 0.02 * (n_params / 1e6) ** exponents[0] * (tokens / 1e8) ** exponents[1]
        low, high = from_fit(fitted, n_params=n_params, tokens=tokens).interval["lr"]
        assert low < truth < high


def test_what_is_not_measured_is_said_first_with_the_published_spread():
    for scales, column in ((UP, "tokens"), (LEFT, "n_params"), (DIAGONAL, "tokens")):
        table = lr_sweep(scales).assign(width=[*range(7 * len(scales) - 1), 5e9])  # an odd column
        fitted = fit(table)
        spread = {"n_params": "±0.55", "tokens": "±0.44"}[column]
        assert fitted.status[0].startswith(f"`{column}` ")
        assert "not measured" in fitted.status[0] and spread in fitted.status[0]
        prediction = from_fit(fitted, **TARGET)
        assert prediction.warnings[0] == fitted.status[0]
        name = {"n_params": "a", "tokens": "b"}[column]
        assert fitted.params[name] == {"value": 0.0, "interval": None, "fixed": True}


def test_an_interval_widens_only_in_the_direction_that_is_not_measured():
    fitted = fit(lr_sweep(DIAGONAL))
    on_the_line = half_width(fitted, n_params=1e8, tokens=2e9)
    assert half_width(fitted, n_params=1e8, tokens=2e8) > 2 * on_the_line
    sd = math.sqrt(published_covariance()[1, 1])
    extra = half_width(fitted, n_params=1e8, tokens=2e8) ** 2 - on_the_line**2
    assert math.sqrt(extra) == pytest.approx(1.96 * sd * math.log(10), rel=1e-3)
    fitted = fit(lr_sweep(UP))
    assert half_width(fitted, n_params=1e7, tokens=2e8) < 0.6
    assert half_width(fitted, n_params=1e7, tokens=2e10) > 2


def test_a_batch_size_that_is_not_varied_has_the_published_spread():
    fitted = fit(lr_sweep([(n, d) for n in (1e6, 1e7) for d in (1e8, 4e8)]), "lr_ndb")
    assert fitted.status[0].startswith("`batch_tokens` is the same")
    at = {"n_params": 1e7, "tokens": 4e8}
    near, far = (half_width(fitted, batch_tokens=2.0**18 * factor, **at) for factor in (1, 16))
    assert far**2 - near**2 == pytest.approx(
        1.96**2 * published_covariance()[2, 2] * math.log(16) ** 2, rel=1e-3
    )


@given(st.floats(1e6, 1e9), st.floats(1.0, 1.009), st.floats(0.05, 0.99))
@settings(max_examples=25, deadline=None)
def test_intervals_do_not_collapse(n_params, ratio, level):
    """Noiseless optima with a standard error of 0, at sizes within 1 %."""
    cells = [
        {"x": -5.0, "se": 0.0, "cell": i, "half_width": (0.3, 0.3)}
        | {"n_params": n_params * ratio**i, "tokens": 20 * n_params}
        for i in range(2)
    ]
    part = fit_power_law(cells, ["n_params", "tokens"], level)
    assert part["solution"]["unmeasured"]["columns"] == ["n_params", "tokens"]
    fitted = Fit(
        law="lr_nd",
        params=part["params"],
        solution=part["solution"] | {"batch_tokens": []},
        objective=0.0,
        level=level,
    )
    z = stats.norm.ppf(0.5 + level / 2)
    assert half_width(fitted, n_params=n_params, tokens=20 * n_params) > 0.1 * z
    sd = math.sqrt(published_covariance()[0, 0])
    assert half_width(fitted, n_params=100 * n_params, tokens=20 * n_params) > z * sd * 4.5


@given(st.integers(0, 1000), st.integers(1, 4), st.floats(0.001, 0.1))
@settings(max_examples=30, deadline=None)
def test_few_cells_give_the_posterior_of_a_linear_model(seed, rows, spread):
    """The prior is two more observations of a least-squares problem."""
    rng = np.random.default_rng(seed)
    x, y, se = (
        spread * rng.standard_normal((rows, 2)),
        rng.standard_normal(rows),
        np.full(rows, 0.1),
    )
    prior = published_covariance()[:2, :2]
    result = regress(x, y, se, None, prior)
    sd = np.hypot(se, result["scatter"])
    above = np.column_stack([np.ones(rows), x]) / sd[:, None]
    below = np.column_stack([np.zeros(2), np.linalg.inv(np.linalg.cholesky(prior))])
    vector = np.linalg.lstsq(np.vstack([above, below]), np.append(y / sd, np.zeros(2)), rcond=None)[
        0
    ]
    np.testing.assert_allclose(result["vector"], vector, atol=1e-9)
    every = np.vstack([above, below])
    np.testing.assert_allclose(result["covariance"], np.linalg.inv(every.T @ every), atol=1e-9)


def test_two_by_two_clear_cells_keep_their_exponents():
    """Only the interval depends on the assumed scatter, not the point."""
    fitted = fit(lr_sweep([(n, d) for n in (1e6, 1e7) for d in (1e8, 1e9)]))
    assert fitted.params["a"]["value"] == pytest.approx(-0.3, abs=0.01)
    assert fitted.params["b"]["value"] == pytest.approx(0.1, abs=0.01)
    assert half_width(fitted, **TARGET) > 1


def test_enough_cells_do_not_feel_the_prior():
    rng = np.random.default_rng(3)
    x, y = rng.uniform(-2, 2, (9, 2)), rng.standard_normal(9)
    prior = published_covariance()[:2, :2]
    for key in ("vector", "covariance", "scatter"):
        np.testing.assert_array_equal(
            regress(x, 0.1 * y, np.full(9, 0.05), None, prior)[key],
            regress(x, 0.1 * y, np.full(9, 0.05))[key],
        )


def test_a_fit_file_without_the_new_keys_predicts_as_before(tmp_path):
    """The interval of the formula before: quantile * sqrt(variance + scatter**2)."""
    path = Path(__file__).parents[1] / "fits" / "2026-11-quickstart.json"
    kept = Fit.read(path)
    assert "unmeasured" not in kept.solution
    fitted = fit(lr_sweep(UP))
    content = json.loads(json.dumps(fitted.to_dict()))
    del content["solution"]["unmeasured"]
    old = Fit.from_dict(content)
    s = old.solution
    at = np.array([1.0, math.log(TARGET["n_params"]) - s["centre"][0]])
    variance = at @ np.array(s["covariance"]) @ at + s["scatter"] ** 2
    assert half_width(old, **TARGET) == pytest.approx(s["quantile"] * math.sqrt(variance))
    assert half_width(old, **TARGET) < half_width(fitted, **TARGET)


@needs_public_data
def test_public_settings_are_covered_from_few_others():
    """Step Law: each set of one, two or three settings predicts the optimum of all others."""
    table = pd.read_csv(DATA / "steplaw_dense_dev.csv")
    table["lr"], table["status"] = table["lr_grid"], np.where(table["diverged"], "diverged", "done")
    cells = [row | {"cell": i} for i, row in enumerate(measure(table)) if row["status"] == "ok"]
    assert len(cells) == 8
    for size in (1, 2, 3):
        covered, widths = [], []
        for chosen in itertools.combinations(cells, size):
            part = fit_power_law(list(chosen), ["n_params", "tokens"])
            fitted = Fit(
                law="lr_nd",
                params=part["params"],
                solution=part["solution"] | {"batch_tokens": []},
                objective=0.0,
            )
            for cell in (cell for cell in cells if cell not in chosen):
                at = {"n_params": cell["n_params"], "tokens": cell["tokens"]}
                low, high = from_fit(fitted, **at).interval["lr"]
                covered.append(low <= cell["lr"] <= high)
                widths.append(math.log(high / low))
        assert np.mean(covered) >= 0.95 and np.median(widths) < 2.5


# loss laws


def test_the_published_loss_laws_are_those_of_the_catalogue():
    parameters = published_parameters()
    assert len(parameters) == 9
    for name, row in (("besiroglu", 1), ("gadre_loss_c4", 6)):
        e, a, b, alpha, beta = parameters[row]
        theirs, _ = laws.evaluate(laws.law(name), n_params_total=3e9, tokens=1e11)
        assert e + a / 3e9**alpha + b / 1e11**beta == pytest.approx(theirs["loss"], rel=1e-9)
    assert parameters[1].tolist() == [1.8172, 482.01, 2085.43, 0.3478, 0.3658]  # arXiv:2404.10102


@pytest.mark.parametrize("law", LOSS_LAWS)
@pytest.mark.parametrize("n_runs", [1, 2, 3])
def test_one_to_three_runs_give_a_wide_interval_at_a_large_target(law, n_runs, tmp_path, capsys):
    """Published laws give 2.2 nats/token at the target; one run gave 2.983 ± 0.7 %."""
    runs = [(1e7, 2e8, 2.983), (2e7, 4e8, 2.8), (4e7, 8e8, 2.65)][:n_runs]
    path = tmp_path / "runs.csv"
    loss_table(*runs).to_csv(path, index=False)
    assert main(["fit", str(path), "--law", law, "--out", str(tmp_path / "fit.json")]) == 0
    out = capsys.readouterr()
    first = (out.err + out.out).splitlines()[0]
    assert "not measured" in first and "9 published laws (alpha 0.13 to 0.35" in first
    assert "compute-optimal: not identified" in out.out and "flops**" not in out.out
    fitted = Fit.read(tmp_path / "fit.json")
    assert "not measured" in fitted.status[0]
    prediction = from_fit(fitted, **TARGET)
    low, high = prediction.interval["loss"]
    assert low < 1.7 and 2.25 < high < runs[-1][2] and prediction.warnings[0] == fitted.status[0]
    low, high = from_fit(fitted, n_params=1e7, tokens=2e8).interval["loss"]
    assert 2.7 < low < 2.983 < high < 3.3


@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.parametrize("ratio", [1.0, 1.009])
def test_runs_within_one_per_cent_are_one_scale(level, ratio):
    runs = loss_table((1e9, 2e10, 2.6), (1e9 * ratio, 2e10, 2.61), (1e9, 2e10 / ratio, 2.605))
    fitted = fit(runs, "chinchilla", level=level)
    assert "not measured" in fitted.status[0]
    assert fitted.solution["unmeasured"]["columns"] == ["n_params", "tokens"]
    low, high = from_fit(fitted, n_params=1e10, tokens=2e11).interval["loss"]
    assert high / low > (1.06 if level == 0.5 else 1.2)


def test_an_interval_from_one_run_contains_every_published_ratio():
    """The losses of published laws, at 10 times the size and tokens, relative to the run."""
    fitted = fit(loss_table((1e9, 2e10, 2.5)), "chinchilla")
    low, high = from_fit(fitted, n_params=1e10, tokens=2e11).interval["loss"]
    for e, a, b, alpha, beta in published_parameters():
        before = e + a / 1e9**alpha + b / 2e10**beta
        after = e + a / 1e10**alpha + b / 2e11**beta
        assert low < 2.5 * after / before < high


def test_losses_in_another_unit_keep_their_scale():
    """All published E are above these losses, so only ratios are used."""
    small = fit(loss_table((1e9, 2e10, 0.2)), "chinchilla")
    prediction = from_fit(small, n_params=1e10, tokens=2e11)
    low, high = prediction.interval["loss"]
    assert 0.1 < low < prediction.loss < high < 0.2


def test_one_size_measures_only_the_effect_of_tokens():
    tokens = np.geomspace(1e9, 6.4e10, 7)
    runs = loss_table(*((1e8, d, 2.0 + 2000 / d**0.37) for d in tokens))
    fitted = fit(runs, "loss_nd")
    assert fitted.solution["unmeasured"]["columns"] == ["n_params"]
    for d in (1e9, 6.4e10, 6.4e11):
        prediction = from_fit(fitted, n_params=1e8, tokens=d)
        assert prediction.loss == pytest.approx(2.0 + 2000 / d**0.37, rel=0.02)
    wide, narrow = (
        from_fit(fitted, n_params=n, tokens=6.4e10).interval["loss"] for n in (1e10, 1e8)
    )
    assert wide[1] / wide[0] > 2 * narrow[1] / narrow[0] - 1


def test_the_prior_given_fixed_parameters_is_scipys_conditional():
    prior = published_prior(18.0, 23.0, 1.0)
    base, free = np.array([0.0, 0, 0, 0.3, 0]), np.eye(5)[:, [0, 1, 2, 4]]
    mean, covariance = prior.on(base, free)
    at = np.random.default_rng(0).multivariate_normal(mean, covariance, 4)
    ours = stats.multivariate_normal(mean, covariance).logpdf(at)
    theirs = stats.multivariate_normal(prior.mean, prior.covariance).logpdf(base + at @ free.T)
    np.testing.assert_allclose(ours - ours[0], theirs - theirs[0], atol=1e-6)


def test_the_noise_of_few_runs_is_that_of_a_normal_distribution_on_a_grid():
    n, d = np.array([1e8, 3e8, 1e9]), np.array([1e10, 1e10, 3e10])
    loss = np.array([3.1, 2.7, 2.55])
    columns = {"n_params": n, "tokens": d}
    centre = CHINCHILLA.centre(columns)
    shape = make_shape(CHINCHILLA, centre)
    problem = build_problem(CHINCHILLA, shape, columns, loss)
    prior = published_prior(centre[1, 0], centre[2, 1], float(np.log(loss).mean()))
    steps = 1e-6 * np.eye(5)
    jacobian = np.column_stack(
        [
            (problem.ln_model((prior.mean + h)[None]) - problem.ln_model((prior.mean - h)[None]))[0]
            / 2e-6
            for h in steps
        ]
    )
    grid = np.geomspace(1e-3, 0.1, 41)
    likelihood = [
        stats.multivariate_normal(
            problem.ln_model(prior.mean[None])[0],
            jacobian @ prior.covariance @ jacobian.T + sd**2 * np.eye(3),
        ).logpdf(np.log(loss))
        - FEW_DOF * (math.log(sd) + FEW_NOISE**2 / sd**2 / 2)
        for sd in grid
    ]
    weight = np.exp(np.array(likelihood) - max(likelihood))
    expected = math.sqrt(weight @ grid**2 / weight.sum())
    assert few_run_noise(problem, prior.mean, prior.covariance, None)[0] == pytest.approx(
        expected, rel=1e-4
    )


def test_exponents_tied_to_each_other_are_refused():
    with pytest.raises(UserError, match="tied to one that is free or has a value"):
        fit(loss_table((1e9, 2e10, 2.6)), "chinchilla", fixed={"alpha": "beta", "beta": "alpha"})


def test_parameters_fixed_by_the_user_stay_fixed_with_one_run():
    table = loss_table((1e9, 2e10, 2.6))
    for fixed in ({"E": 1.7}, {"E": 0.0}, {"E": 1.7, "alpha": 0.34, "beta": "alpha"}):
        fitted = fit(table, "chinchilla", fixed=fixed)
        assert fitted.params["E"] == {"value": fixed["E"], "interval": None, "fixed": True}
        prediction = from_fit(fitted, n_params=1e10, tokens=2e11)
        low, high = prediction.interval["loss"]
        assert low < prediction.loss < 2.6 and high / low > 1.04


@needs_public_data
@pytest.mark.parametrize("law", LOSS_LAWS)
def test_public_losses_are_covered_from_few_runs(law):
    """OLMo ladder and the Chinchilla points: one run, one size, or two to four runs."""
    olmo = pd.read_csv(DATA / "olmo_ladder_dev.csv").rename(columns={"loss_c4": "loss"})
    epoch = pd.read_csv(DATA / "chinchilla_epoch.csv").sample(40, random_state=0)
    rng, covered, width = np.random.default_rng(0), [], []
    for table in (olmo, epoch):
        table = table[["n_params", "tokens", "loss"]].drop_duplicates(["n_params", "tokens"])
        for n_runs in (1, 2, 3, 4):
            for _ in range(3):
                runs = table.sample(n_runs, random_state=int(rng.integers(1e6)))
                fitted = fit(runs, law)
                for n, d, loss in table.drop(runs.index).to_numpy(float):
                    low, high = from_fit(fitted, n_params=n, tokens=d).interval["loss"]
                    covered.append(low <= loss <= high)
                    width.append(high / low - 1)
    assert np.mean(covered) >= 0.9 and np.median(width) < 0.3


# the joint law


def test_a_joint_fit_says_first_what_was_not_measured():
    batches = (2.0**17, 2.0**18, 2.0**19)
    single = lr_sweep(ONE, batches=batches)
    mixed = single.assign(weight_decay=np.where(single.index % 2, 0.1, 0.0))  # another warning
    fitted = fit(mixed, "joint")
    assert fitted.status[0].startswith("all runs have the same n_params: lr.N")
    assert "loss.alpha 0.35 ± 0.1" in fitted.status[0]
    assert from_fit(fitted, **TARGET).warnings[0] == fitted.status[0]
    one_batch = fit(lr_sweep([(n, d) for n in (1e6, 4e6) for d in (1e8, 4e8)]), "joint")
    assert one_batch.status[0].startswith("batch sensitivity unknown")
    for truth in LR_EXPONENTS[:3]:
        prediction = from_fit(fit(lr_sweep(ONE, truth, batches=batches), "joint"), **TARGET)
        low, high = prediction.interval["lr"]
        assert low < 0.02 * 7e3 ** truth[0] * 1.4e3 ** truth[1] < high


def test_old_records_without_the_key_are_replaced_only_in_width():
    fitted = fit(lr_sweep(ONE))
    without = {key: value for key, value in fitted.solution.items() if key != "unmeasured"}
    old = replace(fitted, solution=without)
    assert from_fit(old, **TARGET).lr == from_fit(fitted, **TARGET).lr
