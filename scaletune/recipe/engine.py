"""Where and how trials run, and which of them."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from scaletune.sections import Count, Fraction, NotNegative, Positive, Section, Whole
from scaletune.sections import Whole as Seed

WORD = re.compile(
    r"[\w.,:@+&|*()\[\]-]*"
)  # what sbatch's options are made of: no space, quote or line break


class Slurm(Section):
    """What `engine.kind` "slurm" asks of the cluster for each job; an option that is empty or 0 is left to the cluster."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    time_minutes: Count = 60  # a job's limit; one that runs into it goes back to the queue and on from its trials' checkpoints
    timeouts: Whole = 100  # so often, before its trials count as lost
    gpus_per_trial: Whole = 0  # none, or one for each of `engine.processes`
    cpus_per_trial: Whole = 0  # 0: one for each of `engine.processes`
    mem_gb: NotNegative = 0.0
    minutes: NotNegative = 10.0  # trials share a job until it is guessed to take so long: less is not worth its time in the queue
    max_jobs: Annotated[Count, Field(le=1000)] = (
        1000  # in the queue at once; 1000: what Slurm's MaxArraySize allows as it comes
    )
    leave: bool = (
        False  # an interrupted driver leaves its jobs to the next one, and does not cancel them
    )

    @model_validator(mode="after")
    def _sound(self) -> Slurm:
        for name in ("partition", "account", "qos", "constraint"):
            if not WORD.fullmatch(getattr(self, name)):
                raise ValueError(
                    f"`engine.slurm.{name}` must be of letters, digits and any of _.,:@+&|*()[]-, but got {getattr(self, name)!r}"
                )
        if self.minutes > self.time_minutes:
            raise ValueError(
                f"`engine.slurm.minutes <= time_minutes` must hold, but got minutes={self.minutes:g}, time_minutes={self.time_minutes}"
            )
        return self


class Ray(Section):
    """Of `kind = "ray"`: which cluster, and what a worker reserves there (it computes on one core a process, whatever it reserves)."""

    address: str = "local"  # "local": an instance of its own, gone with the sweep; HOST:PORT or "auto": a cluster that is up
    cpus: Count = 1  # cores of a process
    gpus: Literal["auto"] | Fraction = (
        "auto"  # GPUs of a process; auto: one where the cluster has any; 0.25: four workers share one
    )
    memory: Whole = 0  # bytes of a worker; 0: not counted

    @model_validator(mode="after")
    def _place(self) -> Ray:
        host, _, port = self.address.rpartition(":")
        if self.address not in ("local", "auto") and not (
            host and "/" not in host and port.isdigit() and int(port) < 1 << 16
        ):
            raise ValueError(
                f"`engine.ray.address` must be 'local', 'auto' or HOST:PORT, but got {self.address!r}"
            )
        return self


