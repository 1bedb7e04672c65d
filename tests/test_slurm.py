"""The Slurm engine: job sizes, lost jobs and killed drivers.

The tests use a fake cluster, submitit's local executor and a real Slurm.
"""

import json
import os
import signal
import subprocess
import sys
import time

import killed_trainer
import psutil
import pytest
import slurm_node
import torch
from test_sweeping import Stub, measured, wait_for

from scaletune import sweeping
from scaletune.cli import main
from scaletune.errors import UserError
from scaletune.recipe import with_settings
from scaletune.records import read_jsonl
from scaletune.sweeping.engines import slurm
from scaletune.sweeping.engines.slurm import cluster, job_messages, job_size
from scaletune.sweeping.engines.slurm import job as running
from scaletune.sweeping.engines.slurm.cluster import SlurmCluster, State, SubmissionRefused
from scaletune.transferring.formats.recipe import toml

pytest.importorskip("submitit")

RUNNING, PENDING = State("RUNNING", 0, "None"), State("PENDING", 0, "Resources")


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "partition",
            "gpu\nrm -rf x",
            (
                r"`engine.slurm.partition` must be of letters, digits and any of .*, but got "
                r"'gpu\\nrm -rf x'"
            ),
        ),
        ("constraint", "$(reboot)", r"`engine.slurm.constraint` must be of "),
        (
            "minutes",
            90,
            (
                r"`engine.slurm.minutes <= time_minutes` must hold, but got minutes=90, "
                r"time_minutes=60"
            ),
        ),
        (
            "max_jobs",
            5000,
            r"`engine.slurm.max_jobs` must be less than or equal to 1000, but got 5000",
        ),
        (
            "gpus_per_trial",
            2,
            (
                r"`engine.slurm.gpus_per_trial` must be 0 or `engine.processes` "
                r".*gpus_per_trial=2, processes=1"
            ),
        ),
        ("patition", "gpu", r"unknown key `engine.slurm.patition` \(nearest: 'partition'\)"),
    ],
)
def test_invalid_slurm_settings_are_one_sentence(tiny, name, value, message):
    with pytest.raises(UserError, match=message):
        tiny({f"engine.slurm.{name}": float(value) if name == "minutes" else value})


def test_settings_become_submitit_parameters(tiny):
    recipe = tiny(
        {
            "engine.slurm": {
                "partition": "a100",
                "constraint": "a100&80gb",
                "gpus_per_trial": 4,
                "mem_gb": 64.0,
                "time_minutes": 240,
            },
            "engine.kind": "slurm",
            "engine.processes": 4,
        }
    )
    parameters = cluster._parameters(recipe.engine)
    assert (
        parameters["slurm_partition"],
        parameters["slurm_constraint"],
        parameters["gpus_per_node"],
        parameters["cpus_per_task"],
    ) == ("a100", "a100&80gb", 4, 4)
    assert (
        parameters["mem_gb"],
        parameters["timeout_min"],
        parameters["nodes"],
        parameters["slurm_qos"],
    ) == (64.0, 240, 1, None)


def test_the_engine_is_not_part_of_a_trials_identity(tiny):
    one, other = (
        sweeping.tasks("main", [point])[0].id
        for point in (tiny(), tiny({"engine.kind": "slurm", "engine.slurm.minutes": 1.0}))
    )
    assert one == other


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (
            ("find_spec", lambda name: None),
            r"^engine.kind 'slurm' needs submitit: `pip install 'scaletune\[slurm\]'`$",
        ),
        (
            ("shutil.which", lambda name: None),
            r"needs Slurm's commands on the PATH, but `sbatch` is not: run this on a login node$",
        ),
    ],
)
def test_a_missing_package_or_command_is_one_sentence(
    tiny, tmp_path, monkeypatch, capsys, patch, message
):
    monkeypatch.setattr(f"scaletune.sweeping.engines.slurm.cluster.{patch[0]}", patch[1])
    with pytest.raises(UserError, match=message):
        sweeping.sweep(tiny({"engine.kind": "slurm"}), out=tmp_path)


