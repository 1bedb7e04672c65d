"""The known faults of muP configs, one rule each: `(stack, flat config) -> [(where, sentence, fix)]`. Nothing found: no list entries.

A flat config has dotted keys as its file nests them; `groups` are param groups by name, checked in `grouped_faults`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

Flat = Mapping[str, Any]
Found = list[tuple[str, str, str]]
MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "initializer_range",
)
GRANITES = ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid", "hyperclovax")
DIVIDES = GRANITES[:-1]  # those whose logits_scaling divides


def leaf(config: Flat, name: str) -> tuple[str, Any]:
    """(path, value) of the first key whose last part is `name`, dashes and underscores alike; ("", None) where there is none."""
    for path, value in config.items():
        if path.rsplit(".", 1)[-1].replace("-", "_") == name:
            return path, value
    return "", None


def default_attention_multiplier(stack: str, config: Flat) -> Found:
    """Granite's default is 1.0, and it is the softmax scale itself; Cerebras says that its switch must be on for muP."""
    if stack == "cerebras" and scales(stack, config) and not leaf(config, "scale_qk_dot_by_d")[1]:
        return [
            (
                "scale_qk_dot_by_d",
                "the softmax scale stays head_dim**-0.5, which is not muP where heads grow",
                "set it to true",
            )
        ]
    value = config.get("attention_multiplier", 1.0)
    if (
        stack not in DIVIDES
        or value != 1.0
        or config.get("hidden_size") == config.get("num_attention_heads")
    ):
        return []
    return [
        (
            "attention_multiplier",
            "the softmax scale is 1.0, not head_dim**-0.5",
            "set it to (hidden_size / num_attention_heads)**-0.5",
        )
    ]


def init_std_default(stack: str, config: Flat) -> Found:
    """Multipliers without an init std that goes with them."""
    if (
        stack not in GRANITES
        or "initializer_range" in config
        or not any(key in config for key in MULTIPLIERS[:1] + MULTIPLIERS[2:4])
    ):
        return []
    return [
        (
            "initializer_range",
            "multipliers are set but the init std is left at the library's 0.02",
            "set base std / sqrt(width / base_width)",
        )
    ]


def misspelt_key(stack: str, config: Flat) -> Found:
    """transformers keeps a key that it does not know, and ignores it."""
    if stack not in GRANITES:
        return []
    close = {
        key: difflib.get_close_matches(key, MULTIPLIERS, n=1, cutoff=0.85)
        for key in config
        if key not in MULTIPLIERS
    }
    return [
        (key, f"transformers ignores the unknown key {key!r} in silence", f"write {near[0]!r}")
        for key, near in close.items()
        if near
    ]


def logits_direction(stack: str, config: Flat) -> Found:
    """The same key divides in one family and multiplies in the other."""
    scaling, embedding = config.get("logits_scaling", 1.0), config.get("embedding_multiplier", 1.0)
    copied = (
        abs(scaling * embedding - 1) < 1e-9 if stack in DIVIDES else abs(scaling - embedding) < 1e-9
    )
    if stack not in GRANITES or not copied or embedding <= 1:
        return []
    does = "divides" if stack in DIVIDES else "multiplies"
    return [("logits_scaling", f"it {does} the logits here, so {scaling:g} beside embedding_multiplier {embedding:g} is upside down", f"set it to {1 / scaling:g}")]  # fmt: skip


def scales(stack: str, config: Flat) -> bool:
    """Whether the stack's own muP divides the hidden lr: not at a base of its own width."""
    if stack == "megatron":
        return bool(config.get("use_mup")) and config.get("mup_base_hidden_size") != config.get(
            "hidden_size", 0
        )
    if stack == "cerebras":
        base = leaf(config, "mup_base_hidden_size")[1]
        return bool(base) and base != leaf(config, "hidden_size")[1]
    return stack == "lm-engine" and leaf(config, "params_group_method")[1] == "mup"


def readout_divided_twice(stack: str, config: Flat) -> Found:
    """Megatron groups an untied head with the hidden matrices, which also has the 1/m multiplier (main at 0044db1f)."""
    if (
        stack != "megatron"
        or not scales(stack, config)
        or not config.get("untie_embeddings_and_output_weights")
        or config.get("decoupled_lr")
    ):
        return []
    return [("use_mup", "an untied head gets lr / m and its logits 1 / m: the readout learns m times too slowly", "add --decoupled-lr with the base lr")]  # fmt: skip


def weight_decay_not_scaled(stack: str, config: Flat) -> Found:
    """Stacks whose own muP divides the hidden lr and leaves weight decay."""
    half = config.get("mup_width_multiplier", 1) != 1 and not config.get(
        "depth_alpha_enabled"
    )  # nanoGPT-mup: its depth code scales it too
    if not scales(stack, config) and not (stack == "nanogpt-mup" and half):
        return []
    path, decay = leaf(config, "weight_decay")
    if not decay:
        return []
    return [(path, f"hidden matrices get lr / m and the same weight_decay {decay:g}: they shrink m times less than in the proxy", "set it to 0, or give own groups with weight_decay * m (nanoGPT-mup: depth_alpha_enabled = True)")]  # fmt: skip


