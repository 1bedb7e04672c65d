"""Studies of the user's own trainer, from the fit to the answer at the target.

The trainers are closed forms: lr* = 0.003 (N / 36864)**-0.25 (D / 1e6)**-0.1 and
loss = 2 + 300 N**-0.5 + 400 D**-0.5 + 0.1 ln(lr / lr*)**2, so the true law is known.
"""

import json
import math
import re
import shlex
import sys
import tomllib

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

import scaletune as st
from scaletune import recipe as recipes
from scaletune.cli import main
from scaletune.errors import UserError
from scaletune.fitting.own_settings import own_setting_doubts
from scaletune.fitting.relations import RELATIONS
from scaletune.plotting import basin_curves
from scaletune.recipe import validate_recipe
from scaletune.records import Trial, frame
from scaletune.records.trial import to_jsonl
from scaletune.sweeping import tasks
from scaletune.sweeping.search import pareto
from scaletune.sweeping.search.space import build_cells
from scaletune.sweeping.task import complete_trial
from scaletune.transferring import default_formats

LRS = [0.0007, 0.0014, 0.0028, 0.0056, 0.0112]
RECIPE = {
    "model": {"width": 32, "layers": 3},
    "trainer": {"function": "law:train"},
    "budget": {"tokens": 1_000_000, "batch_tokens": 1000},
    "axes": {"width": [32, 48, 64, 96], "tokens": [1_000_000, 4_000_000], "lr": LRS},
}
MODULE = """
import math

def size(trial):
    return 12 * trial["model.layers"] * trial["width"] ** 2

def loss_at(n, d, lr):
    best = 0.003 * (n / 36864) ** -0.25 * (d / 1e6) ** -0.1
    return 2 + 300 * n**-0.5 + 400 * d**-0.5 + 0.1 * math.log(lr / best) ** 2

def train(trial):
    return loss_at(size(trial), trial["tokens"], trial["lr"])

def describe(trial):
    return {"n_params": size(trial), "n_params_total": size(trial) + 1000}
"""


def size(recipe):
    return 12 * getattr(recipe.model, "layers", 3) * recipe.model.width**2


def loss_of(recipe):
    n, d = size(recipe), recipe.budget.tokens
    best = 0.003 * (n / 36864) ** -0.25 * (d / 1e6) ** -0.1
    return 2 + 300 * n**-0.5 + 400 * d**-0.5 + 0.1 * math.log(recipe.optimizer.lr / best) ** 2


def counted(recipe):
    return {"n_params": size(recipe), "n_params_total": size(recipe) + 1000}


def trials(content=None, report=counted, loss=loss_of):
    """The trials of a recipe as its own trainer records them, without starting it."""
    recipe = validate_recipe(RECIPE | (content or {}), "own")
    done = [
        complete_trial(
            task,
            {"status": "done", "seconds": 1.0, "loss": loss(task.recipe), **report(task.recipe)},
        )
        for task in tasks("main", recipes.points(recipe))
    ]
    assert all(isinstance(trial, Trial) for trial in done)
    return done


def table(content=None, report=counted, loss=loss_of):
    return frame(trials(content, report, loss))


def unknown(recipe):
    return {}


SMALL = {"axes": {"width": [32, 64], "lr": LRS[1:4]}}  # a fit of it takes a fraction of a second


# --- the fit ------------------------------------------------------------------------------------


def test_the_fit_recovers_the_law_and_says_what_it_takes_for_granted():
    fit = st.fit(table())
    for name, true in {"a": -0.25, "b": -0.1}.items():
        low, high = fit.params[name]["interval"]
        assert low < true < high and high - low < 0.2
    best = fit.predict(n_params=4 * 331_776, tokens=8e6)
    assert best.lr == pytest.approx(0.003 * 36**-0.25 * 8**-0.1, rel=0.1)
    text = "\n".join(fit.assumptions)
    assert "`law:train` trained the runs: optimizer, schedule, data and parametrization" in text
    assert "all runs share model.layers 3" in text
    assert "FLOPs: 6 * n_params * tokens (arXiv:2001.08361) (40 trials)" in text
    assert "None" not in text and "beta1" not in text


