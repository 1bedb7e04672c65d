"""Reads a config, an argument list or param groups, and reports known muP mistakes in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.linting import (
    config_rules,
    group_list_rules,
    group_rules,
    multiplier_rules,
    schedule_rules,
    stack_rules,
)
from scaletune.linting.constants import CLASS
from scaletune.linting.readers import read
from scaletune.linting.stacks import (
    PLAIN,
    READS,
    detect_stack,
    find_groups,
    knows_model_type,
    own_file,
    walk,
)
from scaletune.linting.values import ANY, GROUP_KEYS, Source, flatten, read_numbers

RULES: tuple[Callable[[str, Mapping[str, Any]], config_rules.Findings], ...] = (
    *config_rules.RULES,
    *multiplier_rules.RULES,
    *schedule_rules.RULES,
    *stack_rules.RULES,
)
NESTED = ("text_config", "llm_config", "language_config")
"""Keys under which a config.json of several modalities has that of its language model."""
NO_MULTIPLIERS = ("torchtitan", "olmo-core", "fairseq2")
"""Stacks with param groups whose models have no logits multiplier."""
UNDERSTOOD = frozenset({*PLAIN, *multiplier_rules.SHIFTED})
"""Model types all of whose multipliers `_multipliers` reads."""
TYPES = frozenset({*PLAIN, *READS})
HEAD_IN_MEGATRON = (
    "the version of Megatron: Megatron-Core 0.19.2 keeps the base lr for an untied head, but the"
    " first commits with --use-mup also divide it by m; --decoupled-lr with the base lr is right in"
    " both"
)
OF_FORKS = {"mup_base_hidden_size": "mup_multiplier"}
"""Key -> the one that stands for it in forks of Megatron."""
NO_LR = "the lr of the param groups, which they do not state: only names and decay were checked"
UNKNOWN_STACK = (
    "keys of a training stack (stack not recognised: few rules apply): checked were the lowest lr"
    " and the warmup of the schedule, coupled L2 regularization, and param groups"
)
RECIPE = (
    "the file, which is a recipe of scaletune and not a training config: `scaletune count` shows"
    " its points, and `scaletune check` tests its parametrization"
)
RUNS = (".jsonl", ".db", ".csv", ".parquet", ".wandb")
WRONG_TYPE = (
    AttributeError,
    KeyError,
    OverflowError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)
"""What a value of an unexpected type raises."""


def _finding(rule: str, finding: tuple[str, str, str], prefix: str = "") -> dict[str, str]:
    where, says, fix = finding
    return {"rule": rule, "at": prefix + where, "says": says, "fix": fix}


def _multipliers(config: Mapping[str, Any]) -> dict[str, float]:
    """The embedding and logits multipliers of a config.json, or those beside the groups."""
    if "multipliers" in config:
        return {name: float(config["multipliers"][name]) for name in ("embedding", "logits")}
    scaling = float(config.get("logits_scaling") or 1.0)
    logits = scaling if config.get("model_type") == "hyperclovax" else 1 / scaling
    for scale in (config_rules.find_key(flatten(config), name)[1] for name in ("logit_scale",)):
        logits = float(scale) if isinstance(scale, int | float) else logits
    embedding = config.get("embedding_multiplier")
    embedding = config_rules.find_key(flatten(config), "embed_scale")[1] or embedding or 1.0
    return {"embedding": float(embedding), "logits": logits}


def _with_init(groups: list[dict[str, Any]], stack: str, content: Any) -> list[dict[str, Any]]:
    """The groups with the init std that OLMo-core and LLM-Foundry set in the model's config."""
    flat = flatten(content) if isinstance(content, Mapping) else {}
    hidden = config_rules.find_key(flat, "init_std")[1]
    of_embedding = ("embedding_init_std", "emb_init_std")
    embedding = next((v for n in of_embedding if (v := config_rules.find_key(flat, n)[1])), hidden)
    own = any(config_rules.find_key(flat, name)[1] for name in of_embedding)
    if not isinstance(hidden, int | float) or not (own or stack == "olmo-core"):
        return groups
    roles = {"emb": embedding, "hid": hidden}
    return [
        {"init_std": roles.get(group_list_rules.role_of(str(name)) or "")} | group
        for group in groups
        for name in group_rules.names_of(group)[:1]
    ]


