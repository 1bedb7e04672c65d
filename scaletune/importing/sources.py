"""Finds the reader for each file and folder of runs."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from scaletune.errors import UserError
from scaletune.importing.run import ImportedRun, RunTable, to_table
from scaletune.records import read_trials

if TYPE_CHECKING:
    import pandas as pd

TRIAL_KEYS = {"point", "sweep"}
"""Keys that only the records of scaletune have."""
MAX_FILES = 100_000  # files of a folder that are looked at to recognise its kind

Read = Callable[[Path], list[ImportedRun]]


@dataclass(frozen=True)
class Kind:
    """A kind of file that a tool writes."""

    patterns: tuple[str, ...]
    """File names, as shell patterns."""

    module: str
    """Module of scaletune.importing with the reader."""

    function: str = "read"


KINDS = (
    Kind(("*.wandb",), "wandb"),
    Kind(("experiment_state-*.json",), "ray_tune"),
    Kind(("trainer_state.json",), "trainer"),
    Kind(("trainer_log.jsonl",), "trainer", "read_log"),
    Kind(("tracker_metrics.jsonl",), "levanter"),
    Kind(("meta.yaml",), "mlflow", "read_folder"),
    Kind(("result.json", "progress.csv"), "ray_tune"),
    Kind(("metrics.csv",), "lightning_csv"),
    Kind(("*tfevents*",), "tensorboard"),
    Kind(("*.log", "*.out", "*.err", "*.txt"), "logs"),
)
"""Kinds of files that hold runs. Of a folder with several kinds, the earliest is read."""

READ = (
    "scaletune's own .jsonl, .db or .csv; a .csv, .parquet or .jsonl table; runs of W&B (.wandb,"
    " CSV exports, wandb://entity/project), TensorBoard (tfevents), a Hugging Face Trainer"
    " (trainer_state.json), MLflow (mlflow.db, mlruns/), Optuna (study.db, trials_dataframe), Ray"
    " Tune (result.json, progress.csv), Lightning (metrics.csv), levanter (tracker_metrics.jsonl);"
    " or a log of nanoGPT, modded-nanogpt, Megatron-LM, GPT-NeoX, torchtitan, OLMo-core, OLMo,"
    " llm.c or litgpt"
)


def read_source(
    sources: Sequence[str | Path],
    every_row: bool = False,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[pd.DataFrame], list[RunTable]]:
    """The records of scaletune, and the runs of other tools, one table per source.

    Args:
        sources: Files, folders and addresses such as wandb://entity/project.
        every_row: Keep tables with one row per logged step as they are.
        columns: Columns that the user names, as in `scaletune.importing.trials`.

    Raises:
        UserError: A file is missing, damaged, or of an unknown kind.
    """
    from scaletune.importing import wandb_export

    sources = [file for source in sources for file in _table_files(source)]
    records = [Path(source) for source in sources if _is_record(Path(source))]
    own = [read_trials(records)] if records else []
    runs: list[RunTable] = []
    charts: list[RunTable] = []
    for source in sources:
        if Path(source) in records:
            continue
        table = _read_foreign(source, every_row, _run_name(source, sources), columns or {})
        (charts if wandb_export.is_chart(table) else runs).append(table)
    if charts and runs:
        runs = [_join(runs, charts)]
    return own, runs or charts


def _table_files(source: str | Path) -> list[str | Path]:
    """The tables in a folder that holds no runs of a tool; any other source as it is."""
    from scaletune.importing import mlflow

    path = Path(source)
    if str(source).startswith("wandb:/") or not path.is_dir() or mlflow.is_folder(path):
        return [source]
    if any(_kind_of(name) for name in _file_names(path)):
        return [source]
    files = sorted(file for file in path.rglob("*") if file.suffix in (".csv", ".jsonl"))
    return [*files] or [source]


def _join(runs: list[RunTable], charts: list[RunTable]) -> RunTable:
    from functools import reduce

    from scaletune.importing import wandb_export

    first, *others = runs
    joined = reduce(wandb_export.join_histories, charts, first)
    if others:
        raise UserError(
            "a W&B chart is joined to one table of runs, but there are"
            f" {len(runs)}: fit each export on its own, and merge the tables"
        )
    return joined


def _run_name(source: str | Path, sources: Sequence[str | Path]) -> str:
    """The name of the run of a file: its own, or that of its folder if other files share it."""
    path = Path(source)
    same = [other for other in sources if Path(other).stem == path.stem]
    return path.stem if len(same) == 1 else path.parent.name or path.stem


def _read_foreign(
    source: str | Path, every_row: bool, name: str, columns: Mapping[str, str]
) -> RunTable:
    from scaletune.importing.optuna_journal import is_journal

    address = str(source)
    if address.startswith("wandb:/"):
        from scaletune.importing import wandb_api

        return to_table(wandb_api.read(address), columns.get("lr", ""))
    path = Path(source)
    if not path.exists():
        raise UserError(f"the records must exist, but got `{path}`")
    is_table = path.is_file() and path.suffix in (".csv", ".parquet", ".jsonl")
    if is_table and not is_journal(path):
        return _read_table(path, every_row, name, columns)
    return to_table(find_reader(path)(path), columns.get("lr", ""))


def _read_table(path: Path, every_row: bool, name: str, columns: Mapping[str, str]) -> RunTable:
    """The runs of a table file: an export of a tracker, logged steps, or a table of runs."""
    from scaletune.importing import mlflow, optuna_study, ray_tune, wandb_export
    from scaletune.importing.steps_table import reduce_to_runs
    from scaletune.importing.tables import read_table, require_header, require_unique_names

    if kind := _kind_of(path.name):
        return to_table(_reader(kind)(path), columns.get("lr", ""))
    table = read_table(path)
    for export in (
        wandb_export.read,
        optuna_study.read_export,
        mlflow.read_export,
        ray_tune.read_export,
    ):
        if (runs := export(table, path)) is not None:
            return runs
    if path.suffix == ".csv":
        require_header(path)
        require_unique_names(path)
    reduced = None if every_row else reduce_to_runs(table, name, columns)
    return RunTable(table) if reduced is None else reduced


def find_reader(path: Path) -> Read:
    """The reader of the tool that wrote the file, or the files in the folder.

    Raises:
        UserError: No tool is known that writes such a file.
    """
    from scaletune.importing import mlflow, optuna_journal, optuna_study

    if mlflow.is_folder(path):  # its artifacts may be files of other tools
        return mlflow.read_folder
    if path.is_file():
        if path.suffix in (".db", ".sqlite", ".sqlite3"):
            return _database_reader(path)
        if optuna_journal.is_journal(path):
            return optuna_study.read
        if kind := _kind_of(path.name):
            return _reader(kind)
    else:
        names = {name for name in _file_names(path)}
        kinds = [kind for kind in KINDS if any(_matches(name, kind) for name in names)]
        if kinds:
            return _reader(kinds[0])
    raise UserError(
        f"`{path}` holds no runs that scaletune reads. It reads {READ}. Other runs: write a .csv"
        " with the columns n_params, tokens, lr and loss"
    )


def _file_names(folder: Path) -> Iterator[str]:
    for number, file in enumerate(folder.rglob("*")):
        if number > MAX_FILES:
            return
        yield file.name


def _matches(name: str, kind: Kind) -> bool:
    return any(fnmatch(name, pattern) for pattern in kind.patterns)


def _kind_of(name: str) -> Kind | None:
    return next((kind for kind in KINDS if _matches(name, kind)), None)


def _reader(kind: Kind) -> Read:
    from importlib import import_module

    module = import_module(f"scaletune.importing.{kind.module}")
    reader: Read = getattr(module, kind.function)
    return reader


def _database_reader(path: Path) -> Read:
    from scaletune.importing import mlflow, optuna_study

    tables = _tables_of(path)
    if {"studies", "trials"} <= tables:
        return optuna_study.read
    if {"runs", "metrics"} <= tables:
        return mlflow.read_database
    raise UserError(
        f"`{path}` must be a sweep of scaletune, a study of Optuna or a database of MLflow, but its"
        f" tables are: {', '.join(sorted(tables)) or 'none'}"
    )


def _tables_of(path: Path) -> set[str]:
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            rows = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    except sqlite3.Error as error:
        raise UserError(f"`{path}` must be an SQLite database, but {error}") from None
    return {str(name) for (name,) in rows}


def _is_record(path: Path) -> bool:
    """Whether `records.read_trials` reads the file, or reports that it does not exist."""
    if str(path).startswith("wandb:/") or path.is_dir():
        return False
    if path.suffix == ".jsonl":
        return not _is_foreign_json(path)
    if path.suffix == ".db" and path.exists():
        tables = _tables_of(path)
        return not ({"studies", "trials"} <= tables or {"runs", "metrics"} <= tables)
    return path.suffix in (".db", ".csv") and not path.exists()


def _is_foreign_json(path: Path) -> bool:
    """Whether a `.jsonl` file holds runs of another tool: no keys of a trial in its first line."""
    if _kind_of(path.name):
        return True
    try:
        with path.open("r", encoding="utf-8") as file:
            first = json.loads(next((line for line in file if line.strip()), "null"))
    except (OSError, ValueError):
        return False  # the reader of trials reports the error
    return isinstance(first, dict) and not TRIAL_KEYS & first.keys()
