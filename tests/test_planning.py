"""Plans against dense algebra, random designs of the same cost, studies made up from a known surface, and a sweep of one that was written."""

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_sweeping import InProcess

from scaletune import counting, planning, recipe, sweeping
from scaletune.cli import main
from scaletune.errors import UserError
from scaletune.fitting import fit
from scaletune.fitting.joint.surface import (
    STUDENT,
    Runs,
    expected_information,
    expected_weight,
    model,
    names,
)
from scaletune.planning import candidates as possible
from scaletune.planning import optimal_design
from scaletune.planning import prior as believing
from scaletune.planning.cost import Candidates, added
from scaletune.planning.optimal_design import core, criterion, half_widths, information, path
from scaletune.planning.prior import from_joint, from_priors
from scaletune.recipe import load, points, validated, with_settings

CENTRE, AT = (17.0, 20.0), (math.log(2e-3), math.log(1e5))
TARGET = """
data = {{ source = "{words}", seq_len = 32, epochs = 20 }}
model = {{ width = 256, depth = 1, head_dim = 16, ffn_ratio = 2.0 }}
parametrization = {{ base_width = 32, init_std = 0.05 }}
optimizer = {{ lr = 0.01 }}
budget = {{ tokens = 524288, batch_tokens = 512, eval_tokens = 512 }}
"""


def believed(seed=0, sds=(0.5, 0.5)):
    return from_priors(CENTRE, AT, sds, "", seed=seed)


def grid(belief, sizes=(-1.4, 0.0, 1.4), horizons=(-1.4, -0.7, 0.0, 0.7), seeds=1):
    """Candidates about the believed optimum: every (size, horizon), 5 lr, 3 batches; the target is two e-folds of size beyond."""
    rows, cell = [], 0
    for n in sizes:
        for d in horizons:
            lr, batch = belief.optimum(math.exp(n + CENTRE[0]), math.exp(d + CENTRE[1]))
            rows += [
                (n, d, lr + u, batch + v, cell)
                for u in np.log([0.25, 0.5, 1, 2, 4])
                for v in np.log([0.25, 1, 4])
            ]
            cell += 1
    n, d, lr, batch, cells = np.array(rows).T
    runs = Runs(n, d, np.column_stack([lr, batch]), np.zeros(len(n)), cells.astype(int))
    return Candidates(runs, seeds * np.exp(n + d), (3.4, 2.0), seeds)


@pytest.fixture(scope="module")
def belief():
    return believed()


@pytest.fixture(scope="module")
def found(belief):
    return grid(belief)


