"""User errors in data, model, checkpoints or processes: one line, exit 2, no record is lost."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_sweeping import InProcess

from scaletune import cli
from scaletune.records import read_jsonl
from scaletune.sweeping.engines import local

RECIPE = """
[model]
width = 32
depth = 1
head_dim = 16
[parametrization]
base_width = 32
[data]
source = "words.txt"
seq_len = 32
[budget]
tokens = 1024
batch_tokens = 256
eval_tokens = 256
[engine]
workers = 1
"""


@pytest.fixture
def home(tmp_path, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(words, "words.txt")
    Path("odd.bin").write_bytes(b"\0" * 1001)
    (np.arange(3000) % 300).astype("<u2").tofile("tokens.bin")
    Path("point.toml").write_text(RECIPE)
    return tmp_path


def run_sweep(capsys, *settings):
    """(exit status, stdout, stderr) of a sweep at these settings."""
    status = cli.main(
        ["sweep", "point.toml", *(part for setting in settings for part in ("--set", setting))]
    )
    return status, *capsys.readouterr()


BAD = {
    "vocabulary": (
        ["data.source=tokens.bin", "data.vocab_size=100"],
        "`data.vocab_size` must include every token, 300 or more here, but got 100",
    ),
    "odd size": (
        ["data.source=odd.bin"],
        "`data.source` must hold tokens of `data.dtype` uint16, 2 bytes each, "
        "but `odd.bin` has 1001 bytes",
    ),
    "batch": (
        ["data.source=tokens.bin", "tokens=4096", "batch_tokens=4096"],
        "`batch_tokens <= train tokens` must hold, but got batch_tokens=4096 and",
    ),
    "horizon": (["data.source=tokens.bin", "tokens=10240"], "`data.epochs = 4` allows repetition"),
    "positions": (
        ["model.positions=learned", "model.max_positions=16"],
        "`seq_len <= max_positions` must hold for learned positions, but got seq_len=32",
    ),
}


@pytest.mark.parametrize("wrong", BAD)
def test_a_recipe_that_cannot_be_trained_is_refused_before_training(home, capsys, wrong):
    settings, sentence = BAD[wrong]
    status, out, err = run_sweep(capsys, *settings)
    assert (status, out) == (2, "")
    assert sentence in err
    assert err.startswith("scaletune: ")
    assert err.count("\n") == 1
    assert not Path("sweeps").exists()


def test_fewer_gpus_than_processes(home, capsys, monkeypatch):
    monkeypatch.setattr(local, "_count_gpus", lambda: 1)
    status, _, err = run_sweep(capsys, "engine.processes=2")
    assert status == 2
    assert err == "scaletune: `processes <= GPUs` must hold, but got 2 processes and 1 GPUs\n"


def test_a_user_error_of_a_worker_ends_the_sweep_and_keeps_its_records(home, capsys, monkeypatch):
    """Real workers meet a checkpoint of another recipe, then a file that is no checkpoint.

    Each is one line, and the trials that were recorded before stay.
    """
    keep = ["engine.checkpoint_every=2", "axes={seed=[0, 1]}"]
    with monkeypatch.context() as here:
        here.setattr("scaletune.sweeping.engines.local.LocalPool", InProcess)
        assert run_sweep(capsys, *keep)[0] == 0
    (first, second), record = os.listdir("runs"), Path("sweeps/point.jsonl")
    before = record.read_text()
    assert set(os.listdir("runs")) == {trial.id for trial in read_jsonl(record)}
    assert len(before.splitlines()) == 2
    kept = [json.loads(line) for line in before.splitlines() if json.loads(line)["id"] == first]
    Path("sweeps/point.db").unlink()
    record.write_text(json.dumps(kept[0]) + "\n")
    shutil.copy(f"runs/{first}/checkpoint.pt", f"runs/{second}/checkpoint.pt")
    adopted = [
        "sweep",
        "point.toml",
        "--adopt",
        *(part for setting in keep for part in ("--set", setting)),
    ]
    for sentence, damage in (
        (
            f"scaletune: a checkpoint in the folder of trial {second} must be of that trial, "
            f"but `{home}/runs/{second}/checkpoint.pt` is of {first}",
            None,
        ),
        (
            "scaletune: a checkpoint must be a complete file written by scaletune, "
            f"but `{home}/runs/",
            "torn",
        ),
    ):
        if damage:
            for name in os.listdir(f"runs/{second}"):
                torch.save([1, 2], f"runs/{second}/{name}")
        assert cli.main(adopted) == 2
        out, err = capsys.readouterr()
        assert out == "" and sentence in err and "Traceback" not in err
        assert [trial.id for trial in read_jsonl(record)] == [first]


def test_nan_from_the_first_step_is_a_record(home, capsys, monkeypatch):
    recipe = (
        Path("point.toml")
        .read_text()
        .replace("head_dim = 16", 'family = "mlp"\nloss = "mse"')
        .replace("seq_len = 32", "seq_len = 1")
    )
    recipe = recipe.replace(
        '"words.txt"', '"power-law"\npower_law = { inputs = 64, examples = 4096 }'
    )
    Path("point.toml").write_text(recipe)
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", InProcess)
    status, out, _ = run_sweep(capsys, "parametrization.init_std=1e30")
    (trial,) = read_jsonl(Path("sweeps/point.jsonl"))
    assert status == 0 and "1 diverged" in out and (trial.status, trial.loss) == ("diverged", None)
    assert trial.message.startswith(
        "loss nan at step 0 of 4, not finite, before any update: "
        "`init_std` or a multiplier is too large"
    )
