"""Searches in real sweeps.

A search finds planted basins in few trials. Neither a kill nor the number of workers changes which
trials it trains.
"""

import json
import math
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
from test_sweeping import Stub

from scaletune import cli, counting, data, sweeping
from scaletune import study as study_module
from scaletune.errors import UserError
from scaletune.fitting import fit
from scaletune.recipe import validate_recipe
from scaletune.records import Trial, read_jsonl
from scaletune.sweeping.search import loop
from scaletune.sweeping.search.joint_design import CellGrid, fit_surface, next_wave
from scaletune.sweeping.search.space import build_cells
from scaletune.transferring.formats.recipe import toml

LR = [2.0**-k for k in range(12, 3, -1)]


def planted(point, optimum=2.0**-8, curvature=0.03, tall=math.inf):
    """A basin whose best lr falls with width, its best batch is 512; above `tall` it diverges."""
    if point.optimizer.lr > tall:
        return math.nan
    dx = math.log(point.optimizer.lr / (optimum * (point.model.width / 32) ** -0.5))
    dy = math.log(point.budget.batch_tokens / 512)
    floor = 2.0 + 30 / point.model.width + 2000 / point.budget.tokens
    return floor * math.exp(curvature * dx**2 / 2 + 0.02 * dy**2 / 2)


class Planted(Stub):
    """A pool that computes planted losses, the last task first.

    After `dies_after` trials the driver is killed.
    """

    loss, trained, size, dies_after, fails = staticmethod(planted), [], 2, None, ()

    def __init__(self, size, *rest):
        self.tasks = []

    @property
    def busy(self):
        return bool(self.tasks)

    def hand_out(self, queue):
        while queue and len(self.tasks) < self.size:
            self.tasks.append(queue.pop(0))

    def messages(self):
        task = self.tasks.pop()
        if len(self.trained) == self.dies_after:
            raise KeyboardInterrupt
        if task.recipe.optimizer.lr in self.fails:
            return [(task, {"lost": "its worker died", "status": 1, "memory": False, "log": ""})]
        self.trained.append(task.id)
        corpus, loss = data.load(task.recipe.data), self.loss(task.recipe)
        known = counting.trial_fields(task.recipe, task.sweep, corpus.vocab_size, corpus.digest)
        over = (
            {"status": "diverged", "loss": None}
            if math.isnan(loss)
            else {"status": "done", "loss": loss}
        )
        return [
            (
                task,
                {
                    "trial": asdict(Trial(**known, **over, train_loss=None, seconds=0.0)),
                    "curve": [],
                },
            )
        ]

    last_words = "out of memory"


@pytest.fixture
def pool(monkeypatch):
    """Settings of the planted pool -> its class; all that it trains is in `trained`."""

    def made(**settings):
        one = type(
            "One",
            (Planted,),
            {"trained": []}
            | {k: staticmethod(v) if callable(v) else v for k, v in settings.items()},
        )
        monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", one)
        return one

    return made


@pytest.fixture
def asked(tiny):
    """settings of `search`, axes -> a recipe; lr and two widths unless said."""
    return lambda axes=None, **search: tiny(
        {"axes": axes or {"width": [32, 64], "lr": LR}, "search": search}
    )


def ids(record):
    return {trial.id for trial in read_jsonl(record)}


def test_a_planted_basin_is_found_in_few_trials(asked, pool, tmp_path, capsys):
    one = pool()
    table = sweeping.sweep(asked(kind="basin"), out=tmp_path)
    assert len(one.trained) == len(table) <= 12 < 2 * len(LR)
    best = table.loc[table.groupby("width")["loss"].idxmin()]
    assert best["lr"].tolist() == [2.0**-8, 2.0**-8] or best["lr"].tolist() == [
        2.0**-8,
        2.0**-9,
    ]  # of width 64 the optimum lies between
    assert "expected improvement below 0.03 % of the loss" in capsys.readouterr().err


def test_lr_and_batch_together(asked, pool, tmp_path):
    pool()
    table = sweeping.sweep(
        asked({"lr": LR, "batch_tokens": [128, 256, 512, 1024]}, kind="basin"), out=tmp_path
    )
    best = table.loc[table["loss"].idxmin()]
    assert len(table) <= 14 and (best["lr"], best["batch_tokens"]) == (2.0**-8, 512)


