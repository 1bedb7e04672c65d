"""Plans against dense algebra, random designs, simulated studies, and a sweep of a written plan."""

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from test_sweeping import InProcess

import scaletune
from scaletune import planning, recipe, sweeping
from scaletune.cli import main
from scaletune.errors import UserError
from scaletune.fitting import fit
from scaletune.planning import candidates as possible
from scaletune.planning import prior as planning_prior
from scaletune.planning.cost import Candidates, added
from scaletune.planning.optimal_design import core, criterion, half_widths, information, path
from scaletune.planning.prior import from_joint, from_priors
from scaletune.recipe import load, points, validate_recipe, with_settings
from scaletune.surface.design import (
    GreedyDesign,
    criterion_weights,
    expected_information,
    expected_weight,
    target_gradient,
)
from scaletune.surface.model import STUDENT, SurfaceRuns, ln_loss, parameter_names
from scaletune.surface.prior import latin_normals

CENTRE, AT = (17.0, 20.0), (math.log(2e-3), math.log(1e5))
TARGET = """
data = {{ source = "{words}", seq_len = 32, epochs = 20 }}
model = {{ width = 256, depth = 1, head_dim = 16, ffn_ratio = 2.0 }}
parametrization = {{ base_width = 32, init_std = 0.05 }}
optimizer = {{ lr = 0.01 }}
budget = {{ tokens = 524288, batch_tokens = 512, eval_tokens = 512 }}
"""


def make_prior(seed=0, sds=(0.5, 0.5)):
    return from_priors(CENTRE, AT, sds, seed=seed)


def grid(prior, sizes=(-1.4, 0.0, 1.4), horizons=(-1.4, -0.7, 0.0, 0.7), seeds=1):
    """5 lr and 3 batches about the prior optimum of every (size, horizon); a larger target."""
    rows, cell = [], 0
    for n in sizes:
        for d in horizons:
            lr, batch = prior.optimum(math.exp(n + CENTRE[0]), math.exp(d + CENTRE[1]))
            rows += [
                (n, d, lr + u, batch + v, cell)
                for u in np.log([0.25, 0.5, 1, 2, 4])
                for v in np.log([0.25, 1, 4])
            ]
            cell += 1
    n, d, lr, batch, cells = np.array(rows).T
    runs = SurfaceRuns(n, d, np.column_stack([lr, batch]), np.zeros(len(n)), cells.astype(int))
    return Candidates(runs, seeds * np.exp(n + d), (3.4, 2.0), seeds)


@pytest.fixture(scope="module")
def prior():
    return make_prior()


@pytest.fixture(scope="module")
def candidates(prior):
    return grid(prior)


