"""Reads the `metrics.csv` and `hparams.yaml` that the CSVLogger of Lightning writes.

Each version folder is one run. A row holds the metrics of one call of the logger, so the values of
one step are spread over several rows. Lightning counts steps from 0.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.importing.run import ImportedRun

COUNTERS = ("step", "epoch")


def read(path: Path) -> list[ImportedRun]:
    """One run per `metrics.csv`: the file itself, or all in a folder.

    Raises:
        UserError: A file has no column `step`.
    """
    files = [path] if path.is_file() else sorted(path.rglob("metrics.csv"))
    root = path.parent if path.is_file() else path
    return [run for file in files if (run := _read_version(file, root)) is not None]


def _read_version(file: Path, root: Path) -> ImportedRun | None:
    """The run of one version folder; None if nothing was logged."""
    folder = file.parent.relative_to(root).as_posix()
    name = folder if folder != "." else file.absolute().parent.name
    run = ImportedRun(name, name)
    run.add_settings(_read_hparams(file.with_name("hparams.yaml")))
    last = -1
    for row in _rows(file):
        step = _step(row.get("step"))
        if step is None:
            continue
        last = max(last, step)
        for key, text in row.items():
            number = _number(text)
            if key not in COUNTERS and number is not None:
                run.history.setdefault(key, []).append((step, number))
    if last < 0:
        return None
    run.history["iteration"] = [(last, last + 1.0)]
    return run


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open("r", encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            rows = list(reader)
            names = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"`{file}` must be a readable CSV file, but {error}") from None
    if rows and "step" not in names:
        raise UserError(
            f"`{file}` must have the column `step` of Lightning's CSVLogger, but its columns are:"
            f" {', '.join(names)}. If it is a table of your own, rename it"
        )
    return rows


def _step(text: Any) -> int | None:
    number = _number(text)
    return int(number) if number is not None and number >= 0 else None


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _read_hparams(file: Path) -> dict[str, Any]:
    """The hyperparameters of a run; values with Python tags are left out, never constructed."""
    import yaml

    class HparamsLoader(yaml.SafeLoader):
        """Reads plain values, and None for every tag."""

    HparamsLoader.add_multi_constructor("", lambda loader, suffix, node: None)
    if not file.is_file():
        return {}
    try:
        settings = yaml.load(file.read_text("utf-8"), HparamsLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"`{file}` must be valid YAML, but reading it raised {type(error).__name__}"
        ) from None
    return settings if isinstance(settings, dict) else {}
