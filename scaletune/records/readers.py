"""Records of any of the three kinds, one file or several, as a DataFrame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaletune.errors import UserError
from scaletune.records.store import glance
from scaletune.records.trial import Trial, frame, merged, read_jsonl

if TYPE_CHECKING:
    import pandas as pd


def read_trials(path: str | Path | Sequence[str | Path]) -> pd.DataFrame:
    """Records as a DataFrame with the columns of the contract: a sweep's `.jsonl` or `.db`, or a `.csv`; or several, merged.

    A trial that several hold is there once: see `merged`. Raises UserError when a file is missing, empty, or of another kind.
    """
    import pandas as pd

    paths = [Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path]
    tables = [Path(each) for each in paths if each.suffix == ".csv"]
    records = [_trials(each) for each in paths if each.suffix != ".csv"]
    found = [_table(each) for each in tables] + ([frame(merged(*records))] if records else [])
    if not found:
        raise UserError("records must be one file or several, but got none")
    return found[0] if len(found) == 1 else pd.concat(found, ignore_index=True)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"the records file must exist, but got `{path}`")


def _trials(path: Path) -> list[Trial]:
    _require_file(path)
    if path.suffix not in (".jsonl", ".db"):
        raise UserError(f"records must be a .jsonl, .db or .csv file, but got `{path}`")
    trials = read_jsonl(path) if path.suffix == ".jsonl" else glance(path)[0]
    if not trials:
        raise UserError(_empty(path))
    return trials


def _table(path: Path) -> pd.DataFrame:
    import pandas as pd

    _require_file(path)
    try:
        table = pd.read_csv(path) if path.stat().st_size else pd.DataFrame()
    except (
        ValueError
    ) as error:  # pandas' parser errors are ValueErrors, and so is text that is not UTF-8
        raise UserError(
            f"`{path}` must be a table of comma-separated values, but {' '.join(str(error).split())}"
        ) from error
    if table.empty:
        raise UserError(_empty(path))
    return table


def _empty(path: Path) -> str:
    return f"a records file must hold at least one trial, but `{path}` is empty"
