"""Runs of W&B: offline logs of the real library, its CSV exports, and its API."""

import csv
import json
import math
import shutil
import sys
import types
from pathlib import Path

import pandas as pd
import pytest

from scaletune import importing
from scaletune.errors import UserError
from scaletune.importing import wandb, wandb_api, wandb_export
from scaletune.importing.run import CALLS, STEPS, to_table
from scaletune.importing.wandb import NO_EXIT

ENDS = Path(__file__).parent / "fixtures" / "wandb_ends"


def runs_by_id(path=ENDS):
    return {row["id"]: row for row in to_table(wandb.read(path)).table.to_dict("records")}


# --- offline logs


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("finished", "done", ""),
        ("crashed", "failed", "unfinished: its exit code is 1"),
        ("preempted", "failed", "unfinished: its state is 'preempted'"),
        ("diverged", "diverged", "its last `val/loss` is not a finite number"),
        ("resumed", "done", ""),  # its first part crashed
        ("old-finished", "diverged", "its last `val/loss` is not a finite number"),
        ("old-crashed", "diverged", "its last `val/loss` is not a finite number"),
    ],
)
def test_how_an_offline_run_ended(name, status, message):
    row = runs_by_id()[name]
    assert (row["status"], row["message"]) == (status, message)


def test_the_exit_code_of_an_old_version():
    ends = {run.id: (run.status, run.message) for run in wandb.read(ENDS / "old")}
    assert ends["old-finished"] == ("done", "")
    assert ends["old-crashed"] == ("failed", "unfinished: its exit code is 1")


