"""Population-based training: each lineage equals an ordinary trial to the bit."""

import math

import pytest
import torch

from scaletune import data, sweeping, training
from scaletune import study as study_module
from scaletune.errors import UserError
from scaletune.recipe import trial_id, with_settings
from scaletune.training.pbt import PBTSettings, exploit_steps, train_population
from scaletune.transferring.formats.recipe import toml

MEASURED = ("id", "sweep", "status", "loss", "train_loss", "message", "flops", "point", "lr")
BASE = {"schedule.kind": "constant", "tokens": 20 * 256}


@pytest.fixture(scope="module")
def acc():
    return training.accelerator()


def comparable(trial, curve):
    return {name: getattr(trial, name) for name in MEASURED}, [
        x if math.isfinite(x) else None for x in curve
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule.ema_half_life": 1024, "optimizer.decay": "independent"},
        {"optimizer.family": "muon"},
    ],
    ids=["adamw", "average", "muon"],
)
def test_a_lineage_replayed_as_a_plain_trial_gives_the_same_bits(tiny, acc, settings):
    """One member diverges at once and continues from the weights of another."""
    points = [tiny(BASE | settings | {"lr": lr}) for lr in (1e-4, 1e3, 3e-3, 1e-2, 1e-3)]
    lineages = train_population(points, "main", PBTSettings(0.2, 1.5, 0), acc)
    tables = [trial.point["schedule"] for trial, _ in lineages]
    assert any(table["kind"] == "table" and len(table["shares"]) > 2 for table in tables)
    assert all(trial.status == "done" for trial, _ in lineages)
    assert len({trial.id for trial, _ in lineages}) == len(lineages) >= 4
    by_id = {}
    for trial, curve in lineages:
        recipe = tiny(BASE | settings | {"lr": trial.lr, "schedule": trial.point["schedule"]})
        by_id[trial.id] = (
            comparable(*training.run_trial(recipe, "main", acc)),
            comparable(trial, curve),
        )
    for key, (alone, lineage) in by_id.items():
        assert alone == lineage and alone[0]["id"] == key
    assert torch.get_num_threads() == 1


def test_it_beats_its_own_members_from_a_bad_start(tiny, acc):
    """All initial learning rates are too low; the population beats the best single trial."""
    points = [tiny(BASE | {"tokens": 60 * 256, "lr": lr}) for lr in (1e-5, 2e-5, 4e-5, 8e-5)]
    best = min(
        trial.loss for trial, _ in train_population(points, "main", PBTSettings(0.1, 2.0, 0), acc)
    )
    assert best < min(trial.loss for trial, _ in training.train_stack(points, ["main"] * 4, acc))


def test_the_same_seed_gives_the_same_lineages(tiny, acc):
    points = [tiny(BASE | {"lr": lr}) for lr in (1e-3, 4e-3, 1e-2)]
    one, same, other = (
        [
            trial.id
            for trial, _ in train_population(points, "main", PBTSettings(0.25, 1.5, seed), acc)
        ]
        for seed in (0, 0, 5)
    )
    assert one == same != other


def test_exploit_steps():
    assert exploit_steps(0.25, 20) == [5, 10, 15]
    assert exploit_steps(0.3, 10) == [3, 6, 9] and exploit_steps(0.01, 4) == [1, 2, 3]


def test_points_of_other_shapes_are_no_population(tiny, acc):
    with pytest.raises(
        UserError, match=r"trials that train as one model must have the same `model\.width`"
    ):
        train_population(
            [tiny(BASE), tiny(BASE | {"width": 64})], "main", PBTSettings(0.2, 1.5, 0), acc
        )


@pytest.fixture
def pbt_recipe(tiny):
    """axes and settings of `search` -> a recipe with a population."""
    axes = {"width": [32, 64], "lr": [1e-4, 1e-3, 4e-3]}
    return lambda axes=axes, **search: tiny(
        BASE | {"axes": axes, "search": {"kind": "pbt", "every": 0.25, "factor": 1.5, **search}}
    )


