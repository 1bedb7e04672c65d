"""A trial over processes and micro-batches has the same global batches, curve and noise."""

import json
import os
import subprocess
import sys

import psutil
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from scaletune import data, training
from scaletune.errors import UserError

WAYS = [1, 2, 4]  # micro-batches per process
MUON = {"optimizer": {"family": "muon", "lr": 0.01}}
PAIR = """
import json, os, sys
import torch
from scaletune import models, recipe, training

request, out = json.loads(sys.argv[1]), sys.argv[2]
acc = training.accelerator()
results = []
forward = models.Transformer.forward

def watched(model, tokens, targets):
    if model.training:
        rows.append(tokens[:, 0].tolist() + tokens[:, 1].tolist())
    return forward(model, tokens, targets)

models.Transformer.forward = watched
for settings in request["settings"]:
    rows = []
    point = recipe.with_settings(recipe.validate_recipe(request["recipe"], "pair"), settings)
    trial, curve = training.run_trial(point, "main", acc)
    result = {"id": trial.id, "loss": trial.loss, "curve": curve, "rows": rows}
    results.append(result | {"noise": trial.metrics["noise"]})
    if point.engine.checkpoint_every:
        acc.wait_for_everyone()
        if acc.is_main_process:
            # As if the trial was killed before its last checkpoint.
            os.remove(f"{point.engine.runs}/{trial.id}/checkpoint.pt")
        acc.wait_for_everyone()
        rows = []
        curve = training.run_trial(point, "main", acc)[1]
        results[-1] |= {"again": curve, "steps": len(rows)}
with open(f"{out}/rank{acc.process_index}.json", "w") as file:
    json.dump(results, file)
torch.distributed.destroy_process_group()
"""


def settings(processes, accumulation, **more):
    return {"engine.processes": processes, "engine.accumulation": accumulation, **more}


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """The output of both ranks of a two-process run, for each of WAYS and with noise per row."""
    out = tmp_path_factory.mktemp("pair")
    (out / "pair.py").write_text(PAIR)
    ways = [settings(2, way, **{"training.z_loss": 1e-3} if way == 2 else {}) for way in WAYS] + [
        settings(2, 4, **{"engine.noise_every": 3}),
        settings(2, 1, **MUON),
        settings(2, 1, **{"engine.checkpoint_every": 3, "engine.runs": str(out / "runs")}),
    ]
    request = json.dumps({"recipe": tiny(width=64).model_dump(), "settings": ways})
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(out / "pair.py"),
        request,
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("i", range(len(WAYS)))
def test_two_processes_train_as_one(tiny, pair, i):
    recipe = tiny({"width": 64} | ({"training.z_loss": 1e-3} if WAYS[i] == 2 else {}))
    alone, curve = training.run_trial(recipe, "main", training.accelerator())
    for rank in pair:
        assert rank[i]["id"] == alone.id  # the processes are not part of the identity
        assert rank[i]["curve"] == pytest.approx(curve, rel=1e-5)
        assert rank[i]["loss"] == pytest.approx(alone.loss, rel=1e-5)


@pytest.mark.parametrize("i", range(len(WAYS)))
def test_the_ranks_share_out_the_global_batch(tiny, pair, i):
    recipe = tiny(width=64)
    corpus = data.load(recipe.data)
    for step in range(8):
        inputs, _ = corpus.batch(recipe.seed, step, 8, 32)
        parts = [
            part for rank in pair for part in rank[i]["rows"][step * WAYS[i] : (step + 1) * WAYS[i]]
        ]
        # Equal micro-batches with two numbers per row.
        assert {len(part) for part in parts} == {2 * 8 // (2 * WAYS[i])}
        rows = [
            pair
            for part in parts
            for pair in zip(part[: len(part) // 2], part[len(part) // 2 :], strict=True)
        ]
        assert sorted(rows) == sorted(
            zip(inputs[:, 0].tolist(), inputs[:, 1].tolist(), strict=True)
        )


def test_two_processes_train_as_one_under_muon(tiny, pair):
    """Every rank computes Muon's step on whole matrices. Its bfloat16 amplifies rounding."""
    alone, curve = training.run_trial(tiny({"width": 64} | MUON), "main", training.accelerator())
    for rank in pair:
        assert rank[len(WAYS) + 1]["curve"] == pytest.approx(curve, rel=1e-3)
        assert rank[len(WAYS) + 1]["id"] == alone.id


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_micro_batches_train_as_one_batch(tiny, accumulation):
    acc = training.accelerator()
    plain, curve = training.run_trial(tiny(width=64), "main", acc)
    trial, same = training.run_trial(
        tiny({"width": 64, "engine.accumulation": accumulation}), "main", acc
    )
    assert same == pytest.approx(curve, rel=1e-5)
    assert trial.loss == pytest.approx(plain.loss, rel=1e-5)
    assert trial.id == plain.id


def test_the_noise_does_not_depend_on_the_number_of_processes(tiny, pair):
    """Micro-batches of one row: 1 process x 8 and 2 processes x 4 give the same noise."""
    recipe = tiny({"width": 64, "engine.accumulation": 8, "engine.noise_every": 3})
    alone, _ = training.run_trial(recipe, "main", training.accelerator())
    for rank in pair:
        assert rank[len(WAYS)]["noise"] == pytest.approx(alone.metrics["noise"], rel=1e-4)


def test_two_processes_go_on_from_one_checkpoint(pair):
    for rank in pair:
        # The last two of eight steps, from step 6 on.
        assert rank[-1]["again"] == rank[-1]["curve"]
        assert rank[-1]["steps"] == 2


@pytest.mark.parametrize(
    ("message", "kind"),
    [("UserError: `a` must hold", UserError), ("KeyError: 'a'", ChildFailedError)],
)
def test_a_user_error_of_a_rank_is_raised_as_one_line(tiny, tmp_path, monkeypatch, message, kind):
    (tmp_path / "error.json").write_text(
        json.dumps({"message": {"message": message, "extraInfo": {"timestamp": "0"}}})
    )
    failure = ProcessFailure(
        local_rank=1, pid=1, exitcode=1, error_file=str(tmp_path / "error.json")
    )

    def failed(*arguments):
        raise ChildFailedError("rank", {1: failure})

    monkeypatch.setattr(api, "elastic_launch", lambda config, entry: failed)
    with pytest.raises(kind, match="^`a` must hold$" if kind is UserError else "a"):
        training.launch_trial(tiny({"engine.processes": 2}), "main")


LAUNCHER = """
import json, os, sys
from scaletune import recipe, training

if __name__ == "__main__":
    point = recipe.validate_recipe(json.loads(sys.argv[1]), "killed")
    training.launch_trial(point, "main", lambda share: print(os.getpid(), flush=True))
"""


def test_a_killed_launcher_leaves_no_ranks(tiny, tmp_path):
    (tmp_path / "launch.py").write_text(LAUNCHER)
    content = json.dumps(tiny({"engine.processes": 2, "tokens": 256 * 100_000}).model_dump())
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "launch.py"), content],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout.readline()  # the trial is training
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) >= 2
        os.kill(process.pid, 9)
        alive = psutil.wait_procs(ranks, timeout=30)[1]
    assert not alive


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_as_one(tiny):
    trial, curve = training.launch_trial(tiny({"width": 64, "engine.processes": 2}), "main")
    alone, expected = training.run_trial(tiny(width=64), "main", training.accelerator())
    assert trial.id == alone.id and curve == pytest.approx(expected, rel=1e-3)
