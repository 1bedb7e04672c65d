"""Known mistakes in one stack's own keys; the rules have the form of those in `config_rules`."""

from __future__ import annotations

import re
from collections.abc import Callable

from scaletune.linting.config_rules import Findings, FlatConfig, find_key

WITHOUT_MUP = ("litgpt", "levanter", "lingua", "open-lm")
"""Stacks without any muP key, and with one lr for all tensors."""

HAVE_MUP_KEYS = ("afmoe", "inkling_text", "inkling", "btlm", "jais", "phi3small")
"""Model types of Hugging Face whose code reads a muP key."""

MINICPM3 = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
"""Defaults in transformers 5.23.0: the values of MiniCPM3-4B."""


def no_mup_key(stack: str, config: FlatConfig) -> Findings:
    """A key that looks like muP but that nothing reads.

    transformers (5.23.0) keeps unknown keys and has no `mup` key of its own.
    """
    of_model = "model_type" in config and config["model_type"] not in HAVE_MUP_KEYS
    if stack not in WITHOUT_MUP and not of_model:
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
    if stack != "litgpt" or not scaled:
        return []
    return [
        (
            scaled[0],
            "the model is scaled, but litgpt writes one lr into every param group at each step, so"
            " the lr is not",
            "train the model in your own training loop",
        )
    ]


def floor_above_peak(stack: str, config: FlatConfig) -> Findings:
    """An absolute minimum lr that is above the transferred peak lr.

    litgpt's and nanoGPT's default is 6e-5.
    """
    if stack not in ("litgpt", "nanogpt-mup"):
        return []
    peaks = (find_key(config, name)[1] for name in ("learning_rate", "lr"))
    peak = next((value for value in peaks if value), None)
    minimum = find_key(config, "min_lr")[1]
    minimum = 6e-5 if minimum is None else minimum
    decays = find_key({"decay_lr": True} | dict(config), "decay_lr")[1]
    if not isinstance(peak, int | float) or minimum < peak or not decays:
        return []
    return [
        (
            "min_lr",
            f"lr decays to {minimum:g}, which is not below its peak {peak:g}: the lr rises at the"
            " end",
            "set it to a fraction of the peak",
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
    muon = stack == "levanter" and find_key(config, "type")[1] == "muon"
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


RULES: tuple[Callable[[str, FlatConfig], Findings], ...] = (
    no_mup_key,
    one_lr_written,
    floor_above_peak,
    left_at_the_librarys,
    embeddings_alone,
    readout_not_scaled,
    init_not_mup,
)
