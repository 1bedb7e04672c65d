"""`lint`: reads a config, an argument list or param groups that someone already has, and names the known faults in it."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from scaletune.errors import UserError
from scaletune.linting import config_rules, group_rules, stack_rules

SIGNS = {  # stack -> keys of which any one, as the last part of a dotted key, gives it away
    "gpt-neox": (
        "mup_init_scale", "mup_rp_embedding_mult", "base_shapes_file", "save_base_shapes", "mup_width_scale", "pipe_parallel_size",
        "model_parallel_size",
    ),
    "cerebras": (
        "mup_base_filter_size", "scale_qk_dot_by_d", "scale_output_logits_by_d", "output_logits_alpha", "lr_adjustment_groups",
        "adjust_learning_rate",
    ),
    "litgpt": ("attention_scores_scalar", "scale_embeddings", "lr_warmup_steps", "initial_checkpoint_dir"),
    "levanter": ("min_lr_ratio", "adamc_weight_decay", "adam_lr", "use_kimi_scaling"),
    "lingua": ("lr_min_ratio",),
    "open-lm": ("lr_cooldown_end", "dataset_manifest"),
    "megatron": ("mup_base_hidden_size", "mup_embedding_mult", "mup_output_mult", "use_mup", "decoupled_lr"),
    "nanogpt-mup": ("mup_enabled", "mup_width_multiplier"),
    "lm-engine": ("m_width", "m_emb", "params_group_method"),
    "deepspeed": ("zero_optimization", "train_micro_batch_size_per_gpu", "warmup_max_lr"),
}  # fmt: skip


def _parsed(path: Path) -> Any:
    """Plain values of a .json, .yaml, .toml or .py file (assignments of literals), or of a list of `--key value` arguments."""
    try:
        text = path.read_text()
        if path.suffix == ".json":
            return json.loads(text)
        if path.suffix in (".yaml", ".yml"):
            return yaml.safe_load(text)
        if path.suffix == ".toml":
            return tomllib.loads(text)
        return _assigned(text) if path.suffix == ".py" else _arguments(text)
    except (RecursionError, SyntaxError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"a config must be readable as {path.suffix or 'arguments'}, but `{path}`: {str(error).splitlines()[0]}"
        ) from None


def _assigned(text: str) -> dict[str, Any]:
    """Top-level `name = literal` of a Python file, which is read and never run, and the groups that torchtitan and OLMo-core build in it."""
    found: dict[str, Any] = {}
    module = ast.parse(text)
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    built = [
        group for node in ast.walk(module) if isinstance(node, ast.Call) and (group := _group(node))
    ]
    return found | ({"param_groups": built} if built else {})


def _group(call: ast.Call) -> dict[str, Any] | None:
    """The literal keywords of a group's config class."""
    if getattr(call.func, "id", getattr(call.func, "attr", "")) not in (
        "ParamGroupConfig",
        "OptimGroupOverride",
    ):
        return None
    try:
        return {
            keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg
        }
    except ValueError:
        return None


def _arguments(text: str) -> dict[str, Any]:
    """`--key value`, `--key=value` and bare `--key` of a shell script or an argument file."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    found: dict[str, Any] = {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            value = value or ("true" if after.startswith("--") else after)
            found[key.replace("-", "_")] = (
                yaml.safe_load(value) if not re.fullmatch(r"[\d.]+e-?\d+", value) else float(value)
            )
    return found


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys; a list is a value."""
    if not isinstance(content, Mapping):
        return {prefix.rstrip("."): content}
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping) and value
            else {f"{prefix}{key}": value}
        )
    return found


def groups_in(content: Any) -> list[dict[str, Any]]:
    """Param groups by name: a list of them, or what our own file, torchtitan, LLM-Foundry, fairseq2 and OLMo-core keep them under."""
    if isinstance(content, list):
        return [group for group in content if isinstance(group, dict)]
    optimizer = content.get("optimizer") if isinstance(content.get("optimizer"), dict) else {}
    given: Any = next(
        (
            at[key]
            for at in (content, optimizer)
            for key in ("groups", "param_groups", "group_overrides")
            if at.get(key)
        ),
        [],
    )
    rest = {key: optimizer[key] for key in ("lr", "weight_decay", "eps") if key in optimizer}
    each = [group | group.get("opts", {}) | group.get("optimizer_kwargs", {}) for group in given]
    return [rest | group for group in each] + (
        [rest | {"patterns": [".*"]}] if each and "lr" in rest else []
    )


