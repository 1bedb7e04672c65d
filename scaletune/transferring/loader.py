"""`loader.py`: the few lines that attach `param_groups.json` to a torch model by name."""

from __future__ import annotations

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
    return (
        LOADER.replace("{optimizer}", MAKES[rule])
        .replace("{needs}", needs)
        .replace("{usage}", said)
    )
