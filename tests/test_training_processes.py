"""A trial over processes and micro-batches has the same global batches, curve and noise."""

import json
import os
import subprocess
import sys

import psutil
import pytest
import torch

from scaletune import data, training
from scaletune.errors import UserError
from scaletune.training import sharding

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


@pytest.fixture(scope="module")
def group():
    """A group that the tests below use in turn; one that has ended starts again."""
    with training.RankGroup() as group:
        yield group


FSDP = {"engine.strategy": "fsdp", "engine.processes": 2}
WAYS_TO_SHARD = [
    {},
    {"engine.accumulation": 2, "training.z_loss": 1e-3, "optimizer.clip": 0.1},
    {"optimizer.family": "sgd", "optimizer.lr": 0.1, "model.tied": True, "model.depth": 3},
    {"optimizer.family": "schedulefree_adamw", "schedule.kind": "constant"},
]


def test_shards_train_as_the_whole_model_and_resume_on_any_number_of_processes(
    tiny, tmp_path, group
):
    acc = training.accelerator()
    files = {"engine.checkpoint_every": 5, "engine.runs": str(tmp_path)}
    for way in WAYS_TO_SHARD:
        settings = {"width": 64, "budget.eval_tokens": 32 * 129} | way
        alone, curve = training.run_trial(tiny(settings), "main", acc)
        trial, sharded = group.run_trial(tiny(settings | files | FSDP), "main")
        assert trial.id == alone.id and sharded == pytest.approx(curve, rel=1e-5)
        assert trial.loss == pytest.approx(alone.loss, rel=1e-5)

        def interrupt(id=trial.id):
            folder = tmp_path / id
            os.replace(folder / "previous.pt", folder / "checkpoint.pt")

        interrupt()
        shares = []
        again, resumed = group.run_trial(tiny(settings | files | FSDP), "main", shares.append)
        assert resumed == sharded and again.loss == trial.loss and shares[0] > 5 / 8
        interrupt()
        single, resumed = training.run_trial(tiny(settings | files), "main", acc)
        assert resumed[:5] == sharded[:5] and resumed == pytest.approx(curve, rel=1e-5)
        assert single.loss == pytest.approx(alone.loss, rel=1e-5)
    interrupt()  # a checkpoint of one process, continued by two with shards
    assert group.run_trial(tiny(settings | files | FSDP), "main")[0].loss == pytest.approx(
        alone.loss, rel=1e-5
    )


def test_a_user_error_of_a_rank_is_raised(tiny, tmp_path, group):
    (tmp_path / "file").write_text("")
    refused = {"engine.runs": str(tmp_path / "file"), "engine.checkpoint_every": 2}
    with pytest.raises(UserError, match=r"^`engine\.runs` must be a writable folder, but"):
        group.run_trial(tiny(refused | {"engine.processes": 2}), "main")


def test_ranks_stay_between_trials_and_are_replaced_after_a_death(tiny, group):
    recipe = tiny({"width": 64, "engine.processes": 2})
    alone, curve = training.run_trial(tiny(width=64), "main", training.accelerator())
    shares = []
    trial, same = group.run_trial(recipe, "main", shares.append)
    ids = [rank.pid for rank in group.ranks]
    assert shares and trial.id == alone.id and same == pytest.approx(curve, rel=1e-5)
    # The second trial has the same processes and the same bits.
    assert group.run_trial(recipe, "main")[1] == same
    assert [rank.pid for rank in group.ranks] == ids
    diverged, _ = group.run_trial(tiny({"lr": 1e4, "engine.processes": 2}), "main")
    assert diverged.status == "diverged" and "last good loss" in diverged.message

    def kill(share):
        group.ranks[1].kill()

    with pytest.raises(training.RankDied, match=r"process 1 of the 2 .* status -9") as error:
        group.run_trial(tiny({"engine.processes": 2, "tokens": 256 * 10**5}), "main", kill)
    assert error.value.status == -9 and not group.ranks


LAUNCHER = """
import json, os, sys
from scaletune import recipe, training

point = recipe.validate_recipe(json.loads(sys.argv[1]), "killed")
with training.RankGroup() as group:
    group.run_trial(point, "main", lambda share: print(os.getpid(), flush=True))
"""


def test_a_killed_owner_leaves_no_ranks(tiny, tmp_path):
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
    with training.RankGroup() as group:
        trial, curve = group.run_trial(tiny({"width": 64, "engine.processes": 2}), "main")
    alone, expected = training.run_trial(tiny(width=64), "main", training.accelerator())
    assert trial.id == alone.id and curve == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "processes", "axis"),
    [
        ((64, 32), 4, 0),
        ((1, 64, 32), 4, 1),
        ((1, 6, 32), 4, 2),
        ((1, 7, 3), 4, 0),
        ((5, 8), 4, 0),
        ((1, 64), 2, 1),
        ((), 2, 0),
    ],
)
def test_a_tensor_is_divided_along_the_first_axis_that_has_a_part_for_each(shape, processes, axis):
    assert sharding.shard_axis(torch.Size(shape), processes) == axis


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine.processes": 1}, "`engine.processes` of 2 or more, but got 1"),
        ({"optimizer.family": "muon"}, "updates each entry on its own .* but got 'muon'"),
        ({"schedule.ema_half_life": 512}, "without `schedule.ema_half_life`, but got 512"),
        ({"engine.noise_every": 2}, "without `engine.noise_every`, but got 2"),
        ({"engine.compile": True}, "without `engine.compile`, but got True"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tiny, settings, message):
    with pytest.raises(UserError, match=message):
        tiny(FSDP | settings)