def test_a_folder_that_slurm_reads_as_a_pattern_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("scaletune.sweeping.engines.slurm.cluster.shutil.which", lambda name: name)
    with pytest.raises(UserError, match="must not contain '%', but got"):
        cluster.require_slurm(tmp_path / "50%j")


# --- job sizes ------------------------------------------------------------------------------------


@pytest.fixture
def make_tasks(tiny):
    """(n, engine settings) -> n tasks of 120 estimated seconds each that do not stack."""

    def build(n, **engine):
        settings = {"engine.kind": "slurm", "engine.stack": 1} | {
            f"engine.{name}": value for name, value in engine.items()
        }
        tasks = sweeping.tasks("main", [tiny(settings | {"seed": seed}) for seed in range(n)])
        for task in tasks:
            task.cost = 120.0
        return tasks

    return build


@pytest.mark.parametrize(
    ("minutes", "workers", "sizes"),
    [(0.0, 1000, [1] * 7), (4.0, 1000, [2, 2, 2, 1]), (60.0, 4, [7])],
)
def test_trials_share_a_job_until_it_lasts_the_minimum_time(make_tasks, minutes, workers, sizes):
    queue = make_tasks(7, **{"slurm.minutes": minutes})
    assert [len(pack) for pack in job_size.pack(queue, workers)] == sizes and queue == []


def test_a_trial_whose_job_was_lost_gets_its_own_job(make_tasks):
    queue = make_tasks(4, **{"slurm.minutes": 60.0})
    queue[1].tries = 1
    first, second, third = list(queue[:1]), queue[1], queue[2:]
    assert job_size.pack(queue, 8) == [first, [second], third]


def test_stacks_share_a_job_except_on_a_gpu_that_was_not_measured(tiny):
    def packs(**engine):
        settings = {f"engine.{name}": value for name, value in engine.items()} | {
            "engine.kind": "slurm",
            "engine.slurm.minutes": 0.0,
        }
        points = [tiny(settings | {"optimizer.lr": lr}) for lr in (1e-3, 2e-3, 3e-3, 4e-3)]
        return [len(pack) for pack in job_size.pack(sweeping.tasks("main", points), 2)]

    assert packs() == [2, 1, 1] and packs(**{"slurm.gpus_per_trial": 1}) == [1, 1, 1, 1]
    assert packs(**{"slurm.gpus_per_trial": 1}, stack=2) == [2, 1, 1]


def test_horizons_of_one_trunk_share_a_job_on_a_gpu_too(tiny):
    settings = {
        "engine.kind": "slurm",
        "engine.slurm": {"minutes": 0.0, "gpus_per_trial": 1},
        "schedule.warmup_tokens": 256,
    }
    points = [
        tiny(settings | {"lr": lr, "tokens": 256 * steps})
        for lr in (1e-3, 2e-3)
        for steps in (16, 8)
    ]
    assert [len(pack) for pack in job_size.pack(sweeping.tasks("main", points), 8)] == [2, 2]


def test_an_array_has_max_jobs_and_one_kind_of_job(make_tasks):
    queue = (
        make_tasks(5, **{"slurm.minutes": 0.0, "slurm.max_jobs": 2})
        + make_tasks(6, **{"slurm.minutes": 0.0, "slurm.mem_gb": 8.0})[5:]
    )
    assert [len(job_size.pack(queue, 9)) for _ in range(4)] == [2, 2, 1, 1] and not queue


# --- the states of jobs ---------------------------------------------------------------------------


class FakeCluster(SlurmCluster):
    """A cluster that starts no jobs; the test sets the job states."""

    def __init__(self, root, name="x"):
        super().__init__(root, name)
        self.known, self.arrays, self.cancelled, self.refuses = {}, [], [], ""

    def submit(self, folders, engine, parallel):
        if self.refuses:
            raise SubmissionRefused(self.refuses)
        ids = [f"{len(self.arrays)}_{i}" for i in range(len(folders))]
        self.arrays.append((len(folders), parallel))
        self.known |= dict.fromkeys(ids, PENDING)
        return ids

    def states(self):
        return self.known

    def cancel(self, ids):
        self.cancelled += ids
        self.known |= {job: State("CANCELLED", 0, "None") for job in ids}

    def log(self, job):
        return f"slurmstepd: error: *** JOB {job} ***"


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """A pool that queries a fake cluster at every call."""
    for name in ("WAIT", "LOOK", "GRACE", "SETTLE"):
        monkeypatch.setattr(slurm, name, 0.0)
    root = tmp_path / "sweeps/x.slurm"
    return slurm.SlurmPool(root, 9, FakeCluster(root))


