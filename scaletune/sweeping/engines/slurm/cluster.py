"""Slurm, as this machine reaches it: submitit submits, squeue knows (it asks the controller: no accounting database), scancel cancels.

Every command is a list of arguments, and every option of a recipe is of characters that no shell minds.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from scaletune.errors import UserError
from scaletune.recipe import Engine
from scaletune.sweeping.engines.slurm.job import Job

COMMANDS = ("sbatch", "srun", "squeue", "scancel")
FIELDS = "--Format=JobArrayID:40,State:30,exit_code:20,Reason:120"
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT",
}  # fmt: skip
SLOW = 30.0  # seconds that a command of Slurm's may take
AT_ONCE = 100  # jobs that one scancel names
LAST = 1 << 12  # bytes of a job's log that are read
SIGNAL = 60  # seconds before its limit that a job is told, a third of a short one's


class State(NamedTuple):
    """What the controller says of a job."""

    name: str  # PENDING, RUNNING, ...
    status: int  # it ended with
    reason: str  # why it waits, or failed

    @property
    def ended(self) -> bool:
        return self.name in ENDED


GONE = State("COMPLETED", 0, "")  # long enough ago for the controller to have forgotten it


class Refused(Exception):
    """Slurm does not take a job, in its words."""


def require(root: Path) -> None:
    """UserError unless submitit and Slurm's commands are here, and Slurm can write where we do."""
    if find_spec("submitit") is None:
        raise UserError("engine.kind 'slurm' needs submitit: `pip install 'scaletune[slurm]'`")
    if absent := [command for command in COMMANDS if shutil.which(command) is None]:
        raise UserError(
            f"engine.kind 'slurm' needs Slurm's commands on the PATH, but `{absent[0]}` is not: is this a login node?"
        )
    if odd := sorted(set("%\\\n") & set(str(root))):
        raise UserError(
            f"a folder that Slurm writes to must be named without {odd[0]!r}, but got `{root}`"
        )


class Cluster:
    """Where jobs go. `kind`: which of submitit's executors."""

    kind = "slurm"

    def __init__(self, root: Path, name: str):
        self.root, self.name = root, "scaletune-" + re.sub(r"[^\w.-]", "_", name)

    def submit(self, folders: Sequence[Path], engine: Engine, parallel: int) -> list[str]:
        """Submit a job an order, as one array of which `parallel` run at once: their ids. `Refused` in Slurm's words."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        with (
            _outside(),
            contextlib.redirect_stderr(io.StringIO()),
        ):  # submitit prints what it raises
            try:
                jobs = self._executor(engine, parallel).submit_array(
                    [Job(str(folder)) for folder in folders]
                )
            except (FailedJobError, FailedSubmissionError) as error:
                raise Refused(" ".join(str(error).split()) or "nothing") from error
        return [job.job_id for job in jobs]

    def _executor(self, engine: Engine, parallel: int) -> Any:
        import submitit

        made = submitit.AutoExecutor(
            folder=self.root / "jobs",
            cluster=self.kind,
            slurm_max_num_timeout=engine.slurm.timeouts,
        )
        made.update_parameters(
            **_parameters(engine), name=self.name, slurm_array_parallelism=parallel
        )
        return made

    def states(self) -> dict[str, State] | None:
        """By id, of jobs that the controller remembers (minutes past their end); None when it does not answer."""
        command = [
            "squeue",
            "--noheader",
            "--array",
            "--states=all",
            f"--user={os.getuid()}",
            f"--name={self.name}",
            FIELDS,
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SLOW)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return dict(map(_state, done.stdout.splitlines())) if done.returncode == 0 else None

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs, wherever they are; it does not matter whether they are."""
        for i in range(0, len(ids), AT_ONCE):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    ["scancel", *ids[i : i + AT_ONCE]], capture_output=True, timeout=SLOW
                )

    def log(self, job: str) -> str:
        """The end of what Slurm, submitit and the job itself said."""
        path = self.root / "jobs" / f"{job}_0_log.err"
        try:
            said = path.read_bytes()[-LAST:].decode(errors="replace").splitlines()
        except OSError:
            return f"Slurm left no `{path}`: is it on a file system that the nodes share?"
        return "\n".join(line for line in said if not line.startswith("submitit "))


def _state(line: str) -> tuple[str, State]:
    job, name, status, *reason = line.strip().split(maxsplit=3)
    return job, State(
        name, os.waitstatus_to_exitcode(int(status)) if status.isdigit() else 0, "".join(reason)
    )


def _parameters(engine: Engine) -> dict[str, Any]:
    """What AutoExecutor calls our settings; what is None is left to the cluster."""
    asked = engine.slurm
    cpus = asked.cpus_per_trial or engine.processes
    return {
        "timeout_min": asked.time_minutes, "nodes": 1, "tasks_per_node": 1, "cpus_per_task": cpus,
        "gpus_per_node": asked.gpus_per_trial or None, "mem_gb": asked.mem_gb or None,
        "slurm_partition": asked.partition or None, "slurm_account": asked.account or None, "slurm_qos": asked.qos or None,
        "slurm_constraint": asked.constraint or None, "slurm_signal_delay_s": min(SIGNAL, 20 * asked.time_minutes),
        "slurm_srun_args": [f"--cpus-per-task={cpus}"],  # since 22.05 srun does not take it from sbatch
        "slurm_additional_parameters": {"requeue": True},
    }  # fmt: skip


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """As if the driver were not in a job itself, which its own jobs would inherit."""
    from submitit import helpers

    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with helpers.clean_env() if "SLURM_JOB_ID" in os.environ else contextlib.nullcontext():
        os.environ.update(kept)
        yield