@pytest.fixture(scope="module")
def target(words, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "target.toml"
    path.write_text(TARGET.format(words=words))
    return path


@pytest.fixture(scope="module")
def planned(target):
    return planning.plan(target, "5%")


# information


def test_the_information_of_cells_is_that_of_the_dense_matrix_with_their_deviations(belief, found):
    theta, scales, runs = (
        belief.draws[0],
        belief.scales,
        optimal_design.part(found.runs, np.arange(0, len(found.cost), 7)),
    )
    _, to_theta, to_delta, tall = model(theta, np.zeros((runs.n_cells, 3)), runs)
    n_theta = len(theta)
    jacobian = np.zeros((len(runs.n), n_theta + 3 * runs.n_cells))
    jacobian[:, :n_theta] = to_theta
    for row, cell in enumerate(runs.cell):
        jacobian[row, n_theta + 3 * cell : n_theta + 3 * cell + 3] = to_delta[row]
    before = np.concatenate([belief.given[:, 1], np.tile(scales.scatter, runs.n_cells)]) ** -2.0
    dense = np.linalg.inv(
        jacobian.T @ (jacobian * expected_weight(tall, scales)[:, None]) + np.diag(before)
    )[:n_theta, :n_theta]
    told = expected_information(runs, theta, scales, np.ones(len(runs.n))).sum(0)
    assert np.linalg.inv(told + np.diag(belief.given[:, 1] ** -2.0)) == pytest.approx(
        dense, rel=1e-6, abs=1e-10
    )


def test_expected_weight_is_the_information_of_a_students_location():
    t, scale = np.linspace(-400, 400, 800_001), 0.02
    density = (1 + (t / scale) ** 2 / STUDENT) ** (-(STUDENT + 1) / 2)
    score = (STUDENT + 1) * t / (STUDENT * scale**2 + t**2)
    numeric = (score**2 * density).sum() / density.sum()
    scales = believed().scales._replace(noise=scale)
    assert expected_weight(np.zeros(1), scales)[0] == pytest.approx(numeric, rel=1e-3)


def test_slopes_of_the_target_are_those_of_finite_differences(belief, found):
    theta, h = belief.draws[1], 1e-6

    def at(vector):
        n, d = np.array([found.target[0]]), np.array([found.target[1]])
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
    assert optimal_design.target_slopes(belief, found.target, theta) == pytest.approx(
        numeric, abs=1e-7
    )


def test_weights_are_half_the_curvature_of_the_loss_at_the_target(belief, found):
    theta, h = belief.draws[2], 1e-3

    def ln_loss(u, v):
        n, d = np.array([found.target[0]]), np.array([found.target[1]])
        x = theta[:6].reshape(2, 3) @ np.array([1.0, n[0], d[0] - n[0]]) + [u, v]
        return float(model(theta, np.zeros((1, 3)), Runs(n, d, x[None], n, np.zeros(1, int)))[0][0])

    weights = optimal_design.weights_of(belief, found.target, theta)
    for i, (u, v) in enumerate(((h, 0), (0, h))):
        assert weights[i, i] == pytest.approx(
            (ln_loss(u, v) + ln_loss(-u, -v) - 2 * ln_loss(0, 0)) / (2 * h * h), rel=1e-3
        )
    mixed = (ln_loss(h, h) - ln_loss(h, -h) - ln_loss(-h, h) + ln_loss(-h, -h)) / (8 * h * h)
    assert weights[0, 1] == pytest.approx(mixed, rel=1e-3)


# the design


def test_runs_taken_one_by_one_are_worth_what_the_whole_is(belief, found):
    """The path's own bookkeeping, a pivoted Cholesky factor, against the covariance computed afresh from surface.py's blocks."""
    chosen = path(belief, found, until=60.0, most=40)
    state = optimal_design._State(belief, found, 60)
    for i in chosen:
        state.take(int(i))
    j = int(np.argmax(state.gains()))
    before, after = (criterion(belief, found, np.array(c, int)) for c in (chosen, [*chosen, j]))
    assert before - after == pytest.approx(state.gains()[j], rel=1e-5)


def test_a_larger_budget_goes_further_on_the_same_path_and_widens_no_interval(belief, found):
    paths = [path(belief, found, until=until, most=200) for until in (30.0, 60.0, 120.0)]
    for short, long in itertools.pairwise(paths):
        assert len(short) < len(long) and (long[: len(short)] == short).all()
        assert (
            half_widths(belief, found, long, 0.9)[0] < half_widths(belief, found, short, 0.9)[0]
        ).all()


def test_no_run_widens_anything(belief, found):
    """Information grows in the Loewner order with every run, so each variance falls, whatever the run."""
    rng = np.random.default_rng(3)
    chosen = rng.permutation(len(found.cost))[:30]
    whole = information(belief, found, chosen, belief.judges).sum(1)
    for left in range(0, 30, 5):
        less = information(belief, found, np.delete(chosen, left), belief.judges).sum(1)
        assert (
            np.linalg.eigvalsh(whole - less).min(1) > -1e-9 * np.linalg.eigvalsh(whole).max(1)
        ).all()


def test_the_path_beats_random_designs_and_a_full_grid_of_the_same_cost(belief, found):
    until = 60.0
    chosen = path(belief, found, until=until, most=200)
    best = criterion(belief, found, chosen)
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(found.cost))
        assert criterion(belief, found, order[np.cumsum(found.cost[order]) <= until]) > best
    lowest = np.flatnonzero(
        (found.runs.d < -0.5) & (found.runs.n < 1)
    )  # 2 sizes x 2 horizons x 5 lr x 3 batches
    assert criterion(belief, found, lowest[np.cumsum(found.cost[lowest]) <= until]) > best