def write_trial_answer(pool, task, message):
    order = next(order for order in pool.out if task.id in order.tasks)
    job_messages.write_answer(order.folder, task.id, message)


def test_answer_files_are_kept_until_the_trials_are_recorded(pool, make_tasks):
    queue = tasks = make_tasks(2, **{"slurm.minutes": 0.0})
    pool.hand_out(queue := list(tasks))
    assert queue == [] and pool.cluster.arrays == [(2, 9)] and pool.busy and pool.messages() == []
    write_trial_answer(pool, tasks[0], {"trial": {"id": tasks[0].id}, "curve": [1.0], "log": ""})
    ((task, message),) = pool.messages()
    path = job_messages.answer_path(pool.root, tasks[0].id)
    assert task is tasks[0] and message["curve"] == [1.0] and path.exists()
    assert pool.messages() == [] and not path.exists() and pool.busy
    pool.__exit__(KeyboardInterrupt)
    assert pool.cluster.cancelled == ["0_1"] and not pool.root.exists()


def test_an_ended_job_loses_its_started_trials_and_the_rest_is_submitted_again(pool, make_tasks):
    tasks = make_tasks(3, **{"slurm.minutes": 60.0})
    pool.hand_out(list(tasks))
    pool.cluster.known["0_0"] = RUNNING
    job_messages.write_heartbeat(
        pool.out[0].folder,
        {"shares": {tasks[0].id: 1.0, tasks[1].id: 0.25}, "log": "loading", "beats": 1},
    )
    write_trial_answer(pool, tasks[0], {"trial": {"id": tasks[0].id}, "curve": [], "log": ""})
    assert [(task, message.get("progress")) for task, message in pool.messages()] == [
        (tasks[0], None),
        (tasks[1], 0.25),
    ]
    pool.cluster.known["0_0"] = State("OUT_OF_MEMORY", -9, "OutOfMemory")
    ((task, lost),) = pool.messages()
    assert task is tasks[1]
    assert lost == {
        "lost": "its job 0_0 ended as OUT_OF_MEMORY",
        "status": -9,
        "memory": True,
        "log": "loading\nslurmstepd: error: *** JOB 0_0 ***",
        "stack": 1,
    }
    assert pool.busy and not pool.out
    pool.hand_out(queue := [])
    assert queue == [] and list(pool.out[0].tasks.values()) == [tasks[2]]


def test_a_job_that_never_started_loses_all_and_an_unreachable_controller_loses_none(
    pool, make_tasks, monkeypatch
):
    tasks = make_tasks(2, **{"slurm.minutes": 60.0})
    pool.hand_out(list(tasks))
    with monkeypatch.context() as patch:
        patch.setattr(pool.cluster, "states", lambda: None)
        assert pool.messages() == []
    pool.cluster.known.clear()  # Slurm has removed a job that ended long ago
    assert [(task.id, message["lost"]) for task, message in pool.messages()] == [
        (task.id, "its job 0_0 ended as COMPLETED") for task in tasks
    ]
    assert not pool.busy


def test_a_requeued_job_is_not_lost_and_a_job_without_messages_is(pool, make_tasks):
    (task,) = make_tasks(1, patience=0.2)
    pool.hand_out([task])
    job_messages.write_heartbeat(
        pool.out[0].folder, {"shares": {task.id: 0.5}, "log": "", "beats": 1}
    )
    for state in (RUNNING, State("REQUEUED", 0, "None"), PENDING, State("PENDING", 0, "BeginTime")):
        pool.cluster.known["0_0"] = state
        pool.messages()
        time.sleep(0.25)
    pool.cluster.known["0_0"] = RUNNING
    lost = wait_for(lambda: [message for _, message in pool.messages() if "lost" in message])
    assert lost[0]["lost"].startswith("its job 0_0 sent no message for 0")
    assert pool.cluster.cancelled == ["0_0"]
    assert not pool.busy


