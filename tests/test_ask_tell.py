"""Ask and tell: trials that others train, from Python and from the command line."""

import io
import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

import scaletune as st
from scaletune import cli
from scaletune.errors import UserError
from scaletune.recipe import points, validate_recipe
from scaletune.records import Store, read_jsonl, read_store
from scaletune.sweeping import lockfile, tasks, train_all
from scaletune.transferring.formats.recipe import toml

LR = [2.0**-k for k in range(12, 3, -1)]
BASE = {
    "model": {"width": 64, "n_params": 50_000},
    "budget": {"tokens": 1_000_000, "batch_tokens": 1000},
    "axes": {"lr": LR},
}
EXTERNAL = BASE | {"trainer": {"external": True}}


def basin(point, best=2.0**-8):
    """A closed-form loss with its minimum at lr 2**-8."""
    return 3.0 * math.exp(0.03 * math.log(point["lr"] / best) ** 2 / 2)


def recipe(**settings):
    return validate_recipe(EXTERNAL | settings, "mine")


def answer_all(search, n=1, order=lambda handed: handed):
    """Asks for `n` trials at a time and answers them; the learning rates in the order of asking."""
    rates = []
    while handed := search.ask(n):
        rates += [point["lr"] for point in handed]
        for point in order(handed):
            search.tell(point, loss=basin(point))
    return rates


def test_a_search_finds_what_a_sweep_with_the_same_function_finds(tmp_path):
    settings = {"search": {"kind": "basin", "wave": 2}, "engine": {"workers": 1}}
    swept = st.sweep(recipe(**settings), out=tmp_path / "a", train=lambda trial: basin(trial))
    search = st.Search(recipe(**settings), out=tmp_path / "b")
    answer_all(search, n=2)
    table = search.trials()
    columns = ["lr", "loss", "n_params", "tokens", "batch_tokens", "flops", "status", "width"]
    assert table[columns].equals(swept[columns]) and 2 < len(table) < len(LR)
    assert search.finished and search.ask(5) == []
    assert (tmp_path / "a/sweeps/mine.search.txt").read_text().splitlines() == search.notes
    assert sorted(path.name for path in tmp_path.glob("b/**/*")) == [
        *("mine.db", "mine.jsonl", "sweeps"),
    ]


@pytest.mark.parametrize(
    "search",
    [
        {"kind": "basin", "wave": 3},
        {"kind": "joint", "wave": 3},
        {"kind": "optuna", "budget": 6, "wave": 3},
        {"kind": "pareto", "budget": 6, "wave": 3},
    ],
    ids=lambda search: search["kind"],
)
def test_the_order_of_answers_and_new_processes_change_nothing(search, tmp_path):
    pytest.importorskip({"optuna": "optuna", "pareto": "sklearn"}.get(search["kind"], "numpy"))
    whole = st.Search(recipe(search=search), out=tmp_path / "a")
    answer_all(whole, n=10)
    handed, rates = [], []
    while True:  # each step reads everything anew, and the last trial is answered first
        step = st.Search(recipe(search=search), out=tmp_path / "b")
        if point := next(iter(step.ask()), None):
            rates.append(point["lr"])
            handed.append(point)
        elif handed:
            point = handed.pop()
            step.tell(point.id, loss=basin(point))
        else:
            break
    assert step.finished and len(set(rates)) == len(rates)
    table = step.trials()
    assert table[["id", "loss"]].equals(whole.trials()[["id", "loss"]])


def test_a_point_says_what_the_recipe_states(tmp_path):
    settings = {"my": {"dropout": 0.1}, "parametrization": {"base_width": 32}, "seed": 3}
    (point,) = st.Search(recipe(**settings, optimizer={"beta2": 0.9}), out=tmp_path).ask()
    assert point["optimizer.lr"] == point["lr"] == LR[0]
    assert point.settings.keys() >= {"my.dropout", "optimizer.beta2", "steps", "lr.hidden", "width"}
    ours = {
        "depth",
        "weight_decay",
        "model.depth",
        "schedule.kind",
        "eps.hidden",
        "init_std.hidden",
    }
    assert not point.settings.keys() & ours
    assert (point.seed, point.command, point.plan, point.env) == (3, None, None, {})
    assert point.run_dir == str(tmp_path / "runs" / point.id)
    with pytest.raises(KeyError, match="nearest: 'lr'"):
        point["l"]


# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"loss": 2.5}, ("done", 2.5)),
        ({"loss": 2.5, "tokens": 1e6, "seconds": 9}, ("done", 2.5)),
        ({"loss": 2.5, "tokens": 990_000}, ("done", 2.5)),
        ({"loss": math.nan}, ("diverged", None)),
        ({"loss": math.inf, "tokens": 1e5}, ("diverged", None)),
        ({"loss": "nan"}, ("diverged", None)),
        ({"status": "diverged", "loss": 9.5}, ("diverged", None)),
        ({"loss": 12.0}, ("diverged", None)),  # above 2 ln 256
        ({"status": "failed", "message": "node\x1b[31m died"}, ("failed", None)),
        ({"status": "stopped", "loss": 3.0, "tokens": 1e5}, ("stopped", None)),
        ({"loss": 2.5, "tokens": 1e5}, ("running", None)),
        ({"train_loss": 2.5, "tokens": 1e6}, ("running", None)),
        ({"loss": 2.5, "status": "running"}, ("running", None)),
    ],
)
def test_the_status_of_a_result(values, expected, tmp_path):
    search = st.Search(recipe(data={"vocab_size": 256}), out=tmp_path)
    (point,) = search.ask()
    answer = search.tell(point, **values)
    assert (answer["status"], answer["loss"]) == expected
    assert answer["stop"] == (expected[0] != "running") and answer["new"]
    assert search.tell(point, **values) == answer | {"new": False}
    record = tmp_path / "sweeps/mine.jsonl"
    if expected[0] == "running":
        assert not record.exists() and search.state().waiting == 1
    else:
        (trial,) = read_jsonl(record)
        assert (trial.status, trial.loss) == expected and trial.seconds == values.get("seconds")
        assert (trial.message == "") == (trial.status == "done") and "\x1b" not in trial.message


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"status": "done", "loss": 2.5, "tokens": 5e5}, "its last loss is at 500000 of"),
        ({"loss": 2.5, "tokens": 2e6}, "its last loss is at 2e\\+06 of `budget.tokens`"),
        ({"loss": "low"}, "`loss` must be a number, but it reported 'low'"),
        ({"loss": 2.5, "n_params": -1}, "`n_params` must be a positive number"),
        ({"loss": 2.5, "seconds": -1}, "the `seconds` of trial .* must be a number of at least 0"),
        ({"los": 2.5}, "must have a `loss`, or a `status` .* has `los` \\(nearest: 'loss'\\)"),
        ({}, "must have a `loss`, or a `status`"),
        ({"status": "finished"}, "must be one of done, diverged, stopped, failed, running"),
    ],
)
def test_a_result_that_cannot_be_is_refused(values, sentence, tmp_path):
    search = st.Search(recipe(), out=tmp_path)
    (point,) = search.ask()
    with pytest.raises(UserError, match=sentence):
        search.tell(point, **values)
    assert search.state().waiting == 1 and read_store(tmp_path / "sweeps/mine.db")[0] == []


def test_one_result_counts_and_another_needs_replace(tmp_path):
    search = st.Search(recipe(), out=tmp_path)
    (point,) = search.ask()
    search.tell(point, loss=2.9, tokens=5e5)
    search.tell(point, loss=2.5, flops=7e12, bleu=31.5)
    with pytest.raises(UserError, match=r"has loss 2\.5 and now got loss 2\.6: `--replace`"):
        search.tell(point, loss=2.6)
    with pytest.raises(UserError, match=r"has bleu 31\.5 and now got bleu 30\.0"):
        search.tell(point, loss=2.5, bleu=30.0)
    with pytest.raises(UserError, match="has status done and now got status failed"):
        search.tell(point, status="failed")
    assert search.tell(point, loss=2.7, tokens=3e5)["stop"]  # another try of a trial that is done
    (trial,) = read_jsonl(tmp_path / "sweeps/mine.jsonl")
    assert (trial.loss, trial.flops) == (2.5, 7e12)
    assert [loss for _, loss in trial.metrics["held_out"]] == [2.9, 2.5]
    assert search.tell(point, loss=2.6, replace=True)["new"]
    (trial,) = read_jsonl(tmp_path / "sweeps/mine.jsonl")
    assert (trial.loss, trial.flops, trial.n_params) == (2.6, 7e12, 50_000)


