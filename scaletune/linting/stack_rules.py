"""Known mistakes in one stack's own keys; the rules have the form of those in `config_rules`."""

from __future__ import annotations

import re
from collections.abc import Callable

from scaletune.linting.config_rules import (
    Findings,
    FlatConfig,
    find_key,
    find_path,
    has_mup,
    width_ratio,
)
from scaletune.linting.multiplier_rules import has_own_code
from scaletune.linting.stacks import REMOTE, knows_model_type

WITHOUT_MUP = ("litgpt", "levanter", "lingua", "open-lm")
"""Stacks without any muP key, and with one lr for all tensors."""

HAVE_MUP_KEYS = ("afmoe", "inkling_text", *REMOTE)
"""Model types of Hugging Face whose code reads a muP key."""

LARGE_FOR_ADAM = 0.01
"""An lr at which a comparison with Muon's makes sense; AdamW's is smaller in all public runs."""

NO_BASE = (
    "without it the base width is the model's own: lr, init std and logits are not scaled, and only"
    " the softmax scale changes"
)
MINICPM3 = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
"""Defaults in transformers 5.23.0: the values of MiniCPM3-4B."""


def no_mup_key(stack: str, config: FlatConfig) -> Findings:
    """A key that looks like muP but that nothing reads.

    transformers (5.23.0) keeps unknown keys and has no `mup` key of its own.
    """
    of_model = knows_model_type(stack) and stack not in HAVE_MUP_KEYS
    if (stack not in WITHOUT_MUP and not of_model) or has_own_code(config):
        return []
    keys = [
        key
        for key, value in config.items()
        if re.search(r"(^|_)u?mup(_|$)", key.rsplit(".", 1)[-1]) and value not in (None, False)
    ]
    message = f"{stack} has no muP: nothing reads this key, and all tensors share one lr"
    return [(key, message, "use the groups of format 'pytorch' or 'granite'") for key in keys]


def one_lr_written(stack: str, config: FlatConfig) -> Findings:
    """litgpt 0.5.13 writes one computed lr into all groups at each step of pretraining."""
    keys = (find_key(config, name) for name in ("scale_embeddings", "attention_scores_scalar"))
    scaled = [path for path, value in keys if value]
    path, kind = find_key(config, "class_path")
    scaled += [path] if re.search(r"(^|\.)Mu(AdamW?|SGD)$", str(kind)) else []
    if stack != "litgpt" or not scaled:
        return []
    return [
        (
            scaled[0],
            "it scales the model or its lr by width, but litgpt writes one lr into every param"
            " group at each step, so all tensors have the same lr",
            "train the model in your own training loop",
        )
    ]


def left_at_the_librarys(stack: str, config: FlatConfig) -> Findings:
    """Multipliers, or a second lr, that keep the library's default."""
    if stack == "minicpm3" and config.keys() & MINICPM3.keys():
        return [
            (
                key,
                f"it keeps the value {value:g} of MiniCPM3-4B, which is right for that model's"
                " width only",
                "set all three: scale_emb, scale_depth, dim_model_base",
            )
            for key, value in MINICPM3.items()
            if key not in config
        ]
    muon = stack == "levanter" and find_path(config, "optimizer.type") == "muon"
    if muon and find_key(config, "adam_lr")[1] is None:
        return [
            (
                "optimizer.adam_lr",
                "Muon's lr is set, but AdamW's lr for embeddings and gains keeps levanter's default"
                " 6e-4",
                "set both",
            )
        ]
    return []


def muon_lr_on_embeddings(stack: str, config: FlatConfig) -> Findings:
    """levanter's `adam_lr`, for embeddings and gains, equal to Muon's much larger lr."""
    rates = [find_key(config, name)[1] for name in ("adam_lr", "lr")]
    rates[1] = rates[1] or find_key(config, "learning_rate")[1]
    muon = stack == "levanter" and find_path(config, "optimizer.type") == "muon"
    if not muon or rates[0] != rates[1] or not rates[0] or rates[0] < LARGE_FOR_ADAM:
        return []
    return [
        (
            "optimizer.adam_lr",
            f"embeddings and gains are trained by AdamW with Muon's lr {rates[0]:g}, which is made"
            " for orthogonalized updates",
            "set it to the lr of an AdamW run, often about 10 times smaller",
        )
    ]


def embeddings_alone(stack: str, config: FlatConfig) -> Findings:
    """AFMoE's `mup_enabled` only multiplies the embeddings (transformers 5.23.0)."""
    if stack != "afmoe" or not config.get("mup_enabled"):
        return []
    return [
        (
            "mup_enabled",
            "it only multiplies the embeddings by sqrt(hidden_size); logits, init and lr do not"
            " scale with width",
            "use param groups with an lr per tensor",
        )
    ]