@pytest.mark.parametrize(
    "kind",
    [
        {"kind": "basin"},
        {"kind": "joint", "wave": 3},
        {"kind": "optuna", "budget": 6, "wave": 2},
        {"kind": "pareto", "budget": 9, "wave": 2},
    ],
)
def test_a_killed_drivers_rerun_trains_what_an_undisturbed_one_does(asked, pool, tmp_path, kind):
    pytest.importorskip({"optuna": "optuna", "pareto": "sklearn"}.get(kind["kind"], "numpy"))
    whole = pool()
    table = sweeping.sweep(asked(**kind), out=tmp_path / "whole")
    killed = pool(dies_after=3)
    with pytest.raises(KeyboardInterrupt):
        sweeping.sweep(asked(**kind), out=tmp_path / "killed")
    assert len(killed.trained) == 3
    rest = pool()
    again = sweeping.sweep(asked(**kind), out=tmp_path / "killed")
    assert again["id"].tolist() == table["id"].tolist()
    assert sorted(killed.trained + rest.trained) == sorted(whole.trained)
    nothing = pool()
    assert (
        sweeping.sweep(asked(**kind), out=tmp_path / "killed").equals(again) and not nothing.trained
    )


@pytest.mark.parametrize("kind", ["basin", "joint", "pareto"])
def test_the_number_of_workers_changes_nothing_and_no_point_is_trained_twice(
    asked, pool, tmp_path, kind
):
    pytest.importorskip("sklearn" if kind == "pareto" else "numpy")
    trained = []
    for size in (1, 5):
        one = pool(size=size)
        sweeping.sweep(
            asked(kind=kind, wave=4, **({"budget": 12} if kind == "pareto" else {})),
            out=tmp_path / str(size),
        )
        assert len(set(one.trained)) == len(one.trained)
        trained.append(sorted(one.trained))
    assert trained[0] == trained[1]
    assert (tmp_path / "1/sweeps/tiny.search.txt").read_text() == (
        tmp_path / "5/sweeps/tiny.search.txt"
    ).read_text()


def test_a_wave_spreads_out(asked, pool, tmp_path):
    """Points in training count with their expected loss, so the four points of a wave differ."""
    one = pool()
    table = sweeping.sweep(asked({"lr": LR}, kind="basin", wave=4, budget=8), out=tmp_path)
    assert len(one.trained) <= 8 and table.loc[table["loss"].idxmin(), "lr"] == 2.0**-8


@pytest.mark.parametrize(
    "kind", [{"kind": "basin"}, {"kind": "optuna", "budget": 6, "sampler": "tpe"}]
)
def test_a_range_grows_where_the_optimum_sits_on_its_end(asked, pool, tmp_path, capsys, kind):
    if kind["kind"] == "optuna":
        pytest.importorskip("optuna")
    pool()
    table = sweeping.sweep(
        asked({"lr": [2.0**-12, 2.0**-11, 2.0**-10, 2.0**-9]}, **kind), out=tmp_path
    )
    assert table.loc[table["loss"].idxmin(), "lr"] == 2.0**-8
    assert (
        "is the largest of its range; the range is extended to 0.00390625"
        in capsys.readouterr().err
    )
    assert (
        "the range is extended to 0.00390625" in (tmp_path / "sweeps/tiny.search.txt").read_text()
    )


def test_a_range_grows_no_further_than_said(asked, pool, tmp_path, capsys):
    pool()
    table = sweeping.sweep(
        asked({"lr": [2.0**-13, 2.0**-12, 2.0**-11]}, kind="basin", extend=1), out=tmp_path
    )
    assert table["lr"].max() == 2.0**-10
    assert "it was extended `search.extend = 1` times, the most allowed" in capsys.readouterr().err


def test_a_batch_that_does_not_divide_the_tokens_is_no_step(asked, pool, tmp_path, capsys):
    """2048 tokens in batches of 1024 grow to 2048; 4096 cannot be."""
    pool(
        loss=lambda point: (
            3.0
            * point.budget.batch_tokens**-0.05
            * planted(point.model_copy(update={"budget": ONE}))
        )
    )
    table = sweeping.sweep(
        asked({"lr": LR, "batch_tokens": [512, 1024]}, kind="basin", extend=3), out=tmp_path
    )
    assert table["batch_tokens"].max() == 2048
    assert (
        "the best `batch_tokens` so far, 2048, is the largest of its range;"
        " no larger value is valid" in capsys.readouterr().err
    )


