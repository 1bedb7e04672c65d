"""Reads a config, an argument list or param groups, and reports known muP mistakes in it."""

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

SIGNS = {
    "gpt-neox": (
        "mup_init_scale",
        "mup_rp_embedding_mult",
        "base_shapes_file",
        "save_base_shapes",
        "mup_width_scale",
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
    ),
    "litgpt": (
        "attention_scores_scalar",
        "scale_embeddings",
        "lr_warmup_steps",
        "initial_checkpoint_dir",
    ),
    "levanter": ("min_lr_ratio", "adamc_weight_decay", "adam_lr", "use_kimi_scaling"),
    "lingua": ("lr_min_ratio",),
    "open-lm": ("lr_cooldown_end", "dataset_manifest"),
    "megatron": (
        "mup_base_hidden_size",
        "mup_embedding_mult",
        "mup_output_mult",
        "use_mup",
        "decoupled_lr",
    ),
    "nanogpt-mup": ("mup_enabled", "mup_width_multiplier"),
    "lm-engine": ("m_width", "m_emb", "params_group_method"),
    "deepspeed": ("zero_optimization", "train_micro_batch_size_per_gpu", "warmup_max_lr"),
}
"""Stack -> keys that identify its configs; one of them is enough, at any depth."""

GROUP_CLASSES = ("ParamGroupConfig", "OptimGroupOverride")
"""Classes that torchtitan and OLMo-core build param groups from."""


def _parse(path: Path) -> Any:
    """Plain values of a .json, .yaml, .toml or .py file; other files are argument lists."""
    try:
        text = path.read_text()
        if path.suffix == ".json":
            return json.loads(text)
        if path.suffix in (".yaml", ".yml"):
            return yaml.safe_load(text)
        if path.suffix == ".toml":
            return tomllib.loads(text)
        return _python_values(text) if path.suffix == ".py" else _arguments(text)
    except (RecursionError, SyntaxError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"a config must be readable as {path.suffix or 'arguments'}, but `{path}`: {reason}"
        ) from None


def _python_values(text: str) -> dict[str, Any]:
    """Top-level `name = literal` of a Python file, and the param groups that it builds.

    The file is parsed and never executed.
    """
    values: dict[str, Any] = {}
    module = ast.parse(text)
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    calls = (node for node in ast.walk(module) if isinstance(node, ast.Call))
    groups = [group for call in calls if (group := _group(call))]
    return values | ({"param_groups": groups} if groups else {})


def _group(call: ast.Call) -> dict[str, Any] | None:
    """The literal keyword arguments of a call of a group's class."""
    if getattr(call.func, "id", getattr(call.func, "attr", "")) not in GROUP_CLASSES:
        return None
    try:
        return {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    except ValueError:
        return None


def _arguments(text: str) -> dict[str, Any]:
    """`--key value`, `--key=value` and bare `--key` of a shell script or an argument file."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    values: dict[str, Any] = {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            value = value or ("true" if after.startswith("--") else after)
            exponent = re.fullmatch(r"[\d.]+e-?\d+", value)  # YAML reads 1e-3 as a string
            values[key.replace("-", "_")] = float(value) if exponent else yaml.safe_load(value)
    return values


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; a list is a value."""
    if not isinstance(content, Mapping):
        return {prefix.rstrip("."): content}
    values: dict[str, Any] = {}
    for key, value in content.items():
        nested = isinstance(value, Mapping) and value
        values |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return values


def find_groups(content: Any) -> list[dict[str, Any]]:
    """Param groups with names, or [].

    Either the content is a list of groups, or they stand under a key of param_groups.json,
    torchtitan, LLM-Foundry, fairseq2 or OLMo-core.
    """
    if isinstance(content, list):
        return [group for group in content if isinstance(group, dict)]
    optimizer = content.get("optimizer") if isinstance(content.get("optimizer"), dict) else {}
    keys = ("groups", "param_groups", "group_overrides")
    groups: Any = next((at[key] for at in (content, optimizer) for key in keys if at.get(key)), [])
    default = {key: optimizer[key] for key in ("lr", "weight_decay", "eps") if key in optimizer}
    each = [group | group.get("opts", {}) | group.get("optimizer_kwargs", {}) for group in groups]
    rest = [default | {"patterns": [".*"]}] if each and "lr" in default else []
    return [default | group for group in each] + rest


def detect_stack(content: Any) -> str:
    """The stack that a config is for, by its keys; "unknown" if none is known."""
    if find_groups(content):
        return "param groups"
    if content.get("model_type"):
        return str(content["model_type"])
    model = content.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("init_method"), Mapping):
        return "nanotron"
    parts = {part.replace("-", "_") for key in flatten(content) for part in key.split(".")}
    return next((stack for stack, signs in SIGNS.items() if parts & set(signs)), "unknown")