def test_the_next_driver_takes_over_and_submits_nothing_twice(pool, make_tasks, capsys):
    tasks = make_tasks(4, **{"slurm.minutes": 0.0})
    pool.hand_out(list(tasks[:3]))
    write_trial_answer(pool, tasks[0], {"trial": {"id": tasks[0].id}, "curve": [], "log": ""})
    # the driver was killed before it recorded the job id of this order
    unsubmitted = job_messages.write_order(pool.root, tasks[3:])
    after = slurm.SlurmPool(pool.root, 9, pool.cluster)
    assert not job_messages.order_exists(unsubmitted.folder)
    assert "3 jobs of an earlier driver continue" in capsys.readouterr().err
    after.hand_out(list(tasks))
    assert pool.cluster.arrays == [(3, 9), (1, 7)]
    assert [order.job for order in after.out] == ["0_1", "0_2", "1_0"]
    assert [task for task, _ in after.messages()] == [tasks[0]]
    with after:
        pass
    assert sorted(pool.cluster.cancelled) == ["0_0", "0_1", "0_2", "1_0"]


def test_an_interrupt_can_leave_jobs_to_the_next_driver(pool, make_tasks, capsys):
    pool.leave = True
    pool.hand_out(make_tasks(2, **{"slurm.minutes": 0.0}))
    pool.__exit__(KeyboardInterrupt)
    assert not pool.cluster.cancelled and len(job_messages.pending_orders(pool.root)) == 2
    assert "2 jobs stay in Slurm for the next driver" in capsys.readouterr().err


def test_no_more_than_workers_run_at_once(pool, make_tasks):
    pool.workers = 2
    pool.hand_out(make_tasks(5, **{"slurm.minutes": 0.0}))
    pool.hand_out(queue := make_tasks(6, **{"slurm.minutes": 0.0})[5:])
    assert pool.cluster.arrays == [(5, 2)] and len(queue) == 1
    for task in [task for order in pool.out[:4] for task in order.tasks.values()]:
        write_trial_answer(pool, task, {"trial": {"id": task.id}, "curve": [], "log": ""})
    assert len(pool.messages()) == 4
    pool.hand_out(queue)
    assert pool.cluster.arrays == [(5, 2), (1, 1)] and not queue


def test_a_refusal_is_a_user_error_unless_it_is_temporary(pool, make_tasks, capsys):
    tasks, pool.cluster.refuses = (
        make_tasks(3, **{"slurm.minutes": 0.0}),
        "sbatch: error: invalid partition specified: a10",
    )
    with pytest.raises(
        UserError,
        match=(
            r"^Slurm must accept the jobs, but refused them: sbatch: error: invalid partition "
            r"specified: a10$"
        ),
    ):
        pool.hand_out(list(tasks))
    pool.cluster.refuses = ""
    pool.hand_out(tasks[:1])
    pool.cluster.refuses = "sbatch: error: QOSMaxSubmitJobPerUserLimit"
    pool.hand_out(queue := tasks[1:])
    assert len(queue) == 2 and [list(order.tasks) for order in pool.out] == [[tasks[0].id]]
    assert (
        "Slurm accepts no more jobs for now: sbatch: error: QOSMaxSubmitJobPerUserLimit"
        in capsys.readouterr().err
    )
    pool.cluster.refuses, pool.again = "", 0.0
    pool.hand_out(queue)
    assert queue == [] and len(pool.out) == 3