ONE = validate_recipe(
    {
        "model": {"width": 32, "depth": 1, "head_dim": 16},
        "parametrization": {"base_width": 32},
        "budget": {"tokens": 2048, "batch_tokens": 512},
    },
    "one",
).budget


def test_diverged_trials_inform(asked, pool, tmp_path):
    pool(loss=lambda point: planted(point, tall=2.0**-7))
    table = sweeping.sweep(asked({"lr": LR}, kind="basin"), out=tmp_path)
    assert table.loc[table["loss"].idxmin(), "lr"] == 2.0**-8 and len(table) <= 7
    assert (table["status"] == "diverged").sum() <= 2


def test_a_failed_trial_stops_its_own_cell_alone_and_is_tried_again(asked, pool, tmp_path, capsys):
    whole = pool()
    table = sweeping.sweep(asked(kind="basin"), out=tmp_path / "whole")
    first = {trial.id: trial.lr for trial in read_jsonl(tmp_path / "whole/sweeps/tiny.jsonl")}[
        whole.trained[0]
    ]
    pool(fails=(first,))
    failed = sweeping.sweep(asked(kind="basin"), out=tmp_path / "failed")
    assert "failed, so its search stopped: the next run retries it" in capsys.readouterr().err
    assert (failed["status"] == "failed").any()
    pool()
    assert (
        sweeping.sweep(asked(kind="basin"), out=tmp_path / "failed")["id"].tolist()
        == table["id"].tolist()
    )


def test_what_is_on_record_is_not_trained_again(asked, pool, tmp_path):
    pool()
    sweeping.sweep(asked(), out=tmp_path)  # the grid
    one = pool()
    assert len(sweeping.sweep(asked(kind="basin"), out=tmp_path)) < 2 * len(LR) and not one.trained


def test_joint_places_most_points_in_cheap_cells_and_finds_the_law(asked, pool, tmp_path):
    one = pool()
    axes = {"width": [32, 64, 128], "tokens": [2048, 8192, 32768], "lr": LR}
    table = sweeping.sweep(asked(axes, kind="joint", noise=1e-3), out=tmp_path)
    assert len(one.trained) < 0.5 * 81
    spent = table["flops"].sum()
    full = sum(cell.flops * len(cell.points) for cell in build_cells(asked(axes, kind="joint")))
    assert spent < 0.25 * full
    by_cost = table.groupby("flops").size()
    assert by_cost.iloc[0] == by_cost.max()
    fitted = fit(table, "lr_nd")
    best = fitted.predict(n_params=float(table["n_params"].max()), tokens=32768)
    assert best.lr == pytest.approx(2.0**-8 * (128 / 32) ** -0.5, rel=0.25)


def test_joint_ends_when_no_run_of_a_single_cell_would_help(asked, pool, tmp_path, capsys):
    """The deviation of the cell from the law stays unknown: the excess stays above `noise`."""
    one = pool()
    axes = {"lr": LR, "batch_tokens": [128, 256, 512, 1024]}
    table = sweeping.sweep(asked(axes, kind="joint"), out=tmp_path)
    assert 3 <= len(one.trained) <= 18 < 36
    best = table.loc[table["loss"].idxmin()]
    assert (best["lr"], best["batch_tokens"]) == (2.0**-8, 512)
    text = capsys.readouterr().err
    assert f"search: trained {len(table)} of 36 points" in text
    assert "search: expected excess loss at" in text


def test_joint_extends_a_range_that_has_the_best_run_at_an_end(asked, pool, tmp_path, capsys):
    """Both ends: the run beyond is trained, whatever the indices of the longer grid."""
    for axis in ([2.0**-k for k in (12, 11, 10)], [2.0**-k for k in (6, 5, 4)]):
        pool()
        out = tmp_path / str(axis[0])
        table = sweeping.sweep(asked({"width": [32, 64], "lr": axis}, kind="joint"), out=out)
        beyond = max(axis) * 2 if max(axis) < 2.0**-8 else min(axis) / 2
        assert beyond in set(table["lr"])
        assert f"the range is extended to {beyond:g}" in capsys.readouterr().err