@pytest.fixture(scope="module")
def target(words, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "target.toml"
    path.write_text(TARGET.format(words=words))
    return path


@pytest.fixture(scope="module")
def planned(target):
    return planning.plan(target, "5%")


# information


def test_the_information_of_cells_is_that_of_the_dense_matrix_with_their_deviations(
    prior, candidates
):
    theta, scales, runs = (
        prior.draws[0],
        prior.scales,
        candidates.runs.select(np.arange(0, len(candidates.cost), 7)),
    )
    _, to_theta, to_delta, tall = ln_loss(theta, np.zeros((runs.n_cells, 3)), runs)
    n_theta = len(theta)
    jacobian = np.zeros((len(runs.n), n_theta + 3 * runs.n_cells))
    jacobian[:, :n_theta] = to_theta
    for row, cell in enumerate(runs.cell):
        jacobian[row, n_theta + 3 * cell : n_theta + 3 * cell + 3] = to_delta[row]
    before = np.concatenate([prior.fit_prior[:, 1], np.tile(scales.scatter, runs.n_cells)]) ** -2.0
    dense = np.linalg.inv(
        jacobian.T @ (jacobian * expected_weight(tall, scales)[:, None]) + np.diag(before)
    )[:n_theta, :n_theta]
    told = expected_information(runs, theta, scales, np.ones(len(runs.n))).sum(0)
    assert np.linalg.inv(told + np.diag(prior.fit_prior[:, 1] ** -2.0)) == pytest.approx(
        dense, rel=1e-6, abs=1e-10
    )


def test_expected_weight_is_the_information_of_a_students_location():
    t, scale = np.linspace(-400, 400, 800_001), 0.02
    density = (1 + (t / scale) ** 2 / STUDENT) ** (-(STUDENT + 1) / 2)
    score = (STUDENT + 1) * t / (STUDENT * scale**2 + t**2)
    numeric = (score**2 * density).sum() / density.sum()
    scales = make_prior().scales._replace(noise=scale)
    assert expected_weight(np.zeros(1), scales)[0] == pytest.approx(numeric, rel=1e-3)


def test_slopes_of_the_target_are_those_of_finite_differences(prior, candidates):
    theta, h = prior.draws[1], 1e-6

    def at(vector):
        n, d = np.array([candidates.target[0]]), np.array([candidates.target[1]])
        x = [
            vector[3 * i] + vector[3 * i + 1] * n[0] + vector[3 * i + 2] * (d[0] - n[0])
            for i in (0, 1)
        ]
        e, a, b, alpha, beta = vector[6:11]
        return np.array(
            [*x, np.log(np.exp(e) + np.exp(a - alpha * n[0]) + np.exp(b - beta * d[0]))]
        )

    steps = h * np.eye(len(theta))
    numeric = np.column_stack([(at(theta + s) - at(theta - s)) / (2 * h) for s in steps])
    assert target_gradient(theta, candidates.target, 2) == pytest.approx(numeric, abs=1e-7)


def test_weights_are_half_the_curvature_of_the_loss_at_the_target(prior, candidates):
    theta, h = prior.draws[2], 1e-3

    def loss_at(u, v):
        n, d = np.array([candidates.target[0]]), np.array([candidates.target[1]])
        x = theta[:6].reshape(2, 3) @ np.array([1.0, n[0], d[0] - n[0]]) + [u, v]
        return float(
            ln_loss(theta, np.zeros((1, 3)), SurfaceRuns(n, d, x[None], n, np.zeros(1, int)))[0][0]
        )

    weights = criterion_weights(theta, candidates.target, 2)
    for i, (u, v) in enumerate(((h, 0), (0, h))):
        assert weights[i, i] == pytest.approx(
            (loss_at(u, v) + loss_at(-u, -v) - 2 * loss_at(0, 0)) / (2 * h * h), rel=1e-3
        )
    mixed = (loss_at(h, h) - loss_at(h, -h) - loss_at(-h, h) + loss_at(-h, -h)) / (8 * h * h)
    assert weights[0, 1] == pytest.approx(mixed, rel=1e-3)


def test_draws_are_stratified_in_every_parameter():
    """A Latin hypercube: each of n equal strata once per column; unit variance."""
    normals = latin_normals(12, 5, seed=3)
    assert normals.std(0) == pytest.approx(np.ones(5))
    strata = np.floor(norm.cdf(normals * norm.ppf((np.arange(12) + 0.5) / 12).std()) * 12)
    assert (np.sort(strata, axis=0) == np.arange(12)[:, None]).all()
    assert (latin_normals(12, 5, seed=3) == normals).all()
    assert (latin_normals(12, 5, seed=4) != normals).any()


# the design


def test_rank_one_updates_equal_the_covariance_of_all_runs(prior, candidates):
    """The pivoted Cholesky factor of a greedy design against the covariance of all runs."""
    chosen = path(prior, candidates, until=60.0, most=40)
    state = GreedyDesign(
        candidates.runs, candidates.target, prior.draws, prior.fit_prior, prior.scales, most=60
    )
    for i in chosen:
        state.take(int(i))
    j = int(np.argmax(state.gains()))
    before, after = (criterion(prior, candidates, np.array(c, int)) for c in (chosen, [*chosen, j]))
    assert before - after == pytest.approx(state.gains()[j], rel=1e-5)
    assert state.criteria.sum(1).mean() == pytest.approx(before, rel=1e-5)
    considered = state.branch()
    considered.take(j)
    assert considered.criteria.sum(1).mean() == pytest.approx(after, rel=1e-5)
    assert state.criteria.sum(1).mean() == pytest.approx(before, rel=1e-5) and not state.taken[j]


def test_a_larger_budget_extends_the_same_path_and_widens_no_interval(prior, candidates):
    paths = [path(prior, candidates, until=until, most=200) for until in (30.0, 60.0, 120.0)]
    for short, long in itertools.pairwise(paths):
        assert len(short) < len(long) and (long[: len(short)] == short).all()
        assert (
            half_widths(prior, candidates, long, 0.9)[0]
            < half_widths(prior, candidates, short, 0.9)[0]
        ).all()


def test_no_run_widens_anything(prior, candidates):
    """Information grows in the Loewner order with every run, so each variance falls."""
    rng = np.random.default_rng(3)
    chosen = rng.permutation(len(candidates.cost))[:30]
    whole = information(prior, candidates, chosen, prior.test_draws).sum(1)
    for left in range(0, 30, 5):
        less = information(prior, candidates, np.delete(chosen, left), prior.test_draws).sum(1)
        assert (
            np.linalg.eigvalsh(whole - less).min(1) > -1e-9 * np.linalg.eigvalsh(whole).max(1)
        ).all()


def test_the_path_beats_random_designs_and_a_full_grid_of_the_same_cost(prior, candidates):
    until = 60.0
    chosen = path(prior, candidates, until=until, most=200)
    best = criterion(prior, candidates, chosen)
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(candidates.cost))
        assert (
            criterion(prior, candidates, order[np.cumsum(candidates.cost[order]) <= until]) > best
        )
    lowest = np.flatnonzero(
        (candidates.runs.d < -0.5) & (candidates.runs.n < 1)
    )  # 2 sizes x 2 horizons x 5 lr x 3 batches
    assert criterion(prior, candidates, lowest[np.cumsum(candidates.cost[lowest]) <= until]) > best