def _is_head(name: Any) -> bool:
    return group_list_rules.role_of(str(name)) == "out"


def _check_groups(content: Any, stack: str, config_path: Path) -> Iterator[dict[str, str]]:
    """Findings in param groups, with the multipliers of the config.json in their folder."""
    groups = _with_init(find_groups(content), stack, content)
    table = content if isinstance(content, Mapping) else {}
    beside = read_numbers(json.loads(config_path.read_text())) if config_path.exists() else None
    config = beside if isinstance(beside, Mapping) else table
    flat = flatten(config)
    for list_rule in group_list_rules.RULES:
        yield from (_finding(list_rule.__name__, each) for each in list_rule(groups, flat))
    if group_list_rules.is_tied(flat):
        names = group_rules.names_of
        groups = [each for each in groups if not any(_is_head(name) for name in names(each))]
    optimizer = flatten({"optimizer": table.get("optimizer") or {}})
    kind = optimizer.get("optimizer.class") or optimizer.get("optimizer.name") or "adam"
    if "adam" not in str(kind).lower() or any("muon" in str(each).lower() for each in groups):
        return  # the lr ratios of the rules are AdamW's
    model_type = config.get("model_type")
    complete = stack in NO_MULTIPLIERS or "multipliers" in table or model_type in UNDERSTOOD
    decays_alone = str(kind).lower().startswith("decoupled_")  # LLM-Foundry's optimizers
    roles = group_rules.assign_roles(groups, _multipliers(config), complete, decays_alone)
    for rule in group_rules.RULES if roles else ():
        yield from (_finding(rule.__name__, each) for each in rule(roles))  # type: ignore[arg-type]


def _check(path: Path, content: Any, prefix: str = "") -> tuple[str, list[dict[str, str]]]:
    """The stack and the findings of one config."""
    stack, groups = detect_stack(content), find_groups(content)
    findings: list[dict[str, str]] = []
    if isinstance(content, Mapping):
        values = flatten(content)
        decays = (float(group.get("weight_decay") or 0) for group in groups)
        values |= {"groups.weight_decay": max(decays)} if groups else {}
        findings = [
            _finding(rule.__name__, each, prefix) for rule in RULES for each in rule(stack, values)
        ]
    if groups:
        for finding in _check_groups(content, stack, path.with_name("config.json")):
            repeated = any(finding["rule"] == each["rule"] for each in findings)
            findings += [] if repeated and finding["rule"] == "decay_on_gains" else [finding]
    return stack, findings


def _configs(content: Any) -> Iterator[tuple[str, Any]]:
    """(prefix of its keys, config) of each config in a file."""
    if not isinstance(content, Mapping):
        yield "", content
    elif isinstance(content.get("configs"), Mapping):
        yield from ((f"{name}: ", config) for name, config in content["configs"].items())
    else:
        inner = next((key for key in NESTED if isinstance(content.get(key), Mapping)), None)
        yield from [(f"{inner}.", content[inner])] if inner else [("", content)]
        yield from _models(content)


def _models(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The configs of transformers' models that a Python file builds, such as `LlamaConfig(...)`."""
    for each in walk(content):
        name = str(each.get(CLASS, "")).rsplit(".", 1)[-1]
        model_type = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.removesuffix("Config")).lower()
        types = [kind for kind in (model_type, model_type.replace("_", "")) if kind in TYPES]
        if name.endswith("Config") and types:
            yield f"{name}.", {**each, "model_type": types[0]}


def _has_untied_mup_head(config: Mapping[str, Any]) -> bool:
    find, untied = config_rules.find_key, "untie_embeddings_and_output_weights"
    scaled = config_rules.width_ratio("megatron", config) not in (None, 1.0)
    return bool(scaled and find(config, untied)[1] and not find(config, "decoupled_lr")[1])