def test_joint_takes_diverged_runs_for_high_losses(asked, pool, tmp_path):
    axes = {"width": [32, 64, 128], "tokens": [2048, 8192], "lr": LR}
    one = pool(loss=lambda point: planted(point, tall=2.0**-7))
    table = sweeping.sweep(asked(axes, kind="joint", noise=1e-3), out=tmp_path)
    assert len(one.trained) < 0.6 * 54 and (table["status"] == "diverged").mean() < 0.4
    assert table.loc[table["loss"].idxmin(), "lr"] in (2.0**-8, 2.0**-9)
    nothing = pool(loss=lambda point: math.nan)
    table = sweeping.sweep(asked({"width": [32, 64], "lr": LR}, kind="joint"), out=tmp_path / "no")
    assert (table["status"] == "diverged").all() and len(nothing.trained) == 2 * len(LR)


def cell_grids(n_axes, n_cells=3):
    lr, batch = np.log(LR), np.log([128.0, 256.0, 512.0, 1024.0])
    grid = lr[:, None] if n_axes == 1 else np.array([(x, y) for x in lr for y in batch])
    scales = [(1e6 * 4**i, 2e7 * 4**i) for i in range(n_cells)]
    return [CellGrid(n, tokens, 6 * n * tokens, grid) for n, tokens in scales]


@pytest.mark.parametrize("n_axes", [1, 2])
def test_joint_opens_a_cell_with_enough_runs_and_counts_pending_ones(n_axes):
    cells = cell_grids(n_axes)
    wave = next_wave(cells, {}, (1e9, 2e10), 1)
    assert len(set(wave.runs)) == len(wave.runs) == n_axes + 2
    assert {cell for cell, _ in wave.runs} == {0}  # the cheapest one
    many = next_wave(cells, {}, (1e9, 2e10), 12)
    assert len(set(many.runs)) == len(many.runs) >= 12
    assert many.runs[: n_axes + 2] == wave.runs and len({cell for cell, _ in many.runs}) > 1


@pytest.mark.parametrize("n_axes", [1, 2])
def test_joint_expects_less_excess_loss_from_every_run(n_axes):
    """The optimum that the posterior predicts converges to the planted one."""
    cells, rng = cell_grids(n_axes), np.random.default_rng(0)

    def loss(cell, index):
        offset = cells[cell].grid[index] - np.log([2.0**-8, 512.0][:n_axes])
        ln_minimum = math.log(2 + cells[cell].n_params ** -0.3 * 50)
        return math.exp(ln_minimum + 0.01 * (offset**2).sum() + 1e-3 * rng.standard_normal())

    seen, expected = {}, []
    for _ in range(5):
        wave = next_wave(cells, seen, (1e9, 2e10), 4)
        expected.append(wave.excess)
        seen |= {run: loss(*run) for run in wave.runs}
    assert expected[-1] < 0.3 * expected[0] and wave.gain > 0
    law = fit_surface(cells, seen).law
    assert law.optimum(4e6, 8e7) == pytest.approx(np.log([2.0**-8, 512.0][:n_axes]), abs=0.3)


