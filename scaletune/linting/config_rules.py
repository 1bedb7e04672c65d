"""Known mistakes in muP configs, one function per rule: `(stack, flat config) -> findings`.

A flat config has dotted keys, as its file nests them. A finding is `(where, what is wrong and why
it matters, what to write instead)`. `stack_rules` has the rules for one stack's own keys,
`group_rules` those for param groups.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

FlatConfig = Mapping[str, Any]
Findings = list[tuple[str, str, str]]
MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "initializer_range",
)
GRANITES = ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid", "hyperclovax")
DIVIDES = GRANITES[:-1]
"""Model types whose `logits_scaling` divides; HyperCLOVA-X's multiplies."""


def find_key(config: FlatConfig, name: str) -> tuple[str, Any]:
    """(path, value) of the first key whose last part is `name`, or ("", None).

    Dashes and underscores are equal.
    """
    for path, value in config.items():
        if path.rsplit(".", 1)[-1].replace("-", "_") == name:
            return path, value
    return "", None


def default_attention_multiplier(stack: str, config: FlatConfig) -> Findings:
    """Granite's `attention_multiplier` is the softmax scale itself, and its default is 1.0.

    Cerebras' documentation requires `scale_qk_dot_by_d` for muP.
    """
    by_mup = stack == "cerebras" and scales_hidden_lr(stack, config)
    if by_mup and not find_key(config, "scale_qk_dot_by_d")[1]:
        return [
            (
                "scale_qk_dot_by_d",
                "the softmax scale stays head_dim**-0.5, which is not muP if the head size grows",
                "set it to true",
            )
        ]
    value = config.get("attention_multiplier", 1.0)
    of_size_one = config.get("hidden_size") == config.get("num_attention_heads")
    if stack not in DIVIDES or value != 1.0 or of_size_one:
        return []
    return [
        (
            "attention_multiplier",
            "the softmax scale is 1.0 instead of head_dim**-0.5, so attention logits are too large",
            "set it to (hidden_size / num_attention_heads)**-0.5",
        )
    ]


def init_std_default(stack: str, config: FlatConfig) -> Findings:
    """Multipliers without an init std that goes with them."""
    others = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    has_multiplier = any(key in config for key in others)
    if stack not in GRANITES or "initializer_range" in config or not has_multiplier:
        return []
    return [
        (
            "initializer_range",
            "multipliers are set, but the init std is the library's default 0.02, which does not"
            " scale with width",
            "set it to base std / sqrt(width / base_width)",
        )
    ]


def misspelt_key(stack: str, config: FlatConfig) -> Findings:
    """transformers keeps unknown keys and ignores them."""
    if stack not in GRANITES:
        return []
    unknown = [key for key in config if key not in MULTIPLIERS]
    close = {key: difflib.get_close_matches(key, MULTIPLIERS, n=1, cutoff=0.85) for key in unknown}
    return [
        (
            key,
            f"transformers ignores the unknown key {key!r} without a message",
            f"write {near[0]!r}",
        )
        for key, near in close.items()
        if near
    ]


def logits_direction(stack: str, config: FlatConfig) -> Findings:
    """`logits_scaling` divides the logits in Granite and multiplies them in HyperCLOVA-X."""
    scaling, embedding = config.get("logits_scaling", 1.0), config.get("embedding_multiplier", 1.0)
    divides = stack in DIVIDES
    inverted = abs(scaling * embedding - 1) < 1e-9 if divides else abs(scaling - embedding) < 1e-9
    if stack not in GRANITES or not inverted or embedding <= 1:
        return []
    does = "divides" if divides else "multiplies"
    return [
        (
            "logits_scaling",
            f"it {does} the logits in this model, so {scaling:g} is the inverse of what"
            f" embedding_multiplier {embedding:g} needs: the logits grow with width",
            f"set it to {1 / scaling:g}",
        )
    ]


