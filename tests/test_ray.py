"""The Ray engine gives the records of the local engine, also when workers or nodes die."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import killed_trainer
import pandas as pd
import psutil
import pytest
from test_sweeping import PATIENCE, InProcess, measured, wait_for

from scaletune import recipe as recipes
from scaletune import sweeping, training
from scaletune.errors import UserError
from scaletune.recipe import with_settings
from scaletune.recipe.engine import Engine
from scaletune.sweeping.engines import pool
from scaletune.sweeping.engines import ray as ours
from scaletune.sweeping.engines.ray import cluster
from scaletune.transferring.formats.recipe import toml

WORKER = "scaletune.sweeping.engines.worker"


@pytest.fixture(scope="module")
def ray():
    return pytest.importorskip("ray", reason="needs the extra [ray]")


@pytest.fixture(scope="module")
def nodes(ray):
    """A Ray cluster to which this process is connected: a head without cores, a node with two."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray_cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": cluster.STORE,
            "include_dashboard": False,
        },
    )
    ray_cluster.add_node(num_cpus=2, object_store_memory=cluster.STORE)
    ray.init(address=ray_cluster.address, log_to_driver=False, logging_level="ERROR")
    yield ray_cluster
    ray.shutdown()
    ray_cluster.shutdown()


@pytest.fixture
def on_ray(tiny):
    return lambda settings=(), **named: tiny({"engine.kind": "ray", **dict(settings)}, **named)


LONG = {
    "tokens": 200 * 256,
    "data.epochs": 2,
    "engine.checkpoint_every": 20,
    "engine.stack": 1,
    "axes": {"seed": [0, 1, 2, 3, 4]},
}


@pytest.fixture(scope="module")
def undisturbed_losses(tiny):
    """The losses of the trials of LONG, each about a second of training, without failures."""
    accelerator = training.accelerator()
    return [
        training.run_trial(point, "main", accelerator)[0].loss
        for point in recipes.points(tiny(LONG | {"engine.checkpoint_every": 0}))
    ]


def workers():
    """All worker processes of Ray actors on this machine."""
    processes = []
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if WORKER in (process.info["cmdline"] or ()) and "ray::" in _title(process.info["ppid"]):
            processes.append(process)
    return processes


def _title(pid):
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return ""


def record_started_nodes(monkeypatch):
    """A list to which the node of every started actor is appended."""
    seen, real = [], ours.RayPool._confirm_start

    def spy(self, slot, answer):
        real(self, slot, answer)
        seen.append(slot.node)

    monkeypatch.setattr(ours.RayPool, "_confirm_start", spy)
    return seen


def start_sweep(recipe, out):
    """Starts a sweep in a thread; returns a function that waits for its table.

    Ray starts nodes only from the main thread.
    """
    ended = []

    def run():
        try:
            ended.append(sweeping.sweep(recipe, out=out))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def join():
        thread.join(PATIENCE)
        assert isinstance(ended[0], pd.DataFrame), ended[0]
        return ended[0]

    return join


# --- the record -----------------------------------------------------------------------------------


def test_the_record_is_the_local_engines(tiny, nodes, tmp_path):
    """All fields except times, to the bit; one of the trials diverges."""
    base_recipe = tiny({"axes": {"lr": [2e-3, 8e-3, 1e3], "seed": [0, 1]}, "engine.workers": 2})
    for kind in ("local", "ray"):
        sweeping.sweep(with_settings(base_recipe, {"engine.kind": kind}), out=tmp_path / kind)
    local, far = (measured(tmp_path / kind / "sweeps/tiny.jsonl") for kind in ("local", "ray"))
    assert far == local and len(far) == 6 and {row["status"] for row in far} == {"done", "diverged"}
    assert not workers()


@pytest.mark.parametrize(
    "search",
    [{"kind": "basin", "budget": 4}, {"kind": "joint", "budget": 5, "wave": 2}],
    ids=lambda s: s["kind"],
)
def test_a_search_is_the_same_with_both_engines(tiny, nodes, tmp_path, search, monkeypatch):
    # the local engine trains in this process; actors are not affected
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", InProcess)
    base_recipe = tiny(
        {
            "axes": {"lr": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "width": [16, 32]},
            "search": search,
            "engine.workers": 1,
        }
    )
    for kind in ("local", "ray"):
        sweeping.sweep(with_settings(base_recipe, {"engine.kind": kind}), out=tmp_path / kind)
    assert measured(tmp_path / "ray/sweeps/tiny.jsonl") == measured(
        tmp_path / "local/sweeps/tiny.jsonl"
    )


def test_a_command_that_fails_and_one_that_is_stopped(nodes, tmp_path, capsys):
    """The record of the local engine: the first trial continues from its checkpoint."""
    killed_trainer.check_failure_and_stop(
        killed_trainer.sweep_with_failure_and_stop("ray", tmp_path)
    )
    assert "try 1: exit status 1; last log lines: no disk" in capsys.readouterr().err
    assert not workers()


