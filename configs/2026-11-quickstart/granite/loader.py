"""Applies param_groups.json to a torch model. Written by scaletune; needs torch alone.

    model = transformers.GraniteForCausalLM(transformers.GraniteConfig.from_json_file("config.json"))
    optimizer = make_optimizer(model)
    scheduler = make_scheduler(optimizer)   # step it once per optimizer step, not once per process
    trainer = transformers.Trainer(model, ..., optimizers=(optimizer, scheduler))
"""

import json
import math
import re
from pathlib import Path

import torch

SETTINGS = json.loads(Path(__file__).with_name("param_groups.json").read_text())
WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module)\.")


def make_groups(model):
    """Returns param groups; each parameter must match a pattern, and each pattern a parameter."""
    groups = [{"params": [], **{k: g[k] for k in ("family", "lr", "weight_decay", "eps")}} for g in SETTINGS["groups"]]
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


def make_optimizer(model):
    return torch.optim.AdamW(make_groups(model), betas=tuple(SETTINGS["optimizer"]["betas"]))


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