def test_the_core_has_three_sizes_and_three_horizons_at_the_lowest_cost(found):
    chosen = core(found)
    cells = {
        (float(n), float(d))
        for n, d in zip(found.runs.n[chosen], found.runs.d[chosen], strict=True)
    }
    assert (
        cells == {(-1.4, -1.4), (0.0, -1.4), (1.4, -1.4), (-1.4, -0.7), (-1.4, 0.0)}
        and len(chosen) == 25
    )


def test_without_a_cell_is_the_design_of_the_others(belief, found):
    chosen = path(belief, found, until=60.0, most=40)
    cells = np.unique(found.runs.cell[chosen])
    _, without = half_widths(belief, found, chosen, 0.9)
    others = chosen[found.runs.cell[chosen] != cells[2]]
    assert without[2] == pytest.approx(half_widths(belief, found, others, 0.9)[0], rel=1e-6)


def test_more_seeds_are_more_information_of_the_same_points(belief):
    one, three = grid(belief), grid(belief, seeds=3)
    chosen = core(one)
    assert (
        half_widths(belief, three, chosen, 0.9)[0] < half_widths(belief, one, chosen, 0.9)[0]
    ).all()


# studies made up


def made_up(belief, found, chosen, seed):
    """A surface of the belief's prior, its runs fitted: (error, expected half width) of ln lr, ln batch, ln loss at the target."""
    rng = np.random.default_rng(seed)
    theta = belief.guess + belief.root @ rng.standard_normal(len(belief.guess))
    runs = optimal_design.part(found.runs, chosen)
    delta = belief.scales.scatter * rng.standard_normal((runs.n_cells, 3))
    value, _, _, tall = model(theta, delta, runs)
    y = value + np.hypot(belief.scales.noise, belief.scales.misfit * tall) * rng.standard_t(
        STUDENT, len(value)
    )
    table = pd.DataFrame(
        {"n_params": np.exp(runs.n + CENTRE[0]), "tokens": np.exp(runs.d + CENTRE[1])}
    )
    table = table.assign(lr=np.exp(runs.x[:, 0]), batch_tokens=np.exp(runs.x[:, 1]), loss=np.exp(y))
    n, d = found.target
    said = fit_joint(table).predict(
        n_params=math.exp(n + CENTRE[0]), tokens=math.exp(d + CENTRE[1])
    )
    at = Runs(np.array([n]), np.array([d]), np.zeros((1, 2)), np.zeros(1), np.zeros(1, int))
    x = theta[:6].reshape(2, 3) @ np.array([1.0, n, d - n])
    floor = model(theta, np.zeros((1, 3)), replace(at, x=x[None]))[0][0]
    truth = np.append(x, floor) + belief.scales.scatter * rng.standard_normal(3)
    return np.log([said.lr, said.batch_tokens, said.loss]) - truth


def fit_joint(table):
    """`fit` without cells held out, which a hundred studies need not have."""
    from scaletune.fitting.joint.fit import fit_joint as fitted
    from scaletune.fitting.table import tabulate

    return fitted(tabulate(table, ["n_params", "tokens", "batch_tokens", "lr", "loss"]), [], 0.9)


def test_errors_at_the_target_are_as_large_as_the_plan_expects(belief, found):
    chosen = path(belief, found, until=60.0, most=200)
    errors = np.array([made_up(belief, found, chosen, seed) for seed in range(1, 31)])
    half = half_widths(belief, found, chosen, 0.9)[0]
    assert (
        (np.abs(errors) <= half).mean(0) >= 0.73
    ).all()  # of 0.9: 30 studies of a plan that is right fall below with the chance 0.01
    assert (
        (np.abs(errors) <= half / 3).mean(0) <= 0.7
    ).all()  # 0.42 of a normal: not because it promises little


# horizons that share a trunk


def test_prices_are_those_of_the_longest_trunk_and_the_cooldowns(found):
    """T, 2T, 4T with a cooldown of 0.3, in any order: 4T + 0.3 (T + 2T); another trial's trunk is no one else's."""
    cost = np.array([1.0, 2.0, 4.0, 4.0])
    shared = replace(found, cost=cost, trunk=np.array([0, 0, 0, 1]), stable=0.7 * cost)
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
    """0.1 of the geometric middle of 8192 and 2**19, and at most half of what 0.3 of decay leaves the shortest."""
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


# what is believed


