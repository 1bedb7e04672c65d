"""Slurm's commands: submits with submitit, reads job states with squeue, cancels with scancel.

squeue asks the controller, so no accounting database is needed. Each command is a list of
arguments, and the recipe's Slurm options hold only characters that have no meaning in a shell.
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
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "LAUNCH_FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
SLOW = 30.0  # seconds that one of Slurm's commands may take
AT_ONCE = 100  # jobs per scancel command
LAST = 1 << 12  # bytes read of a job's log, from its end
SIGNAL = 60  # seconds before its time limit that a job gets a signal; a third of a short limit


class State(NamedTuple):
    """A job's state as the controller reports it."""

    name: str
    """PENDING, RUNNING, ..."""
    status: int
    """The exit status."""
    reason: str
    """Why the job is pending or has failed."""

    @property
    def ended(self) -> bool:
        return self.name in ENDED


GONE = State("COMPLETED", 0, "")  # of a job that ended so long ago that the controller forgot it


class SubmissionRefused(Exception):
    """Slurm refused to accept a job; the text is Slurm's."""


def require_slurm(root: Path) -> None:
    """UserError unless submitit and Slurm's commands exist and Slurm can write to `root`."""
    if find_spec("submitit") is None:
        raise UserError("engine.kind 'slurm' needs submitit: `pip install 'scaletune[slurm]'`")
    if missing := [command for command in COMMANDS if shutil.which(command) is None]:
        raise UserError(
            f"engine.kind 'slurm' needs Slurm's commands on the PATH, but `{missing[0]}` is not:"
            " run this on a login node"
        )
    if odd := sorted(set("%\\\n") & set(str(root))):
        raise UserError(f"the path of a Slurm sweep must not contain {odd[0]!r}, but got `{root}`")


class SlurmCluster:
    """Submits, watches and cancels the jobs of one sweep."""

    kind = "slurm"  # submitit's executor

    def __init__(self, root: Path, name: str):
        self.root, self.name = root, "scaletune-" + re.sub(r"[^\w.-]", "_", name)

    def submit(self, folders: Sequence[Path], engine: Engine, parallel: int) -> list[str]:
        """Submits one job per order folder as an array, of which `parallel` run at once.

        Returns the jobs' ids. Raises SubmissionRefused with Slurm's text.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        # submitit also prints the error that it raises
        with _clean_environment(), contextlib.redirect_stderr(io.StringIO()):
            try:
                calls = [Job(str(folder)) for folder in folders]
                jobs = self._executor(engine, parallel).submit_array(calls)
            except (FailedJobError, FailedSubmissionError) as error:
                text = " ".join(str(error).split())
                raise SubmissionRefused(text or "no reason given") from error
        return [job.job_id for job in jobs]

    def _executor(self, engine: Engine, parallel: int) -> Any:
        import submitit

        executor = submitit.AutoExecutor(
            folder=self.root / "jobs",
            cluster=self.kind,
            slurm_max_num_timeout=engine.slurm.timeouts,
        )
        executor.update_parameters(
            **_parameters(engine), name=self.name, slurm_array_parallelism=parallel
        )
        return executor

    def states(self) -> dict[str, State] | None:
        """{id: state} of the jobs that the controller knows; None when it does not answer.

        The controller forgets a job some minutes after its end.
        """
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
        return dict(map(_parse_state, done.stdout.splitlines())) if done.returncode == 0 else None

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancels jobs; jobs that have ended are ignored."""
        for i in range(0, len(ids), AT_ONCE):
            command = ["scancel", *ids[i : i + AT_ONCE]]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(command, capture_output=True, timeout=SLOW)

    def log(self, job: str) -> str:
        """The end of a job's standard error, without submitit's lines."""
        path = self.root / "jobs" / f"{job}_0_log.err"
        try:
            lines = path.read_bytes()[-LAST:].decode(errors="replace").splitlines()
        except OSError:
            return f"Slurm wrote no `{path}`: is it on a file system that all nodes share?"
        return "\n".join(line for line in lines if not line.startswith("submitit "))


def _parse_state(line: str) -> tuple[str, State]:
    """A line of squeue -> (job id, state)."""
    job, name, status, *reason = line.strip().split(maxsplit=3)
    code = os.waitstatus_to_exitcode(int(status)) if status.isdigit() else 0
    return job, State(name, code, "".join(reason))


def _parameters(engine: Engine) -> dict[str, Any]:
    """Our settings under the names of AutoExecutor; the cluster decides what is None."""
    slurm = engine.slurm
    cpus = slurm.cpus_per_trial or engine.processes
    # The worker runs on the first node only; its command starts processes on the others with srun.
    first_node = ["--nodes=1", "--ntasks=1", "--overlap"] if engine.nodes_per_trial > 1 else []
    return {
        "timeout_min": slurm.time_minutes,
        "nodes": engine.nodes_per_trial,
        "tasks_per_node": 1,
        "cpus_per_task": cpus,
        "gpus_per_node": engine.requested_gpus or None,
        "mem_gb": slurm.mem_gb or None,
        "slurm_partition": slurm.partition or None,
        "slurm_account": slurm.account or None,
        "slurm_qos": slurm.qos or None,
        "slurm_constraint": slurm.constraint or None,
        "slurm_signal_delay_s": min(SIGNAL, 20 * slurm.time_minutes),
        # Since Slurm 22.05, srun does not inherit this option from sbatch.
        "slurm_srun_args": [f"--cpus-per-task={cpus}", *first_node],
        "slurm_additional_parameters": {"requeue": True},
    }


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Removes Slurm's variables if the driver is in a job itself: its jobs would inherit them."""
    from submitit import helpers

    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with helpers.clean_env() if "SLURM_JOB_ID" in os.environ else contextlib.nullcontext():
        os.environ.update(kept)
        yield
