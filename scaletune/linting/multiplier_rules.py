"""Known mistakes in multipliers and base widths; the rules have the form of `config_rules`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator

from scaletune.linting.config_rules import (
    Findings,
    FlatConfig,
    find_key,
    scales_hidden_lr,
    width_ratio,
)
from scaletune.linting.stacks import GRANITES, MULTIPLIERS, PLAIN, READS

DIVIDES = GRANITES
"""Model types whose `logits_scaling` divides; HyperCLOVA-X's multiplies."""
USUAL_HEAD = 128
"""Largest head size that models of growing width keep fixed; a larger one has grown."""
SHIFTED = (*DIVIDES, "hyperclovax")
CHECKED = (*MULTIPLIERS["granite"], "initializer_range")


def head_dim(config: FlatConfig) -> float | None:
    """Size of an attention head, if the config has it."""
    for name in ("kv_channels", "head_dim"):
        value = find_key(config, name)[1]
        if isinstance(value, int | float) and value > 0:
            return float(value)
    widths = [find_key(config, name)[1] for name in ("hidden_size", "n_embd")]
    heads = [find_key(config, name)[1] for name in ("num_attention_heads", "n_head")]
    for width, count in zip(widths, heads, strict=True):
        if isinstance(width, int | float) and isinstance(count, int | float) and count > 0:
            return float(width / count)
    return None


def has_own_code(config: FlatConfig) -> bool:
    """Whether the model's code comes with the config, so that it may read any key."""
    return any(key == "auto_map" or key.startswith("auto_map.") for key in config)


def attention_scale(stack: str, config: FlatConfig) -> Findings:
    """A softmax scale of 1/sqrt(head size) where the head size grows, which muP divides by."""
    size = head_dim(config)
    if stack == "nanogpt-mup":
        path, value = find_key(config, "mup_disable_attention_scaling")
        wrong = value is True and scales_hidden_lr(stack, config) and (size or 0) > USUAL_HEAD
    elif stack == "megatron":
        path, value = find_key(config, "mup_attn_scale_power")
        bases = [find_key(config, f"{name}_base_head_dim")[1] for name in ("mup", "scaling")]
        base = bases[0] or bases[1]
        grows = base != size if base and size else (size or 0) > USUAL_HEAD
        wrong = scales_hidden_lr(stack, config) and value == 0.5 and grows
    else:
        return []
    if not wrong:
        return []
    return [
        (
            path,
            "the softmax scale stays head_dim**-0.5, which is not muP if the head size grows",
            "let the scale be 1 / head_dim, or keep the proxy's head size",
        )
    ]


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
    size = head_dim(config)
    if stack not in DIVIDES or size == 1:
        return []
    value = float(config.get("attention_multiplier", 1.0))
    largest = 4 * size**-0.5 if size else 0.999
    if size and 0 < value < 0.25 / size:
        return [
            (
                "attention_multiplier",
                f"the softmax scale is {value:g}, below 1 / head_dim = {1 / size:g}, as if it were"
                " divided twice: attention is almost uniform",
                "set it to a value from 1 / head_dim to head_dim**-0.5",
            )
        ]
    if value != 1.0 and value <= largest:
        return []
    return [
        (
            "attention_multiplier",
            f"the softmax scale is {value} instead of about head_dim**-0.5, so attention logits"
            " are too large",
            "set it to (hidden_size / num_attention_heads)**-0.5",
        )
    ]


def init_std_default(stack: str, config: FlatConfig) -> Findings:
    """Multipliers without an init std that goes with them."""
    others = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    has_multiplier = any(key in config for key in others)
    if stack not in SHIFTED or "initializer_range" in config or not has_multiplier:
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
    names = CHECKED if stack in SHIFTED else MULTIPLIERS["minicpm3"]
    if stack not in SHIFTED and stack != "minicpm3":
        return []
    every = {key for keys in MULTIPLIERS.values() for key in keys} | {"initializer_range"}
    unknown = [key for key in config if key not in every]
    close = {key: difflib.get_close_matches(key, names, n=1, cutoff=0.85) for key in unknown}
    return [
        (
            key,
            f"transformers ignores the unknown key {key!r} without a message",
            f"write {near[0]!r}",
        )
        for key, near in close.items()
        if near
    ]


def unread_multiplier(stack: str, config: FlatConfig) -> Findings:
    """A multiplier in the config of a model type whose code does not read it."""
    if (stack not in READS and stack not in PLAIN) or has_own_code(config):
        return []
    every = dict.fromkeys(key for keys in MULTIPLIERS.values() for key in keys)
    size = head_dim(config)
    neutral = {"attention_multiplier": size**-0.5 if size else 1.0}
    return [
        (
            key,
            f"{stack} does not read {key}: transformers keeps the key and ignores it, so the model"
            " is not scaled by it",
            "set model_type to one that reads it, such as 'granite', or remove the key",
        )
        for key in every
        if key in config
        and key not in READS.get(stack, ())
        and isinstance(config[key], int | float)
        and not isinstance(config[key], bool)
        and abs(config[key] - 1) > 1e-9
        and abs(config[key] - neutral.get(key, 1.0)) > 1e-3
    ]


