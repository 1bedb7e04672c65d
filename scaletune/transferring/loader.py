"""Source of the emitted `loader.py`, which applies `param_groups.json` to a torch model by name."""

from __future__ import annotations

HEAD = '''"""Applies param_groups.json to a torch model. Written by scaletune; needs {needs}.

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
    """Returns param groups; each parameter must match a pattern, and each pattern a parameter."""
    groups = [{"params": [], **{k: g[k] for k in ("family", "lr", "weight_decay", "eps")}} \
for g in SETTINGS["groups"]]
    patterns = [(re.compile(p), i) for i, g in enumerate(SETTINGS["groups"]) for p in g["patterns"]]
    unused = {p.pattern for p, _ in patterns}
    for name, parameter in model.named_parameters():
        match = next(((p, i) for p, i in patterns if p.match(WRAPPERS.sub("", name))), None)
        if match is None:
            raise ValueError(f"every parameter must match a pattern, but {name} matches none")
        unused.discard(match[0].pattern)
        groups[match[1]]["params"].append(parameter)
    if unused:
        raise ValueError(f"every pattern must match a parameter, but not these: {sorted(unused)}")
    return groups


@torch.no_grad()
def initialize(model, seed=0):
    """Draws each matrix from N(0, init_std**2); call it before the model is wrapped or sharded."""
    generator = torch.Generator().manual_seed(seed)
    for group, std in zip(make_groups(model), (g["init_std"] for g in SETTINGS["groups"])):
        for p in group["params"] if std else []:
            p.copy_(std * torch.randn(p.shape, generator=generator, dtype=torch.float32))


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
    # torch's default eps[0] exceeds the squared gradients of wide layers, which then do not train
    return torch.optim.Adafactor([{**g, "eps": (1e-18, 1e-3)} for g in make_groups(model)])"""
LION = """def make_optimizer(model):
    from pytorch_optimizer import Lion

    return Lion(make_groups(model), betas=tuple(SETTINGS["optimizer"]["betas"]))"""
MUON = '''class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for the rest, as one optimizer."""

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
    hidden, rest = ([g for g in groups if (g["family"] == "adamw") is b] for b in (False, True))
    {spectral}muon = torch.optim.Muon(hidden, momentum=o["momentum"], nesterov=o["nesterov"], \
adjust_lr_fn={factor})
    return MuonAndAdamW(muon, torch.optim.AdamW(rest, betas=tuple(o["betas"])))'''
SPECTRAL = """wide = [(g, p, min(1.0, p.shape[0] / p.shape[1]) ** 0.5) for g in hidden \
for p in g["params"]]  # torch scales by max(1, out / in)**0.5, the plan by (out / in)**0.5
    hidden = [{**g, "params": [p], "lr": g["lr"] * s, "weight_decay": g["weight_decay"] / s} \
for g, p, s in wide]
    """
OWN_FACTOR = MUON.replace("{spectral}", "").replace("{factor}", 'o["shape_factor"]')
OPTIMIZERS = {
    "adamw": ADAMW,
    "sgd": SGD,
    "adafactor": ADAFACTOR,
    "lion": LION,
    "muon": OWN_FACTOR,
    "muon_match_rms": OWN_FACTOR,
    "muon_spectral": MUON.replace("{spectral}", SPECTRAL).replace("{factor}", '"original"'),
}
"""Optimizer rule -> source of `make_optimizer`."""


def loader(usage: str, rule: str = "adamw") -> str:
    """Returns the source of loader.py.

    Args:
        usage: Example lines that show how this stack uses it.
        rule: The optimizer's rule (`Optimizer.rule`).
    """
    needs = "torch and pytorch-optimizer" if rule == "lion" else "torch alone"
    indented = "\n".join(f"    {line}" if line else "" for line in usage.splitlines())
    source = LOADER.replace("{optimizer}", OPTIMIZERS[rule])
    return source.replace("{needs}", needs).replace("{usage}", indented)
