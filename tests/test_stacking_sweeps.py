"""Stacks in a sweep: which tasks train together; the record equals that of single trials."""

import signal

import psutil
import pytest
import torch

from scaletune import recipe as recipes
from scaletune import sweeping, training
from scaletune.records import read_jsonl
from scaletune.sweeping import out_of_memory, stacks
from scaletune.sweeping.progress import SweepProgress

MEASURED = ("id", "sweep", "status", "loss", "train_loss", "message", "flops", "point")


def stacked_recipe(tiny, **settings):
    return tiny({"axes": {"lr": [2e-3, 8e-3, 1e3, 4e-3]}, "engine.workers": 1} | settings)


def queue(*points):
    return sweeping.tasks("main", points)


def assigned_rates(tasks, workers=1):
    """Learning rates of each stack that is assigned, until the queue is empty."""
    rates = []
    while tasks:
        rates.append([task.recipe.optimizer.lr for task in stacks.take_stack(tasks, workers)])
    return rates


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(stacks, "on_gpu", lambda: False)


def test_trials_of_equal_shapes_are_stacked(tiny, no_gpu):
    points = [tiny(lr=lr, seed=seed) for seed in (0, 1) for lr in (1e-3, 2e-3)]
    assert assigned_rates(queue(*points, tiny(lr=4e-3), tiny(lr=8e-3, width=128))) == [
        [1e-3, 2e-3, 1e-3, 2e-3, 4e-3],
        [8e-3],
    ]


def test_a_stack_is_no_larger_than_requested_and_each_worker_gets_its_share(tiny, no_gpu):
    points = [tiny({"lr": lr, "engine.stack": 3}) for lr in (1e-3, 2e-3, 3e-3, 4e-3, 5e-3)]
    assert assigned_rates(queue(*points)) == [[1e-3, 2e-3, 3e-3], [4e-3, 5e-3]]
    assert assigned_rates(queue(*points), workers=5) == [[1e-3], [2e-3], [3e-3], [4e-3], [5e-3]]
    assert assigned_rates(
        queue(*[tiny({"lr": point.optimizer.lr, "engine.stack": 1}) for point in points[:2]])
    ) == [[1e-3], [2e-3]]


def test_two_workers_get_equal_shares_of_a_queue(tiny, no_gpu):
    tasks = queue(*[tiny({"lr": lr * 1e-3, "engine.stack": 8}) for lr in range(1, 9)])
    assert [len(stacks.take_stack(tasks, 2)), len(stacks.take_stack(tasks, 2, running=4))] == [4, 4]
    assert not tasks


def test_separate_training_is_explained_where_a_stack_is_requested(tiny):
    points = [
        tiny({"engine.stack": 4, "width": width, "seed": seed, "lr": lr})
        for width in (32, 64)
        for seed in (0, 1)
        for lr in (1e-3, 2e-3)
    ]
    assert (
        stacks.explain_separate_training(queue(*points))
        == "no stacks across different values of `model.width`"
    )
    assert stacks.explain_separate_training(queue(*points[:2])) == ""
    assert stacks.explain_separate_training(queue(tiny(width=32), tiny(width=64))) == ""
    lone = tiny({"engine.stack": 4, "training.z_loss": 1e-4})
    assert (
        stacks.explain_separate_training(queue(lone))
        == "no stacked training: `training.z_loss = 0.0001` reads the logits of one trial"
    )


def test_workers_share_a_gpus_memory_among_their_stacks(tiny, monkeypatch):
    kind = type("Properties", (), {"total_memory": 4 * 10**7})
    monkeypatch.setattr(stacks, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: kind)
    sizes = {}
    for workers in (2, 4, 8):
        points = [
            tiny({"lr": lr * 1e-4, "engine.stack": "fill", "engine.workers": workers})
            for lr in range(1, 33)
        ]
        sizes[workers] = len(stacks.take_stack(queue(*points), 1))
    assert sizes[8] > 1 and sizes[4] // 2 == sizes[8] and sizes[2] // 4 == sizes[8]


def test_a_trial_whose_worker_died_trains_alone(tiny, no_gpu):
    tasks = queue(*[tiny({"lr": lr, "engine.stack": 4}) for lr in (1e-3, 2e-3, 3e-3, 4e-3)])
    tasks[1].most = 1
    assert assigned_rates(tasks) == [[1e-3, 3e-3, 4e-3], [2e-3]]


def test_trials_that_lacked_memory_train_in_half_the_stack(tiny, no_gpu):
    tasks = queue(
        *[tiny({"lr": lr, "engine.stack": 4}) for lr in (1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3)]
    )
    assert [out_of_memory.shrink(task, 4) for task in tasks[:4]] == [
        "in a stack of 2 instead of 4"
    ] * 4
    assert assigned_rates(tasks) == [[1e-3, 2e-3], [3e-3, 4e-3], [5e-3, 6e-3]]


@pytest.mark.parametrize(
    ("stack", "message", "most"),
    [(3, "in a stack of 1 instead of 3", 1), (1, "with engine.accumulation = 2", 1)],
)
def test_a_trial_is_made_smaller_by_its_stack_first(tiny, stack, message, most):
    (task,) = queue(tiny())
    assert out_of_memory.shrink(task, stack) == message and (task.shrunk, task.most) == (1, most)
    assert task.recipe.engine.accumulation == (2 if stack == 1 else 1)


def test_one_row_does_not_halve(tiny):
    (task,) = queue(tiny(batch_tokens=32))
    assert out_of_memory.shrink(task, 1) == "" and task.shrunk == 0


def test_the_record_is_the_one_of_trial_by_trial(tiny, tmp_path):
    recipe = stacked_recipe(tiny, **{"engine.stack": 4})
    table = sweeping.sweep(recipe, out=tmp_path)
    assert table["status"].tolist() == ["done", "done", "done", "diverged"]
    assert [row["stack"] for row in table["provenance"]] == [4] * 4
    alone = {
        trial.id: trial
        for trial, _ in (
            training.run_trial(point, "main", training.accelerator())
            for point in recipes.points(recipe)
        )
    }
    for trial in read_jsonl(tmp_path / "sweeps/tiny.jsonl"):
        assert all(getattr(trial, name) == getattr(alone[trial.id], name) for name in MEASURED)


def test_a_killed_worker_costs_its_stack_and_no_more(tiny, tmp_path, monkeypatch):
    """The worker is killed after the diverged trial is recorded.

    That record stays; the other trials train again, alone.
    """
    killed, finish = [], SweepProgress.finish

    def watched(progress, task, trial):
        finish(progress, task, trial)
        if not killed:
            killed.append(trial)
            worker = next(
                child
                for child in psutil.Process().children()
                if "scaletune.sweeping.engines.worker" in child.cmdline()
            )
            worker.send_signal(signal.SIGKILL)

    monkeypatch.setattr(SweepProgress, "finish", watched)
    recipe = stacked_recipe(tiny, tokens=256 * 40, **{"engine.stack": 4})
    table = sweeping.sweep(recipe, out=tmp_path).sort_values("lr")
    assert killed[0].status == "diverged"
    assert table["status"].tolist() == ["done", "done", "done", "diverged"]
    assert [row["stack"] for row in table["provenance"]] == [1, 1, 1, 4]
    alone, _ = training.run_trial(recipes.points(recipe)[1], "main", training.accelerator())
    assert table["loss"].iloc[2] == alone.loss