def test_the_assumptions_of_a_recipe_that_states_more_repeat_it():
    stated = {"optimizer": {"beta2": 0.95}, "trainer": {"function": "law:train", "version": "7"}}
    stated |= {"parametrization": {"base_width": 32}, "my": {"dropout": 0.1}} | SMALL
    text = "\n".join(st.fit(table(stated)).assumptions)
    for part in ("at version 7", "optimizer.beta2 0.95", "my.dropout 0.1", "base width 32"):
        assert part in text


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("my.dropout", [0.0, 0.125]),
        ("my.activation", ["relu", 'a "b" c']),
        ("my.flash", [True, False]),
        ("model.heads", [2, 4]),
        ("optimizer.beta2", [0.95, 0.999]),
        ("trainer.version", ["1", "2"]),
        ("trainer.command", [["a", "--lr={lr}"], ["a", "--lr={lr}", "--x='1'"]]),
    ],
)
def test_own_settings_that_differ_within_a_setting_are_the_first_sentence(axis, values):
    def worse(recipe):
        section, key = axis.split(".")
        own = getattr(recipe, section)
        value = own.get(key) if isinstance(own, dict) else getattr(own, key)
        return loss_of(recipe) + 0.3 * values.index(value)

    axes = SMALL["axes"]
    content = {"axes": axes | {axis: values}}
    if axis == "trainer.version":
        content["trainer"] = {"function": "law:train", "version": "0"}
    if axis == "trainer.command":
        content |= {"trainer": {}, "axes": axes}
        both = [trials(content | {"trainer": {"command": each}}, loss=worse) for each in values]
        mixed = frame([trial for each in both for trial in each])
    else:
        mixed = table(content, loss=worse)
    first = st.fit(mixed).status[0]
    assert first.startswith(f"`{axis}` (") and "so their losses are mixed" in first
    option, where = shlex.split(first[first.index("--where") :])
    alone = st.fit(mixed, where=where)
    assert option == "--where" and not any("mixed" in each for each in alone.status)
    assert len(alone.used) + len(alone.dropped) == len(mixed) // 2
    losses = mixed.set_index("id")["loss"]
    spread = [losses[ids].max() - losses[ids].min() for ids in _by_setting(alone, mixed)]
    assert max(spread) < 0.25  # one value of the setting: the other's losses are 0.3 higher


def _by_setting(fit, runs):
    """The ids of the used runs of each setting and lr."""
    used = runs[runs["id"].isin(fit.used)]
    return [list(group["id"]) for _, group in used.groupby(["n_params", "lr"])]