def test_a_trial_over_two_processes(on_ray, nodes, tmp_path):
    """One actor reserves the cores of both processes."""
    single, _ = training.run_trial(on_ray(), "main", training.accelerator())
    both = sweeping.sweep(on_ray({"engine.processes": 2}), out=tmp_path)
    assert both["id"].tolist() == [single.id] and both["provenance"][0]["processes"] == 2
    assert both["loss"][0] == pytest.approx(single.loss, rel=1e-5)


# --- failures -------------------------------------------------------------------------------------


def test_trials_of_killed_workers_and_actors_are_retried(
    on_ray, undisturbed_losses, nodes, tmp_path, capsys
):
    """Kills a worker, then an actor together with its worker."""
    join = start_sweep(on_ray(LONG), tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    workers()[0].kill()
    wait_for(lambda: len(list(tmp_path.glob("runs/*/checkpoint.pt"))) >= 3)
    workers()[0].parent().kill()
    assert join()["loss"].tolist() == undisturbed_losses
    errors = capsys.readouterr().err
    assert "try 1: its worker died; last log lines: none (exit status -9)" in errors
    assert "its worker died: Ray lost its actor on" in errors
    assert not workers()


def test_nodes_may_join_and_leave(on_ray, undisturbed_losses, nodes, tmp_path, monkeypatch, capsys):
    """A node joins a running sweep and is lost; its trial resumes on another node."""
    seen = record_started_nodes(monkeypatch)
    join = start_sweep(on_ray(LONG), tmp_path)
    wait_for(lambda: len(seen) == len(workers()) == 2)
    held = workers()
    for worker in held:
        worker.suspend()  # so that trials are left for the new node
    there = {path.parent.name for path in tmp_path.glob("runs/*/checkpoint.pt")}
    added = nodes.add_node(num_cpus=1, object_store_memory=cluster.STORE)
    wait_for(lambda: {path.parent.name for path in tmp_path.glob("runs/*/checkpoint.pt")} - there)
    nodes.remove_node(added, allow_graceful=False)
    for worker in held:
        worker.resume()
    assert join()["loss"].tolist() == undisturbed_losses
    output = capsys.readouterr()
    assert "try 1: its worker died: Ray lost its actor on" in output.err
    assert not output.out
    assert len(set(seen)) == 2
    assert not workers()


def test_an_actor_that_hangs_is_replaced(on_ray, nodes, tmp_path, monkeypatch, capsys):
    """Its worker is killed too: it would write into the checkpoint of its replacement."""
    monkeypatch.setattr(ours, "SILENCE", -996.0)  # four seconds after the last answer
    join = start_sweep(on_ray({**LONG, "axes": {"seed": [0]}, "engine.patience": 1000.0}), tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    (first,) = workers()
    first.parent().suspend()
    wait_for(lambda: not first.is_running())
    assert join()["status"].tolist() == ["done"]
    assert "try 1: its worker's node " in capsys.readouterr().err
    assert not workers()


def test_a_node_that_cannot_read_the_data_is_reported_at_once(on_ray, words, nodes, tmp_path):
    moved = tmp_path / "words.txt"
    moved.write_bytes(words.read_bytes())
    tasks = sweeping.tasks("main", [on_ray({"data.source": str(moved)})])
    moved.unlink()
    with pytest.raises(UserError, match=r"words.txt.* \(on .*\)"):
        sweeping.train_all(tasks, tmp_path / "sweeps/far")
    assert not workers()


def test_nodes_must_have_our_version(on_ray, nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "version", lambda package: "0.0.9")
    with pytest.raises(UserError, match=r"every node must have scaletune 0.0.9, but .* has 0.1.0"):
        sweeping.sweep(on_ray(), out=tmp_path)


# --- a local Ray instance -------------------------------------------------------------------------


@pytest.fixture
def own_instance(ray, tiny, tmp_path):
    """(driver of a sweep in its own process group, its processes, function listing its folders)."""
    (tmp_path / "some.toml").write_text(
        toml(tiny(LONG | {"engine.workers": 2}).model_dump(exclude_none=True))
    )
    command = [
        sys.executable,
        "-m",
        "scaletune",
        "sweep",
        str(tmp_path / "some.toml"),
        "--engine",
        "ray",
        "--json",
        "--out",
        str(tmp_path),
    ]
    before = set(Path("/tmp").glob("scaletune-*"))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as driver:
        wait_for(lambda: driver.poll() is not None or list(tmp_path.glob("runs/*/checkpoint.pt")))
        family = psutil.Process(driver.pid).children(recursive=True)
        yield driver, family, lambda: set(Path("/tmp").glob("scaletune-*")) - before
        driver.kill()
    for folder in set(Path("/tmp").glob("scaletune-*")) - before:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_keyboard_interrupt_leaves_no_process(own_instance, tmp_path):
    driver, family, folders = own_instance
    assert len([process for process in family if WORKER in process.cmdline()]) == 2 and folders()
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 130
    assert out == ""
    assert "scaletune: interrupted; finished trials are recorded" in err
    assert psutil.wait_procs(family, timeout=1)[1] == [] and not folders()
    assert (tmp_path / "sweeps/tiny.jsonl").exists()


def test_ray_ends_when_its_driver_is_killed(own_instance):
    """Two agents of Ray, which hold no resources, need a minute to end."""
    driver, family, _ = own_instance
    agents = [
        process
        for process in family
        if process.cmdline()[0] in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    ]
    driver.kill()
    assert len(agents) == 2 and psutil.wait_procs(set(family) - set(agents), timeout=10)[1] == []
    for agent in agents:
        agent.kill()


# --- errors ---------------------------------------------------------------------------------------


def test_without_ray_the_error_names_what_to_install(on_ray, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UserError, match=r"engine.kind 'ray' needs Ray: pip install 'scaletune\[ray\]'"
    ):
        sweeping.sweep(on_ray(), out=tmp_path)


def test_every_kind_has_an_engine():
    assert set(get_args(Engine.model_fields["kind"].annotation)) == set(pool.ENGINES)


@pytest.mark.parametrize(
    "address", ["ray://host:10001", "host", ":6379", "host:66000", "http://host:1"]
)
def test_an_address_has_a_host_and_a_port(on_ray, address):
    with pytest.raises(
        UserError, match=r"`engine.ray.address` must be 'local', 'auto' or HOST:PORT, but got"
    ):
        on_ray({"engine.ray.address": address})


def test_processes_have_whole_gpus(on_ray):
    assert on_ray({"engine.ray.gpus": 0.25}).engine.ray.gpus == 0.25
    with pytest.raises(
        UserError,
        match=r"`engine.ray.gpus` must be 0 or 1 where a trial has 2 processes, but got 0.5",
    ):
        on_ray({"engine.ray.gpus": 0.5, "engine.processes": 2})


class FakeRay:
    """The part of Ray that the engine uses, with nodes that the test defines."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def __init__(self, *nodes, connected=True):
        self.there, self.connected = (
            [{"NodeID": str(i), "Alive": True, "Resources": node} for i, node in enumerate(nodes)],
            connected,
        )

    def is_initialized(self):
        return self.connected

    def init(self, **options):
        self.options = options

    def shutdown(self):
        self.connected = False

    def nodes(self):
        return self.there


@pytest.fixture
def fake_ray(monkeypatch):
    def put(*nodes, **options):
        fake = FakeRay(*nodes, **options)
        monkeypatch.setattr(cluster, "_ray", lambda: fake)
        return fake

    return put


def connect(recipe, workers="auto"):
    return cluster.RayCluster(recipe.engine, workers, recipe.engine.processes)


@pytest.mark.parametrize(
    ("settings", "capacity"),
    [
        ({}, 9),
        ({"engine.processes": 2}, 4),
        ({"engine.ray.cpus": 4}, 3),
        ({"engine.ray.gpus": 0}, 18),
        ({"engine.ray.gpus": 0.5}, 10),
        ({"engine.ray.memory": 40}, 3),
        ({"engine.ray.memory": 40, "engine.ray.gpus": 0}, 4),
    ],
    ids=str,
)
def test_as_many_workers_as_nodes_have_room_for(on_ray, fake_ray, settings, capacity):
    fake_ray(
        {"CPU": 8.0, "GPU": 8.0, "memory": 100.0},
        {"CPU": 8.0, "GPU": 1.0, "memory": 100.0},
        {"CPU": 2.0, "memory": 30.0},
    )
    connection = connect(on_ray(settings))
    assert connection.capacity() == capacity
    connection.leave()


def test_no_room_waits_for_a_node_of_a_cluster(on_ray, fake_ray, capsys):
    fake = fake_ray({"CPU": 0.0})
    connection = connect(on_ray({"engine.ray.address": "head:6379", "engine.processes": 2}))
    assert connection.capacity() == 1
    assert capsys.readouterr().err == (
        "ray: a worker reserves 2 CPU, but no node of head:6379 has that: waiting for a "
        "node to join\n"
    )
    fake.there.append({"NodeID": "new", "Alive": True, "Resources": {"CPU": 8.0}})
    connection.last_look = -cluster.LOOK
    assert connection.capacity() == 4
    connection.leave()
    assert fake.connected  # an existing connection is kept


def test_no_room_in_an_own_instance_is_refused(on_ray, fake_ray):
    fake = fake_ray({"CPU": 4.0}, connected=False)
    with pytest.raises(
        UserError,
        match=r"a worker reserves 1 CPU, 1 GPU, but this machine has less: lower `engine\.ray`",
    ):
        connect(on_ray({"engine.ray.gpus": 1}), 3)
    assert not Path(fake.options["_temp_dir"]).exists() and fake.options["address"] == "local"
    assert fake.options["num_cpus"] == max(3, len(os.sched_getaffinity(0)))


def test_an_address_without_a_cluster_is_reported_at_once(on_ray, fake_ray):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        fake_ray(connected=False)
        with pytest.raises(
            UserError,
            match=(
                f"`engine.ray.address` must be a running Ray cluster .*, but got '{address}': "
                ".*refused"
            ),
        ):
            connect(on_ray({"engine.ray.address": address}))
