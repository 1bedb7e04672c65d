"""GPUs and cores per worker, as functions of the numbers of GPUs, and the rules of the recipe."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from scaletune.errors import UserError
from scaletune.recipe import validate_recipe
from scaletune.sweeping.engines import devices
from scaletune.sweeping.engines.ray.cluster import RayCluster
from scaletune.sweeping.engines.slurm import cluster

COMMAND = {"trainer.command": ["torchrun", "--nproc_per_node={gpus}", "train.py", "--lr={lr}"]}


def assign(workers, requested, processes, gpus, cores=8):
    """The GPUs of each worker."""
    per_worker = devices.gpus_per_worker(requested, processes, gpus)
    size = devices.count_workers(workers, per_worker, processes, gpus, cores)
    visible = [f"GPU-{i}" for i in range(gpus)]
    return [devices.pin_gpus(slot, per_worker, visible) for slot in range(size)]


@given(gpus=some.integers(1, 16), requested=some.integers(1, 16), processes=some.integers(1, 4))
def test_workers_have_gpus_of_their_own_and_no_gpu_idles_that_another_could_use(
    gpus, requested, processes
):
    if requested > gpus:
        with pytest.raises(UserError, match=f"but got {requested} and this machine has {gpus}"):
            assign("auto", requested, processes, gpus)
        return
    pinned = assign("auto", requested, processes, gpus)
    used = [gpu for worker in pinned for gpu in worker]
    assert {len(worker) for worker in pinned} == {requested}
    assert len(used) == len(set(used)) > gpus - requested


@given(gpus=some.integers(2, 8), per_worker=some.integers(2, 8), workers=some.integers(1, 8))
def test_more_workers_than_gpus_allow_are_refused(gpus, per_worker, workers):
    if per_worker > gpus:
        return
    if workers * per_worker <= gpus:
        used = [gpu for worker in assign(workers, per_worker, 1, gpus) for gpu in worker]
        assert len(used) == len(set(used)) == workers * per_worker
        return
    with pytest.raises(UserError) as error:
        assign(workers, per_worker, 1, gpus)
    assert str(error.value) == (
        f"`engine.workers * gpus_per_trial <= GPUs` must hold, but got {workers} workers of"
        f" {per_worker} GPUs each and {gpus} GPUs: lower `engine.workers` to {gpus // per_worker},"
        ' or leave it at "auto"'
    )


def test_processes_count_as_gpus_and_single_ones_may_share():
    # Three processes on four GPUs: the second worker would have got GPUs 3, 0 and 1.
    assert assign("auto", None, 3, 4) == [["GPU-0", "GPU-1", "GPU-2"]]
    with pytest.raises(UserError, match="got 2 workers of 3 GPUs each and 4 GPUs"):
        assign(2, None, 3, 4)
    assert assign(3, None, 1, 2) == [["GPU-0"], ["GPU-1"], ["GPU-0"]]
    assert devices.describe_sharing(3, 1, 2) == "3 workers share 2 GPUs"
    assert not devices.describe_sharing(2, 1, 2) and not devices.describe_sharing(8, 0, 2)


def test_without_gpus_the_cores_count():
    assert assign("auto", None, 3, 0, cores=8) == [[], []]
    assert assign("auto", 0, 1, 4, cores=8) == [[]] * 8  # gpus_per_trial = 0 trains on cores
    assert assign(5, None, 1, 0) == [[]] * 5
    with pytest.raises(UserError, match=r"`engine.gpus_per_trial <= GPUs` .* got 1 and .* has 0"):
        assign("auto", 1, 1, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"engine.gpus_per_trial": 2},
            "`engine.gpus_per_trial` must be 0 or `engine.processes` .*=2, processes=1",
        ),
        (
            {"engine.gpus_per_trial": 1, "engine.slurm.gpus_per_trial": 2},
            "must be equal, but got 1 and 2: remove the older one",
        ),
        (
            {"engine.gpus_per_trial": 1, "engine.ray.gpus": 0.5},
            "`engine.gpus_per_trial == engine.ray.gpus \\* processes` must hold",
        ),
        (
            {"engine.nodes_per_trial": 2, "engine.kind": "slurm"},
            "more than 1 needs `trainer.command`, because .* but got 2",
        ),
        (
            COMMAND | {"engine.nodes_per_trial": 2, "engine.kind": "ray"},
            "needs `engine.kind = 'slurm'`.* but got 2 with kind='ray'",
        ),
    ],
)
def test_devices_that_a_trainer_cannot_use_are_refused(tiny, settings, message):
    with pytest.raises(UserError, match=message):
        tiny(settings)


def test_the_older_name_is_read_by_slurm_only(tiny):
    older = {"engine.slurm.gpus_per_trial": 1}
    assert tiny(older).engine.requested_gpus is None
    assert tiny(older | {"engine.kind": "slurm"}).engine.requested_gpus == 1
    assert tiny(older | {"engine.gpus_per_trial": 1}).engine.requested_gpus == 1


def test_a_command_gets_gpus_on_several_nodes_of_slurm(tiny):
    engine = tiny(
        COMMAND
        | {
            "engine.kind": "slurm",
            "engine.gpus_per_trial": 8,
            "engine.nodes_per_trial": 2,
            "engine.slurm.cpus_per_trial": 32,
        }
    ).engine
    parameters = cluster._parameters(engine)
    assert (parameters["nodes"], parameters["gpus_per_node"]) == (2, 8)
    # Our worker runs once, on the first node, and lets the command's steps share it.
    assert parameters["slurm_srun_args"] == [
        *("--cpus-per-task=32", "--nodes=1", "--ntasks=1", "--overlap")
    ]
    one = cluster._parameters(tiny({"engine.kind": "slurm"}).engine)
    assert (one["nodes"], one["slurm_srun_args"]) == (1, ["--cpus-per-task=1"])


def test_ray_reserves_the_gpus_of_a_trial(tiny, monkeypatch):
    class Ray:
        def is_initialized(self):
            return True

        def nodes(self):
            resources = {"CPU": 16.0, "GPU": 8.0}
            return [{"NodeID": str(i), "Alive": True, "Resources": resources} for i in range(2)]

    monkeypatch.setattr("scaletune.sweeping.engines.ray.cluster._ray", Ray)
    engine = tiny(COMMAND | {"engine.kind": "ray", "engine.gpus_per_trial": 3}).engine
    connection = RayCluster(engine, "auto", engine.processes)
    assert connection.need["GPU"] == 3 and connection.capacity() == 4
    connection.leave()


def test_devices_are_no_part_of_a_trials_identity(tiny):
    from scaletune.recipe import trial_id

    plain = trial_id(tiny(), "data")
    for settings in (
        {"engine.gpus_per_trial": 0},
        {"engine.processes": 2, "engine.gpus_per_trial": 2, "engine.strategy": "fsdp"},
    ):
        recipe = tiny(settings)
        assert trial_id(recipe, "data") == plain
        assert validate_recipe(recipe.dump(), "tiny") == recipe