def test_a_search_is_no_part_of_a_trials_identity(asked):
    assert (
        sweeping.tasks("main", [asked()])[0].id
        == sweeping.tasks("main", [asked(kind="basin", seed=3)])[0].id
    )


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "qmc", "random"])
def test_samplers_of_optuna(asked, pool, tmp_path, sampler):
    pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    one = pool()
    axes = {"lr": LR, "batch_tokens": [128, 256, 512, 1024]}
    table = sweeping.sweep(
        asked(axes, kind="optuna", budget=12, sampler=sampler, wave=2), out=tmp_path
    )
    assert len(one.trained) == len(table) == 12
    order = np.array(
        [
            planted(cell.recipe(p))
            for cell in build_cells(asked(axes, kind="optuna", budget=12))
            for p in cell.points
        ]
    )
    assert (
        order < table["loss"].min()
    ).sum() <= 3  # twelve random ones of 36 would have one of the four best with probability 0.82


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_a_pruner_climbs_the_horizons_a_trial_each(asked, pool, tmp_path, pruner):
    pytest.importorskip("optuna")
    pool()
    axes = {"tokens": [2048, 4096, 8192], "lr": LR}
    search = {"kind": "optuna", "budget": 9, "sampler": "qmc", "pruner": pruner, "reduction": 2}
    table = sweeping.sweep(asked(axes, **search), out=tmp_path)
    many = table.groupby("tokens").size()
    assert many[2048] == 9 and many[2048] >= many[4096] >= many[8192] and many.sum() < 27
    climbed = table[table["tokens"] == 8192]["lr"]
    assert set(climbed) <= set(table[table["tokens"] == 4096]["lr"]) and 2.0**-8 in set(climbed)


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
@pytest.mark.parametrize("wave", [1, 4])
def test_pruners_are_incremental_in_the_largest_budget(asked, pool, tmp_path, pruner, wave):
    """A longer ladder of rungs keeps all trials of the shorter one and trains only its new rung."""
    pytest.importorskip("optuna")
    axes = {"lr": [2.0 ** (-k / 2) for k in range(24, 7, -1)], "batch_tokens": [256, 512, 1024]}
    search = {
        "kind": "optuna",
        "budget": 24,
        "sampler": "qmc",
        "pruner": pruner,
        "reduction": 2,
        "wave": wave,
    }
    pool()
    first = sweeping.sweep(asked({"tokens": [2048, 4096], **axes}, **search), out=tmp_path)
    more = pool()
    table = sweeping.sweep(asked({"tokens": [2048, 4096, 8192], **axes}, **search), out=tmp_path)
    new = table[table["tokens"] == 8192]
    assert set(table["id"]) - set(first["id"]) == set(new["id"]) == set(more.trained) and set(
        first["id"]
    ) < set(table["id"])
    assert 0 < len(new) < (first["tokens"] == 4096).sum() < 24


@pytest.mark.parametrize("sampler", ["qmc", "gp"])
def test_top_k_trains_all_at_the_first_horizon_and_the_best_at_the_last(
    asked, pool, tmp_path, sampler
):
    pytest.importorskip("optuna")
    search = {
        "kind": "optuna",
        "budget": 7,
        "sampler": sampler,
        "pruner": "topk",
        "reduction": 3,
        "wave": 2,
    }
    pool(loss=lambda point: planted(point, tall=2.0**-6))
    table = sweeping.sweep(asked({"tokens": [2048, 4096, 8192], "lr": LR}, **search), out=tmp_path)
    low, high = (table[table["tokens"] == tokens] for tokens in (2048, 8192))
    assert (len(low), len(high), len(table)) == (7, 3, 10)
    assert set(high["lr"]) == set(low.nsmallest(3, "loss")["lr"])
    more = pool()
    sweeping.sweep(asked({"tokens": [2048, 4096, 16384], "lr": LR}, **search), out=tmp_path)
    assert len(more.trained) == 3  # those that go to the new last horizon


