"""Reads the runs of other tools as a table with the columns that scaletune uses.

Formats: CSV, Parquet, JSON lines, W&B, TensorBoard, the log of a Hugging Face Trainer, MLflow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaletune.errors import UserError, nearest
from scaletune.importing import tables, tensorboard, trainer_mlflow, wandb
from scaletune.importing.run import ImportedRun
from scaletune.records import read_trials

if TYPE_CHECKING:
    import pandas as pd

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "lr": (
        "peak_lr_logged",
        "learning_rate",
        "max_lr",
        "peak_lr",
        "optimizer.lr",
        "config.lr",
        "args.learning_rate",
        "optim.lr",
    ),
    "loss": (
        "val_loss",
        "eval_loss",
        "eval/loss",
        "val/loss",
        "validation/loss",
        "valid_loss",
        "test_loss",
        "eval/cross_entropy",
    ),
    "n_params": (
        "non_embedding_params",
        "num_params_non_embedding",
        "n_params_nonembed",
        "params_no_embed",
        "model.n_params",
    ),
    "tokens": (
        "n_tokens",
        "num_tokens",
        "total_tokens",
        "tokens_seen",
        "num_input_tokens_seen",
        "train/tokens",
        "token_num",
    ),
    "batch_tokens": (
        "batch_size_tokens",
        "tokens_per_step",
        "global_batch_tokens",
        "tokens_per_batch",
    ),
    "weight_decay": ("wd", "optimizer.weight_decay", "optim.weight_decay"),
    "width": ("hidden_size", "d_model", "n_embd", "model.hidden_size", "model.d_model"),
    "depth": ("n_layer", "n_layers", "num_layers", "num_hidden_layers", "model.n_layers"),
    "seq_len": (
        *("sequence_length", "context_length", "block_size", "max_seq_len"),
        "data.seq_len",
    ),
    "seed": ("random_seed", "config.seed"),
}
"""Usual names of each column in other tools. An earlier name has priority."""


def trials(
    source: str | Path | Sequence[str | Path], columns: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """Reads records of any kind as a table with the columns that a fit needs.

    Args:
        source: A file or folder, or several: `.jsonl`, `.db`, `.csv` or `.parquet`, offline runs of
            W&B (`.wandb`) or its CSV exports, TensorBoard event files, the checkpoints of a Hugging
            Face Trainer (`trainer_state.json`), or an MLflow database. A W&B chart is joined to its
            table of runs. A trial that is in several sources is counted once.
        columns: {column of scaletune: column of the records}, as `--map` on the command line:
            {"loss": "eval/ce"}. A column that is neither present nor given is looked up under its
            usual names; `tokens` may be computed as steps * batch_tokens.

    Returns:
        The table, one row per run, with columns such as `n_params` (without embedding), `tokens`,
        `batch_tokens`, `lr`, `loss` (nats per token); and one sentence per guessed column.

    Raises:
        UserError: A file is missing or of an unknown kind, or a column does not exist.

    Example:
        >>> import pandas as pd, tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "runs.csv"
        ...     runs = pd.DataFrame({"learning_rate": [1e-3, 3e-3], "ce": [3.1, 3.0]})
        ...     runs.to_csv(path, index=False)
        ...     table, guesses = trials(path, {"loss": "ce"})
        >>> table[["lr", "loss"]].values.tolist()
        [[0.001, 3.1], [0.003, 3.0]]
        >>> guesses
        ['`lr` is read from the column `learning_rate` (--map lr=NAME reads another one)']
    """
    import pandas as pd

    paths = [Path(source)] if isinstance(source, (str, Path)) else [Path(path) for path in source]
    records = [path for path in paths if _is_own(path) and path.suffix != ".csv"]
    sources = [(read_trials(records), False)] if records else []
    sources += [
        tables.read_wandb_export(read_trials(path), path.stem)
        for path in paths
        if path.suffix == ".csv"
    ]
    sources += [(read(path), False) for path in paths if not _is_own(path)]
    runs = [table for table, is_history in sources if not is_history]
    histories = [table for table, is_history in sources if is_history]
    table = pd.concat(runs or histories, ignore_index=True)
    if runs and histories:
        table = tables.join_histories(table, pd.concat(histories))
    return name_columns(table, columns)


def _is_own(path: Path) -> bool:
    """Whether `records.read_trials` reads the file, or reports that it does not exist."""
    if path.suffix == ".jsonl":
        return not tables.is_foreign(path)
    is_store = path.suffix == ".db" and not _is_mlflow(path)
    return path.suffix == ".csv" or is_store or not path.exists()


def name_columns(
    table: pd.DataFrame, columns: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """The table with the columns of scaletune added, and a sentence for each guessed column.

    `columns` and errors: see `trials`.
    """
    guesses = []
    for column, own in (columns or {}).items():
        if own not in table.columns:
            raise UserError(
                f"`{column}={own}` must name a column of the records"
                f"{nearest(own, map(str, table.columns))}"
            )
        table = table.assign(**{column: table[own]})
    for column, names in USUAL_NAMES.items():
        usual = next((name for name in names if name in table.columns), None)
        if column not in table.columns and usual is not None:
            table = table.assign(**{column: table[usual]})
            guesses.append(
                f"`{column}` is read from the column `{usual}`"
                f" (--map {column}=NAME reads another one)"
            )
    if "tokens" not in table.columns and {"steps", "batch_tokens"} <= set(table.columns):
        table = table.assign(tokens=table["steps"] * table["batch_tokens"])
        guesses.append(
            "`tokens` is computed as steps * batch_tokens (--map tokens=NAME reads a column)"
        )
    return table, guesses


def read(path: str | Path) -> pd.DataFrame:
    """The runs of a file or folder of another tool, with the column names of that tool.

    Raises:
        UserError: The file does not exist, is damaged, or is of an unknown kind.
    """
    import pandas as pd

    path = Path(path)
    if not path.exists():
        raise UserError(f"the records must exist, but got `{path}`")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix == ".jsonl":
        return tables.read_json_lines(path)
    return pd.DataFrame([run.row() for run in _find_reader(path)(path)])


def _find_reader(path: Path) -> Callable[[Path], list[ImportedRun]]:
    """The reader of the tracker that wrote the file, or the files in the folder."""
    if path.suffix == ".wandb" or _contains(path, "*.wandb"):
        return wandb.read
    if "tfevents" in path.name or _contains(path, "*tfevents*"):
        return tensorboard.read
    if path.name == "trainer_state.json" or _contains(path, "trainer_state.json"):
        return trainer_mlflow.read_trainer
    if path.suffix in (".db", ".sqlite") and _is_mlflow(path):
        return trainer_mlflow.read_mlflow
    raise UserError(
        f"`{path}` must be .jsonl, .db, .csv or .parquet, or logs of W&B (.wandb), TensorBoard"
        " (tfevents), a Hugging Face Trainer (trainer_state.json) or MLflow (mlflow.db), as a file"
        " or a folder. Other runs: write a .csv with the columns n_params, tokens, lr and loss"
    )


def _contains(folder: Path, pattern: str) -> bool:
    return folder.is_dir() and any(folder.rglob(pattern))


def _read_parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except ImportError:
        raise UserError(f"reading `{path}` needs pyarrow: pip install 'scaletune[data]'") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"`{path}` must be a Parquet table, but {' '.join(str(error).split())}"
        ) from None


def _is_mlflow(path: Path) -> bool:
    import sqlite3
    from contextlib import closing

    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return bool(db.execute("SELECT 1 FROM sqlite_master WHERE name = 'metrics'").fetchall())
    except sqlite3.Error:
        return False