def test_a_lost_try_is_reported_once_and_an_older_one_never(pool, make_tasks):
    (task,) = make_tasks(1)
    pool.hand_out([task])
    old = pool.out[0].folder.with_name("older")
    job_messages.write_answer(
        old, task.id, {"lost": "its worker died", "status": 1, "memory": False, "log": ""}
    )
    assert pool.messages() == [] and job_messages.list_answers(pool.root) == set()
    write_trial_answer(
        pool, task, {"lost": "its worker died", "status": 1, "memory": False, "log": "words"}
    )
    assert [message["log"] for _, message in pool.messages()] == ["words"]
    assert not pool.busy
    assert not job_messages.list_answers(pool.root)


def test_squeue_output_is_parsed(monkeypatch, tmp_path):
    output = (
        "12_3      PENDING     0     JobArrayTaskLimit   \n"
        "12_0   FAILED   768  NonZeroExitCode \n"
        "13   OUT_OF_MEMORY  9   OutOfMemory\n"
    )
    monkeypatch.setattr(
        "scaletune.sweeping.engines.slurm.cluster.subprocess.run",
        lambda *command, **named: subprocess.CompletedProcess([], 0, output),
    )
    assert SlurmCluster(tmp_path, "a b").states() == {
        "12_3": State("PENDING", 0, "JobArrayTaskLimit"),
        "12_0": State("FAILED", 3, "NonZeroExitCode"),
        "13": State("OUT_OF_MEMORY", -9, "OutOfMemory"),
    }
    assert SlurmCluster(tmp_path, "a b").name == "scaletune-a_b"


# --- running a job --------------------------------------------------------------------------------


class Scripted(Stub):
    """A local pool with scripted messages; callable entries are called."""

    script = ()

    def __init__(self, size, processes):
        self.remaining, self.workers = list(Scripted.script), [self]

    @property
    def busy(self):
        return bool(self.remaining)

    def read_log(self):
        return "x" * 5000 + "last words"

    def hand_out(self, queue):
        queue.clear()

    def messages(self):
        message = self.remaining.pop(0)
        return message if isinstance(message, list) else message() or []


