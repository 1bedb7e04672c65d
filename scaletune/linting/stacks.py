"""Recognizes the training stack that a config is for, and files that scaletune itself wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from scaletune.linting.constants import CLASS
from scaletune.linting.values import GROUP_KEYS, flatten

SIGNS: dict[str, tuple[str, ...]] = {
    "gpt-neox": (
        "mup_init_scale",
        "mup_rp_embedding_mult",
        "base_shapes_file",
        "save_base_shapes",
        "mup_width_scale+pipe_parallel_size",
        "pipe_parallel_size",
        "model_parallel_size",
    ),
    "cerebras": (
        "mup_base_filter_size",
        "scale_qk_dot_by_d",
        "scale_output_logits_by_d",
        "output_logits_alpha",
        "lr_adjustment_groups",
        "adjust_learning_rate",
        "backend_type+trainer",
        "runconfig+train_input",
    ),
    "litgpt": (
        "attention_scores_scalar",
        "scale_embeddings",
        "lr_warmup_steps+micro_batch_size+devices",
        "lr_warmup_steps+max_tokens",
        "lr_warmup_steps+model_config+n_embd",
        "lr_warmup_steps+class_path",
        "lr_warmup_steps+model_name",
        "initial_checkpoint_dir",
    ),
    "nanotron": ("learning_rate_scheduler+optimizer", "init_method+model_config"),
    "levanter": (
        "min_lr_ratio",
        "adamc_weight_decay",
        "adam_lr",
        "use_kimi_scaling",
        "num_train_steps+trainer+mp",
        "num_train_steps+trainer+model",
    ),
    "lingua": ("lr_min_ratio",),
    "open-lm": ("lr_cooldown_end", "dataset_manifest"),
    "nanogpt-mup": (
        "mup_enabled",
        "mup_width_multiplier",
        "mup_disable_hidden_lr_scaling",
        "mup_disable_attention_scaling",
    ),
    "lm-engine": ("m_width", "m_emb", "params_group_method", "tuning_method", "optimizer_args"),
    "megatron": (
        "mup_base_hidden_size",
        "mup_embedding_mult",
        "mup_output_mult",
        "use_mup",
        "scaling_base_hidden_size",
        "decoupled_lr",
        "tensor_model_parallel_size",
        "transformer_impl",
        "micro_batch_size+num_attention_heads+lr",
    ),
    "deepspeed": ("zero_optimization", "train_micro_batch_size_per_gpu", "warmup_max_lr"),
    "torchtitan": ("hf_assets_path", "min_lr_factor", "job+training+model", "flavor+optimizer"),
    "olmo-core": ("group_overrides", "rank_microbatch_size", "feed_forward_residual_alpha"),
    "llm-foundry": ("max_duration", "param_str_match", "init_div_is_residual", "alpha_f"),
    "fairseq2": ("regime", "gang", "fairseq2"),
    "axolotl": ("base_model",),
    "llama-factory": ("finetuning_type", "dataset_dir+model_name_or_path"),
    "torchtune": ("_component_",),
    "nanogpt": ("n_embd+n_layer", "block_size+max_iters"),
    "hf-trainer": ("per_device_train_batch_size", "gradient_accumulation_steps+learning_rate"),
    "accelerate": ("distributed_type", "fsdp_config+mixed_precision"),
}
"""Stack -> keys that identify its configs, at any depth; `a+b` needs both."""

CLASSES = {
    "torchtitan": ("JobConfig", "Trainer.Config", "ParamGroupConfig", "OptimizersContainer.Config"),
    "olmo-core": ("OptimGroupOverride", "AdamWConfig", "SkipStepAdamWConfig", "TransformerConfig"),
    "megatron": ("GPTModelProvider", "OptimizerConfig", "ConfigContainer"),
}
"""Stack -> classes of its Python configs, and of `_CLASS_` in its JSON."""

MULTIPLIERS = {
    "granite": (
        "embedding_multiplier",
        "attention_multiplier",
        "residual_multiplier",
        "logits_scaling",
    ),
    "minicpm3": ("scale_emb", "scale_depth", "dim_model_base"),
    "cohere": ("logit_scale",),
    "mpt": ("logit_scale",),
    "falcon_h1": ("embedding_multiplier", "lm_head_multiplier", "key_multiplier"),
    "inkling_text": ("logits_mup_width_multiplier",),
    "muse_glimmer_text": ("output_multiplier",),
}
"""Model type -> multipliers that its code reads (transformers 5.23.0, complete for these keys)."""

GRANITES = (
    "granite",
    "granite_docling_text",
    "granite_swa",
    "granite4_vision_text",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
)
READS = (
    MULTIPLIERS
    | dict.fromkeys((*GRANITES, "hyperclovax"), MULTIPLIERS["granite"])
    | dict.fromkeys(("cohere2", "cohere2_moe", "cohere_compass_text"), MULTIPLIERS["cohere"])
    | {"muse_spark_text": MULTIPLIERS["muse_glimmer_text"]}
)
_PLAIN = (
    "afmoe apertus arcee bloom codegen dbrx deepseek_v2 deepseek_v3 ernie4_5 exaone4 falcon"
    " falcon_mamba gemma gemma2 gemma3 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo"
    " gpt_neox gpt_oss gptj helium jamba llama llama4 llama4_text mamba mamba2 minimax ministral"
    " mistral mixtral nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe"
    " qwen3 qwen3_moe qwen3_next seed_oss smollm3 stablelm starcoder2"
)
PLAIN = frozenset(_PLAIN.split())
"""Model types whose code reads none of these multipliers."""

REMOTE = ("btlm", "jais", "phi3small", "minicpm", "inkling")
"""Model types outside transformers, whose own code reads multipliers."""

REST = "_rest"
"""Marks the optimizer's own settings, which tensors without a group get."""
GROUP_CLASSES = ("ParamGroupConfig", "OptimGroupOverride")
"""Classes that torchtitan and OLMo-core build param groups from."""