def test_a_failed_trial_is_handed_out_again_only_on_request(tmp_path):
    search = st.Search(recipe(axes={"lr": [0.01]}), out=tmp_path)
    (point,) = search.ask()
    search.tell(point, status="failed", message="disk full")
    assert search.ask() == search.ask(older_than=0) == []
    assert (search.state().failed, search.finished) == (1, False)
    (again,) = search.ask(again=True)
    assert again.id == point.id and search.state().waiting == 1
    assert search.tell(again, loss=2.5)["new"] and search.finished
    assert [trial.status for trial in read_jsonl(tmp_path / "sweeps/mine.jsonl")] == ["done"]


def test_a_pruner_answers_stop(tmp_path):
    pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    search = {"kind": "optuna", "sampler": "qmc", "pruner": "median", "budget": 6, "wave": 6}
    search = st.Search(recipe(search=search), out=tmp_path)
    handed = sorted(search.ask(6), key=basin)
    answers = [search.tell(point, loss=basin(point), tokens=5e5) for point in handed]
    assert (answers[0]["stop"], answers[-1]["stop"]) == (False, True)  # best and worst
    assert search.tell(handed[-1], status="stopped")["status"] == "stopped"


# --- several processes ----------------------------------------------------------------------------

WORKER = """
import sys, scaletune as st
search = st.Search(sys.argv[1], out=sys.argv[2])
while points := search.ask():
    print(points[0].id, flush=True)
    search.tell(points[0], loss=1 + points[0]["lr"])
"""
DYING = """
import os, signal, sys, scaletune as st
print(st.Search(sys.argv[1], out=sys.argv[2]).ask(2)[1].id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def start(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_four_processes_and_a_killed_one_lose_and_double_nothing(tmp_path):
    path = tmp_path / "mine.toml"
    axes = {"axes": {"lr": [k / 1000 for k in range(1, 15)]}}
    path.write_text(toml(recipe(**axes).dump()))
    dying = start(DYING, path, tmp_path)
    lost = dying.communicate()[0].split()
    assert dying.returncode == -signal.SIGKILL
    workers = [start(WORKER, path, tmp_path) for _ in range(4)]
    ids = [id for worker in workers for id in worker.communicate()[0].split()]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert len(set(ids)) == len(ids) == 12 and lost[0] not in ids
    search = st.Search(path, out=tmp_path)
    assert search.ask(older_than=3600) == [] and search.state().waiting == 2
    (again,) = [point for point in search.ask(5, older_than=0) if point.id == lost[0]]
    assert again.tries == 2
    assert len(read_jsonl(tmp_path / "sweeps/mine.jsonl")) == 12


def test_a_rollback_journal_serves_several_machines(tmp_path):
    """A WAL needs memory that all processes share, so it works on one machine only."""
    st.Search(recipe(), out=tmp_path).ask()
    database = tmp_path / "sweeps/mine.db"
    with closing(sqlite3.connect(database)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    Store(database).close()  # as a driver opens it
    st.Search(recipe(), out=tmp_path).ask()
    with closing(sqlite3.connect(database)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_driver_refuses_ask_and_tell(tmp_path):
    search = st.Search(recipe(), out=tmp_path)
    (point,) = search.ask()
    with lockfile.hold_lock(tmp_path / "sweeps/mine"):
        for act in (search.ask, lambda: search.tell(point, loss=3.0)):
            with pytest.raises(UserError, match=f"must have one driver, but process {os.getpid()}"):
                act()


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"trainer": {"external": True, "command": ["a"]}},
            "must have one of `command`, `function` and `external`, but got `command`",
        ),
        ({"trainer": {"external": True, "log": "x"}}, "`trainer.log` is not read with"),
        ({"trainer": {}}, "`model.family` 'own' needs .* `trainer.external`, but got none"),
    ],
)
def test_a_recipe_says_who_trains(settings, sentence):
    model = {"model": {"family": "own", "width": 64}, "parametrization": {"base_width": 64}}
    model |= {"budget": {"tokens": 4096, "batch_tokens": 1024}}
    with pytest.raises(UserError, match=sentence):
        validate_recipe(model | settings, "a")


def test_recipes_that_nobody_else_can_train_are_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="scaletune's own loop trains them: use `scaletune sweep`"):
        st.Search(tiny(axes={"lr": [0.01, 0.02]}), out=tmp_path)
    pbt = {"schedule": {"kind": "constant"}, "search": {"kind": "pbt"}}
    with pytest.raises(UserError, match="must not be 'pbt' for trials that are handed out"):
        st.Search(recipe(**pbt), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_waits_for_others_and_ends_when_they_have_answered(tmp_path):
    mine = recipe(axes={"lr": [0.01, 0.02]}, trainer={"external": True, "version": "2"})
    with pytest.raises(UserError, match="but 2 trials have none: `scaletune ask` hands out"):
        st.sweep(mine, out=tmp_path)
    search = st.Search(mine, out=tmp_path)
    first, second = search.ask(2)
    assert search.ask() == []
    search.tell(first, loss=2.5)
    search.tell(second, status="failed", message="node died")
    assert sorted(st.sweep(mine, out=tmp_path)["status"]) == ["done", "failed"]
    held_out = tasks("validation", points(recipe(axes={"lr": [0.03]})))
    with pytest.raises(UserError, match="but 1 trial has none"):
        train_all(held_out, tmp_path / "sweeps/mine")
    (extra,) = search.ask(5)  # what a study requests besides its recipe's points
    assert (extra.sweep, extra["lr"]) == ("validation", 0.03)
    search.tell(extra, loss=2.4)
    assert train_all(held_out, tmp_path / "sweeps/mine")["loss"].tolist() == [2.4]


# --- the command line -----------------------------------------------------------------------------

SCRIPT = """
import sys
import scaletune.trial
lr = float(sys.argv[1])
assert scaletune.trial.settings["lr"] == lr
scaletune.trial.report(tokens=500_000, loss=3 + lr)
scaletune.trial.report(tokens=1_000_000, loss=2 + lr, n_params=60_000)
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """arguments -> (exit status, standard output as JSON or text, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, text=None):
        if text is not None:
            monkeypatch.setattr("sys.stdin", io.StringIO(text))
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in arguments and not code else out, err

    (tmp_path / "mine.toml").write_text(toml(recipe().dump()))
    return call


def test_a_round_trip_on_the_command_line(command, tmp_path):
    _, asked, _ = command("ask", "mine.toml", "-n", 4, "--json")
    assert asked.keys() >= {"points", "finished", "message", "waiting", "available", "recorded"}
    one, two, three, four = (point["id"] for point in asked["points"])
    code, out, _ = command("tell", "mine.toml", one, "--loss", "3.5", "--n-params-total", "7e4")
    assert code == 0 and out.splitlines()[0] == f"{one}  done, loss 3.5"
    lines = f'{{"id": "{two}", "loss": NaN}}\n{{"id": "{three}", "loss": 3.25, "seconds": 4}}\n'
    (tmp_path / "results.jsonl").write_text(lines)
    _, answer, _ = command("tell", "mine.toml", "results.jsonl", "--json")
    assert [(each["status"], each["new"]) for each in answer["trials"]] == [
        *(("diverged", True), ("done", True)),
    ]
    progress = json.dumps({"id": four, "loss": 3.9, "tokens": 1e5}, indent=1)
    _, answer, _ = command("tell", "mine.toml", "-", "--json", text=progress)
    assert (answer["stop"], answer["trials"][0]["status"]) == (False, "running")
    assert "handed_out" in command("status", "mine", "--json")[1]
    own = tmp_path / "runs" / four
    own.mkdir(parents=True)
    (own / "results.jsonl").write_text('{"tokens": 100000, "loss": 3.9}\n{"result": {"loss": 3.1}}')
    assert command("tell", "mine.toml", own / "results.jsonl")[1].startswith(f"{four}  done")
    trials = {trial.id: trial for trial in read_jsonl(tmp_path / "sweeps/mine.jsonl")}
    assert [trials[id].loss for id in (one, two, three, four)] == [3.5, None, 3.25, 3.1]
    assert (trials[one].n_params_total, trials[three].seconds) == (70_000, 4.0)
    _, out, _ = command("ask", "mine.toml", "-n", 99)
    assert len(out.splitlines()) == len(LR) - 4 + 1 and "5 handed out without a result" in out
    assert command("ask", "mine.toml")[1].startswith("waiting for results: 4 results, 5 handed")
    assert len(command("ask", "mine.toml", "-n9", "--again", "--json")[1]["points"]) == 5
    assert command("ask", "mine.toml", "-n9", "--older-than", "1h", "--json")[1]["points"] == []


@pytest.mark.parametrize(
    ("arguments", "text", "sentence"),
    [
        (
            ["nobody", "--loss", "3"],
            None,
            "the id must be one that `scaletune ask` gave for `mine`",
        ),
        (["{id}"], None, "needs a result: RECIPE ID --loss X"),
        (["--loss", "3"], None, "takes the values of one trial"),
        (["away.jsonl"], None, "the file of results must exist, but got `away.jsonl`"),
        (["-"], "", "must have a line of JSON, but standard input has none"),
        (["-"], "loss 3\nloss 4\n", "row 1 of standard input must be a JSON object"),
        (["-"], '{"loss": 3}', "must be of one trial, whose ID is given, but got no `id`"),
        (["{id}", "-"], '{"id": "other", "loss": 3}', "must be of one trial, .*, but got other"),
        (["{id}", "--status", "don"], None, "nearest: 'done'"),
    ],
)
def test_a_clumsy_tell_is_one_sentence(arguments, text, sentence, command):
    id = command("ask", "mine.toml", "--json")[1]["points"][0]["id"]
    code, out, err = command("tell", "mine.toml", *(a.format(id=id) for a in arguments), text=text)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(sentence, err), err


def test_clumsy_asks_are_one_sentence(command):
    assert "must be 1 or more, but got 0" in command("ask", "mine.toml", "-n", 0)[2]
    assert "must be a time such as 90s" in command("ask", "mine.toml", "--older-than", "2 days")[2]


def test_a_command_is_shown_and_a_sweep_goes_on(command, tmp_path):
    """The user runs the command; its record is that of a sweep, which trains what is pending."""
    (tmp_path / "train.py").write_text(SCRIPT)
    argv = [sys.executable, str(tmp_path / "train.py"), "{lr}"]
    content = BASE | {"trainer": {"command": argv}, "axes": {"lr": [0.01, 0.02]}}
    content |= {"engine": {"workers": 1}}
    (tmp_path / "mine.toml").write_text(toml(validate_recipe(content, "mine").dump()))
    _, asked, _ = command("ask", "mine.toml", "-n2", "--json")
    point, pending = asked["points"]
    assert point["command"] == [*argv[:2], str(point["settings"]["lr"])]
    subprocess.run(point["command"], env=os.environ | point["env"], check=True)
    code, out, _ = command("tell", "mine.toml", f"{point['run_dir']}/results.jsonl")
    assert out.startswith(f"{point['id']}  done, loss")
    code, _, err = command("sweep", "mine.toml")
    assert code == 0 and "1 trial was handed out by `scaletune ask`" in err
    assert command("ask", "mine.toml", "--json")[1]["finished"]
    mine, swept = sorted(
        read_jsonl(tmp_path / "sweeps/mine.jsonl"), key=lambda t: t.id != point["id"]
    )
    assert swept.id == pending["id"]
    fields = ("n_params", "n_params_total", "tokens", "batch_tokens", "status", "flops", "width")
    assert [getattr(mine, f) for f in fields] == [getattr(swept, f) for f in fields]
    assert (mine.loss, swept.loss) == (2 + mine.lr, 2 + swept.lr)
    assert mine.metrics["held_out"] == [[5e5, 3 + mine.lr], [1e6, 2 + mine.lr]]
