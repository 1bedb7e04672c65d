"""Hugging Face Granite: the one family whose config.json carries every multiplier muP needs.

Granite has one init std, so the plan is rewritten by the one-std shift. Its config cannot hold learning rates by tensor:
those are in `param_groups.json`, and `loader.py` hands them to any torch optimizer. Keys checked against transformers 5.23.0:
`logits_scaling` divides, `attention_multiplier` is the softmax scale itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.recipe import Recipe, resolved
from scaletune.records import write_atomically
from scaletune.rules import Planned
from scaletune.transferring import Transfer, one_std
from scaletune.zoo import Model, Transformer

NOT_IN_CONFIG = [
    "learning rate, weight decay and eps of each tensor: param_groups.json, through loader.py or Trainer(optimizers=...)",
    "schedule: loader.py's LambdaLR, which multiplies each group's own peak; a scheduler that writes absolute values undoes the transfer",
    "gradient clipping, batch size and token horizon: set them in the training script as param_groups.json says",
]


OURS = {"norm": "rms", "mlp": "swiglu", "positions": "rotary", "qk_norm": False}  # what a Granite is


def _as_granite(model: Model) -> Transformer:
    """The model, which must be one that GraniteConfig can say; UserError with the first thing that it cannot."""
    if not isinstance(model, Transformer):
        raise UserError(f"a Granite config must be of a 'transformer', but got `model.family` {model.family!r}")
    for key, value in OURS.items():
        if getattr(model, key) != value:
            raise UserError(f"a Granite has `model.{key}` {value!r}, but the target has {getattr(model, key)!r}")
    return model


def config(transfer: Transfer, rows: list[Planned], multipliers: dict[str, float]) -> dict[str, Any]:
    """config.json of a GraniteForCausalLM; every key is a declared field of GraniteConfig."""
    model = _as_granite(transfer.target.model)
    return {
        "architectures": ["GraniteForCausalLM"], "model_type": "granite", "vocab_size": transfer.vocab_size,
        "hidden_size": model.width, "intermediate_size": model.ffn_width, "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads or model.heads, "hidden_act": "silu",
        "max_position_embeddings": transfer.target.data.seq_len, "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": model.biases, "attention_dropout": 0.0, "mlp_bias": model.biases, "tie_word_embeddings": model.tied,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "initializer_range": next(row.init_std for row in rows if row.role == "hid"),
        "embedding_multiplier": multipliers["embedding"],
        "attention_multiplier": multipliers["attention"],
        "residual_multiplier": multipliers["residual"],
        "logits_scaling": 1 / multipliers["logits"],
    }  # fmt: skip


def _pattern(name: str) -> str:
    """A regular expression for one tensor's name, whatever its layer."""
    return "^" + re.sub(r"layers\\\.\d+", r"layers\\.\\d+", re.escape(name)) + "$"


def param_groups(transfer: Transfer, rows: list[Planned]) -> dict[str, Any]:
    """Patterns with lr, weight decay and eps (the first match wins), the optimizer, the schedule and the evidence."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for row in rows:
        patterns = groups.setdefault((row.lr, row.weight_decay, row.eps), [])
        if _pattern(row.name) not in patterns:
            patterns.append(_pattern(row.name))
    t = transfer.target
    return {
        "schema": "scaletune.param_groups/1",
        "groups": [{"patterns": p, "lr": lr, "weight_decay": wd, "eps": eps} for (lr, wd, eps), p in groups.items()],
        "optimizer": {"class": "torch.optim.AdamW", "betas": [t.optimizer.beta1, t.optimizer.beta2], "max_grad_norm": t.optimizer.clip},
        "schedule": resolved(t.schedule, t.budget).model_dump(),
        "budget": {"tokens": t.budget.tokens, "batch_tokens": t.budget.batch_tokens, "steps": t.budget.steps, "seq_len": t.data.seq_len},
        "not_in_config": NOT_IN_CONFIG,
        "evidence": transfer.evidence,
    }  # fmt: skip


LOADER = '''"""Attach param_groups.json to a model: written by scaletune, needs torch alone.

    model = transformers.GraniteForCausalLM(transformers.GraniteConfig.from_json_file("config.json"))
    optimizer = make_optimizer(model)
    scheduler = make_scheduler(optimizer)   # step it once per optimizer step; do not let a launcher step it per process
    trainer = transformers.Trainer(model, ..., optimizers=(optimizer, scheduler))
"""

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


def _carried(target: Recipe) -> None:
    """UserError unless loader.py can build the target's optimizer and schedule."""
    carried = {
        "optimizer.family": ("adamw",),
        "schedule.kind": ("constant", "linear", "cosine", "wsd"),
        "schedule.decay_shape": ("linear",),
    }
    for path, values in (carried | {"schedule.ema_half_life": (None,)}).items():
        section, key = path.split(".")
        if (got := getattr(getattr(target, section), key)) not in values:
            raise UserError(f"format 'granite' carries `{path}` of {', '.join(map(repr, values))} alone, but got {got!r}")


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`config.json`, `param_groups.json`, `loader.py`."""
    _as_granite(transfer.target.model)
    _carried(transfer.target)
    rows, multipliers = one_std(transfer)
    texts = {
        "config.json": json.dumps(config(transfer, rows, multipliers), indent=2) + "\n",
        "param_groups.json": json.dumps(param_groups(transfer, rows), indent=1) + "\n",
        "loader.py": LOADER,
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [folder / name for name in texts]
