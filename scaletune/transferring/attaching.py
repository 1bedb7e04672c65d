"""`param_groups.json` and `loader.py`: what a config cannot hold, and the few lines that attach it to any torch model by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from scaletune.errors import UserError
from scaletune.recipe import READS, Optimizer, Recipe, resolved
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
    """Tensors that share an optimizer and its settings and init std, as patterns of their names; gains and biases have no init std."""
    groups: dict[tuple[Any, ...], dict[str, None]] = {}
    for row in rows:
        groups.setdefault((row.family, row.lr, row.weight_decay, row.eps, row.init_std), {})[pattern(row.name)] = None
    keys = ("family", "lr", "weight_decay", "eps", "init_std")
    return [{"patterns": [*patterns]} | dict(zip(keys, values, strict=True)) for values, patterns in groups.items()]


def kinds(rows: Sequence[Planned]) -> dict[str, Planned]:
    """`self_attn.q_proj.weight` -> its settings, which every layer shares."""
    return {re.sub(r"^model\.layers\.\d+\.", "", row.name): row for row in rows}


def named_groups(rows: Sequence[Planned], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Optimizer settings with the names, in another stack, of the kinds of tensors that share them; UserError on a kind it has not."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for kind, row in kinds(rows).items():
        if kind not in names:
            raise UserError(f"the stack must have a name for every tensor, but has none for {kind!r}: set model.biases = false")
        groups.setdefault((row.lr, row.weight_decay, row.eps), []).append(names[kind])
    return [{"patterns": found, "lr": lr, "weight_decay": wd, "eps": eps} for (lr, wd, eps), found in groups.items()]


def stds(rows: Sequence[Planned], names: Mapping[str, str]) -> dict[str, float]:
    """Another stack's names of the matrices -> their init std."""
    return {names[kind]: row.init_std for kind, row in kinds(rows).items() if row.init_std}


CLASSES = {  # optimizer family that loader.py builds -> whose class it is
    "adamw": "torch.optim.AdamW", "sgd": "torch.optim.SGD", "adafactor": "torch.optim.Adafactor", "muon": "torch.optim.Muon",
    "lion": "pytorch_optimizer.Lion",
}  # fmt: skip
LOADED = tuple(CLASSES)
_NO_CLASS = "torch has no class of it"
WHY_NOT = {  # family -> why loader.py does not build it
    "dadapt_adam": "it finds one lr for all tensors, where the plan has one for each",
    "prodigy": "it finds one lr for all tensors, where the plan has one for each",
    "momo_adam": "its step reads the loss, which no training script hands to it",
    "schedulefree_adamw": "it must be told when to train and when to evaluate, which no training script does",
    **dict.fromkeys(("lamb", "shampoo", "soap", "adam_atan2"), _NO_CLASS),
}  # fmt: skip


def _optimizer(o: Optimizer) -> dict[str, Any]:
    """What the optimizer's class is given, for all groups alike."""
    own: dict[str, Any] = {key: getattr(o, key) for key in ("momentum", "nesterov", "shape_factor") if key in READS[o.family]}
    own |= {"betas": [o.beta1, o.beta2]} if "beta1" in READS[o.family] else {}
    return {"class": CLASSES[o.family], **own, "max_grad_norm": o.clip}


def param_groups(transfer: Transfer, rows: Sequence[Planned], cannot: Sequence[str]) -> dict[str, Any]:
    """Patterns with their settings (the first match wins), the optimizer, the schedule, what the config `cannot` hold, the evidence."""
    t = transfer.target
    return {
        "schema": "scaletune.param_groups/1",
        "groups": grouped(rows),
        "optimizer": _optimizer(t.optimizer),
        "schedule": resolved(t.schedule, t.budget).model_dump(),
        "budget": {"tokens": t.budget.tokens, "batch_tokens": t.budget.batch_tokens, "steps": t.budget.steps, "seq_len": t.data.seq_len},
        "cannot": list(cannot),
        "evidence": transfer.evidence,
    }  # fmt: skip