def test_a_log_without_an_exit_record_is_of_an_unfinished_run(tmp_path):
    content = (ENDS / "0-finished.wandb").read_bytes()
    for size in (0, 7, len(content) // 2, len(content) - 20):  # 7: what a killed run may leave
        (tmp_path / f"run-{size}.wandb").write_bytes(content[:size])
    runs = wandb.read(tmp_path)
    assert [(run.status, run.message) for run in runs] == [("failed", NO_EXIT)] * len(runs)
    assert [run.id for run in runs] == ["0", "7", "finished"]  # of two copies the longer one


def test_the_iteration_has_priority_over_the_counter_of_log_calls():
    rows = runs_by_id()
    assert rows["finished"]["iter"] == 300 and rows["finished"][CALLS] == 3
    assert math.isnan(rows["finished"][STEPS])
    assert rows["explicit"][STEPS] == 300 and math.isnan(rows["explicit"][CALLS])


def test_rows_without_numbers_do_not_make_the_counter_the_iteration():
    assert wandb.counts_calls([0, 1, 2, 3]) and wandb.counts_calls([5, 6, 7])
    assert not wandb.counts_calls([0, 10, 20]) and not wandb.counts_calls([5000])
    assert wandb.counts_calls([0]) and not wandb.counts_calls([])


def test_a_resumed_run_is_one_run_with_its_whole_history(tmp_path):
    """Offline, W&B counts from 0 again: the peak lr of the first part must survive."""
    row = runs_by_id()["resumed"]
    assert row["train/lr"] == 1e-3 and row["val/loss"] == pytest.approx(2.7)
    assert row["iter"] == 600 and row[CALLS] == 7
    shutil.copy(ENDS / "6-resumed.wandb", tmp_path / "a.wandb")  # the earlier part comes last
    shutil.copy(ENDS / "5-resumed.wandb", tmp_path / "b.wandb")
    shutil.copy(ENDS / "5-resumed.wandb", tmp_path / "c.wandb")  # a copy changes nothing
    again = runs_by_id(tmp_path)["resumed"]
    assert {k: v for k, v in again.items() if v == v} == {k: v for k, v in row.items() if v == v}


def test_a_run_that_starts_over_replaces_its_first_log():
    first, second = (wandb.read_log(ENDS / name) for name in ("5-resumed.wandb",) * 2)
    second.run.history["train/lr"] = [(step, 2e-3) for step in range(4)]
    wandb._continue_counters([first, second])
    first.run.merge(second.run)
    assert first.run.row()["train/lr"] == 2e-3 and first.run.row()[CALLS] == 3


def test_a_summary_adds_what_was_never_logged():
    row = runs_by_id()["finished"]
    assert row["best/loss"] == 1.5 and row["val/loss"] == pytest.approx(3.7)


def test_a_setting_that_yaml_reads_as_text_beats_a_decayed_history():
    table, _ = importing.trials(ENDS / "0-finished.wandb")
    assert table["lr"].tolist() == [1e-3]


# --- CSV exports

RUNS = [("a - 1", 1e-3, 3.2), ("a - 2", 2e-3, 3.0), ("a - 3", 4e-3, 3.1)]
SIZE = {"n_params": 1e6, "tokens": 2e7}


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([header, *rows])
    return path


def write_runs(path, extra=(), values=lambda i: (), names=None):
    header = ["Name", "lr", "n_params", "tokens", *extra]
    names = names or [name for name, *_ in RUNS]
    rows = [
        [name, lr, 1e6, 2e7, *values(i)]
        for i, (name, (_, lr, _)) in enumerate(zip(names, RUNS, strict=True))
    ]
    return write(path, header, rows)


def write_chart(path, axis="Step", spread=True, ends=None, metric="val/loss", names=None):
    names = names or [name for name, *_ in RUNS]
    ends = ends or [loss for *_, loss in RUNS]
    header, last = [axis], []
    for name, end in zip(names, ends, strict=True):
        sides = ("", "__MIN", "__MAX") if spread else ("",)
        header += [f"{name} - {metric}{side}" for side in sides]
        last += [end] * len(sides)
    first = [5.0] * len(last)
    return write(path, header, [[100, *first], [1000, *last], [1100, *[""] * len(last)]])


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize(
    ("extra", "values"),
    [((), None), (("State",), "finished"), (("Runtime",), "300"), (("_step",), "9"), (("ID",), "")],
)
def test_a_chart_is_joined_by_name(tmp_path, spread, extra, values):
    """Names may contain the ` - ` that separates the metric, and end in spaces."""
    runs = write_runs(
        tmp_path / "runs.csv",
        extra,
        lambda i: () if values is None else (values or f"id{i}",),
        ["a - 1 ", "a - 2", "a - 3"],
    )
    table, _ = importing.trials([runs, write_chart(tmp_path / "chart.csv", spread=spread)])
    assert table["loss"].tolist() == [3.2, 3.0, 3.1] and table["lr"].tolist() == [1e-3, 2e-3, 4e-3]
    assert set(table["status"]) == {"done"}


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_curve_that_ends_in_no_number_has_diverged(tmp_path, word):
    runs = write_runs(tmp_path / "runs.csv", ("State",), lambda i: ("finished",))
    chart = write_chart(tmp_path / "chart.csv", ends=[3.2, word, 3.1])
    table, _ = importing.trials([runs, chart])
    assert table["status"].tolist() == ["done", "diverged", "done"]
    assert "`val/loss` is not a finite number" in table["message"][1]


def test_repeated_names_in_a_chart_are_refused(tmp_path):
    names = ["same", "same", "other"]
    runs = write_runs(tmp_path / "runs.csv", ("State",), lambda i: ("finished",), names)
    with pytest.raises(UserError, match=r"names repeat in the chart .*: 2 curves are named 'same'"):
        importing.trials([runs, write_chart(tmp_path / "chart.csv", names=names)])
    mangled = tmp_path / "mangled.csv"  # as pandas writes what it read
    pd.read_csv(tmp_path / "chart.csv").to_csv(mangled, index=False)
    with pytest.raises(UserError, match="names repeat in the chart"):
        importing.trials([runs, mangled])
    one = write_chart(tmp_path / "one.csv", names=["same", "b", "other"])
    three = write_runs(tmp_path / "b.csv", ("State",), lambda i: ("finished",), ["same", "b", "b"])
    with pytest.raises(UserError, match=r"'other' of `one.csv` is not"):
        importing.trials([three, one])
    two = write_runs(tmp_path / "c.csv", ("ID",), lambda i: (f"i{i}",), ["same", "same", "b"])
    short = write(tmp_path / "d.csv", ["Step", "same - val/loss"], [[1, 3.0]])
    with pytest.raises(UserError, match="names repeat: 2 runs are named 'same'"):
        importing.trials([two, short])


@pytest.mark.parametrize("group", ["lr: {}", "Group: small-{}", "optim.lr: {}"])
def test_a_grouped_chart_is_refused(tmp_path, group):
    names = [group.format(i) for i in range(3)]
    with pytest.raises(UserError, match=r"grouped by `.*`, and each curve is the mean .*: ungroup"):
        importing.trials([write_chart(tmp_path / "chart.csv", names=names)])


def test_the_peak_of_a_charted_learning_rate(tmp_path):
    """A second chart with lr: its peak is taken, from the upper end where points are averaged."""
    runs = write(
        tmp_path / "runs.csv",
        ["Name", "State", "n_params", "tokens"],
        [[name, "finished", 1e6, 2e7] for name, *_ in RUNS],
    )
    header, rows = ["Step"], [[0], [100], [1000]]
    for name, lr, _ in RUNS:
        header += [f"{name} - train/lr{side}" for side in ("", "__MIN", "__MAX")]
        for row, share in zip(rows, (0.1, 0.9, 0.05), strict=True):
            row += [share * lr, 0.0, 1.0 * lr if share == 0.9 else share * lr]
    rates = write(tmp_path / "rates.csv", header, rows)
    for sources in ([runs, write_chart(tmp_path / "chart.csv"), rates], [rates, runs]):
        table, _ = importing.trials(sources)
        assert table["lr"].tolist() == pytest.approx([1e-3, 2e-3, 4e-3])


def test_the_x_axis_of_a_chart(tmp_path):
    runs = write(
        tmp_path / "runs.csv",
        ["Name", "State", "lr", "n_params", "token_budget"],
        [[name, "finished", lr, 1e6, 2e7] for name, lr, _ in RUNS],
    )
    header = ["train/tokens"]
    for name, *_ in RUNS:
        header += [f"{name} - _step", f"{name} - val/loss"]
    rows = [[1e7, 5, 4.0, 5, 4.0, 5, 4.0], [2e7, 9, 3.2, 9, 3.0, "", ""]]
    chart = write(tmp_path / "chart.csv", header, rows)
    table, _ = importing.trials([runs, chart])
    assert table["tokens"].tolist() == [2e7, 2e7, 1e7]
    assert table["status"].tolist() == ["done", "done", "failed"]  # half of its budget


def test_tokens_of_a_chart_and_of_its_runs_must_agree(tmp_path):
    runs = write_runs(tmp_path / "runs.csv", ("State",), lambda i: ("finished",))
    chart = write_chart(tmp_path / "chart.csv", axis="tokens")  # 1,000 of 2e7: cut off
    table, _ = importing.trials([runs, chart])
    assert set(table["status"]) == {"failed"} and set(table["tokens"]) == {1000}
    runs = write(
        tmp_path / "few.csv",
        ["Name", "lr", "n_params", "tokens", "State"],
        [[name, lr, 1e6, 500, "finished"] for name, lr, _ in RUNS],
    )
    with pytest.raises(UserError, match="`tokens` must be the same in the chart and"):
        importing.trials([runs, chart])


def test_averaged_points_and_missing_runs_are_named(tmp_path):
    runs = write_runs(tmp_path / "runs.csv", ("State",), lambda i: ("finished",))
    header = ["Step"] + [f"a - 1 - val/loss{side}" for side in ("", "__MIN", "__MAX")]
    chart = write(tmp_path / "chart.csv", header, [[1, 3.0, 2.9, 3.1]])
    warnings = importing.trials([runs, chart])[0].attrs["warnings"]
    assert any("is an average" in text and "6.7%" in text for text in warnings)
    assert any("2 of 3 runs are not in the chart" in text for text in warnings)


def test_last_values_are_told_from_settings_by_the_alphabetical_order(tmp_path):
    """The column order of an export in a public repository."""
    header = ["Name", "Agent", "State", "Notes", "User", "Tags", "Created", "Runtime", "Sweep"]
    settings = ["batch_size", "lr", "n_params", "num_workers"]
    last = ["avg_epoch_loss", "epoch", "epoch/number", "epoch_time", "learning_rate", "val_loss"]
    table = pd.DataFrame([[0] * 19], columns=[*header, *settings, *last])
    table["State"] = "Finished"
    runs = wandb_export.read(table, Path("missing.csv"))
    assert runs.history == frozenset(last) and not runs.origin_known
    table = table[[*header, *sorted([*settings, *last])]]  # no break: only losses are sure
    assert wandb_export.read(table, Path("missing.csv")).history == {"avg_epoch_loss", "val_loss"}


def test_only_a_last_learning_rate_is_refused(tmp_path):
    header = ["Name", "State", "User", "Created", "Runtime", "n_params", "tokens", "lr", "val/loss"]
    rows = [[n, "finished", "me", "now", 9, 1e6, 2e7, lr, loss] for n, lr, loss in RUNS]
    with pytest.raises(UserError, match=r"`lr` must be the peak .* is the last logged value"):
        importing.trials(write(tmp_path / "runs.csv", header, rows))
    by_hand = write(
        tmp_path / "b.csv", ["Name", "State", *header[5:]], [r[:2] + r[5:] for r in rows]
    )
    assert importing.trials(by_hand)[0]["lr"].tolist() == [1e-3, 2e-3, 4e-3]


@pytest.mark.parametrize(
    ("word", "status"),
    [
        *[("Finished", "done"), ("CRASHED", "failed"), ("Killed", "failed")],
        *[("preempted", "failed")],
        *[("running", "failed"), ("Failed", "failed"), ("", "failed")],
    ],
)
def test_states_in_any_capitals(tmp_path, word, status):
    runs = write_runs(
        tmp_path / "runs.csv", ("State", "val_loss"), lambda i: (word if i else "finished", 3.0)
    )
    assert importing.trials(runs)[0]["status"].tolist() == ["done", status, status]


def test_a_loss_of_nan_is_a_divergence_and_an_empty_one_is_not(tmp_path):
    losses = ["NaN", "3.0", ""]
    runs = write_runs(
        tmp_path / "runs.csv", ("State", "val_loss"), lambda i: ("finished", losses[i])
    )
    assert importing.trials(runs)[0]["status"].tolist() == ["diverged", "done", "done"]


def test_repeated_names_of_runs(tmp_path):
    runs = write_runs(tmp_path / "runs.csv", ("State",), lambda i: ("finished",), ["x", "x", "y"])
    table, _ = importing.trials(runs)
    assert table["id"].tolist() == ["x", "x#2", "y"]
    assert any(
        "names repeat in `runs.csv`: 2 runs are named 'x'" in w for w in table.attrs["warnings"]
    )
    runs = write_runs(tmp_path / "ids.csv", ("ID",), lambda i: (f"id{i}",), ["x", "x", "y"])
    table, _ = importing.trials(runs)
    assert table["id"].tolist() == ["id0", "id1", "id2"] and not table.attrs["warnings"]


def test_the_table_of_the_guide_to_the_api(tmp_path):
    """Cells hold dictionaries as Python prints them."""
    rows = [
        {
            "summary": {"_step": 9, "val/loss": loss, "train/lr": lr / 10},
            "config": {"lr": lr, "model": {"n_params": 1000000}, "tokens": 2e7},
            "name": name,
        }
        for name, lr, loss in [*RUNS, ("nan", 8e-3, math.nan)]
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "project.csv")
    table, _ = importing.trials(tmp_path / "project.csv")
    assert table["lr"].tolist() == [1e-3, 2e-3, 4e-3, 8e-3]
    assert table["loss"].tolist()[:3] == [3.2, 3.0, 3.1] and set(table["n_params"]) == {1e6}
    assert table["status"].tolist() == ["done"] * 3 + ["diverged"]
    (tmp_path / "bad.csv").write_text('name,config,summary\na,"__import__(1)",{}\n')
    with pytest.raises(UserError, match="`config` of the run 'a' must be a dictionary"):
        importing.trials(tmp_path / "bad.csv")


def test_the_history_of_one_run(tmp_path):
    table = pd.DataFrame(
        {"_step": [20, 0, 10], "val/loss": [None, 4.0, "NaN"], "lr": [1e-4, 1e-3, 5e-4]}
    )
    table.to_csv(tmp_path / "one.csv", index=False)
    (row,) = importing.trials(tmp_path / "one.csv")[0].to_dict("records")
    assert row["id"] == "one" and row["lr"] == 1e-3 and row["status"] == "diverged"
    pd.concat([table, table]).to_csv(tmp_path / "two.csv", index=False)
    with pytest.raises(UserError, match="`_step` repeats: add a column `run_id`"):
        importing.trials(tmp_path / "two.csv")


def test_histories_of_single_runs_are_joined_to_their_table(tmp_path):
    runs, histories = write_runs(tmp_path / "runs.csv", ("State",), lambda i: ("finished",)), []
    for name, lr, loss in RUNS:
        table = pd.DataFrame({"_step": [0, 9], "val/loss": [5.0, loss], "train/lr": [lr, lr / 10]})
        table.to_csv(tmp_path / f"{name}.csv", index=False)
        histories.append(tmp_path / f"{name}.csv")
    table, _ = importing.trials([*histories, runs])
    assert table["loss"].tolist() == [3.2, 3.0, 3.1] and table["lr"].tolist() == [1e-3, 2e-3, 4e-3]
    assert table.attrs["warnings"] == []


def test_a_curve_that_ends_early_is_of_an_unfinished_run(tmp_path):
    """The order of the rows does not matter."""
    runs = write_runs(tmp_path / "runs.csv", ("Runtime",), lambda i: ("300",))
    header = ["Step", *(f"{name} - val/loss" for name, *_ in RUNS)]
    rows = [[1000, 3.2, "", 3.1], [100, 5.0, 5.0, 5.0], [400, 4.0, 2.0, 4.0]]
    table, _ = importing.trials([runs, write(tmp_path / "chart.csv", header, rows)])
    assert table["status"].tolist() == ["done", "failed", "done"]
    assert table["loss"].tolist() == [3.2, 2.0, 3.1]
    assert "it ends at step 400" in table["message"][1]


# --- the API


class FakeRun:
    """A run as `wandb.apis.public.Run` has it."""

    def __init__(self, run_id, peak, loss, state="finished", name="same", lines=3, **config):
        self.id, self.name, self.state, self.historyLineCount = run_id, name, state, lines
        self.config = {"n_params": 1e6, "tokens": 2e7, "_wandb": {}, **config}
        self.summary_metrics = {"_step": 20, "val/loss": loss, "train/lr": peak / 10, "iter": 200}
        self.curve = [(0, peak / 2), (10, peak), (20, peak / 10)]
        self.scans = []

    def scan_history(self, keys):
        self.scans.append(keys[0])
        return [{"_step": step, keys[0]: value} for step, value in self.curve]


@pytest.fixture
def project(monkeypatch):
    """A `wandb` module with one project, which keeps what it was asked for."""
    fake = types.ModuleType("wandb")
    fake.runs = [
        FakeRun("a", 1e-3, 3.2),
        FakeRun("b", 2e-3, "NaN"),
        FakeRun("c", 4e-3, 3.1, "crashed"),
        FakeRun("d", 9.0, 3.0, lr="5e-3", lines=21),
    ]
    fake.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))

    class Api:
        def runs(self, path, filters=None, order="", per_page=50, lazy=True):
            fake.asked = {"path": path, "filters": filters, "lazy": lazy}
            if path != "me/proj":
                raise ValueError(f"Could not find project {path}")
            return fake.runs

    fake.Api = Api
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_runs_of_a_server(project):
    table, _ = importing.trials("wandb://me/proj?state=finished")
    assert table["id"].tolist() == ["a", "b", "c", "d"]
    assert table["lr"].tolist() == [1e-3, 2e-3, 4e-3, 5e-3]  # peaks of histories, and a setting
    assert table["status"].tolist() == ["done", "diverged", "failed", "done"]
    assert [run.scans for run in project.runs] == [["train/lr"]] * 3 + [[]]
    assert project.asked == {"path": "me/proj", "filters": {"state": "finished"}, "lazy": False}
    assert [run.counts_calls for run in wandb_api.read("wandb:/me/proj")] == [False] * 3 + [True]