def knows_model_type(model_type: str) -> bool:
    """Whether lint knows which multipliers the model type reads."""
    return model_type in READS or model_type in PLAIN or model_type in REMOTE


def walk(content: Any) -> Iterator[Mapping[str, Any]]:
    """Every mapping in nested content, from the outside in."""
    if isinstance(content, Mapping):
        yield content
    below: Iterable[Any] = content.values() if isinstance(content, Mapping) else content
    if isinstance(below, str) or not isinstance(content, Mapping | list):
        return
    for value in below:
        yield from walk(value)


def find_groups(content: Any) -> list[dict[str, Any]]:
    """Param groups with names, or [].

    Either the content is a list of groups, or they stand under a key of param_groups.json,
    torchtitan, LLM-Foundry, fairseq2 or OLMo-core, or they are built by a group's class.
    """
    if isinstance(content, list):
        return [_merge(group) for group in content if isinstance(group, dict)]
    for owner in walk(content):
        of_class = [
            value
            for value in owner.values()
            if isinstance(value, list)
            and any(
                isinstance(each, Mapping)
                and str(each.get(CLASS, "")).rsplit(".", 1)[-1] in GROUP_CLASSES
                for each in value
            )
        ]
        lists = [owner[key] for key in GROUP_KEYS if owner.get(key)] + of_class
        groups = next((each for each in lists if _are_groups(each)), None)
        if groups:
            return _complete_groups(groups, owner, content)
    return []


def _merge(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with the settings that its stack nests."""
    own = {key: value for key, value in group.items() if key != CLASS}
    for key in ("opts", "optimizer_kwargs", "params_group_kwargs"):
        own |= group.get(key, {})
    kinds = [each.get("class_name", "") for each in group.get("module_matches", ())]
    return own | ({"patterns": [*group.get("patterns", ()), *kinds]} if kinds else {})


def _are_groups(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        return isinstance(value, int | float) and not isinstance(value, bool)  # `lint` refuses it
    keys = {"lr", "weight_decay", "eps", "opts", "optimizer_kwargs", "init_std", "optimizer_name"}
    return any(keys & each.keys() for each in value)


def _complete_groups(
    groups: Any, owner: Mapping[str, Any], content: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The groups with the optimizer's own settings as defaults, and a group for all other names."""
    optimizer = content.get("optimizer")
    optimizer = optimizer if isinstance(optimizer, Mapping) else {}
    keys = ("lr", "weight_decay", "eps")
    default = {key: optimizer[key] for key in keys if key in optimizer}
    default |= {key: owner[key] for key in keys if isinstance(owner.get(key), int | float)}
    each = [_merge(group) for group in groups]
    rest = [default | {"patterns": [".*"], REST: True}] if each and "lr" in default else []
    return [default | group for group in each] + rest


def model_type_of(content: Mapping[str, Any]) -> str:
    """The `model_type` of a Hugging Face config.json, or that of its `architectures`, or ""."""
    value = content.get("model_type")
    if isinstance(value, str):
        return value if re.fullmatch(r"[a-z0-9_.\-]+", value) else ""
    architectures = content.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    name = str(first).lower().removesuffix("forcausallm").removesuffix("lmheadmodel")
    types = (*READS, *PLAIN, *REMOTE)
    return next((each for each in types if name and each.replace("_", "") == name), "")


def detect_stack(content: Any) -> str:
    """The stack that a config is for, by its keys; "unknown" if none is known."""
    if isinstance(content, list):
        return "param groups"
    classes = {str(each.get(CLASS) or each.get("_CLASS_") or "") for each in walk(content)}
    ends = tuple(f".{name}" for name in classes) + tuple(classes)
    for stack, names in CLASSES.items():
        if any(end == name or end.endswith(f".{name}") for end in ends for name in names):
            return stack
    groups = find_groups(content)
    if content.get("schema") == "scaletune.param_groups/1":
        return "param groups"
    if model_type := model_type_of(content):
        return model_type
    model = content.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("init_method"), Mapping):
        return "nanotron"
    parts = {part for each in walk(content) for part in each}
    parts |= {part for key in flatten(content) for part in key.split(".")}
    for stack, signs in SIGNS.items():
        if any(set(sign.split("+")) <= parts for sign in signs):
            return stack
    return "param groups" if groups else "unknown"


def own_file(path: Path, content: Any) -> str:
    """A sentence on what a file of scaletune is and which command is for it, or ""."""
    if not isinstance(content, Mapping):
        return ""
    if {"law", "params", "solution"} <= content.keys():
        return f"is a fit: use `scaletune predict --fit {path}` or `scaletune transfer {path}`"
    if {"id", "recipe", "status"} <= content.keys() or {"id", "setting"} <= content.keys():
        return f"is a record of trials: use `scaletune fit {path}`"
    if str(content.get("schema", "")).startswith("scaletune.answer"):
        return "is the answer of a transfer: lint the configs beside it"
    if str(content.get("schema", "")).startswith("scaletune.plan"):
        return "is the plan of every tensor of a recipe: use `scaletune check` on the recipe"
    return ""