@pytest.mark.parametrize(
    ("search", "axes", "said"),
    [
        (
            {"kind": "basin"},
            {"width": [32, 64]},
            "`axes.lr` must be given with search.kind 'basin'",
        ),
        (
            {"kind": "basin"},
            {"lr": [1e-3, 1e-3]},
            "a searched axis must have distinct positive values",
        ),
        (
            {"kind": "optuna"},
            None,
            "search.kind 'optuna' needs `search.budget`, the number of points per setting",
        ),
        (
            {"kind": "basin", "sampler": "gp"},
            None,
            "`search.sampler` is read only by search.kind 'optuna', but got kind='basin'",
        ),
        (
            {"kind": "optuna", "budget": 9, "sampler": "gp", "pruner": "halving"},
            None,
            "sampler 'gp' learns from complete trials only",
        ),
        (
            {"kind": "optuna", "budget": 9, "sampler": "cmaes", "pruner": "median"},
            None,
            "sampler 'cmaes' learns from complete trials only",
        ),
        (
            {"kind": "optuna", "budget": 9, "sampler": "cmaes"},
            None,
            "needs two or more searched axes (it adapts their covariance), but got one",
        ),
        (
            {"kind": "optuna", "budget": 9, "pruner": "halving"},
            None,
            "so `engine.evaluate_at` must name shares of the token budget, for example [0.25, 0.5]",
        ),
        ({"kind": "pareto"}, None, "needs `search.budget` (points) or `search.flops`, per setting"),
        (
            {"kind": "basin", "flops": 1e12},
            None,
            "`search.flops` is read only by search.kind 'pareto', but got kind='basin'",
        ),
        (
            {"kind": "pareto", "budget": 9},
            {"lr": LR, "weight_decay": [0.0, 0.1]},
            "a searched axis must have distinct positive values",
        ),
        (
            {"kind": "bassin"},
            None,
            "`search.kind` must be 'grid', 'basin', 'joint', 'optuna', 'pareto' or 'pbt',"
            " but got 'bassin'",
        ),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_is_trained(
    asked, monkeypatch, tmp_path, search, axes, said
):
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", None)
    with pytest.raises(UserError) as caught:
        sweeping.sweep(asked(axes, **search), out=tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_without_optuna_the_hint_says_what_to_install(asked, monkeypatch, tmp_path):
    monkeypatch.setitem(loop.sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'scaletune\[search\]'"):
        sweeping.sweep(asked(kind="optuna", budget=3), out=tmp_path)


def test_without_scikit_learn_the_hint_says_what_to_install(asked, monkeypatch, tmp_path):
    monkeypatch.setitem(loop.sys.modules, "sklearn", None)
    with pytest.raises(
        UserError,
        match=r"search.kind 'pareto' needs scikit-learn: pip install 'scaletune\[search\]'",
    ):
        sweeping.sweep(asked(kind="pareto", budget=3), out=tmp_path)


def test_the_scaling_along_the_frontier_is_written_and_shown(
    asked, pool, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("sklearn")
    pool()
    monkeypatch.chdir(tmp_path)
    recipe = asked(
        {"width": [32, 64, 128], "tokens": [2048, 8192, 32768], "lr": LR}, kind="pareto", budget=30
    )
    (tmp_path / "tiny.toml").write_text(
        toml(recipe.model_dump(exclude={"target", "compare", "holdout", "evidence"}))
    )
    assert cli.main(["sweep", "tiny.toml"]) == 0
    shown = capsys.readouterr().out
    [kept] = json.loads((tmp_path / "sweeps/tiny.search.json").read_text())
    assert {law["axis"] for law in kept["scaling"]} == {
        "model.width",
        "budget.tokens",
        "optimizer.lr",
    }
    assert all(one["loss"] > other["loss"] for one, other in pairwise(kept["frontier"]))
    notes = (tmp_path / "sweeps/tiny.search.txt").read_text()
    assert "lr = " in notes and "along the frontier (standard error" in notes and "lr = " in shown
    assert cli.main(["sweep", "tiny.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["learnt"] == [kept]


def test_a_study_trains_what_its_search_asks_for(asked, pool, tmp_path):
    """`run`: search, fit, predict the held-out cell, train it."""
    one = pool()
    recipe = asked({"width": [32, 64, 128], "lr": LR}, kind="basin")
    study = toml(
        {
            **recipe.model_dump(exclude={"target", "compare", "holdout", "evidence"}),
            "holdout": {"set": {"width": 256}, "lr": LR[2:5]},
        }
    )
    (tmp_path / "tiny.toml").write_text(study)
    answer = study_module.run(tmp_path / "tiny.toml", out=tmp_path)
    assert len(one.trained) < 3 * len(LR) and answer["fit"].law == "lr_nd"


def test_a_real_search_through_the_command_line(asked, tmp_path, monkeypatch, capsys):
    """Real workers: fewer trials than the grid has, and `scaletune fit` takes them."""
    monkeypatch.chdir(tmp_path)
    recipe = asked(
        {"width": [32, 64], "lr": [1e-3 * 2**k for k in range(7)]}, kind="basin", budget=4
    )
    (tmp_path / "tiny.toml").write_text(
        toml(recipe.model_dump(exclude={"target", "compare", "holdout", "evidence"}))
    )
    assert cli.main(["sweep", "tiny.toml", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["n_trials"] == said["done"] == 8 < 14
    assert cli.main(["fit", "tiny.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_used"] > 0