def test_the_core_has_three_sizes_and_three_horizons_at_the_lowest_cost(candidates):
    chosen = core(candidates)
    cells = {
        (float(n), float(d))
        for n, d in zip(candidates.runs.n[chosen], candidates.runs.d[chosen], strict=True)
    }
    assert (
        cells == {(-1.4, -1.4), (0.0, -1.4), (1.4, -1.4), (-1.4, -0.7), (-1.4, 0.0)}
        and len(chosen) == 25
    )


def test_without_a_cell_is_the_design_of_the_others(prior, candidates):
    chosen = path(prior, candidates, until=60.0, most=40)
    cells = np.unique(candidates.runs.cell[chosen])
    _, without = half_widths(prior, candidates, chosen, 0.9)
    others = chosen[candidates.runs.cell[chosen] != cells[2]]
    assert without[2] == pytest.approx(half_widths(prior, candidates, others, 0.9)[0], rel=1e-6)


def test_more_seeds_are_more_information_of_the_same_points(prior):
    one, three = grid(prior), grid(prior, seeds=3)
    chosen = core(one)
    assert (
        half_widths(prior, three, chosen, 0.9)[0] < half_widths(prior, one, chosen, 0.9)[0]
    ).all()


# simulated studies


def simulate(prior, candidates, chosen, seed):
    """The errors of a fit of simulated runs: ln lr, ln batch and ln loss at the target."""
    rng = np.random.default_rng(seed)
    theta = prior.mean + prior.root @ rng.standard_normal(len(prior.mean))
    runs = candidates.runs.select(chosen)
    delta = prior.scales.scatter * rng.standard_normal((runs.n_cells, 3))
    value, _, _, tall = ln_loss(theta, delta, runs)
    y = value + np.hypot(prior.scales.noise, prior.scales.misfit * tall) * rng.standard_t(
        STUDENT, len(value)
    )
    table = pd.DataFrame(
        {"n_params": np.exp(runs.n + CENTRE[0]), "tokens": np.exp(runs.d + CENTRE[1])}
    )
    table = table.assign(lr=np.exp(runs.x[:, 0]), batch_tokens=np.exp(runs.x[:, 1]), loss=np.exp(y))
    n, d = candidates.target
    said = fit_joint(table).predict(
        n_params=math.exp(n + CENTRE[0]), tokens=math.exp(d + CENTRE[1])
    )
    at = SurfaceRuns(np.array([n]), np.array([d]), np.zeros((1, 2)), np.zeros(1), np.zeros(1, int))
    x = theta[:6].reshape(2, 3) @ np.array([1.0, n, d - n])
    floor = ln_loss(theta, np.zeros((1, 3)), replace(at, x=x[None]))[0][0]
    truth = np.append(x, floor) + prior.scales.scatter * rng.standard_normal(3)
    return np.log([said.lr, said.batch_tokens, said.loss]) - truth


