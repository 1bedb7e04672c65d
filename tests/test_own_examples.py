"""Runs the examples of one's own trainer as a user would: sweep, fit, predict, plot."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import scaletune as st
from scaletune import examples, recipe
from scaletune.errors import UserError
from scaletune.recipe.passed_settings import swept_and_not_passed, unpassed_sentence
from scaletune.recipe.placeholders import fill_template, placeholder_names

FOLDER = examples.CLONE / "examples/own"
GUIDE = (examples.CLONE.parent / "docs/guides/own-trainer.md").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the examples, in which commands run; no program imports torchvision there."""
    for path in FOLDER.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    (tmp_path / "site").mkdir()
    hide = "import sys\nsys.modules['torchvision'] = None\n"  # as tests/conftest.py
    (tmp_path / "site/sitecustomize.py").write_text(hide)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{FOLDER.parents[2]}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tune(path, settings=()):
    """Sweeps, fits, predicts and plots; returns the trials. The optimum is inside the grid."""
    trials = st.sweep(path, settings=settings)
    assert list(trials["status"].unique()) == ["done"], trials["message"].tolist()
    for _, setting in trials.groupby("width"):
        setting = setting.sort_values("lr")
        assert 0 < int(np.argmin(setting["loss"])) < len(setting) - 1
    fit = st.fit(trials)
    best = fit.predict(n_params=trials["n_params"].max(), tokens=51_200)
    assert trials["lr"].min() < best.lr < trials["lr"].max()
    assert best.loss == pytest.approx(trials["loss"].min(), rel=0.02)
    pictures = st.plot(trials, "plots") + st.plot(fit, "plots")
    assert [path.name for path in pictures] == ["basins.png", "law.png"]
    return trials


def test_a_pytorch_script(folder):
    trials = tune("pytorch.toml")
    # 12 * layers * width**2 for the matrices, 13 * layers * width for biases and norms
    sizes = {width: 24 * width**2 + 26 * width for width in (32, 48)}
    assert dict(zip(trials["width"], trials["n_params"], strict=True)) == sizes
    # other data than noise: better than the entropy of single bytes
    text = b"".join(Path(m.__file__).read_bytes() for m in map(sys.modules.get, ("ast", "typing")))
    shares = np.bincount(np.frombuffer(text, np.uint8)) / len(text)
    assert trials["loss"].max() < -np.sum(shares[shares > 0] * np.log(shares[shares > 0]))


def test_a_hugging_face_trainer(folder):
    pytest.importorskip("transformers")
    trials = tune("hf-trainer.toml")
    assert trials["n_params"].unique().tolist() == [24 * 32**2 + 26 * 32 + 64]  # and the last norm


def test_a_hugging_face_trainer_reports_while_it_trains(folder):
    pytest.importorskip("transformers")
    text = (folder / "hf-trainer.toml").read_text()
    text = text.replace('log = "{run_dir}"', "").replace('"--seed', '"--report", "--seed')
    (folder / "reports.toml").write_text(text)
    (trial,) = st.sweep("reports.toml", settings=["axes.lr=[0.01]"]).to_dict("records")
    assert (trial["status"], trial["message"]) == ("done", "")
    assert [tokens for tokens, _ in trial["metrics"]["held_out"]] == [25_600, 51_200]


def test_torchrun_with_two_processes(folder):
    """The loss of two processes is that of one, which train.py trains."""
    trials = tune("torchrun.toml").set_index("lr")
    (one,) = st.sweep("pytorch.toml", settings=["axes.width=[32]", "axes.lr=[0.0125]"])["loss"]
    assert trials["loss"][0.0125] == pytest.approx(one, rel=1e-4)


