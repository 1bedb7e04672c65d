"""Settings that training programs print before their first step: one function for each program.

Each takes the lines before the first step and returns settings by name. Names that mean the same
in every program are those of scaletune: `n_params` without embedding and readout,
`n_params_total`, `batch_tokens`, `seq_len`.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scaletune.importing.run import Setting, to_number

MIN_ROUNDED = 5e5  # non-embedding parameters of which a rounding to 0.01M is at most 1 %


def none(lines: Sequence[str]) -> dict[str, Setting]:
    """No settings: the program prints none."""
    return {}


def parse(text: str) -> Setting:
    """A setting as a number if it is one, also as a product such as `5 * 8`; else its text."""
    text = text.strip()
    factors = [_literal(part.strip()) for part in text.split("*")]
    numbers = [factor for factor in factors if isinstance(factor, (int, float))]
    if len(numbers) == len(factors) and not any(isinstance(n, bool) for n in numbers):
        return numbers[0] if len(numbers) == 1 else math.prod(numbers)
    literal = _literal(text)
    return str(literal) if isinstance(literal, (str, bool)) else text


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _count(text: str) -> int:
    return int(text.replace(",", ""))


def _search(pattern: str, lines: Iterable[str]) -> list[re.Match[str]]:
    compiled = re.compile(pattern)
    return [match for line in lines if (match := compiled.search(line))]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Setting]:
    """Nested settings with dotted names; an entry of a list is named by its number."""
    flat: dict[str, Setting] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list):
            parts = {str(n): part for n, part in enumerate(value) if isinstance(part, Mapping)}
            flat |= flatten(parts, f"{name}.")
        elif isinstance(value, (int, float, str)):
            flat[name] = value
    return flat


def _known(settings: Mapping[str, Setting], *names: str) -> list[float] | None:
    """The settings as numbers; None if one of them is missing."""
    numbers = [to_number(settings.get(name)) for name in names]
    return None if None in numbers else [number for number in numbers if number is not None]


# --- nanoGPT --------------------------------------------------------------------------------------


def read_nanogpt(lines: Sequence[str]) -> dict[str, Setting]:
    """Overridden settings, tokens per iteration and the size of the model.

    A setting that is not overridden is not printed. `number of parameters` is rounded, and counts
    the token embedding, which is tied to the readout, but not the position embedding.
    """
    settings = _read_overrides(lines)
    for match in _search(r"^tokens per iteration will be: ([\d,]+)", lines):
        settings["tokens_per_iter"] = _count(match[1])
    for match in _search(r"vocab_size (?:= |of GPT-2 to )(\d+)", lines):
        settings["vocab_size"] = _count(match[1])
    counts = _search(r"^num (?:non-)?decayed parameter tensors: \d+, with ([\d,]+) param", lines)
    rounded = _search(r"^number of parameters: ([\d.]+)M", lines)
    if counts:
        settings["n_params_total"] = sum(_count(match[1]) for match in counts[-2:])
    elif rounded and float(rounded[-1][1]) >= 1:
        settings["n_params_total"] = round(1e6 * float(rounded[-1][1]))
    sizes = _known(settings, "n_params_total", "vocab_size", "n_embd")
    positions = _known(settings, "block_size") if counts else [0.0]
    if sizes and positions:
        n_params = sizes[0] - (sizes[1] + positions[0]) * sizes[2]
        if counts or n_params > MIN_ROUNDED:
            settings["n_params"] = n_params
    if settings:
        settings["tied"] = "True"
    return settings


def _read_overrides(lines: Sequence[str]) -> dict[str, Setting]:
    """`Overriding: key = value`, and the assignments of a config file that is printed."""
    settings: dict[str, Setting] = {}
    in_file = False
    for line in lines:
        if match := re.match(r"Overriding: (\w+) = (.*)", line):
            settings[match[1]] = parse(match[2])
        elif line.startswith("Overriding config with "):
            in_file = True
        elif in_file and (match := re.match(r"(\w+) *= *([^#]+)", line)):
            settings[match[1]] = parse(match[2])
        elif not re.match(r"\s*(#|$)", line):
            in_file = False
    return settings


# --- Megatron-LM and GPT-NeoX ---------------------------------------------------------------------


def read_megatron(lines: Sequence[str]) -> dict[str, Setting]:
    """The table of arguments, and the number of parameters if one log counts all of them."""
    settings: dict[str, Setting] = {}
    for match in _search(r"^ {1,4}([A-Za-z_]\w*) \.{2,} ?(.*)$", lines):
        settings[match[1]] = parse(re.sub(r"\.*(updated|default)$", "", match[2]))
    for match in _search(
        r"padded vocab \(size: \d+\) with \d+ dummy tokens \(new size: (\d+)\)", lines
    ):
        settings["padded_vocab_size"] = _count(match[1])
    if total := _megatron_total(lines, settings):
        settings["n_params_total"] = total
        if embedding := _megatron_embedding(settings):
            settings["n_params"] = total - embedding
    for batch in ("global_batch_size", "train_batch_size"):
        sizes = _known(settings, batch, "seq_length")
        if sizes and settings.get("rampup_batch_size") in (None, "None"):
            settings["batch_tokens"] = sizes[0] * sizes[1]
    return settings


def _megatron_total(lines: Sequence[str], settings: Mapping[str, Setting]) -> int | None:
    """All parameters; None if a model is divided over ranks, where layers may count twice."""
    unique = _search(r"\bUNIQUE_PARAMS=(\d+)", lines)
    if unique:
        return _count(unique[-1][1])
    divided = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    ranks = _search(r"number of parameters on .*rank \(?0(?:, ?0)?\)?: +([\d,]+)\s*$", lines)
    if ranks and all(settings.get(name) == 1 for name in divided):
        return _count(ranks[-1][1])
    return None


def _megatron_embedding(settings: Mapping[str, Setting]) -> float | None:
    """Parameters of the embeddings and the readout."""
    sizes = _known(settings, "padded_vocab_size", "hidden_size")
    if not sizes:
        return None
    untied = (
        settings.get(name) for name in ("untie_embeddings_and_output_weights", "no_weight_tying")
    )
    matrices = 2 if "True" in untied else 1
    embedding = matrices * sizes[0] * sizes[1]
    kind = settings.get("position_embedding_type", settings.get("pos_emb"))
    if kind in ("learned_absolute", "learned"):
        positions = _known(settings, "max_position_embeddings")
        return embedding + positions[0] * sizes[1] if positions else None
    return embedding


# --- torchtitan -----------------------------------------------------------------------------------


def read_torchtitan(lines: Sequence[str]) -> dict[str, Setting]:
    """The configuration, if `print_config` (formerly `print_args`) printed it, and the sizes."""
    settings = flatten(_read_block(r"Running with (?:args|configs?): (\{.*)", lines))
    for match in _search(r"size: ([\d,]+) total parameters", lines):
        settings["n_params_total"] = _count(match[1])
    for match in _search(
        r"global batch size (\d+), .*sequence length (\d+), .*total steps (\d+)", lines
    ):
        batch, settings["seq_len"], settings["total_steps"] = (int(part) for part in match.groups())
        settings["batch_tokens"] = batch * int(match[2])
    for match in _search(r"\bBuilding \S+ \S+ with \w+\((.*)\)", lines):
        settings |= _keywords(match[1])
    sizes = _known(settings, "n_params_total", "vocab_size", "dim")
    if sizes:
        matrices = 1 if settings.get("enable_weight_tying") == "True" else 2
        settings["n_params"] = sizes[0] - matrices * sizes[1] * sizes[2]
    return settings


def _read_block(start: str, lines: Sequence[str]) -> Mapping[str, Any]:
    """A JSON object or a Python dict that is printed, on one line or several."""
    text, depth = "", 0
    for line in lines:
        if not text:
            match = re.search(start, line)
            if not match:
                continue
            line = match[1]
        text += line + "\n"
        depth += line.count("{") - line.count("}")
        if depth <= 0:
            break
    text = re.sub(r"\b\w*Path\(('[^']*')\)", r"\1", text)
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return value if isinstance(value, Mapping) else {}
    return {}


def _keywords(text: str) -> dict[str, Setting]:
    """The plain arguments of a printed constructor: `dim=256, n_layers=6`."""
    return {match[1]: parse(match[2]) for match in re.finditer(r"(\w+)=([\w.+-]+)(?=[,)]|$)", text)}


# --- OLMo-core and OLMo ---------------------------------------------------------------------------


def read_olmo(lines: Sequence[str]) -> dict[str, Setting]:
    """The size of the model, and the settings of a printed configuration that are unambiguous.

    Its non-embedding parameters count the readout: the printed model says how large that is.
    """
    settings: dict[str, Setting] = {}
    totals = _search(r"(?:^- ([\d,]+) total params|Total number of parameters: ([\d,]+))", lines)
    if totals:
        settings["n_params_total"] = _count(totals[-1][1] or totals[-1][2])
    tables = _search(r"^\s*\((?:embeddings|wte)\): Embedding\((\d+), (\d+)\)", lines)
    readouts = _search(
        r"^\s*\((?:w_out|ff_out)\): Linear\(in_features=(\d+), out_features=(\d+)", lines
    )
    if tables:
        vocabulary, width = int(tables[-1][1]), int(tables[-1][2])
        settings |= {"vocab_size": vocabulary, "width": width}
        sizes = _known(settings, "n_params_total")
        if sizes and not totals[-1][2]:
            readout = sum(int(r[2]) == vocabulary and int(r[1]) == width for r in readouts[-1:])
            settings["n_params"] = sizes[0] - (1 + readout) * vocabulary * width
    if any("olmo_core" in line for line in lines):
        settings |= _read_only_values(lines)
    return settings


def _read_only_values(lines: Sequence[str]) -> dict[str, Setting]:
    """Settings of a printed `Config(lr=..., ...)` that have one value wherever they occur."""
    names = {
        "lr": "lr",
        "global_batch_size": "batch_tokens",  # in tokens
        "sequence_length": "seq_len",
        "weight_decay": "weight_decay",
    }
    settings: dict[str, Setting] = {}
    for name, own in names.items():
        matches = _search(rf"(?<![\w.]){name}=([\d.eE+-]+)(?=[,)]|$)", lines)
        values = {parse(match[1]) for match in matches}
        if len(values) == 1:
            settings[own] = values.pop()
    return settings


# --- llm.c and litgpt -----------------------------------------------------------------------------

LLM_C_NAMES = {
    "learning rate (LR)": "lr",
    "weight decay": "weight_decay",
    "total batch size": "batch_tokens",  # in tokens
    "sequence length T": "seq_len",
    "train_num_batches": "total_steps",
    "warmup iterations": "warmup_iters",
    "LR scheduler": "lr_schedule",
    "channels C": "width",
    "num_layers L": "depth",
    "padded_vocab_size Vp": "padded_vocab_size",
    "max_sequence_length T": "max_seq_len",
    "num_parameters": "n_params_total",
}


def read_llm_c(lines: Sequence[str]) -> dict[str, Setting]:
    """The table of parameters. The readout is tied to the token embedding."""
    settings: dict[str, Setting] = {}
    for match in _search(r"^\| (\S.*?) +\| (.*?) +\|$", lines):
        if match[1] in LLM_C_NAMES:
            settings[LLM_C_NAMES[match[1]]] = parse(match[2])
    sizes = _known(settings, "n_params_total", "padded_vocab_size", "max_seq_len", "width")
    if sizes:
        total, vocabulary, positions, width = sizes
        settings["n_params"] = total - (vocabulary + positions) * width
        settings["tied"] = "True"
    settings.pop("max_seq_len", None)  # a context of 1024 that need not be the one trained on
    return settings


def read_litgpt(lines: Sequence[str]) -> dict[str, Setting]:
    """The hyperparameters, which are printed as a dict, and the size of the model."""
    settings = flatten(_read_block(r"^(\{'.*)", lines))
    settings |= flatten({"optimizer": _literal(str(settings.pop("optimizer", "")))})
    for match in _search(r"^Total parameters: ([\d,]+)", lines):
        settings["n_params_total"] = _count(match[1])
    lrs = [
        value for name, value in settings.items() if name.endswith(("init_args.lr", "optimizer.lr"))
    ]
    if lrs:
        settings["lr"] = lrs[0]
    sizes = _known(
        settings, "n_params_total", "model_config.padded_vocab_size", "model_config.n_embd"
    )
    if sizes:
        matrices = 1 if settings.get("train.tie_embeddings") is True else 2
        settings |= {"n_params": sizes[0] - matrices * sizes[1] * sizes[2], "width": sizes[2]}
        settings["depth"] = settings.get("model_config.n_layer")
    context = _known(settings, "train.max_seq_length") or _known(
        settings, "model_config.block_size"
    )
    batch = _known(settings, "train.global_batch_size")
    if context and batch:
        settings |= {"seq_len": context[0], "batch_tokens": batch[0] * context[0]}
    if (budget := settings.get("train.max_tokens")) is not None:
        settings["max_tokens"] = budget
    return settings
