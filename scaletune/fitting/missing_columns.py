"""The error for columns that a law needs and a table lacks: what to write after `--map` instead."""

from __future__ import annotations

import keyword
import re
import shlex
from collections.abc import Mapping, Sequence

import pandas as pd

from scaletune.errors import UserError
from scaletune.records import COLUMNS
from scaletune.records.expression_tree import close_name, list_columns

# Words of a column name that suggest a quantity; an earlier word is better evidence.
WORDS: dict[str, tuple[str, ...]] = {
    "n_params": ("params", "parameters", "param", "parameter", "nparams", "size", "weights", "n"),
    "tokens": ("tokens", "ntokens", "token", "d"),
    "lr": ("lr", "learning", "eta"),
    "loss": ("loss", "ce", "nll", "xent", "crossentropy", "entropy", "perplexity", "ppl"),
    "batch_tokens": ("batch", "bs", "batchsize", "gbs"),
    "flops": ("flops", "flop", "compute"),
}
PREFERRED = ("eval", "val", "valid", "validation", "test", "peak", "max", "total")
# Words of columns that hold something else.
OTHERS = {
    *("per", "second", "seconds", "sec", "s", "time", "std", "se", "min", "warmup", "scale", "aux"),
    *("id", "name", "kind", "type", "unit", "schedule", "scheduler", "final", "decay"),
}
# Words that say that a size or a count is not that of the model or of the data.
NOT_OF = {
    "n_params": {"batch", "vocab", "hidden", "seq", "data", "dataset", "context", "window", "step"},
    "tokens": {"batch", "bs", "vocab", "seq", "step"},
}
STEPS = ("steps", "step", "iters", "iter", "iterations", "iteration")
SEQUENCES = ("samples", "sequences", "examples")
SCALES = {  # last word of a name -> factor, and what is counted
    word: (factor, words[1])
    for factor, words in (
        ("1e3", ("thousand", "thousands", "k")),
        ("1e6", ("million", "millions", "m")),
        ("1e9", ("billion", "billions", "b", "bn")),
        ("1e12", ("trillion", "trillions", "t")),
    )
    for word in words
}
INTERVALS = {"eval", "logging", "log", "save", "warmup", "decay", "print", "test", "checkpoint"}
STAND_IN = re.compile(r"\b(TOKENS_PER_STEP|SEQ_LEN)\b")  # numbers that the table does not have
RATIOS = ("tpp", "tokensperparam", "tokensperparameter", "tokenparamratio", "dn", "dnratio")
PERPLEXITY = ("perplexity", "ppl")
TOTAL = ("total", "embedding", "embeddings", "all")


def require_columns(table: pd.DataFrame, needed: Mapping[str, str], subject: str) -> None:
    """Raises one UserError for all missing columns, with likely columns of the table for each.

    Args:
        table: The table; `attrs["absent"]` may say why an importer has no column.
        needed: {column: what it holds, with its unit}.
        subject: What needs the columns, for the message.
    """
    missing = [column for column in needed if column not in table]
    if not missing:
        return
    names = [str(name) for name in table.columns]
    wanted = ", ".join(f"`{column}` ({needed[column]})" for column in missing)
    several = len(missing) > 1
    raise UserError(
        f"{subject} needs the column{'s' * several} {wanted}, but the table has"
        f" {'none of these' if several else 'no such column'}: {map_options(table, missing)};"
        f" {list_columns(names)}"
    )


def map_options(table: pd.DataFrame, missing: Sequence[str]) -> str:
    """`--map n_params=params --map lr=eta (...)`, with notes on what the columns must hold."""
    absent = table.attrs.get("absent", {})  # why an importer has no such column
    options, notes = [], []
    for column in missing:
        expression, note = suggest(table, column)
        if column in absent and (STAND_IN.search(expression) or expression == "COLUMN"):
            notes.append(absent[column])  # the importer knows better
            continue
        options.append(f"--map {shlex.quote(f'{column}={expression}')}")
        notes += [note] if note else []
    if not options:
        return "; ".join(notes)
    return " ".join(options) + (f" ({'; '.join(notes)})" if notes else "")