def _multipliers(config: Mapping[str, Any]) -> dict[str, float]:
    """The embedding and logits multipliers of a config.json, or those beside the groups."""
    if "multipliers" in config:
        return {name: float(config["multipliers"][name]) for name in ("embedding", "logits")}
    scaling = float(config.get("logits_scaling", 1.0))
    logits = scaling if config.get("model_type") == "hyperclovax" else 1 / scaling
    return {"embedding": float(config.get("embedding_multiplier", 1.0)), "logits": logits}


def _check_groups(content: Any, config_path: Path) -> list[dict[str, str]]:
    """Findings in param groups, with the multipliers of the config.json in their folder."""
    groups = find_groups(content)
    table = content if isinstance(content, Mapping) else {}
    config = json.loads(config_path.read_text()) if config_path.exists() else table
    optimizer = flatten({"optimizer": table.get("optimizer") or {}}) if table else {}
    decay = max((float(group.get("weight_decay") or 0) for group in groups), default=0.0)
    values = optimizer | {"groups.weight_decay": decay}
    findings = _apply([config_rules.coupled_l2], "param groups", values)
    kind = optimizer.get("optimizer.class") or optimizer.get("optimizer.name") or "adam"
    if "adam" not in str(kind).lower():  # the lr ratios of the rules are AdamW's
        return findings
    roles = group_rules.assign_roles(groups, _multipliers(config))
    rules = group_rules.RULES if roles else ()
    return findings + [
        _finding(rule.__name__, finding)
        for rule in rules
        for finding in rule(roles)  # type: ignore[arg-type]
    ]


def _finding(rule: str, finding: tuple[str, str, str]) -> dict[str, str]:
    return {"rule": rule, **dict(zip(("at", "says", "fix"), finding, strict=True))}


def _apply(rules: Any, stack: str, config: Mapping[str, Any]) -> list[dict[str, str]]:
    return [_finding(rule.__name__, finding) for rule in rules for finding in rule(stack, config)]


WRONG_TYPE = (
    AttributeError,
    KeyError,
    OverflowError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)
"""What a value of an unexpected type raises."""


def lint(path: str | Path) -> dict[str, Any]:
    """Checks a config for known muP mistakes, for example a readout that is divided twice.

    Args:
        path: A config file (JSON, YAML, TOML, a Python file with literals, or an argument list),
            param
            groups as JSON, or a folder with a config.json or a param_groups.json.

    Returns:
        `path`, `stack` (the detected training stack) and `findings`. Each finding has `rule`, `at`
        (the key), `says` (what is wrong and why it matters) and `fix` (what to write instead).

    Raises:
        UserError: The file does not exist, cannot be read, or has values of an unexpected type.

    Example:
        >>> import json, tempfile
        >>> import scaletune as st
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "config.json"
        ...     size = path.write_text(json.dumps({"model_type": "llama", "use_mup": True}))
        ...     report = st.lint(path)
        >>> report["stack"], [finding["rule"] for finding in report["findings"]]
        ('llama', ['no_mup_key'])
        >>> report["findings"][0]["says"]
        'llama has no muP: nothing reads this key, and all tensors share one lr'
    """
    path = Path(path)
    if path.is_dir():
        return _lint_folder(path)
    if not path.exists():
        raise UserError(f"the file to lint must exist, but got `{path}`")
    content = _parse(path)
    if not isinstance(content, Mapping | list):
        raise UserError(
            f"a config must hold keys or a list of groups, but `{path}` holds"
            f" {type(content).__name__}"
        )
    try:
        return _lint_content(path, content)
    except WRONG_TYPE as error:
        raise UserError(
            f"config values must have the type that their keys expect, but in `{path}`: {error}"
        ) from None


def _lint_folder(path: Path) -> dict[str, Any]:
    files = [path / name for name in ("config.json", "param_groups.json")]
    reports = [lint(file) for file in files if file.exists()]
    if not reports:
        raise UserError(
            "a folder to lint must have a config.json or a param_groups.json,"
            f" but `{path}` has neither"
        )
    findings = [finding for report in reports for finding in report["findings"]]
    return {"path": str(path), "stack": reports[0]["stack"], "findings": findings}


def _lint_content(path: Path, content: Any) -> dict[str, Any]:
    if isinstance(content, list) and not find_groups(content):
        raise UserError(f"a list to lint must contain param groups, but `{path}` contains none")
    stack = detect_stack(content)
    if stack == "param groups":
        findings = _check_groups(content, path.with_name("config.json"))
    else:
        config = {key.replace("-", "_"): value for key, value in flatten(content).items()}
        findings = _apply((*config_rules.RULES, *stack_rules.RULES), stack, config)
    return {"path": str(path), "stack": stack, "findings": findings}
