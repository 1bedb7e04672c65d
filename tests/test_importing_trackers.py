"""Runs of MLflow, Optuna, Ray Tune and a Trainer, in files of the real libraries.

Each holds one sweep with a known law, and runs with a lower loss that must not be used: killed,
failed, diverged, pruned, stopped early, still running (tests/fixtures/make_trackers.py).
"""

import json
import math
import re
import shutil
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from scaletune import importing
from scaletune.errors import UserError
from scaletune.importing import (
    mlflow,
    optuna_journal,
    optuna_storage,
    optuna_study,
    ray_tune,
    trainer,
)
from scaletune.importing.missed_peak import missed_peak
from scaletune.importing.run import to_table

FIXTURES = Path(__file__).parent / "fixtures"
BEST = {1e5: 0.01, 4e5: 0.008}  # the best lr of each size


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of the trackers; databases are stored as SQL."""
    folder = tmp_path_factory.mktemp("trackers")
    with tarfile.open(FIXTURES / "trackers.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for path in folder.glob("*.db"):
        sql = path.read_text("utf-8")
        path.unlink()
        with closing(sqlite3.connect(path)) as db:
            db.executescript(sql)
    return folder


def expected():
    """(n_params, lr, loss) of the sweep, from its closed form."""
    for n_params, best in BEST.items():
        for lr in (best * 2.0**k for k in (-2, -1, 0, 1)):
            ratio = lr / best
            loss = (2 + 50 / n_params**0.3) * (1 + 0.04 * (ratio - 1 - math.log(ratio)))
            yield n_params, pytest.approx(lr), pytest.approx(loss)


SOURCES = {
    "mlflow database": ("mlflow.db", {"failed": 3, "diverged": 2}),
    "mlruns": ("mlruns", {"failed": 3, "diverged": 2}),
    "optuna 5": ("optuna-5.0.0.db", {"failed": 5, "diverged": 1}),
    "optuna 2": ("optuna-2.10.1.db", {"failed": 5, "diverged": 1}),
    "optuna journal": ("optuna.log", {"failed": 5, "diverged": 1}),
    "trials_dataframe": ("trials.csv", {"failed": 3, "diverged": 1}),
    "trials_dataframe with two header lines": ("trials_wide.csv", {"failed": 3, "diverged": 1}),
    "ray": ("experiment", {"failed": 3, "diverged": 1}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_only_the_runs_that_finished_are_used_with_their_peak_lr(files, name):
    """The lr is the setting, though a decayed one is logged too; the tokens are those at the end.

    Of MLflow, one run failed and was resumed with the same id: it finished.
    """
    file, dropped = SOURCES[name]
    table, _ = importing.trials(files / file)
    done = table[table["status"] == "done"].sort_values(["n_params", "lr"])
    rows = done[["n_params", "lr", "loss"]].itertuples(index=False, name=None)
    assert list(rows) == list(expected())
    assert set(done["tokens"]) == {204_800}
    assert name.startswith("trials") or set(done["batch_tokens"]) == {1024}  # a study's attribute
    assert table[table["status"] != "done"]["status"].value_counts().to_dict() == dropped
    assert table["id"].is_unique and (table["status"][table["loss"] == 1.0] != "done").all()


@pytest.mark.parametrize("file", ["mlflow_runs.csv", "ray.csv"])
def test_a_table_of_last_values_gives_the_lr_of_the_settings(files, file):
    """In `search_runs()` a metric that is NaN is empty; in `get_dataframe()` no state is known."""
    table, notes = importing.trials(files / file)
    finished = table[(table["status"] == "done") & (table["loss"] > 1.0)]
    finished = finished[finished["loss"] < math.inf].sort_values(["n_params", "lr"])
    rows = finished[["n_params", "lr", "loss"]].itertuples(index=False, name=None)
    assert list(rows) == list(expected())
    assert any("which is the last logged value" in note for note in notes)


def test_a_logged_lr_alone_is_refused_where_only_last_values_are_known(files):
    table = pd.read_csv(files / "mlflow_runs.csv").drop(columns=["params.learning_rate"])
    runs = mlflow.read_export(table, files)
    with pytest.raises(UserError, match=r"`metrics.lr` is the last logged value: give the column"):
        importing.columns.name_columns(runs)


def test_both_forms_of_mlflow_hold_the_same_runs(files):
    """Points at one time and step have no order; parents that log nothing are left out."""
    forms = [mlflow.read_database(files / "mlflow.db"), mlflow.read_folder(files / "mlruns")]
    database, folder = ({run.name: run for run in form} for form in forms)
    assert database.keys() == folder.keys() and "parent" not in database
    assert "deleted" not in database and len(database) == 13
    for name, run in database.items():
        other = folder[name]
        assert (run.status, run.message) == (other.status, other.message)
        ignored = {"tags.mlflow.parentRunId": None}
        assert run.config | ignored == other.config | ignored
        assert repr(run.history) == repr({key: other.history[key] for key in run.history})
    assert database["n100000-lr0.01"].config["experiment"] == "sweep"
    assert database["n100000-lr0.01"].config["tags.cluster"] == "a100"
    assert database["running"].config["experiment"] == "other"
    assert math.isinf(max(value for _, value in database["infinite"].history["eval/loss"]))


def test_a_part_of_mlruns_and_runs_in_its_trash(files, tmp_path):
    folder = shutil.copytree(files / "mlruns", tmp_path / "mlruns")
    run = next(file.parent for file in folder.rglob("meta.yaml") if "killed" in file.read_text())
    assert mlflow.is_folder(run) and [r.name for r in mlflow.read_folder(run)] == ["killed"]
    assert mlflow.read_folder(run)[0].config["experiment"] == "sweep"
    (folder / ".trash").mkdir(exist_ok=True)
    shutil.move(run.parent, folder / ".trash")
    assert {r.name for r in mlflow.read_folder(folder)} == {"running"}


def test_artifacts_in_mlruns_do_not_hide_its_runs(files, tmp_path):
    """Trackers that log checkpoints put a `trainer_state.json` below the folder of a run."""
    folder = shutil.copytree(files / "mlruns", tmp_path / "mlruns")
    checkpoint = next(folder.glob("*/*/params")).parent / "artifacts" / "checkpoint-10"
    checkpoint.mkdir(parents=True)
    shutil.copy(FIXTURES / "trainer_state.json", checkpoint)
    assert len(importing.trials(folder)[0]) == 13


def test_a_run_that_ended_without_an_exception_may_be_unfinished(files, tmp_path):
    """MLflow calls a run FINISHED when its process exits; the plan and the steps say more."""
    shutil.copy(files / "mlflow.db", tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as db:
        db.execute("UPDATE runs SET status = 'FINISHED' WHERE name = 'killed'")
        db.execute("UPDATE runs SET status = 'RUNNING' WHERE name = 'n400000-lr0.008'")
        db.commit()
    rows = importing.trials(tmp_path / "mlflow.db")[0].set_index("name")
    assert rows["message"]["killed"] == "unfinished: 100 of 200 steps"
    assert rows["status"]["n400000-lr0.008"] == "done"  # it reached its plan


def test_a_database_without_runs_is_refused(files, tmp_path):
    shutil.copy(files / "mlflow.db", tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as db:
        db.execute("UPDATE runs SET lifecycle_stage = 'deleted'")
        db.commit()
    with pytest.raises(UserError, match="all of them are deleted"):
        importing.trials(tmp_path / "mlflow.db")
    shutil.copy(files / "optuna-5.0.0.db", tmp_path)
    with closing(sqlite3.connect(tmp_path / "optuna-5.0.0.db")) as db:
        db.execute("UPDATE trials SET state = 'WAITING'")
        db.commit()
    with pytest.raises(UserError, match="its studies have none"):
        importing.trials(tmp_path / "optuna-5.0.0.db")
    (tmp_path / "meta.yaml").write_text("{% set version = 1 %}\npackage:\n  name: x\n")
    assert not mlflow.is_folder(tmp_path)
    with pytest.raises(UserError, match=r"no `meta.yaml` in it is that of a run"):
        mlflow.read_folder(tmp_path)


def test_the_download_of_mlflows_web_page():
    """Its names have no prefix, so that a metric named as a parameter is a second column."""
    head = ["Start Time", "Duration", "Run ID", "Name", "Source Type", "Source Name", "User"]
    rows = [
        ["-", "1s", f"r{i}", f"run{i}", "LOCAL", "x.py", "me", state, lr, lr / 10, 3.0 + i]
        for i, (state, lr) in enumerate([("FINISHED", 0.01), ("KILLED", 0.02)])
    ]
    table = pd.DataFrame(rows, columns=[*head, "Status", "lr", "lr.1", "val_loss"])
    named = importing.columns.name_columns(mlflow.read_export(table, Path())).table
    assert list(named["lr"]) == [0.01, 0.02] and list(named["status"]) == ["done", "failed"]
    assert list(named["id"]) == ["r0", "r1"]


@pytest.mark.parametrize("reader", [mlflow.read_export, optuna_study.read_export])
def test_another_table_is_no_export(reader):
    table = pd.DataFrame({"run_id": ["a"], "lr": [1e-3], "value": [3.0], "state": ["finished"]})
    assert reader(table, Path()) is None and ray_tune.read_export(table, Path()) is None


def test_categorical_parameters_are_their_choices(files):
    for file in ("optuna-5.0.0.db", "optuna-2.10.1.db", "optuna.log"):
        runs = {run.id: run for run in optuna_study.read(files / file)}
        first, last = runs["sweep/0"], runs["sweep/7"]
        assert (first.config["width"], last.config["width"]) == ("small", "large")
        assert first.history["loss"][-1][0] == 200 and len(first.history["loss"]) == 3
        assert first.config["study"] == "sweep" and first.counts_calls


def test_the_value_of_a_study_that_maximizes_is_no_loss(files, tmp_path):
    """Alone it has no column `loss`; beside another study its trials are named one by one."""
    lines = (files / "optuna.log").read_text().splitlines()
    study = next(line for line in lines if '"study_name":"score"' in line)
    start = lines.index(study)
    first = sum(
        json.loads(line)["op_code"] == optuna_journal.CREATE_TRIAL for line in lines[:start]
    )
    moved = [
        re.sub(r'"trial_id":(\d+)', lambda m: f'"trial_id":{int(m[1]) - first}', line)
        for line in lines[start:]
    ]
    path = tmp_path / "score.log"
    path.write_text("\n".join(moved).replace('"study_id":1', '"study_id":0'))
    table, _ = importing.trials(path)
    assert "loss" not in table and len(table) == 2
    assert "'score' maximizes its objective" in table.attrs["absent"]["loss"]
    both, _ = importing.trials(files / "optuna.log")
    scores = both[both["study"] == "score"]
    assert scores["message"].str.contains("maximizes its objective").all() and len(scores) == 2


def test_the_intermediate_values_are_the_loss_only_if_they_end_at_the_value():
    study = optuna_storage.OptunaStudy("s", ["MINIMIZE"])
    same = optuna_storage.OptunaTrial(0, "COMPLETE", values=[3.0], intermediate={1: 4.0, 2: 3.0})
    best = optuna_storage.OptunaTrial(1, "COMPLETE", values=[2.5], intermediate={1: 2.5, 2: 3.0})
    study.trials = [same, best]
    first, second = optuna_study._to_runs(study)
    assert first.history == {"loss": [(1, 4.0), (2, 3.0)]}
    assert second.history == {"loss": [(2, 2.5)], "intermediate": [(1, 2.5), (2, 3.0)]}


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"values_0": [1.0, 2.0], "values_1": [3.0, 4.0]}, "2 objectives, `values_0` and"),
        ({"value": [-3.0, -3.1]}, "negative in 2 trials, so that it is no loss"),
    ],
)
def test_an_objective_that_may_be_no_loss_is_not_taken(columns, reason):
    table = pd.DataFrame(
        {"number": [0, 1], **columns, "datetime_start": ["-", "-"], "params_lr": [0.1, 0.2]}
    ).assign(state="COMPLETE")
    runs = optuna_study.read_export(table, Path("a.csv"))
    assert "loss" not in runs.table and reason in runs.absent["loss"]
    attributes = table.assign(user_attrs_val_loss=[3.0, 3.1])
    runs = importing.columns.name_columns(optuna_study.read_export(attributes, Path("a.csv")))
    assert list(runs.table["loss"]) == [3.0, 3.1]


def test_a_value_that_may_be_an_accuracy_is_doubted():
    table = pd.DataFrame({"number": [0], "value": [0.7], "datetime_start": ["-"], "params_lr": 0.1})
    runs = optuna_study.read_export(table.assign(state="COMPLETE"), Path("a.csv"))
    assert "if it is an accuracy" in runs.warnings[0]


def test_a_journal_whose_last_line_a_crash_cut_off(files, tmp_path):
    text = (files / "optuna.log").read_text()
    (tmp_path / "cut.journal").write_text(text[:-30])
    assert optuna_journal.is_journal(tmp_path / "cut.journal")
    assert len(importing.trials(tmp_path / "cut.journal")[0]) == 14
    (tmp_path / "bad.log").write_text(text.replace('"trial_id":3', '"trial_id":"x"', 1))
    with pytest.raises(UserError, match="must be an operation of Optuna's journal"):
        optuna_study.read(tmp_path / "bad.log")


def ray_run(folder, iterations, **others):
    """A folder of a trial as Ray writes it."""
    folder.mkdir(parents=True)
    lr = others.pop("lr", 0.1)
    (folder / "params.json").write_text(json.dumps({"lr": lr}))
    rows = [
        {"loss": 5.0 - i, "training_iteration": i, "trial_id": folder.name, "done": False}
        for i in range(1, iterations + 1)
    ]
    rows[-1] |= others
    (folder / "result.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_trial_stopped_by_a_scheduler_is_unfinished(tmp_path):
    """A function that returns leaves `done` false. The criterion of a trial is its own plan."""
    ray_run(tmp_path / "returned", 4)
    ray_run(tmp_path / "longest", 8, done=True)
    ray_run(tmp_path / "stopped", 2, done=True)
    ray_run(tmp_path / "planned", 3, done=True, tokens=1000)
    states = [
        [json.dumps({"trial_id": name, "status": state, "stopping_criterion": criterion}), "{}"]
        for name, state, criterion in (
            ("returned", "TERMINATED", {}),
            ("longest", "TERMINATED", {}),
            ("stopped", "TERMINATED", {}),
            ("planned", "TERMINATED", {"tokens": 1000}),
        )
    ]
    text = json.dumps({"trial_data": states})
    (tmp_path / "experiment_state-2026-11-28.json").write_text(text)
    runs = {run.id: run for run in ray_tune.read(tmp_path)}
    assert {name: run.status for name, run in runs.items()} == {
        "returned": "done",
        "longest": "done",
        "stopped": "failed",
        "planned": "done",
    }
    assert "after 2 of 8 reports" in runs["stopped"].message
    assert ray_tune.read(tmp_path / "experiment_state-2026-11-28.json") == list(runs.values())


def test_trials_without_an_experiment_state(tmp_path):
    """An error leaves a file; a settings change is that of population-based training."""
    ray_run(tmp_path / "good", 4)
    ray_run(tmp_path / "error", 4)
    (tmp_path / "error" / "error.txt").write_text("boom")
    ray_run(tmp_path / "pbt", 4)
    file = tmp_path / "pbt" / "result.json"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {"config": {"lr": 0.1 * i}} for i, row in enumerate(rows, 1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = {run.id: run for run in ray_tune.read(tmp_path)}
    assert [runs[name].status for name in ("good", "error", "pbt")] == ["done", "failed", "failed"]
    assert "population-based training" in runs["pbt"].message


def test_reports_in_a_progress_csv(files):
    """The table has the reports of `result.json`, with nested keys joined by `/`."""
    folder = next((files / "experiment").glob("*_00000"))
    rows = [json.loads(line) for line in (folder / "result.json").read_text().splitlines()]
    (run,) = ray_tune.read(folder / "result.json")
    other = folder.parent.parent / "copy" / folder.name
    other.mkdir(parents=True)
    shutil.copy(folder / "params.json", other)
    pd.json_normalize(rows, sep="/").to_csv(other / "progress.csv", index=False)
    (copy,) = ray_tune.read(other / "progress.csv")
    assert copy.config == run.config and copy.history["eval/loss"] == run.history["eval/loss"]
    (other / "progress.csv").write_text("lr,loss\n1,2\n")
    with pytest.raises(UserError, match="no column `training_iteration`"):
        ray_tune.read(other / "progress.csv")


def test_a_trainer_that_ended_after_its_last_checkpoint(files):
    """Its results give the end, its model card the lr; the others are killed or diverged.

    A Trainer logs a loss of 0 in place of NaN.
    """
    table, _ = importing.trials(files / "trainer")
    rows = table.set_index("id")
    state = json.loads((files / "trainer/ended/checkpoint-30/trainer_state.json").read_text())
    results = json.loads((files / "trainer/ended/all_results.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (30, 40)
    ended = rows.loc["ended"]
    assert (ended["steps"], ended["tokens"], ended["lr"]) == (40, 5120, 1e-3)
    assert ended["loss"] == results["eval_loss"] and ended["n_params"] == 664
    assert rows["status"].to_dict() == {
        "ended": "done",
        "killed": "failed",
        "nan": "diverged",
        "uncounted": "done",
    }
    assert rows["message"]["killed"] == "unfinished: 30 of 40 steps"
    assert rows["train/loss"]["nan"] == 0.0 and math.isnan(rows["tokens"]["uncounted"])


def test_a_trainer_that_counted_no_tokens_names_the_field(files):
    table, _ = importing.trials(files / "trainer/uncounted")
    assert "tokens" not in table
    assert re.search(
        r"`num_input_tokens_seen` is 0 .* include_num_input_tokens_seen=True.*--tokens-per-step",
        table.attrs["absent"]["tokens"],
    )
    table, _ = importing.trials(files / "trainer/uncounted", tokens_per_step=128)
    assert list(table["tokens"]) == [128 * 40]


def write_state(folder, lines, step, planned, **others):
    folder.mkdir(parents=True)
    state = {"global_step": step, "max_steps": planned, "log_history": lines, **others}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def test_the_state_in_the_root_of_a_run_is_later_than_its_checkpoints(tmp_path):
    lines = [{"step": s, "loss": 5 - s / 100, "learning_rate": 1 / s} for s in range(1, 101)]
    write_state(tmp_path / "a/checkpoint-9", lines[:9], 9, 100)
    write_state(tmp_path / "a/checkpoint-80", lines[:80], 80, 100)
    (run,) = trainer.read(tmp_path)
    assert run.row()["global_step"] == 80 and run.id == "a"
    (tmp_path / "a/trainer_state.json").write_text(
        json.dumps({"global_step": 100, "max_steps": 100, "log_history": lines})
    )
    (run,) = trainer.read(tmp_path)
    assert run.row()["global_step"] == 100 and run.row()["train/loss"] == 4.0


def test_early_stopping_is_not_the_end_of_the_schedule(tmp_path):
    """The results exist, and their epoch says that training returned before its planned end."""
    lines = [{"step": s, "epoch": s / 50, "eval_loss": 5 - s / 100} for s in (20, 40)]
    write_state(tmp_path / "a/checkpoint-40", lines, 40, 100, epoch=0.8)
    results = {"epoch": 0.9, "train_runtime": 1.0, "eval_loss": 4.5}
    (tmp_path / "a/all_results.json").write_text(json.dumps(results))
    (run,) = trainer.read(tmp_path)
    assert run.history["global_step"][-1] == (45, 45)
    table, _ = importing.trials(tmp_path)
    assert list(table["status"]) == ["failed"]
    assert list(table["message"]) == ["unfinished: 45 of 100 steps"]


@pytest.mark.parametrize("norms", [(1.0, math.nan, math.nan), (1.0, math.nan, 1.0), (1.0, 1.0)])
def test_gradients_that_are_nan_at_the_end_are_a_divergence(tmp_path, norms):
    lines = [{"step": i, "loss": 1.0, "grad_norm": norm} for i, norm in enumerate(norms, 1)]
    write_state(tmp_path / "a", lines, len(norms), len(norms))
    (run,) = trainer.read(tmp_path)
    assert (run.status == "diverged") == (len(norms) > 2 and math.isnan(norms[-1]))


def test_one_named_data_set_is_the_evaluation(tmp_path):
    lines = [{"step": 1, "loss": 4.0, "eval_c4_loss": 3.0}]
    write_state(tmp_path / "a", lines, 1, 1)
    table, notes = importing.trials(tmp_path)
    assert list(table["loss"]) == [3.0] and any("`eval_c4_loss`" in note for note in notes)


def llama_factory(folder, starts, total=100):
    """A `trainer_log.jsonl`: lines of training, and of evaluation at the end of each start."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for first, last, lr in starts:
        for step in range(first, last + 1, 10):
            common = {"current_steps": step, "total_steps": total, "epoch": step / total}
            decay = min(1, (total - step) / 80)
            more = {"percentage": 100 * step / total, "elapsed_time": "0:00:10", "total_tokens": 0}
            lines.append(common | {"loss": 5 - step / 100, "lr": lr * decay} | more)
        lines.append(common | {"eval_loss": 4 - last / 100} | more)
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_logs_of_llama_factory(tmp_path):
    """Peak lr, evaluation, an unfinished run, and a second start in the same folder."""
    llama_factory(tmp_path / "good", [(10, 100, 0.01)])
    llama_factory(tmp_path / "killed", [(10, 40, 0.01)])
    llama_factory(tmp_path / "again", [(10, 100, 0.5), (10, 100, 0.02)])
    llama_factory(tmp_path / "resumed", [(10, 60, 0.03), (50, 100, 0.03)])
    table, _ = importing.trials(tmp_path)
    rows = table.set_index("id")
    assert rows["status"].to_dict() == {
        "again": "done",
        "good": "done",
        "killed": "failed",
        "resumed": "done",
    }
    assert rows["lr"].to_dict() == {"again": 0.02, "good": 0.01, "killed": 0.01, "resumed": 0.03}
    assert list(rows["loss"][["good", "resumed"]]) == [3.0, 3.0]
    assert "`total_tokens` is 0" in table.attrs["absent"]["tokens"]


