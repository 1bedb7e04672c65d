"""The Ray engine: its records equal the local engine's, also when workers, actors or nodes die; no process stays."""

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
    """A cluster of a head without cores and a node of two, and this process's connection to it."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": cluster.STORE,
            "include_dashboard": False,
        },
    )
    made.add_node(num_cpus=2, object_store_memory=cluster.STORE)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


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
def calm(tiny):
    """The losses of LONG's trials, each a second of training, when nothing dies."""
    accelerator = training.accelerator()
    return [
        training.run_trial(point, "main", accelerator)[0].loss
        for point in recipes.points(tiny(LONG | {"engine.checkpoint_every": 0}))
    ]


def workers():
    """Worker processes of any actor on this machine: this test's own, as none else is on Ray."""
    found = []
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if WORKER in (process.info["cmdline"] or ()) and "ray::" in _title(process.info["ppid"]):
            found.append(process)
    return found


def _title(pid):
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return ""


def started(monkeypatch):
    """The nodes on which actors start."""
    seen, real = [], ours.RayPool._confirm_start

    def spy(self, slot, answer):
        real(self, slot, answer)
        seen.append(slot.node)

    monkeypatch.setattr(ours.RayPool, "_confirm_start", spy)
    return seen


def under_way(recipe, out):
    """A sweep in a thread (Ray starts nodes from the main one alone); a call waits for its table."""
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


# --- the record ------------------------------------------------------------------------------------------------------


def test_the_record_is_the_local_engines(tiny, nodes, tmp_path):
    """All fields except times, to the bit; one of the trials diverges."""
    asked = tiny({"axes": {"lr": [2e-3, 8e-3, 1e3], "seed": [0, 1]}, "engine.workers": 2})
    for kind in ("local", "ray"):
        sweeping.sweep(with_settings(asked, {"engine.kind": kind}), out=tmp_path / kind)
    local, far = (measured(tmp_path / kind / "sweeps/tiny.jsonl") for kind in ("local", "ray"))
    assert far == local and len(far) == 6 and {row["status"] for row in far} == {"done", "diverged"}
    assert not workers()


@pytest.mark.parametrize(
    "search",
    [{"kind": "basin", "budget": 4}, {"kind": "joint", "budget": 5, "wave": 2}],
    ids=lambda s: s["kind"],
)
def test_a_search_never_knows_which_engine_it_has(tiny, nodes, tmp_path, search, monkeypatch):
    monkeypatch.setattr(
        "scaletune.sweeping.engines.local.LocalPool", InProcess
    )  # of this process: the actors' are their own
    asked = tiny(
        {
            "axes": {"lr": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "width": [16, 32]},
            "search": search,
            "engine.workers": 1,
        }
    )
    for kind in ("local", "ray"):
        sweeping.sweep(with_settings(asked, {"engine.kind": kind}), out=tmp_path / kind)
    assert measured(tmp_path / "ray/sweeps/tiny.jsonl") == measured(
        tmp_path / "local/sweeps/tiny.jsonl"
    )


def test_a_trial_over_two_processes(on_ray, nodes, tmp_path):
    """One actor has the cores of both."""
    alone, _ = training.run_trial(on_ray(), "main", training.accelerator())
    both = sweeping.sweep(on_ray({"engine.processes": 2}), out=tmp_path)
    assert both["id"].tolist() == [alone.id] and both["provenance"][0]["processes"] == 2
    assert both["loss"][0] == pytest.approx(alone.loss, rel=1e-5)


# --- what is lost ----------------------------------------------------------------------------------------------------


