"""`scaletune run`: its files, its answer, resuming, and the studies that it refuses.

One small study is trained by real workers. In the other tests a pool replaces the workers; its
losses follow a planted law, so the true optimum is known.
"""

import ast
import base64
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from matplotlib.image import imread
from test_sweeping import PATIENCE, InProcess, Stub, children, wait_for
from transformers import GraniteConfig, GraniteForCausalLM

from scaletune import recipe as recipes
from scaletune import sweeping
from scaletune.cli import main
from scaletune.fitting.optimum.lr_basin import phi
from scaletune.records import Fit, Store, read_jsonl
from scaletune.units import human

BASE = """
data = { source = "words.txt", seq_len = 32 }
model = { width = 32, depth = 1, head_dim = 32, ffn_ratio = 2.0 }
parametrization = { base_width = 32, init_std = 0.1 }
schedule = { decay = 0.5 }
budget = { tokens = 8192, batch_tokens = 256, eval_tokens = 4096 }
engine = { workers = 2 }
"""
TARGET = BASE.replace("width = 32, depth", "width = 128, depth").replace(
    "tokens = 8192", "tokens = 81920"
)
AXES = """
[axes]
width = [32, 64]
tokens = [8192, 16384]
lr = [0.0005, 0.002, 0.008, 0.032, 0.128]
"""
COMPARE = """
[[compare]]
name = "sp"
set = { "parametrization.form" = "sp" }
axes = { tokens = [8192], lr = [0.002, 0.008, 0.032] }
"""
HOLDOUT = """
[holdout]
set = { width = 96, tokens = 24576 }
lr = [0.004, 0.016, 0.064]
"""
STUDY = 'target = "target.toml"\n' + BASE + AXES + COMPARE + HOLDOUT


def non_embedding_params(width):
    """By hand: attention 4 w^2, SwiGLU of ratio 2 6 w^2, three norms 3 w."""
    return 10 * width**2 + 3 * width


def corpus():
    """250 kB of made-up prose, the same on every run."""
    stream = random.Random("study")
    vocabulary = ["".join(stream.choices("abcdefghij", k=stream.randint(2, 7))) for _ in range(300)]
    return " ".join(stream.choices(vocabulary, weights=range(1, 301), k=45_000))


@pytest.fixture(scope="session")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("prose") / "words.txt"
    path.write_text(corpus())
    return path


@pytest.fixture
def folder(prose, tmp_path):
    """A folder with the study, its target and its data."""
    return write_study(tmp_path, prose)


def write_study(path, prose):
    """Writes study, target and data; the data path is absolute, so fits of copies are equal."""
    (path / "study.toml").write_text(STUDY.replace("words.txt", str(prose)))
    (path / "target.toml").write_text(TARGET)
    (path / "words.txt").symlink_to(prose)
    return path


def command(folder, *more):
    return [
        sys.executable,
        "-m",
        "scaletune",
        "run",
        str(folder / "study.toml"),
        "--out",
        str(folder / "out"),
        *more,
    ]


def results(folder):
    """(sweep, id, status, loss) of every recorded trial."""
    return [
        (t.sweep, t.id, t.status, t.loss) for t in read_jsonl(folder / "out/sweeps/study.jsonl")
    ]


def digest(folder):
    return Fit.read(folder / "out/fits/study.json").digest