def scales_hidden_lr(stack: str, config: FlatConfig) -> bool:
    """Whether the stack's own muP divides the hidden lr; not if its base width is the model's."""
    if stack == "megatron":
        base = config.get("mup_base_hidden_size")
        return bool(config.get("use_mup")) and base != config.get("hidden_size", 0)
    if stack == "cerebras":
        base = find_key(config, "mup_base_hidden_size")[1]
        return bool(base) and base != find_key(config, "hidden_size")[1]
    return stack == "lm-engine" and find_key(config, "params_group_method")[1] == "mup"


def readout_divided_twice(stack: str, config: FlatConfig) -> Findings:
    """Megatron (main at 0044db1f) divides both the lr and the logits of an untied head by m."""
    untied = config.get("untie_embeddings_and_output_weights") and not config.get("decoupled_lr")
    if stack != "megatron" or not scales_hidden_lr(stack, config) or not untied:
        return []
    return [
        (
            "use_mup",
            "an untied head gets lr / m, and its logits are multiplied by 1 / m: the readout learns"
            " m times too slowly",
            "add --decoupled-lr with the base lr",
        )
    ]


def weight_decay_not_scaled(stack: str, config: FlatConfig) -> Findings:
    """Stacks whose own muP divides the hidden lr and does not scale weight decay."""
    # nanoGPT-mup scales weight decay in its depth code only
    width = config.get("mup_width_multiplier", 1)
    unscaled = stack == "nanogpt-mup" and width != 1 and not config.get("depth_alpha_enabled")
    if not scales_hidden_lr(stack, config) and not unscaled:
        return []
    path, decay = find_key(config, "weight_decay")
    if not decay:
        return []
    return [
        (
            path,
            f"hidden matrices get lr / m with the same weight_decay {decay:g}, so they shrink m"
            " times less per step than in the proxy",
            "set it to 0, or use own param groups with weight_decay * m"
            " (nanoGPT-mup: depth_alpha_enabled = True)",
        )
    ]


def absolute_scheduler(stack: str, config: FlatConfig) -> Findings:
    """A scheduler that writes one lr into all groups undoes the transfer at its first step."""
    kind = config.get("scheduler.type")
    per_group = isinstance(config.get("scheduler.params.warmup_max_lr"), list)
    if stack == "deepspeed" and kind in ("WarmupLR", "WarmupDecayLR") and not per_group:
        return [
            (
                "scheduler.type",
                f"{kind} writes one warmup_max_lr into every param group, which removes the lr per"
                " tensor",
                "use WarmupCosineLR, a list with one warmup_max_lr per group, or your own scheduler"
                " that multiplies each group's lr",
            )
        ]
    if stack == "gpt-neox" and find_key(config, "use_mup")[1]:
        return [
            (
                "use_mup",
                "the annealer writes one lr into every param group, so muP's lr is lost at the"
                " first step",
                "do not use gpt-neox's muP; use own param groups in your own training loop",
            )
        ]
    return []


def coupled_l2(stack: str, config: FlatConfig) -> Findings:
    """Adam with L2 in the gradient, which scales unlike the loss gradient.

    A coordinate check does not show it.
    """
    if stack == "gpt-neox" and find_key(config, "use_mup")[1]:
        path, decay = find_key(config, "weight_decay")
        if not decay:
            return []
        return [
            (
                path,
                f"MuAdam adds weight_decay {decay:g} to the gradient (coupled L2), where Adam"
                " rescales it",
                "set it to 0",
            )
        ]
    keys = ("optimizer.type", "optimizer.class_path", "optimizer.class", "optimizer.name")
    kind = next((config[key] for key in keys if key in config), "")
    decay = find_key(config, "weight_decay")[1] or config.get("groups.weight_decay")
    decoupled = config.get("optimizer.params.adam_w_mode", stack == "deepspeed" and kind == "Adam")
    if str(kind).rsplit(".", 1)[-1] not in ("Adam", "MuAdam") or not decay or decoupled:
        return []
    return [
        (
            "optimizer",
            f"{kind} adds weight_decay {decay:g} to the gradient (coupled L2), where Adam rescales"
            " it: the decay does not scale with width as the plan assumes",
            "use AdamW",
        )
    ]