def test_the_guide_shows_the_lines_that_make_the_script_mup():
    diff = re.search(r"^```diff\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)[1].splitlines()
    plain, mup = (
        {line.partition("  #")[0] for line in (FOLDER / name).read_text().splitlines()}
        for name in ("train.py", "train_mup.py")
    )
    assert {line[1:] for line in diff if line[0] == "-"} <= plain - mup
    assert {line[1:] for line in diff if line[0] == "+"} <= mup - plain


def test_the_script_in_mup(folder):
    trials = tune("mup.toml", ["axes.width=[48]"])
    for trial in trials.to_dict("records"):
        plan = json.loads((folder / "runs" / trial["id"] / "plan.json").read_text())["tensors"]
        lrs = {row["name"]: row["lr"] for row in plan}
        assert lrs["blocks.0.qkv.weight"] == pytest.approx(trial["lr"] * 32 / trial["width"])
        assert lrs["tokens.weight"] == pytest.approx(trial["lr"])


def test_a_module_in_the_loop_of_scaletune(folder):
    trials = tune("module.toml")
    sizes = {width: 24 * width**2 + 28 * width for width in (32, 48)}  # with the last norm
    assert dict(zip(trials["width"], trials["n_params"], strict=True)) == sizes


def test_a_function_in_a_notebook(folder):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    trials = st.read_trials("sweeps/notebook.jsonl")
    assert len(trials) == 8 and (trials["status"] == "done").all()
    wide = trials[trials["width"] == 128].sort_values("lr")["loss"].tolist()
    assert 0 < wide.index(min(wide)) < 3


# --- arithmetic in placeholders, which such scripts need ------------------------------------------

VALUES = {"lr": 0.004, "width": 96, "model.width": 96, "steps": 7, "my.a-b": 3, "name": "x"}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("--min_lr={lr / 10}", f"--min_lr={0.004 / 10}"),
        ("{model.width // 64} heads", "1 heads"),
        ("{max(1, steps // 10)}", "1"),
        ("{12 * width**2:.1e}", "1.1e+05"),
        ("{-(lr + 1) % 2}", str(-(0.004 + 1) % 2)),
        ("{my.a-b}{{lr}}", "3{lr}"),
    ],
)
def test_placeholders_compute(text, filled):
    assert fill_template("trainer.command", text, VALUES) == filled


def test_the_names_in_arithmetic_are_placeholders():
    names = placeholder_names("trainer.command", "{lr / my.x}{max(1, model.width - 2)}{id}")
    assert names == ["lr", "my.x", "model.width", "id"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{__import__('os')}", "must consist of settings, numbers"),
        ("{lr if 1 else 2}", "must consist of settings, numbers"),
        ("{lr[0]}", "must consist of settings, numbers"),
        ("{name * 2}", "must compute with numbers, but name is 'x'"),
        ("{lr / 0}", "cannot be computed"),
        ("{9**9**9}", "which is not computed"),
        ("{steps + wdth}", r"uses \{wdth\}, which this trial does not have"),
    ],
)
def test_other_placeholders_are_refused(text, problem):
    with pytest.raises(UserError, match=problem):
        fill_template("trainer.command", text, VALUES)


# --- what a new user gets wrong -------------------------------------------------------------------

RECIPE = """
axes = {{ lr = [0.1, 0.2], width = [8, 16], "my.x" = [1, 2] }}
model.width = 8
data.seq_len = 5
[trainer]
command = {command}
[budget]
tokens = 100
batch_tokens = 10
"""


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ('["x", "{lr}", "{model.width}", "{my.x}"]', []),
        ('["x", "{width // 4}{steps}"]', ["lr", "my.x"]),
        ('["x", "{batch_sequences}"]', ["lr", "width", "my.x"]),
        ('["x", "{lr.hidden}", "{width}", "{optimizer.lr}{my.x}"]', []),
    ],
)
def test_an_axis_that_the_command_does_not_get_is_said(tmp_path, command, missing):
    path = tmp_path / "study.toml"
    text = RECIPE.format(command=command)
    path.write_text(text + "[parametrization]\nform = 'mup'\nbase_width = 8\n" * ("hidden" in text))
    loaded = recipe.load(path)
    assert swept_and_not_passed(loaded) == missing
    listed = ", ".join(f"{{{name}}}" for name in missing)
    assert listed in unpassed_sentence(loaded) and bool(missing) == bool(unpassed_sentence(loaded))


def test_a_stated_size_is_no_setting_of_the_command(tmp_path):
    path = tmp_path / "study.toml"
    text = RECIPE.format(command='["x", "{lr}", "{width}", "{my.x}"]')
    path.write_text(text + "[[cells]]\nmodel.n_params = 64\n[[cells]]\nmodel.n_params = 256\n")
    loaded = recipe.load(path)
    assert [point.model.n_params for point in recipe.points(loaded)][::8] == [64, 256]
    assert not unpassed_sentence(loaded)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ('"python train.py"', r'must be a list of arguments, such as \["python", "train.py"\]'),
        (r'["grep", "\d+"]', "put a regular expression into single quotes"),
        ('["x", "{lr / }"]', "must consist of settings, numbers"),
        ('["x", "{wdth // 4}"]', r"unknown placeholder \{wdth\} \(nearest: 'width'\)"),
    ],
)
def test_a_wrong_command_names_the_remedy(tmp_path, command, sentence):
    (tmp_path / "study.toml").write_text(RECIPE.format(command=command))
    with pytest.raises(UserError, match=sentence):
        recipe.load(tmp_path / "study.toml")
