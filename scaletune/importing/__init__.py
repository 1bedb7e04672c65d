"""Runs people already have, as a table with the columns of the contract: CSV, Parquet, JSONL, W&B, TensorBoard, a Trainer's log, MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaletune.errors import UserError, nearest
from scaletune.importing import tables, tensorboard, trainer_mlflow, wandb
from scaletune.records import read_trials

if TYPE_CHECKING:
    import pandas as pd

CUSTOMARY: dict[str, tuple[str, ...]] = {  # a contract column -> names that trackers' users give it, the likeliest first
    "lr": ("peak_lr_logged", "learning_rate", "max_lr", "peak_lr", "optimizer.lr", "config.lr", "args.learning_rate", "optim.lr"),
    "loss": ("val_loss", "eval_loss", "eval/loss", "val/loss", "validation/loss", "valid_loss", "test_loss", "eval/cross_entropy"),
    "n_params": ("non_embedding_params", "num_params_non_embedding", "n_params_nonembed", "params_no_embed", "model.n_params"),
    "tokens": ("n_tokens", "num_tokens", "total_tokens", "tokens_seen", "num_input_tokens_seen", "train/tokens", "token_num"),
    "batch_tokens": ("batch_size_tokens", "tokens_per_step", "global_batch_tokens", "tokens_per_batch"),
    "weight_decay": ("wd", "optimizer.weight_decay", "optim.weight_decay"),
    "width": ("hidden_size", "d_model", "n_embd", "model.hidden_size", "model.d_model"),
    "depth": ("n_layer", "n_layers", "num_layers", "num_hidden_layers", "model.n_layers"),
    "seq_len": ("sequence_length", "context_length", "block_size", "max_seq_len", "data.seq_len"),
    "seed": ("random_seed", "config.seed"),
}  # fmt: skip


def read(path: str | Path) -> pd.DataFrame:
    """The runs of a file or folder, under the names they were recorded by; UserError when it is of no known kind."""
    import pandas as pd

    path = Path(path)
    if not path.exists():
        raise UserError(f"the records must exist, but got `{path}`")
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".jsonl":
        return tables.of_lines(path)
    readers = {
        "W&B": (
            wandb.read,
            lambda p: p.suffix == ".wandb" or (p.is_dir() and any(p.rglob("*.wandb"))),
        ),
        "TensorBoard": (
            tensorboard.read,
            lambda p: "tfevents" in p.name or (p.is_dir() and any(p.rglob("*tfevents*"))),
        ),
        "Trainer": (
            _trainers,
            lambda p: (
                p.name == "trainer_state.json"
                or (p.is_dir() and any(p.rglob("trainer_state.json")))
            ),
        ),
        "MLflow": (
            trainer_mlflow.mlflow,
            lambda p: p.suffix in (".db", ".sqlite") and _is_mlflow(p),
        ),
    }
    reader = next((reader for reader, knows in readers.values() if knows(path)), None)
    if reader is None:
        raise UserError(
            f"`{path}` must be .jsonl, .db, .csv or .parquet, or logs of W&B (.wandb), TensorBoard (tfevents), a Trainer "
            "(trainer_state.json) or MLflow (mlflow.db), as a file or a folder of them"
        )
    return pd.DataFrame([run.row() for run in reader(path)])


def _trainers(path: Path) -> list[trainer_mlflow.Run]:
    """A run a folder of checkpoints: that of its last one."""
    files = [path] if path.is_file() else sorted(path.rglob("trainer_state.json"))
    runs = [run for file in files for run in trainer_mlflow.trainer_state(file)]
    last: dict[str, trainer_mlflow.Run] = {}
    for file, run in zip(files, runs, strict=True):
        folder = str(
            file.parent.parent if file.parent.name.startswith("checkpoint-") else file.parent
        )
        if folder not in last or run.row().get("steps", 0) >= last[folder].row().get("steps", 0):
            last[folder] = run
    return list(last.values())


def _parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except ImportError:
        raise UserError(f"`{path}` needs pyarrow: pip install 'scaletune[data]'") from None
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


def trials(
    source: str | Path | Sequence[str | Path], said: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """Records of any kind under the contract's names, and what was guessed: our own `.jsonl`, `.db` and `.csv`, or whatever `read` knows.

    Of several sources the rows of all; our own are merged, a trial that two of them hold is one.
    """
    import pandas as pd

    paths = [Path(source)] if isinstance(source, (str, Path)) else [Path(path) for path in source]
    records = [path for path in paths if _own(path) and path.suffix != ".csv"]
    found = [(read_trials(records), False)] if records else []
    found += [
        tables.tidied(read_trials(path), path.stem) for path in paths if path.suffix == ".csv"
    ]
    found += [(read(path), False) for path in paths if not _own(path)]
    runs, histories = (
        [table for table, history in found if history is wanted] for wanted in (False, True)
    )
    whole = pd.concat(runs or histories, ignore_index=True)
    return named(tables.joined(whole, pd.concat(histories)) if runs and histories else whole, said)


def _own(path: Path) -> bool:
    if path.suffix == ".jsonl":
        return not tables.foreign_lines(path)
    return (
        path.suffix == ".csv"
        or (path.suffix == ".db" and not _is_mlflow(path))
        or not path.exists()
    )


def named(
    table: pd.DataFrame, said: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """The table under the contract's names, and a sentence for each column that was guessed.

    said: {contract column: the table's own}, each used as told. A contract column that is absent is taken from CUSTOMARY, and
    `tokens` from steps * batch_tokens. UserError for a name the table does not have.
    """
    said, guessed = dict(said or {}), []
    for column, own in said.items():
        if own not in table.columns:
            raise UserError(
                f"`{column}={own}` must name a column of the records{nearest(own, map(str, table.columns))}"
            )
        table = table.assign(**{column: table[own]})
    for column, names in CUSTOMARY.items():
        found = next((name for name in names if name in table.columns), None)
        if column not in table.columns and found is not None:
            table = table.assign(**{column: table[found]})
            guessed.append(f"`{column}` is read from `{found}`")
    if "tokens" not in table.columns and {"steps", "batch_tokens"} <= set(table.columns):
        table = table.assign(tokens=table["steps"] * table["batch_tokens"])
        guessed.append("`tokens` is steps * batch_tokens")
    return table, guessed
