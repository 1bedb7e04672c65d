"""Reads the runs of other tools as a table with the columns that scaletune uses.

The readers (one module per tool) return runs with their settings and histories. Everything that is
a judgement is made once, for all tools: which rows are one run (`steps_table`), which value is the
peak lr (`peak_lr`), how many tokens a run saw (`token_count`), which runs finished
(`completeness`), and which column is which (`columns`, `names`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaletune.errors import UserError
from scaletune.importing.completeness import judge_by_plan, judge_by_siblings
from scaletune.importing.merged_sources import merge_sources
from scaletune.importing.sources import read_source

if TYPE_CHECKING:
    import pandas as pd

    from scaletune.importing.run import RunTable


def trials(
    source: str | Path | Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    *,
    tokens_per_step: float | None = None,
    every_row: bool = False,
) -> tuple[pd.DataFrame, list[str]]:
    """Reads records of any kind as a table with the columns that a fit needs.

    Args:
        source: A file or folder, or several: `.jsonl`, `.db`, `.csv` or `.parquet`, runs and
            exports of W&B (`wandb://entity/project` reads them from its server), MLflow, Optuna and
            Ray Tune, TensorBoard event files, logs of a Hugging Face Trainer, of Lightning and of
            levanter, and text logs of nanoGPT, Megatron-LM, torchtitan and OLMo-core. A W&B chart
            is joined to its table of runs. A trial that is in several sources is counted once.
        columns: {column of scaletune: column of the records}, as `--map` on the command line:
            {"loss": "eval/ce"}; an expression of columns may stand for a column:
            {"n_params": "1e6 * size"}. A column that is neither present nor given is looked up
            under its usual names.
        tokens_per_step: Tokens of one optimizer step, for runs that log steps and no tokens.
        every_row: Keep a table with one row per logged step as it is, for laws of whole curves.

    Returns:
        The table, one row per run, with columns such as `n_params` (without embedding), `tokens`,
        `batch_tokens`, `lr` (peak), `loss` (nats per token) and `status`; a run that did not finish
        is a row with the status "failed" and a `message`. And one sentence per assumption.
        `table.attrs["warnings"]` has what is doubtful, and `table.attrs["absent"]` why a column is
        missing.

    Raises:
        UserError: A file is missing or of an unknown kind, a column does not exist, or the only
            learning rates are last values of a decayed schedule.

    Example:
        >>> import pandas as pd, tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "runs.csv"
        ...     runs = pd.DataFrame({"learning_rate": [1e-3, 3e-3], "ce": [3.1, 3.0]})
        ...     runs.to_csv(path, index=False)
        ...     table, notes = trials(path, {"loss": "ce"})
        >>> table[["lr", "loss"]].values.tolist()
        [[0.001, 3.1], [0.003, 3.0]]
        >>> notes
        ['`lr` is read from the column `learning_rate` (--map lr=NAME reads another one)']
    """
    paths = [source] if isinstance(source, (str, Path)) else list(source)
    own, foreign = read_source(paths, every_row, columns)
    own = [_map_own(table, columns or {}, bool(foreign)) for table in own]
    named = [_prepare(runs, columns, tokens_per_step, every_row) for runs in foreign]
    return _combine(own, named, every_row)


def _map_own(table: pd.DataFrame, columns: Mapping[str, str], others: bool) -> pd.DataFrame:
    """The records of scaletune with the columns that the user names.

    With `others`, runs of other tools, only those that the records have.
    """
    from scaletune.records.expressions import map_column

    mapped = table
    for name, text in columns.items():
        try:
            mapped = mapped.assign(**{name: map_column(table, text, name)})
        except UserError:
            if not others:
                raise
    return mapped


def _prepare(
    runs: RunTable,
    columns: Mapping[str, str] | None,
    tokens_per_step: float | None,
    every_row: bool,
) -> RunTable:
    """The runs of one source with the columns of scaletune, and unfinished ones marked."""
    from scaletune.importing.columns import name_columns

    named = name_columns(runs, columns, tokens_per_step, every_row)
    return named if every_row else judge_by_plan(named)


def _combine(
    own: list[pd.DataFrame], named: list[RunTable], every_row: bool
) -> tuple[pd.DataFrame, list[str]]:
    """The tables of all sources as one, with what was assumed, doubted and missing."""
    import pandas as pd

    tables, joined = [runs.table for runs in named], list[str]()
    if tables:
        foreign, joined = merge_sources(tables)
        if not every_row:
            foreign = judge_by_siblings(foreign)
        own = [*own, foreign]
    table = pd.concat(own, ignore_index=True) if len(own) > 1 else own[0]
    if len(own) > 1 and "id" in table:  # some of the tables may have no ids
        rows = pd.Series([f"row{i}" for i in range(len(table))], index=table.index)
        table = table.assign(id=table["id"].where(table["id"].notna(), rows))
    hidden = [name for name in table if str(name).startswith(("_last_", "_planned_"))]
    table = table.drop(columns=hidden)
    empty = "message" in table and not table["message"].fillna("").astype(bool).any()
    table = table.drop(columns="message") if empty else table
    notes = list(dict.fromkeys([*(note for runs in named for note in runs.notes), *joined]))
    warnings = list(dict.fromkeys(warning for runs in named for warning in runs.warnings))
    absent = {name: reason for runs in named for name, reason in runs.absent.items()}
    table.attrs = {"warnings": warnings, "absent": absent}
    return table, notes
