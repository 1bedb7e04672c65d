"""Reads text logs of training programs, as they are printed to the terminal or by Slurm.

The formats are in `log_formats`. One file is one run, except that a file to which several runs
were appended holds several, and that files of one folder with equal settings that continue one
another are one run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.importing.log_formats import PROGRAMS, find_format
from scaletune.importing.log_reader import (
    LogSegment,
    finish_run,
    join_segments,
    read_segments,
    strip_prefix,
)
from scaletune.importing.log_settings import flatten, parse
from scaletune.importing.run import ImportedRun, Setting

SUFFIXES = (".log", ".txt", ".out", ".err")
HEAD = 64 * 1024  # bytes at the start, and at the end, in which a log is recognised
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks; PowerShell redirects output as UTF-16
GENERIC = ("log", "logs", "main", "train", "training", "stdout", "output", "out", "console", "run")
"""File names that say nothing: such a run is named after its folder."""

CONFIGS = ("config.json", "params.json", "config.yaml", "config.yml", "params.yaml")
CSV_HINT = (
    "write a .csv with one row per run and the columns n_params (without embedding and readout),"
    " tokens, lr and loss"
)


def read(path: Path) -> list[ImportedRun]:
    """The runs in a log, or in all logs in a folder.

    Args:
        path: A file, or a folder, of which files with the suffixes .log, .txt, .out and .err are
            read that have lines of a known program.

    Raises:
        UserError: No log has lines of a known format.
    """
    from tqdm import tqdm

    files = [path] if path.is_file() else _logs_in(path)
    root = path.parent if path.is_file() else path
    groups: dict[Any, list[tuple[str, LogSegment]]] = {}
    for file in tqdm(files, desc="logs", unit="file", disable=None, leave=False, delay=2):
        shared = {} if _has_siblings(file, files) else _config_beside(file)
        for segment in _read_file(file):
            segment.run.config = settings = shared | segment.run.config
            key = (file.parent, tuple(sorted((k, str(v)) for k, v in settings.items())))
            groups.setdefault(key if settings else file, []).append((_name(file, root), segment))
    runs = [run for group in groups.values() for run in _join_files(group)]
    if not runs:
        raise UserError(_unknown(path, files))
    return _with_unique_ids(runs)


def looks_like_log(path: Path) -> bool:
    """Whether the start or the end of a file has a line of a known program."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            file.seek(max(file.seek(0, 2) - HEAD, 0))
            tail = file.read(HEAD)
    except OSError:
        return False
    encoding = "utf-16" if head[:2] in UTF16 else "utf-8-sig"
    if b"\0" in head and encoding == "utf-8-sig":
        return False
    lines = head.decode(encoding, "replace").splitlines()
    lines += tail.decode(encoding, "replace").splitlines() if encoding == "utf-8-sig" else []
    return any(find_format(strip_prefix(line)[1]) for line in lines)


def _logs_in(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES)
    return [file for file in files if file.is_file() and looks_like_log(file)]


def _read_file(file: Path) -> list[LogSegment]:
    """The segments of a file. A carriage return of a progress bar ends a line."""
    try:
        with file.open("rb") as content:
            encoding = "utf-16" if content.read(2) in UTF16 else "utf-8-sig"
        with file.open("r", encoding=encoding, errors="replace") as lines:
            return join_segments(read_segments(lines))
    except OSError as error:
        raise UserError(f"`{file}` must be readable, but {error}") from None


def _join_files(group: list[tuple[str, LogSegment]]) -> list[ImportedRun]:
    """Runs of files with equal settings in one folder: one that starts late continues another."""
    from_scratch = [entry for entry in group if not entry[1].starts_late()]
    if len(from_scratch) == 1 and len(group) > 1:
        ordered = sorted(group, key=lambda entry: entry[1].first)
        joined = join_segments(segment for _, segment in ordered)
        names = [from_scratch[0][0]]
    else:
        names, joined = [name for name, _ in group], [segment for _, segment in group]
    runs = []
    for name, segment in zip(names, joined, strict=True):
        run = finish_run(segment)
        run.id, run.name = name, name
        runs.append(run)
    return runs


def _with_unique_ids(runs: list[ImportedRun]) -> list[ImportedRun]:
    """Runs of one file get the ids NAME, NAME-2, ..."""
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.name] = number = counts.get(run.name, 0) + 1
        if number > 1:
            run.id = run.name = f"{run.name}-{number}"
    return runs


def _name(file: Path, root: Path) -> str:
    """The path in the given folder, without suffix; for `train.log` that of its folder."""
    inside = file.relative_to(root)
    is_generic = file.stem.lower() in GENERIC
    if not is_generic:
        return inside.with_suffix("").as_posix()
    folder = inside.parent.as_posix()
    return folder if folder != "." else file.absolute().parent.name


def _has_siblings(file: Path, files: Iterable[Path]) -> bool:
    return any(other.parent == file.parent and other != file for other in files)


def _config_beside(file: Path) -> dict[str, Setting]:
    """Settings of a configuration in the folder of a log; empty if there is none."""
    for name in CONFIGS:
        config = file.parent / name
        if config.is_file():
            settings = flatten(_load(config))
            return {k: parse(v) if isinstance(v, str) else v for k, v in settings.items()}
    return {}


def _load(config: Path) -> dict[str, Any]:
    import yaml

    try:
        text = config.read_text("utf-8")
        settings = json.loads(text) if config.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"`{config}` must be valid {config.suffix[1:].upper()}, since it gives the settings of"
            f" the log beside it, but reading it raised {type(error).__name__}"
        ) from None
    return settings if isinstance(settings, dict) else {}


def _unknown(path: Path, files: list[Path]) -> str:
    """Why nothing was read."""
    if path.is_file() and _is_trainer_log(path):
        return (
            f"`{path}` is the output of a Hugging Face Trainer, which prints no step numbers: give"
            " its output folder with the trainer_state.json files instead"
        )
    what = f"`{path}` must be a log" if path.is_file() else f"`{path}` must hold logs"
    return f"{what} of {PROGRAMS}, but no line has such a format: {CSV_HINT}"


def _is_trainer_log(path: Path) -> bool:
    with path.open("r", encoding="utf-8", errors="replace") as lines:
        return any("{'loss': " in line and "'epoch': " in line for line in lines)
