"""Reads one or several record files as a DataFrame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaletune.errors import UserError
from scaletune.records.store import read_store
from scaletune.records.trial import Trial, frame, merge_trials, read_jsonl

if TYPE_CHECKING:
    import pandas as pd


def read_trials(path: str | Path | Sequence[str | Path]) -> pd.DataFrame:
    """Reads records as a DataFrame.

    Args:
        path: A sweep's `.jsonl` or `.db`, or a `.csv`; or several of them.

    Returns:
        One row per trial, with the columns of `scaletune.records.COLUMNS` and more. A trial that
        several files hold is there once.

    Raises:
        UserError: A file is missing, empty, or of another kind.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import scaletune as st
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "runs.csv"
        ...     _ = path.write_text("n_params,tokens,lr,loss\\n1000000,20000000,0.01,3.2\\n")
        ...     runs = st.read_trials(path)
        >>> runs["loss"].tolist()
        [3.2]
    """
    import pandas as pd

    paths = [Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path]
    records = [_read_records(each) for each in paths if each.suffix != ".csv"]
    tables = [_read_csv(each) for each in paths if each.suffix == ".csv"]
    tables += [frame(merge_trials(*records))] if records else []
    if not tables:
        raise UserError("records must be one file or several, but got none")
    return tables[0] if len(tables) == 1 else pd.concat(tables, ignore_index=True)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"the records file must exist, but got `{path}`")


def _read_records(path: Path) -> list[Trial]:
    _require_file(path)
    if path.suffix not in (".jsonl", ".db"):
        raise UserError(f"records must be a .jsonl, .db or .csv file, but got `{path}`")
    trials = read_jsonl(path) if path.suffix == ".jsonl" else read_store(path)[0]
    if not trials:
        raise UserError(_empty_message(path))
    return trials


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    _require_file(path)
    try:
        table = pd.read_csv(path) if path.stat().st_size else pd.DataFrame()
    except ValueError as error:  # pandas' parser errors, and text that is not UTF-8
        raise UserError(
            f"`{path}` must be a table of comma-separated values, but"
            f" {' '.join(str(error).split())}"
        ) from error
    if table.empty:
        raise UserError(_empty_message(path))
    return table


def _empty_message(path: Path) -> str:
    return f"a records file must hold at least one trial, but `{path}` is empty"