def test_the_last_loss_is_downloaded_if_the_summary_has_its_minimum(project):
    run = FakeRun("m", 1e-3, {"min": 1.0}, lr=1e-3)
    run.curve = [(0, 4.0), (20, 3.3)]
    project.runs = [run]
    assert importing.trials("wandb://me/proj")[0]["loss"].tolist() == [3.3]


def test_the_conditions_of_an_address():
    url = (
        "wandb://me/proj?state=finished,crashed&tags=x&name=^gpt.*&created>2025-01-31"
        "&config.model=gpt&config.width>=512&summary.val/loss<3&group=a%20b&config.tied=true"
    )
    assert wandb_api.parse(url) == (
        "me/proj",
        {
            "$and": [
                {"state": {"$in": ["finished", "crashed"]}},
                {"tags": {"$in": ["x"]}},
                {"display_name": {"$regex": "^gpt.*"}},
                {"createdAt": {"$gt": "2025-01-31"}},
                {"config.model": "gpt"},
                {"config.width": {"$gte": 512}},
                {"summary_metrics.val/loss": {"$lt": 3}},
                {"group": "a b"},
                {"config.tied": True},
            ]
        },
    )
    json.dumps(wandb_api.parse(url))
    assert wandb_api.parse("wandb://me/proj") == ("me/proj", {})
    with pytest.raises(UserError, match=r"must be KEY=VALUE, but got `stat=x` \(nearest: 'state'"):
        wandb_api.parse("wandb://me/proj?stat=x")
    with pytest.raises(UserError, match="must be wandb://entity/project"):
        wandb_api.parse("wandb://me")


def test_runs_of_another_sweep_are_left_out(project):
    for run, sweep in zip(project.runs, "xxyy", strict=True):
        run.sweep_name = sweep
    assert [run.id for run in wandb_api.read("wandb://me/proj?sweep=y")] == ["c", "d"]


def test_errors_of_the_api_are_one_sentence(project, monkeypatch):
    with pytest.raises(UserError, match="`me/none` must exist and be visible to you"):
        wandb_api.read("wandb://me/none")
    project.runs = []
    with pytest.raises(UserError, match="no run of `me/proj` meets the conditions"):
        wandb_api.read("wandb://me/proj?state=failed")

    def refuse():
        raise project.errors.Error("No API key configured. Use `wandb login` to log in.")

    project.Api = refuse
    with pytest.raises(UserError, match=r"W&B must be logged in .*: run `wandb login`"):
        wandb_api.read("wandb://me/proj")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"needs wandb: pip install 'scaletune\[track\]'"):
        wandb_api.read("wandb://me/proj")
