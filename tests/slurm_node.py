"""Runs a Slurm cluster of one node in its own folder, without systemd.

It uses munged, slurmctld and slurmd of the Debian packages:
`apt-get install slurmctld slurmd slurm-client munge`.
`python tests/slurm_node.py FOLDER` runs a cluster until it is interrupted.
"""

import contextlib
import getpass
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from scaletune.sweeping.engines.parent_death import die_with_parent

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ReturnToService=2
KillWait=1
MinJobAge=300
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=60 State=UP
"""


def missing():
    """The programs that are not installed."""
    return [name for name in NEEDED if not shutil.which(name, path=SEARCHED)]


def _ports(n):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _key(path):
    path.write_bytes(os.urandom(1024))
    path.chmod(0o400)


@contextlib.contextmanager
def node(folder, cpus=2):
    """Runs the daemons in `folder` and yields the environment variables that clients need.

    Stops the daemons and their jobs at the end.
    """
    folder = Path(folder).resolve()
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    _key(folder / "munge.key")
    host = platform.node().split(".")[0]
    (folder / "slurm.conf").write_text(
        CONF.format(
            folder=folder,
            host=host,
            ports=_ports(2),
            user=getpass.getuser(),
            cpus=min(cpus, os.cpu_count()),
        )
    )
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCHED}
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            _daemon(
                ["munged", "--foreground", "--force", *_munge(folder)], env, folder / "munge.out"
            )
        )
        _until((folder / "munge.socket").exists, folder)
        for name in ("slurmctld", "slurmd"):
            stack.enter_context(_daemon([name, "-D"], env, folder / f"{name}.out"))
        _until(
            lambda: _output(["sinfo", "--noheader", "--format=%T"], env).strip() == "idle", folder
        )
        yield env


def _munge(folder):
    where = {
        "socket": "munge.socket",
        "key-file": "munge.key",
        "pid-file": "munge.pid",
        "log-file": "munge.log",
        "seed-file": "munge.seed",
    }
    return [f"--{name}={folder / file}" for name, file in where.items()]


@contextlib.contextmanager
def _daemon(command, env, log):
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=env,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,  # a killed test leaves no daemon
        )
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _output(command, env):
    return subprocess.run(command, env=env, capture_output=True, text=True).stdout


def _until(condition, folder, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(
                f"{path}:\n{path.read_text(errors='replace')[-2000:]}"
                for path in sorted(folder.glob("*.out"))
            )
            raise RuntimeError(f"no Slurm after {seconds} s\n{logs}")
        time.sleep(0.1)


if __name__ == "__main__":
    with node(sys.argv[1]) as env, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={env['SLURM_CONF']}", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.pause()