def test_a_fit_moved_to_another_centre_is_the_same_surface():
    rng, own = np.random.default_rng(0), names(2)
    theta, shift = rng.normal(size=len(own)) * 0.3, (0.7, -0.4)
    x, moved = rng.normal(size=(9, 2)), believing._moved(*shift)
    one, cell = np.ones(9), np.zeros(9, int)
    there = model(
        theta, np.zeros((1, 3)), Runs((0.2 + shift[0]) * one, (0.5 + shift[1]) * one, x, one, cell)
    )
    here = model(moved @ theta, np.zeros((1, 3)), Runs(0.2 * one, 0.5 * one, x, one, cell))
    assert here[0] == pytest.approx(there[0]) and here[3] == pytest.approx(there[3])


def test_an_earlier_joint_fit_narrows_where_to_look_and_gives_its_noise():
    from test_fitting_surface import optimal, study

    made = fit_joint(study(noise=1e-3))
    middle = made.solution["centre"]
    belief = from_joint(made, (middle[0] + 0.5, middle[1] - 0.3))
    n_params, tokens = math.exp(middle[0]), math.exp(middle[1])
    assert np.exp(belief.optimum(n_params, tokens)) == pytest.approx(
        [optimal("lr", n_params, tokens), optimal("batch", n_params, tokens)], rel=0.12
    )
    assert belief.draws[:, 0].std() < 0.2 and belief.scales.noise == made.solution["noise"]
    assert believing.scales_of(0.01, made.solution).noise == 0.01


def test_an_lr_written_in_the_target_goes_before_step_law_which_is_asked_near_its_own_scales(tiny):
    at = {"n_params": 3e8, "tokens": 1e10, "width": 1024}
    plain = validated(
        {name: value for name, value in tiny().model_dump().items() if name != "optimizer"}, "plain"
    )
    (lr, batch), _, said = believing.first_guess(plain, **at)
    law = 1.79 * 3e8**-0.713 * 1e10**0.307, 0.58 * 1e10**0.571  # arXiv:2503.04715, eq. 1
    assert math.exp(lr) == pytest.approx(
        law[0] * 1024 / 32, rel=1e-2
    )  # muP, base width 32: hidden matrices train at lr * 32 / width
    assert math.exp(batch) == pytest.approx(law[1], rel=1e-2) and "Step Law" in said
    assert math.exp(believing.first_guess(tiny(), **at)[0][0]) == pytest.approx(5e-3)
    assert math.exp(believing.first_guess(plain, 3e4, 1e5, 32)[0][0]) == pytest.approx(1e-2)


# a target and a budget


def test_cells_lie_below_the_target_and_within_the_budget(planned, target):
    whole = counting.count(load(target))["flops"]
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


def test_what_a_plan_says_adds_up(planned):
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


def test_a_budget_too_small_is_told_the_smallest_that_is_not(target):
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
            r"room for 3 proxy widths of at most half its own, in multiples of 16, but got width=64, which has only 16, 32",
        ),
        ({"optimizer": {"family": "prodigy", "lr": 1.0}}, "'prodigy' finds its own"),
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

    with pytest.raises(UserError, match="rests on a fit of law 'joint', but got one of 'lr_nd'"):
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
        validated(content | {"budget": {"tokens": 2_000_000, "batch_tokens": 64}}, "digits"),
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
        for cell in said["cells"] for each in cell["settings"] for lr in each["lr"] for seed in (0, 1)
    }  # fmt: skip
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
    monkeypatch.setattr("scaletune.sweeping.engines.local.Pool", InProcess)
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


def test_lines_tell_the_table_the_interval_and_what_twice_buys(target, capsys):
    assert main(["plan", str(target), "--budget", "5%"]) == 0
    said = capsys.readouterr().out
    assert (
        re.search(r"level 0.95: lr within x/÷ [0-9.]+, batch x/÷ [0-9.]+, loss ±[0-9.]+%", said)
        and "twice the budget" in said
    )
    assert re.search(
        r"[0-9]+ of them branch off the trunk of a longer horizon: each by itself they would be \S+ FLOPs \([0-9]+% saved\)",
        said,
    )


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
    assert recipe.identity(points(ragged)[-2], "data") == recipe.identity(same, "data")


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
