"""Reads the `model` table of a recipe from a Hugging Face `config.json` on disk.

It reads only the architecture, without network and without `transformers`. Init std and multipliers
come from the parametrization. A key value that no family of the zoo supports is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletune.errors import UserError, nearest

Config = Mapping[str, Any]


@dataclass(frozen=True)
class ConfigMapping:
    """How one `model_type` is read. An absent key has its default in transformers."""

    names: Mapping[str, str]
    """Our name -> key of the config. These keys are required."""
    constants: Mapping[str, Any]
    """Recipe keys that all models of this type share."""
    fixed: Mapping[str, tuple[Any, ...]]
    """Key -> the values that the zoo supports, the default first."""
    defaults: Mapping[str, Any]
    """Keys that are read and may be absent -> their default."""


LLAMA_NAMES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "vocab": "vocab_size",
}
PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0, None),
    "router_jitter_noise": (0.0, None),
}
ROTARY = {
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
QWEN_MOE: dict[str, tuple[Any, ...]] = {
    **PLAIN,
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "attention_bias": (False,),
}
MIXTRAL_DEFAULTS = {
    **ROTARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN_MOE_DEFAULTS = {
    **ROTARY,
    "num_experts": None,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}
GPT2_NAMES = {"width": "n_embd", "depth": "n_layer", "heads": "n_head", "vocab": "vocab_size"}
GPT2_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
GPT2_CONSTANTS = {"norm": "layer", "mlp": "gelu", "positions": "learned", "biases": True}
GPT2_DEFAULTS = {"n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
MAPPINGS = {
    "llama": ConfigMapping(LLAMA_NAMES, {}, PLAIN, ROTARY | {"mlp_bias": False}),
    "mistral": ConfigMapping(LLAMA_NAMES, {}, PLAIN, ROTARY),
    "granite": ConfigMapping(LLAMA_NAMES, {}, PLAIN, ROTARY | {"mlp_bias": False}),
    "qwen3": ConfigMapping(
        LLAMA_NAMES,
        {"qk_norm": True},
        {**PLAIN, "attention_bias": (False,)},
        ROTARY | {"head_dim": 128},
    ),
    "mixtral": ConfigMapping(LLAMA_NAMES, {"family": "moe"}, PLAIN, MIXTRAL_DEFAULTS),
    "qwen3_moe": ConfigMapping(
        {**LLAMA_NAMES, "inner": "moe_intermediate_size"},
        {"family": "moe", "qk_norm": True},
        QWEN_MOE,
        QWEN_MOE_DEFAULTS,
    ),
    "gpt2": ConfigMapping(GPT2_NAMES, GPT2_CONSTANTS, GPT2_FIXED, GPT2_DEFAULTS),
}
UNSUPPORTED = {  # model type -> why the zoo has no such model, and the nearest type
    "qwen2": "its queries, keys and values have biases and no other layer has: nearest 'llama' or"
    " 'qwen3'",
    "gpt_neox": "its attention and MLP are parallel branches: nearest 'gpt2'",
    "gemma": "its norm gains are one plus a weight and its MLP is GeGLU: nearest 'llama'",
    "falcon_h1": "its layers have a Mamba mixer: nearest 'llama'",
    "deepseek_v3": "its attention is multi-head latent: nearest 'mixtral'",
}
IGNORED = (  # keys that change neither shape nor function
    *("architectures", "model_type", "torch_dtype", "dtype", "use_cache", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp"),
    *("max_position_embeddings", "_name_or_path", "return_dict", "output_attentions"),
    *("output_hidden_states", "max_window_layers", "layer_types", "task_specific_params", "n_ctx"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
    *("reorder_and_upcast_attn", "use_bfloat16", "chunk_size_feed_forward", "id2label"),
    *("label2id", "is_encoder_decoder", "problem_type", "output_router_logits"),
    *("summary_first_dropout", "bad_words_ids", "_attn_implementation"),
)
OPTIONAL = (  # keys that are read where they are present
    *("head_dim", "n_inner", "num_key_value_heads", "rope_parameters", "rope_scaling"),
    *("mlp_bias", "n_shared_experts", "intermediate_size"),
)
MAY_BE_NULL = ("head_dim", "num_key_value_heads", "n_inner")
SET_ELSEWHERE = (
    *("initializer_range", "embedding_multiplier", "attention_multiplier"),
    *("residual_multiplier", "logits_scaling", "router_aux_loss_coef"),
)


def read(path: str | Path) -> tuple[dict[str, Any], int, list[str]]:
    """Reads a config.json, or the one in a folder.

    Returns:
        The `model` table, the vocabulary size, and sentences on what was left out.

    Raises:
        UserError: The file is missing or is not JSON, or the zoo has no such model.
    """
    path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError:
        raise UserError(
            f"`model.hf` must name a config.json or its folder on disk, but got `{path}`"
        ) from None
    except ValueError as error:
        raise UserError(
            f"`model.hf` must be JSON as Hugging Face writes it, but `{path}`: {error}"
        ) from None
    if not isinstance(config, dict):
        raise UserError(
            f"`model.hf` must hold one object, but `{path}` holds a {type(config).__name__}"
        )
    try:
        return _map_config(config, str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _map_config(config: Config, path: str) -> tuple[dict[str, Any], int, list[str]]:
    mapping = _mapping(config)
    missing = next((key for key in mapping.names.values() if config.get(key) is None), None)
    if missing:
        raise UserError(
            f"`{missing}` must be given, but the config has none{nearest(missing, config)}"
        )
    sizes = [*mapping.names.values(), *(key for key in MAY_BE_NULL if config.get(key) is not None)]
    wrong = next((key for key in sizes if type(config[key]) is not int or config[key] < 1), None)
    if wrong:
        raise UserError(f"`{wrong}` must be a whole number above 0, but got {config[wrong]!r}")
    _refuse_unsupported(config, mapping)
    values = dict(mapping.defaults) | dict(config)
    named = {name: config[key] for name, key in mapping.names.items()}
    table = dict(mapping.constants) | _shape(values, named) | _settings_of_type(values)
    return table, named["vocab"], _left_out(config, mapping, path)


def _mapping(config: Config) -> ConfigMapping:
    kind = config.get("model_type")
    if kind in UNSUPPORTED:
        raise UserError(f"the zoo has no model of `model_type` {kind!r}: {UNSUPPORTED[kind]}")
    if kind not in MAPPINGS:
        raise UserError(
            f"`model_type` must be one of {', '.join(MAPPINGS)}, but got"
            f" {kind!r}{nearest(str(kind), MAPPINGS)}"
        )
    return MAPPINGS[kind]


def _refuse_unsupported(config: Config, mapping: ConfigMapping) -> None:
    """UserError on the first value that no model of the zoo supports."""
    for key, values in mapping.fixed.items():
        # Qwen configs keep the size of a window that they do not use
        unused = key == "sliding_window" and config.get("use_sliding_window") is False
        if config.get(key, values[0]) not in values and not unused:
            raise UserError(
                f"`{key}` must be {values[0]!r} in the models of the zoo, but got {config[key]!r}:"
                " change the config, or train another model"
            )
    attention = config.get("attention_bias", False)
    if attention != config.get("mlp_bias", attention) or (attention and "mlp_bias" not in config):
        raise UserError(
            "models of the zoo have biases everywhere or nowhere, but got"
            f" attention_bias={config['attention_bias']}, mlp_bias={config.get('mlp_bias', False)}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"`rope_parameters` must be a table, but got {rope!r}")
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise UserError(
            f"models of the zoo have plain rotary positions, but got rope_type={kind!r}: pretrain"
            " with 'default'"
        )


def _shape(config: Config, named: Mapping[str, Any]) -> dict[str, Any]:
    """Width, depth, heads and MLP as recipe keys."""
    width, heads = named["width"], named["heads"]
    head_dim = config.get("head_dim") or width // heads
    if head_dim * heads != width:
        raise UserError(
            "`heads * head_dim == hidden_size` must hold in models of the zoo, but got"
            f" {heads} * {head_dim} and {width}: nearest head_dim={width / heads:g}"
        )
    inner = named.get("inner") or config.get("n_inner") or 4 * width
    kv = config.get("num_key_value_heads") or heads
    return {
        "width": width,
        "depth": named["depth"],
        "head_dim": head_dim,
        "ffn_ratio": inner / width,
        "kv_heads": None if kv == heads else kv,
        "tied": config["tie_word_embeddings"],
    }


def _settings_of_type(config: Config) -> dict[str, Any]:
    """Recipe keys that only some model types have."""
    if config["model_type"] == "gpt2":
        return {"max_positions": config["n_positions"], "norm_eps": config["layer_norm_epsilon"]}
    rope = config.get("rope_parameters") or {}
    settings = {
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": float(rope["rope_theta"] if "rope_theta" in rope else config["rope_theta"]),
    }
    if config["model_type"] in ("mixtral", "qwen3_moe"):
        return settings | {
            # the key of Qwen configs on the Hub, else the key of transformers 5
            "n_experts": config.get("num_experts") or config["num_local_experts"],
            "top_k": config["num_experts_per_tok"],
            "norm_top_k": config.get("norm_topk_prob", True),
        }
    return settings | {"biases": bool(config["attention_bias"])}


def _left_out(config: Config, mapping: ConfigMapping, path: str) -> list[str]:
    """A sentence for each part of the config that the model does not use."""
    notes = [f"the architecture is that of {path} ({config['model_type']})"]
    dropout = [
        key
        for key in config
        if ("dropout" in key or key.endswith("_pdrop")) and not key.startswith("summary")
    ]
    notes += [
        f"`{key}` {config[key]} is not used: models of the zoo have no dropout"
        for key in dropout
        if config[key]
    ]
    elsewhere = [key for key in SET_ELSEWHERE if key in config]
    if elsewhere:
        notes.append(f"not read, because the parametrization sets them: {', '.join(elsewhere)}")
    if config.get("activation_function", "") == "gelu_new":
        notes.append("the config's GELU is the tanh approximation; the zoo has the exact GELU")
    known = {*IGNORED, *OPTIONAL, *dropout, *SET_ELSEWHERE}
    known |= {*mapping.names.values(), *mapping.fixed, *mapping.defaults}
    if unknown := sorted(set(config) - known):
        notes.append(f"not read, because no model of the zoo has it: {', '.join(unknown)}")
    return notes
