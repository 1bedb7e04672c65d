"""The command line: standard output, standard error, exit status, one line for each user error."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
from test_fitting import optimal, study
from test_sweeping import PATIENCE, InProcess, children, gone, wait_for

import scaletune
from scaletune import checking, cli, examples, laws, recipe
from scaletune.errors import UserError
from scaletune.records import Fit, Store, read_jsonl
from scaletune.transferring.formats.recipe import toml

COMMANDS = (
    "run",
    "plan",
    "sweep",
    "status",
    "export",
    "fit",
    "predict",
    "transfer",
    "lint",
    "plot",
    "report",
    "check",
    "count",
    "laws",
    "init",
)
RECIPE = """
data = { source = "words.txt", seq_len = 32 }
model = { width = 32, depth = 1, head_dim = 16, ffn_ratio = 2.0 }
parametrization = { base_width = 32, init_std = 0.1 }
budget = { tokens = 4096, batch_tokens = 256, eval_tokens = 1024 }
engine = { workers = 2 }
"""
AXES = "[axes]\nwidth = [32, 64]\nlr = [0.004, 0.016, 0.064]\n"
TARGET = RECIPE.replace("width = 32, depth", "width = 128, depth").replace(
    "tokens = 4096", "tokens = 40960"
)


@pytest.fixture(scope="session")
def home(words, tmp_path_factory):
    """A folder with a finished small study and a CSV of runs of other tools."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "words.txt").write_bytes(words.read_bytes())
    (folder / "point.toml").write_text(RECIPE)
    (folder / "some-1.5b.toml").write_text('target = "target.toml"\n' + RECIPE + AXES)
    (folder / "target.toml").write_text(TARGET)
    (folder / "far.toml").write_text(
        TARGET.replace("width = 128", "width = 256").replace("tokens = 40960", "tokens = 524288")
    )
    study().to_csv(folder / "runs.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scaletune.sweeping.engines.local.LocalPool", InProcess)
        scaletune.run(folder / "some-1.5b.toml", out=folder)
    scaletune.fit(folder / "runs.csv").write(folder / "runs.json")
    return folder