def fit_joint(table):
    """`fit` without cells held out, which a hundred studies need not have."""
    from scaletune.fitting.joint.fit import fit_joint as fitted
    from scaletune.fitting.table import tabulate

    return fitted(tabulate(table, ["n_params", "tokens", "batch_tokens", "lr", "loss"]), [], 0.9)


def test_errors_at_the_target_are_as_large_as_the_plan_expects(prior, candidates):
    chosen = path(prior, candidates, until=60.0, most=200)
    errors = np.array([simulate(prior, candidates, chosen, seed) for seed in range(1, 31)])
    half = half_widths(prior, candidates, chosen, 0.9)[0]
    assert (
        (np.abs(errors) <= half).mean(0) >= 0.73
    ).all()  # of 0.9: 30 studies of a plan that is right fall below with the chance 0.01
    assert (
        (np.abs(errors) <= half / 3).mean(0) <= 0.7
    ).all()  # 0.42 of a normal: not because it promises little


# horizons that share a trunk


def test_prices_are_those_of_the_longest_trunk_and_the_cooldowns(candidates):
    """T, 2T, 4T with a cooldown of 0.3, in any order: 4T + 0.3 (T + 2T); trials share no trunk."""
    cost = np.array([1.0, 2.0, 4.0, 4.0])
    shared = replace(candidates, cost=cost, trunk=np.array([0, 0, 0, 1]), stable=0.7 * cost)
    for order in itertools.permutations(range(3)):
        assert added(shared, np.array(order)).sum() == pytest.approx(4 + 0.3 * 3)
    assert added(shared, np.array([2, 0, 3, 1])) == pytest.approx([4, 0.3, 4, 0.6])
    assert added(replace(shared, trunk=None), np.arange(4)).sum() == 11


def test_shared_trunks_leave_the_budget_more_runs(target, planned):
    apart = planning.plan(with_settings(load(target), {"engine.branch": False}), "5%")
    assert (
        len(planned.runs) > len(apart.runs)
        and planned.total["flops_apart"] > planned.total["flops"] <= planned.budget["amount"]
    )
    assert (
        apart.total["flops"] == pytest.approx(apart.total["flops_apart"])
        and apart.warmup_tokens is None
    )
    cosine = planning.plan(with_settings(load(target), {"schedule.kind": "cosine"}), "5%")
    assert (
        cosine.total["flops"] == pytest.approx(cosine.total["flops_apart"])
        and cosine.warmup_tokens is None
    )


def test_planned_proxies_have_one_warmup_that_leaves_each_a_stable_phase(target):
    """0.1 of the geometric mean of 8192 and 2**19, at most half the shortest stable phase."""
    wsd = load(target)
    assert possible.warmup_tokens(wsd, 8192, 2**19) == min(
        round(0.1 * 2**16), round(0.7 * 8192 / 2)
    )
    assert possible.warmup_tokens(wsd, 2**16, 2**17) == round(0.1 * 2**16.5)
    for settings in (
        {"schedule.kind": "cosine"},
        {"engine.branch": False},
        {"schedule.warmup": 0.0},
    ):
        assert possible.warmup_tokens(with_settings(wsd, settings), 8192, 2**19) is None


# the prior


def test_a_fit_moved_to_another_centre_is_the_same_surface():
    rng, own = np.random.default_rng(0), parameter_names(2)
    theta, shift = rng.normal(size=len(own)) * 0.3, (0.7, -0.4)
    x, moved = rng.normal(size=(9, 2)), planning_prior._recentre(*shift)
    one, cell = np.ones(9), np.zeros(9, int)
    there = ln_loss(
        theta,
        np.zeros((1, 3)),
        SurfaceRuns((0.2 + shift[0]) * one, (0.5 + shift[1]) * one, x, one, cell),
    )
    here = ln_loss(moved @ theta, np.zeros((1, 3)), SurfaceRuns(0.2 * one, 0.5 * one, x, one, cell))
    assert here[0] == pytest.approx(there[0]) and here[3] == pytest.approx(there[3])