@pytest.fixture
def training(pool, make_tasks, monkeypatch):
    """The runner of a job with two trials."""
    monkeypatch.setattr("scaletune.sweeping.engines.local.LocalPool", Scripted)
    monkeypatch.setattr(running.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(running, "TAKEN", 0.0)
    pool.hand_out(make_tasks(2, **{"slurm.minutes": 60.0}))
    pool.cluster.known["0_0"] = RUNNING
    return running.OrderRunner(pool.out[0].folder)


def test_a_requeued_job_does_not_repeat_an_answered_trial(training, pool):
    one, two = training.queue
    trial = {"trial": {"id": one.id}, "curve": [], "log": ""}
    Scripted.script = [[(one, {"progress": 0.5})], [(one, trial), (two, {"progress": 0.0})]]
    training.run()
    beat = job_messages.read_json(training.folder / "beat.json")
    assert beat["shares"] == {one.id: 0.5}
    assert beat["log"].endswith("last words")
    assert len(beat["log"]) == running.TAIL
    assert [task.id for task in running.OrderRunner(training.folder).queue] == [two.id]
    assert [(task.id, "trial" in message) for task, message in pool.messages()] == [(one.id, True)]


def test_a_lost_worker_counts_as_a_try_unless_slurm_preempts_the_job(training, pool):
    one, two = training.queue
    lost = {"lost": "its worker died", "status": -15, "memory": False, "log": "words"}
    Scripted.script = [[(one, lost)], training.handle_sigterm, [(two, lost)]]
    with pytest.raises(SystemExit):
        training.run()
    assert [(task.id, message["lost"]) for task, message in pool.messages()] == [
        (one.id, "its worker died")
    ]
    training.queue, training.preempted = [two], False
    # the signal and the lost worker at the same time
    Scripted.script = [lambda: training.handle_sigterm() or [(two, lost)]]
    with pytest.raises(SystemExit):
        training.run()
    assert pool.messages() == [] and list(pool.out[0].tasks) == [two.id]


def test_a_lost_stack_is_answered_at_once(training, pool, monkeypatch):
    """There is one pause for the whole stack, so the driver does not retry trials one by one."""
    pauses, lost = [], {"lost": "its worker died", "status": -9, "memory": True, "log": ""}
    monkeypatch.setattr(running.time, "sleep", pauses.append)
    Scripted.script = [[(task, lost) for task in training.queue]]
    training.run()
    assert len(pauses) == 1 and len(job_messages.list_answers(pool.root)) == 2


def test_a_job_ends_when_its_order_is_withdrawn_or_refused(training, pool):
    one, two = training.queue
    Scripted.script = [[(one, {"refused": "`a > b` must hold"})], [(two, {"progress": 0.0})]]
    with pytest.raises(SystemExit):
        training.run()
    assert [message["refused"] for _, message in pool.messages()] == ["`a > b` must hold"]
    Scripted.script = [
        lambda: job_messages.withdraw(training.folder),
        [(two, {"trial": {"id": two.id}})],
        [],
    ]
    training.queue = [two]
    training.run()
    assert not job_messages.list_answers(pool.root)
    running.Job(str(training.folder))()  # starts after it was withdrawn
    assert not training.folder.exists()


# --- training in jobs of submitit's local executor ------------------------------------------------


class LocalExecutorCluster(SlurmCluster):
    """Runs jobs with submitit's local executor; their states come from the processes."""

    kind = "local"
    jobs = []  # noqa: RUF012 (shared, so that tests see the jobs of every pool)

    def _executor(self, engine, parallel):
        executor = super()._executor(engine, parallel)
        submit = executor.submit_array
        executor.submit_array = lambda calls: [
            LocalExecutorCluster.jobs.append(job) or job for job in submit(calls)
        ]
        return executor

    def states(self):
        return {
            job.job_id: RUNNING
            if job._process.poll() is None
            else State("FAILED", job._process.returncode, "")
            for job in self.jobs
        }

    def cancel(self, ids):
        for job in self.jobs:
            if job.job_id in ids and job._process.poll() is None:
                job.cancel()


@pytest.fixture
def local_executor(monkeypatch):
    monkeypatch.setattr(slurm, "SlurmCluster", LocalExecutorCluster)
    monkeypatch.setattr(slurm, "LOOK", 0.5)
    monkeypatch.setattr(slurm, "GRACE", 1.0)
    monkeypatch.setattr("scaletune.sweeping.engines.slurm.cluster.shutil.which", lambda name: name)
    yield LocalExecutorCluster.jobs
    for job in LocalExecutorCluster.jobs:
        assert job._process.poll() is not None, "a job is still running"
    LocalExecutorCluster.jobs.clear()


@pytest.fixture(scope="module")
def slurm_recipe(tiny):
    """Two trials, each in its own job, that train long enough to be killed on the way."""
    engine = {
        "kind": "slurm",
        "checkpoint_every": 50,
        "workers": 2,
        "stack": 1,
        "slurm": {"minutes": 0.0},
    }
    return tiny(
        {
            "engine": engine,
            "data.epochs": 9,
            "budget.tokens": 400 * 256,
            "schedule.warmup": 0.1,
            "axes": {"lr": [2e-3, 8e-3]},
        }
    ).model_copy(update={"name": "on slurm"})


@pytest.fixture(scope="module")
def undisturbed(slurm_recipe, tmp_path_factory):
    """The record of the same sweep by the local engine."""
    out = tmp_path_factory.mktemp("undisturbed")
    sweeping.sweep(
        slurm_recipe.model_copy(
            update={"engine": slurm_recipe.engine.model_copy(update={"kind": "local"})}
        ),
        out=out,
    )
    return measured(out / "sweeps/on slurm.jsonl")


def started_jobs(out):
    """{job: (trial id, checkpoint)} of jobs whose first trial has a checkpoint and is not done."""
    started = {}
    for folder in out.glob("sweeps/*.slurm/orders/*"):
        id = folder.name.split("-")[0]
        checkpoint = out / "runs" / id / "checkpoint.pt"
        if (
            (folder / "job").exists()
            and checkpoint.exists()
            and not job_messages.is_answered(folder, id)
        ):
            started[(folder / "job").read_text()] = (id, checkpoint)
    return started


def test_a_killed_job_is_submitted_again_and_the_record_equals_the_local_engines(
    slurm_recipe, undisturbed, local_executor, tmp_path, monkeypatch, capsys
):
    killed, messages = [], slurm.SlurmPool.messages

    def disturbed(pool):
        """Kills all processes of the first job that has a checkpoint, like a node failure."""
        for job in [] if killed else list(started_jobs(tmp_path))[:1]:
            killed.append(job)
            for process in [
                *psutil.Process(int(job)).children(recursive=True),
                psutil.Process(int(job)),
            ]:
                process.kill()
        return messages(pool)

    monkeypatch.setattr(slurm.SlurmPool, "messages", disturbed)
    monkeypatch.setattr(slurm, "WAIT", 0.2)
    sweeping.sweep(with_settings(slurm_recipe, {"axes": {"lr": [2e-3]}}), out=tmp_path)
    record = measured(tmp_path / "sweeps/on slurm.jsonl")
    assert record == undisturbed[:1] and record[0]["status"] == "done"
    assert (
        f"try 1: its job {killed[0]} ended as FAILED; last log lines: " in capsys.readouterr().err
    )
    assert len(local_executor) == 2
    assert not (tmp_path / "sweeps/on slurm.slurm").exists()


def test_a_command_that_fails_and_one_that_is_stopped(
    local_executor, tmp_path, monkeypatch, capsys
):
    """The record of the local engine: the first trial continues from its checkpoint."""
    monkeypatch.setattr(slurm, "WAIT", 0.2)
    monkeypatch.setattr(slurm, "LOOK", 0.2)
    killed_trainer.check_failure_and_stop(
        killed_trainer.sweep_with_failure_and_stop("slurm", tmp_path)
    )
    assert "try 1: exit status 1; last log lines: no disk" in capsys.readouterr().err
    assert not (tmp_path / "sweeps/killed.slurm").exists()


# --- a real Slurm with one node -------------------------------------------------------------------

DRIVER = """
import json, sys
from scaletune import recipe, sweeping
from scaletune.sweeping.engines import slurm
slurm.LOOK, slurm.GRACE = 0.5, 1.0
sweeping.sweep(recipe.validate_recipe(json.loads(sys.argv[1]), "on slurm"), out=sys.argv[2])
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """The environment variables of a Slurm cluster with one node."""
    if absent := slurm_node.missing():
        pytest.skip(
            f"no Slurm: {absent[0]} is not installed (apt-get install slurmctld slurmd "
            "slurm-client munge)"
        )
    with slurm_node.node(tmp_path_factory.mktemp("node")) as env:
        yield env
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", env["SLURM_CONF"])
        assert not processes("slurm", "munge", "submitit", "engines.worker")


@pytest.fixture
def slurm_env(node, monkeypatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, node[name])
    monkeypatch.setattr(slurm, "LOOK", 0.5)
    monkeypatch.setattr(slurm, "GRACE", 1.0)


def run_command(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def jobs(started=0):
    """{job: (state, restarts)} of the sweep's jobs with an array id above `started`."""
    lines = run_command(
        "squeue",
        "--noheader",
        "--array",
        "--states=all",
        "--name=scaletune-on_slurm",
        "--Format=JobArrayID:40,State:30,RestartCnt:10",
    )
    states = {
        line.split()[0]: (line.split()[1], int(line.split()[2])) for line in lines.splitlines()
    }
    return {job: state for job, state in states.items() if int(job.split("_")[0]) > started}


def start_driver(recipe, out):
    content = json.dumps(recipe.model_dump(exclude={"name"}))
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, content, str(out)], stderr=subprocess.PIPE, text=True
    )