def _unknown(stack: str, content: Any) -> list[str]:
    """Sentences on what lint does not know of the config."""
    if stack == "unknown":
        return [UNKNOWN_STACK]
    if stack == "param groups" and not any("lr" in each for each in find_groups(content)):
        return [NO_LR]
    if stack == "megatron" and _has_untied_mup_head(flatten(content)):
        return [HEAD_IN_MEGATRON]
    of_model = isinstance(content, Mapping) and content.get("model_type") == stack
    sentences = [
        f"the param groups, which stand in {each[key]!r}"
        for each in walk(content)
        for key in GROUP_KEYS
        if isinstance(each.get(key), str)
    ]
    if of_model and not knows_model_type(stack):
        sentences += [
            f"multipliers (model_type {stack!r} not recognised: few rules apply): which of them its"
            " code reads is unknown"
        ]
    if isinstance(content, Mapping) and any("auto_map" in each for each in walk(content)):
        sentences.append("the code that auto_map names, so which keys the model reads is unknown")
    return sentences


def _may_be_set(place: str, config: Any, gaps: set[str]) -> bool:
    """Whether a key that a finding misses may be set by what was not read."""
    name = place.rsplit(".", 1)[-1].rsplit(" ", 1)[-1]
    absent = isinstance(config, Mapping) and not config_rules.find_key(flatten(config), name)[0]
    name = OF_FORKS[name] if OF_FORKS.get(name) in gaps else name
    return name in gaps or (ANY in gaps and absent and not find_groups(config))


def _lint_source(path: Path, source: Source) -> dict[str, Any]:
    content = source.content
    if isinstance(content, list) and not find_groups(content):
        raise UserError(f"a list to lint must contain param groups, but `{path}` contains none")
    stacks: list[str] = []
    findings: list[dict[str, str]] = []
    not_read = list(source.not_read)
    for prefix, config in _configs(content):
        stack, reported = _check(path, config, prefix)
        stacks.append(stack)
        findings += [each for each in reported if not _may_be_set(each["at"], config, source.gaps)]
        unknown = stack == "unknown" and prefix and len(source.content["configs"]) > 1
        not_read += [] if unknown else _unknown(stack, config)
    if set(stacks) == {"unknown"}:
        not_read.append(UNKNOWN_STACK)
    known = [stack for stack in stacks if stack != "unknown"]
    return {
        "path": str(path),
        "stack": (known or stacks)[0],
        "findings": findings,
        "not_read": list(dict.fromkeys(not_read)),
    }


def _lint_folder(path: Path) -> dict[str, Any]:
    files = [path / name for name in ("config.json", "param_groups.json")]
    reports = [lint(file) for file in files if file.exists()]
    if not reports:
        raise UserError(
            "a folder to lint must have a config.json or a param_groups.json,"
            f" but `{path}` has neither"
        )
    return {
        "path": str(path),
        "stack": reports[0]["stack"],
        "findings": [finding for report in reports for finding in report["findings"]],
        "not_read": [sentence for report in reports for sentence in report["not_read"]],
    }


def lint(path: str | Path) -> dict[str, Any]:
    """Checks a config for known muP mistakes, for example a readout that is divided twice.

    Args:
        path: A config file (JSON, YAML, TOML, a Python config, a shell script or an argument
            list), param groups as JSON, or a folder with a config.json or a param_groups.json.
            Python and shell files are parsed and never executed.

    Returns:
        `path`, `stack` (the detected training stack), `findings` and `not_read`. Each finding has
        `rule`, `at` (the key), `says` (what is wrong and why it matters) and `fix` (what to write
        instead). `not_read` has a sentence for each part that was not understood.

    Raises:
        UserError: The file does not exist, cannot be read, has values of an unexpected type, or
            is a fit or a table of runs.

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
    if path.suffix in RUNS:
        raise UserError(
            f"a file to lint must be a training config, but `{path}` is a table of runs: use"
            f" `scaletune fit {path}`"
        )
    source = read(path)
    if not isinstance(source.content, Mapping | list):
        raise UserError(
            f"a config must hold keys or a list of groups, but `{path}` holds"
            f" {type(source.content).__name__}"
        )
    if description := own_file(path, source.content):
        raise UserError(f"a file to lint must be a training config, but `{path}` {description}")
    tables = set(source.content) if path.suffix == ".toml" else set()
    if {"parametrization", "budget"} & tables:
        return {
            "path": str(path),
            "stack": "scaletune recipe",
            "findings": [],
            "not_read": [RECIPE],
        }
    try:
        return _lint_source(path, source)
    except WRONG_TYPE as error:
        raise UserError(
            f"config values must have the type that their keys expect, but in `{path}`: {error}"
        ) from None