# --- a study trained for real ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(prose, tmp_path_factory):
    """The study run by the command line with real workers: (folder, answer, standard error)."""
    folder = write_study(tmp_path_factory.mktemp("finished"), prose)
    done = subprocess.run(
        command(folder, "--json"), capture_output=True, text=True, timeout=5 * PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


def test_every_requested_trial_is_on_record(finished):
    folder, _, progress = finished
    trials = read_jsonl(folder / "out/sweeps/study.jsonl")
    wanted = {
        ("main", w, t, lr)
        for w in (32, 64)
        for t in (8192, 16384)
        for lr in (0.0005, 0.002, 0.008, 0.032, 0.128)
    }
    wanted |= {("sp", w, 8192, lr) for w in (32, 64) for lr in (0.002, 0.008, 0.032)}
    held = {trial.lr for trial in trials if trial.sweep == "validation"}
    assert {0.004, 0.016, 0.064} < held and len(held) == 4
    trained = {(trial.sweep, trial.width, trial.tokens, trial.lr) for trial in trials}
    assert trained == wanted | {("validation", 96, 24576, lr) for lr in held}
    assert len(trials) == len(trained) == 30 and {trial.status for trial in trials} == {"done"}
    assert all(
        trial.n_params == non_embedding_params(trial.width)
        and trial.n_params_total == non_embedding_params(trial.width) + 512 * trial.width
        for trial in trials
    )
    assert "26 proxies" in progress
    assert "4 held-out trials, predicted lr" in progress
    assert "Traceback" not in progress
    # All files are under --out.
    assert not (folder / "sweeps").exists() and not (folder / "fits").exists()


def test_the_fit_uses_the_proxies_alone(finished):
    folder, answer, _ = finished
    written = json.loads((folder / "out/fits/study.json").read_text())
    fitted = Fit.read(folder / "out/fits/study.json")
    assert written["digest"] == fitted.digest and fitted.to_dict() == answer["fit"]
    main_ids = {
        trial.id for trial in read_jsonl(folder / "out/sweeps/study.jsonl") if trial.sweep == "main"
    }
    assert not set(fitted.used) & set(fitted.dropped)
    assert set(fitted.used) | set(fitted.dropped) == main_ids
    assert {(cell["n_params"], cell["tokens"]) for cell in fitted.cells} == {
        (non_embedding_params(w), t) for w in (32, 64) for t in (8192, 16384)
    }


def test_the_held_out_cell_compares_prediction_and_measurement(finished):
    folder, _, _ = finished
    fitted = Fit.read(folder / "out/fits/study.json")
    assert fitted.held_out["kind"] == "validation"
    (cell,) = fitted.held_out["cells"]
    c, a, b = (fitted.params[name]["value"] for name in "cab")
    assert cell["predicted_lr"] == pytest.approx(
        c * non_embedding_params(96) ** a * 24576**b, rel=1e-6
    )
    losses = {
        t.lr: t.loss
        for t in read_jsonl(folder / "out/sweeps/study.jsonl")
        if t.sweep == "validation"
    }
    assert cell["trained_lr"] == pytest.approx(cell["predicted_lr"], rel=5e-3)
    assert cell["trained_lr"] in losses
    assert {row["lr"]: row["loss"] for row in cell["grid"]} == losses
    assert cell["loss_at_predicted"] == losses[cell["trained_lr"]]
    assert cell["best_loss"] == min(losses.values())
    assert cell["loss_excess"] == pytest.approx(
        losses[cell["trained_lr"]] / min(losses.values()) - 1
    )
    assert cell["ratio"] == pytest.approx(cell["predicted_lr"] / cell["measured_lr"])
    low, high = cell["interval"]["lr"]
    assert low < cell["predicted_lr"] < high
    assert cell["covered"] or not low < cell["measured_lr"] < high


def test_transformers_builds_the_emitted_model(finished):
    folder, answer, _ = finished
    emitted = folder / "out/configs/study/granite"
    model = GraniteForCausalLM(GraniteConfig.from_json_file(emitted / "config.json"))
    assert sum(p.numel() for p in model.parameters()) == non_embedding_params(128) + 2 * 256 * 128
    groups = json.loads((emitted / "param_groups.json").read_text())
    assert groups["evidence"]["fit"] == digest(folder)
    # that of the embedding, which is lr itself
    highest = max(group["lr"] for group in groups["groups"])
    assert highest == pytest.approx(answer["transfer"]["lr"], rel=1e-3)
    assert ast.parse((emitted / "loader.py").read_text())


def test_the_emitted_recipe_is_the_target_with_the_answer(finished):
    folder, answer, _ = finished
    emitted, target = (
        recipes.load(folder / "out/configs/study/recipe/target.toml"),
        recipes.load(folder / "target.toml"),
    )
    assert emitted.optimizer.lr == pytest.approx(answer["transfer"]["lr"], rel=1e-3)
    assert emitted.evidence["fit"] == digest(folder)
    assert emitted.evidence["interval"]["lr"] == answer["transfer"]["interval"]["lr"]
    answered = emitted.optimizer.model_copy(update={"lr": target.optimizer.lr})
    without_answer = emitted.model_copy(update={"evidence": {}, "optimizer": answered})
    assert without_answer.point() == target.point()
    assert target.optimizer.lr != emitted.optimizer.lr


def test_the_answer_names_files_that_exist(finished):
    folder, answer, _ = finished
    assert answer.keys() == {"study", "path", "shift", "transfer", "pictures", "report", "fit"}
    assert answer["study"] == "study"
    files = [answer["path"], answer["report"], *answer["pictures"], *answer["transfer"]["files"]]
    assert len(files) == 11 and all(Path(file).is_file() for file in files)
    other_files = {path for path in (folder / "out").rglob("*") if path.is_file()} - {
        Path(file) for file in files
    }
    assert {path.name for path in other_files} == {"study.db", "study.jsonl"}
    assert [(row["sweep"], row["tokens"], len(row["lr"])) for row in answer["shift"]] == [
        ("main", 8192, 2),
        ("sp", 8192, 2),
    ]


def test_the_pictures_are_in_the_report_and_the_report_gives_the_answer(finished):
    _, answer, _ = finished
    page = Path(answer["report"]).read_text()
    assert [Path(path).name for path in answer["pictures"]] == ["basins.png", "law.png"]
    for path in map(Path, answer["pictures"]):
        assert path.read_bytes().startswith(b"\x89PNG\r\n") and np.ptp(imread(path)) > 0.5
        assert base64.b64encode(path.read_bytes()).decode() in page
    assert page.startswith("<!doctype html>") and "http" not in page
    assert (
        f"Target: {human(non_embedding_params(128))} parameters (non-embedding), 81.9k tokens"
        in page
    )
    mantissa, exponent = f"{answer['transfer']['lr']:.2e}".split("e")
    assert f"learning rate   {mantissa}e{int(exponent)} " in page
    assert "held-out setting: 92.4k parameters, 24.6k tokens" in page
    assert all(run in page for run in answer["fit"]["dropped"])


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in (folder / "out").rglob("*")
        if path.is_file() and path.suffix != ".db"
    }


