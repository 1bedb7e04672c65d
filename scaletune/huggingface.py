"""The `model` table of a recipe from a Hugging Face `config.json` on disk: the shape alone; no network, no `transformers`.

What the parametrization sets (init std, multipliers) is not read from it. Keys that no family of the zoo can be are refused.
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
class Kind:
    """How one `model_type` is read; a key that is absent has its transformers default."""

    names: Mapping[str, str]  # our name -> its key: these must be there
    ours: Mapping[str, Any]  # what every such model has in the zoo
    fixed: Mapping[str, tuple[Any, ...]]  # key -> the values that the zoo can be, the default first
    defaults: Mapping[str, Any]  # of keys that are read and may be absent


LLAMA_NAMES = {
    "width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads", "inner": "intermediate_size", "vocab": "vocab_size",
}  # fmt: skip
PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "sliding_window": (None,), "use_sliding_window": (False,), "partial_rotary_factor": (1.0, None),
    "router_jitter_noise": (0.0, None),
}  # fmt: skip
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
GPT2_NAMES = {"width": "n_embd", "depth": "n_layer", "heads": "n_head", "vocab": "vocab_size"}
GPT2_FIXED = {
    "activation_function": ("gelu_new", "gelu", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
}  # fmt: skip
GPT2_OURS = {"norm": "layer", "mlp": "gelu", "positions": "learned", "biases": True}
KINDS = {
    "llama": Kind(LLAMA_NAMES, {}, PLAIN, ROTARY | {"mlp_bias": False}),
    "mistral": Kind(LLAMA_NAMES, {}, PLAIN, ROTARY),
    "granite": Kind(LLAMA_NAMES, {}, PLAIN, ROTARY | {"mlp_bias": False}),
    "qwen3": Kind(LLAMA_NAMES, {"qk_norm": True}, {**PLAIN, "attention_bias": (False,)}, ROTARY | {"head_dim": 128}),
    "mixtral": Kind(
        LLAMA_NAMES, {"family": "moe"}, PLAIN,
        ROTARY | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": Kind(
        {**LLAMA_NAMES, "inner": "moe_intermediate_size"}, {"family": "moe", "qk_norm": True}, QWEN_MOE,
        ROTARY | {"num_experts": None, "num_local_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False},
    ),
    "gpt2": Kind(GPT2_NAMES, GPT2_OURS, GPT2_FIXED, {"n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}),
}  # fmt: skip
BESIDE = {  # a type we cannot be -> the nearest that we can, and why
    "qwen2": "its queries, keys and values have biases and no other layer has: nearest 'llama' or 'qwen3'",
    "gpt_neox": "its attention and MLP are parallel branches: nearest 'gpt2'",
    "gemma": "its norms' gains are one plus a weight and its MLP is GeGLU: nearest 'llama'",
    "falcon_h1": "its layers have a Mamba mixer: nearest 'llama'",
    "deepseek_v3": "its attention is multi-head latent: nearest 'mixtral'",
}
OTHERS = (  # neither shape nor function: silence is right
    "architectures", "model_type", "torch_dtype", "dtype", "use_cache", "transformers_version", "bos_token_id", "eos_token_id",
    "pad_token_id", "unk_token_id", "pretraining_tp", "max_position_embeddings", "_name_or_path", "return_dict", "output_attentions",
    "output_hidden_states", "max_window_layers", "layer_types", "task_specific_params", "n_ctx", "summary_type", "summary_use_proj",
    "summary_activation", "summary_proj_to_labels", "reorder_and_upcast_attn", "use_bfloat16", "chunk_size_feed_forward", "id2label",
    "label2id", "is_encoder_decoder", "problem_type", "output_router_logits", "summary_first_dropout", "bad_words_ids", "_attn_implementation",
)  # fmt: skip
MAY_BE_NULL = ("head_dim", "num_key_value_heads", "n_inner")
SET_ELSEWHERE = (
    "initializer_range", "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling", "router_aux_loss_coef",
)  # fmt: skip


def read(path: str | Path) -> tuple[dict[str, Any], int, list[str]]:
    """(`model` table, vocabulary, sentences on what was left out) of a config.json, or of the folder it lies in; UserError in one line."""
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
        return _mapped(config, str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _mapped(config: Config, path: str) -> tuple[dict[str, Any], int, list[str]]:
    kind = _kind(config)
    missing = next((key for key in kind.names.values() if config.get(key) is None), None)
    if missing:
        raise UserError(
            f"`{missing}` must be given, but the config has none{nearest(missing, config)}"
        )
    sizes = [*kind.names.values(), *(key for key in MAY_BE_NULL if config.get(key) is not None)]
    odd = next((key for key in sizes if type(config[key]) is not int or config[key] < 1), None)
    if odd:
        raise UserError(f"`{odd}` must be a whole number above 0, but got {config[odd]!r}")
    _refuse(config, kind)
    got = dict(kind.defaults) | dict(config)
    named = {name: config[key] for name, key in kind.names.items()}
    return (
        dict(kind.ours) | _shape(got, named) | _own(got),
        named["vocab"],
        _left_out(config, kind, path),
    )


def _kind(config: Config) -> Kind:
    told = config.get("model_type")
    if told in BESIDE:
        raise UserError(f"`model_type` {told!r} is none of our models: {BESIDE[told]}")
    if told not in KINDS:
        raise UserError(
            f"`model_type` must be one of {', '.join(KINDS)}, but got {told!r}{nearest(str(told), KINDS)}"
        )
    return KINDS[told]


def _refuse(config: Config, kind: Kind) -> None:
    """UserError on the first value that no model of the zoo has."""
    for key, values in kind.fixed.items():
        if config.get(key, values[0]) not in values:
            off = (
                key == "sliding_window" and config.get("use_sliding_window") is False
            )  # a Qwen keeps its size and does not use it
            if not off:
                raise UserError(
                    f"our models have `{key}` {values[0]!r}, but got {config[key]!r}: set it so, or train another model"
                )
    if config.get("attention_bias", False) != config.get(
        "mlp_bias", config.get("attention_bias", False)
    ) or (config.get("attention_bias") and "mlp_bias" not in config):
        mlp = config.get("mlp_bias", False)
        raise UserError(
            f"our models have biases everywhere or nowhere, but got attention_bias={config['attention_bias']}, mlp_bias={mlp}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rotary positions must be told by a table, but got {rope!r}")
    if (stretched := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise UserError(
            f"our models have plain rotary positions, but got rope_type={stretched!r}: pretrain with 'default'"
        )


def _shape(got: Config, named: Mapping[str, Any]) -> dict[str, Any]:
    """Width, depth, heads and MLP by our names."""
    width, heads = named["width"], named["heads"]
    head_dim = got.get("head_dim") or width // heads
    if head_dim * heads != width:
        raise UserError(
            f"`heads * head_dim == hidden_size` must hold in our models, but got {heads} * {head_dim} and {width}: "
            f"nearest head_dim={width / heads:g}"
        )
    inner = named.get("inner") or got.get("n_inner") or 4 * width
    kv = got.get("num_key_value_heads") or heads
    shape = {
        "width": width,
        "depth": named["depth"],
        "head_dim": head_dim,
        "ffn_ratio": inner / width,
    }
    return shape | {"kv_heads": None if kv == heads else kv, "tied": got["tie_word_embeddings"]}


def _own(got: Config) -> dict[str, Any]:
    """What one type has and another has not."""
    if got["model_type"] == "gpt2":
        return {"max_positions": got["n_positions"], "norm_eps": got["layer_norm_epsilon"]}
    rope = got.get("rope_parameters") or {}
    found = {
        "norm_eps": got["rms_norm_eps"],
        "rope_theta": float(rope["rope_theta"] if "rope_theta" in rope else got["rope_theta"]),
    }
    if got["model_type"] in ("mixtral", "qwen3_moe"):
        experts = (
            got.get("num_experts") or got["num_local_experts"]
        )  # a Qwen's on the Hub, and as transformers 5 writes it
        return found | {
            "n_experts": experts,
            "top_k": got["num_experts_per_tok"],
            "norm_top_k": got.get("norm_topk_prob", True),
        }
    return found | {"biases": bool(got["attention_bias"])}


def _left_out(config: Config, kind: Kind, path: str) -> list[str]:
    """A sentence for what the config says and our model does not take from it."""
    said = [f"the architecture is that of {path} ({config['model_type']})"]
    drops = [
        key
        for key in config
        if ("dropout" in key or key.endswith("_pdrop")) and not key.startswith("summary")
    ]
    said += [
        f"`{key}` {config[key]} is left out: our models have no dropout"
        for key in drops
        if config[key]
    ]
    elsewhere = [key for key in SET_ELSEWHERE if key in config]
    said += (
        [f"not read, as the parametrization says them: {', '.join(elsewhere)}"] if elsewhere else []
    )
    said += (
        ["its GELU is the tanh approximation, ours the exact one"]
        if config.get("activation_function", "") in ("gelu_new",)
        else []
    )
    known = {*OTHERS, *drops, *SET_ELSEWHERE, *kind.names.values(), *kind.fixed, *kind.defaults}
    known |= {
        "head_dim",
        "n_inner",
        "num_key_value_heads",
        "rope_parameters",
        "rope_scaling",
        "mlp_bias",
        "n_shared_experts",
        "intermediate_size",
    }
    unknown = sorted(set(config) - known)
    return said + (
        [f"not read, as no model of ours has it: {', '.join(unknown)}"] if unknown else []
    )