class Engine(Section):
    """Where and how trials run, and what is written beside the record. No part of a trial's identity."""

    kind: Literal["local", "ray", "slurm"] = "local"
    slurm: Slurm = Slurm()
    workers: Literal["auto"] | Count = "auto"  # auto: one a GPU, or one a core
    processes: Count = 1  # that share one trial's batch
    # trials that train as one model, at most: on a CPU the same bits; auto: what a CPU is quickest with, one on a GPU; fill: what should
    # fill a GPU, by a model of it that was never measured
    stack: Literal["auto", "fill"] | Count = "auto"
    branch: Literal["auto"] | bool = (
        "auto"  # horizons of one trial share a trunk, to the same bits; true: and say what keeps them apart
    )
    accumulation: Count = 1  # micro-batches a process and step
    compile: bool = False  # torch.compile
    evaluate_at: list[Fraction] = []  # shares of the tokens, beside the end
    noise_every: Annotated[int, Field(ge=0)] = (
        0  # steps between measurements of the gradient-noise scale; 0: none
    )
    checkpoint_every: Annotated[int, Field(ge=0)] = 0  # steps; 0: none
    trackers: list[Literal["tensorboard", "wandb"]] = []
    runs: str = "runs"  # folder of checkpoints and trackers, one of its own a trial; relative to the folder that gets sweeps/
    retries: Annotated[int, Field(ge=0)] = (
        2  # of a trial whose worker dies, hangs or runs out of memory, before it is recorded as failed
    )
    patience: Positive = 1800.0  # seconds a worker may say nothing before it counts as hung
    ray: Ray = Ray()

    @model_validator(mode="after")
    def _whole_gpus(self) -> Engine:
        if self.processes > 1 and self.ray.gpus not in ("auto", 0, 1):
            raise ValueError(
                f"`engine.ray.gpus` must be 0 or 1 where a trial has {self.processes} processes, but got {self.ray.gpus}"
            )
        return self

    @model_validator(mode="after")
    def _parts(self) -> Engine:
        if self.noise_every and self.processes * self.accumulation < 2:
            raise ValueError(
                "`processes * accumulation >= 2` must hold for a gradient-noise scale (it compares batches of two sizes), but got "
                f"processes={self.processes}, accumulation={self.accumulation}"
            )
        if self.slurm.gpus_per_trial not in (0, self.processes):
            raise ValueError(
                "`engine.slurm.gpus_per_trial` must be 0 or `engine.processes` (a process trains on one), but got "
                f"gpus_per_trial={self.slurm.gpus_per_trial}, processes={self.processes}"
            )
        return self


BLIND = ("gp", "cmaes")  # samplers that learn from complete trials alone


OWN = {  # read by one kind of search alone
    "sampler": "optuna", "pruner": "optuna", "reduction": "optuna", "flops": "pareto", "every": "pbt", "factor": "pbt",
}  # fmt: skip


class Search(Section):
    """Which points of `axes` to train: all of them, or those a search asks for (`scaletune.sweeping.search.loop`). No part of a trial's identity."""

    kind: Literal["grid", "basin", "joint", "optuna", "pareto", "pbt"] = "grid"
    budget: Count | None = (
        None  # points, diverged ones too: of each cell; of "joint": of all cells together; none: until `noise`
    )
    flops: Positive | None = (
        None  # pareto: FLOPs of a cell's points together, in place of `budget` or beside it
    )
    noise: Positive = 0.0003  # stop when no more than this share of the loss is to be won; not read by "optuna" and "pareto"
    wave: Count = 1  # points asked for at once: of each cell; of "joint": of all cells together
    extend: Seed = 2  # grid steps that a range may grow by at an end where the optimum sits
    seed: Seed = 0
    sampler: Literal["tpe", "gp", "cmaes", "qmc", "random"] = "tpe"  # optuna
    pruner: Literal["none", "median", "halving", "hyperband", "topk"] = (
        "none"  # optuna: over the `tokens` axis, a trial of its own each rung
    )
    reduction: Annotated[int, Field(ge=2)] = (
        3  # halving, hyperband: one in so many goes on to the next rung; topk: from the first to the last
    )
    every: Annotated[float, Field(gt=0, lt=1)] = (
        0.2  # pbt: share of the tokens after which the worse half goes on from the better half's weights
    )
    factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = (
        1.25  # pbt: which then multiplies or divides its lr
    )

    @model_validator(mode="after")
    def _sound(self) -> Search:
        for name, owner in OWN.items():
            if self.kind != owner and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"`search.{name}` is read by search.kind {owner!r} alone, but got kind={self.kind!r}"
                )
        if self.kind == "optuna" and self.budget is None:
            raise ValueError(
                "search.kind 'optuna' does not know when to stop: `search.budget` must say how many points a cell may have"
            )
        if self.kind == "pareto" and self.budget is None and self.flops is None:
            raise ValueError(
                "search.kind 'pareto' does not know when to stop: `search.budget` (points) or `search.flops` must be given"
            )
        if self.pruner not in ("none", "topk") and self.sampler in BLIND:
            raise ValueError(
                f"sampler {self.sampler!r} learns from complete trials alone: with a pruner it would stay at random search, but got "
                f"pruner={self.pruner!r} (learn from pruned trials or need none: tpe, qmc, random)"
            )
        return self