def processes(*named):
    """Processes of this Slurm that have one of the words in their command line."""
    return [
        process
        for process in psutil.process_iter()
        if _knows(process) and any(word in " ".join(process.cmdline()) for word in named)
    ]


def _knows(process):
    try:
        return process.environ().get("SLURM_CONF") == os.environ["SLURM_CONF"]
    except psutil.Error:
        return False


def mark_checkpoint(checkpoint):
    """Adds 1000 s of training time to a checkpoint, to recognise trials that resume from it."""
    content = torch.load(checkpoint, weights_only=True)
    content["seconds"]["train"] += 1000.0
    torch.save(content, checkpoint)
    checkpoint.with_name("previous.pt").unlink(missing_ok=True)


@pytest.mark.slow
def test_a_real_slurm_runs_an_array_through_requeues_and_a_killed_driver(
    slurm_recipe, undisturbed, slurm_env, tmp_path
):
    """Requeues one job, as preemption does, and sends the time-limit signal to the other.

    Then the driver is killed, and the next driver takes over both jobs.
    """
    before = max([int(job.split("_")[0]) for job in jobs()], default=0)
    with start_driver(slurm_recipe, tmp_path) as first:
        both = {}
        for command in (("scontrol", "requeue"), ("scancel", "--signal=USR2")):

            def next_job(others=frozenset(both)):
                jobs_now = started_jobs(tmp_path).items()
                return next((job for job in jobs_now if job[0] not in others), None)

            job, started = wait_for(next_job)
            both[job] = started
            run_command(*command, job)
        wait_for(lambda: {jobs(before)[job] for job in both} == {("PENDING", 1)})
        first.kill()
    for job, (_, checkpoint) in both.items():
        mark_checkpoint(checkpoint)
        # otherwise Slurm waits two minutes
        run_command("scontrol", "update", f"JobId={job}", "StartTime=now")
    table = sweeping.sweep(slurm_recipe, out=tmp_path)
    assert sorted(map(str, measured(tmp_path / "sweeps/on slurm.jsonl"))) == sorted(
        map(str, undisturbed)
    )
    resumed = {
        trial.id
        for trial in read_jsonl(tmp_path / "sweeps/on slurm.jsonl")
        if trial.metrics["seconds"]["train"] > 1000
    }
    assert resumed == {id for id, _ in both.values()} and len(table) == 2
    assert len(jobs(before)) == 2  # none was submitted twice
    assert {state for state, _ in jobs(before).values()} == {"COMPLETED"}
    assert not (tmp_path / "sweeps/on slurm.slurm").exists()
    assert not processes("engines.worker", "submitit")