def stack_of(content: Any) -> str:
    """Whose config this is, by the keys that give it away; "unknown" is checked by the rules that need no stack."""
    if groups_in(content):
        return "param groups"
    if content.get("model_type"):
        return str(content["model_type"])
    keys = flat(content)
    if isinstance(content.get("model"), Mapping) and isinstance(
        content["model"].get("init_method"), Mapping
    ):
        return "nanotron"
    parts = {part.replace("-", "_") for key in keys for part in key.split(".")}
    return next((stack for stack, signs in SIGNS.items() if parts & set(signs)), "unknown")


def _multipliers(config: Mapping[str, Any]) -> dict[str, float]:
    """The embedding's and the logits' multiplier of the config.json that groups go with, or that stand beside the groups."""
    if "multipliers" in config:
        return {name: float(config["multipliers"][name]) for name in ("embedding", "logits")}
    scaling = float(config.get("logits_scaling", 1.0))
    logits = scaling if config.get("model_type") == "hyperclovax" else 1 / scaling
    return {"embedding": float(config.get("embedding_multiplier", 1.0)), "logits": logits}


def _of_groups(content: Any, beside: Path) -> list[dict[str, str]]:
    """Findings of param groups, with the multipliers of the config.json in their folder."""
    groups = groups_in(content)
    config = (
        json.loads(beside.read_text())
        if beside.exists()
        else content
        if isinstance(content, Mapping)
        else {}
    )
    optimizer = (
        {} if isinstance(content, list) else flat({"optimizer": content.get("optimizer") or {}})
    )
    decay = max((float(group.get("weight_decay") or 0) for group in groups), default=0.0)
    found = _said(
        [config_rules.coupled_l2], "param groups", optimizer | {"groups.weight_decay": decay}
    )
    kind = str(
        optimizer.get("optimizer.class") or optimizer.get("optimizer.name") or "adam"
    ).lower()
    known = (
        group_rules.found_in(groups, _multipliers(config)) if "adam" in kind else None
    )  # the ratios of lr are AdamW's
    return found + [
        _one(rule.__name__, each)
        for rule in (group_rules.RULES if known else ())
        for each in rule(known)  # type: ignore[arg-type]
    ]


def _one(rule: str, found: tuple[str, str, str]) -> dict[str, str]:
    return {"rule": rule, **dict(zip(("at", "says", "fix"), found, strict=True))}


def _said(rules: Any, stack: str, config: Mapping[str, Any]) -> list[dict[str, str]]:
    return [_one(rule.__name__, each) for rule in rules for each in rule(stack, config)]


ODD = (
    AttributeError,
    KeyError,
    OverflowError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)  # what a value of another kind than its key's raises


def lint(path: str | Path) -> dict[str, Any]:
    """{"path", "stack", "findings": [{"rule", "at", "says", "fix"}]} of a file, or of a folder's config.json and param_groups.json."""
    path = Path(path)
    if path.is_dir():
        each = [
            lint(path / name)
            for name in ("config.json", "param_groups.json")
            if (path / name).exists()
        ]
        if not each:
            raise UserError(
                f"a folder to lint must have a config.json or a param_groups.json, but `{path}` has neither"
            )
        return {
            "path": str(path),
            "stack": each[0]["stack"],
            "findings": [found for one in each for found in one["findings"]],
        }
    if not path.exists():
        raise UserError(f"the file to lint must exist, but got `{path}`")
    content = _parsed(path)
    if not isinstance(content, Mapping | list):
        raise UserError(
            f"a config must hold keys or a list of groups, but `{path}` holds {type(content).__name__}"
        )
    try:
        return _found(path, content)
    except ODD as error:
        raise UserError(
            f"values of a config must be of the kinds that their keys take, but in `{path}`: {error}"
        ) from None


def _found(path: Path, content: Any) -> dict[str, Any]:
    if isinstance(content, list) and not groups_in(content):
        raise UserError(f"a list to lint must be one of param groups, but `{path}` holds none")
    stack = stack_of(content)
    if stack == "param groups":
        return {
            "path": str(path),
            "stack": stack,
            "findings": _of_groups(content, path.with_name("config.json")),
        }
    config = {key.replace("-", "_"): value for key, value in flat(content).items()}
    return {
        "path": str(path),
        "stack": stack,
        "findings": _said((*config_rules.RULES, *stack_rules.RULES), stack, config),
    }
