"""`param_groups.json` and `loader.py`: what a config cannot hold, and the few lines that attach it to any torch model by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scaletune.errors import UserError
from scaletune.recipe import Recipe, resolved
from scaletune.rules import Planned
from scaletune.transferring import Transfer

GROUPS = "learning rate, weight decay and eps of each tensor: param_groups.json, through loader.py"
SCHEDULE = "schedule: loader.py's LambdaLR multiplies each group's own peak; a scheduler that writes absolute values undoes the transfer"
SCRIPT = "gradient clipping, batch size and token horizon: set them in the training script as param_groups.json says"
CLIPPED = (
    "the plan's own gradient norm: rewritten weights have other gradients, so a global clip bites at another value than in the proxies"
)


def pattern(name: str) -> str:
    """A regular expression for one tensor's name, whatever its layer."""
    return "^" + re.sub(r"layers\\\.\d+", r"layers\\.\\d+", re.escape(name)) + "$"


def grouped(rows: Sequence[Planned]) -> list[dict[str, Any]]:
    """Tensors that share lr, weight decay, eps and init std, as patterns of their names; gains and biases have no init std."""
    groups: dict[tuple[float, ...], dict[str, None]] = {}
    for row in rows:
        groups.setdefault((row.lr, row.weight_decay, row.eps, row.init_std), {})[pattern(row.name)] = None
    return [{"patterns": [*p], "lr": lr, "weight_decay": wd, "eps": eps, "init_std": std} for (lr, wd, eps, std), p in groups.items()]


def kinds(rows: Sequence[Planned]) -> dict[str, Planned]:
    """`self_attn.q_proj.weight` -> its settings, which every layer shares."""
    return {_kind(row): row for row in rows}


def _kind(row: Planned) -> str:
    return re.sub(r"^model\.layers\.\d+\.", "", row.name)


def by_name(rows: Sequence[Planned], names: Mapping[str, str]) -> dict[str, Planned]:
    """Another stack's name -> its settings; UserError on a kind it has no name for, or that it keeps in one tensor with an unlike one."""
    found: dict[str, Planned] = {}
    for kind, row in kinds(rows).items():
        if kind not in names:
            raise UserError(f"the stack must have a name for every tensor, but has none for {kind!r}: set model.biases = false")
        first = found.setdefault(names[kind], row)
        if _settings(first) != _settings(row):
            raise UserError(f"the stack keeps {first.name!r} and {row.name!r} in one tensor, but they need other settings: emit 'pytorch'")
    return found


def merged(rows: Sequence[Planned], names: Mapping[str, str]) -> tuple[list[Planned], list[str]]:
    """(rows, sentences): what a stack keeps in one tensor gets the least of its eps, and which that changes.

    Keys and values of few heads do not grow in number with width, so their gradients, and eps, shrink less than the queries' do.
    """
    shared: dict[str, list[Planned]] = {}
    for kind, row in kinds(rows).items():
        shared.setdefault(names.get(kind, kind), []).append(row)
    least = {_kind(row): min(each.eps for each in together) for together in shared.values() for row in together}
    said = [
        f"eps of {kind}: {row.eps:.4g} in the plan and {least[kind]:.4g} here, as it is one tensor with others"
        for kind, row in kinds(rows).items() if row.eps > least[kind]
    ]  # fmt: skip
    return [replace(row, eps=least[_kind(row)]) for row in rows], said


def _settings(row: Planned) -> tuple[float, ...]:
    return row.lr, row.weight_decay, row.eps, row.init_std