def test_an_earlier_joint_fit_narrows_where_to_look_and_gives_its_noise():
    from test_fitting_surface import optimal, study

    made = fit_joint(study(noise=1e-3))
    middle = made.solution["centre"]
    prior = from_joint(made, (middle[0] + 0.5, middle[1] - 0.3))
    n_params, tokens = math.exp(middle[0]), math.exp(middle[1])
    assert np.exp(prior.optimum(n_params, tokens)) == pytest.approx(
        [optimal("lr", n_params, tokens), optimal("batch", n_params, tokens)], rel=0.12
    )
    assert prior.draws[:, 0].std() < 0.2 and prior.scales.noise == made.solution["noise"]
    assert planning_prior.scales_of(0.01, made.solution).noise == 0.01


def test_an_lr_written_in_the_target_goes_before_step_law_which_is_asked_near_its_own_scales(tiny):
    at = {"n_params": 3e8, "tokens": 1e10, "width": 1024}
    plain = validate_recipe(
        {name: value for name, value in tiny().model_dump().items() if name != "optimizer"}, "plain"
    )
    (lr, batch), _, said = planning_prior.first_guess(plain, **at)
    law = 1.79 * 3e8**-0.713 * 1e10**0.307, 0.58 * 1e10**0.571  # arXiv:2503.04715, eq. 1
    assert math.exp(lr) == pytest.approx(
        law[0] * 1024 / 32, rel=1e-2
    )  # muP, base width 32: hidden matrices train at lr * 32 / width
    assert math.exp(batch) == pytest.approx(law[1], rel=1e-2) and "Step Law" in said
    assert math.exp(planning_prior.first_guess(tiny(), **at)[0][0]) == pytest.approx(5e-3)
    assert math.exp(planning_prior.first_guess(plain, 3e4, 1e5, 32)[0][0]) == pytest.approx(1e-2)


# a target and a budget


def test_cells_lie_below_the_target_and_within_the_budget(planned, target):
    whole = scaletune.count(load(target))["flops"]
    assert (
        0.5 * 0.05 * whole
        < planned.total["flops"]
        <= 0.05 * whole
        == pytest.approx(planned.budget["amount"])
    )
    assert (planned.runs["width"] <= 128).all() and (planned.runs["tokens"] <= 524288 / 2).all()
    assert planned.runs["width"].nunique() >= 3 and planned.runs["tokens"].nunique() >= 3
    assert (planned.runs["tokens"] % planned.runs["batch_tokens"] == 0).all() and (
        planned.runs["batch_tokens"] % 32 == 0
    ).all()
    assert (planned.runs["tokens"] / planned.runs["batch_tokens"] >= possible.LEAST_STEPS).all()


def test_dropping_a_cell_widens_and_doubling_the_budget_narrows(planned):
    for cell in planned.cells:
        assert min(cell["without"].values()) >= 1
    assert all(planned.doubled[name] < planned.expected[name] for name in planning.QUANTITIES)


def test_the_totals_of_a_plan_add_up(planned):
    said = json.loads(json.dumps(planned.to_dict(), allow_nan=False))
    assert sum(cell["runs"] for cell in said["cells"]) == said["total"]["runs"] == len(planned.runs)
    assert sum(cell["flops"] for cell in said["cells"]) == pytest.approx(said["total"]["flops"])
    assert said["expected"]["lr"]["factor"] == pytest.approx(math.exp(planned.expected["lr"]))


def test_a_higher_level_widens_every_interval(target, planned):
    lower = planning.plan(target, "5%", level=0.8)
    assert all(lower.expected[name] < planned.expected[name] for name in planning.QUANTITIES)