def test_a_sweep_records_the_lineages_and_trains_none_again(pbt_recipe, tmp_path, monkeypatch):
    """Two settings, two real workers; each recorded trial has the id of the plain trial."""
    table = sweeping.sweep(pbt_recipe(), out=tmp_path)
    assert sorted(set(table["width"])) == [32, 64]
    assert (table["status"] == "done").all()
    assert 4 <= len(table) <= 6
    recipes = [pbt_recipe().model_copy(update={"axes": {}})] * len(table)
    for recipe, (_, row) in zip(recipes, table.iterrows(), strict=True):
        plain = with_settings(
            recipe, {"width": row["width"], "lr": row["lr"], "schedule": row["point"]["schedule"]}
        )
        assert trial_id(plain, data.load(plain.data).digest) == row["id"]
    assert "3 members, " in (tmp_path / "sweeps/tiny.search.txt").read_text()
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", None)
    assert sweeping.sweep(pbt_recipe(), out=tmp_path).equals(table)


@pytest.mark.parametrize(
    ("settings", "axes", "message"),
    [
        (
            {"schedule.kind": "wsd"},
            None,
            "`schedule.kind` must be 'constant' with search.kind 'pbt', "
            "which finds the schedule itself, but got 'wsd'",
        ),
        ({}, {"lr": [1e-3]}, "a population must have two or more members"),
        ({}, {"width": [32]}, "`axes.lr` must be given with search.kind 'pbt'"),
        (
            {"engine.checkpoint_every": 2},
            None,
            "`engine.checkpoint_every` must be 0 and `engine.trackers` empty "
            "with search.kind 'pbt'",
        ),
        (
            {"search": {"kind": "basin", "every": 0.5}},
            None,
            "`search.every` is read only by search.kind 'pbt', but got kind='basin'",
        ),
        (
            {"search": {"kind": "pbt", "factor": 1.0}},
            None,
            "`search.factor` must be greater than 1",
        ),
    ],
)
def test_an_invalid_population_is_one_line_before_anything_is_trained(
    pbt_recipe, monkeypatch, tmp_path, settings, axes, message
):
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", None)
    with pytest.raises(UserError) as caught:
        sweeping.sweep(
            with_settings(pbt_recipe(axes) if axes else pbt_recipe(), settings), out=tmp_path
        )
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_population_whose_worker_is_lost_is_reported_and_trained_by_the_next_run(
    pbt_recipe, tmp_path, monkeypatch, capsys
):
    class Losing:
        def __init__(self, size, *rest):
            self.tasks = []

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        busy = property(lambda self: bool(self.tasks))

        def hand_out(self, queue):
            while queue:
                self.tasks.append(queue.pop(0))

        def messages(self):
            return [
                (
                    self.tasks.pop(),
                    {"lost": "its worker died", "status": -9, "memory": False, "log": ""},
                )
            ]

    recipe = pbt_recipe({"lr": [1e-3, 4e-3]})
    with monkeypatch.context() as patch:
        patch.setattr("scaletune.sweeping.engines.local.LocalPool", Losing)
        assert sweeping.sweep(recipe, out=tmp_path).empty
    assert "none of 2 members survived" in capsys.readouterr().err
    assert (sweeping.sweep(recipe, out=tmp_path)["status"] == "done").all()


def test_no_law_is_fitted_to_lineages(pbt_recipe, tmp_path):
    study = {
        **pbt_recipe().model_dump(exclude={"target", "compare", "evidence"}),
        "holdout": {"set": {"width": 128}, "lr": [1e-3, 2e-3, 4e-3]},
    }
    (tmp_path / "tiny.toml").write_text(toml(study))
    with pytest.raises(UserError, match="a law needs trials of one schedule"):
        study_module.run(tmp_path / "tiny.toml", out=tmp_path)