def test_a_second_run_trains_nothing_and_leaves_the_same(finished, monkeypatch, capsys):
    folder, answer, _ = finished
    before = contents(folder)
    # Starting a worker would raise.
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", None)
    assert main([*command(folder)[3:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == answer
    assert contents(folder) == before and len(before) == 12


@pytest.mark.parametrize("moment", ["proxies", "held-out"])
def test_a_killed_run_carries_on_to_the_same_end(finished, folder, monkeypatch, capsys, moment):
    """Same trials, losses and fit, wherever the run was killed and whoever trained the rest."""
    stem, path = folder / "out/sweeps/study", folder / "out/fits/study.json"
    if moment == "held-out":
        shutil.copytree(finished[0] / "out/sweeps", folder / "out/sweeps")
        store = Store(stem)
        store.delete(trial.id for trial in store.trials() if trial.sweep == "validation")
        store.close()
        stem.with_suffix(".jsonl").unlink()

    def under_way():
        if moment == "held-out":
            return (
                path.exists()
                and Fit.read(path).held_out.get("kind") == "predicted, not trained yet"
            )
        if not stem.with_suffix(".db").exists():
            return False
        store = Store(stem)
        trials = store.trials()
        store.close()
        return len(trials) >= 12

    with subprocess.Popen(
        command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_for(lambda: process.poll() is not None or under_way())
        workers = children(process.pid)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it finished before it was killed"
    assert psutil.wait_procs(workers, timeout=PATIENCE)[1] == []
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", InProcess)
    assert main(command(folder)[3:]) == 0
    assert 0 < len(InProcess.last.trained) <= 4  # the last pool is that of the held-out setting
    assert results(folder) == results(finished[0]) and digest(folder) == digest(finished[0])
    assert "Target: " in capsys.readouterr().out


# --- studies with a planted law -------------------------------------------------------------------


def optimal(n_params, tokens, batch_tokens):
    """The planted optimal lr: 0.016 at width 64, 16384 tokens and batches of 256 tokens."""
    return (
        0.016
        * (n_params / non_embedding_params(64)) ** -0.25
        * (tokens / 16384) ** 0.3
        * (batch_tokens / 256) ** 0.5
    )


def planted(trial):
    """The planted loss of a trial.

    A skewed basin about the planted optimum, a minimum loss that falls with size and tokens, and
    noise of 1e-4.
    """
    log_ratio = math.log(trial.lr / optimal(trial.n_params, trial.tokens, trial.batch_tokens))
    minimum = 2 + 10 / trial.n_params**0.3 + 20 / trial.tokens**0.4
    return minimum + 0.03 * float(phi(log_ratio, 1.0)) + 1e-4 * random.Random(trial.id).gauss(0, 1)


class Planted(Stub):
    """A pool that trains nothing: the loss of a trial is `of(trial)`, None for a divergence."""

    def __init__(self, of, trained):
        self.of, self.trained, self.task = of, trained, None

    @property
    def busy(self):
        return self.task is not None

    def hand_out(self, queue):
        self.task = self.task or (queue.pop(0) if queue else None)

    def messages(self):
        task, self.task = self.task, None
        trial = sweeping.failed_trial(task, "")
        loss = self.of(trial)
        self.trained.append(trial)
        finished = replace(
            trial, status="diverged" if loss is None else "done", loss=loss, train_loss=loss
        )
        return [(task, {"trial": vars(finished), "curve": []})]


class World:
    """A folder in which a call runs a study with planted losses.

    A call returns (exit status, stdout, stderr).
    """

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.monkeypatch, self.capsys, self.trained = folder, monkeypatch, capsys, []

    def __call__(self, study=STUDY, of=planted, *more):
        (self.folder / "study.toml").write_text(study)
        self.trained.clear()
        self.monkeypatch.setattr(
            "scaletune.sweeping.engines.local.LocalPool",
            lambda size, *rest: Planted(of, self.trained),
        )
        self.capsys.readouterr()
        code = main([*command(self.folder)[3:], *more])
        return code, *self.capsys.readouterr()


@pytest.fixture
def world(folder, monkeypatch, capsys):
    return World(folder, monkeypatch, capsys)


def fit_of(world):
    return Fit.read(world.folder / "out/fits/study.json")


def lines_of(text, start="scaletune: "):
    return [line for line in text.splitlines() if line.startswith(start)]


WIDE = """
[axes]
width = [32, 64, 128]
tokens = [8192, 16384, 32768]
lr = [0.004, 0.008, 0.016, 0.032, 0.064]
"""
HELD_WIDE = HOLDOUT.replace("width = 96, tokens = 24576", "width = 256, tokens = 65536")


def test_the_answer_is_the_planted_optimum(world):
    study = (
        STUDY.replace(AXES, WIDE)
        .replace(HOLDOUT, HELD_WIDE)
        .replace("lr = [0.002, 0.008, 0.032]", "seed = [0, 1]")
    )
    code, out, err = world(study, planted, "--json")
    assert code == 0, err
    answer = json.loads(out)
    truth = optimal(non_embedding_params(128), 81920, 256)
    assert answer["transfer"]["lr"] == pytest.approx(truth, rel=0.05)
    low, high = answer["transfer"]["interval"]["lr"]
    assert low < truth < high
    (cell,) = answer["fit"]["held_out"]["cells"]
    assert cell["predicted_lr"] == pytest.approx(
        optimal(non_embedding_params(256), 65536, 256), rel=0.05
    )
    assert cell["measured_lr"] == pytest.approx(
        optimal(non_embedding_params(256), 65536, 256), rel=0.05
    )
    assert cell["covered"] is True and cell["loss_excess"] < 1e-3
    main_shift, sp = answer["shift"]
    # both sweeps follow the planted law
    moved = (non_embedding_params(128) / non_embedding_params(32)) ** 0.25
    assert main_shift["ratio"] == pytest.approx(moved, rel=0.1)
    assert sp["ratio"] == pytest.approx(moved, rel=0.1)


def test_a_wrong_prediction_is_reported_as_one(world):
    """Above the widest proxy the law breaks: the optimum falls to a sixth."""

    def breaks(trial):
        return planted(replace(trial, lr=trial.lr * (6 if trial.width > 128 else 1)))

    held = HELD_WIDE.replace("[0.004, 0.016, 0.064]", "[0.0005, 0.001, 0.002, 0.004, 0.008]")
    code, out, _ = world(STUDY.replace(AXES, WIDE).replace(HOLDOUT, held), breaks)
    cell = fit_of(world).held_out["cells"][0]
    assert code == 0
    assert cell["covered"] is False
    assert cell["ratio"] == pytest.approx(6, rel=0.1)
    assert cell["loss_excess"] > 0.005
    assert "OUTSIDE the interval" in out


def test_the_held_out_lr_is_predicted_for_its_own_batch(world):
    axes = AXES.replace(
        "tokens = [8192, 16384]", "tokens = [8192, 16384, 32768]\nbatch_tokens = [128, 256, 512]"
    )
    axes = axes.replace(
        "[0.0005, 0.002, 0.008, 0.032, 0.128]", "[0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128]"
    )
    held = HOLDOUT.replace("tokens = 24576", "tokens = 24576, batch_tokens = 512")
    code, _, err = world(BASE + axes + held + '[fit]\nlaw = "lr_ndb"\n')
    assert code == 0, err
    assert fit_of(world).law == "lr_ndb"
    assert fit_of(world).held_out["cells"][0]["predicted_lr"] == pytest.approx(
        optimal(non_embedding_params(96), 24576, 512), rel=0.05
    )


def test_the_prediction_is_on_disk_before_the_held_out_cell_is_trained(world):
    """Interrupted at the first held-out trial: the finished study keeps the first prediction."""

    def interrupts(trial):
        if trial.sweep == "validation":
            raise KeyboardInterrupt
        return planted(trial)

    code, out, err = world(STUDY, interrupts)
    assert (code, out) == (130, "")
    assert err.count("scaletune: interrupted; finished trials are recorded") == 1
    before = fit_of(world)
    assert before.held_out["kind"] == "predicted, not trained yet"
    assert {sweep for sweep, *_ in results(world.folder)} == {"main", "sp"}
    code, _, _ = world(STUDY)
    (cell,) = fit_of(world).held_out["cells"]
    assert code == 0 and [trial.sweep for trial in world.trained] == 4 * ["validation"]
    assert before.held_out["prediction"]["lr"] == cell["predicted_lr"]
    assert before.params == fit_of(world).params


def test_optima_on_the_edge_everywhere_are_an_answer_with_its_status(world):
    """Every optimum lies ten times below the lowest lr."""
    code, out, _ = world(
        STUDY.replace(HOLDOUT, ""), lambda trial: planted(replace(trial, lr=40 * trial.lr))
    )
    assert code == 0 and "Target: " in out
    assert lines_of(
        out,
        "Caution: no setting has its lowest loss inside its lr grid: "
        "the law is fitted to the ends of ",
    )
    assert len(lines_of(out, "Caution: the setting with ")) == 4
    assert "at the lowest lr of its grid, 0.0005" in out
    assert "changes by a factor of at least" in out


def test_a_cell_that_diverged_is_named_and_the_others_are_fitted(world):
    code, out, _ = world(
        STUDY,
        lambda trial: (
            None
            if (trial.width, trial.tokens, trial.sweep) == (64, 16384, "main")
            else planted(trial)
        ),
    )
    assert code == 0
    assert lines_of(
        out,
        f"Caution: the setting with {human(non_embedding_params(64))} parameters and 16.4k tokens "
        "at batch size 256 has no usable run: "
        "5 of 5 diverged",
    )
    fitted = fit_of(world)
    usable = {(cell["n_params"], cell["tokens"]) for cell in fitted.cells if cell["status"] == "ok"}
    assert usable == {
        (non_embedding_params(32), 8192),
        (non_embedding_params(64), 8192),
        (non_embedding_params(32), 16384),
    }
    assert list(fitted.dropped.values()).count("diverged") == 5


def test_a_horizon_that_diverged_is_no_reason_to_fail(world):
    """The longest horizon: the panel of its basins is empty."""
    study = STUDY.replace(COMPARE, "").replace(HOLDOUT, "")
    code, out, err = world(study, lambda trial: None if trial.tokens == 16384 else planted(trial))
    assert code == 0
    assert out.count("has no usable run: 5 of 5 diverged") >= 2
    assert (world.folder / "out/fits/study/basins.png").exists()
    assert "`tokens` is the same in every fitted setting" in out and not lines_of(err)


def test_a_comparison_that_diverged_is_no_reason_to_fail(world):
    code, out, _ = world(STUDY, lambda trial: None if trial.sweep == "sp" else planted(trial))
    assert code == 0 and "Target: " in out


def test_a_study_in_which_every_trial_diverged_is_one_line_and_stays_on_record(world):
    code, out, err = world(STUDY, lambda trial: None)
    assert (code, out) == (2, "") and len(lines_of(err)) == 1 and "Traceback" not in err
    assert lines_of(err)[0].startswith(
        "scaletune: a fit needs at least one usable setting, but the setting with "
    )
    assert [status for _, _, status, _ in results(world.folder)] == 26 * ["diverged"]
    assert not (world.folder / "out/fits/study.json").exists()


@pytest.mark.parametrize(
    ("limit", "message"),
    [(0.01, "did not finish"), (0.015, "not measured: "), (0.0, "did not finish")],
)
def test_a_held_out_cell_that_diverges_is_reported(world, limit, message):
    """Above a limit its trials diverge: one, two or no learning rates remain."""
    code, out, _ = world(
        STUDY,
        lambda trial: None if trial.sweep == "validation" and trial.lr > limit else planted(trial),
    )
    (cell,) = fit_of(world).held_out["cells"]
    kept = [lr for lr in (0.004, cell["trained_lr"], 0.016, 0.064) if lr <= limit]
    assert code == 0 and message in out and "Target: " in out and cell["measured_lr"] is None
    assert sorted(row["lr"] for row in cell["grid"]) == kept and len(kept) < 4


def test_a_larger_study_fits_trials_that_an_earlier_one_held_out(world):
    """A trial of the earlier validation is a proxy now: not trained again, and fitted."""
    assert world(STUDY)[0] == 0
    held = {trial.id for trial in world.trained if trial.sweep == "validation"}
    axes = (
        "[axes]\nwidth = [32, 64, 96]\ntokens = [8192, 24576]\n"
        "lr = [0.001, 0.004, 0.016, 0.064, 0.256]\n"
    )
    code, _, err = world(BASE + axes + HOLDOUT.replace("width = 96", "width = 128"))
    assert code == 0, err
    assert {(cell["n_params"], cell["tokens"]) for cell in fit_of(world).cells} == {
        (non_embedding_params(w), t) for w in (32, 64, 96) for t in (8192, 24576)
    }
    again = {trial.id for trial in world.trained}
    fitted_or_dropped = {*fit_of(world).used, *fit_of(world).dropped}
    # The fourth held-out trial, at the predicted lr, is on no axis.
    assert not held & again
    assert len(held & fitted_or_dropped) == 3


def test_records_of_a_clone_are_trained_again_unless_adopted(world):
    """A .jsonl without its .db comes from elsewhere: trained again, unless it is adopted."""
    assert world(STUDY)[0] == 0
    truth, stem = digest(world.folder), world.folder / "out/sweeps/study"
    stem.with_suffix(".db").unlink()
    theirs = [
        replace(trial, loss=trial.loss + 1) for trial in read_jsonl(stem.with_suffix(".jsonl"))
    ]
    clone = "".join(json.dumps(vars(trial)) + "\n" for trial in theirs)
    stem.with_suffix(".jsonl").write_text(clone)
    assert world(STUDY)[0] == 0 and len(world.trained) == 30 and digest(world.folder) == truth
    stem.with_suffix(".db").unlink()
    stem.with_suffix(".jsonl").write_text(clone)
    assert world(STUDY, planted, "--adopt")[0] == 0
    assert not [trial for trial in world.trained if trial.sweep == "main"]
    assert digest(world.folder) != truth


def test_overrides_of_the_command_line_are_used(world):
    code, out, _ = world(
        STUDY, planted, "--set", "name=other", "--set", "axes.lr=[0.004, 0.016, 0.064]", "--json"
    )
    assert code == 0 and json.loads(out)["study"] == "other"
    assert {trial.lr for trial in world.trained if trial.sweep == "main"} == {0.004, 0.016, 0.064}
    assert (world.folder / "out/fits/other.json").exists()
    assert not (world.folder / "out/fits/study.json").exists()


def test_a_study_without_a_target_or_a_held_out_cell_is_fitted(world):
    code, out, _ = world(BASE + AXES)
    assert code == 0 and "ANSWER" not in out and "law lr_nd" in out and len(world.trained) == 20
    assert not (world.folder / "out/configs").exists()
    assert (world.folder / "out/fits/study/report.html").exists()


# --- what is refused before anything is trained ---------------------------------------------------


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (
            STUDY.replace("target.toml", "missing.toml"),
            "the recipe file must exist, but got `.*missing.toml`",
        ),
        (
            STUDY.replace("target.toml", "bad.toml"),
            "`model.width` must be greater than 0, but got -32",
        ),
        (
            STUDY.replace("target.toml", "sp.toml"),
            "`parametrization.form` is 'sp' and the proxies had 'mup'",
        ),
        (
            STUDY.replace("target.toml", "base.toml"),
            "`parametrization.base_width` is 64 and the proxies had 32",
        ),
        (STUDY + '[fit]\nlaw = "lr_dn"', r"but got 'lr_dn' \(nearest: 'lr_nd'\)"),
        (
            STUDY + '[fit]\nlaw = "loss_nd"',
            "`fit.law` of a study must predict a learning rate, but got 'loss_nd'",
        ),
        ('to = ["granit"]\n' + STUDY, r"unknown format `granit` \(nearest: 'granite'\)"),
        (
            STUDY.replace("words.txt", "wrods.txt"),
            "`data.source` must be .* that exists, but got 'wrods.txt'",
        ),
        (
            STUDY.replace("width = 96, tokens = 24576", "width = 64, tokens = 16384"),
            "no proxy may train the held-out setting, "
            "but `axes` contains width 64 with 16384 tokens",
        ),
        (
            STUDY.replace("width = 96", "widht = 96"),
            r"unknown setting `widht` \(nearest: 'width'\)",
        ),
        (STUDY.replace("width = 96", "width = 97"), "`width % head_dim == 0` must hold"),
        (
            STUDY.replace("lr = [0.004, 0.016, 0.064]\n", "lr = [0.004]\n"),
            "`holdout.lr` must be a list of at least 3",
        ),
        (
            STUDY.replace('name = "sp"', 'name = "main"'),
            "`compare.name` must be unique and not one of main, validation, but got 'main'",
        ),
        (
            STUDY + COMPARE,
            "`compare.name` must be unique and not one of main, validation, sp, but got 'sp'",
        ),
        (
            'name = "../up"\n' + STUDY,
            "`name` must be a file's name without its ending, but got '../up'",
        ),
        ('name = ""\n' + STUDY, "`name` must be a file's name without its ending, but got ''"),
        (STUDY.replace('"sp" }', '"np" }'), "`form` must be a known form, but got 'np'"),
    ],
)
def test_an_unsound_study_is_refused_before_anything_is_trained(world, study, message):
    (world.folder / "bad.toml").write_text(TARGET.replace("128", "-32"))
    (world.folder / "sp.toml").write_text(
        TARGET.replace("base_width = 32", 'base_width = 32, form = "sp"')
    )
    (world.folder / "base.toml").write_text(TARGET.replace("base_width = 32", "base_width = 64"))
    assert study != STUDY
    code, out, err = world(study)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert not world.trained and not (world.folder / "out").exists()
    assert re.search(message, err), err