def carried(
    target: Recipe,
    stack: str,
    kinds: Sequence[str] = ("constant", "linear", "cosine", "wsd"),
    shapes: Sequence[str] = ("linear",),
    families: Sequence[str] = ("adamw",),
) -> None:
    """UserError unless the stack, or loader.py, can build the target's optimizer and schedule."""
    allowed = {"optimizer.family": families, "schedule.kind": kinds, "schedule.decay_shape": shapes, "schedule.ema_half_life": (None,)}
    for path, values in allowed.items():
        section, key = path.split(".")
        if (got := getattr(getattr(target, section), key)) not in values:
            why = f" ({WHY_NOT[got]})" if path == "optimizer.family" and got in WHY_NOT else ""
            raise UserError(f"format {stack!r} carries `{path}` of {', '.join(map(repr, values))} alone, but got {got!r}{why}")
    if target.optimizer.family == "muon" and target.model.family == "moe":
        raise UserError(f"format {stack!r} has torch's Muon, which takes matrices one by one: experts are stacked, so set another family")


HEAD = '''"""Attach param_groups.json to a model: written by scaletune, needs {needs}.

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
    groups = [{"params": [], **{k: g[k] for k in ("family", "lr", "weight_decay", "eps")}} for g in SETTINGS["groups"]]
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


{optimizer}


def make_scheduler(optimizer, steps=SETTINGS["budget"]["steps"]):
    s = SETTINGS["schedule"]

    def factor(step):
        share = min(1.0, (step + 0.5) / steps)
        if share < s["warmup"]:
            return share / s["warmup"]
        start = {"constant": 1.0, "wsd": 1 - s["decay"]}.get(s["kind"], s["warmup"])
        down = min(1.0, max(0.0, (share - start) / max(1 - start, 1e-12)))
        shape = (1 + math.cos(math.pi * down)) / 2 if s["kind"] == "cosine" else 1 - down
        return s["floor"] + (1 - s["floor"]) * shape

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
'''
)


ADAMW = """def make_optimizer(model):
    return torch.optim.AdamW(make_groups(model), betas=tuple(SETTINGS["optimizer"]["betas"]))"""
SGD = """def make_optimizer(model):
    o = SETTINGS["optimizer"]
    return torch.optim.SGD(make_groups(model), momentum=o["momentum"], nesterov=o["nesterov"])"""
ADAFACTOR = """def make_optimizer(model):
    return torch.optim.Adafactor([{**g, "eps": (1e-18, 1e-3)} for g in make_groups(model)])  # a larger eps[0] stops wide layers"""
LION = """def make_optimizer(model):
    from pytorch_optimizer import Lion

    return Lion(make_groups(model), betas=tuple(SETTINGS["optimizer"]["betas"]))"""
MUON = '''class Together(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer, whose groups are theirs."""

    def __init__(self, *parts):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure=None):
        return [part.step(closure if part is self.parts[0] else None) for part in self.parts][0]

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, own in zip(self.parts, state["parts"]):
            part.load_state_dict(own)
        self.param_groups[:] = [group for part in self.parts for group in part.param_groups]


def make_optimizer(model):
    o, groups = SETTINGS["optimizer"], make_groups(model)
    hidden, rest = ([g for g in groups if (g["family"] == "adamw") is not muon] for muon in (True, False))
    {spectral}muon = torch.optim.Muon(hidden, momentum=o["momentum"], nesterov=o["nesterov"], adjust_lr_fn={factor})
    return Together(muon, torch.optim.AdamW(rest, betas=tuple(o["betas"])))'''
SPECTRAL = """wide = [(g, p, min(1.0, p.shape[0] / p.shape[1]) ** 0.5) for g in hidden for p in g["params"]]  # torch's: max(1, out / in)
    hidden = [{**g, "params": [p], "lr": g["lr"] * s, "weight_decay": g["weight_decay"] / s} for g, p, s in wide]
    """
OWN = MUON.replace("{spectral}", "").replace("{factor}", 'o["shape_factor"]')
MAKES = {  # rule -> make_optimizer
    "adamw": ADAMW, "sgd": SGD, "adafactor": ADAFACTOR, "lion": LION, "muon": OWN, "muon_match_rms": OWN,
    "muon_spectral": MUON.replace("{spectral}", SPECTRAL).replace("{factor}", '"original"'),
}  # fmt: skip


def loader(usage: str, rule: str = "adamw") -> str:
    """loader.py for an optimizer's rule, with the lines that show how this stack uses it."""
    needs = "torch and pytorch-optimizer" if rule == "lion" else "torch alone"
    said = "\n".join(f"    {line}" if line else "" for line in usage.splitlines())
    return LOADER.replace("{optimizer}", MAKES[rule]).replace("{needs}", needs).replace("{usage}", said)