def named_groups(rows: Sequence[Planned], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Optimizer settings with the names, in another stack, of the tensors that share them."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, row in by_name(rows, names).items():
        groups.setdefault((row.lr, row.weight_decay, row.eps), []).append(name)
    return [{"patterns": found, "lr": lr, "weight_decay": wd, "eps": eps} for (lr, wd, eps), found in groups.items()]


def stds(rows: Sequence[Planned], names: Mapping[str, str]) -> dict[str, float]:
    """Another stack's names of the matrices -> their init std."""
    return {name: row.init_std for name, row in by_name(rows, names).items() if row.init_std}


def param_groups(
    transfer: Transfer, rows: Sequence[Planned], cannot: Sequence[str], multipliers: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Patterns with their settings (the first match wins), the optimizer, the schedule, what the config `cannot` hold, the evidence.

    `multipliers`: those of the forward pass, where the config they go with is none that `reading.read` knows.
    """
    t = transfer.target
    return {
        "schema": "scaletune.param_groups/1", **({"multipliers": dict(multipliers)} if multipliers else {}),
        "groups": grouped(rows),
        "optimizer": {"class": "torch.optim.AdamW", "betas": [t.optimizer.beta1, t.optimizer.beta2], "max_grad_norm": t.optimizer.clip},
        "schedule": resolved(t.schedule, t.budget).model_dump(),
        "budget": {"tokens": t.budget.tokens, "batch_tokens": t.budget.batch_tokens, "steps": t.budget.steps, "seq_len": t.data.seq_len},
        "cannot": list(cannot),
        "evidence": transfer.evidence,
    }  # fmt: skip


def carried(
    target: Recipe, stack: str, kinds: Sequence[str] = ("constant", "linear", "cosine", "wsd"), shapes: Sequence[str] = ("linear",)
) -> None:
    """UserError unless the stack, or loader.py, can build the target's optimizer and schedule."""
    allowed = {"optimizer.family": ("adamw",), "schedule.kind": kinds, "schedule.decay_shape": shapes, "schedule.ema_half_life": (None,)}
    for path, values in allowed.items():
        section, key = path.split(".")
        if (got := getattr(getattr(target, section), key)) not in values:
            raise UserError(f"format {stack!r} carries `{path}` of {', '.join(map(repr, values))} alone, but got {got!r}")


HEAD = '''"""Attach param_groups.json to a model: written by scaletune, needs torch alone.

{usage}
"""
'''

LOADER = (
    HEAD
    + '''
import json
import math
import re
from pathlib import Path

import torch

SETTINGS = json.loads(Path(__file__).with_name("param_groups.json").read_text())
WRAPPERS = re.compile(r"(^|(?<=\\.))(module|_orig_mod|_fsdp_wrapped_module)\\.")


def make_groups(model):
    """Param groups by name; every trainable parameter must match a pattern, and every pattern a parameter."""
    groups = [{"params": [], **{k: g[k] for k in ("lr", "weight_decay", "eps")}} for g in SETTINGS["groups"]]
    patterns = [(re.compile(p), i) for i, g in enumerate(SETTINGS["groups"]) for p in g["patterns"]]
    unused = {p.pattern for p, _ in patterns}
    for name, parameter in model.named_parameters():
        hit = next(((p, i) for p, i in patterns if p.match(WRAPPERS.sub("", name))), None)
        if hit is None:
            raise ValueError(f"param_groups.json explains every parameter, but not {name}")
        unused.discard(hit[0].pattern)
        groups[hit[1]]["params"].append(parameter)
    if unused:
        raise ValueError(f"every pattern must match a parameter, but these match none: {sorted(unused)}")
    return groups


@torch.no_grad()
def initialize(model, seed=0):
    """Draw every matrix with its own std; gains and biases stay as the model made them. Before it is wrapped or sharded."""
    generator = torch.Generator().manual_seed(seed)
    for group, settings in zip(make_groups(model), SETTINGS["groups"]):
        for parameter in group["params"] if settings["init_std"] else []:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * settings["init_std"])


def make_optimizer(model):
    return torch.optim.AdamW(make_groups(model), betas=tuple(SETTINGS["optimizer"]["betas"]))


def make_scheduler(optimizer, steps=SETTINGS["budget"]["steps"]):
    s = SETTINGS["schedule"]

    def factor(step):
        share = min(1.0, (step + 0.5) / steps)
        if share < s["warmup"]:
            return share / s["warmup"]
        if s["kind"] == "constant":
            return 1.0
        start = 1 - s["decay"] if s["kind"] == "wsd" else s["warmup"]
        down = min(1.0, max(0.0, (share - start) / max(1 - start, 1e-12)))
        shape = (1 + math.cos(math.pi * down)) / 2 if s["kind"] == "cosine" else 1 - down
        return s["floor"] + (1 - s["floor"]) * shape

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
'''
)


def loader(usage: str) -> str:
    """loader.py with the lines that show how this stack uses it."""
    return LOADER.replace("{usage}", "\n".join(f"    {line}" if line else "" for line in usage.splitlines()))
