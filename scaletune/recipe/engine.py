"""The `engine` and `search` tables of a recipe: where trials run, and which points are trained."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from scaletune.sections import Count, Fraction, NotNegative, Positive, Section, Whole
from scaletune.sections import Whole as Seed

# the characters of sbatch options: no space, quote or line break
WORD = re.compile(r"[\w.,:@+&|*()\[\]-]*")


class Slurm(Section):
    """The resources that `engine.kind = "slurm"` requests for each job.

    An option that is empty or 0 is left to the cluster's default.
    """

    partition: str = ""
    """Partition of the cluster."""
    account: str = ""
    """Account that is charged."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Constraint on the features of a node."""
    time_minutes: Count = 60
    """Time limit of a job in minutes. A job that reaches it is queued again and resumes from the
    checkpoints of its trials."""
    timeouts: Whole = 100
    """How many times a job may reach its time limit before its trials count as lost."""
    gpus_per_trial: Whole = 0
    """Older name of `engine.gpus_per_trial`, which only Slurm reads. 0: not set."""
    cpus_per_trial: Whole = 0
    """CPU cores per trial. 0: one per process of `engine.processes`."""
    mem_gb: NotNegative = 0.0
    """Memory of a job in GB."""
    minutes: NotNegative = 10.0
    """Minimum estimated duration of a job in minutes. Short trials share a job until they reach it,
    at most `time_minutes`."""
    max_jobs: Annotated[Count, Field(le=1000)] = 1000
    """Maximum number of jobs in the queue. 1000 is the default limit of Slurm's MaxArraySize."""
    leave: bool = False
    """Whether an interrupted driver leaves its jobs in the queue for the next driver instead of
    cancelling them."""

    @model_validator(mode="after")
    def _sound(self) -> Slurm:
        for name in ("partition", "account", "qos", "constraint"):
            if not WORD.fullmatch(getattr(self, name)):
                raise ValueError(
                    f"`engine.slurm.{name}` must be of letters, digits and any of"
                    f" _.,:@+&|*()[]-, but got {getattr(self, name)!r}"
                )
        if self.minutes > self.time_minutes:
            raise ValueError(
                "`engine.slurm.minutes <= time_minutes` must hold, but got"
                f" minutes={self.minutes:g}, time_minutes={self.time_minutes}"
            )
        return self


class Ray(Section):
    """Options of `engine.kind = "ray"`: the cluster, and what each worker reserves there.

    A process computes on one core, whatever it reserves.
    """

    address: str = "local"
    """Address of the cluster. local: a new Ray instance, stopped after the sweep. HOST:PORT or
    auto: a running cluster."""
    cpus: Count = 1
    """CPU cores that one process reserves."""
    gpus: Literal["auto"] | Fraction = "auto"
    """GPUs that one process reserves. auto: one if the cluster has GPUs. 0.25: four workers share
    one GPU."""
    memory: Whole = 0
    """Memory that one worker reserves, in bytes. 0: none is reserved."""

    @model_validator(mode="after")
    def _address(self) -> Ray:
        host, _, port = self.address.rpartition(":")
        if self.address not in ("local", "auto") and not (
            host and "/" not in host and port.isdigit() and int(port) < 1 << 16
        ):
            raise ValueError(
                "`engine.ray.address` must be 'local', 'auto' or HOST:PORT, but got"
                f" {self.address!r}"
            )
        return self