def absolute_scheduler(stack: str, config: Flat) -> Found:
    """A scheduler that writes one lr into every group undoes the transfer at its first step."""
    fix = "use WarmupCosineLR, a list with one warmup_max_lr a group, or a scheduler of your own that multiplies"
    kind = config.get("scheduler.type")
    if (
        stack == "deepspeed"
        and kind in ("WarmupLR", "WarmupDecayLR")
        and not isinstance(config.get("scheduler.params.warmup_max_lr"), list)
    ):
        return [("scheduler.type", f"{kind} writes one warmup_max_lr into every param group", fix)]
    if stack == "gpt-neox" and leaf(config, "use_mup")[1]:
        return [("use_mup", "the annealer writes one lr into every param group, so muP's is lost at the first step", "do not use its muP; own groups and loop")]  # fmt: skip
    return []


def coupled_l2(stack: str, config: Flat) -> Found:
    """Adam with L2 in the gradient, which does not scale as the loss gradient does and which no coordinate check shows."""
    if stack == "gpt-neox" and leaf(config, "use_mup")[1]:
        path, decay = leaf(config, "weight_decay")
        return (
            [(path, f"MuAdam is Adam with coupled L2 of {decay:g}", "set it to 0")] if decay else []
        )
    kind = next(
        (
            config[key]
            for key in (
                "optimizer.type",
                "optimizer.class_path",
                "optimizer.class",
                "optimizer.name",
            )
            if key in config
        ),
        "",
    )
    decay = leaf(config, "weight_decay")[1] or config.get("groups.weight_decay")
    decoupled = config.get("optimizer.params.adam_w_mode", stack == "deepspeed" and kind == "Adam")
    if str(kind).rsplit(".", 1)[-1] in ("Adam", "MuAdam") and decay and not decoupled:
        return [
            (
                "optimizer",
                f"{kind} adds weight_decay {decay:g} to the gradient, where Adam rescales it",
                "use AdamW",
            )
        ]
    return []


def shapes_lost(stack: str, config: Flat) -> Found:
    """`mup` keeps its ratios on the tensors, and sharding drops them."""
    kind, stage = str(config.get("optimizer.type", "")), config.get("zero_optimization.stage", 0)
    if stack != "deepspeed" or not kind.startswith("Mu") or stage < 3:
        return []
    return [("zero_optimization.stage", f"{kind} reads width ratios off the parameters, and ZeRO-3 shards have none", "use AdamW over groups made by name before `initialize`")]  # fmt: skip


def eps_not_scaled(stack: str, config: Flat) -> Found:
    """The `mup` package divides the lr of matrices and leaves eps, while gradients shrink with width."""
    kind, eps = str(config.get("optimizer.type", "")), config.get("optimizer.params.eps", 1e-8)
    if stack != "deepspeed" or kind not in ("MuAdam", "MuAdamW") or eps < 1e-8:
        return []
    return [
        (
            "optimizer.params.eps",
            f"{kind} leaves eps at {eps:g}, while gradients shrink with width",
            "set it to base eps / m",
        )
    ]


def square_not_scaled(stack: str, config: Flat) -> Found:
    """nanotron's spectral rule is SGD's, put on Adam (2411b022)."""
    path, value = leaf(config, "use_mup")
    if stack != "nanotron" or not value:
        return []
    return [(path, "lr is multiplied by fan_out / fan_in under Adam, so square matrices are not scaled with width at all", "set it to false; own groups")]  # fmt: skip


def hidden_lr_not_scaled(stack: str, config: Flat) -> Found:
    """A width that the model is scaled by and the hidden learning rates are not."""
    path, m = leaf(config, "m_width")
    said, method = leaf(config, "params_group_method")  # null: groups of one's own
    if (
        stack == "lm-engine"
        and m not in (None, 1, 1.0)
        and method != "mup"
        and not (said and method is None)
    ):
        return [
            (
                path,
                "logits are divided by m_width, but every matrix keeps the base lr",
                "set optimizer_args.params_group_method to 'mup'",
            )
        ]
    if (
        stack != "nanogpt-mup"
        or not config.get("mup_disable_hidden_lr_scaling")
        or config.get("mup_width_multiplier", 1) == 1
    ):
        return []
    return [
        (
            "mup_disable_hidden_lr_scaling",
            "hidden matrices keep the base lr at another width",
            "set it to False",
        )
    ]


def half_of_a_base(stack: str, config: Flat) -> Found:
    """Cerebras needs the base of the width and of the filter together."""
    pair = ("mup_base_hidden_size", "mup_base_filter_size")
    given = [bool(leaf(config, name)[1]) for name in pair]
    if stack != "cerebras" or all(given) or not any(given):
        return []
    return [
        (
            pair[given.index(True)],
            f"muP needs both bases, but {pair[given.index(False)]} is not set",
            "set both to the proxy's",
        )
    ]


def depth_scaled_twice(stack: str, config: Flat) -> Found:
    """A residual multiplier and a 1/sqrt(2L) init both shrink the branches."""
    path, value = leaf(config, "use_depth_scaled_init")
    if stack != "lm-engine" or not value or leaf(config, "m_residual")[1] in (None, 1, 1.0):
        return []
    return [
        (
            path,
            "branches are shrunk by m_residual and by their init std again",
            "set it to false: a multiplier replaces the init's 1/sqrt(2L)",
        )
    ]


RULES: tuple[Callable[[str, Flat], Found], ...] = (
    default_attention_multiplier, init_std_default, misspelt_key, logits_direction, readout_divided_twice, weight_decay_not_scaled,
    absolute_scheduler, coupled_l2, shapes_lost, eps_not_scaled, square_not_scaled, hidden_lr_not_scaled, half_of_a_base, depth_scaled_twice,
)  # fmt: skip