@pytest.fixture
def cli_at(home, tmp_path, monkeypatch, capsys):
    """arguments -> (exit status, stdout, stderr), run in `home`; training a trial would raise.

    {out} in an argument stands for an empty folder.
    """
    monkeypatch.chdir(home)
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", None)

    def call(*arguments):
        capsys.readouterr()
        code = cli.main([str(argument).replace("{out}", str(tmp_path)) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def error_line(result):
    """Requires exit 2, no stdout and one line on stderr; returns that line."""
    code, out, err = result
    assert code == 2, result
    assert out == "", result
    assert err.startswith("scaletune: "), result
    assert err.endswith("\n"), result
    assert err.count("\n") == 1, result
    return err


# --- every command on small real input ------------------------------------------------------------

USES = {  # command -> (arguments, keys under --json, a line for people)
    "run": (
        "some-1.5b.toml",
        {"study", "path", "shift", "transfer", "pictures", "report", "fit"},
        "Target: ",
    ),
    "sweep": (
        "some-1.5b.toml",
        {"sweep", "n_trials", "done", "diverged", "failed", "best", "path"},
        "6 trials: 6 done, 0 diverged, 0 failed",
    ),
    "status": (
        "some-1.5b",
        {
            "sweep",
            "driver",
            "running",
            "wanted",
            "recorded",
            "done",
            "diverged",
            "failed",
            "best",
            "seconds",
            "left",
        },
        "some-1.5b  trials 6/6  done 6  diverged 0  failed 0  running 0",
    ),
    "export": ("some-1.5b", {"path", "n_trials"}, "6 trials: sweeps/some-1.5b.jsonl"),
    "fit": (
        "runs.csv --out {out}/fit.json",
        {"law", "status", "params", "objective", "n_used", "n_dropped", "dropped"}
        | {"held_out", "path"},
        "written to {out}/fit.json",
    ),
    "predict": (
        "--n-params 1e7 --tokens 1e9 --fit runs.json",
        {"predictions"},
        "at 10.0M parameters (non-embedding) and 1.0B tokens",
    ),
    "transfer": (
        "fits/some-1.5b.json target.toml --out {out}",
        {"lr", "interval", "band", "assumptions", "files", "fit", "law", "status"},
        "  {out}/granite/config.json",
    ),
    "lint": (
        "configs/some-1.5b/granite",
        {"path", "stack", "findings"},
        "configs/some-1.5b/granite (granite): no known faults",
    ),
    "plot": ("runs.json --out {out}", {"files"}, "{out}/law.png"),
    "report": ("runs.json --out {out}/report.html", {"path"}, "{out}/report.html"),
    "check": (
        "point.toml --widths 32,64 --seeds 1",
        {"verdict", "widths", "slopes", "sizes"},
        "coordinate check over widths 32, 64: ",
    ),
    "plan": (
        "far.toml --budget 10% --out {out}/study.toml",
        {"cells", "expected", "doubled", "total"},
        "Expected 95 % intervals at the target: ",
    ),
    "count": ("some-1.5b.toml", {"points", "total"}, "6 trials, "),
    "init": ("{out}/new", {"files"}, "next: `scaletune run {out}/new/quickstart.toml`"),
    "laws": ("steplaw_lr_bs", {"id", "name", "formula", "source"}, "steplaw_lr_bs: "),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_document_and_nothing_else_on_stdout(cli_at, command):
    arguments, keys, _ = USES[command]
    code, out, err = cli_at(command, *arguments.split(), "--json")
    assert code == 0 and "Traceback" not in err
    assert out.count("\n") == 1 and out.endswith("\n")
    answer = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert answer.keys() >= keys
    if command in ("fit", "predict"):  # their keys are a contract
        assert answer.keys() == keys


@pytest.mark.parametrize("command", COMMANDS)
def test_text_output_has_its_line(cli_at, tmp_path, command):
    arguments, _, line = USES[command]
    code, out, err = cli_at(command, *arguments.split())
    assert code == 0 and "Traceback" not in err
    assert any(
        shown.startswith(line.replace("{out}", str(tmp_path))) for shown in out.splitlines()
    ), out
    assert not out.startswith("{")


def test_json_of_fit_follows_the_contract(cli_at, tmp_path):
    _, out, _ = cli_at(
        "fit",
        "runs.csv",
        "--json",
        "--out",
        "{out}/new/fit.json",
        "--law",
        "lr_nd",
        "--holdout",
        "n_params > 2e6",
    )
    answer = json.loads(out)
    fitted = Fit.read(tmp_path / "new/fit.json")
    assert answer["path"] == str(tmp_path / "new/fit.json")
    assert answer["law"] == "lr_nd" == fitted.law
    assert (answer["n_used"], answer["n_dropped"]) == (len(fitted.used), len(fitted.dropped))
    assert sum(answer["dropped"].values()) == answer["n_dropped"]
    # settings x lrs x seeds of the sizes that were not held out
    assert answer["n_used"] + answer["n_dropped"] == 4 * 7 * 2
    assert answer["held_out"]["kind"] == "hold-out: n_params > 2e6"
    assert len(answer["held_out"]["cells"]) == 2
    assert all(set(param) >= {"value", "interval"} for param in answer["params"].values())
    low, high = answer["params"]["a"]["interval"]
    assert low < -0.2 < high  # the exponent of the planted law
    assert "path" in json.loads(cli_at("fit", "runs.csv", "--json")[1])
    assert json.loads(cli_at("fit", "runs.csv", "--json")[1])["path"] is None


def test_fit_selects_and_maps(cli_at, home, tmp_path):
    """Perplexities, sizes in millions and a second optimizer give the fit of the plain runs."""
    runs = scaletune.read_trials(home / "runs.csv")
    table = runs.assign(
        Name=runs["id"],
        size_millions=runs["n_params"] / 1e6,
        perplexity=runs["loss"].map(math.exp),
        **{"opt.name": "adamw"},
    ).drop(columns=["id", "n_params", "loss"])
    table = pd.concat([table, table.assign(perplexity=9.0, **{"opt.name": "lion"})])
    table.assign(Name=[f"r{i}" for i in range(len(table))]).to_csv(tmp_path / "t.csv", index=False)
    maps = ("id=Name", "n_params=1e6*size_millions", "loss=log(perplexity)")
    options = [text for each in maps for text in ("--map", each)]
    options += ["--where", "opt.name == 'adamw'", "--holdout", "6 * n_params * tokens > 8e14"]
    code, out, err = cli_at("fit", "{out}/t.csv", *options, "--out", "{out}/fit.json")
    assert code == 0, err
    assert f"{len(runs)} of {len(table)} rows selected by --where opt.name == 'adamw'" in out
    mapped = Fit.read(tmp_path / "fit.json")
    plain = scaletune.fit(runs, holdout="n_params * tokens > 8e14 / 6")
    assert all(run.startswith("r") for run in mapped.used)
    for name, param in plain.params.items():
        assert mapped.params[name]["value"] == pytest.approx(param["value"], rel=1e-6)
    assert len(mapped.held_out["cells"]) == len(plain.held_out["cells"]) > 0


def test_fits_help_names_every_law_that_can_be_fitted():
    from scaletune.cli.arguments import RELATIONS
    from scaletune.fitting import relations

    assert sorted(relations.RELATIONS) == list(RELATIONS)


def test_fit_of_a_recipe_takes_its_records_and_writes_beside_them(cli_at, home):
    """A name may contain a dot."""
    written = (home / "fits/some-1.5b.json").read_bytes()
    code, out, _ = cli_at("fit", "some-1.5b.toml", "--json")
    assert code == 0 and json.loads(out)["path"] == "fits/some-1.5b.json"
    assert Fit.read(home / "fits/some-1.5b.json").used == Fit.from_dict(json.loads(written)).used
    (home / "fits/some-1.5b.json").write_bytes(written)


def test_fit_says_where_nothing_is_written(cli_at):
    assert "not saved: use --out FILE" in cli_at("fit", "runs.csv")[1]


def test_json_of_predict_follows_the_contract(cli_at):
    _, out, _ = cli_at(
        "predict",
        "--n-params",
        "1e7",
        "--tokens",
        "1e9",
        "--fit",
        "runs.json",
        "--law",
        "steplaw_lr_bs",
        "--json",
    )
    ours, published = json.loads(out)["predictions"]
    for prediction in (ours, published):
        assert prediction.keys() == {
            "law",
            "lr",
            "batch_tokens",
            "loss",
            "interval",
            "band",
            "warnings",
        }
        assert prediction["interval"].keys() == {"lr", "batch_tokens", "loss"}
        assert prediction["band"].keys() == {"lr", "batch_tokens", "loss"}
    assert (ours["law"], published["law"]) == ("lr_nd", "steplaw_lr_bs")
    assert published["loss"] is None
    assert ours["lr"] == pytest.approx(optimal(1e7, 1e9), rel=0.25)
    assert ours["interval"]["lr"][0] < optimal(1e7, 1e9) < ours["interval"]["lr"][1]
    assert ours["batch_tokens"] == 4096 and "above the fitted range" in " ".join(ours["warnings"])


def test_predict_without_a_law_uses_all_that_give_a_learning_rate(cli_at):
    _, out, _ = cli_at(
        "predict",
        "--n-params",
        "1e9",
        "--tokens",
        "1e11",
        "--batch-tokens",
        "1e6",
        "--flops",
        "6e20",
        "--json",
    )
    law_ids = {prediction["law"] for prediction in json.loads(out)["predictions"]}
    assert law_ids == {
        law.id for law in laws.CATALOGUE.values() if law.kind == "learning_rate" and not law.unknown
    }
    assert len(law_ids) > 5


def test_predict_shows_interval_band_and_warnings(cli_at):
    _, out, _ = cli_at("predict", "--n-params", "1e7", "--tokens", "1e9", "--fit", "runs.json")
    (line,) = [line for line in out.splitlines() if " lr " in line]
    assert re.fullmatch(r"lr_nd +lr +\S+ +peak +interval \S+ to \S+ +near-optimal \S+ to \S+", line)
    assert [
        line
        for line in out.splitlines()
        if line.strip().startswith("! tokens 1.0B is 16.67x above the fitted range")
    ]


def test_count_agrees_with_the_sum_of_its_points(cli_at):
    _, out, _ = cli_at("count", "some-1.5b.toml", "--json", "--set", "axes.seed=[0, 1]")
    answer = json.loads(out)
    assert len(answer["points"]) == answer["total"]["trials"] == 12
    assert answer["total"]["flops"] == pytest.approx(sum(row["flops"] for row in answer["points"]))
    assert {row["params"]["n_params"] for row in answer["points"]} == {
        10 * w**2 + 3 * w for w in (32, 64)
    }


def test_count_gives_the_savings_of_branches_or_why_there_are_none(cli_at):
    """With cooldowns of half, T and 2T cost 2.5T instead of 3T: the trunk of 2T is shared."""
    settings = ["--set", "axes.tokens=[4096, 8192]", "--set", "schedule.decay=0.5"]
    answer = json.loads(
        cli_at(
            "count", "some-1.5b.toml", "--json", *settings, "--set", "schedule.warmup_tokens=512"
        )[1]
    )["total"]
    assert answer["branched"]["flops"] == pytest.approx(2.5 / 3 * answer["flops"])
    assert answer["branched"]["branches"] * 2 == answer["trials"]
    assert (
        "branch off the trunk of a longer token horizon"
        in cli_at("count", "some-1.5b.toml", *settings, "--set", "schedule.warmup_tokens=512")[1]
    )
    assert (
        "no branched training: `schedule.warmup = 0.1`"
        in cli_at("count", "some-1.5b.toml", *settings)[1]
    )


def test_count_says_when_it_does_not_know_the_vocabulary(cli_at):
    known, unknown = (
        cli_at("count", "point.toml")[1],
        cli_at("count", "point.toml", "--set", "data.source=elsewhere.bin")[1],
    )
    assert "vocabulary" not in known
    assert (
        "`elsewhere.bin` is not on this machine: counted with the default vocabulary, 256"
        in unknown
    )


def test_laws_lists_the_catalogue(cli_at):
    _, out, _ = cli_at("laws", "--json")
    assert [row["id"] for row in json.loads(out)] == list(laws.CATALOGUE)
    listed = cli_at("laws")[1]
    assert all(law_id in listed for law_id in laws.CATALOGUE)


def test_sweep_names_the_best_trial_and_the_record(cli_at, home):
    _, out, _ = cli_at("sweep", "some-1.5b.toml", "--json")
    answer, trials = json.loads(out), read_jsonl(home / "sweeps/some-1.5b.jsonl")
    best = min(trials, key=lambda trial: trial.loss)
    assert answer["path"] == "sweeps/some-1.5b.jsonl"
    assert answer["n_trials"] == answer["done"] == len(trials) == 6
    assert (answer["best"]["id"], answer["best"]["loss"], answer["best"]["lr"]) == (
        best.id,
        best.loss,
        best.lr,
    )


def test_check_writes_an_activation_that_blew_up_as_null(cli_at, monkeypatch):
    """JSON has no infinity."""
    monkeypatch.setattr(checking.slope_fit, "slope", lambda widths, sizes: math.inf)
    code, out, _ = cli_at("check", "point.toml", "--widths", "32,64", "--seeds", "1", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["verdict"] == "fail"
    assert {row["slope"] for row in answer["slopes"]} == {None}
    assert "slope +inf" in cli_at("check", "point.toml", "--widths", "32,64", "--seeds", "1")[1]


def test_transfer_takes_settings_and_formats(cli_at, tmp_path):
    code, out, _ = cli_at(
        "transfer",
        "fits/some-1.5b.json",
        "target.toml",
        "--to",
        "recipe",
        "--out",
        "{out}/x",
        "--set",
        "depth=4",
        "--json",
    )
    names = ("recipe/target.toml", "recipe/plan.json", "answer.json", "ANSWER.md")
    assert code == 0 and json.loads(out)["files"] == [str(tmp_path / "x" / name) for name in names]
    assert recipe.load(tmp_path / "x/recipe/target.toml").model.depth == 4


def test_out_folders_are_made(cli_at, tmp_path):
    assert cli_at("plot", "runs.csv", "--out", "{out}/a/b")[0] == 0
    assert (tmp_path / "a/b/basins.png").is_file()
    assert cli_at("report", "runs.json", "--out", "{out}/c/d.html")[0] == 0
    assert (tmp_path / "c/d.html").is_file()


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    assert exit_info.value.code == 0 and "--json" in shown
    name, *arguments = shlex.split(shown.split("example:\n")[1])
    assert name == "scaletune" and arguments[0] == command
    assert cli.build_parser()[0].parse_args(arguments).run_command.__name__ == command


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert all(re.search(rf"^    {command} ", shown, re.MULTILINE) for command in COMMANDS)


def help_text(capsys, *arguments):
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def test_bare_scaletune_shows_the_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert help_text(capsys) == help_text(capsys, "help") == shown
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    assert capsys.readouterr().out == help_text(capsys, "help", "fit")


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"scaletune {version('scaletune')}\n"
    assert scaletune.__version__ == version("scaletune")


def test_tab_completion_shows_the_api():
    assert dir(scaletune) == sorted([*scaletune.__all__, "__version__"])


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"), [("scaletune pre", ["predict"]), ("scaletune fit --hol", ["--holdout"])]
)
def test_bash_completes_commands_and_options(capsys, words, expected):
    """bash itself runs the script and completes the last word."""
    script = help_text(capsys, "completion", "bash")
    line = words.split()
    ask = f"""
    COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}; COMP_TYPE=9
    _shtab_scaletune scaletune "{line[-1]}" "{line[-2]}" 2>/dev/null
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


def test_init_writes_recipes_that_load(cli_at, tmp_path):
    code, out, _ = cli_at("init", "{out}/new", "--json")
    files = [Path(path) for path in json.loads(out)["files"]]
    assert code == 0 and tmp_path / "new/quickstart.toml" in files
    paths = [path for path in files if path.suffix == ".toml"]
    loaded = [recipe.load(path) for path in paths]
    assert len(paths) > 8 and all(isinstance(each, scaletune.Recipe) for each in loaded)
    study = loaded[paths.index(tmp_path / "new/quickstart.toml")]
    assert (tmp_path / "new" / study.target).exists()
    assert cli_at("init", "{out}/new")[0] == 0  # equal files are kept


def test_init_overwrites_nothing(cli_at, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/quickstart.toml").write_text("mine")
    assert "quickstart.toml` exists and differs" in error_line(cli_at("init", "{out}/new"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["quickstart.toml"]


def test_the_wheel_holds_what_init_writes():
    """The build copies each file that `init` writes in a clone."""
    root = Path(scaletune.__file__).parents[1]
    build = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    copies = build["targets"]["wheel"]["force-include"]
    files = [path for pattern in examples.PATTERNS for path in examples.CLONE.glob(pattern)]
    for path in (path.relative_to(root) for path in files):
        (entry,) = (each for each in (path, *path.parents) if each.as_posix() in copies)
        packaged = Path(copies[entry.as_posix()]) / path.relative_to(entry)
        assert packaged == Path("scaletune", examples.PACKAGED.name, *path.parts[1:])


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--json", "the following arguments are required: COMMAND"),
        ("frit runs.csv", "unknown command `frit` (nearest: 'fit')"),
        ("predit --n-params 1", "unknown command `predit` (nearest: 'predict')"),
        ("predict", "predict: the following arguments are required: --n-params, --tokens"),
        ("predict --n-params 1e9", "predict: the following arguments are required: --tokens"),
        (
            "predict --n-params 1e9 --tokens 1e11x",
            "--tokens: must be a number such as 1e9, but got '1e11x'",
        ),
        (
            "predict --n-params -1 --tokens 1e11",
            "`n_params` must be a positive, finite number, but got -1.0",
        ),
        (
            "predict --n-params nan --tokens 1e11 --fit runs.json",
            "`n_params` must be a number above 0, but got nan",
        ),
        (
            "predict --n-params 1e9 --tokens inf",
            "`tokens` must be a positive, finite number, but got inf",
        ),
        (
            "predict --n-params 1e9 --tokens 1e11 --law steplaw",
            "there is no law 'steplaw' (nearest: 'steplaw_lr_bs')",
        ),
        (
            "predict --n-params 1e9 --tokens 1e11 --fit no.json",
            "the fit file must exist, but got `no.json`",
        ),
        ("predict --n-params 1e9 --tokens 1e11 --fit words.txt", "a fit file must be JSON"),
        ("predict --n-params 1e9 --tokens 1e11 --extra", "unrecognized arguments: --extra"),
        ("help frit", "unknown command `frit` (nearest: 'fit')"),
        ("completion bsh", "the shell must be one of bash"),
        ("laws steplw_lr_bs", "there is no law 'steplw_lr_bs' (nearest: 'steplaw_lr_bs')"),
        ("fit", "fit: the following arguments are required: RECIPE.toml | RECORDS"),
        ("fit no.csv", "the records file must exist, but got `no.csv`"),
        ("fit words.txt", "`words.txt` must be a log of nanoGPT, modded-nanogpt, Megatron-LM"),
        (
            "fit runs.csv --law lr_n",
            "a law must be one that can be fitted, but got 'lr_n' (nearest: 'lr_nd')",
        ),
        (
            "fit runs.csv --holdout n_parms>2e6",
            "a hold-out must name a column of the table, but got `n_parms` (nearest: 'n_params')",
        ),
        ("fit runs.csv --holdout n_params", "a hold-out must have a condition such as"),
        ("fit runs.csv --where n_params", "`where` must have a condition such as n_params < 1e8"),
        ("fit runs.csv --where lr.max()>1", "but got `lr.max()`"),
        ("fit runs.csv --where lr>9", "`where` must select at least one row, but 'lr>9' selects"),
        ("plot runs.csv --where lr>9", "`where` must select at least one row, but 'lr>9' selects"),
        ("plot runs.json --where lr>9", "`where` selects rows of records, but got a fit"),
        ("fit runs.csv --map loss", "--map: must be NAME=COLUMN, but got 'loss'"),
        ("fit runs.csv --map loss=los", "must name a column of the table, but got `los` (nearest"),
        ("fit runs.csv --out .", "--out: must name a file, but got '.'"),
        ("fit runs.csv --out words.txt/fit.json", "`words.txt/fit.json` must be writable"),
        ("fit point.toml", "the records file must exist, but got `sweeps/point.jsonl`"),
        ("plot no.jsonl", "the records file must exist, but got `no.jsonl`"),
        ("plot no.json", "the fit file must exist, but got `no.json`"),
        ("plot runs.json --out words.txt", "`words.txt`: File exists"),
        ("plot runs.json --out words.txt/plots", "`words.txt/plots`: Not a directory"),
        ("report runs.csv", "a fit file must be JSON"),
        (
            "report runs.json --out words.txt/report.html",
            "`words.txt/report.html` must be writable",
        ),
        ("report runs.json --out .", "--out: must name a file, but got '.'"),
        ("transfer runs.json", "transfer: the following arguments are required: TARGET.toml"),
        ("transfer runs.json no.toml", "the recipe file must exist, but got `no.toml`"),
        (
            "transfer runs.json target.toml --to granit",
            "unknown format `granit` (nearest: 'granite')",
        ),
        (
            "transfer runs.json target.toml --force --out words.txt",
            "`words.txt/granite/config.json` must be writable",
        ),
        (
            "transfer fits/some-1.5b.json target.toml --set form=sp",
            "`parametrization.form` is 'sp' and the proxies had 'mup'",
        ),
        (
            "transfer fits/some-1.5b.json target.toml --set parametrization.base_width=64",
            "`parametrization.base_width` is 64 and the proxies had 32",
        ),
        ("sweep no.toml", "the recipe file must exist, but got `no.toml`"),
        (
            "sweep point.toml --out words.txt",
            "`words.txt/sweeps/point.lock` must be writable, but Not a directory",
        ),
        (
            "sweep point.toml --set data.source=wrods.txt",
            "`data.source` must be one of 'python-stdlib', 'digits', 'power-law', "
            "a file or a folder",
        ),
        (
            "sweep point.toml --set seq_len=4096 --set batch_tokens=4096",
            "`seq_len + 1 < held-out tokens` must hold",
        ),
        (
            "sweep point.toml --engine rya",
            "`engine.kind` must be 'local', 'ray' or 'slurm', but got 'rya'",
        ),
        (
            "check point.toml --widths 32,x",
            "--widths: must be whole numbers such as 32,64,128, but got '32,x'",
        ),
        (
            "check point.toml --widths 32,40",
            "`width % head_dim == 0` must hold, but got width=40, head_dim=16",
        ),
        ("check point.toml --widths 32", "a slope needs two different widths, but got 32"),
        (
            "check point.toml --widths 32,64 --seeds 0",
            "a slope needs at least one seed, but got none",
        ),
        (
            "check point.toml --set data.source=wrods.txt",
            "`data.source` must be one of 'python-stdlib', 'digits', 'power-law', "
            "a file or a folder",
        ),
        ("run no.toml", "the recipe file must exist, but got `no.toml`"),
        ("run some-1.5b.toml --set to=['granit']", "unknown format `granit` (nearest: 'granite')"),
        (
            "run some-1.5b.toml --set target=no.toml",
            "the recipe file must exist, but got `no.toml`",
        ),
    ],
)
def test_a_mistake_is_one_line(cli_at, line, message):
    assert message in error_line(cli_at(*line.split()))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("width", "`--set` must look like a.b=c, but got 'width'"),
        ("", "`--set` must look like a.b=c, but got ''"),
        ("=3", "`--set` must look like a.b=c, but got '=3'"),
        ("widht=64", "unknown setting `widht` (nearest: 'width')"),
        ("model.widht=64", "unknown key `model.widht` (nearest: 'width')"),
        ("model.width=abc", "`model.width` must be a valid integer, but got 'abc'"),
        ("model.width.x=3", "`model.width.x` cannot be set, because `width` is not a table"),
        ("model=3", "`model` must be a valid dictionary"),
        ("axes.lr=[]", "`axes.lr` must be a list of at least 1, but got []"),
        ("axes.lr=3e-4", "`axes.lr` must be a valid list, but got 0.0003"),
        ("axes.rl=[1.0]", "unknown setting `rl`"),
    ],
)
def test_an_invalid_override_is_one_line(cli_at, setting, message):
    assert message in error_line(cli_at("count", "point.toml", "--set", setting))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("depth = 1", "dpeth = 1", "unknown key `model.dpeth` (nearest: 'depth')"),
        ("[axes]", "[axis]", "unknown key `axis` (nearest: 'axes')"),
        (
            "[0.004, 0.016, 0.064]",
            '["3e-4"]',
            "`optimizer.lr` must be a valid number, but got '3e-4'; "
            "write the number without quotes",
        ),
        (
            "init_std = 0.1",
            'init_std = "3e-4"',
            "`parametrization.init_std` must be a valid number, but got '3e-4'; write the number",
        ),
        ("width = [32, 64]", "width = [-32]", "`model.width` must be greater than 0, but got -32"),
        (
            "tokens = 4096",
            "tokens = 4097",
            "`tokens % batch_tokens == 0` must hold, but got tokens=4097, batch_tokens=256",
        ),
        (
            "head_dim = 16",
            "head_dim = 24",
            "`width % head_dim == 0` must hold, but got width=32, head_dim=24",
        ),
        ("base_width = 32, ", "", "`parametrization.base_width` must be given"),
        ("[axes]", "[axes", "must be TOML, but "),
        ("budget", 'parametrization.form = "mupp"\nbudget', "must be TOML, but "),
        (
            "init_std = 0.1",
            'form = "mupp"',
            "`form` must be a known form, but got 'mupp' (nearest: 'mup')",
        ),
        (
            "[axes]",
            'name = "../up"\n[axes]',
            "`name` must be a file's name without its ending, but got '../up'",
        ),
    ],
)
@pytest.mark.parametrize("command", ["count", "sweep", "run"])
def test_a_mistake_in_a_recipe_is_one_line(cli_at, home, command, old, new, message):
    text = (home / "some-1.5b.toml").read_text()
    assert text.count(old) >= 1
    (home / "mistake.toml").write_text(text.replace(old, new))
    error = error_line(cli_at(command, "mistake.toml"))
    assert message in error and "mistake.toml" in error


@pytest.mark.parametrize("command", ["fit", "plot"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "empty.jsonl",
            "",
            "a records file must hold at least one trial, but `empty.jsonl` is empty",
        ),
        ("empty.csv", "", "a records file must hold at least one trial, but `empty.csv` is empty"),
        (
            "head.csv",
            "n_params,tokens,lr,loss\n",
            "a records file must hold at least one trial, but `head.csv` is empty",
        ),
        ("binary.csv", "\x00\x00", " at least one trial"),
        (
            "other.csv",
            "a,b\n1,2\n",
            "a fit or a plot needs the columns `n_params` (non-embedding parameters), `tokens`",
        ),
        (
            "words.csv",
            "n_params,tokens,lr,loss\n1e6,1e8,fast,2\n",
            "`lr` must be a number above 0 in every trial, but row 0 has 'fast'",
        ),
        (
            "minus.csv",
            "n_params,tokens,lr,loss\n1e6,1e8,-1,2\n",
            "`lr` must be a number above 0 in every trial, but row 0 has -1",
        ),
        ("lost.csv", "n_params,tokens,lr,loss\n1e6,1e8,1e-3,\n", " at least one "),
        ("other.jsonl", '{"a": 1}\n', "a fit or a plot needs the columns `n_params`"),
        (
            "part.jsonl",
            '{"point": {}, "sweep": "main"}\n',
            "part.jsonl:1 is not a record of trials",
        ),
        ("torn.jsonl", '{"a\n{}\n', "every line of torn.jsonl:1 must be JSON"),
        (
            "text.db",
            "no database",
            "`text.db` must be an SQLite database, but file is not a database",
        ),
    ],
)
def test_invalid_records_are_one_line(cli_at, home, command, name, content, message):
    (home / name).write_text(content)
    assert message in error_line(cli_at(command, name))
    (home / name).unlink()


@pytest.mark.parametrize(
    "command", ["predict --n-params 1e9 --tokens 1e11 --fit", "plot", "transfer"]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (r"[1]", "a fit file must hold one object, but `cut.json` holds a list"),
        (
            "{}",
            "a fit file must hold the fields of a Fit, "
            "but got no law, no params, no solution, no objective",
        ),
        (
            '{"law": "lr_nd", "params": {}, "solution": {}, "objective": 0, "colour": "red"}',
            "must hold the fields of a Fit, but got colour",
        ),
        (
            '{"law": "lr_nd", "params": {}, "solution": {}, "objective": 0}',
            "must (hold `solution.columns` to be predicted from"
            "|contain its settings .* to be drawn)",
        ),
        (
            '{"law": "loss_nd", "params": {}, "solution": {"vector": [1]}, "objective": 0}',
            "must hold `solution.draws` to be predicted from|no runs of its own to draw",
        ),
    ],
)
def test_an_incomplete_fit_file_is_one_line(cli_at, home, command, content, message):
    (home / "cut.json").write_text(content)
    assert re.search(
        message,
        error_line(
            cli_at(
                *command.split(), "cut.json", *(["target.toml"] if command == "transfer" else [])
            )
        ),
    )


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs a folder that root cannot write to either"
)
@pytest.mark.parametrize(
    "line",
    [
        "plot runs.json --out /proc/none",
        "report runs.json --out /proc/none/report.html",
        "fit runs.csv --out /proc/none/fit.json",
        "sweep point.toml --out /proc/none",
        "run some-1.5b.toml --out /proc/none",
        "transfer fits/some-1.5b.json target.toml --out /proc/none",
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line(cli_at, line):
    code, out, err = cli_at(*line.split())
    assert code == 2
    assert out == ""
    assert "/proc/none" in err.splitlines()[-1]
    assert "Traceback" not in err
    if not line.startswith("run"):  # `run` first prints what it will train
        assert err.count("\n") == 1


def test_an_error_without_a_file_name_is_still_a_sentence(cli_at, monkeypatch):
    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("scaletune.reporting.report", full)
    assert error_line(cli_at("report", "runs.json")) == "scaletune: no space left\n"


def test_a_message_of_several_lines_is_one(cli_at, monkeypatch):
    def several(*arguments):
        raise UserError("first\nsecond")

    monkeypatch.setattr("scaletune.reporting.report", several)
    assert error_line(cli_at("report", "runs.json")) == "scaletune: first second\n"


# --- in a separate process ------------------------------------------------------------------------

WATCHED = """
import sys
from scaletune.cli import main
code = main(sys.argv[1:])
heavy = ("torch", "numpy", "scipy", "pandas", "matplotlib")
print([name for name in heavy if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def process(*arguments, code=WATCHED, **options):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        **options,
    )


def test_predict_by_a_published_law_imports_nothing_heavy():
    """arXiv:2503.04715: lr = 1.79 N**-0.713 D**0.307, batch = 0.58 D**0.571 tokens."""
    done = process(
        "predict", "--n-params", "1e9", "--tokens", "1e11", "--law", "steplaw_lr_bs", "--json"
    )
    (prediction,) = json.loads(done.stdout)["predictions"]
    assert prediction["lr"] == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307, rel=1e-9)
    assert prediction["lr"] == pytest.approx(0.001632499, rel=1e-6)
    assert prediction["batch_tokens"] == pytest.approx(0.58 * 1e11**0.571, rel=1e-9)
    assert prediction["batch_tokens"] == pytest.approx(1107714.9, rel=1e-6)
    assert done.returncode == 0 and done.stderr == "[]\n"


def test_predict_by_a_fit_imports_nothing_heavy(home):
    """The prediction equals that of the fit in memory to the last digit."""
    done = process(
        "predict", "--n-params", "1e7", "--tokens", "1e9", "--fit", home / "runs.json", "--json"
    )
    (prediction,) = json.loads(done.stdout)["predictions"]
    assert prediction == json.loads(
        json.dumps(scaletune.fit(home / "runs.csv").predict(n_params=1e7, tokens=1e9).to_dict())
    )
    assert done.returncode == 0 and done.stderr == "[]\n"


def test_importing_scaletune_imports_nothing_heavy():
    code = (
        "import sys, scaletune; "
        "print([n for n in ('torch', 'numpy', 'pandas', 'pydantic') if n in sys.modules])"
    )
    assert process(code=code).stdout == "[]\n"


@pytest.mark.parametrize("name", scaletune.__all__)
def test_every_public_name_resolves(name):
    value = getattr(scaletune, name)
    assert value is (laws if name == "laws" else getattr(import_module(value.__module__), name))


def test_the_verbs_are_the_commands():
    assert set(COMMANDS) <= set(scaletune.__all__)
    with pytest.raises(AttributeError, match="module 'scaletune' has no attribute 'sweeep'"):
        _ = scaletune.sweeep


def test_python_m_is_the_console_script():
    done = subprocess.run(
        [sys.executable, "-m", "scaletune", "frit"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "scaletune: unknown command `frit` (nearest: 'fit')\n"


def test_a_closed_output_pipe_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-m", "scaletune", "laws", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as reader:
        reader.stdout.close()
        assert reader.wait(PATIENCE) == 0 and reader.stderr.read() == b""


WITH_INTERRUPTS = """
import signal, sys
from scaletune.cli import main
# Background jobs of a shell ignore SIGINT, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""
# One trial takes eight steps, the other an hour.
LONG = {"axes": {"tokens": [256 * 8, 256 * 10**6]}, "data.epochs": 10**4, "engine.workers": 2}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
def test_a_stopped_sweep_leaves_its_record(tiny, tmp_path, stop):
    """Exit 130, no stdout, one sentence on stderr.

    The finished trial is on record and no worker remains.
    """
    (tmp_path / "long.toml").write_text(
        toml(tiny(LONG).model_dump(include={*recipe.POINT_SECTIONS, "axes", "engine"}))
    )
    command = [
        sys.executable,
        "-c",
        WITH_INTERRUPTS,
        "sweep",
        str(tmp_path / "long.toml"),
        "--out",
        str(tmp_path),
        "--json",
    ]

    def one_done():
        if not (tmp_path / "sweeps/long.db").exists():
            return False
        store = Store(tmp_path / "sweeps/long")
        trials = store.trials()
        store.close()
        return trials

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as driver:
        (trial,) = wait_for(one_done)
        workers = children(driver.pid)
        os.kill(driver.pid, stop)
        out, err = driver.communicate(timeout=PATIENCE)
    assert (driver.returncode, out) == (130, "") and len(workers) == 2 and gone(workers)
    assert (
        err.count(
            "scaletune: interrupted; finished trials are recorded, the same command continues\n"
        )
        == 1
    )
    assert "Traceback" not in err
    assert read_jsonl(tmp_path / "sweeps/long.jsonl") == [trial] and trial.status == "done"


def test_main_leaves_the_signals_as_they_were(cli_at):
    stops = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(stop) for stop in stops]
    cli_at("laws")
    cli_at("frit")
    assert [signal.getsignal(stop) for stop in stops] == before