class Engine(Section):
    """Where and how trials run. Not part of a trial's identity."""

    kind: Literal["local", "ray", "slurm"] = "local"
    """Processes on this machine, a Ray cluster, or jobs of a Slurm cluster."""
    slurm: Slurm = Slurm()
    """Options of `kind = "slurm"`."""
    workers: Literal["auto"] | Count = "auto"
    """Number of worker processes. auto: one per GPU, or one per CPU core."""
    processes: Count = 1
    """Number of processes that share the batch of one trial (data parallelism)."""
    gpus_per_trial: Literal["auto"] | Whole = "auto"
    """GPUs of one trial, on each of its nodes; trials that run at once have different GPUs. auto:
    one per process if the machine has GPUs (Slurm: none). 0: train on CPU cores. More than one per
    process is for `trainer.command`, which sees them all and gets their number as `{gpus}`."""
    nodes_per_trial: Count = 1
    """Machines of one trial. More than one needs `kind = "slurm"` and a `trainer.command` that
    starts its processes with srun and gets their number as `{nodes}`."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What the processes of a trial share. ddp: the batch, each has the whole model. fsdp: also
    weights, gradients and optimizer state, sharded with FSDP2, for models larger than one GPU."""
    stack: Literal["auto", "fill"] | Count = "auto"
    """Maximum number of trials that train as one model. auto: on a CPU the fastest measured number,
    with bitwise equal results, and 1 on a GPU. fill: an estimate of what fills a GPU, not measured.
    """
    branch: Literal["auto"] | bool = "auto"
    """Whether token horizons of one trial share a trunk, with bitwise equal results. true: also
    report why points cannot share one."""
    accumulation: Count = 1
    """Micro-batches per process and step (gradient accumulation)."""
    compile: bool = False
    """Whether to compile the model with torch.compile."""
    evaluate_at: list[Fraction] = []
    """Shares of the token budget at which to evaluate, besides the end. `search.pruner` decides
    there, also of a user's trainer, which reports at its own times."""
    noise_every: Annotated[int, Field(ge=0)] = 0
    """Steps between measurements of the gradient noise scale. 0: never."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints. 0: none."""
    trackers: list[Literal["tensorboard", "wandb"]] = []
    """Experiment trackers to log to."""
    runs: str = "runs"
    """Folder of checkpoints and tracker logs, with a subfolder per trial. A relative path is
    relative to the folder that contains sweeps/."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How many times a trial is retried after its worker died, hung or ran out of memory. Then its
    status is "failed"."""
    patience: Positive = 1800.0
    """Seconds without a message after which a worker is considered hung."""
    ray: Ray = Ray()
    """Options of `kind = "ray"`."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> Engine:
        if self.processes > 1 and self.ray.gpus not in ("auto", 0, 1):
            raise ValueError(
                f"`engine.ray.gpus` must be 0 or 1 where a trial has {self.processes} processes,"
                f" but got {self.ray.gpus}"
            )
        return self

    @model_validator(mode="after")
    def _parts(self) -> Engine:
        if self.noise_every and self.processes * self.accumulation < 2:
            raise ValueError(
                "`processes * accumulation >= 2` must hold for a gradient noise scale (it compares"
                " batches of two sizes), but got"
                f" processes={self.processes}, accumulation={self.accumulation}"
            )
        return self

    @model_validator(mode="after")
    def _one_number_of_gpus(self) -> Engine:
        gpus, older = self.gpus_per_trial, self.slurm.gpus_per_trial
        if gpus != "auto" and older not in (0, gpus):
            raise ValueError(
                "`engine.gpus_per_trial` and its older name `engine.slurm.gpus_per_trial` must be"
                f" equal, but got {gpus} and {older}: remove the older one"
            )
        share = self.ray.gpus
        if gpus != "auto" and share != "auto" and share * self.processes != gpus:
            raise ValueError(
                "`engine.gpus_per_trial == engine.ray.gpus * processes` must hold, but got"
                f" gpus_per_trial={gpus}, ray.gpus={share:g}, processes={self.processes}: remove"
                " `engine.ray.gpus`"
            )
        return self

    @property
    def requested_gpus(self) -> int | None:
        """GPUs of one trial on each node that the recipe requests; None: the engine decides."""
        if self.gpus_per_trial != "auto":
            return self.gpus_per_trial
        return (self.slurm.gpus_per_trial or None) if self.kind == "slurm" else None

    @property
    def group_size(self) -> int:
        """GPUs, or without GPUs processes, of one trial on each node: the placeholder `{gpus}`."""
        return self.requested_gpus or self.processes


BLIND_SAMPLERS = ("gp", "cmaes")  # these learn from complete trials only


OWNERS = {  # key -> the only kinds of search that read it
    "sampler": ("optuna",),
    "pruner": ("optuna", "grid"),
    "reduction": ("optuna", "grid"),
    "flops": ("pareto",),
    "every": ("pbt",),
    "factor": ("pbt",),
}


class SearchSection(Section):
    """Which points of `axes` are trained. Not part of a trial's identity."""

    kind: Literal["grid", "basin", "joint", "optuna", "pareto", "pbt"] = "grid"
    """grid: every point. basin: a sequential search for the loss basin over lr in each setting.
    joint: a sequential design for the joint surface of all settings. optuna: a sampler of Optuna.
    pareto: the frontier of loss over FLOPs. pbt: population-based training."""
    budget: Count | None = None
    """Maximum number of points, diverged ones included: per setting, for joint of all settings
    together. Default: until the expected improvement is below `noise`."""
    flops: Positive | None = None
    """pareto only: maximum training FLOPs of the points of one setting."""
    noise: Positive = 0.0003
    """The search stops when the expected improvement is below this share of the loss; joint: when
    the expected excess loss at the target is below it, or no run lowers that by a hundredth of it.
    optuna and pareto do not read it."""
    wave: Count = 1
    """Number of points proposed at a time: per setting, for joint of all settings together."""
    extend: Seed = 2
    """How many grid steps an axis may be extended at an end where the optimum lies."""
    seed: Seed = 0
    """Seed of the search."""
    sampler: Literal["tpe", "gp", "cmaes", "qmc", "random"] = "tpe"
    """optuna only: the sampler."""
    pruner: Literal["none", "median", "halving", "hyperband", "topk"] = "none"
    """optuna and grid only: the pruner. With two or more values in the `tokens` axis of an optuna
    search each is a rung, and each rung is a trial of its own. Otherwise it stops trials inside
    their runs, by their losses at `engine.evaluate_at`, compared within a setting: their status is
    "stopped", and no fit reads them. topk: on rungs only."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """optuna and grid only: reduction factor of the pruner. halving, hyperband: one in so many
    points continues to the next rung; topk: from the first rung to the last."""
    every: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """pbt only: share of the token budget after which the worse half of the members copies the
    weights of the better half."""
    factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1.25
    """pbt only: factor by which a copied lr is multiplied or divided."""

    @model_validator(mode="after")
    def _sound(self) -> SearchSection:
        for name, owners in OWNERS.items():
            default = type(self).model_fields[name].default
            if self.kind not in owners and getattr(self, name) != default:
                raise ValueError(
                    f"`search.{name}` is read only by search.kind"
                    f" {' and '.join(map(repr, owners))}, but got kind={self.kind!r}"
                )
        if self.kind == "grid" and self.pruner == "topk":
            raise ValueError(
                "pruner 'topk' needs search.kind 'optuna' and two or more values in `axes.tokens`,"
                " but got kind='grid': use median, halving or hyperband"
            )
        if self.kind == "optuna" and self.budget is None:
            raise ValueError(
                "search.kind 'optuna' needs `search.budget`, the number of points per setting"
            )
        if self.kind == "pareto" and self.budget is None and self.flops is None:
            raise ValueError(
                "search.kind 'pareto' needs `search.budget` (points) or `search.flops`, per setting"
            )
        if self.pruner not in ("none", "topk") and self.sampler in BLIND_SAMPLERS:
            raise ValueError(
                f"sampler {self.sampler!r} learns from complete trials only and would stay at"
                f" random search with a pruner, but got pruner={self.pruner!r}: use sampler tpe,"
                " qmc or random"
            )
        return self

    @property
    def decides(self) -> bool:
        """Whether what is trained, or for how long, depends on the results of other trials."""
        return self.kind != "grid" or self.pruner != "none"
