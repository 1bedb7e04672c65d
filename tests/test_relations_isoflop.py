"""isoFLOP fits: which budgets count, the bias of parabolas, and what is refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaletune.errors import UserError
from scaletune.fitting.relations import RELATIONS, fit_relation, predict_relation, select_group
from scaletune.fitting.relations.rows import scale_levels
from scaletune.records import Fit

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_public_data = pytest.mark.skipif(not DATA.exists(), reason="no public sweeps")
ISOFLOP = RELATIONS["isoflop"]

# E, A, B, alpha, beta: Hoffmann et al., and two laws whose exponents differ
LAWS = {
    "chinchilla": (1.69, 406.4, 410.7, 0.34, 0.28),
    "asymmetric": (1.5, 80.0, 4000.0, 0.2, 0.45),
    "kaplan-like": (1.7, 200.0, 3000.0, 0.18, 0.45),
}


def optimal_size(law, flops):
    """arXiv:2203.15556, eq. 4."""
    _, A, B, alpha, beta = LAWS[law]
    return np.exp((np.log(alpha * A / beta / B) + beta * np.log(flops / 6)) / (alpha + beta))


def exponent(law):
    *_, alpha, beta = LAWS[law]
    return beta / (alpha + beta)


def budgets(
    law="chinchilla", width=4.5, drift=1.0, offset=1.0, sizes=8, levels=6, sd=0.0, seed=0
) -> pd.DataFrame:
    """Runs at equal FLOPs, from 1/width to width times a centre; the centre drifts with compute."""
    E, A, B, alpha, beta = LAWS[law]
    rng, rows = np.random.default_rng(seed), []
    for i, flops in enumerate(np.geomspace(1e18, 3e20, levels)):
        centre = optimal_size(law, flops) * offset * drift ** (i / max(levels - 1, 1) - 0.5)
        for n in np.geomspace(centre / width, centre * width, sizes):
            d = flops / 6 / n
            loss = (E + A * n**-alpha + B * d**-beta) * np.exp(sd * rng.standard_normal())
            rows.append((f"{flops:.2g}-{n:.3g}", flops, n, d, loss))
    return pd.DataFrame(rows, columns=["id", "flops", "n_params", "tokens", "loss"])


def fit(table, **how) -> Fit:
    return fit_relation(table, ISOFLOP, **how)


def value(fitted, name="p"):
    return fitted.params[name]["value"]


def width(fitted, name="p"):
    low, high = fitted.params[name]["interval"]
    return high - low


# --- which budgets count --------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_a_budget_with_its_lowest_loss_at_an_end_is_dropped_and_named(end):
    runs = budgets()
    first = runs["flops"] == runs["flops"].min()
    best = optimal_size("chinchilla", runs["flops"].min())
    beyond = runs["n_params"] < best if end == "smallest" else runs["n_params"] > best
    cut = runs[~(first & beyond)]
    fitted = fit(cut)
    assert fitted.status[0].startswith("1 of 6 groups dropped (flops=1e+18): the lowest loss is at")
    assert end in fitted.status[0]
    assert set(fitted.dropped) == set(cut.loc[cut["flops"] == 1e18, "id"])
    assert all(reason.startswith("flops=1e+18: the lowest") for reason in fitted.dropped.values())
    assert not set(fitted.dropped) & set(fitted.used)
    (cell,) = [cell for cell in fitted.cells if cell["status"] != "ok"]
    assert cell["flops"] == 1e18 and "lowest loss" in cell["status"]
    assert value(fitted) == pytest.approx(exponent("chinchilla"), abs=0.002)


@pytest.mark.parametrize("outlier", [2, 3, 4])
def test_a_monotone_budget_with_one_low_outlier_does_not_decide(outlier):
    """The outlier is inside, but the loss falls up to the largest size."""
    runs = budgets(sd=0.001)
    clean = fit(runs)
    sizes = runs.loc[runs["flops"] == runs["flops"].max(), "n_params"].sort_values()
    falling = 2.4 + 0.1 * (np.log(sizes / sizes.min()) / np.log(4.5**2) - 1.5) ** 2
    runs.loc[sizes.index, "loss"] = falling
    runs.loc[sizes.index[outlier], "loss"] = falling.min() - 0.002
    fitted = fit(runs)
    low, high = clean.params["p"]["interval"]
    assert low <= value(fitted) <= high
    assert "no minimum inside the sizes" in fitted.status[0]


def test_thin_budgets_are_dropped_and_not_fatal():
    runs = budgets()
    for i, flops in enumerate(sorted(runs["flops"].unique())[:2]):
        rows = runs.index[runs["flops"] == flops]
        runs = runs.drop(rows[i + 2 :])
    fitted = fit(runs)
    assert [sentence.split(":")[1].strip() for sentence in fitted.status] == [
        "it has 2 sizes, but a parabola needs 4",
        "it has 3 sizes, but a parabola needs 4",
    ]
    assert len(fitted.dropped) == 5
    assert value(fitted) == pytest.approx(exponent("chinchilla"), abs=0.002)


def test_two_budgets_give_their_optima_and_no_exponent_of_their_own():
    fitted = fit(budgets(levels=2))
    assert "p" not in fitted.params and fitted.solution == {}
    assert "2 groups are fitted separately" in fitted.status[0]
    assert value(fitted, "p_additive") == pytest.approx(exponent("chinchilla"), abs=1e-3)
    one = select_group(fitted, ISOFLOP, {"flops": 1.001e18})
    assert one.solution["values"]["n_optimal"] == pytest.approx(
        optimal_size("chinchilla", 1e18), rel=0.05
    )
    with pytest.raises(UserError, match="name one of them, such as flops=1e"):
        select_group(fitted, ISOFLOP, {"flops": 2e18})


def test_one_budget_gives_its_optimum_and_says_that_there_is_no_exponent():
    runs = budgets(levels=1)
    fitted = fit(runs)
    assert set(fitted.params) == {"floor", "curvature", "n_optimal"}
    assert "one group, flops=1e+18" in fitted.status[0] and "no law of `flops`" in fitted.status[0]
    cut = runs[runs["n_params"] > optimal_size("chinchilla", 1e18)]
    with pytest.raises(UserError, match="lowest loss is at the smallest size"):
        fit(cut)


# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_measured_flops_that_differ_by_run_are_one_budget(kind):
    runs, rng = budgets(sd=0.001), np.random.default_rng(1)
    jitter = {
        "uniform": rng.uniform(-0.003, 0.003, len(runs)),
        "normal": 0.003 * rng.standard_normal(len(runs)),
    }[kind]
    clean, jittered = fit(runs), fit(runs.assign(flops=runs["flops"] * (1 + jitter)))
    assert len(jittered.cells) == 6
    assert abs(value(jittered) - value(clean)) < width(clean) / 10


def test_scales_within_one_percent_are_one_and_free_values_are_not():
    assert list(scale_levels(np.array([1.0, 1.008, 1.016, 2.0]))) == [0, 0, 0, 1]
    assert scale_levels(np.geomspace(1, 1000, 2000)).max() > 500
    assert list(scale_levels(np.array([3.0, 1.0, 3.02]))) == [1, 0, 1]


def test_missing_flops_are_computed_and_it_is_assumed():
    runs = budgets()
    fitted = fit(runs.drop(columns="flops"))
    assert value(fitted) == pytest.approx(value(fit(runs)), abs=1e-6)
    assert any(
        "`flops` is missing and computed as 6 * n_params * tokens" in a for a in fitted.assumptions
    )
    without_tokens = fit(runs.drop(columns="tokens"))
    assert any("`tokens` is computed as flops" in a for a in without_tokens.assumptions)


def test_all_missing_columns_are_named_at_once():
    with pytest.raises(UserError) as error:
        fit(budgets()[["id", "n_params"]])
    for part in ("`flops` (training FLOPs)", "`loss`", "from `n_params` and `tokens`", "--map"):
        assert part in str(error.value)


@pytest.mark.parametrize("columns", [["flops"], []])
def test_runs_without_a_design_of_budgets_are_refused(columns):
    """Sizes and tokens on a grid: no parabola is fitted through all of them."""
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(17, 21, 60)), np.exp(rng.uniform(20, 24, 60))
    runs = pd.DataFrame({"n_params": n, "tokens": d, "loss": 1.7 + 400 * n**-0.34 + 410 * d**-0.28})
    runs = runs.assign(flops=6 * n * d) if columns else runs
    with pytest.raises(UserError) as error:
        fit(runs)
    for law in ("`chinchilla`", "`loss_nd`", "`frontier`"):
        assert law in str(error.value)


def test_a_grid_whose_diagonals_are_too_short_is_refused_with_the_laws_for_it():
    n, d = (
        axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 6))
    )
    runs = pd.DataFrame({"n_params": n, "tokens": d, "loss": 1.7 + 400 * n**-0.34 + 410 * d**-0.28})
    with pytest.raises(
        UserError, match="otherwise fit n_params and tokens together with `chinchilla`"
    ):
        fit(runs)


def test_sizes_in_millions_are_doubted_first():
    runs = budgets()
    fitted = fit(runs.assign(n_params=runs["n_params"] / 1e6))
    assert "`flops` is 1e+06 times 6 * n_params * tokens" in fitted.status[0]


def test_repeated_runs_count_once():
    runs = budgets(sd=0.002)
    twice = fit(pd.concat([runs, runs.assign(id=runs["id"] + "-again")]))
    assert twice.params == fit(runs).params and len(twice.dropped) == len(runs)
    assert "48 rows with the same values as another one dropped" in twice.status


def test_runs_of_several_data_sets_are_refused():
    runs = budgets()
    both = pd.concat([runs.assign(dataset="a"), runs.assign(dataset="b", loss=runs["loss"] + 0.1)])
    with pytest.raises(UserError, match="one `dataset`, but got 'a', 'b'"):
        fit(both)


def test_the_best_of_several_settings_represents_a_size():
    """A sweep of lr at each size: the mean over lrs would hide the minimum."""
    runs = budgets()
    worse = runs.assign(lr=2e-2, loss=runs["loss"] * (1 + 0.01 * (np.arange(len(runs)) % 3)) + 0.05)
    worse["id"] += "-worse"
    fitted = fit(pd.concat([runs.assign(lr=1e-2), worse]))
    assert value(fitted) == pytest.approx(value(fit(runs)), abs=1e-9)
    assert set(fitted.dropped) == set(worse["id"])


# --- rows that do not count -----------------------------------------------------------------------


def test_the_order_of_the_rows_does_not_matter():
    runs = budgets(sd=0.003)
    first = fit(runs)
    for seed in range(3):
        again = fit(runs.sample(frac=1, random_state=seed))
        assert again.params == first.params and again.status == first.status
        assert set(again.used) == set(first.used)


def test_unfinished_and_diverged_runs_change_nothing_and_are_listed():
    runs = budgets(sd=0.002)
    bad = runs.iloc[::5].assign(
        loss=lambda t: t["loss"] * 0.9, status="failed", message="killed at 40 %"
    )
    diverged = runs.iloc[1::9].assign(loss=np.nan, status="diverged", message="")
    lost = runs.iloc[2::11].assign(loss=np.nan, status="done")
    for i, table in enumerate((bad, diverged, lost)):
        table["id"] += f"-{i}"
    fitted = fit(pd.concat([bad, runs.assign(status="done"), diverged, lost]))
    assert fitted.params == fit(runs).params
    reasons = {fitted.dropped[i] for i in bad["id"]}
    assert reasons == {"failed: killed at 40 %"}
    assert {fitted.dropped[i] for i in diverged["id"]} <= {"diverged", "`loss` is missing"}
    assert {fitted.dropped[i] for i in lost["id"]} == {"`loss` is missing"}


@pytest.mark.parametrize("factor", [0.97, 1.05])
def test_one_outlier_moves_the_exponent_by_less_than_its_interval(factor):
    runs = budgets(sd=0.001, sizes=9)
    clean = fit(runs)
    rows = runs.index[runs["flops"] == sorted(runs["flops"].unique())[2]]
    for row in (rows[2], rows[6]):
        moved = runs.copy()
        moved.loc[row, "loss"] *= factor
        fitted = fit(moved)
        low, high = fitted.params["p"]["interval"]
        assert low <= exponent("chinchilla") <= high
        assert abs(value(fitted) - value(clean)) < 0.02


# --- the bias of parabolas ------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("design", [(4.5, 3.0, 1.0), (4.5, 1.0, 2.0), (8.0, 2.0, 1.5)])
def test_the_corrected_exponent_is_nearer_the_truth(law, design):
    """Without noise, a drifting or off-centre grid biases the parabolas (arXiv:2603.22339)."""
    fitted = fit(budgets(law, *design))
    own, corrected = (abs(value(fitted, name) - exponent(law)) for name in ("p", "p_corrected"))
    assert corrected <= own + 1e-5 and corrected < 1e-4
    assert value(fitted, "p_additive") == pytest.approx(exponent(law), abs=1e-4)
    low, high = fitted.params["p"]["interval"]
    assert low - 1e-6 <= exponent(law) <= high + 1e-6


def test_the_bias_of_each_minimum_is_that_of_a_parabola_without_noise():
    """Wide slices of an asymmetric law: every minimum is off by the share in `parabola_bias`."""
    fitted = fit(budgets("asymmetric"))
    for cell in fitted.cells:
        true = optimal_size("asymmetric", cell["flops"])
        assert cell["parabola_bias"] == pytest.approx(cell["n_optimal"] / true - 1, abs=0.01)
        assert abs(cell["parabola_bias"]) > 0.03
    assert any("width of the slices (arXiv:2603.22339)" in a for a in fitted.assumptions)
    at = predict_relation(fitted, ISOFLOP, {"flops": [1e22]})
    assert at["low"][0] <= optimal_size("asymmetric", 1e22) <= at["high"][0]


def test_a_bias_beyond_the_interval_is_said_first():
    """The sizes drift and are off-centre, so the bias changes with compute; there is no noise."""
    fitted = fit(budgets("kaplan-like", 4.5, 4.0, 1.7, sizes=12, levels=10))
    assert fitted.status[0].startswith("the parabolas bias p by more than its interval")
    assert "use `p_corrected`" in fitted.status[0]


def test_an_additive_law_that_disagrees_is_said_first():
    """Losses with minima ~ flops**0.9 that no additive law has."""
    runs = budgets(sd=0.0005)
    best = 1e8 * (runs["flops"] / 1e18) ** 0.9
    curve = 0.05 * np.log(runs["n_params"] / best) ** 2
    runs["n_params"] = runs["n_params"] / optimal_size("chinchilla", runs["flops"]) * best
    runs["tokens"] = runs["flops"] / 6 / runs["n_params"]
    curve = 0.02 * np.log(runs["n_params"] / best) ** 2
    noise = 0.0005 * np.random.default_rng(2).standard_normal(len(runs))
    runs["loss"] = (3.0 - 0.1 * np.log(runs["flops"] / 1e18) / np.log(300) + curve) * np.exp(noise)
    fitted = fit(runs)
    assert value(fitted) == pytest.approx(0.9, abs=0.02)
    low, high = fitted.params["p_additive"]["interval"]
    own_low, own_high = fitted.params["p"]["interval"]
    disjoint = low > own_high or high < own_low
    assert disjoint == fitted.status[0].startswith("the isoFLOP parabolas give p =")


@pytest.mark.parametrize("law", LAWS)
def test_intervals_cover_the_truth(law):
    covered = []
    for seed in range(6):
        fitted = fit(budgets(law, 4.5, 1.5, 1.2, sd=0.003, seed=seed))
        at = predict_relation(fitted, ISOFLOP, {"flops": [3e21]})
        low, high = fitted.params["p"]["interval"]
        covered.append(low <= exponent(law) <= high)
        covered.append(at["low"][0] <= optimal_size(law, 3e21) <= at["high"][0])
    assert np.mean(covered) >= 0.85


def test_a_fit_file_keeps_the_comparison(tmp_path):
    fitted = fit(budgets(sd=0.002))
    again = Fit.read(fitted.write(tmp_path / "fit.json"))
    assert again.params == fitted.params and again.params["p_additive"]["derived"]
    at = [predict_relation(each, ISOFLOP, {"flops": [1e22]}) for each in (fitted, again)]
    assert at[0] == at[1]


# --- public runs ----------------------------------------------------------------------------------


@needs_public_data
def test_published_exponents_are_inside_or_near_the_intervals():
    """Porian et al. (arXiv:2406.19146) interpolate instead of fitting parabolas.

    Their exponents are from the same runs and larger ones.
    """
    runs = pd.read_csv(DATA / "porian_isoflop_dev.csv")
    published = pd.read_csv(DATA / "porian_fits_published.csv")
    published = published[published["fit"] == "bs_median_weighted"].set_index("config_id")
    own, corrected = [], []
    for config, rows in runs.groupby("config_id"):
        fitted, true = fit(rows), published.loc[config, "n_exponent"]
        low, high = fitted.params["p"]["interval"]
        assert low - 0.02 < true < high + 0.02, config
        own.append(abs(value(fitted) - true))
        corrected.append(abs(value(fitted, "p_corrected") - true))
    assert np.mean(corrected) < np.mean(own) < 0.02
    assert max(own) < 0.04


@needs_public_data
def test_public_budgets_without_a_minimum_are_dropped():
    """The source of these digitised runs flags the same budgets as outliers."""
    runs = pd.read_csv(DATA / "misfitting_isoflop.csv")
    flagged = runs.groupby("flops_budget")["outlier"].mean()
    fitted = fit(runs.drop(columns="flops_budget").assign(id=runs["run_id"]))
    bad = [cell["flops"] for cell in fitted.cells if cell["status"] != "ok"]
    assert len(bad) == 7
    assert all(flagged[np.abs(np.log(flagged.index / c)) < 0.01].iloc[0] == 1.0 for c in bad)
    clean = fit(runs[~runs["outlier"]].drop(columns="flops_budget"))
    low, high = clean.params["p"]["interval"]
    assert low <= value(fitted) <= high


@needs_public_data
def test_three_training_mixes_are_fitted_apart():
    runs = pd.read_csv(DATA / "marin_isoflop_dev.csv")
    with pytest.raises(UserError, match="one `dataset`"):
        fit(runs)
    exponents = {}
    for mix, rows in runs.groupby("dataset"):
        exponents[mix] = fit(rows)
    assert {len(f.used) > 30 for f in exponents.values()} == {True}
    for fitted in exponents.values():
        low, high = fitted.params["p"]["interval"]
        assert all(low <= value(other) <= high for other in exponents.values())
        add_low, add_high = fitted.params["p_additive"]["interval"]
        assert low < add_high and add_low < high


@needs_public_data
def test_the_llama_budgets_agree_with_their_additive_law():
    runs = pd.read_csv(DATA / "llama_3_isoflop_dev.csv")
    fitted = fit(runs)
    assert fitted.status == ["ok"]
    assert value(fitted) == pytest.approx(value(fitted, "p_additive"), abs=0.03)