def readout_not_scaled(stack: str, config: FlatConfig) -> Findings:
    """Cerebras multiplies logits by sqrt(base / width) if `scale_output_logits_by_d` is false."""
    path, value = find_key(config, "scale_output_logits_by_d")
    if stack != "cerebras" or value is not False:
        return []
    return [
        (
            path,
            "logits are multiplied by sqrt(base / width), but muP needs base / width",
            "set it to true",
        )
    ]


def hidden_lr_not_scaled(stack: str, config: FlatConfig) -> Findings:
    """Cerebras' configs without base widths state 1/m for the logits and for the hidden lr."""
    scale = find_key(config, "output_logits_scale")[1]
    factors = [key for key in config if ".adjust_learning_rate." in f".{key}"]
    based = find_key(config, "mup_base_hidden_size")[1] or any("lr_adjust" in k for k in config)
    of_hidden = next((config[key] for key in factors if key.endswith("decoder_kernel")), None)
    by_mup = bool(find_key(config, "scale_qk_dot_by_d")[1]) and isinstance(scale, int | float)
    wrong = of_hidden > 1 if isinstance(of_hidden, int | float) else not factors
    if stack != "cerebras" or based or not by_mup or scale >= 0.5 or not wrong:
        return []
    has = "no factor" if of_hidden is None else f"the factor {of_hidden:g}, which grows with width"
    return [
        (
            "adjust_learning_rate.decoder_kernel",
            f"the logits are multiplied by {scale:.3g}, as in muP at a larger width, but the hidden"
            f" lr has {has}",
            "set it to base width / width",
        )
    ]


def init_std_not_scaled(stack: str, config: FlatConfig) -> Findings:
    """Cerebras' hidden matrices with the embedding's init std at another width."""
    hidden, embedding = (find_path(config, f"{n}initializer.std") for n in ("", "embedding_"))
    m = width_ratio(stack, config) or 1.0
    numbers = all(isinstance(value, int | float) and value > 0 for value in (hidden, embedding))
    if stack != "cerebras" or m < 1.5 or not numbers or abs(hidden / embedding - 1) > 0.01:
        return []
    return [
        (
            "initializer.std",
            f"hidden matrices have the embedding's init std {hidden:g} at {m:.3g} times the base"
            " width, but it must shrink with width",
            f"set it to {hidden / m**0.5:.4g}",
        )
    ]


def init_not_mup(stack: str, config: FlatConfig) -> Findings:
    """lm-engine divides the lr of matrices by m_width, so their init must shrink with width too."""
    path, value = find_key(config, "init_method")
    by_mup = find_key(config, "params_group_method")[1] == "mup"
    if stack != "lm-engine" or not by_mup or value in ("mup", "fan_in"):
        return []
    return [
        (
            path or "init_method",
            "the hidden lr is divided by m_width, but the init std does not shrink with width",
            "set it to 'mup'",
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


def half_of_a_base(stack: str, config: FlatConfig) -> Findings:
    """Cerebras needs both base sizes; Megatron takes the model's own width if there is none."""
    if stack == "megatron" and has_mup(stack, config):
        names = ("mup_base_hidden_size", "scaling_base_hidden_size", "mup_multiplier")  # forks
        base = any(find_key(config, name)[1] for name in names)
        return [] if base else [("mup_base_hidden_size", NO_BASE, "set it to the proxy's width")]
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


def decay_on_gains(stack: str, config: FlatConfig) -> Findings:
    """Megatron's option that decays the gains of the query and key norms."""
    names = ("apply_wd_to_qk_layernorm", "no_weight_decay_cond_type")
    path, value = next((pair for pair in (find_key(config, n) for n in names) if pair[1]), ("", ""))
    if stack != "megatron" or not value or not has_mup(stack, config):
        return []
    return [
        (
            path,
            "it decays the gains of the query and key norms, but muP's plan decays matrices only",
            "remove it",
        )
    ]


RULES: tuple[Callable[[str, FlatConfig], Findings], ...] = (
    no_mup_key,
    one_lr_written,
    left_at_the_librarys,
    muon_lr_on_embeddings,
    embeddings_alone,
    readout_not_scaled,
    hidden_lr_not_scaled,
    init_std_not_scaled,
    init_not_mup,
    square_not_scaled,
    half_of_a_base,
    depth_scaled_twice,
    decay_on_gains,
)