def test_a_foreign_trainer_log_is_refused(tmp_path):
    (tmp_path / "trainer_log.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match="`current_steps`"):
        trainer.read_log(tmp_path / "trainer_log.jsonl")


@pytest.mark.parametrize("warmup", [5, 12, 20, 33])
@pytest.mark.parametrize("every", [1, 5, 10, 25])
@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_the_bound_on_a_missed_peak(warmup, every, shape):
    """The true peak 1 is between the largest logged value and the bound on it.

    The peak may also lie after the largest value logged, when that is still in the warmup.
    """

    def lr(step):
        if step <= warmup:
            return step / warmup
        done = (step - warmup) / (100 - warmup)
        shapes = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1}
        return shapes[shape]

    points = [(step, lr(step)) for step in range(every, 101, every)]
    top, largest = max(points, key=lambda point: (point[1], -point[0]))
    factor = missed_peak(points)
    assert factor >= 1.0
    if top >= warmup:
        assert largest * factor >= 1 - 1e-12
        assert shape != "constant" or factor == 1.0


def test_a_sparse_log_is_doubted_unless_a_setting_gives_the_lr(tmp_path):
    lines = [{"step": s, "learning_rate": 0.01 * (1 - s / 100), "eval_loss": 3.0} for s in (50, 99)]
    write_state(tmp_path / "a", lines, 100, 100)
    runs = to_table(trainer.read(tmp_path))
    assert re.search("peak may be up to 2 times the largest logged", runs.warnings[0])
    (tmp_path / "a/README.md").write_text("### Training hyperparameters\n\n- learning_rate: 0.01\n")
    assert to_table(trainer.read(tmp_path)).warnings == []
    assert list(importing.trials(tmp_path)[0]["lr"]) == [0.01]