def test_noise_and_rate_are_read(target, planned):
    noisy = planning.plan(target, "5%", noise=0.02)
    assert all(noisy.expected[name] > planned.expected[name] for name in planning.QUANTITIES)
    fast, slow = (
        planning.plan(target, "1min", flops_per_second=rate).total["flops"] for rate in (6e11, 6e9)
    )
    assert fast > slow


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("5%", (0.05, "share")),
        ("1e18", (1e18, "flops")),
        ("2h", (7200, "seconds")),
        (" 1.5 h", (5400, "seconds")),
        ("3e2 s", (300, "seconds")),
    ],
)
def test_budgets(budget, expected):
    assert planning.parse_budget(budget) == (pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize(
    "budget", ["", "much", "-5%", "0", "nan", "5 parsec", "1e", "1.2.3", "%", "inf", "5%%"]
)
def test_other_budgets_are_refused_in_a_sentence(budget):
    with pytest.raises(UserError, match="a budget must be"):
        planning.parse_budget(budget)


@pytest.mark.parametrize("budget", ["5", "0.05", 5, "999999"])
def test_a_budget_without_its_unit_is_refused(budget):
    """5 is 5 FLOPs, less than one step: the user means 5%."""
    with pytest.raises(UserError, match=f"`{budget}%` for a share"):
        planning.parse_budget(budget)


def test_a_budget_too_small_names_the_smallest_possible_one(target):
    with pytest.raises(UserError, match=r"the smallest study .* costs [0-9.e+]+ FLOPs") as caught:
        planning.plan(target, "1e8")
    least = float(re.search(r"costs ([0-9.e+]+) FLOPs", str(caught.value))[1])
    assert planning.plan(target, f"{1.01 * least:.6g}").total["flops"] <= 1.01 * least
    with pytest.raises(UserError, match=r"costs [0-9.e-]+h, but the budget is"):
        planning.plan(target, "0.01s")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"width": 64},
            r"room for 3 proxy widths of at most half its own, in multiples of 16, but got"
            r" width=64, which has only 16, 32",
        ),
        ({"optimizer": {"family": "prodigy", "lr": 1.0}}, "'prodigy' has none to tune"),
        ({"tokens": 2048}, r"at least 32 steps of three batch sizes .* tokens=2048"),
    ],
)
def test_a_target_that_cannot_be_planned_for_is_refused(target, settings, message):
    with pytest.raises(UserError, match=message):
        planning.plan(with_settings(load(target), settings))