def test_settings_that_follow_the_size_and_seeds_are_no_mixture():
    cells = [
        {"width": width, "model.n_head": width // 16, "my.n_layer": 3, "my.seed": [0, 1]}
        for width in (32, 64, 96)
    ]
    fit = st.fit(table({"cells": cells, "axes": {"lr": LRS[1:4]}}))
    assert not any("mixed" in sentence for sentence in fit.status)


def test_code_that_differs_between_settings_and_one_size_for_several_widths_are_said():
    trainer = {"function": "law:train"}
    parts = [
        trials({"trainer": trainer | {"version": v}, "axes": {"width": [w], "lr": LRS[1:4]}})
        for v, w in (("1", 32), ("2", 64))
    ]
    status = st.fit(frame([trial for part in parts for trial in part])).status
    assert any("`trainer.version` ('1', '2') differs between settings" in s for s in status)
    one = {"model": {"width": 32, "n_params": 50_000}, **SMALL}
    assert st.fit(table(one, unknown)).status[0] == (
        "the recipe states `model.n_params` 50000 for models of width 32 and 64: state it for each"
        " in [[cells]], or let `trainer.describe` count it"
    )


@pytest.mark.parametrize("law", ["lr_nd", "loss_nd", "joint", "asymptote_n"])
def test_a_count_that_nobody_states_is_one_sentence_with_its_remedies(law, tmp_path, capsys):
    nameless = trials(SMALL, unknown)
    with pytest.raises(UserError) as error:
        st.fit(frame(nameless), law)
    text = str(error.value)
    assert re.search(r"6 of 6 trials \(\w{16}, \w{16}, \w{16}, \.\.\.\) of your trainer", text)
    assert all(way in text for way in ("`model.n_params`", "`trainer.describe`", "trial.report("))
    assert "\n" not in text
    path = tmp_path / "own.jsonl"
    path.write_text(to_jsonl(nameless))
    if law == "lr_nd":  # the remedy for records that exist
        option = ["--map", "n_params=12*model.layers*width**2", "--out", str(tmp_path / "f.json")]
        assert main(["fit", str(path), "--json", *option]) == 0
        fitted = json.loads(capsys.readouterr().out)
        assert fitted["params"] == st.fit(table(SMALL)).params


def test_a_missing_lr_names_the_setting_that_may_be_it():
    axes = {"width": [32, 96], "my.eta": LRS, "my.peak_lr": [0.1]}
    own = table(
        {"axes": axes}, loss=lambda r: loss_of(recipes.with_settings(r, {"lr": r.my["eta"]}))
    )
    with pytest.raises(UserError, match=r"sweep `lr` in `axes`, or name .* --map lr=my\.peak_lr"):
        st.fit(own)
    fit = st.fit(own.assign(lr=own["my.eta"]))
    assert fit.params["a"]["value"] == pytest.approx(-0.25, abs=0.05)
    assert not any("mixed" in sentence for sentence in fit.status)


def test_one_trial_without_a_count_is_dropped_with_its_reason():
    own = table({"axes": {"width": [32, 64], "lr": LRS}})
    own.loc[3, "n_params"] = math.nan
    own.loc[3, "n_params_total"] = math.nan
    assert st.fit(own).dropped[own["id"][3]] == "it has no `n_params`"


def test_all_parameters_stand_in_for_those_without_embeddings_where_nothing_else_is_known():
    def total(recipe):
        return {"n_params_total": size(recipe) + 2 * 500 * recipe.model.width}

    first = st.fit(table(SMALL, total)).status[0]
    assert first.startswith("`n_params` is unknown and taken to be `n_params_total`")
    fit = st.fit(table({"my": {"vocab_size": 500}} | SMALL, total))
    assert [cell["n_params"] for cell in fit.cells] == [12 * 3 * w**2 for w in (32, 64)]
    assert any("from `my.vocab_size`, `width` and untied" in each for each in fit.assumptions)
    tied = {"my": {"vocab_size": 1000, "tied": True}} | SMALL
    assert st.fit(table(tied, total)).ranges["n_params"] == fit.ranges["n_params"]


def test_reported_flops_are_named_and_unknown_tokens_are_computed_from_them():
    def report(recipe):
        return counted(recipe) | {"flops": 6.0 * size(recipe) * recipe.budget.tokens}

    small = table(SMALL, report)
    assert any("as the trainer reports them (6 trials)" in s for s in st.fit(small).assumptions)
    own = table(report=report)
    best = own.loc[own.groupby(["n_params", "tokens"])["loss"].idxmin()].assign(tokens=math.nan)
    fit = st.fit(best, "loss_nd")
    assert fit.ranges["tokens"] == pytest.approx([1e6, 4e6])


def test_own_axes_enter_relations_by_map_and_are_mixtures_otherwise(tmp_path, capsys):
    def loss(recipe):
        return 2.0 + 40 * size(recipe) ** -0.4 + 1e4 / recipe.my["unique"]

    axes = {"width": [32, 48, 64, 96, 128], "my.unique": [10_000, 40_000]}
    path = tmp_path / "own.jsonl"
    path.write_text(to_jsonl(trials({"axes": axes}, loss=loss)))
    command = ["fit", str(path), "--law", "asymptote_n", "--json"]
    assert main([*command, "--map", "unique_tokens=my.unique"]) == 0
    fit = json.loads(capsys.readouterr().out)
    for unique in (10_000, 40_000):
        alpha = fit["params"][f"alpha at unique_tokens={unique}"]["value"]
        limit = fit["params"][f"E at unique_tokens={unique}"]["value"]
        assert (alpha, limit) == pytest.approx((0.4, 2 + 1e4 / unique), rel=1e-3)
    assert not any("mixed" in sentence for sentence in fit["status"])
    assert main(command) == 0
    assert "`my.unique` (10000, 40000) differs" in json.loads(capsys.readouterr().out)["status"][0]
    assert main([*command, "--where", "my.unique == 10000 and model.layers < 4"]) == 0
    assert main([*command, "--map", "unique_tokens=my.uniqe"]) == 2
    assert "nearest: 'my.unique'" in capsys.readouterr().err


def test_a_hold_out_may_name_own_columns():
    cells = [{"width": w, "my.n_layer": w // 8} for w in (32, 48, 64, 96)]
    own = table({"cells": cells, "axes": {"lr": LRS[1:4]}})
    fit = st.fit(own, holdout="my.n_layer > 8")
    assert {cell["n_params"] for cell in fit.held_out["cells"]} == {12 * 3 * 96**2}


def test_records_and_runs_of_another_tool_are_fitted_together(tmp_path, capsys):
    (tmp_path / "own.jsonl").write_text(to_jsonl(trials(SMALL)))
    larger = table({"axes": {"width": [128], "lr": LRS[:3]}})
    columns = {"n_params": "size", "tokens": "seen"}
    kept = larger[["n_params", "tokens", "lr", "loss"]].rename(columns=columns)
    kept.to_csv(tmp_path / "runs.csv", index=False)
    maps = [f"--map={name}={column}" for name, column in columns.items()]
    files = [str(tmp_path / name) for name in ("own.jsonl", "runs.csv")]
    assert main(["fit", *files, *maps, "--json"]) == 0
    fit = json.loads(capsys.readouterr().out)
    assert fit["n_used"] == 9 and fit["params"]["a"]["value"] == pytest.approx(-0.25, abs=0.05)


def test_recorded_settings_only_are_checked():
    """Columns of a tracker may begin with `model.` too."""
    foreign = table(SMALL).drop(columns="point").assign(**{"model.x": np.arange(6) % 3})
    assert own_setting_doubts(foreign.assign(cell=0), ["cell"]) == []
    assert set(RELATIONS) > {"asymptote_n"}


# --- pictures -----------------------------------------------------------------------------------


def test_pictures_need_no_counts_and_do_not_mix_own_settings(tmp_path):
    axes = {"width": [32, 64], "my.dropout": [0.0, 0.1], "lr": LRS}
    bare = {"budget": {}, "axes": axes}
    own = table(bare, unknown, lambda recipe: 2 + math.log(recipe.optimizer.lr / 0.003) ** 2)
    assert own[["n_params", "tokens", "flops", "batch_tokens"]].isna().all().all()
    (path,) = st.plot(own, tmp_path)
    assert imread(path).std() > 0
    labels = [curve.label for curve in basin_curves(own)]
    assert labels == [f"width {w}, my.dropout {d}" for w in (32, 64) for d in ("0", "0.1")]
    layers = table({"axes": {"model.layers": [2, 4], "lr": LRS}})
    labels = [curve.label for curve in basin_curves(layers)]
    assert labels == [f"parameters {12 * n * 32**2:g}" for n in (2, 4)]
    with pytest.raises(UserError, match="a plot needs `lr`"):
        st.plot(own.assign(lr=math.nan), tmp_path)


# --- the study ----------------------------------------------------------------------------------


STUDY = """
target = "target.toml"
model = { width = 32, layers = 3 }
budget = { tokens = 1_000_000, batch_tokens = 1000 }
engine = { workers = 2 }
[trainer]
function = "law:train"
[axes]
width = [32, 48, 64]
lr = [0.0007, 0.0014, 0.0028, 0.0056]
[[compare]]
name = "deeper"
set = { "model.layers" = 6 }
axes = { width = [32], lr = [0.0014, 0.0028, 0.0056] }
[holdout]
set = { width = 96, "model.n_params" = 331_776 }
lr = [0.0005, 0.001, 0.002]
"""
TARGET = """
model = { width = 128, layers = 6, n_params = 1_179_648 }
my = { "drop out" = 0.5 }
budget = { tokens = 2_000_000, batch_tokens = 1000 }
[trainer]
command = [
    "python", "train it.py", "--lr={lr}", "--w={model.width}", "--n={steps}", "--out={run_dir}",
]
version = "3"
env = { MODE = "{id}" }
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study whose function only this process has: (folder, answer)."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(STUDY)
    (folder / "target.toml").write_text(TARGET)

    def train(trial):
        n = 12 * trial["model.layers"] * trial["width"] ** 2
        best = 0.003 * (n / 36864) ** -0.25 * (trial["tokens"] / 1e6) ** -0.1
        loss = 2 + 300 * n**-0.5 + 400 * trial["tokens"] ** -0.5
        (folder / f"trained-{trial.id}").touch()
        return {"loss": loss + 0.1 * math.log(trial["lr"] / best) ** 2, "n_params": n}

    return folder, st.run(folder / "study.toml", out=folder, train=train), train


def test_a_study_of_a_function_predicts_its_held_out_setting(finished):
    folder, answer, _ = finished
    (cell,) = answer["fit"].held_out["cells"]
    assert cell["n_params"] == 12 * 3 * 96**2
    assert cell["predicted_lr"] == pytest.approx(0.003 * 9**-0.25, rel=0.15)
    assert cell["loss_excess"] is not None and cell["loss_excess"] < 0.005
    assert [row["sweep"] for row in answer["shift"]] == ["main"]
    assert answer["report"].exists() and len(answer["pictures"]) == 2
    sweeps = pd.Series(
        [t.sweep for t in st.read_trials(folder / "sweeps/study.jsonl").itertuples()]
    )
    assert sweeps.value_counts()[["main", "deeper", "validation"]].tolist() == [12, 3, 4]


def test_the_answer_is_the_trainer_with_the_predicted_lr(finished):
    folder, answer, _ = finished
    transfer = answer["transfer"]
    low, high = transfer["interval"]["lr"]
    true = 0.003 * 32**-0.25 * 2**-0.1
    assert low < true < high and transfer["lr"] == pytest.approx(true, rel=0.5)
    names = {str(path).rsplit("/", 1)[1] for path in transfer["files"]}
    assert names == {"target.toml", "answer.json", "ANSWER.md"}
    written = folder / "configs/study/recipe/target.toml"
    recipe = recipes.load(written)
    lr = recipe.optimizer.lr
    assert lr == pytest.approx(transfer["lr"], rel=1e-3)
    stated = tomllib.loads(TARGET)
    assert tomllib.loads(written.read_text())["trainer"] == stated["trainer"]
    assert recipe.my == stated["my"] and recipe.model.layers == 6
    start = transfer["answer"]["start"]
    expected = ["python", "train it.py", f"--lr={lr}", "--w=128", "--n=2000", "--out=runs/target"]
    assert shlex.split(start["command"]) == expected
    page = (folder / "configs/study/ANSWER.md").read_text()
    assert start["command"] in page and f"scaletune sweep {written}" in page
    settings = transfer["answer"]["settings"]
    assert "weight_decay" not in settings and "beta1" not in settings
    assert settings["my.drop out"]["value"] == 0.5
    assert transfer["answer"]["flops"]["total"] == 6 * 1_179_648 * 2_000_000


def test_a_second_run_trains_nothing(finished):
    folder, answer, train = finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trained-*")}
    again = st.run(folder / "study.toml", out=folder, train=train)
    assert again["fit"].digest == answer["fit"].digest and len(before) == 19
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("trained-*")}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A folder with the module `law`, whose functions any process can import."""
    (tmp_path / "law.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("law", None)


def test_a_study_of_an_importable_function_asks_describe(module, capsys):
    study = STUDY.replace(
        'function = "law:train"', 'function = "law:train"\ndescribe = "law:describe"'
    )
    study = study[: study.index("[[compare]]")].replace("[32, 48, 64]", "[32, 64]")
    study += "[holdout]\nset = { width = 96 }\nlr = [0.001, 0.002, 0.004]\n"
    (module / "study.toml").write_text(study)
    (module / "target.toml").write_text(TARGET.replace(", n_params = 1_179_648", ""))
    error = run_error(capsys, "run", "study.toml")
    assert "a target needs the non-embedding parameters" in error
    assert not list(module.glob("sweeps/*"))  # nothing is trained
    described = TARGET.replace('version = "3"', 'describe = "law:describe"')
    (module / "target.toml").write_text(described.replace(", n_params = 1_179_648", ""))
    assert main(["run", "study.toml", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["transfer"]["n_params"] == 1_179_648
    assert answer["fit"]["held_out"]["cells"][0]["n_params"] == 331_776
    assert main(["count", "study.toml", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["points"][0]["params"] == {"n_params": 36_864, "n_params_total": 37_864}
    assert counts["total"] == {"trials": 8, "flops": 6 * 4 * 5 * 36_864 * 1e6}


def run_error(capsys, *command):
    assert main([*command]) == 2
    return capsys.readouterr().err.strip()


def test_what_is_unknown_is_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY.replace(', "model.n_params" = 331_776', ""))
    (tmp_path / "target.toml").write_text(TARGET)
    error = run_error(capsys, "run", "study.toml")
    assert "the held-out setting is predicted before it is trained" in error
    assert "`trainer.describe`" in error
    (tmp_path / "study.toml").write_text(STUDY)
    assert "format 'granite' needs the tensors of the target's model" in run_error(
        capsys, "run", "study.toml", "--set", 'to=["recipe", "granite"]'
    )
    assert "no proxy may train the held-out setting" in run_error(
        capsys, "run", "study.toml", "--set", "holdout.set={width=64}"
    )
    for kind in ("joint", "pareto"):
        error = run_error(
            capsys, "sweep", "study.toml", "--set", f"search={{kind='{kind}',budget=6}}"
        )
        assert "before a trial is trained, but nobody states it at width 32" in error
        assert all(
            way in error for way in ("`model.n_params`", "`trainer.describe`", "`model.build`")
        )
    assert not list(tmp_path.glob("sweeps/*.jsonl")) and not (tmp_path / "runs").exists()


# --- transfer -----------------------------------------------------------------------------------


def own_target(**more):
    content = {
        "model": {"width": 128, "n_params": 589_824},
        "trainer": {"command": ["train", "--lr={lr}"]},
        "optimizer": {"lr": 0.1},
        "budget": {"tokens": 4_000_000, "batch_tokens": 4000},
    }
    return validate_recipe(content | more, "big")


def test_lr_follows_the_batch_only_by_a_rule_of_a_stated_optimizer(tmp_path):
    fit = st.fit(table(SMALL))
    unstated = st.transfer(fit, own_target(), out=tmp_path)
    assert unstated["lr"] == unstated["lr_at_fitted_batch"]
    assert any("recipe does not state `optimizer.family`" in s for s in unstated["status"])
    stated = st.transfer(fit, own_target(optimizer={"lr": 0.1, "family": "adamw"}), out=tmp_path)
    assert stated["lr"] == pytest.approx(2 * stated["lr_at_fitted_batch"])


def test_a_target_states_its_parameters_and_its_budget(tmp_path):
    fit = st.fit(table(SMALL))
    with pytest.raises(UserError, match=r"nobody states them: state `model\.n_params`, or give"):
        st.transfer(fit, own_target(model={"width": 128}), out=tmp_path)
    measured = st.transfer(fit, own_target(model={"width": 128}), out=tmp_path, sizes=Known)
    assert measured["n_params"] == 12 * 128**2
    with pytest.raises(UserError, match=r"must state how long it trains: set `budget\.tokens`"):
        st.transfer(fit, own_target(budget={}), out=tmp_path)


def test_a_command_that_does_not_get_the_lr_is_said(tmp_path):
    target = own_target(trainer={"command": ["train", "--width={width}"]})
    status = st.transfer(st.fit(table(SMALL)), target, out=tmp_path)["status"]
    assert any("has no placeholder {lr}" in sentence for sentence in status)


def test_a_target_of_the_zoo_gets_every_format_and_the_doubt(tmp_path):
    zoo = validate_recipe(
        {
            "model": {"width": 64, "depth": 2, "head_dim": 32},
            "parametrization": {"base_width": 32},
            "budget": {"tokens": 4_096_000, "batch_tokens": 1024},
        },
        "zoo",
    )
    assert default_formats(zoo) == ["granite", "recipe"]
    assert default_formats(own_target()) == ["recipe"]
    answer = st.transfer(st.fit(table(SMALL)), zoo, out=tmp_path)
    assert {"config.json", "plan.json"} <= {p.rsplit("/", 1)[1] for p in answer["files"]}
    status = "\n".join(answer["status"])
    assert "do not state the parametrization of their runs" in status
    assert "trained by your own trainer, and the target is not" in status


def test_hardware_gives_the_time_of_an_own_target_and_no_memory(tmp_path):
    target = own_target(hardware={"gpu": "H100", "gpus": 8, "mfu": 0.4})
    answer = st.transfer(st.fit(table(SMALL)), target, out=tmp_path)["answer"]
    seconds = 6 * 589_824 * 4e6 / (0.4 * answer["time"]["peak_flops"])
    assert answer["time"]["gpu_hours"] == pytest.approx(seconds / 3600)
    assert answer["memory_bytes_a_gpu"] is None


# --- plan and search ----------------------------------------------------------------------------


class Known:
    """Sizes that a description gives, by a closed form."""

    flops_from = "6 N D"

    def __init__(self, recipe):
        self.n_params = 12.0 * recipe.model.width**2
        self.flops = 6 * self.n_params * recipe.budget.tokens


def test_a_plan_of_an_own_model_asks_for_its_sizes_at_every_width(tmp_path):
    target = validate_recipe(
        {
            "model": {"width": 512, "n_params": 12 * 512**2},
            "trainer": {"command": ["train", "--lr={lr}", "--b={batch_tokens}"], "version": "2"},
            "budget": {"tokens": 60_000_000, "batch_tokens": 8000},
        },
        "big",
    )
    with pytest.raises(UserError, match="at every width, but nobody gives them at width 32"):
        st.plan(target, "5%")
    with pytest.raises(UserError, match="the target states no `lr`: give one"):
        st.plan(target, "2%", sizes=Known)
    target = recipes.with_settings(target, {"lr": 0.002})
    plan = st.plan(target, "2%", sizes=Known)
    runs = plan.runs
    assert (runs["n_params"] == 12 * runs["width"] ** 2).all()
    assert (runs["flops"] == 6.0 * runs["n_params"] * runs["tokens"]).all()
    assert (runs["width"] % 32 == 0).all() and (runs["share"] == 1).all()
    from scaletune.planning.text import study
    from scaletune.transferring.formats.recipe import toml

    shared, cells = study(plan, tmp_path)
    text = toml(shared) + "".join(f"\n[[cells]]\n{toml(cell)}" for cell in cells)
    (tmp_path / "study.toml").write_text(text)
    loaded = recipes.load(tmp_path / "study.toml")
    assert loaded.trainer == target.trainer and loaded.model.n_params is None
    assert len(recipes.points(loaded)) == len(runs)


def test_a_frontier_is_searched_over_own_axes(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "scaletune.sweeping.trainers.description.describe",
        lambda recipe: {"n_params": 12.0 * recipe.my["layers"] * recipe.model.width**2},
    )
    content = {
        "trainer": {"command": ["x", "{lr}", "{my.layers}"]},
        "axes": {"width": [32, 64], "my.layers": [2, 4], "lr": [0.001, 0.002, 0.004]},
        "search": {"kind": "pareto", "budget": 5},
        "engine": {"workers": 2},
    }
    recipe = validate_recipe(RECIPE | content, "front")
    (cell,) = build_cells(recipe)
    cost = pareto.flops_function(cell)
    assert {cost(point) for point in cell.points} == {
        6e6 * 12 * layers * width**2 for layers in (2, 4) for width in (32, 64)
    }

    def train(trial):
        n = 12 * trial["my.layers"] * trial["width"] ** 2
        return 2 + 300 * n**-0.5 + 0.1 * math.log(trial["lr"] / 0.002) ** 2

    done = st.sweep(recipe, out=tmp_path, train=train)
    assert len(done) == 5 and set(done["status"]) == {"done"}
    assert done["my.layers"].nunique() == 2