def test_what_is_killed_is_tried_again(on_ray, calm, nodes, tmp_path, capsys):
    """A worker; then an actor, with which its worker goes."""
    join = under_way(on_ray(LONG), tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    workers()[0].kill()
    wait_for(lambda: len(list(tmp_path.glob("runs/*/checkpoint.pt"))) >= 3)
    workers()[0].parent().kill()
    assert join()["loss"].tolist() == calm
    said = capsys.readouterr().err
    assert (
        "try 1: its worker died; last log lines: none (exit status -9)" in said
        and "its worker died: Ray lost its actor on" in said
    )
    assert not workers()


def test_nodes_come_and_go(on_ray, calm, nodes, tmp_path, monkeypatch, capsys):
    """A node joins while a sweep runs, and is lost: its trial goes on from its checkpoint on another."""
    seen = started(monkeypatch)
    join = under_way(on_ray(LONG), tmp_path)
    wait_for(lambda: len(seen) == len(workers()) == 2)
    held = workers()
    for worker in held:
        worker.suspend()  # so that there is something left to train when the node has come
    there = {path.parent.name for path in tmp_path.glob("runs/*/checkpoint.pt")}
    added = nodes.add_node(num_cpus=1, object_store_memory=cluster.STORE)
    wait_for(lambda: {path.parent.name for path in tmp_path.glob("runs/*/checkpoint.pt")} - there)
    nodes.remove_node(added, allow_graceful=False)
    for worker in held:
        worker.resume()
    assert join()["loss"].tolist() == calm
    said = capsys.readouterr()
    assert (
        "try 1: its worker died: Ray lost its actor on" in said.err
        and not said.out
        and len(set(seen)) == 2
    )
    assert not workers()


def test_an_actor_that_hangs_is_replaced(on_ray, nodes, tmp_path, monkeypatch, capsys):
    """Its worker would train on, and write into the checkpoint of its successor's: it has to go too."""
    monkeypatch.setattr(ours, "SILENCE", -996.0)  # four seconds after the last answer
    join = under_way(on_ray({**LONG, "axes": {"seed": [0]}, "engine.patience": 1000.0}), tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    (first,) = workers()
    first.parent().suspend()
    wait_for(lambda: not first.is_running())
    assert join()["status"].tolist() == ["done"]
    assert "try 1: its worker's node " in capsys.readouterr().err
    assert not workers()


def test_a_node_that_cannot_read_the_data_is_said_at_once(on_ray, words, nodes, tmp_path):
    moved = tmp_path / "words.txt"
    moved.write_bytes(words.read_bytes())
    asked = sweeping.tasks("main", [on_ray({"data.source": str(moved)})])
    moved.unlink()
    with pytest.raises(UserError, match=r"words.txt.* \(on .*\)"):
        sweeping.train_all(asked, tmp_path / "sweeps/far")
    assert not workers()


def test_nodes_must_have_our_version(on_ray, nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "version", lambda package: "0.0.9")
    with pytest.raises(UserError, match=r"every node must have scaletune 0.0.9, but .* has 0.1.0"):
        sweeping.sweep(on_ray(), out=tmp_path)


# --- an own instance -------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(ray, tiny, tmp_path):
    """A sweep's driver and Ray's processes in a group of their own, and what is left of them."""
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


def test_an_interrupt_from_the_keyboard_leaves_nothing(alone, tmp_path):
    driver, family, folders = alone
    assert len([process for process in family if WORKER in process.cmdline()]) == 2 and folders()
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=PATIENCE)
    assert (
        driver.returncode == 130
        and out == ""
        and "scaletune: interrupted; finished trials are recorded" in err
    )
    assert psutil.wait_procs(family, timeout=1)[1] == [] and not folders()
    assert (tmp_path / "sweeps/tiny.jsonl").exists()


def test_a_killed_driver_takes_ray_with_it(alone):
    """But for two agents of Ray's, which hold nothing and take a minute to notice."""
    driver, family, _ = alone
    agents = [
        process
        for process in family
        if process.cmdline()[0] in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    ]
    driver.kill()
    assert len(agents) == 2 and psutil.wait_procs(set(family) - set(agents), timeout=10)[1] == []
    for agent in agents:
        agent.kill()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_without_ray_it_says_what_to_install(on_ray, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UserError, match=r"engine.kind 'ray' needs Ray: pip install 'scaletune\[ray\]'"
    ):
        sweeping.sweep(on_ray(), out=tmp_path)


def test_kinds_are_the_engines():
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


class Planted:
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
def planted(monkeypatch):
    def put(*nodes, **options):
        made = Planted(*nodes, **options)
        monkeypatch.setattr(cluster, "_ray", lambda: made)
        return made

    return put


def joined(recipe, workers="auto"):
    return cluster.RayCluster(recipe.engine, workers, recipe.engine.processes)


@pytest.mark.parametrize(
    ("settings", "capacity"),
    [({}, 9), ({"engine.processes": 2}, 4), ({"engine.ray.cpus": 4}, 3), ({"engine.ray.gpus": 0}, 18), ({"engine.ray.gpus": 0.5}, 10),
     ({"engine.ray.memory": 40}, 3), ({"engine.ray.memory": 40, "engine.ray.gpus": 0}, 4)],
    ids=str,
)  # fmt: skip
def test_as_many_workers_as_nodes_have_room_for(on_ray, planted, settings, capacity):
    planted(
        {"CPU": 8.0, "GPU": 8.0, "memory": 100.0},
        {"CPU": 8.0, "GPU": 1.0, "memory": 100.0},
        {"CPU": 2.0, "memory": 30.0},
    )
    found = joined(on_ray(settings))
    assert found.capacity() == capacity
    found.leave()


def test_no_room_waits_for_a_node_of_a_cluster(on_ray, planted, capsys):
    made = planted({"CPU": 0.0})
    found = joined(on_ray({"engine.ray.address": "head:6379", "engine.processes": 2}))
    assert found.capacity() == 1
    assert (
        capsys.readouterr().err
        == "ray: a worker reserves 2 CPU, but no node of head:6379 has that: waiting for a node to join\n"
    )
    made.there.append({"NodeID": "new", "Alive": True, "Resources": {"CPU": 8.0}})
    found.last_look = -cluster.LOOK
    assert found.capacity() == 4
    found.leave()
    assert made.connected  # a connection that was there stays


def test_no_room_in_an_own_instance_is_refused(on_ray, planted):
    made = planted({"CPU": 4.0}, connected=False)
    with pytest.raises(
        UserError,
        match=r"a worker reserves 1 CPU, 1 GPU, but this machine has less: lower `engine\.ray`",
    ):
        joined(on_ray({"engine.ray.gpus": 1}), 3)
    assert not Path(made.options["_temp_dir"]).exists() and made.options["address"] == "local"
    assert made.options["num_cpus"] == max(3, len(os.sched_getaffinity(0)))


def test_nobody_at_an_address_is_said_at_once(on_ray, planted):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        planted(connected=False)
        with pytest.raises(
            UserError,
            match=f"`engine.ray.address` must be a running Ray cluster .*, but got '{address}': .*refused",
        ):
            joined(on_ray({"engine.ray.address": address}))