@pytest.mark.parametrize(
    "wrong",
    [{"level": 1.0}, {"seeds": 0}, {"noise": -1.0}, {"noise": math.nan}, {"flops_per_second": 0.0}],
)
def test_wrong_options_are_refused(target, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        planning.plan(target, **wrong)


def test_a_fit_of_another_law_is_no_plan(target):
    from test_fitting import study

    with pytest.raises(UserError, match="needs a fit of law 'joint', but got one of 'lr_nd'"):
        planning.plan(target, fit=fit(study()))


def test_a_depth_rule_takes_proxies_of_its_base_depth(target):
    deep = {"model.depth": 4, "parametrization.base_depth": 2}
    assert set(planning.plan(with_settings(load(target), deep)).runs["depth"]) == {4}
    assert set(
        planning.plan(
            with_settings(load(target), deep | {"parametrization.depth_alpha": 1.0})
        ).runs["depth"]
    ) == {2}


def test_vision_targets_are_planned_too(tiny):
    model = {
        "family": "resnet",
        "width": 128,
        "groups": 8,
        "image_size": 8,
        "channels": 1,
        "depth": 1,
        "stages": 2,
    }
    content = {
        "model": model,
        "parametrization": {"base_width": 16},
        "data": {"source": "digits", "seq_len": 1},
    }
    made = planning.plan(
        validate_recipe(content | {"budget": {"tokens": 2_000_000, "batch_tokens": 64}}, "digits"),
        "10%",
        vocab_size=10,
    )
    assert (made.runs["width"] % 8 == 0).all() and made.runs["width"].nunique() >= 3


# the study


@pytest.fixture
def written(target, tmp_path, capsys):
    """A plan written to another folder by the command."""
    out = tmp_path / "studies" / "study.toml"
    assert (
        main(["plan", str(target), "--budget", "5%", "--seeds", "2", "--out", str(out), "--json"])
        == 0
    )
    return out, json.loads(capsys.readouterr().out)


def _ends(wanted):
    horizons = [tokens for _, tokens, *_ in wanted]
    return min(horizons), max(horizons)


def test_the_written_study_holds_the_planned_runs_and_nothing_else(written, capsys):
    path, said = written
    study = load(path)
    trained = points(study)
    wanted = {
        (cell["width"], cell["tokens"], each["batch_tokens"], lr, seed)
        for cell in said["cells"]
        for each in cell["settings"]
        for lr in each["lr"]
        for seed in (0, 1)
    }
    got = [
        (p.model.width, p.budget.tokens, p.budget.batch_tokens, p.optimizer.lr, p.seed)
        for p in trained
    ]
    assert len(got) == said["total"]["runs"] and set(got) == wanted
    assert {p.schedule.warmup_tokens for p in trained} == {
        possible.warmup_tokens(load(path.parent / study.target), *_ends(wanted))
    }
    assert study.fit.law == "joint" and load(path.parent / study.target).model.width == 256
    assert main(["count", str(path), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)["total"]
    assert counted["flops"] == pytest.approx(said["total"]["flops_apart"])
    assert counted["branched"]["flops"] == pytest.approx(said["total"]["flops"])
    assert counted["branched"]["flops"] < 0.95 * counted["flops"]


def test_a_written_study_is_swept(target, tmp_path, monkeypatch):
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", InProcess)
    out = tmp_path / "study.toml"
    assert main(["plan", str(target), "--budget", "5%", "--out", str(out)]) == 0
    study = load(out)
    some = study.model_copy(
        update={"cells": [cell for cell in study.cells if cell["tokens"] <= 4096][:1]}
    )
    trials = sweeping.sweep(some, out=tmp_path)
    assert (
        len(trials) == sum(len(cell["lr"]) for cell in some.cells)
        and np.isfinite(trials["loss"]).all()
    )


def test_the_text_has_the_settings_the_intervals_and_those_of_twice_the_budget(target, capsys):
    assert main(["plan", str(target), "--budget", "5%"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Target: 656k parameters (non-embedding), 524k tokens\n")
    assert re.search(
        r"Expected 95 % intervals at the target: lr within a factor of [0-9.]+, batch size within a"
        r" factor of [0-9.]+, loss within [0-9.]+ %\n"
        r"With twice the budget \([0-9]+ runs\): lr within",
        text,
    )
    assert re.search(
        r"[0-9]+ runs branch off the trunk of a longer run: without that the study would cost"
        r" \S+ FLOPs \([0-9]+ % saved\)",
        text,
    )
    assert "Assumption: the law holds from the smallest proxy to the target" in text


# ragged sweeps


def test_cells_are_each_taken_under_every_combination_of_the_axes(tiny):
    ragged = tiny(
        cells=[
            {"width": 32, "lr": [0.1, 0.2]},
            {"model.width": 64, "tokens": 1e3 * 1.024, "lr": 0.3},
        ],
        axes={"seed": [0, 1]},
    )
    got = [(p.model.width, p.budget.tokens, p.optimizer.lr, p.seed) for p in points(ragged)]
    assert got == [
        *((32, 2048, lr, seed) for lr in (0.1, 0.2) for seed in (0, 1)),
        *((64, 1024, 0.3, seed) for seed in (0, 1)),
    ]
    assert all(not p.cells and not p.axes for p in points(ragged))
    same = points(tiny(width=64, lr=0.3, tokens=1024))[0]
    assert recipe.trial_id(points(ragged)[-2], "data") == recipe.trial_id(same, "data")


@pytest.mark.parametrize(
    ("cells", "axes", "message"),
    [
        (
            [{"lr": 0.1}],
            {"optimizer.lr": [0.2]},
            "`lr` must be set by `axes` or by a cell, but got both",
        ),
        ([{"lr": []}], {}, r"a setting of a cell must have a value, but got lr=\[\]"),
        ([{"wdith": 64}], {}, "unknown setting `wdith` .*'width'"),
        ([{"width": 65}], {}, "width % head_dim"),
    ],
)
def test_wrong_cells_are_refused(tiny, cells, axes, message):
    with pytest.raises(UserError, match=message):
        points(tiny(cells=cells, axes=axes))