def shapes_lost(stack: str, config: FlatConfig) -> Findings:
    """The `mup` package stores width ratios on the parameters, and ZeRO-3 sharding drops them."""
    kind, stage = str(config.get("optimizer.type", "")), config.get("zero_optimization.stage", 0)
    if stack != "deepspeed" or not kind.startswith("Mu") or stage < 3:
        return []
    return [
        (
            "zero_optimization.stage",
            f"{kind} reads width ratios from the parameters, but ZeRO-3 shards have none: no lr is"
            " scaled",
            "use AdamW with groups that are built by name before `initialize`",
        )
    ]


def eps_not_scaled(stack: str, config: FlatConfig) -> Findings:
    """The `mup` package scales the lr of matrices, but not eps; gradients shrink with width."""
    kind, eps = str(config.get("optimizer.type", "")), config.get("optimizer.params.eps", 1e-8)
    if stack != "deepspeed" or kind not in ("MuAdam", "MuAdamW") or eps < 1e-8:
        return []
    return [
        (
            "optimizer.params.eps",
            f"{kind} keeps eps at {eps:g} while gradients shrink with width: eps dominates in wide"
            " models",
            "set it to base eps / m",
        )
    ]


def square_not_scaled(stack: str, config: FlatConfig) -> Findings:
    """nanotron (2411b022) applies a spectral rule for SGD to Adam."""
    path, value = find_key(config, "use_mup")
    if stack != "nanotron" or not value:
        return []
    return [
        (
            path,
            "it multiplies Adam's lr by fan_out / fan_in, so the lr of square matrices does not"
            " scale with width",
            "set it to false and use own param groups",
        )
    ]


def hidden_lr_not_scaled(stack: str, config: FlatConfig) -> Findings:
    """The model is scaled by its width, but the hidden learning rates are not."""
    path, m = find_key(config, "m_width")
    method_path, method = find_key(config, "params_group_method")
    own_groups = bool(method_path) and method is None
    scaled = m not in (None, 1, 1.0)
    if stack == "lm-engine" and scaled and method != "mup" and not own_groups:
        return [
            (
                path,
                "logits are divided by m_width, but every matrix keeps the base lr",
                "set optimizer_args.params_group_method to 'mup'",
            )
        ]
    disabled = config.get("mup_disable_hidden_lr_scaling")
    if stack != "nanogpt-mup" or not disabled or config.get("mup_width_multiplier", 1) == 1:
        return []
    return [
        (
            "mup_disable_hidden_lr_scaling",
            "hidden matrices keep the base lr at another width",
            "set it to False",
        )
    ]


def half_of_a_base(stack: str, config: FlatConfig) -> Findings:
    """Cerebras needs the base hidden size and the base filter size together."""
    pair = ("mup_base_hidden_size", "mup_base_filter_size")
    given = [bool(find_key(config, name)[1]) for name in pair]
    if stack != "cerebras" or all(given) or not any(given):
        return []
    present, missing = pair[given.index(True)], pair[given.index(False)]
    return [
        (
            present,
            f"Cerebras' muP needs both base sizes, but {missing} is not set",
            "set both to the proxy's sizes",
        )
    ]


def depth_scaled_twice(stack: str, config: FlatConfig) -> Findings:
    """A residual multiplier and an init with 1/sqrt(2L) both shrink the branches."""
    path, value = find_key(config, "use_depth_scaled_init")
    if stack != "lm-engine" or not value or find_key(config, "m_residual")[1] in (None, 1, 1.0):
        return []
    return [
        (
            path,
            "residual branches are scaled down twice: by m_residual and by their init std",
            "set it to false: the multiplier replaces the 1/sqrt(2L) of the init",
        )
    ]


RULES: tuple[Callable[[str, FlatConfig], Findings], ...] = (
    default_attention_multiplier,
    init_std_default,
    misspelt_key,
    logits_direction,
    readout_divided_twice,
    weight_decay_not_scaled,
    absolute_scheduler,
    coupled_l2,
    shapes_lost,
    eps_not_scaled,
    square_not_scaled,
    hidden_lr_not_scaled,
    half_of_a_base,
    depth_scaled_twice,
)
