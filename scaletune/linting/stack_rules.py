"""Known faults that one stack's own keys have: `faults` continued, a rule each in the same form."""

from __future__ import annotations

import re
from collections.abc import Callable

from scaletune.linting.config_rules import Flat, Found, leaf

WITHOUT_MUP = (
    "litgpt",
    "levanter",
    "lingua",
    "open-lm",
)  # no key of theirs, and one lr for all tensors
HAVE_MUP_KEYS = (
    "afmoe",
    "inkling_text",
    "inkling",
    "btlm",
    "jais",
    "phi3small",
)  # model types of Hugging Face whose code reads one
MINICPM3 = {
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
}  # transformers 5.23.0: those of MiniCPM3-4B


def no_mup_key(stack: str, config: Flat) -> Found:
    """A key that looks like muP where nothing reads it: transformers keeps unknown keys, and has no `mup` of its own (5.23.0)."""
    if stack not in WITHOUT_MUP and (
        "model_type" not in config or config["model_type"] in HAVE_MUP_KEYS
    ):
        return []
    keys = [
        key
        for key, value in config.items()
        if re.search(r"(^|_)u?mup(_|$)", key.rsplit(".", 1)[-1]) and value not in (None, False)
    ]
    return [(key, f"{stack} has no muP: nothing reads this key, and all tensors share one lr", "emit 'pytorch' or 'granite' groups") for key in keys]  # fmt: skip


def one_lr_written(stack: str, config: Flat) -> Found:
    """litgpt 0.5.13: the pretraining loop writes one computed lr into every group, whatever its optimizer was made with."""
    scaled = [
        path
        for path, value in (
            leaf(config, "scale_embeddings"),
            leaf(config, "attention_scores_scalar"),
        )
        if value
    ]
    if stack != "litgpt" or not scaled:
        return []
    return [
        (
            scaled[0],
            "the model is scaled, but litgpt writes one lr into every param group at each step",
            "train it in a loop of your own",
        )
    ]


def floor_above_peak(stack: str, config: Flat) -> Found:
    """An absolute floor (litgpt and nanoGPT: 6e-5 unless set) that a transferred lr has gone below."""
    if stack not in ("litgpt", "nanogpt-mup"):
        return []
    peak = next((v for _, v in (leaf(config, "learning_rate"), leaf(config, "lr")) if v), None)
    floor = 6e-5 if leaf(config, "min_lr")[1] is None else leaf(config, "min_lr")[1]
    if (
        not isinstance(peak, int | float)
        or floor < peak
        or not leaf({"decay_lr": True} | dict(config), "decay_lr")[1]
    ):
        return []
    return [
        (
            "min_lr",
            f"lr decays to {floor:g}, which is not below its peak {peak:g}",
            "set it as a share of the peak",
        )
    ]


def left_at_the_librarys(stack: str, config: Flat) -> Found:
    """Multipliers, or a second lr, that the library has a model's own values for."""
    if stack == "minicpm3" and config.keys() & MINICPM3.keys():
        return [(key, f"it is left at MiniCPM3-4B's {value:g}, which goes with that model's width", "set all three") for key, value in MINICPM3.items() if key not in config]  # fmt: skip
    if (
        stack == "levanter"
        and leaf(config, "type")[1] == "muon"
        and leaf(config, "adam_lr")[1] is None
    ):
        return [
            (
                "optimizer.adam_lr",
                "Muon's lr is set and AdamW's, of embeddings and gains, is left at the library's 6e-4",
                "set both",
            )
        ]
    return []


def embeddings_alone(stack: str, config: Flat) -> Found:
    """AFMoE's `mup_enabled` multiplies the embeddings by sqrt(hidden_size), and that is all of it (transformers 5.23.0)."""
    if stack != "afmoe" or not config.get("mup_enabled"):
        return []
    return [("mup_enabled", "it multiplies the embeddings by sqrt(hidden_size) and leaves logits, init and lr as they are", "give param groups for lr")]  # fmt: skip


def readout_not_scaled(stack: str, config: Flat) -> Found:
    """Cerebras: logits times sqrt(base / width) where 1/m is meant."""
    path, value = leaf(config, "scale_output_logits_by_d")
    if stack != "cerebras" or value is not False:
        return []
    return [
        (
            path,
            "logits are scaled by sqrt(base / width), where muP means base / width",
            "set it to true",
        )
    ]


def init_not_mup(stack: str, config: Flat) -> Found:
    """lm-engine's groups divide the lr of matrices whose init must shrink with width too."""
    path, value = leaf(config, "init_method")
    if (
        stack != "lm-engine"
        or leaf(config, "params_group_method")[1] != "mup"
        or value in ("mup", "fan_in")
    ):
        return []
    return [
        (
            path or "init_method",
            "hidden lr is divided by m_width, but the init std does not shrink with width",
            "set it to 'mup'",
        )
    ]


RULES: tuple[Callable[[str, Flat], Found], ...] = (
    no_mup_key, one_lr_written, floor_above_peak, left_at_the_librarys, embeddings_alone, readout_not_scaled, init_not_mup,
)  # fmt: skip
