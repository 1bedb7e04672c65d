"""Builds a model of transformers from a config.json, at another width: `model.build = "hf:..."`.

The head size stays, so the number of heads grows; the inner width of the MLP keeps its ratio. The
number of key-value heads stays where it is smaller than the number of heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from scaletune.errors import UserError, nearest
from scaletune.models.own.arguments import model_keys, own_config
from scaletune.recipe import Recipe
from scaletune.zoo import HF_PREFIX

WIDTHS = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "encoder_attention_heads")
KV_HEADS = ("num_key_value_heads",)
INNER = ("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size", "d_ff")
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
POSITIONS = ("max_position_embeddings", "n_positions")
OTHER_WIDTHS = ("shared_expert_intermediate_size", "embedding_size", "word_embed_proj_dim")
"""Further sizes that grow with the width."""


def read_config(recipe: Recipe, folders: Sequence[str]) -> dict[str, Any]:
    """The config.json that `model.build` names, relative to one of the folders."""
    name = own_config(recipe).build.removeprefix(HF_PREFIX)
    paths = [Path(folder) / name for folder in folders]
    paths = [path / "config.json" if path.is_dir() else path for path in paths]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(
            "`model.build` must name a config.json or its folder on disk, but there is no"
            f" `{name}` in {' or '.join(folders)}"
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"`{path}` must be JSON as Hugging Face writes it, but {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"`{path}` must hold an object with `model_type`")
    return config


def _first(config: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of the names that the config has a value for."""
    return next((name for name in names if config.get(name) is not None), None)


def resized_config(
    config: Mapping[str, Any], recipe: Recipe, vocab_size: int, text: bool
) -> dict[str, Any]:
    """The config at the recipe's width and depth, for its data.

    Raises:
        UserError: A size is missing, or would not be whole.
    """
    width_name = _first(config, WIDTHS)
    if width_name is None:
        raise UserError(f"an `hf:` config must have one of {', '.join(WIDTHS)}, but has none")
    width, old = recipe.model.width, config[width_name]
    new: dict[str, Any] = {**config, width_name: width, "use_cache": False}
    for name in (*INNER, *OTHER_WIDTHS):
        if isinstance(config.get(name), int):
            new[name] = _grown(name, config[name], width, old)
    if heads_name := _first(config, HEADS):
        new |= _heads(config, heads_name, width, old)
    if (depth_name := _first(config, DEPTHS)) and "depth" in recipe.model.model_fields_set:
        new[depth_name] = recipe.model.depth
        new.pop("layer_types", None)
    if text:
        new["vocab_size"] = vocab_size
        new |= {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        for name in POSITIONS:
            if isinstance(config.get(name), int) and config[name] < recipe.data.seq_len:
                raise UserError(
                    f"`data.seq_len <= {name}` of the config must hold, but got"
                    f" {recipe.data.seq_len} and {config[name]}"
                )
    else:
        new |= {"num_labels": vocab_size}
        new.pop("id2label", None)
        new.pop("label2id", None)
    return new | _own_keys(config, recipe)


def _grown(name: str, size: int, width: int, old: int) -> int:
    if size * width % old:
        raise UserError(
            f"`{name} * width / hidden_size` must be whole, but got {size} * {width} / {old}"
        )
    return size * width // old


def _heads(config: Mapping[str, Any], name: str, width: int, old: int) -> dict[str, Any]:
    """As many heads of the config's head size as the width has."""
    heads = _grown(name, config[name], width, old)
    kv_name = _first(config, KV_HEADS)
    if kv_name is None or config[kv_name] == config[name]:
        return {name: heads} | ({kv_name: heads} if kv_name else {})
    if heads % config[kv_name]:
        raise UserError(
            f"`{name} % {kv_name} == 0` must hold at every width, but got {heads} and"
            f" {config[kv_name]} at width {width}"
        )
    return {name: heads}


def _own_keys(config: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Further keys of `[model]` and those of `[my]`, which replace keys of the config."""
    keys = {k: v for k, v in model_keys(recipe).items() if k not in ("width", "depth")}
    keys |= {} if recipe.foreign else dict(recipe.my)
    known = set(config) | set(_class_defaults(config["model_type"]))
    for name in keys:
        if name not in known:
            raise UserError(
                f"a config of model_type {config['model_type']!r} has no key"
                f" `{name}`{nearest(name, known)}, so it would change nothing"
            )
    return keys


def _class_defaults(model_type: str) -> dict[str, Any]:
    """Every key that a config of this type can have, with its default."""
    transformers = _transformers()
    try:
        return transformers.AutoConfig.for_model(model_type).to_dict()
    except (ValueError, KeyError):
        known = list(transformers.CONFIG_MAPPING.keys())
        raise UserError(
            f"`model_type` must be one that the installed transformers knows, but got"
            f" {model_type!r}{nearest(model_type, known)}"
        ) from None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "`model.build` with `hf:` needs transformers: pip install transformers"
        ) from None
    return transformers


def build_hf(config: Mapping[str, Any], text: bool) -> nn.Module:
    """A new model of the config: the class of `architectures`, else the usual one for the data."""
    transformers = _transformers()
    content = {key: value for key, value in config.items() if key != "model_type"}
    parsed = transformers.AutoConfig.for_model(config["model_type"], **content)
    name = next(iter(config.get("architectures") or []), "")
    kind = getattr(transformers, name, None)
    suffix = "ForCausalLM" if text else "ForImageClassification"
    if kind is not None and (name.endswith((suffix, "LMHeadModel")) or not text):
        return kind._from_config(parsed)
    auto = (
        transformers.AutoModelForCausalLM if text else transformers.AutoModelForImageClassification
    )
    return auto.from_config(parsed)


def config_depth(config: Mapping[str, Any]) -> int:
    """The number of layers of the config."""
    name = _first(config, DEPTHS)
    return int(config[name]) if name else 1
