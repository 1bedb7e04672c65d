"""Reads tables of runs: CSV, Parquet, and JSON lines."""

from __future__ import annotations

import csv
import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune.errors import UserError
from scaletune.importing.names import TOTAL_NAMES, USUAL_NAMES, canonical
from scaletune.records import COLUMNS, read_trials

if TYPE_CHECKING:
    import pandas as pd


def read_table(path: Path) -> pd.DataFrame:
    """The rows of a `.csv`, `.parquet` or `.jsonl` file, with the column names of the file."""
    if path.suffix == ".csv":
        return _require_commas(read_trials(path), path)
    return _read_parquet(path) if path.suffix == ".parquet" else read_json_lines(path)


def require_header(path: Path) -> None:
    """UserError if the column names of a CSV file are not in its first line.

    Spreadsheets write titles, `sep=,` or a comment above them, and pandas several lines of names.
    """
    try:
        with path.open("r", encoding="utf-8-sig", newline="") as file:
            lines = list(islice(csv.reader(file), 6))
    except (OSError, ValueError, csv.Error):
        return  # the reader of the file reports it
    known = [sum(_is_known(cell) for cell in line) for line in lines]
    place = max(range(len(lines)), key=lambda i: known[i], default=0)
    if place and known[place] >= 2 and known[0] < 2:
        raise UserError(
            f"the first line of a table must hold the column names, but in `{path}` line"
            f" {place + 1} does: {', '.join(lines[place][:6])}; delete the lines above it"
        )


def require_unique_names(path: Path) -> None:
    """UserError if two columns of a CSV file have one usual name: which one counts is open."""
    with path.open("r", encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file), [])
    repeated = [name for name in names if names.count(name) > 1 and _is_known(name)]
    if repeated:
        raise UserError(
            f"every column of `{path}` must have its own name, but {names.count(repeated[0])} are"
            f" named `{repeated[0]}`: rename or delete the others"
        )


def _is_known(cell: str) -> bool:
    usual = {canonical(name) for names in USUAL_NAMES.values() for name in names}
    return canonical(cell) in {*usual, *COLUMNS, *TOTAL_NAMES}


def _require_commas(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    header = str(table.columns[0])
    if len(table.columns) == 1 and set(";\t|") & set(header):
        raise UserError(
            f"the columns of a .csv file must be separated by commas, but the header of `{path}` is"
            f" {header!r}: export it again with commas, and with points in decimal numbers"
        )
    return table


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


def read_json_lines(path: Path) -> pd.DataFrame:
    """One run per line. Settings of a nested object become columns `table.key`."""
    import pandas as pd

    return pd.json_normalize(_parse_lines(path))


def _parse_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"every line of `{path}` must be JSON, but {error}") from None
    if bad := next((row for row in rows if not isinstance(row, dict)), None):
        raise UserError(f"every line of `{path}` must be an object, but got {str(bad)[:60]!r}")
    return rows