def suggest(table: pd.DataFrame, column: str) -> tuple[str, str]:
    """What to map to a missing column: an expression over the table, and a note on its unit.

    The expression is "COLUMN" if nothing in the table resembles the column. Names in capitals stand
    for numbers that the table does not have.
    """
    free = [name for name in map(str, table.columns) if name not in COLUMNS or name == "steps"]
    free = [name for name in free if _holds_numbers(table, name)]
    name = _most_likely(free, column)
    if name is None:
        return _count_tokens(table, free) if column == "tokens" else ("COLUMN", "")
    words, quoted = words_of(name), in_expression(name)
    if column == "loss" and set(words) & set(PERPLEXITY):
        return f"log({quoted})", f"the loss is the natural logarithm of `{name}`"
    if column in ("n_params", "tokens") and words[-1] in SCALES and len(words) > 1:
        factor, counted = SCALES[words[-1]]
        return f"{factor}*{quoted}", f"if `{name}` counts {counted}"
    if column == "batch_tokens" and not set(words) & {"tokens", "token"}:
        length = "seq_len" if "seq_len" in table else "SEQ_LEN"
        return f"{quoted}*{length}", f"if `{name}` counts sequences"
    if column == "n_params" and set(words) & set(TOTAL):
        return name, f"if `{name}` leaves out the embedding"
    others = [other for other in names_like(free, name) if column == "loss"]
    return name, f"or {', '.join(map(in_expression, others[:3]))}" if others else ""


def names_like(names: list[str], name: str) -> list[str]:
    """Other names that begin and end as a name does: `val/wiki_loss` beside `val/c4_loss`."""
    words = words_of(name)
    ends = [words[:1], words[-1:]]
    return [other for other in names if other != name and _ends(other) == ends]


def _ends(name: str) -> list[list[str]]:
    return [words_of(name)[:1], words_of(name)[-1:]]


def words_of(name: str) -> list[str]:
    """`train/numParams_m` -> ["train", "num", "params", "m"]."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def _most_likely(names: list[str], column: str) -> str | None:
    """The name with the best word for the column; else the one with the most similar spelling."""
    known = WORDS.get(column, (column,))
    ranked = []
    for name in names:
        words = words_of(name)
        ranks = [
            known.index(word)
            for word in words
            if word in known and (len(word) > 1 or len(words) == 1)
        ]
        if ranks and not set(words) & (OTHERS - set(known) | NOT_OF.get(column, set())):
            ranked.append((min(ranks), not set(words) & set(PREFERRED), len(words), name))
    return min(ranked)[-1] if ranked else close_name(column, names, 0.75)


def _count_tokens(table: pd.DataFrame, names: list[str]) -> tuple[str, str]:
    """Tokens from tokens per parameter, from FLOPs, or from steps."""
    ratio = next((name for name in names if re.sub(r"\W|_", "", name.lower()) in RATIOS), None)
    if ratio and "n_params" in table:
        return f"{in_expression(ratio)}*n_params", f"if `{ratio}` is tokens per parameter"
    steps = _from_steps(table, [name for name in names if name[:1] != "_"])
    if steps[0] == "COLUMN" and "flops" in table and "n_params" in table:
        return "flops/(6*n_params)", "if `flops` counts 6 per parameter and token"
    return steps


def _from_steps(table: pd.DataFrame, names: list[str]) -> tuple[str, str]:
    """Tokens from a count of steps or sequences."""
    for counted, factor, stand_in in (
        (STEPS, "batch_tokens", "TOKENS_PER_STEP"),
        (SEQUENCES, "seq_len", "SEQ_LEN"),
    ):
        name = next((name for name in names if _counts(name, counted)), None)
        if name:
            given = factor if factor in table else stand_in
            return f"{in_expression(name)}*{given}", f"if `{name}` counts {counted[0]}"
    return "COLUMN", ""


def _counts(name: str, counted: tuple[str, ...]) -> bool:
    """Whether a name says that a column counts the steps or sequences of a run."""
    *words, last = words_of(name) or [""]
    return last in counted and not set(words) & INTERVALS


def _holds_numbers(table: pd.DataFrame, name: str) -> bool:
    """Whether a column has a number other than 0, or text with a digit such as "160M"."""
    position = [str(column) for column in table.columns].index(name)
    known = table.iloc[:, position].dropna()
    if not len(known) or (known == 0).all():
        return False
    first = known.iloc[0]
    return not isinstance(first, bool) and any(map(str.isdigit, str(first)))


def in_expression(name: str) -> str:
    """A column name as an expression writes it."""
    plain = all(part.isidentifier() and not keyword.iskeyword(part) for part in name.split("."))
    return name if plain else f"`{name}`"