def logits_direction(stack: str, config: FlatConfig) -> Findings:
    """Logits that grow with width, where muP divides them by it.

    `logits_scaling` divides the logits in Granite and multiplies them in HyperCLOVA-X.
    """
    if stack in SHIFTED:
        embedding = float(config.get("embedding_multiplier", 1.0))
        scaling, divides = float(config.get("logits_scaling", 1.0)), stack in DIVIDES
        factor = 1 / scaling if divides else scaling
        if scaling <= 0 or factor <= 1.001 or embedding <= 1:
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
    return [
        (
            path,
            f"it multiplies the logits by {factor:g}, but muP divides them by the width ratio: the"
            " logits grow with width",
            f"set it to {1 / factor:g}",
        )
        for path, factor in _logit_factors(stack, config)
        if factor > 1.001
    ]


def _logit_factors(stack: str, config: FlatConfig) -> Iterator[tuple[str, float]]:
    """Keys that multiply the logits, where a value above 1 is no choice of a published model."""
    m = width_ratio(stack, config) or 1.0
    cohere = dict.fromkeys(("llm-foundry", *(k for k in READS if READS[k] == ("logit_scale",))))
    names = dict.fromkeys(cohere, "logit_scale") | {
        "falcon_h1": "lm_head_multiplier",
        "muse_glimmer_text": "output_multiplier",
        "megatron": "mup_output_mult" if m > 1.2 else "",
        "inkling_text": "logits_mup_width_multiplier",
    }
    if stack == "cerebras":  # alpha / m; an alpha of m**2 or more is the inverse
        path, value = find_key(config, "output_logits_scale")
        wrong = isinstance(value, int | float) and m >= 2 and value >= 0.95 * m
        yield from [(path, float(value))] if wrong else []
        return
    path, value = find_key(config, names.get(stack, ""))
    if isinstance(value, int | float) and value > 0:
        yield path, 1 / value if stack == "inkling_text" else float(value)


def width_cancelled(stack: str, config: FlatConfig) -> Findings:
    """A logits multiplier alpha / m whose alpha is m."""
    names = {"nanogpt-mup": "mup_output_alpha", "cerebras": "output_logits_alpha"}
    m, (path, alpha) = width_ratio(stack, config), find_key(config, names.get(stack, ""))
    standard = find_key(config, "mup_disable_hidden_lr_scaling")[1]  # SP in muP's code
    if not path or m is None or m < 1.2 or standard or abs(alpha / m - 1) > 0.01:
        return []
    return [
        (
            path,
            f"the logits are multiplied by {alpha:g} / m, and m is {m:g}: they do not shrink with"
            " width",
            "set it to the proxy's value",
        )
    ]


def base_above_width(stack: str, config: FlatConfig) -> Findings:
    """A base width that is above the width or is 1, so that the ratio has no meaning."""
    findings = []
    for base, width in (
        ("mup_base_hidden_size", "hidden_size"),
        ("scaling_base_hidden_size", "hidden_size"),
        ("mup_base_filter_size", "filter_size"),
        ("dim_model_base", "hidden_size"),
    ):
        (path, small), (_, large) = find_key(config, base), find_key(config, width)
        known = all(isinstance(value, int | float) for value in (small, large))
        reads = base != "dim_model_base" or stack in ("minicpm3", "minicpm")
        if known and reads and (small > large or small == 1 < large):
            findings.append(
                (
                    path,
                    f"the base width {small:g} must be the proxy's, at most {width} {large:g} and"
                    " above 1: the width ratio is wrong",
                    "set it to the proxy's width",
                )
            )
    names = {"nanogpt-mup": "mup_width_multiplier", "lm-engine": "m_width"}
    path, ratio = find_key(config, names.get(stack, ""))
    width = find_key(config, "n_embd" if stack == "nanogpt-mup" else "hidden_size")[1]
    if isinstance(ratio, int | float) and (ratio < 1 or ratio == width):
        findings.append(
            (
                path,
                f"it is width / base width, and {ratio:g} means a base width that is above the"
                " width or is 1",
                "set it to width / base width",
            )
        )
    path, inverse = find_key(config, "mup_width_scale")
    if stack in ("btlm", "jais") and isinstance(inverse, int | float) and inverse > 1:
        findings.append(
            (
                path,
                f"it is base width / width, so {inverse:g} multiplies the logits of a wider model",
                f"set it to {1 / inverse:g}",
            )
        )
    return findings


def growing_branches(stack: str, config: FlatConfig) -> Findings:
    """A residual factor that makes each branch larger, or grows with depth."""
    path, value = find_key(config, "residual_multiplier" if stack in SHIFTED else "")
    if stack == "nanogpt-mup" and find_key(config, "depth_alpha_enabled")[1]:
        path, value = find_key(config, "depth_alpha_exp")
        value = 1 - value if isinstance(value, int | float) else value
    if not isinstance(value, int | float) or value <= 1:
        return []
    return [
        (
            path,
            f"with {config[path]:g} residual branches are multiplied by more than 1, but depth"
            " rules shrink them as depth grows",
            "set it to 0.5 or 1" if path.endswith("exp") else f"set it to {1 / value:.3g}",
        )
    ]


RULES: tuple[Callable[[str, FlatConfig], Findings], ...] = (
    growing_branches,
    attention_scale,
    default_attention_multiplier,
    init_std_default,
    misspelt_key,
    unread_multiplier,
    logits_direction,
    width_cancelled,
    base_above_width,
)