def test_a_command_trains_in_a_job(slurm_env, tmp_path):
    killed_trainer.check_failure_and_stop(
        killed_trainer.sweep_with_failure_and_stop("slurm", tmp_path)
    )
    assert not processes("engines.worker", "submitit", "killed_trainer")


def test_a_cancelled_job_is_submitted_again_and_an_interrupt_cancels_all(
    slurm_recipe, slurm_env, tmp_path
):
    before = max([int(job.split("_")[0]) for job in jobs()], default=0)
    with start_driver(slurm_recipe, tmp_path) as first:
        lost = sorted(wait_for(lambda: started_jobs(tmp_path)))[0]
        run_command("scancel", lost)
        wait_for(lambda: [job for job in jobs(before) if job.split("_")[0] != lost.split("_")[0]])
        first.send_signal(signal.SIGINT)
        errors = first.stderr.read()
    assert f"try 1: its job {lost} ended as CANCELLED; last log lines: " in errors
    assert "slurm: cancelled " in errors
    assert {state for state, _ in jobs(before).values()} <= {
        "CANCELLED",
        "COMPLETED",
        "COMPLETING",
        "FAILED",
    }
    assert not processes("engines.worker", "submitit")
    assert not list(tmp_path.glob("sweeps/*.slurm/orders/*"))


def test_the_command_line_reports_what_slurm_refuses(tiny, slurm_env, tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        toml(
            tiny({"engine.slurm.partition": "nowhere"}).model_dump(
                exclude_defaults=True, exclude={"name"}
            )
        )
    )
    assert main(["sweep", str(recipe), "--engine", "slurm", "--out", str(tmp_path)]) == 2
    assert (
        "Slurm must accept the jobs, but refused them: sbatch: error: invalid partition "
        "specified: nowhere"
    ) in capsys.readouterr().err
