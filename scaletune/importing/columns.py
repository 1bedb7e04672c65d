"""Gives the columns of a source the names of scaletune.

A column that the user names (`--map`) has priority, then a column of the very name, then the usual
names of other tools. Every derived column has a sentence that says where it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from scaletune.importing.completion_flags import read_flags
from scaletune.importing.names import (
    TOTAL_NAMES,
    USUAL_NAMES,
    VOCABULARY_NAMES,
    find_names,
    is_loss,
)
from scaletune.importing.peak_lr import find_peak_lr
from scaletune.importing.run import RunTable
from scaletune.importing.states import read_state
from scaletune.importing.token_count import add_tokens, first_of
from scaletune.records import COLUMNS

if TYPE_CHECKING:
    import pandas as pd

TIED = (
    "tied",
    "tie_word_embeddings",
    "tie_embeddings",
    "weight_tying",
    "model.tie_word_embeddings",
)
HELD_OUT = {"eval", "val", "valid", "validation", "test", "evaluation", "heldout"}
STATE_NAMES = ("status", "state", "run_status", "run_state")
IDS = (
    *("id", "run_id", "trial_id", "run_uuid", "uuid", "run", "run_name", "name", "number"),
    *("trial", "trial_name", "trial_number", "experiment", "exp_name", "job_id", "jobid"),
)


def name_columns(
    runs: RunTable,
    columns: Mapping[str, str] | None = None,
    tokens_per_step: float | None = None,
    every_row: bool = False,
) -> RunTable:
    """The runs with the columns of scaletune added, and sentences about what was derived.

    Args:
        runs: The runs of one source.
        columns: {column of scaletune: column of the source, or an expression of its columns}.
        tokens_per_step: Tokens of one optimizer step, for runs that log steps only.
        every_row: The rows are logged steps: their lr and tokens are those of the step.

    Raises:
        UserError: A named column does not exist, or the only lr is a last, decayed value.
    """
    runs = _map(runs, columns or {})
    mapped = set(columns or {})
    runs = read_flags(_read_states(runs))
    runs = _name_simple(runs, mapped)
    runs = _name_loss(runs, mapped)
    if every_row:
        return runs
    runs = _count_parameters(runs, mapped)
    runs = _count_batch(runs)
    runs = _name_lr(runs, mapped)
    return add_tokens(runs, tokens_per_step, mapped)


def _map(runs: RunTable, columns: Mapping[str, str]) -> RunTable:
    from scaletune.importing.doubtful_columns import doubtful_source
    from scaletune.records.expressions import map_column

    table, warnings = runs.table, list(runs.warnings)
    for column, text in columns.items():
        if column not in runs.mapped:
            table = table.assign(**{column: map_column(runs.table, text, column)})
        if text in runs.table and (sentence := doubtful_source(column, text)):
            warnings.append(sentence)
    return replace(runs, table=table, warnings=warnings)


def _read_states(runs: RunTable) -> RunTable:
    """`status` and `message` from the words of a tracker for the state of a run."""
    names = find_names(runs.table.columns, STATE_NAMES)
    if not names:
        return runs
    words = runs.table[names[0]]
    states = {word: read_state(word) for word in words.dropna().unique()}
    status = words.map({word: state for word, (state, _) in states.items()}).fillna("done")
    reasons = words.map({word: reason for word, (_, reason) in states.items()}).fillna("")
    if "message" in runs.table:
        given = runs.table["message"].fillna("").astype(str)
        reasons = given.where(given != "", reasons)
    return replace(runs, table=runs.table.assign(status=status, message=reasons))


def _name_simple(runs: RunTable, mapped: set[str]) -> RunTable:
    """Columns that are read as they are, from the first usual name that a row has."""
    special = {"lr", "loss", "tokens", "n_params", "status"}
    for column in [name for name in COLUMNS if name not in special]:
        if column not in mapped and column not in runs.table:
            runs = _read_first(runs, column, (column, *USUAL_NAMES.get(column, ())))
    if "id" not in runs.table:
        unique = (name for name in find_names(runs.table, IDS) if runs.table[name].is_unique)
        if name := next(unique, None):
            runs = replace(runs, table=runs.table.assign(id=runs.table[name]))
    return runs


def _read_first(runs: RunTable, column: str, names: tuple[str, ...]) -> RunTable:
    candidates = find_names(runs.table.columns, names)
    if not candidates:
        return runs
    if column in ("seed", "weight_decay"):  # 0 is a value
        values, used = runs.table[candidates[0]], candidates[:1]
    else:
        values, used = first_of(runs.table, candidates)
    if not used:
        return runs
    return _assign(runs, column, values, used)


def _assign(runs: RunTable, column: str, values: pd.Series, used: list[str]) -> RunTable:
    from scaletune.importing.doubtful_columns import doubtful_source

    source = " and ".join(f"`{name}`" for name in used)
    note = f"`{column}` is read from the column {source} (--map {column}=NAME reads another one)"
    doubts = [doubt for name in used if (doubt := doubtful_source(column, name))]
    return replace(
        runs,
        table=runs.table.assign(**{column: values}),
        notes=[*runs.notes, note],
        warnings=[*runs.warnings, *doubts],
    )


def _name_loss(runs: RunTable, mapped: set[str]) -> RunTable:
    """The held-out loss of a tracker has priority over its `loss`, which is that of training."""
    if "loss" in mapped:
        return runs
    table = runs.table
    held_out = [name for name in find_names(table.columns, USUAL_NAMES["loss"]) if name in table]
    if "loss" in table and not (held_out and runs.origin_known):
        if held_out:
            note = (
                f"`loss` is read from the column `loss`, not from `{held_out[0]}`"
                f" (--map loss={held_out[0]} reads that one)"
            )
            return replace(runs, notes=[*runs.notes, note])
        return runs
    if held_out:
        return _assign(runs, "loss", table[held_out[0]], held_out[:1])
    others = [name for name in find_names(table.columns, ("loss", "train/loss", "train_loss"))]
    if not others:
        others = _only_loss([str(name) for name in table if is_loss(name)])
    return _assign(runs, "loss", table[others[0]], others[:1]) if others else runs


def _only_loss(names: list[str]) -> list[str]:
    """The only loss of a table, or the only one on held-out text; none if there are several."""
    held_out = [name for name in names if set(re.split(r"[\W_]+", name.lower())) & HELD_OUT]
    return next(([*group] for group in (names, held_out) if len(group) == 1), [])


def _count_parameters(runs: RunTable, mapped: set[str]) -> RunTable:
    """`n_params` from a column of non-embedding parameters, or from a total and the vocabulary."""
    if "n_params" in mapped or "n_params" in runs.table:
        return runs
    runs = _read_first(runs, "n_params", ("n_params", *USUAL_NAMES["n_params"]))
    totals = find_names(runs.table.columns, TOTAL_NAMES)
    vocabulary = find_names(runs.table.columns, VOCABULARY_NAMES)
    if "n_params" in runs.table or not totals:
        return runs
    if not vocabulary or "width" not in runs.table:
        values, used = first_of(runs.table, totals)
        return _assign(runs, "n_params", values, used) if used else runs
    return _without_embedding(runs, totals[0], vocabulary[0])


def _without_embedding(runs: RunTable, total: str, vocabulary: str) -> RunTable:
    from scaletune.counting.embedding import without_embedding

    table = runs.table
    tied = find_names(table.columns, TIED)
    columns = (first_of(table, [name])[0] for name in (total, vocabulary, "width"))
    flags = table[tied[0]].astype(str).str.lower().isin(("true", "1", "1.0")) if tied else None
    values = first_of(table, [])[0]  # a run that lacks one of the numbers has no count
    for row, (all_params, words, width) in enumerate(zip(*columns, strict=True)):
        if all_params == all_params and words == words and width == width:
            is_tied = bool(flags.iloc[row]) if flags is not None else False
            values.iloc[row] = without_embedding(all_params, words, width, is_tied)
    kind = f"`{tied[0]}`" if tied else "untied embeddings, which is assumed"
    note = (
        f"`n_params` is computed as `{total}` without the embeddings, from `{vocabulary}`, `width`"
        f" and {kind} (--map n_params=NAME reads a column)"
    )
    return replace(runs, table=table.assign(n_params=values), notes=[*runs.notes, note])


def _count_batch(runs: RunTable) -> RunTable:
    """`batch_tokens` from the sequences per step and their length."""
    import pandas as pd

    from scaletune.counting.batch import (
        ACCUMULATION,
        DEVICES,
        GLOBAL,
        PER_DEVICE,
        PLAIN,
        batch_tokens,
    )

    table = runs.table
    names = find_names(table.columns, (*GLOBAL, *PER_DEVICE, *PLAIN, *ACCUMULATION, *DEVICES))
    if "batch_tokens" in table or "seq_len" not in table or not names:
        return runs
    settings = pd.concat([first_of(table, [name])[0] for name in [*names, "seq_len"]], axis=1)
    settings.columns = [*names, "seq_len"]
    counts = {
        index: counted
        for index, row in settings.drop_duplicates().iterrows()
        if (
            counted := batch_tokens(
                {str(k): float(v) for k, v in row.items() if k != "seq_len" and v == v},
                row["seq_len"],
            )
        )
    }
    if not counts:
        return runs
    first = settings.drop_duplicates().index
    keys = settings.astype(str).agg("|".join, axis=1)
    tokens = {keys[index]: counts[index][0] for index in first if index in counts}
    formulas = " or ".join(dict.fromkeys(formula for _, formula in counts.values()))
    note = f"`batch_tokens` is computed as {formulas} (--map batch_tokens=NAME reads a column)"
    table = table.assign(batch_tokens=keys.map(tokens))
    return replace(runs, table=table, notes=[*runs.notes, note])


def _name_lr(runs: RunTable, mapped: set[str]) -> RunTable:
    if "lr" in mapped:
        return runs
    peak = find_peak_lr(runs)
    if peak is None:
        return runs
    table = runs.table.assign(lr=peak.values)
    notes, warnings = [*runs.notes, *peak.notes], [*runs.warnings, *peak.warnings]
    return replace(runs, table=table, notes=notes, warnings=warnings)
